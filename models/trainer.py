"""The seam between trainers and the search: a trainer is a generator of measurements.

Nothing here imports torch, Optuna or SQLAlchemy, so that a specification can be checked without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

Role = Literal["train", "valid", "calibrate", "test"]
ROLES: tuple[Role, ...] = ("train", "valid", "calibrate", "test")
SEARCH_ROLES: frozenset[Role] = frozenset({"train", "valid"})


class InputError(ValueError):
    """Bad input from outside; the message is one line: where: expected, got, way out."""


class DiskError(OSError):
    """The disk refused a write (full or read-only). No fault of the trial: it can be resumed."""


class FrozenModel(BaseModel):
    """Base of every configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Decision(FrozenModel):
    """How a decision threshold is chosen on the validation scores of one binary task.

    A threshold is feasible iff the lower bound of its precision, at `confidence` (one-sided), reaches
    `target_precision` on at least `min_selected` rows. `range` (read under the name `threshold_range` too)
    restricts the threshold, as probabilities. `unit` names what is exchangeable (a row, or what rows share, such as
    the user or the day) and is what the bound counts: Clopper and Pearson's, for units other than the row at the
    effective number of rows (`models.precision`).
    """

    task: str
    target_precision: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(default=0.9, gt=0.0, lt=1.0)
    min_selected: int = Field(default=30, ge=1)
    range: tuple[float, float] | None = Field(
        default=None, validation_alias=AliasChoices("range", "threshold_range")
    )
    unit: str = "row"

    @model_validator(mode="before")
    @classmethod
    def _range_is_given_once(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and {"range", "threshold_range"} <= set(values):
            raise ValueError("range: expected range or threshold_range, which is the same, got both; remove one")
        return values

    @field_validator("range")
    @classmethod
    def _range_is_ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0.0 <= bounds[0] < bounds[1] <= 1.0:
            raise ValueError(f"expected 0 <= low < high <= 1, got {list(bounds)}")
        return bounds


class Objective(FrozenModel):
    """What the search improves: the best step's `metric`.

    `upper` is the best value that can be reached (0 by default where the metric is minimised); infeasible
    trials are ranked by their distance from it.
    """

    metric: str = Field(min_length=1)
    direction: Literal["maximize", "minimize"] = "maximize"
    upper: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _best_of_a_loss_is_zero(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("direction") == "minimize":
            return {"upper": 0.0, **values}
        return values

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric of one step, so that more is better. Raises InputError where it was not measured."""
        if self.metric not in metrics:
            raise InputError(f"objective.metric: expected one that is measured, got {self.metric!r}")
        return metrics[self.metric] if self.direction == "maximize" else -metrics[self.metric]


@dataclass(frozen=True)
class DataSpec:
    """Where a trainer's data come from.

    `options` is an instance of the trainer's own `Data` model (the specification's `data` section),
    `path` the folder or file to read, `cache` the folder for prepared arrays. `path_given` says that a
    person named the path: a missing one is then an error and never replaced by simulated data. Without a
    path (None) the data are made from the options alone, and no file is looked for.
    """

    options: Any
    path: Path | None
    cache: Path
    path_given: bool = False


@dataclass(frozen=True)
class FileStamp:
    """What identifies a raw file wherever it lies. `size_bytes` is None where it was not recorded."""

    sha256: str
    size_bytes: int | None


@dataclass(frozen=True)
class Manifest:
    """What identifies a prepared dataset, on any machine: nothing in it is a path.

    `data_hash` covers the content of the raw files (or generator version, scale and seed), the
    preparation version and every option that changes a prepared number. `source` is one line for people.
    `files` are keyed by their names inside the data folder, `preparation` names the versions of the rules that
    were applied, `simulation` what the files were generated from (None where they are real).
    """

    data_hash: str
    source: str
    simulated: bool
    rows: Mapping[Role, int]
    files: Mapping[str, FileStamp] = field(default_factory=dict)
    preparation: Mapping[str, Any] = field(default_factory=dict)
    simulation: Mapping[str, Any] | None = None


class Dataset(Protocol):
    """A prepared dataset with some roles opened."""

    manifest: Manifest


@dataclass(frozen=True)
class Run:
    """One trial's artefacts as seen by `fit`.

    Checkpoints of attempt a lie under `directory/attempt-<a>/step-<s>/`. `seed` decides everything random. The best
    step is the best by the study's objective; without one by the PR-AUC of the decision's task.
    """

    directory: Path
    seed: int
    device: str
    attempt: int
    decision: Decision
    objective: Objective | None = None

    def value(self, metrics: Mapping[str, float]) -> float:
        """What a step's metrics are worth: more is better."""
        return (self.objective or Objective(metric=f"valid/{self.decision.task}/pr_auc")).value(metrics)


@dataclass(frozen=True)
class Measurement:
    """The metrics of one step (the trainer's epoch, from 0).

    Names are `valid/<task>/<metric>` or `train/...`; values are finite floats (what is undefined is left
    out). `elapsed_s` is the training time of the run up to this step, over all its attempts. `curves` are
    given where this step is the best so far: what `models.curves` draws of the decision's task.
    """

    step: int
    metrics: Mapping[str, float]
    elapsed_s: float
    curves: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Predictions:
    """Scores of a model on some rows.

    Shape: each [N]. `scores[task]` float32: logits (binary), or values in the label's own unit (regression).
    `calibrated[task]` float64 logits of those binary tasks whose loss does not give probabilities, after the
    closed-form inverse of the loss; a binary task without an entry needs none.
    """

    scores: Mapping[str, np.ndarray]
    calibrated: Mapping[str, np.ndarray] = field(default_factory=dict)

    def logits(self, task: str) -> np.ndarray:
        """What a calibrator is fitted on and asked with: after the loss's own inverse where there is one, else the
        raw logits. Shape: [N] float64."""
        return np.asarray(self.calibrated.get(task, self.scores[task]), np.float64)


@dataclass(frozen=True)
class Labels:
    """What is true of the rows of one role, for an evaluation.

    Shape: each [N]. `tasks[name]` float32: 0 or 1 (binary), or a value in the label's own unit (regression); NaN
    where it is missing or the task's condition is not met. `unit` int64: what is exchangeable (`Decision.unit`;
    each row its own where that is `row`). `amount` float64 >= 0: the money behind each row, None without any.
    `transforms[name]` is `log1p` or `none` for every regression task; `conditions[name]` the binary task in whose
    positives alone it counts, where there is one. `groups[name]` int64: what rows belong to (`day`, `stock`), so
    that an answer can say over how many of them the selected rows spread.
    """

    tasks: Mapping[str, np.ndarray]
    unit: np.ndarray
    amount: np.ndarray | None
    transforms: Mapping[str, str]
    conditions: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """The features of one role as a trainer's models see them, for baselines.

    Shape: `numeric` [N, D] float32, finite; `codes` [N, C] int32, column c in 0..cardinalities[c] - 1, 0 = unknown.
    Both may be memory-mapped.
    """

    numeric: np.ndarray
    numeric_names: tuple[str, ...]
    codes: np.ndarray
    categorical_names: tuple[str, ...]
    cardinalities: tuple[int, ...]


@dataclass(frozen=True)
class Ablation:
    """What the decision's task scores without one part of the model's input or representation.

    `kind` is `group` (a group of features, replaced by what train knows least of: mean and unknown) or `unit` (one
    unit of the shared representation set to its mean on these rows). Shape: `scores` [N] float32 logits.
    """

    kind: Literal["group", "unit"]
    name: str
    scores: np.ndarray


@dataclass(frozen=True)
class ScoredRows:
    """A batch of rows that a stored model has scored, in the order of the source.

    `first_row` counts from 0. `n_rows` is the number of rows of the whole source, None where it is not known before
    its end. `keys` are columns of the source that say which row is which, each [N]; there may be none. `time` names
    the one that rows are ordered by in time (never missing), so that the newest can be shown; None: no such order.
    `eligible` names a boolean one: where it is False the row was no example in training and cannot be acted upon (a
    bar that could not be bought), so it is never selected, whatever its score; None: every row can be.
    """

    first_row: int
    n_rows: int | None
    keys: Mapping[str, np.ndarray]
    predictions: Predictions
    time: str | None = None
    eligible: str | None = None


@dataclass(frozen=True)
class Problem:
    """One fault of a specification: dotted `path` into the YAML and what is wrong there."""

    path: str
    message: str


class Trainer(Protocol):
    """What the search knows of a trainer.

    Guarantees every trainer gives (`tests/trainer_contract.py` holds them to it):
    - before a measurement is yielded, the checkpoint of its step is durable;
    - `fit` resumes by itself when the run's directory holds a checkpoint; it then yields the measurement of
      that checkpoint once more (with its curves) and goes on from there; stop-and-resume equals uninterrupted;
    - closing the iterator at any measurement is a safe stop, and one that has failed or was closed is at its end;
    - `fit` reads train and valid only.
    """

    Config: ClassVar[type[FrozenModel]]
    Data: ClassVar[type[FrozenModel]]

    def check(self, config: Any, data: Any, decision: Decision) -> list[Problem]:
        """Faults between `config`, `data` and `decision` that no single section can see."""
        ...

    def load(self, data: DataSpec, roles: frozenset[Role]) -> Any:
        """Prepare once (content-addressed, under a lock), then open only `roles`. Raises InputError."""
        ...

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        """Facts and checks about the data, as `{"tables": {...}, "checks": [...]}`. Opens every role."""
        ...

    def fit(self, config: Any, data: Any, run: Run) -> Iterator[Measurement]: ...

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        """What `next` would give of each of several unfinished `fit`s of one device: its next measurement, None at
        its end, or the exception it raised (others go on). A trainer may train them as one; each one's numbers stay
        its own: which others are there changes the order of summation at most, and one that advances alone has the
        numbers of `next` to the bit. What is no `Exception` (a stop) is raised, and they are all to be closed."""
        ...

    def slots(self, config: Any, data: Any, run_device: str, most: int) -> int:
        """How many trials of one device are best trained at once, from 1 to `most`, for configurations like
        `config`: measured on that device, in time and memory."""
        ...

    def predict(self, checkpoint: Path, data: Any, role: Role, device: str = "cpu") -> Predictions:
        """Scores of the run's best weights up to `checkpoint`, for every trained task."""
        ...

    def labels(self, data: Any, role: Role, decision: Decision) -> Labels:
        """What is true of an opened role, for all tasks of the data."""
        ...

    def features(self, data: Any, role: Role) -> Features:
        """The features of an opened role."""
        ...

    def ablate(
        self, checkpoint: Path, data: Any, role: Role, decision: Decision, device: str = "cpu"
    ) -> Iterator[Ablation]:
        """The decision's task scored again and again, without one group of features or one shared unit each."""
        ...

    def export(self, checkpoint: Path, data: Any, folder: Path) -> None:
        """Write all that `score` needs into an empty folder: weights, encoders, configuration; nothing pickled, no
        path of this machine. `model.json` is among the files and names the trainer as `trainer`."""
        ...

    def score(
        self, model: Path, source: Path, cache: Path, device: str = "cpu", batch_rows: int = 65536
    ) -> Iterator[ScoredRows]:
        """Score a file or folder of new rows, labels not needed, with an exported model.

        A row that was there in training gets the scores of `predict`, to the bit, whatever its batch; but for rows
        of valid that another model than the exported one scored, as cross-validation does. Memory does not grow
        with the rows, unless a row's features need the whole source, which the trainer says. Unknown categories and
        missing values are encoded as in training.

        Raises:
            InputError: a model or source that is missing or damaged; a value that is none of its column's.
        """
        ...


def advance_in_turn(fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
    """`Trainer.advance` of a trainer that trains one at a time."""
    found: list[Measurement | Exception | None] = []
    for fit in fits:
        try:
            found.append(next(fit, None))
        except Exception as error:  # whatever it is, it is this fit's, and the others go on
            found.append(error)
    return found
