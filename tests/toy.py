"""A trainer that learns nothing and costs nothing, for tests of the search: its curve is a formula.

Written against the seam alone; it keeps every promise of `models.trainer.Trainer`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.trainer import (
    DataSpec,
    Decision,
    FrozenModel,
    InputError,
    Manifest,
    Measurement,
    Predictions,
    Problem,
    Role,
    Run,
)


class ToyConfig(FrozenModel):
    """`x`, `y` place the curve; `fault` makes a trial misbehave at step `fault_step`."""

    x: float = 0.5
    y: float = 0.5
    shape: str = "a"
    speed: float = 0.5
    ceiling: float = 0.9
    n_steps: int = 8
    step_s: float = 0.0
    violation: float = -0.1
    fault: str | None = None
    fault_step: int = 1


class ToyData(FrozenModel):
    path: str = "."
    content: str = "toy"


@dataclass(frozen=True)
class ToyDataset:
    manifest: Manifest


class ToyTrainer:
    Config = ToyConfig
    Data = ToyData

    def check(self, config: ToyConfig, data: ToyData, decision: Decision) -> list[Problem]:
        return [] if decision.task == "toy" else [Problem("decision.task", f"expected toy, got {decision.task!r}")]

    def load(self, data: DataSpec, roles: frozenset[Role]) -> ToyDataset:
        if data.path_given and not data.path.exists():
            raise InputError(f"{data.path}: expected a folder, got nothing; name one that exists")
        rows: dict[Role, int] = {"train": 100, "valid": 100, "calibrate": 100, "test": 100}
        return ToyDataset(
            Manifest(f"{data.options.content:0<16}", f"toy data {data.options.content!r}", False, rows)
        )

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        return {"tables": {"rows": {"columns": ["role", "rows"], "rows": [["train", 100]]}}, "checks": []}

    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        start = 0
        newest = _newest(run)
        if newest is not None:
            yield _read(newest)
            start = _read(newest).step + 1
        for step in range(start, config.n_steps):
            time.sleep(config.step_s)
            _misbehave(config, step, run)
            measurement = Measurement(step, _metrics(config, step, run.seed), (step + 1) * 1.0)
            _write(run, measurement)
            yield measurement

    def predict(self, checkpoint: Path, data: ToyDataset, role: Role, device: str = "cpu") -> Predictions:
        return Predictions(
            {"toy": np.full(data.manifest.rows[role], _read(checkpoint).metrics["valid/toy/pr_auc"])}
        )


def _metrics(config: ToyConfig, step: int, seed: int) -> dict[str, float]:
    height = config.ceiling * math.exp(-4 * ((config.x - 0.3) ** 2 + (config.y - 0.6) ** 2))
    value = height * (1 - math.exp(-config.speed * (step + 1)))
    return {
        "valid/toy/pr_auc": value,
        "valid/toy/pr_auc_se": 0.01,
        "valid/toy/threshold": 0.0,
        "valid/toy/precision": 0.5,
        "valid/toy/precision_bound": 0.4,
        "valid/toy/recall": 0.2,
        "valid/toy/violation": config.violation,
    }


def _misbehave(config: ToyConfig, step: int, run: Run) -> None:
    if config.fault is None or step != config.fault_step:
        return
    if config.fault == "raise":
        raise RuntimeError("the toy was told to fail")
    if config.fault == "exit":
        os._exit(77)
    if config.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _newest(run: Run) -> Path | None:
    steps = [path for path in run.directory.glob("attempt-*/step-*") if path.suffix == ""]
    return max(steps, key=lambda path: (int(path.parent.name[8:]), path.name), default=None)


def _write(run: Run, measurement: Measurement) -> None:
    folder = run.directory / f"attempt-{run.attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"writing-{measurement.step}.tmp"
    content = {
        "step": measurement.step,
        "metrics": dict(measurement.metrics),
        "elapsed_s": measurement.elapsed_s,
    }
    temporary.write_text(json.dumps(content))
    os.replace(temporary, folder / f"step-{measurement.step:05d}")


def _read(path: Path) -> Measurement:
    return Measurement(**json.loads(path.read_text()))
