"""The stock trainer: its configuration, its checks and its face to the search.

Imports neither torch nor xgboost, so that a specification is checked and data are prepared without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from models.stock import data as stock_data
from models.stock import roles
from models.stock.data import TASK, StockData, StockDataset
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
    advance_in_turn,
)


class BoosterConfig(FrozenModel):
    """XGBoost's parameters under its own names."""

    learning_rate: float = Field(default=0.05, gt=0.0, le=1.0)
    max_depth: int = Field(default=5, ge=1, le=16)
    min_child_weight: float = Field(default=5.0, ge=0.0, allow_inf_nan=False)
    subsample: float = Field(default=0.8, gt=0.0, le=1.0)
    colsample_bytree: float = Field(default=0.8, gt=0.0, le=1.0)
    reg_lambda: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    reg_alpha: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    gamma: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    scale_pos_weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    tree_method: Literal["hist"] = "hist"
    max_bin: int = Field(default=128, ge=2, le=1024)


class TrainingConfig(FrozenModel):
    """A step is a block of `checkpoint_every` boosting rounds.

    Training ends after `max_rounds`, or `patience` rounds without a better objective on valid; both are rounded up
    to whole blocks.
    """

    max_rounds: int = Field(default=1500, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)
    patience: int = Field(default=150, ge=1)


FeatureSet = Literal["seed", "within_day", "full"]


class StockConfig(FrozenModel):
    """One point of the search.

    `features` (`models.stock.features`): the nine of the sketch, those that differ between the stocks of a day, or
    all.
    """

    features: FeatureSet = "full"
    booster: BoosterConfig = BoosterConfig()
    training: TrainingConfig = TrainingConfig()


class StockTrainer:
    """The trainer registered as `stock` (see `models.trainer.Trainer` for what every trainer guarantees)."""

    Config: ClassVar[type[StockConfig]] = StockConfig
    Data: ClassVar[type[StockData]] = StockData

    def check(self, config: StockConfig, data: StockData, decision: Decision) -> list[Problem]:
        """Faults between the sections: a task or unit that bars do not have, a block longer than all training."""
        problems, training = [], config.training
        if decision.task != TASK:
            problems.append(Problem("decision.task", f"expected {TASK}, got {decision.task!r}"))
        if training.checkpoint_every > training.max_rounds:
            message = f"expected at most max_rounds ({training.max_rounds}), got {training.checkpoint_every}"
            problems.append(Problem("config.training.checkpoint_every", message))
        return problems + roles.unit_problems(decision)

    def load(self, data: DataSpec, roles: frozenset[Role]) -> StockDataset:
        """Prepare the data once, then open `roles` alone. Raises InputError."""
        return stock_data.load(data, roles)

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        """Facts and checks about the data. Opens every role."""
        return stock_data.describe(data)

    def fit(self, config: StockConfig, data: StockDataset, run: Run) -> Iterator[Measurement]:
        """Train until the budget or the patience ends; one measurement per block of rounds, its checkpoint durable.

        The same seed gives the same numbers, bit for bit on the CPU with the same number of threads, however often
        the run is stopped and resumed.

        Raises:
            FloatingPointError: a margin is no longer finite; nothing of that step is written.
            InputError: the run's directory holds checkpoints of another configuration, seed or dataset; a part of
                valid that a fold cannot be measured on.
        """
        from models.stock import fit  # torch and xgboost take seconds to import, and a coordinator never fits

        return fit.fit(config, data, run)

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        """One after the other: XGBoost fills a device with one booster."""
        return advance_in_turn(fits)

    def slots(self, config: StockConfig, data: StockDataset, run_device: str, most: int) -> int:
        """1: see `advance`."""
        return 1

    def predict(self, checkpoint: Path, data: StockDataset, role: Role, device: str = "cpu") -> Predictions:
        """Margins (float32 logits) of the best step up to `checkpoint`, on the CPU whatever the device.

        With folds every row of valid is scored by its own fold's booster, as when it was measured, and all other
        roles by the last fold's. Where positives were weighed there are calibrated logits beside them.
        """
        from models.stock import inference

        return inference.predict(checkpoint, data, role)

    def labels(self, data: StockDataset, role: Role, decision: Decision) -> Labels:
        """What is true of an opened role. `decision.unit` is `row`, `day` or `stock`."""
        return roles.labels(data, role, decision)

    def features(self, data: StockDataset, role: Role) -> Features:
        """All features of an opened role, standardised by train, 0 where unknown."""
        return roles.features(data, role)

    def ablate(
        self, checkpoint: Path, data: StockDataset, role: Role, decision: Decision, device: str = "cpu"
    ) -> Iterator[Ablation]:
        """The task without each group of features, whose columns are train's means then. Trees share no units."""
        from models.stock import inference

        return inference.ablate(checkpoint, data, role)

    def export(self, checkpoint: Path, data: StockDataset, folder: Path) -> None:
        """Write `model.ubj` (the last fold's booster, one XGBoost model) and `model.json` into an empty folder."""
        from models.stock import inference

        inference.export(checkpoint, data, folder)

    def score(
        self, model: Path, source: Path, cache: Path, device: str = "cpu", batch_rows: int = 65536
    ) -> Iterator[ScoredRows]:
        """Score all bars of a folder with an exported model; see `models.stock.inference.score`. `cache` stays
        untouched."""
        from models.stock import inference

        return inference.score(model, source, batch_rows)
