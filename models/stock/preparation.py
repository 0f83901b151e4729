"""From bars to the arrays of each role. Features come before the split, statistics of them from train alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from models.prepared import ArrayWriter, write_array
from models.stock import features, labels
from models.stock.bars import Bars
from models.stock.data import StockData
from models.stock.split import FATES, fates, first_days, in_universe
from models.trainer import ROLES, InputError

log = logging.getLogger(__name__)

PREPARATION_VERSION = 1  # raise it with any change of a prepared number
STATISTICS = "statistics.json"
DATES = "dates.npy"
_CHUNK_ROWS = 1 << 16


def write(folder: Path, bars: Bars, options: StockData) -> None:
    """Writes statistics and market days at the top of `folder`, the arrays of every role into a folder of its own.

    Raises InputError where a feature is infinite.
    """
    outcome = labels.outcomes(bars, options.label, options.universe)
    log.info("labels known of %d bars", np.isfinite(outcome.label).sum(), extra={"action": "labels"})
    matrix = features.build(bars)
    log.info("%d features of %d bars", matrix.shape[1], len(matrix), extra={"action": "features"})
    fate = fates(bars, outcome, options.universe, options.split)
    order = np.argsort(bars.day, kind="stable")  # from (stock, day) to (day, stock): the order of `score`
    counted = {}
    for code, role in enumerate(ROLES):
        row = np.flatnonzero(fate[order] == code)
        chosen = order[row]
        _write_features(folder / role / "features.npy", matrix, chosen, role)
        columns = {
            "labels": outcome.label[chosen],
            "day": bars.day[chosen],
            "stock": bars.stock[chosen],
            "label_end": outcome.label_end[chosen],
        }
        for name, column in columns.items():
            write_array(folder / role / f"{name}.npy", column)
        write_array(folder / role / "row.npy", row.astype(np.int64))
        counted[role] = _role(bars, columns)
    statistics = {
        "feature_names": list(features.names()),
        **_moments(matrix, order[fate[order] == 0]),
        "base_rate": counted["train"]["base_rate"],
        "roles": counted,
        "first_days": dict(zip(ROLES, (0, *first_days(bars.dates, options.split)), strict=True)),
        "fates": dict(zip(FATES, np.bincount(fate, minlength=len(FATES)).tolist(), strict=True)),
        "stocks": list(bars.stocks),
        "stocks_in_universe": int(in_universe(bars, options.universe).sum()),
        "industries": len(bars.industries),
        "days": [int(bars.dates[0]), int(bars.dates[-1])],
        "facts": dict(bars.facts),
    }
    write_array(folder / DATES, bars.dates)
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=1, allow_nan=False))


def _write_features(path: Path, matrix: np.ndarray, rows: np.ndarray, role: str) -> None:
    with ArrayWriter(path, (len(rows), matrix.shape[1]), np.float32) as writer:
        for start in range(0, len(rows), _CHUNK_ROWS):
            block = matrix[rows[start : start + _CHUNK_ROWS]]
            infinite = np.isinf(block).any(axis=0)
            if infinite.any():
                name = features.names()[int(np.argmax(infinite))]
                raise InputError(f"feature {name}: expected finite values, got an infinite one in role {role}")
            writer.append(block)


def _role(bars: Bars, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of one role, and how its base rate swings from day to day."""
    label, days = columns["labels"], columns["day"]
    if not len(label):
        return {"rows": 0, "positives": 0, "base_rate": None, "days": 0, "stocks": 0}
    present, index = np.unique(days, return_inverse=True)
    daily = np.bincount(index, label) / np.bincount(index)
    return {
        "rows": len(label),
        "positives": int(label.sum(dtype=np.float64)),
        "base_rate": float(label.mean(dtype=np.float64)),
        "days": len(present),
        "stocks": len(np.unique(columns["stock"])),
        "range": [int(bars.dates[present[0]]), int(bars.dates[present[-1]])],
        "daily_base_rate": dict(
            zip(("min", "median", "max"), np.quantile(daily, (0, 0.5, 1)).tolist(), strict=True)
        ),
    }


def _moments(matrix: np.ndarray, rows: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each feature over the `rows` where it is known, and the share where it is not.

    One that is known nowhere has mean 0, one that does not vary standard deviation 1.
    """
    found: dict[str, list[float]] = {"feature_mean": [], "feature_std": [], "feature_missing": []}
    for column in range(matrix.shape[1]):
        values = matrix[rows, column]
        known = values[~np.isnan(values)].astype(np.float64)
        mean = float(known.mean()) if len(known) else 0.0
        std = float(known.std()) if len(known) else 0.0
        found["feature_mean"].append(mean)
        found["feature_std"].append(std if std > 1e-9 * max(abs(mean), 1e-30) else 1.0)
        found["feature_missing"].append(1.0 - len(known) / max(len(values), 1))
    return found
