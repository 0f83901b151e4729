"""What boosters are trained and measured on: the rows of each fold and the columns of the chosen features."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xgboost as xgb

from models.stock import boosting, split
from models.stock.data import StockDataset
from models.stock.features import EVERYWHERE, GROUPS, SEED
from models.stock.split import Fold
from models.stock.trainer import FeatureSet
from models.trainer import Role

KEPT = 2  # sets of bins kept of a dataset: a search switches between few sets of features, and hardly ever max_bin

_LOCK = threading.Lock()


def folds(data: StockDataset) -> list[Fold]:
    """The folds of an opened valid (`models.stock.split.folds`): one booster each."""
    return split.folds(data.part("valid"), data.dates, data.options.split)


def chosen(which: FeatureSet, data: StockDataset) -> tuple[str, ...]:
    """The names of the features of a configuration, in the order of the data."""
    if which == "seed":
        return SEED
    left_out = {name for group in EVERYWHERE for name in GROUPS[group]} if which == "within_day" else set()
    return tuple(name for name in data.feature_names if name not in left_out)


def columns(data: StockDataset, role: Role, names: Sequence[str]) -> np.ndarray:
    """[N, D] float32: the features `names` of a role; not copied where they are all of them."""
    found = data.part(role).features
    if tuple(names) == data.feature_names:
        return found
    return np.ascontiguousarray(found[:, [data.feature_names.index(name) for name in names]])


@dataclass(frozen=True)
class Binned:
    """The training rows of a fold as bins, and their labels [N] float32. Whoever sets margins holds `lock`."""

    matrix: xgb.QuantileDMatrix
    labels: np.ndarray
    lock: threading.Lock


def binned(data: StockDataset, names: tuple[str, ...], max_bin: int) -> list[Binned]:
    """The training rows of each fold; made once per dataset object, features and `max_bin`, for all trials."""
    with _LOCK:
        kept = vars(data).setdefault("_binned", {})  # a frozen dataclass; the bins live as long as it
        found = kept.pop((names, max_bin), None) or [_bin(data, names, max_bin, fold) for fold in folds(data)]
        kept[names, max_bin] = found  # the newest last
        if len(kept) > KEPT:
            del kept[next(iter(kept))]
        return found


def _bin(data: StockDataset, names: tuple[str, ...], max_bin: int, fold: Fold) -> Binned:
    numeric, labels = columns(data, "train", names), np.array(data.part("train").labels, np.float32)
    if len(fold.before):
        numeric = np.concatenate([numeric, columns(data, "valid", names)[fold.before]])
        labels = np.concatenate([labels, data.part("valid").labels[fold.before]])
    return Binned(boosting.binned(numeric, labels, names, max_bin), labels, threading.Lock())
