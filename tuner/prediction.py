"""New rows scored with a stored model, into a Parquet file: score, probability, decision, model, row by row."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from models import get_trainer
from models.calibration import smeared
from models.trainer import InputError, Predictions, ScoredRows
from storage.artifacts import flush_folder
from tuner.registry import ModelFolder
from tuner.snapshots import disk_errors

# A draft that its writer could not remove, as it was killed; after this long it is nobody's.
STALE_S = 86_400.0

_WAY_OUT = "make room, mend its permissions or name another"

_OWN = ("row", "score", "probability", "decision", "model_version")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Written:
    """What came of a prediction: rows, and how many of them are selected (None where nothing is decided)."""

    n_rows: int
    n_selected: int | None


def predict(
    model: ModelFolder, version: str, source: Path, out: Path, cache: Path, device: str = "cpu",
    batch_rows: int = 65536, force: bool = False, progress: Progress = lambda _done, _total: None,
) -> Written:  # fmt: skip
    """Score a file or folder with a verified model, and write one row a row of the source, in its order.

    Columns: `row` (from 0), the keys of the source, `score` (raw logit, float32), `probability` (calibrated,
    float64), `decision` (whether the score reaches the certified threshold; null where none is certified),
    `expected_<task>` of each amount (in its own unit, corrected by smearing; of one that counts only where a binary
    task is positive, times that task's probability, or `expected_<task>_given_<binary task>` where the model does
    not score that one) and `model_version`. What the trainer does with unknown categories and missing values it
    says itself (`Trainer.score`).

    Args:
        version: what stands in `model_version`.
        out: a Parquet file that is not there; one that is gets replaced with `force` alone, one of
            the source never.
        progress: called after every batch with the rows done and those of the whole source (None: not known).

    Guarantees:
        `out` is there whole or not at all, whatever is killed. Memory does not grow with the rows.

    Raises:
        InputError: no such source, the model does not fit it, `out` is there or cannot be made. DiskError: the
            disk refused.
    """
    _check_out(out, force)
    if not source.exists():
        raise InputError(f"{source}: expected a file or folder to score, got nothing; name one with --data")
    if out.exists() and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: expected a file that is no part of {source}, the data; name another --out")
    trainer = get_trainer(model.trainer)
    batches = trainer.score(model.path, source, cache, device, batch_rows)
    n_rows, n_selected = 0, 0
    with _writer(out, force) as write:
        for batch in batches:
            table = _table(model, version, batch)
            write(table)
            n_rows += table.num_rows
            n_selected += _n_true(table["decision"])
            progress(n_rows, batch.n_rows)
        if not n_rows:
            raise InputError(f"{source}: expected rows to score, got none")
    return Written(n_rows, None if model.threshold is None else n_selected)


def _table(model: ModelFolder, version: str, batch: ScoredRows) -> pa.Table:
    scores = _scores(model, batch)
    probability = model.calibrator(batch.predictions.logits(model.task))
    amounts = _amounts(model, batch.predictions, probability)
    if taken := set(batch.keys) & {*_OWN, *amounts}:
        raise InputError(f"{model.path}: expected keys of other names than {', '.join(sorted(taken))}; rename them")
    n_rows = len(scores)
    decisions = (
        pa.nulls(n_rows, pa.bool_())
        if model.threshold is None
        # float32 against the float32 that the threshold was: nothing is rounded twice
        else pa.array(scores >= np.float32(model.threshold))
    )
    columns: dict[str, pa.Array | np.ndarray] = {
        "row": np.arange(batch.first_row, batch.first_row + n_rows, dtype=np.int64),
        **{name: np.asarray(values) for name, values in batch.keys.items()},
        "score": scores,
        "probability": probability,
        "decision": decisions,
        **amounts,
        "model_version": pa.DictionaryArray.from_arrays(np.zeros(n_rows, np.int32), [version]),
    }
    return pa.table(columns)


def _amounts(model: ModelFolder, predictions: Predictions, probability: np.ndarray) -> dict[str, np.ndarray]:
    """The amounts that are to be expected of each row, by column."""
    columns = {}
    for task, how in model.smearing.items():
        name, amount = f"expected_{task}", smeared(predictions.scores[task], how["factor"], how["transform"])
        given = how.get("given")
        if given == model.task:
            amount = probability * amount
        elif given in predictions.scores:
            amount = expit(predictions.logits(given)) * amount
        elif given is not None:
            name = f"{name}_given_{given}"
        columns[name] = amount
    return columns


def _scores(model: ModelFolder, batch: ScoredRows) -> np.ndarray:
    """The decision's raw logits, checked: what follows is true of numbers alone."""
    missing = [task for task in (model.task, *model.smearing) if task not in batch.predictions.scores]
    if missing:
        raise InputError(f"{model.path}: expected scores of {', '.join(missing)}, got none; the model is damaged")
    scores = np.asarray(batch.predictions.scores[model.task], np.float32)
    if not np.isfinite(scores).all():
        row = batch.first_row + int(np.argmin(np.isfinite(scores)))
        raise InputError(f"{model.path}: expected a finite score of row {row}, got {scores[row - batch.first_row]}")
    return scores


def _n_true(decisions: pa.ChunkedArray) -> int:
    return 0 if decisions.null_count == len(decisions) else int(decisions.to_numpy().sum())


# --- the file ------------------------------------------------------------------------------------------------


def _check_out(out: Path, force: bool) -> None:
    """What would fail at the end fails at the beginning."""
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, got a folder; name a file with --out")
    if out.exists() and not force:
        raise InputError(f"{out}: expected no such file, got one; --force replaces it")
    if out.suffix != ".parquet":
        raise InputError(f"{out}: expected a name that ends in .parquet, for that is what is written")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: expected a folder to write to, got none; make it, or name another --out")


@contextlib.contextmanager
def _writer(out: Path, force: bool) -> Iterator[Callable[[pa.Table], None]]:
    """Writes tables into a file beside `out` that takes its name once it is whole and durable, else goes."""
    prefix = f".{out.name}.tmp-"
    draft = out.with_name(f"{prefix}{secrets.token_hex(8)}")
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        with disk_errors(out, "it", _WAY_OUT):
            if writer is None:
                writer = pq.ParquetWriter(draft, table.schema)
            writer.write_table(table)

    try:
        with disk_errors(out, "it", _WAY_OUT):
            _remove_stale(out.parent, prefix)
            draft.touch(exist_ok=False)
        yield write
        with disk_errors(out, "it", _WAY_OUT):
            if writer is not None:
                writer.close()
            _publish(draft, out, force)
    finally:
        if writer is not None and writer.is_open:
            with contextlib.suppress(OSError, pa.ArrowException):
                writer.close()
        with contextlib.suppress(OSError):
            draft.unlink()


def _publish(draft: Path, out: Path, force: bool) -> None:
    with draft.open("rb") as whole:
        os.fsync(whole.fileno())
    if force:
        draft.replace(out)
    else:
        _take_name(draft, out)
    flush_folder(out.parent)


def _take_name(draft: Path, out: Path) -> None:
    """Rename, but never over a file that came meanwhile."""
    try:
        os.link(draft, out)
    except FileExistsError:
        raise InputError(
            f"{out}: expected no such file, got one that somebody made meanwhile; --force replaces it"
        ) from None
    except OSError:  # a file system without links
        _check_out(out, force=False)
        draft.replace(out)


def _remove_stale(folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.name.startswith(prefix) and time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
