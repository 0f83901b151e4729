"""Facts and checks about the data for people: what is there, how it was split, and whether anything leaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from models.baselines import single_feature_pr_auc
from models.description import check, table, usable_check
from models.gift import kuailive, naive
from models.gift.data import (
    GiftData,
    GiftDataset,
    RawTable,
    Task,
    open_roles,
    prepare,
    read_statistics,
    refuse_unusable,
)
from models.gift.origin import Origin, find_origin, read_raw
from models.gift.split import Assignment, assign
from models.prepared import open_array
from models.trainer import ROLES, DataSpec, Features

SPARSE_BELOW = 0.05  # base rate under which one feature alone must not find a task's positives
ALARM_AP = 0.2
N_RECOMPUTED = 20
_SHOWN_FEATURES = 5


def describe(data: DataSpec, seed: int = 0) -> dict[str, Any]:
    """`{"tables": {title: {"columns", "rows"}}, "checks": [{"name", "ok", "detail"}]}`. Opens every role.

    The checks look at the data a second time, by other means than those that prepared it. `seed` chooses the
    rows whose features are recomputed. Raises InputError for input that cannot be prepared at all.
    """
    options: GiftData = data.options
    origin = find_origin(data)
    everything = frozenset(ROLES)
    folder = prepare(data, origin, everything, usable=frozenset())
    statistics = read_statistics(folder)
    raw = read_raw(data, origin)
    assignment = assign(raw, options.split)
    tables = {
        "data": table(["what", "value"], _identity(origin, statistics)),
        "files": _files_table(raw.facts),
        "roles": _roles_table(statistics["roles"]),
        "tasks": _tasks_table(statistics),
    }
    if "events" in raw.facts:
        tables["events"] = _events_table(raw.facts["events"])
    tables["features"] = _features_table(statistics)
    checks = [usable_check(lambda: refuse_unusable(statistics["roles"], frozenset(ROLES)))]
    if checks[0]["ok"]:
        found = _single_features(open_roles(data, origin, frozenset({"train", "valid"})))
        if found:
            tables["single features"] = _single_table(found)
        checks += _single_checks(found)
    checks.append(_disjoint_check(raw, assignment, options))
    counts = {role: len(open_array(folder / role / "unit.npy")) for role in ROLES}
    checks.append(check("every row has one role", sum(counts.values()) == len(raw.unit), f"{counts}"))
    if options.source == "kuailive":
        checks.append(_attribution_check(raw))
        checks.append(_recomputed_check(raw, origin, options, seed))
    else:
        checks.append(_target_check(raw, options))
    return {"tables": tables, "checks": checks}


def _identity(origin: Origin, statistics: Mapping[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        ["source", origin.source],
        ["path", str(origin.path)],
        ["simulated", "yes" if origin.simulated else "no"],
        ["data hash", origin.data_hash],
        ["numeric features", len(statistics["numeric_names"])],
        ["categorical features", len(statistics["levels"])],
    ]
    shown = {"rows", "files", "events", "duplicates"}
    for name, value in statistics["facts"].items():
        if name not in shown:
            value = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            rows.append([name.replace("_", " "), value])
    return rows


def _files_table(facts: Mapping[str, Any]) -> dict[str, Any]:
    repeated = facts.get("duplicates", {})
    names = facts.get("files", {})
    rows = [[names.get(name, name), count, repeated.get(name, "")] for name, count in facts["rows"].items()]
    return table(["file", "rows", "repeated ids"], rows)


def _roles_table(roles: Mapping[str, Any]) -> dict[str, Any]:
    total = sum(roles[role]["rows"] for role in ROLES)
    rows = [
        [role, roles[role]["rows"], roles[role]["rows"] / max(total, 1), roles[role]["range"]] for role in ROLES
    ]
    return table(["role", "rows", "share", "range"], rows)


def _tasks_table(statistics: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for task in statistics["tasks"]:
        for role in ROLES:
            counts = statistics["roles"][role]["tasks"][task["name"]]
            rows.append([task["name"], role, counts["known"], counts.get("positives", ""), counts["mean"]])
    return table(["task", "role", "rows that count", "positives", "base rate or mean"], rows)


def _events_table(events: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    columns = ["rows", "attributed", "orphans", "rows_sum", "attributed_sum", "orphans_sum"]
    rows = [[kind, *(counts.get(column, "") for column in columns)] for kind, counts in events.items()]
    return table(["kind", *columns], rows)


def _features_table(statistics: Mapping[str, Any]) -> dict[str, Any]:
    scale = statistics["numeric"]
    rows: list[list[Any]] = []
    for name, compressed, mean, inverse in zip(
        statistics["numeric_names"], scale["compressed"], scale["mean"], scale["inverse_std"], strict=False
    ):
        kind = "signed log1p" if compressed else "numeric"
        rows.append([name, kind, "", mean, 1.0 / inverse if inverse else 0.0])
    rows += [[name, "indicator", "", "", ""] for name in statistics["numeric_names"][len(rows) :]]
    rows += [[name, "categorical", len(kept), "", ""] for name, kept in statistics["levels"].items()]
    return table(["feature", "kind", "levels kept", "train mean", "train std"], rows)


def _single_features(dataset: GiftDataset) -> dict[Task, list[tuple[str, float]]]:
    """For each sparse binary task, what every feature alone reaches on valid, best first."""
    found = {}
    train, valid = dataset.part("train"), dataset.part("valid")
    names = (dataset.numeric_names, dataset.categorical_names, dataset.cardinalities)
    seen, judged = (Features(p.numeric, names[0], p.categorical, names[1], names[2]) for p in (train, valid))
    for k, task in enumerate(dataset.tasks):
        if task.kind == "binary" and dataset.base_rate[task.name] < SPARSE_BELOW:
            found[task] = single_feature_pr_auc(seen, train.labels[:, k], judged, valid.labels[:, k])
    return found


def _single_table(found: Mapping[Task, Sequence[tuple[str, float]]]) -> dict[str, Any]:
    rows = [[task.name, name, ap] for task, scores in found.items() for name, ap in scores[:_SHOWN_FEATURES]]
    return table(["task", "feature alone", "AP on valid"], rows)


def _single_checks(found: Mapping[Task, Sequence[tuple[str, float]]]) -> list[dict[str, Any]]:
    checks = []
    for task, scores in found.items():
        above = [f"{name} {ap:.3f}" for name, ap in scores if ap > ALARM_AP]
        detail = f"best: {scores[0][0]} AP {scores[0][1]:.3f}"
        if above:
            detail = f"ALARM, AP above {ALARM_AP}: {', '.join(above)}; does it know the future?"
        checks.append(check(f"no feature alone predicts {task.name}", not above, detail))
    if not found:
        checks.append(check("no feature alone predicts a sparse task", True, f"no base rate < {SPARSE_BELOW}"))
    return checks


def _disjoint_check(raw: RawTable, assignment: Assignment, options: GiftData) -> dict[str, Any]:
    by = options.split.by
    if by in ("day", "time"):
        ranges = [np.asarray(raw.order)[assignment.rows[r]] for r in ROLES if assignment.counts[r]]
        ok = all(before.max() < after.min() for before, after in pairwise(ranges))
        return check("roles are disjoint in time", ok, "each role ends before the next begins")
    if by == "group":
        shared = _shared_between_roles(raw.unit, assignment)
        return check("no group is in two roles", shared == 0, f"{shared} groups in two roles or more")
    shared = _shared_between_roles(_row_contents(raw), assignment)
    return check("equal rows are on one side", shared == 0, f"{shared} row contents in two roles or more")


def _row_contents(raw: RawTable) -> np.ndarray:
    """[N] the bytes of each row's features: a comparison without any hash, to check the hashed split."""
    block = np.array(raw.numeric, np.float32)
    block[block == 0] = 0.0
    block[np.isnan(block)] = np.nan
    codes = [column.codes.astype(np.int32)[:, None] for column in raw.categorical.values()]
    joined = np.ascontiguousarray(np.concatenate([block.view(np.int32), *codes], axis=1))
    return joined.view(np.dtype((np.void, joined.dtype.itemsize * joined.shape[1]))).ravel()


