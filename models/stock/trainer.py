"""The stock trainer: its configuration, its checks and its face to the search.

Imports neither torch nor xgboost, so that a specification is checked and data are prepared without them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.trainer import FrozenModel


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


class StockConfig(FrozenModel):
    """One point of the search. `features`: the nine of the sketch, or all (`models.stock.features`)."""

    features: Literal["seed", "full"] = "full"
    booster: BoosterConfig = BoosterConfig()
    training: TrainingConfig = TrainingConfig()
