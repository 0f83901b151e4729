"""What several trials in flight cost the search: the best value after 50 trials on a toy whose optimum is known.

A sampler that learns from ended trials knows less when K trials run at once. The toy has mvp13's kind of space
(rates and weights on a logarithmic scale, widths, depth, choices with conditions) and a learning curve of 30 steps;
its best possible value is 1. The same seeds for every K, the real worker with K slots, TPE and the median pruner as
mvp13 has them. No time is measured here.

    python -m benchmarks.slots [--slots 1,4,8] [--seeds 20] [--trials 50]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from models.trainer import FrozenModel, Measurement, Run, advance_in_turn
from storage.database import Database
from storage.leases import ProcessIdentity
from storage.tables import create_schema
from tuner.coordinator import create_study
from tuner.optuna_study import create_optuna_schema
from tuner.space import Space
from tuner.spec import Spec
from tuner.worker import Worker, WorkerOptions

METRIC, VIOLATION = "valid/t/pr_auc", "valid/t/violation"
N_STEPS = 30
SPACE = {
    "lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "weight": {"low": 1e-3, "high": 10.0, "log": True},
    "width": {"low": 64, "high": 384, "log": True},
    "depth": {"low": 1, "high": 4},
    "dropout": {"low": 0.0, "high": 0.5},
    "norm": {"choices": [True, False]},
    "loss": {"choices": ["bce", "focal"]},
    "alpha": {"low": 0.05, "high": 0.99, "when": {"loss": "focal"}},
    "gamma": {"low": 0.0, "high": 5.0, "when": {"loss": "focal"}},
}


class Config(FrozenModel):
    lr: float = 1e-3
    weight: float = 1.0
    width: int = 256
    depth: int = 3
    dropout: float = 0.2
    norm: bool = True
    loss: str = "bce"
    alpha: float = 0.25
    gamma: float = 2.0


def final_value(config: Config) -> float:
    """What a configuration reaches in the end. The optimum is 1: lr 2e-3, weight 0.1, width 160, depth 2, dropout
    0.3, batch norm, focal loss with alpha 0.7 and gamma 1.5."""

    def off(value: float, best: float, low: float, high: float) -> float:
        return ((math.log(value) - math.log(best)) / (math.log(high) - math.log(low))) ** 2

    loss = 0.8 * off(config.lr, 2e-3, 1e-4, 1e-2) + 0.4 * off(config.weight, 0.1, 1e-3, 10.0)
    loss += 0.2 * off(config.width, 160, 64, 384) + 0.02 * abs(config.depth - 2)
    loss += 0.6 * (config.dropout - 0.3) ** 2 + (0.0 if config.norm else 0.05)
    if config.loss == "focal":
        loss += 0.25 * (config.alpha - 0.7) ** 2 + 0.02 * (config.gamma - 1.5) ** 2
    else:
        loss += 0.06
    return 1.0 - loss


class Toy:
    """A trainer whose curves rise to `final_value`, the faster the greater the learning rate."""

    Config = Config

    def __init__(self) -> None:
        self.best, self.n_steps = -math.inf, 0

    def fit(self, config: Config, data: Any, run: Run) -> Iterator[Measurement]:
        end, tau = final_value(config), 3.0 * (2e-3 / config.lr) ** 0.3
        for step in range(N_STEPS):
            value = end * (1.0 - math.exp(-(step + 1) / tau))
            self.best, self.n_steps = max(self.best, value), self.n_steps + 1
            yield Measurement(step, {METRIC: value, VIOLATION: -0.1}, float(step))

    advance = staticmethod(advance_in_turn)


def spec_of(seed: int, n_trials: int) -> Spec:
    return Spec.model_validate({
        "study": "toy", "trainer": "gift", "data": {}, "decision": {"task": "t", "target_precision": 0.5},
        "objective": {"metric": METRIC}, "config": Config().model_dump(), "space": Space.from_tree(SPACE),
        "sampler": {"name": "tpe", "n_startup_trials": 10}, "n_trials": n_trials, "seed": seed,
        "pruner": {"name": "median", "min_completed": 3, "warmup_steps": 4},
    })  # fmt: skip


def search(n_slots: int, seed: int, n_trials: int) -> tuple[float, int]:
    """The best value of a whole study, and the steps that it took."""
    toy = Toy()
    with tempfile.TemporaryDirectory() as folder, closing(Database(f"sqlite:///{folder}/tuner.db")) as database:
        create_schema(database)
        create_optuna_schema(database)
        study = create_study(database, "toy", spec_of(seed, n_trials), json.dumps({"data_hash": "toy"}), n_trials)
        study.store.start_study(study.id, n_trials, 0)
        worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), "cpu")
        options = WorkerOptions(device="cpu", runs=folder, cache=str(Path(folder) / "cache"), slots=n_slots)
        Worker(study, toy, None, worker_id, options, threading.Event()).serve()
        study.store.end_worker(worker_id)
    return toy.best, toy.n_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="1,4,8")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=50)
    options = parser.parse_args()
    counts = [int(text) for text in options.slots.split(",")]
    jobs = [(n, seed, options.trials) for n in counts for seed in range(options.seeds)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = np.array(list(pool.map(search, *zip(*jobs, strict=True)))).reshape(len(counts), options.seeds, 2)
    regret, steps = 1.0 - found[..., 0], found[..., 1]
    print(f"regret (1 - best value) after {options.trials} trials, {options.seeds} seeds")
    against = f"p against {counts[0]}"
    print(f"{'slots':>6} {'median':>8} {'quartiles':>16} {'mean':>8}   {against:>14} {'steps':>7}")
    for row, n in enumerate(counts):
        low, middle, high = np.quantile(regret[row], [0.25, 0.5, 0.75])
        same = row == 0 or (regret[row] == regret[0]).all()
        p = "" if same else f"{wilcoxon(regret[row], regret[0]).pvalue:.2f}"
        print(
            f"{n:>6} {middle:>8.4f} {low:>8.4f}{high:>8.4f} {regret[row].mean():>8.4f}   {p:>14} "
            f"{steps[row].mean():>7.0f}"
        )


if __name__ == "__main__":
    main()
