"""Tables and specifications that the tests of the gift data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.gift.data import GiftData, GiftDataset, RawTable
from models.trainer import ROLES, DataSpec, Role

SEARCH: frozenset[Role] = frozenset({"train", "valid"})
ALL: frozenset[Role] = frozenset(ROLES)
SHARES = {"train": 0.7, "valid": 0.1, "calibrate": 0.05, "test": 0.15}
TASKS: dict[str, Any] = {
    "weeks": {"kind": "regression", "column": "weeks"},
    "pays": {"kind": "binary", "column": "paid", "above": 0},
    "rich": {"kind": "binary", "column": "income", "positive": "50000+."},
    "paid": {"kind": "regression", "column": "paid", "transform": "log1p", "conditional_on": "pays"},
}
KUAILIVE = {
    "source": "kuailive",
    "path": "data/KuaiLive",
    "simulate": {"scale": 0.004, "seed": 7},
    "tasks": {
        "watch_time": {"kind": "regression", "column": "watch_time", "transform": "log1p"},
        "has_comment": {"kind": "binary", "column": "has_comment"},
        "has_gift": {"kind": "binary", "column": "has_gift"},
        "gift_amount": {
            "kind": "regression", "column": "gift_amount", "transform": "log1p", "conditional_on": "has_gift"
        },
    },
    "split": {"by": "day", "timezone": "Asia/Shanghai", **SHARES},
}  # fmt: skip


def options(**changed: Any) -> GiftData:
    chosen: dict[str, Any] = {
        "source": "table",
        "path": "t.csv",
        "numeric_columns": ["age", "gains", "gaps", "fixed"],
        "categorical_columns": ["city"],
        "tasks": TASKS,
        "split": {"by": "time", "column": "when", **SHARES},
    }
    return GiftData(**{**chosen, **changed})


def make_frame(n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """A table in time order: skewed, missing, constant and categorical columns, and every kind of task."""
    rng = np.random.default_rng(seed)
    paid = np.where(rng.random(n) < 0.3, np.round(rng.lognormal(3, 1, n), 2), 0.0)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 12, n),
            "gains": np.where(rng.random(n) < 0.1, rng.lognormal(8, 1, n), 0.0),
            "gaps": np.where(rng.random(n) < 0.2, np.nan, rng.random(n)),
            "fixed": 7.25,
            "city": rng.choice(["Bern", "Basel", "Chur", None], n, p=[0.5, 0.3, 0.1, 0.1]),
            "when": np.arange(n),
            "weeks": rng.integers(0, 53, n),
            "paid": paid,
            "income": np.where(rng.random(n) < 0.2, "50000+.", "- 50000."),
        }
    )


def spec(folder: Path, frame: pd.DataFrame | None, given: GiftData, cache: str = "cache") -> DataSpec:
    path = folder / "t.csv"
    if frame is not None:
        frame.to_csv(path, index=False)
    return DataSpec(given, path, folder / cache, path_given=True)


def train_statistics(dataset: GiftDataset) -> dict[str, Any]:
    part = dataset.part("train")
    return {
        "numeric": np.array(part.numeric),
        "categorical": np.array(part.categorical),
        "labels": np.array(part.labels),
        "quantiles": dataset.quantiles,
        "names": (dataset.numeric_names, dataset.categorical_names, dataset.cardinalities),
        "targets": (dataset.target_mean, dataset.target_std, dataset.base_rate),
    }


def raw_of(order: Any = None, **changed: Any) -> RawTable:
    n = len(order) if order is not None else len(changed["unit"])
    chosen: dict[str, Any] = {
        "numeric": np.zeros((n, 0), np.float32),
        "numeric_names": (),
        "categorical": {},
        "labels": {},
        "unit": np.arange(n),
        "order": None if order is None else np.asarray(order, np.int64),
        "split_key": None,
    }
    return RawTable(**{**chosen, **changed})
