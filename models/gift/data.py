"""The data of the gift model: what the specification says, what readers return, what the trainer gets.

A reader (`kuailive`, `table`) turns files into one `RawTable`; preparation splits it into roles, fits every
encoder and scaler on train alone and writes memory-mapped parts; `load` opens the roles asked for. Nothing
here imports torch: the coordinator of a search runs this code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo

import numpy as np
from pydantic import Field, field_validator, model_validator

from models import prepared
from models.trainer import ROLES, DataSpec, FrozenModel, InputError, Manifest, Role

if TYPE_CHECKING:
    from models.gift.origin import Origin

log = logging.getLogger(__name__)

Column = Annotated[str, Field(min_length=1)]
KUAILIVE_LABELS = ("watch_time", "has_comment", "has_like", "has_gift", "gift_amount")
N_QUANTILES = 256
DAY_VERSION = 1  # raise it with any change of the unit of tables split by day or time


class TaskSpec(FrozenModel):
    """One prediction target as the specification describes it.

    `positive` names the positive value of a binary column that is not 0/1; `above` makes a binary task of a
    number (1 iff column > above). `conditional_on` names the binary task whose positives are the only rows
    that count for this one. Regression targets are transformed, then standardised on train.
    """

    kind: Literal["binary", "regression"]
    column: Column
    transform: Literal["none", "log1p"] = "none"
    conditional_on: str | None = None
    positive: bool | int | float | str | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _fits_kind(self) -> TaskSpec:
        if self.kind == "binary":
            wrong = [n for n in ("conditional_on",) if getattr(self, n) is not None]
            wrong += ["transform"] if self.transform != "none" else []
        else:
            wrong = [n for n in ("positive", "above") if getattr(self, n) is not None]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not allowed for a {self.kind} task")
        if self.positive is not None and self.above is not None:
            raise ValueError("positive and above exclude each other: give one")
        return self


@dataclass(frozen=True)
class Task:
    """A prediction target with its name. `positive` and `above` only say how its label was made."""

    name: str
    kind: Literal["binary", "regression"]
    column: str
    transform: Literal["none", "log1p"] = "none"
    conditional_on: str | None = None
    positive: bool | int | float | str | None = None
    above: float | None = None


class Simulate(FrozenModel):
    """Scale (1 = the published size, 4.9 M clicks) and seed of simulated KuaiLive files."""

    scale: float = Field(ge=0.001, le=1.0)  # what the simulator takes (`simulate.SCALES`)
    seed: int = Field(default=42, ge=0)


class Split(FrozenModel):
    """How rows get their role; the four shares add up to 1.

    `day`: shares of the local days of `timezone`; train, validation period and test begin at a midnight, and
    calibrate is the last part of the validation time. `time`: shares of the rows in order of `column`, ties on
    one side. `group`: by a hash of `column` (KuaiLive: the user), a group on one side. `hash`: by a hash of the
    features' values, so that duplicates stay on one side.
    """

    by: Literal["day", "time", "group", "hash"]
    column: Column | None = None
    timezone: str = "UTC"
    train: float = Field(gt=0.0, lt=1.0)
    valid: float = Field(gt=0.0, lt=1.0)
    calibrate: float = Field(gt=0.0, lt=1.0)
    test: float = Field(gt=0.0, lt=1.0)

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (OSError, ValueError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f"expected a time zone such as Asia/Shanghai, got {name!r}") from error
        return name

    @model_validator(mode="after")
    def _shares_add_up(self) -> Split:
        total = self.train + self.valid + self.calibrate + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + valid + calibrate + test: expected 1, got {total:g}")
        if self.by == "hash" and self.column is not None:
            raise ValueError("column: not allowed with `by: hash`, which uses every feature column")
        return self


class GiftData(FrozenModel):
    """The `data` section of a specification."""

    source: Literal["kuailive", "table"]
    path: Path
    simulate: Simulate | None = None
    snapshot_features: bool = False
    numeric_columns: tuple[Column, ...] = ()
    categorical_columns: tuple[Column, ...] = ()
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    split: Split

    @model_validator(mode="after")
    def _consistent(self) -> GiftData:
        faults = _task_faults(self.tasks)
        faults += _kuailive_faults(self) if self.source == "kuailive" else _table_faults(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def task_list(self) -> tuple[Task, ...]:
        """The tasks in the order of the specification."""
        return tuple(Task(name=name, **spec.model_dump()) for name, spec in self.tasks.items())


def _task_faults(tasks: Mapping[str, TaskSpec]) -> list[str]:
    faults = [
        f"tasks.{name}: expected a name of letters, digits and _" for name in tasks if not name.isidentifier()
    ]
    for name, task in tasks.items():
        given = task.conditional_on
        if given is not None and (given not in tasks or tasks[given].kind != "binary"):
            names = ", ".join(n for n, t in tasks.items() if t.kind == "binary") or "none"
            faults.append(f"tasks.{name}.conditional_on: expected a binary task ({names}), got {given!r}")
    return faults


def _kuailive_faults(data: GiftData) -> list[str]:
    faults = [
        f"tasks.{name}.column: expected one of {', '.join(KUAILIVE_LABELS)}, got {task.column!r}"
        for name, task in data.tasks.items()
        if task.column not in KUAILIVE_LABELS
    ]
    if data.numeric_columns or data.categorical_columns:
        faults.append("numeric_columns, categorical_columns: for `source: table` only")
    if data.split.column is not None:
        faults.append("split.column: for `source: table` only (KuaiLive is split by click time, or by user)")
    return faults


def _table_faults(data: GiftData) -> list[str]:
    columns = [*data.numeric_columns, *data.categorical_columns]
    faults = [
        f"{c}: listed twice among the feature columns" for c in sorted({c for c in columns if columns.count(c) > 1})
    ]
    if not columns:
        faults.append("numeric_columns, categorical_columns: expected at least one feature column")
    leaks = {task.column: name for name, task in data.tasks.items() if task.column in columns}
    faults += [f"{column}: is the target of task {name} and cannot be a feature" for column, name in leaks.items()]
    if data.split.by != "hash" and data.split.column is None:
        faults.append(f"split.column: expected a column for `by: {data.split.by}`")
    faults += ["simulate: for `source: kuailive` only"] if data.simulate is not None else []
    faults += ["snapshot_features: for `source: kuailive` only"] if data.snapshot_features else []
    return faults


@dataclass(frozen=True)
class Categories:
    """A categorical column: `codes` [N] int32 index `levels`, -1 where missing."""

    codes: np.ndarray
    levels: tuple[str, ...]


@dataclass
class RawTable:
    """What a reader returns: N rows with features, labels and whatever the split needs.

    Shape:
        numeric: [N, D] float32, NaN where missing (may be a memmap); already
            compressed where the reader says so.
        labels: column (KuaiLive) or task (table) -> [N] float64 in the label's own unit, NaN where missing.
        unit: [N] int64, the exchangeable unit: the user (KuaiLive), the group, the local day, or else the row.
        order: [N] int64 time in ms, or None where nothing is ordered.
        split_key: [N] uint64 hash of the group, or None.
    `facts` are counts for people: rows per file, orphans, duplicates dropped.
    """

    numeric: np.ndarray
    numeric_names: tuple[str, ...]
    categorical: dict[str, Categories]
    labels: dict[str, np.ndarray]
    unit: np.ndarray
    order: np.ndarray | None
    split_key: np.ndarray | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One opened role, memory-mapped read-only.

    Shape:
        numeric: [N, D'] float32, standardised with train's statistics, finite; missing is 0, and columns in
            which train has missing values have an indicator column at the end.
        categorical: [N, C] int32 codes; 0 = unknown, missing or rare in train.
        labels: [N, K] float32 in the order of `tasks`: 0/1 or the regression's own unit; NaN = missing.
        unit: [N] int64.
    """

    numeric: np.ndarray
    categorical: np.ndarray
    labels: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class GiftDataset:
    """A prepared dataset with some roles opened. Every statistic comes from train alone.

    `quantiles` [Q+1, D'] are those of the standardised numeric columns (Q = 256); `target_mean` and
    `target_std` belong to the transformed labels of regression tasks (conditional tasks: over their condition
    rows); `base_rate` to binary tasks; `cardinalities` count code 0 too. `options` are those it was prepared with,
    `statistics` all that preparation found out, as JSON (`models.gift.preparation`).
    """

    manifest: Manifest
    options: GiftData
    statistics: Mapping[str, Any]
    numeric_names: tuple[str, ...]
    categorical_names: tuple[str, ...]
    cardinalities: tuple[int, ...]
    tasks: tuple[Task, ...]
    target_mean: Mapping[str, float]
    target_std: Mapping[str, float]
    base_rate: Mapping[str, float]
    quantiles: np.ndarray
    parts: Mapping[Role, Part]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the reader counted in the raw files."""
        return self.statistics["facts"]

    def part(self, role: Role) -> Part:
        """The arrays of `role`. Raises KeyError where it was not asked for when the dataset was loaded."""
        if role not in self.parts:
            raise KeyError(f"role {role} was not opened (opened: {', '.join(self.parts)})")
        return self.parts[role]


def load(data: DataSpec, roles: frozenset[Role]) -> GiftDataset:
    """Prepares the data once (content-addressed, under a lock) and opens only `roles`.

    Where the default path of KuaiLive is absent and no person named it, or no path is given at all, simulated
    files take its place, if the specification allows them; the manifest says so.

    Raises:
        InputError: missing or malformed input; a role of `roles` without rows, or without both values of a
            binary task.
        DiskError: the cache's disk is full or read-only.
    """
    from models.gift.origin import find_origin  # the readers it knows import this module's types

    return open_roles(data, find_origin(data), roles)


def open_roles(data: DataSpec, origin: Origin, roles: frozenset[Role]) -> GiftDataset:
    """As `load`, of data identified before."""
    folder = prepare(data, origin, roles, usable=roles)
    statistics = read_statistics(folder)
    refuse_unusable(statistics["roles"], roles)
    rows = {role: statistics["roles"][role]["rows"] for role in ROLES}
    kept = statistics["levels"]
    return GiftDataset(
        manifest=_manifest(origin, rows),
        options=data.options,
        statistics=statistics,
        numeric_names=tuple(statistics["numeric_names"]),
        categorical_names=tuple(kept),
        cardinalities=tuple(len(levels) + 1 for levels in kept.values()),
        tasks=data.options.task_list(),
        target_mean=statistics["target_mean"],
        target_std=statistics["target_std"],
        base_rate=statistics["base_rate"],
        quantiles=np.load(folder / "quantiles.npy", allow_pickle=False),
        parts={role: _open_part(folder / role) for role in ROLES if role in roles},
    )


def _manifest(origin: Origin, rows: Mapping[Role, int]) -> Manifest:
    return Manifest(
        data_hash=origin.data_hash,
        source=origin.source,
        simulated=origin.simulated,
        rows=rows,
        files=origin.files,
        preparation=origin.preparation,
        simulation=origin.simulation,
    )


def prepare(data: DataSpec, origin: Origin, roles: frozenset[Role], usable: frozenset[Role]) -> Path:
    """The prepared folder of `origin`, complete for `roles`. Nothing is kept where one of `usable` is not."""
    return prepared.prepare(data.cache, prepared_key(data, origin), partial(_build, data, origin, usable), roles)


def prepared_key(data: DataSpec, origin: Origin) -> str:
    """The name of the prepared folder in the cache: the hash of the data, and what has been added since to what is
    kept of them, which makes an older folder incomplete but changes no number of it."""
    options: GiftData = data.options
    with_days = options.source == "table" and options.split.by in ("day", "time")
    return origin.data_hash[:16] + (f"-days{DAY_VERSION}" if with_days else "")


def _build(data: DataSpec, origin: Origin, usable: frozenset[Role], folder: Path) -> None:
    from models.gift import origin as origins
    from models.gift import preparation

    options: GiftData = data.options
    raw = origins.read_raw(data, origin)
    labels = origins.task_labels(raw, options)
    tasks = options.task_list()
    preparation.write(folder, raw, labels, tasks, options.split, compress=options.source == "table")
    refuse_unusable(read_statistics(folder)["roles"], usable)
    if not origin.simulated:
        prepared.refuse_changed(origin.path, origin.data_hash, origins.find_origin(data).data_hash)
    key = prepared_key(data, origin)
    log.info("data prepared: %s", origin.source, extra={"action": "prepared", "key": key})


def describe(data: DataSpec) -> dict[str, Any]:
    """Facts and checks about the data, as `{"tables": {...}, "checks": [...]}`. Opens every role."""
    from models.gift.description import describe as describe_all  # it imports the second implementation

    return describe_all(data)


def read_statistics(folder: Path) -> dict[str, Any]:
    """What preparation found out: encoders, targets, and counts per role."""
    return json.loads((folder / "statistics.json").read_text())


def refuse_unusable(facts: Mapping[str, Any], roles: frozenset[Role]) -> None:
    """Raises InputError where one of `roles` has no rows, or lacks positives or negatives of a binary task."""
    for role in (role for role in ROLES if role in roles):
        if not facts[role]["rows"]:
            raise InputError(f"split: role {role} has no rows; change the shares of data.split or give more data")
        for name, counts in facts[role]["tasks"].items():
            if counts.get("positives") == 0 and counts["known"]:
                raise InputError(
                    f"split: role {role} has no positive {name} among {counts['known']} rows; "
                    "change data.split or give more data"
                )
            if counts["known"] == 0 or counts.get("positives") == counts["known"]:
                what = "no row that counts for" if counts["known"] == 0 else "no negative"
                raise InputError(f"split: role {role} has {what} {name}; change data.split or give more data")


def _open_part(folder: Path) -> Part:
    names = ("numeric", "categorical", "labels", "unit")
    return Part(**{name: prepared.open_array(folder / f"{name}.npy") for name in names})