def _shared_between_roles(keys: np.ndarray, assignment: Assignment) -> int:
    distinct = [np.unique(keys[assignment.rows[role]]) for role in ROLES]
    _, times = np.unique(np.concatenate(distinct), return_counts=True)
    return int((times > 1).sum())


def _attribution_check(raw: RawTable) -> dict[str, Any]:
    """Attributed + orphans = rows of the file, by count and by sum, and the labels hold what was attributed."""
    faults = []
    for kind, counts in raw.facts["events"].items():
        for suffix in ("", "_sum"):
            if f"rows{suffix}" in counts:
                total, parts = (
                    counts[f"rows{suffix}"],
                    (counts[f"attributed{suffix}"], counts[f"orphans{suffix}"]),
                )
                faults += [f"{kind}{suffix}: {parts[0]} + {parts[1]} != {total}"] if sum(parts) != total else []
        if counts["rows"] != raw.facts["rows"][kind]:
            faults.append(f"{kind}: {counts['rows']} of {raw.facts['rows'][kind]} rows accounted for")
    amount, attributed = raw.labels["gift_amount"].sum(), raw.facts["events"]["gift"]["attributed_sum"]
    faults += [f"gift_amount: labels hold {amount:g}, attributed {attributed}"] if amount != attributed else []
    orphans = ", ".join(f"{kind} {counts['orphans']}" for kind, counts in raw.facts["events"].items())
    return check("attributed + orphans = events", not faults, "; ".join(faults) or f"orphans: {orphans}")


