"""A trainer that learns nothing and costs nothing, for tests of the search: its curve is a formula.

Written against the seam alone; it keeps every promise of `models.trainer.Trainer`. Its weights depend on every step
since the first, so a step that was left out, doubled or trained by another seed shows in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.trainer import (
    DataSpec,
    Decision,
    FileStamp,
    FrozenModel,
    InputError,
    Manifest,
    Measurement,
    Predictions,
    Problem,
    Role,
    Run,
)

log = logging.getLogger(__name__)


class ToyConfig(FrozenModel):
    """`x`, `y` place the curve; a step takes `step_s`.

    `fault` (raise, exit, kill or hang) makes a trial misbehave at step `fault_step`, before its checkpoint: in
    every attempt, or in the first `fault_attempts` only, each `fault_stride` steps later than the one before.
    """

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
    fault_attempts: int = 0
    fault_stride: int = 0


class ToyData(FrozenModel):
    """`file` names a file that has to lie at the path, and identifies the data; without one `content` does."""

    path: str = "."
    content: str = "toy"
    file: str | None = None


@dataclass(frozen=True)
class ToyDataset:
    manifest: Manifest


class ToyTrainer:
    Config = ToyConfig
    Data = ToyData

    def check(self, config: ToyConfig, data: ToyData, decision: Decision) -> list[Problem]:
        return [] if decision.task == "toy" else [Problem("decision.task", f"expected toy, got {decision.task!r}")]

    def load(self, data: DataSpec, roles: frozenset[Role]) -> ToyDataset:
        if data.path_given and data.path is not None and not data.path.exists():
            raise InputError(f"{data.path}: expected a folder, got nothing; name one that exists")
        rows: dict[Role, int] = {"train": 100, "valid": 100, "calibrate": 100, "test": 100}
        if data.options.file is not None:
            stamp = _stamp(data, data.options.file)
            source = f"toy file {data.options.file}"
            return ToyDataset(Manifest(stamp.sha256, source, False, rows, {data.options.file: stamp}))
        return ToyDataset(
            Manifest(f"{data.options.content:0<16}", f"toy data {data.options.content!r}", False, rows)
        )

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        return {"tables": {"rows": {"columns": ["role", "rows"], "rows": [["train", 100]]}}, "checks": []}

    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        start, weights = 0, ""
        newest = _newest(run)
        if newest is not None:
            measurement, weights = _read(newest)
            yield measurement
            start = measurement.step + 1
        for step in range(start, config.n_steps):
            time.sleep(config.step_s)
            _misbehave(config, step, run)
            weights = _trained(weights, config, run.seed, step)
            measurement = Measurement(step, _metrics(config, step, run.seed), (step + 1) * 1.0)
            _write(run, measurement, weights)
            yield replace(measurement, curves=_curves(measurement))

    def predict(self, checkpoint: Path, data: ToyDataset, role: Role, device: str = "cpu") -> Predictions:
        value = _read(checkpoint)[0].metrics["valid/toy/pr_auc"]
        return Predictions({"toy": np.full(data.manifest.rows[role], value)})


def stored_weights(checkpoint: Path) -> str:
    """The weights in the checkpoint of a step, for comparison with `uninterrupted_weights`."""
    return _read(checkpoint)[1]


def uninterrupted_weights(config: ToyConfig, seed: int, n_steps: int | None = None) -> str:
    """The weights after the first `n_steps` steps (None: all) of a run that nothing has interrupted."""
    weights = ""
    for step in range(config.n_steps if n_steps is None else n_steps):
        weights = _trained(weights, config, seed, step)
    return weights


def _trained(weights: str, config: ToyConfig, seed: int, step: int) -> str:
    return hashlib.sha256(f"{weights} {config.x!r} {config.y!r} {seed} {step}".encode()).hexdigest()


def _stamp(data: DataSpec, name: str) -> FileStamp:
    path = data.path if data.path is None or data.path.is_file() else data.path / name
    if path is None or not path.is_file():
        raise InputError(f"{path}: expected the toy's file {name}, got nothing; name its folder with --data")
    content = path.read_bytes()
    return FileStamp(hashlib.sha256(content).hexdigest(), len(content))


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


def _curves(measurement: Measurement) -> dict[str, Any]:
    """Every step is the best so far, as the toy's curve only rises."""
    value = measurement.metrics["valid/toy/pr_auc"]
    return {
        "pr": {
            "recall": [0.1, 0.2, 1.0],
            "precision": [value, 0.5, 0.1],
            "bound": [0.9 * value, 0.4, 0.09],
            "threshold": [1.0, 0.0, -1.0],
        },
        "calibration": {"predicted": [0.1, value], "observed": [0.12, value], "count": [80, 20]},
    }


def _misbehave(config: ToyConfig, step: int, run: Run) -> None:
    fault_step = config.fault_step + (run.attempt - 1) * config.fault_stride
    innocent = config.fault_attempts and run.attempt > config.fault_attempts
    if config.fault is None or step != fault_step or innocent:
        return
    if config.fault == "raise":
        raise RuntimeError("the toy was told to fail")
    if config.fault == "exit":
        os._exit(77)
    if config.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.fault == "hang":
        time.sleep(3600.0)


def _newest(run: Run) -> Path | None:
    """The newest whole checkpoint of this attempt or an older one."""
    found = []
    for path in run.directory.glob("attempt-*/step-*"):
        match = re.fullmatch(r"attempt-(\d+)/step-(\d{5,})", f"{path.parent.name}/{path.name}")
        if match and int(match[1]) <= run.attempt:
            found.append((int(match[1]), int(match[2]), path))
    for _, _, path in sorted(found, reverse=True):
        try:
            _read(path)
        except InputError as error:
            log.warning("%s", error, extra={"action": "checkpoint_skipped", "path": str(path)})
        else:
            return path
    return None


def _write(run: Run, measurement: Measurement, weights: str) -> None:
    folder = run.directory / f"attempt-{run.attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{measurement.step}"
    text = json.dumps({"measurement": asdict(measurement), "weights": weights})
    temporary.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    os.replace(temporary, folder / f"step-{measurement.step:05d}")


def _read(path: Path) -> tuple[Measurement, str]:
    """Raises InputError where the checkpoint is damaged."""
    try:
        sealed = json.loads(path.read_bytes())
        text = sealed["content"]
        intact = hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(f"{path}: expected a whole checkpoint, got a damaged file; remove it")
    content = json.loads(text)
    measurement = Measurement(**content["measurement"])
    return replace(measurement, curves=_curves(measurement)), content["weights"]
