"""The multi-task gift trainer: its configuration, its checks and its face to the search.

Imports no torch, so that a specification is checked and data are prepared without it; the training itself
is in `models.gift.fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from models.gift import data as gift_data
from models.gift import roles
from models.gift.data import GiftData, GiftDataset
from models.trainer import (
    Ablation,
    DataSpec,
    Decision,
    Features,
    FrozenModel,
    Labels,
    Measurement,
    Predictions,
    Problem,
    Role,
    Run,
    ScoredRows,
)

LOSSES = {"regression": ("mse", "huber"), "binary": ("bce", "focal")}


class TaskConfig(FrozenModel):
    """How one task is trained. `alpha` (weight of a positive; a negative has 1 - alpha) and `gamma` act in
    the focal loss alone; elsewhere they are accepted and without effect, so that arms can switch the loss."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    loss: Literal["mse", "huber", "bce", "focal"]
    alpha: float = Field(default=0.25, gt=0.0, lt=1.0)
    gamma: float = Field(default=2.0, ge=0.0, le=10.0)


class BalancingConfig(FrozenModel):
    """How the tasks' losses become one update. `alpha` acts in gradnorm alone."""

    method: Literal["fixed", "gradnorm", "pcgrad", "aligned_mtl"] = "fixed"
    alpha: float = Field(default=1.5, ge=0.0, le=10.0)


class NetworkConfig(FrozenModel):
    """Shape of the network: the tower's widths are round(width * taper^i) for i < depth."""

    depth: int = Field(default=3, ge=1, le=16)
    width: int = Field(default=256, ge=1, le=16384)
    taper: float = Field(default=0.5, gt=0.0, le=1.0)
    head_width: int = Field(default=32, ge=1, le=4096)
    dropout: float = Field(default=0.2, ge=0.0, le=0.95)
    batch_norm: bool = True
    embedding_dim: int = Field(default=8, ge=1, le=512)
    numeric_embedding: Literal["none", "piecewise_linear"] = "none"
    n_bins: int = Field(default=16, ge=1, le=256)
    bin_embedding_dim: int = Field(default=8, ge=1, le=512)


class OptimizerConfig(FrozenModel):
    """Adam with L2 penalty `weight_decay`; `batch_size` in rows."""

    lr: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    batch_size: int = Field(default=4096, ge=2)


class TrainingConfig(FrozenModel):
    """When training ends and when the learning rate falls, in epochs without a better PR-AUC of the
    decision's task on valid."""

    max_epochs: int = Field(default=50, ge=1)
    patience: int = Field(default=10, ge=1)
    lr_patience: int = Field(default=4, ge=0)
    lr_factor: float = Field(default=0.5, gt=0.0, lt=1.0)