def _recomputed_check(raw: RawTable, origin: Origin, options: GiftData, seed: int) -> dict[str, Any]:
    """Half of the rows are clicks with a gift: these have the richest histories, where a leak would show."""
    generator = np.random.default_rng(seed)
    gifts = np.flatnonzero(raw.labels["has_gift"] == 1)
    rows = [
        generator.choice(pool, min(N_RECOMPUTED // 2, len(pool)), replace=False)
        for pool in (np.arange(len(raw.unit)), gifts)
    ]
    chosen = sorted({int(row) for part in rows for row in part})
    frames, _facts = kuailive.read_frames(origin.path, options.snapshot_features)
    faults = naive.differences(raw, frames, chosen)
    detail = f"PASS: {len(chosen)} random rows agree" if not faults else "; ".join(faults[:5])
    return check("features equal a second implementation that sees only the past", not faults, detail)


def _target_check(raw: RawTable, options: GiftData) -> dict[str, Any]:
    """No feature is a target under another name: equal, in every known row, to a label, or
    (binary) with one value for just one of its sides."""
    columns = {name: np.asarray(raw.numeric[:, i], np.float64) for i, name in enumerate(raw.numeric_names)}
    columns |= {name: column.codes.astype(np.float64) for name, column in raw.categorical.items()}
    faults = []
    for task in options.task_list():
        label = raw.labels[task.name].astype(np.float32)
        known = ~np.isnan(label)
        for name, values in columns.items():
            if name == task.column or _same_partition(values[known], label[known], task):
                faults.append(f"{name} is the target {task.name}")
    return check("no target among the features", not faults, "; ".join(faults) or f"{len(columns)} features")


def _same_partition(values: np.ndarray, label: np.ndarray, task: Task) -> bool:
    if task.kind == "regression":
        return bool(np.array_equal(values.astype(np.float32), label))
    # one value that all positives have and no other row, or all negatives: 0 where an amount tells the label
    sides = [(np.unique(values[label == side]), label == side) for side in (1, 0)]
    return any(len(own) == 1 and np.array_equal(np.isin(values, own), rows) for own, rows in sides)
