"""models.cuda_devices: what there is, at the least cost."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

import models


def test_torch_names_the_devices_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": object()}[name])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.cuda_devices() == ["cuda:0", "cuda:1"]


def test_without_a_driver_there_is_none_and_torch_is_not_asked() -> None:
    code = (
        "import ctypes, sys, models\n"
        "def absent(name): raise OSError(name)\n"
        "ctypes.CDLL = absent\n"
        "print(models.cuda_devices(), 'torch' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split("\n")[0] == "[] False"
