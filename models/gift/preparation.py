"""From a RawTable to the arrays of each role: every statistic is fitted on train alone.

Numeric features are standardised; categorical levels that train knows well get a code; labels stay raw. The
matrix is never copied as a whole: statistics go by blocks of columns, writing by chunks of rows.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.gift.data import N_QUANTILES, Categories, RawTable, Split, Task
from models.gift.split import Assignment, Rows, assign, chunks
from models.prepared import ArrayWriter, write_array
from models.trainer import ROLES, InputError

PREPARATION_VERSION = 1  # raise it with any change of a prepared number
MIN_LEVEL_ROWS = 10  # a level with fewer train rows is rare: code 0, like an unknown one
SKEWED = 2.0  # |skewness| on train above which a generic table's column is compressed
_BLOCK_COLUMNS = 8
STATISTICS = "statistics.json"
QUANTILES = "quantiles.npy"
_log = logging.getLogger("models.gift")


@dataclass(frozen=True)
class NumericEncoder:
    """Per column, from train: signed log1p where `compressed`, then (x - mean) * inverse_std.

    A column that is constant in train gets inverse_std 0: it carries nothing, also where other roles differ.
    `indicators` are the columns with an indicator of missing values.
    """

    compressed: np.ndarray
    mean: np.ndarray
    inverse_std: np.ndarray
    indicators: np.ndarray

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """[n, D] raw -> [n, D'] float32, finite."""
        missing = np.isnan(block)
        values = _standardise(block, self.compressed, self.mean, self.inverse_std)
        values[missing] = 0.0
        return np.concatenate([values, missing[:, self.indicators].astype(np.float32)], axis=1)


def _compress(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _standardise(block: np.ndarray, compressed: Any, mean: Any, inverse_std: Any) -> np.ndarray:
    values = block.astype(np.float64)
    if np.any(compressed):
        values = np.where(compressed, _compress(values), values)
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite is refused by name when written
        return ((values - mean) * inverse_std).astype(np.float32)


def fit_numeric(
    numeric: np.ndarray, names: Sequence[str], rows: Rows, compress: bool
) -> tuple[NumericEncoder, np.ndarray]:
    """The encoder of numeric columns [N, D], and the quantiles [Q+1, D'] of the encoded train `rows`.

    Raises InputError where a value is infinite.
    """
    n_columns = numeric.shape[1]
    compressed, missing = np.zeros(n_columns, bool), np.zeros(n_columns, bool)
    mean, inverse_std = np.zeros(n_columns), np.zeros(n_columns)
    quantiles = np.zeros((N_QUANTILES + 1, n_columns), np.float32)

    def fit_block(start: int) -> list[np.ndarray]:
        indicator_quantiles = []
        block = np.ascontiguousarray(numeric[rows, start : start + _BLOCK_COLUMNS].T)
        for column, values in enumerate(block, start):
            gaps = np.isnan(values)
            missing[column] = gaps.any()
            known = values[~gaps] if missing[column] else values
            _refuse_infinite(names[column], known, "train")
            compressed[column] = compress and _is_skewed(known)
            scale = _mean_and_inverse_std(_compress(known.astype(np.float64)) if compressed[column] else known)
            mean[column], inverse_std[column] = scale
            values = _standardise(values, compressed[column], *scale)
            if missing[column]:
                values[gaps] = 0.0
                indicator_quantiles.append(_quantiles(gaps.astype(np.float32)))
            quantiles[:, column] = _quantiles(values)
        return indicator_quantiles

    with ThreadPoolExecutor(max_workers=2) as pool:
        blocks = pool.map(fit_block, range(0, n_columns, _BLOCK_COLUMNS))
        indicator_quantiles = [values for block in blocks for values in block]
    encoder = NumericEncoder(compressed, mean, inverse_std, np.flatnonzero(missing))
    extra = np.array(indicator_quantiles, np.float32).reshape(-1, N_QUANTILES + 1).T
    return encoder, np.concatenate([quantiles, extra], axis=1)


def _refuse_infinite(name: str, values: np.ndarray, role: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"feature {name}: expected finite values, got an infinite one in role {role}")


def _mean_and_inverse_std(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return 0.0, 0.0
    mean = float(np.mean(values, dtype=np.float64))
    deviation = values - mean if values.dtype == np.float64 else values.astype(np.float64) - mean
    std = float(np.sqrt(np.mean(np.square(deviation))))
    # Constant up to rounding of the mean: nothing to learn, and dividing would only blow the rounding up.
    return mean, 0.0 if std <= 1e-9 * max(abs(mean), 1e-30) else 1.0 / std


def _is_skewed(values: np.ndarray) -> bool:
    if not len(values):
        return False
    values = values.astype(np.float64)
    values -= values.mean()
    variance = np.mean(np.square(values))
    return bool(variance > 0 and abs(np.mean(values**3)) > SKEWED * variance**1.5)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """[Q+1] by linear interpolation, as numpy.quantile, which would be slower at so many quantiles."""
    ordered = np.sort(values)
    position = np.linspace(0.0, len(ordered) - 1.0, N_QUANTILES + 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, len(ordered) - 1)
    left = ordered[low].astype(np.float64)
    return (left + (ordered[high] - left) * (position - low)).astype(np.float32)


def fit_levels(column: Categories, rows: Rows) -> tuple[np.ndarray, tuple[str, ...]]:
    """A lookup from raw code (-1 at its end) to code, and the levels kept, in the order of codes 1, 2, ...

    Codes go by the names of levels, so that rows outside train change none of them.
    """
    codes = column.codes[rows]
    counts = np.bincount(codes[codes >= 0], minlength=len(column.levels))
    kept = sorted(np.flatnonzero(counts >= MIN_LEVEL_ROWS), key=column.levels.__getitem__)
    lookup = np.zeros(len(column.levels) + 1, np.int32)
    lookup[kept] = np.arange(1, len(kept) + 1, dtype=np.int32)
    return lookup, tuple(column.levels[index] for index in kept)


def transformed(task: Task, labels: np.ndarray) -> np.ndarray:
    """A raw label column as the regression sees it, before standardising."""
    return np.log1p(labels) if task.transform == "log1p" else labels


def condition_rows(task: Task, labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] bool: the rows that count for `task`: its label is known and its condition met."""
    known = ~np.isnan(labels[task.name])
    return known if task.conditional_on is None else known & (labels[task.conditional_on] == 1)


def _target_statistics(tasks: tuple[Task, ...], labels: Mapping[str, np.ndarray], rows: Rows) -> dict[str, Any]:
    train = {name: np.asarray(values[rows], np.float64) for name, values in labels.items()}
    found: dict[str, Any] = {"target_mean": {}, "target_std": {}, "base_rate": {}}
    for task in tasks:
        values = train[task.name][condition_rows(task, train)]
        if task.kind == "binary":
            found["base_rate"][task.name] = float(values.mean()) if len(values) else 0.0
            continue
        values = transformed(task, values)
        std = float(values.std()) if len(values) else 0.0
        if not std > 0.0:
            raise InputError(
                f"tasks.{task.name}: expected a target that varies on train, got {len(values)} known values "
                "that do not; check column, condition and split"
            )
        found["target_mean"][task.name], found["target_std"][task.name] = float(values.mean()), std
    return found


def write(
    folder: Path,
    raw: RawTable,
    labels: Mapping[str, np.ndarray],
    tasks: tuple[Task, ...],
    split: Split,
    compress: bool,
) -> None:
    """Writes statistics at the top of `folder` and the arrays of every role into a folder of its own.

    Raises:
        InputError: train is empty, a regression target does not vary, a feature is infinite.
    """
    assignment = assign(raw, split)
    train = assignment.rows["train"]
    if not assignment.counts["train"]:
        raise InputError("split: role train has no rows; change the shares of data.split")
    encoder, quantiles = fit_numeric(raw.numeric, raw.numeric_names, train, compress)
    levels = {name: fit_levels(column, train) for name, column in raw.categorical.items()}
    indicator_names = [f"{raw.numeric_names[i]}__missing" for i in encoder.indicators]
    statistics = {
        "numeric_names": [*raw.numeric_names, *indicator_names],
        "numeric": {
            "compressed": encoder.compressed.tolist(),
            "mean": encoder.mean.tolist(),
            "inverse_std": encoder.inverse_std.tolist(),
        },
        "levels": {name: list(kept) for name, (_, kept) in levels.items()},
        "tasks": [asdict(task) for task in tasks],
        **_target_statistics(tasks, labels, train),
        "roles": _role_facts(assignment, tasks, labels),
        "facts": raw.facts,
    }
    with ThreadPoolExecutor(max_workers=2) as pool:  # most of it is the disk's, the rest numpy's: without the GIL
        roles = [
            pool.submit(_write_role, folder / role, raw, labels, tasks, assignment, role, encoder, levels)
            for role in ROLES
        ]
        for done in roles:
            done.result()
    write_array(folder / QUANTILES, quantiles)
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"no JSON for {type(value).__name__}")


def _role_facts(
    assignment: Assignment, tasks: tuple[Task, ...], labels: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    facts = {}
    for role in ROLES:
        part = {name: np.asarray(values[assignment.rows[role]]) for name, values in labels.items()}
        counts = {}
        for task in tasks:
            values = part[task.name][condition_rows(task, part)]
            counts[task.name] = {"known": len(values), "mean": float(values.mean()) if len(values) else None}
            if task.kind == "binary":
                counts[task.name]["positives"] = int((values == 1).sum())
        facts[role] = {"rows": assignment.counts[role], "range": assignment.ranges[role], "tasks": counts}
    return facts


def _write_role(
    folder: Path,
    raw: RawTable,
    labels: Mapping[str, np.ndarray],
    tasks: tuple[Task, ...],
    assignment: Assignment,
    role: Any,
    encoder: NumericEncoder,
    levels: Mapping[str, tuple[np.ndarray, tuple[str, ...]]],
) -> None:
    n, width = assignment.counts[role], len(raw.numeric_names) + len(encoder.indicators)
    started = time.perf_counter()
    with (
        ArrayWriter(folder / "numeric.npy", (n, width), np.float32) as numeric,
        ArrayWriter(folder / "categorical.npy", (n, len(levels)), np.int32) as categorical,
        ArrayWriter(folder / "labels.npy", (n, len(tasks)), np.float32) as targets,
        ArrayWriter(folder / "unit.npy", (n,), np.int64) as unit,
    ):
        for rows in chunks(assignment.rows[role]):
            block = encoder(raw.numeric[rows])
            if not np.isfinite(block).all():
                broken = int(np.argmax(~np.isfinite(block).all(axis=0)))
                _refuse_infinite(raw.numeric_names[broken], block[:, broken], role)
            numeric.append(block)
            codes = [lookup[raw.categorical[name].codes[rows]] for name, (lookup, _) in levels.items()]
            categorical.append(_columns(codes, len(block), np.int32))
            targets.append(_columns([labels[task.name][rows] for task in tasks], len(block), np.float32))
            unit.append(raw.unit[rows])
    _log.info("%s: %d rows written in %.1f s", role, n, time.perf_counter() - started, extra={"action": "written"})


def _columns(columns: list[np.ndarray], n: int, dtype: Any) -> np.ndarray:
    out = np.empty((n, len(columns)), dtype)
    for index, column in enumerate(columns):
        out[:, index] = column
    return out
