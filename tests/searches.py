"""Studies of the toy trainer for tests of the search: made in a moment, worked off in this process."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from storage.database import Database
from storage.leases import ProcessIdentity
from storage.runs import MeasurementRow, Store
from storage.tables import create_schema
from tuner.optuna_study import Search, create_optuna_schema
from tuner.space import Space
from tuner.spec import Spec
from tuner.study import Claim, Study

METRIC = "valid/toy/pr_auc"
VIOLATION = "valid/toy/violation"


def make_spec(**changes: Any) -> Spec:
    """A specification of the toy trainer: `x` in every arm, `y` where the shape is a, `speed` not in arm two."""
    tree: dict[str, Any] = {
        "study": "toy",
        "trainer": "tests.toy:ToyTrainer",
        "data": {},
        "decision": {"task": "toy", "target_precision": 0.5},
        "objective": {"metric": METRIC},
        "n_trials": 10,
        "config": {"x": 0.5, "y": 0.5, "shape": "a", "speed": 0.5, "n_steps": 4},
        "arms": {"one": {}, "two": {"speed": 0.2}},
        "space": {
            "x": {"low": 0.0, "high": 1.0},
            "shape": {"choices": ["a", "b"]},
            "y": {"low": 0.01, "high": 1.0, "log": True, "when": {"shape": "a"}},
            "speed": {"low": 0.1, "high": 0.9},
        },
        **changes,
    }
    return Spec.model_validate({**tree, "space": Space.from_tree(tree["space"])})


def make_database(url: str) -> Database:
    """A database with all tables."""
    database = Database(url)
    create_schema(database)
    create_optuna_schema(database)
    return database


def make_study(database: Database, spec: Spec, name: str = "toy") -> Study:
    search = Search(database, spec, name, create=True)
    data = json.dumps({"data_hash": "toy", "source": "toy data"})
    row = Store(database).create_study(name, spec.to_json(), data, "0.1.0", spec.n_trials)
    return Study(database, row, spec, search)


@cache
def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def dead() -> ProcessIdentity:
    """A process of this host that has ended."""
    return dataclasses.replace(ProcessIdentity.current(), pid=_dead_pid(), process_start=1)


def elsewhere() -> ProcessIdentity:
    """A process of another host."""
    return dataclasses.replace(ProcessIdentity.current(), host="elsewhere", boot="another boot")


def new_worker(study: Study, identity: ProcessIdentity | None = None) -> int:
    return study.store.register_worker(study.id, identity or ProcessIdentity.current(), "cpu")


def suggest_all(study: Study, claim: Claim) -> dict[str, Any]:
    """The claimed trial's config."""
    spec, search = study.spec, study.search
    return spec.space.sample(
        spec.config,
        spec.arms[claim.arm],
        lambda dimension, default: search.suggest(claim.trial, dimension, default),
    )


def value_of(config: Mapping[str, Any], step: int) -> float:
    """The toy's curve: best at x = 0.3, y = 0.6."""
    height = math.exp(-4 * ((config["x"] - 0.3) ** 2 + (config["y"] - 0.6) ** 2))
    return height * (1 - math.exp(-config["speed"] * (step + 1)))


def measure(study: Study, claim: Claim, step: int, value: float, violation: float = -0.1) -> int:
    """Store and report one step; returns the number of ended runs."""
    row = MeasurementRow(step, {METRIC: value, VIOLATION: violation}, 1.0)
    n_ended = study.store.record(study.id, claim.number, claim.attempt, [row]).n_ended
    study.search.report(claim.trial, step, value)
    return n_ended


def work_off(study: Study, claim: Claim, n_steps: int = 2) -> dict[str, Any]:
    """Everything a worker does with a claimed trial, up to its end."""
    config = suggest_all(study, claim)
    study.store.set_config(study.id, claim.number, claim.attempt, config)
    for step in range(n_steps):
        measure(study, claim, step, value_of(config, step))
    study.end(claim, "complete")
    return config
