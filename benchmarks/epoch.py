"""An epoch of the gift trainer against a bare reference, a DataLoader script and the hardware.

    python benchmarks/epoch.py [--rows 200000] [--pairs 7] [--loader-pairs 1]

CPU time of one thread, medians of alternating pairs. Synthetic rows of mvp13's shape: 70 numeric features, four
tasks, 2 % gifts, batches of 4096. Steps: all batches of an epoch. Epoch: steps and one validation pass, ours
also with all metrics, the decision, the durable checkpoint and, where it is the best so far, the curves. Curves:
those of one best step beside the whole epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from models.gift.data import GiftData, GiftDataset, Part
from models.gift.fit import Training
from models.gift.graphs import Launch
from models.gift.model import outputs
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig
from models.trainer import Decision, Manifest, Run

BATCH, FEATURES, WIDTHS, HEAD = 4096, 70, (256, 128, 64), 32
WEIGHTS = {"watch_time": 0.3, "has_comment": 0.2, "has_gift": 0.3, "gift_amount": 0.2}
OPTIONS = GiftData.model_validate({
    "source": "table",
    "path": "synthetic",
    "numeric_columns": [f"x{i}" for i in range(FEATURES)],
    "tasks": {
        "watch_time": {"kind": "regression", "column": "watch_time", "transform": "log1p"},
        "has_comment": {"kind": "binary", "column": "has_comment"},
        "has_gift": {"kind": "binary", "column": "has_gift"},
        "gift_amount": {
            "kind": "regression", "column": "gift_amount", "transform": "log1p", "conditional_on": "has_gift"
        },
    },
    "split": {"by": "hash", "train": 0.6, "valid": 0.09, "calibrate": 0.01, "test": 0.3},
})  # fmt: skip


def synthetic(n_rows: int, seed: int = 0) -> GiftDataset:
    """Rows with a planted signal, 15 % as many on valid."""
    rng = np.random.default_rng(seed)

    def part(n: int) -> Part:
        x = rng.standard_normal((n, FEATURES), dtype=np.float32)
        z = x[:, :8].sum(1) / 3
        gift = rng.random(n) < 1 / (1 + np.exp(4.6 - 1.2 * z))
        comment = rng.random(n) < 1 / (1 + np.exp(3 - z))
        watch = np.expm1(9 + 1.9 * (0.5 * z + rng.standard_normal(n))).clip(0)
        amount = np.where(gift, np.ceil(np.exp(1.5 * rng.standard_normal(n) + 1)), 0)
        labels = np.stack([watch, comment, gift, amount], 1).astype(np.float32)
        return Part(x, np.zeros((n, 0), np.int32), labels, np.arange(n))

    train, valid = part(n_rows), part(n_rows * 15 // 100)
    rates = train.labels.mean(0, dtype=np.float64)
    return GiftDataset(
        manifest=Manifest("0" * 64, "synthetic", True, {"train": n_rows, "valid": len(valid.labels)}),
        options=OPTIONS,
        statistics={},
        numeric_names=OPTIONS.numeric_columns,
        categorical_names=(),
        cardinalities=(),
        tasks=OPTIONS.task_list(),
        target_mean={"watch_time": 9.0, "gift_amount": 1.5},
        target_std={"watch_time": 2.1, "gift_amount": 1.0},
        base_rate={"has_comment": float(rates[1]), "has_gift": float(rates[2])},
        quantiles=np.zeros((257, FEATURES), np.float32),
        parts={"train": train, "valid": valid},
    )


def network() -> tuple[nn.Module, nn.ModuleList]:
    """The network as most people write it."""
    layers, width = [], FEATURES
    for out in WIDTHS:
        layers += [nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(0.2)]
        width = out
    heads = [nn.Sequential(nn.Linear(width, HEAD), nn.ReLU(), nn.Linear(HEAD, 1)) for _ in WEIGHTS]
    return nn.Sequential(*layers), nn.ModuleList(heads)


def total_loss(out: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the four losses. Shape: [B, 4] each."""
    gift = F.binary_cross_entropy_with_logits(out[:, 2], t[:, 2], reduction="none")
    alpha = 0.25 * t[:, 2] + 0.75 * (1 - t[:, 2])
    gives = t[:, 2] == 1
    amount = F.mse_loss(out[gives, 3], t[gives, 3]) if gives.any() else out.sum() * 0
    comment = F.binary_cross_entropy_with_logits(out[:, 1], t[:, 1])
    focal = (alpha * (1 - torch.exp(-gift)) ** 2 * gift).mean()
    return 0.3 * F.mse_loss(out[:, 0], t[:, 0]) + 0.2 * comment + 0.3 * focal + 0.2 * amount


