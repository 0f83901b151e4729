"""A small table with a planted signal, through the same path as a person's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.gift.data import GiftData, GiftDataset
from models.gift.trainer import GiftConfig, GiftTrainer
from models.trainer import DataSpec, Decision, Role

N_ROWS = 4000
DECISION = Decision(task="gives", target_precision=0.3)
SEARCH: frozenset[Role] = frozenset({"train", "valid"})
DATA: dict[str, Any] = {
    "source": "table",
    "numeric_columns": [f"x{i}" for i in range(6)],
    "categorical_columns": ["city"],
    "tasks": {
        "watches": {"kind": "regression", "column": "seconds", "transform": "log1p"},
        "comments": {"kind": "binary", "column": "commented"},
        "gives": {"kind": "binary", "column": "amount", "above": 0},
        "amount": {"kind": "regression", "column": "amount", "transform": "log1p", "conditional_on": "gives"},
    },
    "split": {"by": "hash", "train": 0.6, "valid": 0.2, "calibrate": 0.05, "test": 0.15},
}
CONFIG: dict[str, Any] = {
    "tasks": {
        "watches": {"weight": 0.3, "loss": "mse"},
        "comments": {"weight": 0.2, "loss": "bce"},
        "gives": {"weight": 0.3, "loss": "focal", "alpha": 0.25, "gamma": 2.0},
        "amount": {"weight": 0.2, "loss": "huber"},
    },
    "network": {"depth": 2, "width": 16, "head_width": 8, "embedding_dim": 2, "dropout": 0.1},
    "optimizer": {"lr": 0.01, "batch_size": 256},
    "training": {"max_epochs": 4},
}


def write_table(folder: Path, n_rows: int = N_ROWS, seed: int = 0) -> Path:
    """About 8 % give; who gives follows x0, x1 and the city, what they watch x0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_rows, 6))
    city = rng.integers(0, 4, n_rows)
    signal = 1.5 * x[:, 0] - 1.2 * x[:, 1] + (city == 2)
    gives = rng.random(n_rows) < 1 / (1 + np.exp(4.0 - 1.5 * signal))
    frame = pd.DataFrame({f"x{i}": x[:, i] for i in range(6)})
    frame["city"] = np.array(["Bern", "Basel", "Chur", "Zug"])[city]
    frame["seconds"] = np.expm1(np.clip(4 + x[:, 0] + 0.5 * rng.normal(size=n_rows), 0, None))
    frame["commented"] = (rng.random(n_rows) < 1 / (1 + np.exp(2 - x[:, 2] - x[:, 0]))).astype(int)
    frame["amount"] = np.where(gives, np.ceil(np.exp(1 + x[:, 3] + 0.3 * rng.normal(size=n_rows))), 0.0)
    path = folder / "planted.parquet"
    frame.to_parquet(path)
    return path


def planted_spec(folder: Path, **changed: Any) -> DataSpec:
    """The table's DataSpec, written into `folder` if it is not there; `changed` replaces keys of `data`."""
    path = folder / "planted.parquet"
    if not path.exists():
        write_table(folder)
    return DataSpec(GiftData(**{**DATA, "path": str(path), **changed}), path, folder / "cache", path_given=True)


def planted(folder: Path, roles: frozenset[Role] = SEARCH) -> GiftDataset:
    """The prepared table."""
    return GiftTrainer().load(planted_spec(folder), roles)


def config(**changed: Any) -> GiftConfig:
    """CONFIG with sections updated (`network={"depth": 1}`); `tasks` replaces the tasks as a whole."""
    merged = {key: dict(value) for key, value in CONFIG.items()}
    for key, value in changed.items():
        merged[key] = value if key == "tasks" else {**merged.get(key, {}), **value}
    return GiftConfig(**merged)
