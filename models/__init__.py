"""Trainers: data -> features -> fit -> predict. Never imports optuna, sqlalchemy, tuner or storage."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Literal

from models.trainer import InputError

# What every evaluation holds the trainers' models against (`models.baselines`).
BASELINES = ("base_rate", "logistic_regression", "xgboost")
# What an evaluation may judge models by.
Metric = Literal["pr_auc", "roc_auc"]
TRAINERS = {"gift": "models.gift.trainer:GiftTrainer", "stock": "models.stock.trainer:StockTrainer"}


def get_trainer(name: str) -> Any:
    """The trainer called `name`: a key of TRAINERS, or `package.module:Class` for one of your own.

    Raises:
        InputError: no such trainer.
    """
    target = TRAINERS.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not class_name:
        raise InputError(
            f"trainer: expected one of {', '.join(sorted(TRAINERS))} or package.module:Class, got {name!r}"
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"trainer: {name!r} cannot be imported ({error})") from error


def cuda_devices() -> list[str]:
    """The CUDA devices of this machine, as torch names them; empty without CUDA."""
    try:  # the driver's library: without one there is nothing that torch, which takes seconds to import, could find
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
