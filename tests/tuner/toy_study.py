"""Small studies of the toy trainer, worked off in this process, for the tests of what shows them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import yaml

from models.trainer import SEARCH_ROLES
from storage.database import Database
from storage.leases import ProcessIdentity
from tuner import coordinator
from tuner.catalog import open_database
from tuner.coordinator import RunOptions
from tuner.study import Study
from tuner.summary import StudySummary, summarize
from tuner.worker import Worker, WorkerOptions

ROOT = Path(__file__).resolve().parent.parent.parent


def write_spec(folder: Path, name: str = "toy", **changes: Any) -> Path:
    """`configs/<name>.yaml` below `folder`, with whole sections replaced by `changes`."""
    spec = {
        "study": name,
        "trainer": "tests.toy:ToyTrainer",
        "data": {"path": ".", "content": "toy"},
        "decision": {"task": "toy", "target_precision": 0.4},
        "objective": {"metric": "valid/toy/pr_auc"},
        "n_trials": 6,
        "config": {"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 5, "violation": -0.1},
        "arms": {"a": {}, "b": {"shape": "b"}},
        "space": {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}},
        "pruner": {"name": "median", "min_completed": 2, "warmup_steps": 2},
        **changes,
    }
    path = folder / "configs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def make_study(folder: Path, name: str = "toy", **changes: Any) -> RunOptions:
    """A whole study in `folder`/runs, worked off in this process; returns how it was run."""
    options = RunOptions(str(write_spec(folder, name, **changes)), runs=str(folder / "runs"), storage=url(folder))
    spec, trainer = coordinator.read_spec(options)
    database = Database(options.storage)
    try:
        data = trainer.load(coordinator.data_spec(spec, trainer, options), SEARCH_ROLES)
        study = coordinator.open_study(spec, data.manifest, options, database)
        study.store.start_study(study.id, spec.n_trials, 0)
        worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), "cpu")
        told = WorkerOptions("cpu", options.runs, str(options.cache), (name,))
        Worker(study, trainer, data, worker_id, told, threading.Event()).serve()
        study.store.end_worker(worker_id)
        coordinator.write_results(summarize(study), options, {})
    finally:
        database.close()
    return options


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'runs' / 'tuner.db'}"


def summary_of(folder: Path, name: str = "toy") -> StudySummary:
    database = open_database(url(folder))
    try:
        return summarize(Study.open(database, name))
    finally:
        database.close()


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change, to see that nothing was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Said:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def show(self, summary: object, started: float) -> None:
        pass

    def has(self, part: str) -> bool:
        return any(part in line for line in self.lines)
