"""Training of the stock model: a step is a block of boosting rounds, on every fold.

Everything random comes from `run.seed`, the fold and the step; a checkpoint holds the blocks and the margins of all
rows so far. So a resumed run equals an uninterrupted one, to the bit, and has nothing to compute again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import checkpoint as checkpoints
from models.stock import boosting, matrices
from models.stock.data import TASK, StockDataset
from models.stock.measures import Validation
from models.stock.trainer import StockConfig
from models.trainer import InputError, Measurement, Run


class Training:
    """One run of `fit`: the blocks of every fold and what a checkpoint holds beside them.

    Shape: `train_margins` one [N of the fold] float32 each; `valid_margins` [N of valid], each row by its own fold.
    """

    def __init__(self, config: StockConfig, data: StockDataset, run: Run) -> None:
        if run.decision.task != TASK:
            raise InputError(f"decision.task: expected {TASK}, got {run.decision.task!r}")
        self.config, self.run, self.data_hash = config, run, data.manifest.data_hash
        self.names = matrices.chosen(config.features, data)
        self.folds = matrices.folds(data)
        self.binned = matrices.binned(data, self.names, config.booster.max_bin)
        self.valid = matrices.columns(data, "valid", self.names)
        self.validation = Validation(data, self.folds, run.decision, config.booster.scale_pos_weight)
        self.blocks: list[list[Tensor]] = [[] for _ in self.folds]
        self.train_margins = [
            boosting.first_margins(self._told(i), len(rows.labels)) for i, rows in enumerate(self.binned)
        ]
        self.valid_margins = np.empty(len(self.valid), np.float32)
        for fold, margins in zip(self.folds, self.train_margins, strict=True):
            self.valid_margins[fold.part] = margins[0]
        self.next_step, self.elapsed_s = 0, 0.0
        self.best_step, self.best_value, self.best_metrics = -1, -math.inf, {}

    @property
    def finished(self) -> bool:
        """The budget or the patience is used up."""
        training = self.config.training
        rounds = self.next_step * training.checkpoint_every
        waited = (self.next_step - 1 - self.best_step) * training.checkpoint_every
        return rounds >= training.max_rounds or (self.next_step > 0 and waited >= training.patience)

    def step(self) -> Measurement:
        """Train and measure one block on every fold; on return its checkpoint is durable."""
        start, step = time.monotonic(), self.next_step
        for i in range(len(self.folds)):
            self._block(i)
        metrics = {
            "train/rounds": float((step + 1) * self.config.training.checkpoint_every),
            f"train/{TASK}/loss": self._train_loss(),
        } | self.validation.measure(self.valid_margins)
        value = self.run.value(metrics)
        best = curves = None
        if value > self.best_value:
            self.best_step, self.best_value, self.best_metrics = step, value, metrics
            best = {"valid_logits": torch.from_numpy(self.valid_margins)}
            curves = self.validation.curves(self.valid_margins, metrics)
        self.next_step += 1
        measurement = Measurement(step, metrics, self.elapsed_s + time.monotonic() - start, curves)
        checkpoints.save(self.run, step, self._tensors(), self._state(), measurement, best)
        self.elapsed_s += time.monotonic() - start
        return measurement

    def _told(self, fold: int) -> dict[str, Any]:
        base_rate = float(self.binned[fold].labels.mean(dtype=np.float64))
        seed = boosting.block_seed(self.run.seed, fold, len(self.blocks[fold]))
        return boosting.parameters(self.config.booster, base_rate, seed, self.run.device)

    def _block(self, i: int) -> None:
        rows, part = self.binned[i], self.folds[i].part
        with rows.lock:
            block, train = boosting.train_block(
                self._told(i), rows.matrix, self.train_margins[i], self.config.training.checkpoint_every
            )
        valid = boosting.advance(block, self.valid[part], self.valid_margins[part])
        if not (np.isfinite(train).all() and np.isfinite(valid).all()):
            raise FloatingPointError(
                f"step {self.next_step}: expected finite margins; raise booster.reg_lambda or min_child_weight"
            )
        self.train_margins[i], self.valid_margins[part] = train, valid
        self.blocks[i].append(torch.frombuffer(bytearray(block), dtype=torch.uint8))

    def _train_loss(self) -> float:
        """Mean log loss of the folds' training rows."""
        losses = [
            np.logaddexp(np.float32(0.0), np.where(rows.labels == 1.0, -margins, margins)).mean(dtype=np.float64)
            for rows, margins in zip(self.binned, self.train_margins, strict=True)
        ]
        return float(np.mean(losses))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            block_name(i, step): block for i, blocks in enumerate(self.blocks) for step, block in enumerate(blocks)
        }
        for i, margins in enumerate(self.train_margins):
            tensors[f"margins/train/{i}"] = torch.from_numpy(margins)
        return tensors | {"margins/valid": torch.from_numpy(self.valid_margins)}

    def _state(self) -> dict[str, Any]:
        return self._identity() | {
            "features": list(self.names),
            "best_step": self.best_step,
            "best_value": self.best_value,
            "best_metrics": self.best_metrics,
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "seed": self.run.seed,
            "data_hash": self.data_hash,
            "n_folds": len(self.folds),
        }

    def restore(self, found: checkpoints.Checkpoint) -> Measurement:
        """Continue after a checkpoint; its measurement, as `step` gave it.

        Raises InputError where it belongs to another configuration, seed or dataset.
        """
        state, tensors = found.state, found.tensors
        checkpoints.refuse_other(found, self._identity())
        self.next_step, self.elapsed_s = found.step + 1, found.measurement.elapsed_s
        self.blocks = [[tensors[block_name(i, s)] for s in range(self.next_step)] for i in range(len(self.folds))]
        self.train_margins = [tensors[f"margins/train/{i}"].numpy() for i in range(len(self.folds))]
        self.valid_margins = tensors["margins/valid"].numpy()
        self.best_step, self.best_value = state["best_step"], state["best_value"]
        self.best_metrics = state["best_metrics"]
        if self.best_step != found.step:
            return found.measurement
        curves = self.validation.curves(self.valid_margins, found.measurement.metrics)  # a checkpoint keeps none
        return replace(found.measurement, curves=curves)


def block_name(fold: int, step: int) -> str:
    """The tensor of a checkpoint that holds a block's UBJ."""
    return f"block/{fold}/{step:05d}"


def best_blocks(found: checkpoints.Checkpoint) -> list[Sequence[bytes]]:
    """Of every fold, the blocks up to the best step of a checkpoint."""
    steps = range(found.state["best_step"] + 1)
    return [
        [found.tensors[block_name(i, step)].numpy().tobytes() for step in steps]
        for i in range(found.state["n_folds"])
    ]


def fit(config: StockConfig, data: StockDataset, run: Run) -> Iterator[Measurement]:
    """See `StockTrainer.fit`."""
    training = Training(config, data, run)
    yield from checkpoints.resumed(run, training.restore)
    while not training.finished:
        yield training.step()
