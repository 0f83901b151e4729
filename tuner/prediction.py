"""New rows scored with a stored model, into a Parquet file: score, probability, decision, model, row by row; and
those of the newest day, ranked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import expit

from models import get_trainer
from models.calibration import smeared
from models.trainer import InputError, Predictions, ScoredRows
from tuner.output import WAY_OUT, Progress, check_out, draft_of
from tuner.registry import ModelFolder
from tuner.snapshots import disk_errors

_OWN = ("row", "score", "probability", "decision", "model_version")


@dataclass(frozen=True)
class Newest:
    """The rows of the newest value of the key that orders a source in time.

    `time` and `eligible` name keys as in `ScoredRows`, `keys` are all of them. `rows` has the columns of the
    file, in the order of the source.
    """

    time: str
    value: Any
    eligible: str | None
    keys: tuple[str, ...]
    rows: pa.Table

    @property
    def n_selected(self) -> int | None:
        """None where nothing is decided."""
        decisions = self.rows["decision"]
        return None if decisions.null_count else _n_true(decisions)

    def best(self, top: int) -> list[dict[str, Any]]:
        """At most `top` rows by falling score, among equals in the order of the source: `rank` from 1, the keys,
        `probability` and `decision` (None where nothing is decided)."""
        best = self.rows.sort_by([("score", "descending")]).slice(0, top)
        told = best.select([*self.keys, "probability", "decision"]).to_pylist()
        return [{"rank": rank, **row} for rank, row in enumerate(told, 1)]


@dataclass(frozen=True)
class Written:
    """What came of a prediction: rows, how many of them are selected (None where nothing is decided), and the
    newest ones (None where the trainer names no order in time)."""

    n_rows: int
    n_selected: int | None
    newest: Newest | None = None


def predict(
    model: ModelFolder, version: str, source: Path, out: Path | None, cache: Path, device: str = "cpu",
    batch_rows: int = 65536, force: bool = False, progress: Progress = lambda _done, _total: None,
    newest_only: bool = False,
) -> Written:  # fmt: skip
    """Score a file or folder with a verified model, and write one row a row of the source, in its order.

    Columns: `row` (from 0), the keys of the source, `score` (raw logit, float32), `probability` (calibrated,
    float64), `decision` (whether the score reaches the certified threshold, false of a row that is not eligible;
    null where none is certified), `expected_<task>` of each amount (in its own unit, corrected by smearing; of one
    that counts only where a binary task is positive, times that task's probability, or
    `expected_<task>_given_<binary task>` where the model does not score that one) and `model_version`. What the
    trainer does with unknown categories and missing values it says itself (`Trainer.score`).

    Args:
        version: what stands in `model_version`.
        out: a Parquet file that is not there; one that is gets replaced with `force` alone, one of
            the source never. None: nothing is written.
        progress: called after every batch with the rows done and those of the whole source (None: not known).
        newest_only: write and count the newest rows alone.

    Guarantees:
        `out` is there whole or not at all, whatever is killed. Memory grows with the newest rows alone.

    Raises:
        InputError: no such source, the model does not fit it, `out` is there or cannot be made, nothing says which
            rows are the newest. DiskError: the disk refused.
    """
    _check(source, out, force)
    n_rows, n_selected, newest = 0, 0, None
    with contextlib.nullcontext(lambda _table: None) if out is None else _writer(out, force) as write:
        for batch, table in _scored(model, version, source, cache, device, batch_rows, progress):
            newest = _newer(newest, batch, table)
            if newest_only and newest is None:
                raise InputError(
                    f"--newest: expected rows with an order in time, got those of {model.trainer} without one; "
                    "leave it out, and name a file with --out"
                )
            if not newest_only:
                write(table)
                n_rows, n_selected = n_rows + table.num_rows, n_selected + _n_true(table["decision"])
        if newest_only and newest is not None:
            write(newest.rows)
            n_rows, n_selected = newest.rows.num_rows, newest.n_selected
    return Written(n_rows, None if model.threshold is None else n_selected, newest)


def _scored(
    model: ModelFolder, version: str, source: Path, cache: Path, device: str, batch_rows: int, progress: Progress
) -> Iterator[tuple[ScoredRows, pa.Table]]:
    """What the trainer scored, batch by batch, and its columns of the file."""
    n_rows = 0
    for batch in get_trainer(model.trainer).score(model.path, source, cache, device, batch_rows):
        yield batch, _table(model, version, batch)
        n_rows += len(batch.predictions.scores[model.task])
        progress(n_rows, batch.n_rows)
    if not n_rows:
        raise InputError(f"{source}: expected rows to score, got none")


def _check(source: Path, out: Path | None, force: bool) -> None:
    """What would fail at the end fails at the beginning."""
    if out is not None:
        check_out(out, force)
        if out.suffix != ".parquet":
            raise InputError(f"{out}: expected a name that ends in .parquet, for that is what is written")
    if not source.exists():
        raise InputError(f"{source}: expected a file or folder to score, got nothing; name one with --data")
    if out is not None and out.exists() and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: expected a file that is no part of {source}, the data; name another --out")


def _newer(newest: Newest | None, batch: ScoredRows, table: pa.Table) -> Newest | None:
    """The newest rows of all up to this batch, in whatever order batches come: what is older is dropped."""
    if batch.time is None:
        return newest
    value = pc.max(table[batch.time]).as_py()
    if newest is not None and value < newest.value:
        return newest
    rows = table.filter(pc.equal(table[batch.time], value))
    if newest is not None and value == newest.value:
        rows = pa.concat_tables([newest.rows, rows])
    return Newest(batch.time, value, batch.eligible, tuple(batch.keys), rows)


def _table(model: ModelFolder, version: str, batch: ScoredRows) -> pa.Table:
    scores = _scores(model, batch)
    probability = model.calibrator(batch.predictions.logits(model.task))
    amounts = _amounts(model, batch.predictions, probability)
    if taken := set(batch.keys) & {*_OWN, *amounts}:
        raise InputError(f"{model.path}: expected keys of other names than {', '.join(sorted(taken))}; rename them")
    n_rows = len(scores)
    columns: dict[str, pa.Array | np.ndarray] = {
        "row": np.arange(batch.first_row, batch.first_row + n_rows, dtype=np.int64),
        **{name: np.asarray(values) for name, values in batch.keys.items()},
        "score": scores,
        "probability": probability,
        "decision": _decisions(model, batch, scores),
        **amounts,
        "model_version": pa.DictionaryArray.from_arrays(np.zeros(n_rows, np.int32), [version]),
    }
    return pa.table(columns)


def _decisions(model: ModelFolder, batch: ScoredRows, scores: np.ndarray) -> pa.Array:
    if model.threshold is None:
        return pa.nulls(len(scores), pa.bool_())
    # float32 against the float32 that the threshold was: nothing is rounded twice
    reached = scores >= np.float32(model.threshold)
    return pa.array(reached if batch.eligible is None else reached & batch.keys[batch.eligible])


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


@contextlib.contextmanager
def _writer(out: Path, force: bool) -> Iterator[Callable[[pa.Table], None]]:
    """Writes tables into a Parquet file that is there whole at the end, or not at all."""
    with draft_of(out, force) as draft:
        writer: pq.ParquetWriter | None = None

        def write(table: pa.Table) -> None:
            nonlocal writer
            with disk_errors(out, "it", WAY_OUT):
                if writer is None:
                    writer = pq.ParquetWriter(draft, table.schema)
                writer.write_table(table)

        try:
            yield write
            with disk_errors(out, "it", WAY_OUT):
                if writer is not None:
                    writer.close()
        finally:
            if writer is not None and writer.is_open:
                with contextlib.suppress(OSError, pa.ArrowException):
                    writer.close()
