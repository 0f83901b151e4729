"""What an evaluation is told of the rows of a role: what is true of them, and their features. Imports no torch."""

from __future__ import annotations

import numpy as np

from models.gift.data import GiftData, GiftDataset, Part
from models.trainer import Decision, Features, InputError, Labels, Problem, Role


def units(options: GiftData) -> tuple[str, ...]:
    """What `decision.unit` may name with these data."""
    if options.source == "kuailive":
        return ("row", "user_id")
    if options.split.by == "group":
        return ("row", str(options.split.column))
    return ("row", "day") if options.split.by in ("day", "time") else ("row",)


def unit_problems(options: GiftData, decision: Decision) -> list[Problem]:
    """The fault of a unit that these data cannot tell apart."""
    possible = units(options)
    if decision.unit in possible:
        return []
    ways = (
        ""
        if options.source == "kuailive"
        else "; a column is one with `split: {by: group}`, `day` with day or time"
    )
    return [Problem("decision.unit", f"expected {' or '.join(possible)}, got {decision.unit!r}{ways}")]


def labels(data: GiftDataset, role: Role, decision: Decision) -> Labels:
    """See `Trainer.labels`. The money of a row is its first regression task that is conditional on the decision's
    task, 0 where that is not positive or the amount not known; there is none where an amount is negative."""
    part = data.part(role)
    return Labels(
        tasks=_tasks(data, part),
        unit=unit(data, role, decision),
        amount=_amount(data, part, decision.task),
        transforms={task.name: task.transform for task in data.tasks if task.kind == "regression"},
        conditions={task.name: task.conditional_on for task in data.tasks if task.conditional_on is not None},
    )


def features(data: GiftDataset, role: Role) -> Features:
    """See `Trainer.features`; memory-mapped."""
    part = data.part(role)
    return Features(part.numeric, data.numeric_names, part.categorical, data.categorical_names, data.cardinalities)


def _tasks(data: GiftDataset, part: Part) -> dict[str, np.ndarray]:
    names = [task.name for task in data.tasks]
    found = {}
    for k, task in enumerate(data.tasks):
        values = np.array(part.labels[:, k], np.float32)
        if task.conditional_on is not None:
            values[part.labels[:, names.index(task.conditional_on)] != 1.0] = np.nan
        found[task.name] = values
    return found


def unit(data: GiftDataset, role: Role, decision: Decision) -> np.ndarray:
    """Ids [N] of what is exchangeable in a role. Raises InputError where the data cannot tell it apart."""
    part = data.part(role)
    for problem in unit_problems(data.options, decision):
        raise InputError(f"{problem.path}: {problem.message}")
    if decision.unit == "row":
        return np.arange(len(part.unit), dtype=np.int64)
    if decision.unit == "day" and not data.facts.get("order_is_time", True):
        column = data.options.split.column
        raise InputError(
            f"decision.unit: expected times in {column} for `day`, got whole numbers; convert them, or use `row`"
        )
    return np.array(part.unit, np.int64)


def _amount(data: GiftDataset, part: Part, decided: str) -> np.ndarray | None:
    names = [task.name for task in data.tasks]
    column = next((k for k, task in enumerate(data.tasks) if task.conditional_on == decided), None)
    if column is None:
        return None
    amounts = np.where(part.labels[:, names.index(decided)] == 1.0, part.labels[:, column], 0.0).astype(np.float64)
    amounts[np.isnan(amounts)] = 0.0
    return None if (amounts < 0.0).any() else amounts