class Reference:
    """Nothing but the work itself: index_select, forward, losses, backward, Adam, one validation forward."""

    def __init__(self, data: GiftDataset) -> None:
        self.train, self.valid = (on_device(data, role, torch.device("cpu")) for role in ("train", "valid"))
        self.tower, self.heads = network()
        parameters = [*self.tower.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.tower(x)
        return torch.cat([head(z) for head in self.heads], 1)

    def steps(self) -> None:
        self.tower.train()
        for rows in torch.randperm(len(self.train.targets)).split(BATCH):
            out = self.forward(self.train.numeric.index_select(0, rows))
            loss = total_loss(out, self.train.targets.index_select(0, rows))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def epoch(self) -> None:
        self.steps()
        self.tower.eval()
        with torch.inference_mode():
            self.forward(self.valid.numeric)


class Rows(Dataset):
    """One dictionary per row, the way most people write it."""

    def __init__(self, part: Part, targets: torch.Tensor) -> None:
        self.numeric, self.targets = part.numeric, targets.numpy()

    def __len__(self) -> int:
        return len(self.numeric)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        item = {"features": torch.tensor(self.numeric[i])}
        return item | {name: torch.tensor(self.targets[i, k]) for k, name in enumerate(WEIGHTS)}


class Loader(Reference):
    """The reference, fed by Dataset and DataLoader, reading the loss at every step."""

    def __init__(self, data: GiftDataset) -> None:
        super().__init__(data)
        self.rows = {r: Rows(data.part(r), getattr(self, r).targets) for r in ("train", "valid")}

    def epoch(self) -> None:
        total = 0.0
        self.tower.train()
        for batch in DataLoader(self.rows["train"], batch_size=BATCH, shuffle=True):
            loss = total_loss(self.forward(batch["features"]), torch.stack([batch[n] for n in WEIGHTS], 1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        self.tower.eval()
        with torch.no_grad():
            for batch in DataLoader(self.rows["valid"], batch_size=BATCH):
                self.forward(batch["features"])


def trainer(
    data: GiftDataset, folder: str, device: str = "cpu", seed: int = 42, batch: int = BATCH,
    launch: Launch | None = None, kind: type[Training] = Training,
) -> Training:  # fmt: skip
    """The trainer with the configuration of the reference."""
    losses = {"watch_time": "mse", "has_comment": "bce", "has_gift": "focal", "gift_amount": "mse"}
    tasks = {name: {"weight": weight, "loss": losses[name]} for name, weight in WEIGHTS.items()}
    config = GiftConfig.model_validate({
        "tasks": tasks, "optimizer": {"batch_size": batch}, "training": {"max_epochs": 1000, "patience": 1000}
    })  # fmt: skip
    decision = Decision(task="has_gift", target_precision=0.1)
    return kind(config, data, Run(Path(folder), seed, device, 1, decision), launch)


def cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def pairs(ours: Callable[[], object], other: Callable[[], object], n: int) -> tuple[float, float, float]:
    """Median CPU seconds of both, and the median of the ratios of n alternating pairs."""
    times = [(cpu_s(ours), cpu_s(other)) for _ in range(n)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return mine, theirs, statistics.median(a / b for a, b in times)


def draw(training: Training) -> Callable[[], object]:
    """What a best step costs beside its metrics: the curves of its validation scores."""
    rows = training.validation.rows
    found = outputs(training.network, rows.numeric, rows.codes)
    metrics = training.validation.measure(found)
    logits = found[:, training.names.index("has_gift")]
    return lambda: training.validation.curves(logits, metrics)


def floor_s(n_train: int, n_valid: int) -> tuple[float, float]:
    """Seconds that the matrix products alone take at the measured speed of a large product, and that speed
    in GFLOP/s. A step has three products per layer, the first layer two (features need no gradient)."""
    sizes = list(zip((FEATURES, *WIDTHS), (*WIDTHS, HEAD * len(WEIGHTS)), strict=True))
    forward = 2 * (sum(a * b for a, b in sizes) + HEAD * len(WEIGHTS))
    training = 3 * forward - 2 * FEATURES * WIDTHS[0]
    a = torch.randn(2048, 2048)
    speed = 2 * 2048**3 / min(cpu_s(lambda: a @ a) for _ in range(5))
    return (n_train * training + n_valid * forward) / speed, speed / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--loader-pairs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = synthetic(arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        ours, reference, loader = trainer(data, folder), Reference(data), Loader(data)
        ours.epoch()
        reference.epoch()
        print(f"{'CPU seconds of one thread':<44} {'ours':>8} {'other':>8} {'ratio':>7}  target")
        row = "{:<44} {:8.3f} {:8.3f} {:7.3f}  {}".format
        print(row("steps / reference", *pairs(ours._train, reference.steps, arguments.pairs), "<= 1.10"))
        whole = pairs(ours.epoch, reference.epoch, arguments.pairs)
        print(row("epoch / reference", *whole, "<= 1.25"))
        print(row("curves of a best step / epoch", *pairs(draw(ours), ours.epoch, arguments.pairs), "<= 0.01"))
        slow = pairs(ours.epoch, loader.epoch, arguments.loader_pairs)
        print(row("epoch / Dataset + DataLoader", *slow, f"{1 / slow[2]:.1f} times faster"))
        floor, speed = floor_s(arguments.rows, len(data.part("valid").labels))
        print(row("epoch / matrix products alone", whole[0], floor, whole[0] / floor, f"at {speed:.0f} GFLOP/s"))


if __name__ == "__main__":
    main()
