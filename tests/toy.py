"""A trainer that learns nothing and costs nothing, for tests of the search: its curve is a formula.

Written against the seam alone; it keeps every promise of `models.trainer.Trainer`. Its weights depend on every step
since the first, so a step that was left out, doubled or trained by another seed shows in them.

Every role has 100 rows. Who is positive follows a hidden signal; a model sees it the more clearly, the higher its
curve has risen, and through noise that its weights decide. So the best fit ranks well, and no two rank alike.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.trainer import (
    ROLES,
    Ablation,
    DataSpec,
    Decision,
    Features,
    FileStamp,
    FrozenModel,
    InputError,
    Labels,
    Manifest,
    Measurement,
    Predictions,
    Problem,
    Role,
    Run,
    ScoredRows,
    advance_in_turn,
)

log = logging.getLogger(__name__)

N_ROWS = 100  # of a role
ROWS_PER_USER = 4
_GROUPS = {"signal": 0.2, "weather": 1.0}  # what is left of the signal without the group
_UNITS = (0.6, 0.9, 1.0)


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
    roles: frozenset[Role] = frozenset(ROLES)

    def require(self, role: Role) -> None:
        if role not in self.roles:
            raise KeyError(f"role {role} was not opened (opened: {', '.join(sorted(self.roles))})")


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
            return ToyDataset(Manifest(stamp.sha256, source, False, rows, {data.options.file: stamp}), roles)
        source = f"toy data {data.options.content!r}"
        return ToyDataset(Manifest(f"{data.options.content:0<16}", source, False, rows), roles)

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

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        return advance_in_turn(fits)

    def slots(self, config: ToyConfig, data: ToyDataset, run_device: str, most: int) -> int:
        return 1

    def predict(self, checkpoint: Path, data: ToyDataset, role: Role, device: str = "cpu") -> Predictions:
        """The logit of `toy`, and the amount expected of a positive."""
        return Predictions(_scores(checkpoint, toy_rows(data, role)))

    def labels(self, data: ToyDataset, role: Role, decision: Decision) -> Labels:
        """The unit is the row, or the user, who has four rows, where the decision names `user`."""
        rows = toy_rows(data, role)
        unit = np.arange(N_ROWS) // (ROWS_PER_USER if decision.unit == "user" else 1)
        money = np.where(rows.labels == 1, rows.money, 0.0)
        amount = np.where(rows.labels == 1, rows.money, np.nan).astype(np.float32)
        return Labels({"toy": rows.labels, "money": amount}, unit, money, {"money": "log1p"}, {"money": "toy"})

    def features(self, data: ToyDataset, role: Role) -> Features:
        rows = toy_rows(data, role)
        numeric = np.stack([rows.hint, rows.weather], axis=1).astype(np.float32)
        codes = (1 + (np.arange(N_ROWS) % 3)).astype(np.int32)[:, None]
        return Features(numeric, ("hint", "weather"), codes, ("colour",), (4,))

    def ablate(
        self, checkpoint: Path, data: ToyDataset, role: Role, decision: Decision, device: str = "cpu"
    ) -> Iterator[Ablation]:
        rows = toy_rows(data, role)
        for name, left in _GROUPS.items():
            yield Ablation("group", name, _scores(checkpoint, rows, left)["toy"])
        for unit, left in enumerate(_UNITS):
            yield Ablation("unit", str(unit), _scores(checkpoint, rows, left)["toy"])

    def export(self, checkpoint: Path, data: ToyDataset, folder: Path) -> None:
        value, weights = _read(checkpoint)[0].metrics["valid/toy/pr_auc"], _read(checkpoint)[1]
        content = {"trainer": "tests.toy:ToyTrainer", "value": value, "weights": weights}
        (folder / "model.json").write_text(json.dumps(content))

    def score(
        self, model: Path, source: Path, cache: Path, device: str = "cpu", batch_rows: int = 65536
    ) -> Iterator[ScoredRows]:
        """Of a text file with the heading `hint` and a number a line; the key of a row is its line."""
        try:
            value = float(json.loads((model / "model.json").read_bytes())["value"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{model}: expected an exported toy, got {error!r}; export it again") from error
        for first, hints in _batches(source, batch_rows):
            scores = {"toy": _logit(value, hints), "money": _amount(value, hints)}
            keys = {"line": first + 2 + np.arange(len(hints))}
            yield ScoredRows(first, None, keys, Predictions(scores))


@dataclass(frozen=True)
class ToyRows:
    """The truth of a role: `hint` is the signal with noise in it. Shape: each [N_ROWS]."""

    labels: np.ndarray
    money: np.ndarray
    hint: np.ndarray
    weather: np.ndarray
    key: str


def toy_rows(data: ToyDataset, role: Role) -> ToyRows:
    """The same for the same data and role, 40 of 100 positive. Raises KeyError where the role was not opened."""
    data.require(role)
    key = f"{data.manifest.data_hash} {role}"
    rng = _generator(key)
    signal, noise, weather, money = rng.normal(size=(4, N_ROWS))
    order = np.argsort(-(signal + 0.3 * noise), kind="stable")
    labels = np.zeros(N_ROWS, np.float32)
    labels[order[:40]] = 1.0
    return ToyRows(labels, np.ceil(np.exp(2 + money)), signal, weather, key)


def _scores(checkpoint: Path, rows: ToyRows, left: float = 1.0) -> dict[str, np.ndarray]:
    measurement, weights = _read(checkpoint)
    value = measurement.metrics["valid/toy/pr_auc"]
    noise = 0.5 * _generator(f"{weights} {rows.key}").normal(size=N_ROWS)
    return {"toy": _logit(value * left, rows.hint, noise), "money": _amount(value, rows.weather)}


def _logit(value: float, hint: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    return (4.0 * value * hint + noise - 0.5).astype(np.float32)


def _amount(value: float, weather: np.ndarray) -> np.ndarray:
    return np.exp(2.0 + 0.1 * value * weather).astype(np.float32)


def _generator(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def _batches(source: Path, batch_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    if not source.is_file():
        raise InputError(f"{source}: expected a file of rows for the toy, got nothing; name one that exists")
    with source.open(encoding="utf-8") as lines:
        if next(lines, "").strip() != "hint":
            raise InputError(f"{source}:1: expected the column hint; name a file that has it")
        first, hints = 0, []
        for number, line in enumerate(lines, 2):
            try:
                hints.append(float(line))
            except ValueError as error:
                raise InputError(f"{source}:{number}: expected a number, got {line.strip()!r}; mend it") from error
            if len(hints) == batch_rows:
                yield first, np.array(hints)
                first, hints = first + len(hints), []
        if hints:
            yield first, np.array(hints)


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