class GiftConfig(FrozenModel):
    """One point of the search. A task of the data that is absent here is not trained."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    balancing: BalancingConfig = BalancingConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()


def _decision_problems(config: GiftConfig, data: GiftData, task: str) -> list[Problem]:
    binary = [name for name, spec in data.tasks.items() if spec.kind == "binary"]
    if task not in binary:
        found = f"{data.tasks[task].kind} task {task!r}" if task in data.tasks else repr(task)
        expected = ", ".join(binary) or "a binary task in data.tasks"
        return [Problem("decision.task", f"expected a binary task ({expected}), got {found}")]
    if task not in config.tasks:
        trained = ", ".join(config.tasks)
        message = f"{task!r} is not trained: add config.tasks.{task} (trained: {trained})"
        return [Problem("decision.task", message)]
    return []


class GiftTrainer:
    """The trainer registered as `gift` (see `models.trainer.Trainer` for what every trainer guarantees)."""

    Config: ClassVar[type[GiftConfig]] = GiftConfig
    Data: ClassVar[type[GiftData]] = GiftData

    def check(self, config: GiftConfig, data: GiftData, decision: Decision) -> list[Problem]:
        """Faults between the sections: unknown tasks, a loss of the wrong kind, no task to decide on, a unit that
        the data do not have."""
        problems = []
        for name, task in config.tasks.items():
            spec = data.tasks.get(name)
            if spec is None:
                known = ", ".join(data.tasks)
                problems.append(Problem(f"config.tasks.{name}", f"expected a task of data.tasks ({known})"))
            elif task.loss not in LOSSES[spec.kind]:
                expected = " or ".join(LOSSES[spec.kind])
                message = f"expected {expected} for a {spec.kind} task, got {task.loss}"
                problems.append(Problem(f"config.tasks.{name}.loss", message))
        for name, spec in data.tasks.items():
            given = spec.conditional_on
            if given is not None and (given not in data.tasks or data.tasks[given].kind != "binary"):
                message = f"expected a binary task of data.tasks, got {given!r}"
                problems.append(Problem(f"data.tasks.{name}.conditional_on", message))
        return problems + _decision_problems(config, data, decision.task) + roles.unit_problems(data, decision)

    def load(self, data: DataSpec, roles: frozenset[Role]) -> GiftDataset:
        """Prepare the data once, then open `roles` alone. Raises InputError."""
        return gift_data.load(data, roles)

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        """Facts and checks about the data. Opens every role."""
        return gift_data.describe(data)

    def fit(self, config: GiftConfig, data: GiftDataset, run: Run) -> Iterator[Measurement]:
        """Train until the budget or the patience ends; one measurement per epoch, its checkpoint durable.

        The same seed gives the same numbers, bit for bit on the CPU, however often the run is stopped and
        resumed.

        Raises:
            FloatingPointError: a loss or an output is no longer finite; nothing of that epoch is written.
            InputError: the run's directory holds checkpoints of another configuration or seed.
        """
        from models.gift import fits  # torch takes seconds to import, and a coordinator never fits

        return fits.Fit(config, data, run)

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        """See `models.trainer.Trainer.advance`. Those of one bucket (`models.gift.array`) train as one where that
        pays.

        Which others are there changes the order of summation alone: as one or alone, in an array of how many slots
        and of which widths. Within an array no bit of a fit depends on the other slots.
        """
        from models.gift import fits as fitting

        return fitting.advance(fits)

    def slots(self, config: GiftConfig, data: GiftDataset, run_device: str, most: int) -> int:
        """The fewest within a tenth of the fastest, measured in steps of 1, 2, 4, ... trials like `config` that
        take at most four fifths of the device's free memory. What was measured is logged."""
        from models.gift import slots

        return slots.slots(config, data, run_device, most)

    def predict(self, checkpoint: Path, data: GiftDataset, role: Role, device: str = "cpu") -> Predictions:
        """Scores of the run's best weights up to `checkpoint`, for every trained task, on `role`.

        Binary tasks give float32 logits, bit for bit those of the validation pass; regression tasks their
        own unit (through the inverse of the transform: for log1p closer to a median than to a mean). Tasks trained
        with focal loss have calibrated logits beside them.
        """
        from models.gift import inference

        return inference.predict(checkpoint, data, role, device)

    def labels(self, data: GiftDataset, role: Role, decision: Decision) -> Labels:
        """What is true of an opened role. `decision.unit` is `row`, the user (KuaiLive: `user_id`), the column of a
        table split by group, or `day` (the local day) for tables split by day or time."""
        return roles.labels(data, role, decision)

    def features(self, data: GiftDataset, role: Role) -> Features:
        """The features of an opened role, as its models see them: standardised numbers and codes."""
        return roles.features(data, role)

    def ablate(
        self, checkpoint: Path, data: GiftDataset, role: Role, decision: Decision, device: str = "cpu"
    ) -> Iterator[Ablation]:
        """The decision's task without each group of features (KuaiLive: families such as the pair's history; a
        table: each column), then without each unit of the last shared layer, whose name is its number."""
        from models.gift import ablation

        return ablation.ablate(checkpoint, data, role, decision.task, device)

    def export(self, checkpoint: Path, data: GiftDataset, folder: Path) -> None:
        """Write `model.json` (configuration, columns, encoders) and `weights.safetensors` into an empty folder."""
        from models.gift import inference

        inference.export(checkpoint, data, folder)

    def score(
        self, model: Path, source: Path, cache: Path, device: str = "cpu", batch_rows: int = 65536
    ) -> Iterator[ScoredRows]:
        """Score new rows with an exported model; see `models.gift.inference.score`. `cache` stays untouched."""
        from models.gift import inference

        return inference.score(model, source, device, batch_rows)
