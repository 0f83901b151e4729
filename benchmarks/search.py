"""What the search costs: CPU per trial against plain Optuna, with a trainer that does nothing.

Both sides have the same sampler (TPE), pruner (median), database settings and number of workers (one), ten
parameters and 20 measurements a trial. Ours also stores the metrics, keeps leases and attempts, and counts trials
exactly. CPU time of this process, medians of alternating blocks.

    python -m benchmarks.search [--trials 10] [--blocks 5] [--stored 0,1000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from models.trainer import FrozenModel, Measurement, Run
from storage.database import Database
from storage.leases import LeaseThread, ProcessIdentity
from storage.runs import Store
from storage.tables import attempts, create_schema, measurements, runs
from tuner.optuna_study import Search, create_optuna_schema
from tuner.space import Space
from tuner.spec import Spec
from tuner.study import Study
from tuner.worker import Worker, WorkerOptions

N_PARAMS, N_STEPS, TARGET = 10, 20, 1.3
NAMES = tuple(f"p{i}" for i in range(N_PARAMS))
METRIC, VIOLATION = "valid/t/pr_auc", "valid/t/violation"


def curve(params: dict[str, float]) -> np.ndarray:
    """Shape: [N_STEPS]. Better trials are higher at every step, so that about half of them are pruned."""
    height = 1 - np.mean([(value - 0.4) ** 2 for value in params.values()])
    return height * (1 - np.exp(-0.3 * (np.arange(N_STEPS) + 1)))


class Config(FrozenModel):
    p: dict[str, float]


class Trivial:
    """A trainer that measures a formula."""

    Config = Config

    def fit(self, config: Config, data: Any, run: Run) -> Iterator[Measurement]:
        for step, value in enumerate(curve(config.p)):
            yield Measurement(step, {METRIC: float(value), VIOLATION: -0.1}, float(step))


def make_spec() -> Spec:
    space = Space.from_tree({"p": {name: {"low": 0.0, "high": 1.0} for name in NAMES}})
    return Spec.model_validate({
        "study": "ours", "trainer": "gift", "data": {}, "decision": {"task": "t", "target_precision": 0.5},
        "objective": {"metric": METRIC}, "config": {"p": dict.fromkeys(NAMES, 0.5)}, "space": space,
        "pruner": {"name": "median", "min_completed": 3, "warmup_steps": 4}, "n_trials": 1,
    })  # fmt: skip


def stored_trials(n: int, prefix: str) -> list[FrozenTrial]:
    """Finished trials as both sides find them: half complete, half pruned."""
    generator = np.random.default_rng(0)
    trials = []
    for number in range(n):
        point = generator.random(N_PARAMS)
        params = {f"{prefix}{name}": float(value) for name, value in zip(NAMES, point, strict=True)}
        values = curve(params)
        pruned = number % 2 == 1
        trials.append(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=float(values[5] if pruned else values[-1]),
                params=params,
                distributions={name: FloatDistribution(0.0, 1.0) for name in params},
                intermediate_values=dict(enumerate(map(float, values[: 6 if pruned else N_STEPS]))),
                constraints={"violation": -0.1},
            )
        )
    return trials


@dataclass
class Side:
    """One contender on its own database; what is counted is counted over all its trials."""

    database: Database
    n_steps: int = 0
    transactions: int = 0
    transactions_of_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        @sa.event.listens_for(self.database.engine, "begin")
        def _begun(_connection: sa.Connection) -> None:
            self.transactions += 1

    def prepare(self, n_stored: int) -> None:
        raise NotImplementedError

    def work(self, n_trials: int) -> None:
        raise NotImplementedError


class Plain(Side):
    """Optuna as its documentation shows it, on our engine settings."""

    def prepare(self, n_stored: int) -> None:
        create_optuna_schema(self.database)
        search = Search(self.database, make_spec(), "plain", create=True)
        self.study = optuna.load_study(
            study_name="plain",
            storage=search.storage,
            sampler=optuna.samplers.TPESampler(n_startup_trials=10, seed=1),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=4, n_min_trials=3),
        )
        self.study.add_trials(stored_trials(n_stored, ""))

    def work(self, n_trials: int) -> None:
        for _ in range(n_trials):
            trial = self.study.ask()
            params = {name: trial.suggest_float(name, 0.0, 1.0) for name in NAMES}
            values = curve(params)
            state = TrialState.COMPLETE
            for step, value in enumerate(values):
                before = self.transactions
                trial.report(float(value), step)
                pruned = trial.should_prune()
                self.n_steps += 1
                self.transactions_of_steps.append(self.transactions - before)
                if pruned:
                    state = TrialState.PRUNED
                    break
            trial.set_constraint("violation", -0.1)
            self.study.tell(trial, float(values.max()) if state == TrialState.COMPLETE else None, state=state)


class Ours(Side):
    """A whole worker: claim, sample, train, journal, record, report, prune, end."""

    def prepare(self, n_stored: int) -> None:
        create_schema(self.database)
        create_optuna_schema(self.database)
        spec = make_spec()
        search = Search(self.database, spec, "ours", create=True)
        store = Store(self.database)
        row = store.create_study("ours", spec.to_json(), json.dumps({"data_hash": "x"}), "0", spec.n_trials)
        self.study = Study(self.database, row, spec, search)
        trials = stored_trials(n_stored, "p.")
        search.study.add_trials(trials)
        self.worker_id = store.register_worker(row.id, ProcessIdentity.current(), "cpu")
        self._store_runs(trials)

    def _store_runs(self, trials: list[FrozenTrial]) -> None:
        key = {"study_id": self.study.id}
        tables: dict[sa.Table, list[dict[str, Any]]] = {runs: [], attempts: [], measurements: []}
        for number, trial in enumerate(trials):
            tables[runs].append({**key, "number": number, "arm": "default", "config": "{}", "attempt": 1,
                                 "ended_at": 1.0 + number, "best_step": trial.last_step})  # fmt: skip
            tables[attempts].append({**key, "number": number, "attempt": 1, "worker_id": self.worker_id,
                                     "claimed_at": 1.0, "released_at": 2.0, "outcome": "complete"})  # fmt: skip
            tables[measurements] += [
                {**key, "number": number, "step": step, "attempt": 1, "elapsed_s": 1.0,
                 "metrics": json.dumps({METRIC: value, VIOLATION: -0.1})}
                for step, value in trial.intermediate_values.items()
            ]  # fmt: skip
        with self.database.transaction() as connection:
            for table, rows in tables.items():
                if rows:
                    connection.execute(table.insert(), rows)

    def work(self, n_trials: int) -> None:
        n_before = len(self.study.search.trials())
        self.study.store.start_study(self.study.id, n_before + n_trials, 0)
        folder = str(self.database.path.parent)
        options = WorkerOptions("ours", "cpu", folder, ".", False, folder)
        worker = Worker(self.study, self._counted(), None, self.worker_id, options, threading.Event())
        with LeaseThread(lambda: self.study.store.renew(self.worker_id)):
            worker.serve()

    def _counted(self) -> Trivial:
        side = self

        class Counted(Trivial):
            def fit(self, config: Config, data: Any, run: Run) -> Iterator[Measurement]:
                for measurement in super().fit(config, data, run):
                    side.n_steps += 1
                    before = side.transactions
                    yield measurement
                    side.transactions_of_steps.append(side.transactions - before)

        return Counted()


def measure(n_stored: int, n_trials: int, n_blocks: int, folder: Path) -> float:
    """Print one comparison; returns the ratio."""
    sides: dict[str, Side] = {}
    for name, kind in {"plain": Plain, "ours": Ours}.items():
        side = kind(Database(f"sqlite:///{folder}/{name}-{n_stored}.db"))
        side.prepare(n_stored)
        if n_stored:
            side.work(2)  # the first one of a process reads everything
        side.n_steps = side.transactions = 0
        side.transactions_of_steps.clear()
        sides[name] = side
    spent: dict[str, list[float]] = {name: [] for name in sides}
    per_step: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(n_blocks):
        for name in list(sides)[:: 1 if block % 2 else -1]:
            side, steps = sides[name], sides[name].n_steps
            started = time.process_time()
            side.work(n_trials)
            cpu_ms = (time.process_time() - started) * 1000
            spent[name].append(cpu_ms / n_trials)
            per_step[name].append(cpu_ms / (side.n_steps - steps))
    ratio = statistics.median(a / b for a, b in zip(spent["ours"], spent["plain"], strict=True))
    print(f"{n_stored} trials stored, {n_blocks} x {n_trials} more:")
    for name, side in sides.items():
        n_done = n_blocks * n_trials
        a_measurement = side.transactions_of_steps
        print(
            f"  {name:5} {statistics.median(spent[name]):7.1f} ms CPU a trial of {side.n_steps / n_done:4.1f} steps"
            f" ({statistics.median(per_step[name]):5.2f} ms a step), transactions:"
            f" {side.transactions / n_done:5.1f} a trial, {statistics.mean(a_measurement):.2f} a measurement"
            f" (at most {max(a_measurement)})"
        )
        side.database.close()
    print(f"  ratio  {ratio:7.2f}  (at most {TARGET})")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="trials a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each side")
    parser.add_argument("--stored", default="0,1000", help="trials in the database before")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for n_stored in map(int, given.stored.split(",")):
            measure(n_stored, given.trials, given.blocks, Path(folder))


if __name__ == "__main__":
    main()
