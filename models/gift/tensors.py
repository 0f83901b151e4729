"""The rows of a role as tensors on a device."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.gift.data import GiftDataset
from models.trainer import Role

_LOCK = threading.Lock()


@dataclass(frozen=True)
class RoleTensors:
    """One role on a device.

    Shape: numeric [N, D] float32; codes [N, C] int32, on a GPU the smallest integers that hold them; labels [N, K]
    raw; targets [N, K] float32: 0/1 or standardised, NaN where a row does not count (no label, or the condition is
    not met). K as `data.tasks`.
    """

    numeric: Tensor
    codes: Tensor
    labels: Tensor
    targets: Tensor


def on_device(data: GiftDataset, role: Role, device: torch.device) -> RoleTensors:
    """The tensors of a role, made once per dataset and device and shared by all trials.

    On the CPU features and labels stay memory-mapped, so that the workers of a machine share them.
    """
    with _LOCK:
        kept = vars(data).setdefault("_on_device", {})  # a frozen dataclass; the tensors live as long as it
        if (role, device) not in kept:
            part = data.part(role)
            codes = part.categorical
            if device.type != "cpu":
                codes = codes.astype(code_type(max(data.cardinalities, default=1)))
            arrays = (part.numeric, codes, part.labels, _targets(data, part.labels))
            kept[role, device] = RoleTensors(*(_tensor(array, device) for array in arrays))
        return kept[role, device]


def code_type(cardinality: int) -> np.dtype:
    """The smallest integers that torch computes with and that hold all codes below `cardinality`."""
    return next(np.dtype(t) for t in (np.uint8, np.int16, np.int32) if cardinality - 1 <= np.iinfo(t).max)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    with warnings.catch_warnings():  # read-only memory: nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def _targets(data: GiftDataset, labels: np.ndarray) -> np.ndarray:
    names = [task.name for task in data.tasks]
    targets = np.empty(labels.shape, np.float32)
    for k, task in enumerate(data.tasks):
        values = np.asarray(labels[:, k], np.float64)
        if task.kind == "regression":
            values = np.log1p(values) if task.transform == "log1p" else values
            values = (values - data.target_mean[task.name]) / (data.target_std[task.name] or 1.0)
        if task.conditional_on is not None:
            values = np.where(labels[:, names.index(task.conditional_on)] == 1.0, values, np.nan)
        targets[:, k] = values
    return targets
