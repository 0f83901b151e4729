"""A small stock problem with a planted signal: as files, the way a person gives them, and made in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.stock.data import Part, StockData, StockDataset
from models.stock.features import SEED
from models.stock.trainer import StockConfig
from models.trainer import ROLES, DataSpec, Decision, Manifest, Role
from tests.models.stock import market

DECISION = Decision(task="rise", target_precision=0.5, min_selected=20, unit="day")
CONFIG: dict[str, Any] = {
    "features": "full",
    "booster": {"subsample": 0.8, "colsample_bytree": 0.8, "max_depth": 3, "learning_rate": 0.1, "max_bin": 64},
    "training": {"max_rounds": 25, "checkpoint_every": 5, "patience": 25},
}


def config(**changed: Any) -> StockConfig:
    """CONFIG with sections updated (`booster={"max_depth": 1}`)."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for key, value in changed.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    return StockConfig(**merged)


def planted_spec(folder: Path, **changed: Any) -> DataSpec:
    """The market's DataSpec, its files written into `folder` if they are not there; `changed` replaces sections."""
    path = folder / "market"
    bars = market.random_bars(n_stocks=16, n_days=260, strength=1.0)
    return market.spec(path, market.write_files(path, bars, **changed))


# ---- in memory: what the trainer gets, without files and features behind it

N_DAYS, N_STOCKS, HORIZON = 120, 20, 5


def made(folds: int = 1, embargo: int = 0, gaps: bool = True, seed: int = 0) -> StockDataset:
    """A dataset with all roles open, 20 rows a day; whether a stock rises follows its first two features, its day
    and, with `gaps`, whether the sixth is missing. The feature beyond `SEED` is noise."""
    rng = np.random.default_rng(seed)
    names = (*SEED, "noise")
    day, stock = (axis.ravel() for axis in np.meshgrid(np.arange(N_DAYS), np.arange(N_STOCKS), indexing="ij"))
    numeric = rng.standard_normal((len(day), len(names))).astype(np.float32)
    if gaps:
        numeric[rng.random(numeric.shape) < 0.1] = np.nan
    known = np.nan_to_num(numeric)
    signal = known[:, 0] - known[:, 1] + 1.5 * np.isnan(numeric[:, 5]) + 0.5 * rng.standard_normal(N_DAYS)[day]
    labels = (signal + rng.standard_normal(len(day)) > 1.0).astype(np.float32)
    options = StockData(path=Path("made"), split={"embargo": embargo, "folds": folds})
    spans = {"train": (0, 60 - HORIZON), "valid": (60, 90 - HORIZON), "calibrate": (90, 100), "test": (100, 120)}
    parts: dict[Role, Part] = {}
    for role, (first, end) in spans.items():
        rows = np.flatnonzero((day >= first) & (day < end))
        columns = [a[rows].astype(np.int32) for a in (day, stock)]
        parts[role] = Part(numeric[rows], labels[rows], *columns, columns[0] + HORIZON, rows)
    train = parts["train"]
    statistics = {
        "feature_mean": np.nanmean(train.features, axis=0, dtype=np.float64).tolist(),
        "feature_std": np.nanstd(train.features, axis=0, dtype=np.float64).tolist(),
        "base_rate": float(train.labels.mean()),
    }
    rows = {role: len(parts[role]) for role in ROLES}
    return StockDataset(
        manifest=Manifest(f"{seed}-{folds}-{embargo}-{gaps}", "made", True, rows),
        options=options,
        statistics=statistics,
        feature_names=names,
        dates=market.calendar(N_DAYS),
        stocks=tuple(f"S{i}" for i in range(N_STOCKS)),
        parts=parts,
    )
