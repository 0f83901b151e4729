"""What an evaluation is told of the rows of a role: what is true of them, and their features. Imports no torch."""

from __future__ import annotations

import numpy as np

from models.stock.data import TASK, Part, StockDataset
from models.trainer import Decision, Features, InputError, Labels, Problem, Role

UNITS = ("row", "day", "stock")


def unit_problems(decision: Decision) -> list[Problem]:
    """The fault of a unit that bars do not have."""
    if decision.unit in UNITS:
        return []
    return [Problem("decision.unit", f"expected {', '.join(UNITS)}, got {decision.unit!r}")]


def unit(part: Part, decision: Decision) -> np.ndarray:
    """[N] int64: the row itself, its day or its stock. Raises InputError for any other unit."""
    for problem in unit_problems(decision):
        raise InputError(f"{problem.path}: {problem.message}")
    if decision.unit == "row":
        return np.arange(len(part), dtype=np.int64)
    return np.array(part.day if decision.unit == "day" else part.stock, np.int64)


def labels(data: StockDataset, role: Role, decision: Decision) -> Labels:
    """See `Trainer.labels`. There is no money; rows are grouped by day and by stock."""
    part = data.part(role)
    return Labels(
        tasks={TASK: np.array(part.labels, np.float32)},
        unit=unit(part, decision),
        amount=None,
        transforms={},
        groups={"day": np.array(part.day, np.int64), "stock": np.array(part.stock, np.int64)},
    )


def features(data: StockDataset, role: Role) -> Features:
    """See `Trainer.features`: standardised as train is, 0 where unknown. Trees see them as they are."""
    mean, std = (np.array(data.statistics[f"feature_{name}"], np.float32) for name in ("mean", "std"))
    numeric = data.part(role).features - mean
    numeric /= std
    np.nan_to_num(numeric, copy=False, nan=0.0)
    return Features(numeric, data.feature_names, np.empty((len(numeric), 0), np.int32), (), ())
