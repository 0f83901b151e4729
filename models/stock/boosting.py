"""Boosting in blocks: every block of rounds is a booster of its own, which goes on from the margins before it.

XGBoost keeps random state that no saved model holds: a booster that is loaded and trained on is another one than
the same booster left alone, as soon as rows or columns are drawn. A block depends on nothing but its parameters,
the data, the margins before it and its seed, so a chain of blocks is the same to the bit, interrupted or not. It
costs the same as one booster would: what a block begins with is a number a row, not trees to be asked again.

A chain is equal, to the bit, to the one model that `merge` makes of its blocks: both add the leaves to a row's
margin in the order of the trees, in float32. Margins of rows that are not trained on are always taken of raw
features on the CPU: bins know only values that train had, and a GPU adds up in another order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import xgboost as xgb

from models.stock.trainer import BoosterConfig


def threads() -> int:
    """How many threads a booster may use: those of OMP_NUM_THREADS, else one. Workers share the cores of a machine,
    and two of them with a thread a core each are far slower than with one."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(int(wanted), 1) if wanted.isdecimal() else 1


def block_seed(seed: int, fold: int, block: int) -> int:
    """The seed of a block, in 0 .. 2^31 - 1."""
    return int(np.random.SeedSequence(seed, spawn_key=(fold, block)).generate_state(1, np.uint32)[0] >> 1)


def parameters(config: BoosterConfig, base_rate: float, seed: int, device: str) -> dict[str, Any]:
    """All that XGBoost is told.

    Args:
        base_rate: train's share of positives: the model without trees predicts it, as `scale_pos_weight` weighs it.
    """
    weighted = config.scale_pos_weight * base_rate
    return {
        **config.model_dump(),
        "objective": "binary:logistic",
        "base_score": float(np.float32(weighted / (weighted + 1.0 - base_rate))),
        "seed": seed,
        "device": device,
        "nthread": threads(),
        "disable_default_eval_metric": True,
    }


def binned(numeric: np.ndarray, labels: np.ndarray, names: Sequence[str], max_bin: int) -> xgb.QuantileDMatrix:
    """Rows [N, D] float32 (NaN where unknown) as histogram bins, a byte or two a value; for training alone."""
    return xgb.QuantileDMatrix(numeric, label=labels, feature_names=list(names), max_bin=max_bin, nthread=threads())


def first_margins(told: dict[str, Any], n_rows: int) -> np.ndarray:
    """[N] float32: the margin of a model without trees, as XGBoost itself rounds it."""
    row = xgb.DMatrix(np.zeros((1, 1), np.float32))
    booster = xgb.Booster({**told, "device": "cpu"}, cache=[row])
    return np.repeat(booster.predict(row, output_margin=True), n_rows)


def train_block(
    told: dict[str, Any], matrix: xgb.QuantileDMatrix, margins: np.ndarray, n_rounds: int
) -> tuple[bytes, np.ndarray]:
    """`n_rounds` more rounds on rows whose margins so far are `margins` [N] float32.

    Returns:
        The block's trees as UBJ, and the rows' margins after it.
    """
    matrix.set_base_margin(margins)
    booster = xgb.Booster(told, cache=[matrix])
    for iteration in range(n_rounds):
        booster.update(matrix, iteration)
    return bytes(booster.save_raw("ubj")), booster.predict(matrix, output_margin=True)  # kept while it was trained


def advance(model: bytes, numeric: np.ndarray, margins: np.ndarray | None = None) -> np.ndarray:
    """Margins [N] float32 of raw rows [N, D] after one more block, or by a whole model. Without `margins` it begins
    with the model's own base score. A row's margin does not depend on the rows beside it."""
    if not len(numeric):
        return np.empty(0, np.float32)
    return load(model).inplace_predict(numeric, predict_type="margin", base_margin=margins)


def chain(blocks: Sequence[bytes], numeric: np.ndarray) -> np.ndarray:
    """Margins [N] float32 of raw rows after all `blocks`; the first begins with its own base score."""
    margins = None
    for block in blocks:
        margins = advance(block, numeric, margins)
    if margins is None:
        raise ValueError("expected at least one block, got none")
    return margins


def merge(blocks: Sequence[bytes]) -> bytes:
    """One model as UBJ that predicts what the chain does."""
    first, *others = (json.loads(load(block).save_raw("json")) for block in blocks)
    model = _trees(first)
    for other in map(_trees, others):
        n_trees, n_rounds = len(model["trees"]), model["iteration_indptr"][-1]
        model["trees"] += [tree | {"id": n_trees + tree["id"]} for tree in other["trees"]]
        model["tree_info"] += other["tree_info"]
        model["iteration_indptr"] += [n_rounds + end for end in other["iteration_indptr"][1:]]
    model["gbtree_model_param"]["num_trees"] = str(len(model["trees"]))
    return bytes(load(json.dumps(first).encode()).save_raw("ubj"))


def load(model: bytes) -> xgb.Booster:
    """A booster on the CPU from UBJ or JSON, which must be whole: XGBoost may end the process by damaged bytes."""
    booster = xgb.Booster({"nthread": threads()})
    booster.load_model(bytearray(model))
    return booster


def _trees(document: dict[str, Any]) -> dict[str, Any]:
    return document["learner"]["gradient_booster"]["model"]
