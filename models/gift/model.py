"""A trained model: a network with its weights, and what turns its outputs into scores.

It comes from a checkpoint (`load`) or from an exported folder (`models.gift.inference`), and scores rows the same
way in both cases, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models import checkpoint as checkpoints
from models.calibration import FocalInverse
from models.gift.data import GiftDataset, Task
from models.gift.losses import loss_order
from models.gift.network import MultiTaskMLP
from models.gift.trainer import GiftConfig
from models.trainer import InputError, Predictions

CHUNK_ROWS = 4096  # rows of one forward in evaluation
DEVICE_CHUNK_ROWS, DEVICE_CHUNK_VALUES = 65_536, 2**26  # elsewhere than on the CPU, where launches take the time
WEIGHTS = "network/"  # prefix of the network's tensors in checkpoints and exported folders


@dataclass(frozen=True)
class Model:
    """`tasks` are the trained ones in the order of the network's heads, `order` their names as in the data."""

    config: GiftConfig
    tasks: tuple[Task, ...]
    order: tuple[str, ...]
    network: MultiTaskMLP
    target_mean: Mapping[str, float]
    target_std: Mapping[str, float]

    @property
    def device(self) -> torch.device:
        return self.network.head_bias.device

    def head(self, task: str) -> int:
        """The column of a task's output. Raises InputError where it is not trained."""
        names = [t.name for t in self.tasks]
        if task not in names:
            raise InputError(f"decision.task: expected a trained task ({', '.join(self.order)}), got {task!r}")
        return names.index(task)

    def predictions(self, found: Tensor) -> Predictions:
        """Scores of all trained tasks from the outputs [N, K] of the network."""
        values, scores, calibrated = found.cpu(), {}, {}
        for k, task in enumerate(self.tasks):
            trained = self.config.tasks[task.name]
            if task.kind == "regression":
                scores[task.name] = self._in_own_unit(task, values[:, k].numpy())
                continue
            scores[task.name] = np.ascontiguousarray(values[:, k].numpy())
            if trained.loss == "focal":
                inverse = FocalInverse(trained.alpha, trained.gamma)
                calibrated[task.name] = inverse.logits(values[:, k].contiguous()).numpy()
        return Predictions(
            {name: scores[name] for name in self.order},
            {name: calibrated[name] for name in self.order if name in calibrated},
        )

    def _in_own_unit(self, task: Task, standardised: np.ndarray) -> np.ndarray:
        value = standardised.astype(np.float64) * (self.target_std[task.name] or 1.0)
        value += self.target_mean[task.name]
        value = np.expm1(np.clip(value, 0.0, 80.0)) if task.transform == "log1p" else value
        return value.astype(np.float32)


def trained_tasks(config: GiftConfig, known: Sequence[Task]) -> list[Task]:
    """The configuration's tasks in the order of the network's heads."""
    tasks = [task for task in known if task.name in config.tasks]
    if len(tasks) != len(config.tasks):
        unknown = ", ".join(sorted(set(config.tasks) - {t.name for t in tasks}))
        raise InputError(f"config.tasks: expected tasks of data.tasks, got {unknown}")
    return [tasks[k] for k in loss_order([config.tasks[t.name].loss for t in tasks])]


def build(
    config: GiftConfig,
    known: Sequence[Task],
    cardinalities: Sequence[int],
    quantiles: np.ndarray,
    targets: tuple[Mapping[str, float], Mapping[str, float]],
    weights: Mapping[str, Tensor],
    device: str,
) -> Model:
    """The model of these weights (`network/...`) for the tasks `known` to the data.

    Shape: quantiles [Q+1, D'] of the numeric columns. `targets` are the mean and standard deviation of each.
    """
    tasks = trained_tasks(config, known)
    n_numeric = quantiles.shape[1]
    network = MultiTaskMLP(config.network, n_numeric, cardinalities, [0.0] * len(tasks), quantiles, seed=0)
    network.load_state_dict(below(WEIGHTS, weights))
    order = tuple(task.name for task in known if task.name in config.tasks)
    return Model(config, tuple(tasks), order, network.to(device).eval(), *targets)


def load(checkpoint: Path, data: GiftDataset, device: str) -> Model:
    """The best model of the run up to `checkpoint`. Raises InputError where that is damaged or of other tasks."""
    found = checkpoints.load(checkpoint)
    config = GiftConfig.model_validate(found.state["config"])
    targets = data.target_mean, data.target_std
    return build(config, data.tasks, data.cardinalities, data.quantiles, targets, found.load_best(), device)


@torch.inference_mode()
def outputs(network: MultiTaskMLP, numeric: Tensor, codes: Tensor) -> Tensor:
    """Outputs [N, K] in evaluation mode.

    Every forward has the same shape, the last one filled up: matrix products choose their order of summation by the
    shape, and so a row's outputs are the same to the bit whichever rows are around it.
    """
    network.eval()
    size = chunk_rows(network, numeric.device)
    pairs = zip(numeric.split(size), codes.split(size), strict=True)
    return torch.cat([network(filled(n, size), filled(c, size))[: len(n)] for n, c in pairs])


def chunk_rows(network: MultiTaskMLP, device: torch.device) -> int:
    """Rows of one forward of a network in evaluation; on a GPU fewer where its layers are very wide."""
    if device.type == "cpu":
        return CHUNK_ROWS
    return max(CHUNK_ROWS, min(DEVICE_CHUNK_ROWS, DEVICE_CHUNK_VALUES // network.widest))


def filled(rows: Tensor, size: int = CHUNK_ROWS) -> Tensor:
    """[n, C] -> [size, C], with rows of zeros."""
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under what follows it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
