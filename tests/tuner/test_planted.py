"""Three planted populations through the real path: search, evaluation, verdict. Both arms learn who gives, from
some dozen columns; the second one learns how long they watch, too.

Where watching and giving follow the same direction, and few give, the second arm has to win; where they follow
directions at right angles and givers abound, it has nothing to win; where there are few rows, nobody can know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.trainer import SEARCH_ROLES, Role
from storage.leases import ProcessIdentity
from tests.searches import make_database
from tests.tuner.toy_study import url, write_spec
from tuner import coordinator
from tuner.coordinator import RunOptions
from tuner.plan import make_plan, spec_of_fits
from tuner.study import Study
from tuner.summary import summarize
from tuner.verdict import conclude
from tuner.worker import Worker, WorkerOptions

SEEDS = 4


@dataclass(frozen=True)
class Population:
    """`related`: watching and giving follow one direction. `rarity`: logit of not giving, in the middle."""

    n_rows: int
    n_columns: int
    related: bool
    rarity: float
    shares: dict[str, float]


HELPS = Population(30_000, 40, True, 4.0, {"train": 0.065, "valid": 0.1, "calibrate": 0.135, "test": 0.7})
USELESS = Population(20_000, 24, False, 2.0, {"train": 0.3, "valid": 0.15, "calibrate": 0.1, "test": 0.45})
SMALL = Population(1_500, 24, True, 3.0, {"train": 0.4, "valid": 0.2, "calibrate": 0.2, "test": 0.2})


def write_population(path: Path, population: Population) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(population.n_rows, population.n_columns))
    along, across = np.linalg.qr(rng.normal(size=(population.n_columns, 2)))[0].T
    giving = x @ along
    watching = giving if population.related else x @ across
    frame = pd.DataFrame({f"x{i}": x[:, i] for i in range(population.n_columns)})
    frame["seconds"] = np.expm1(np.clip(4 + watching + 0.2 * rng.normal(size=len(x)), 0, None))
    frame["gave"] = (rng.random(len(x)) < 1 / (1 + np.exp(population.rarity - 2 * giving))).astype(int)
    frame.to_parquet(path)


def spec_of(population: Population) -> dict[str, Any]:
    return {
        "trainer": "gift",
        "data": {
            "source": "table",
            "path": "table.parquet",
            "numeric_columns": [f"x{i}" for i in range(population.n_columns)],
            "categorical_columns": [],
            "tasks": {
                "watches": {"kind": "regression", "column": "seconds", "transform": "log1p"},
                "gives": {"kind": "binary", "column": "gave"},
            },
            "split": {"by": "hash", **population.shares},
        },
        "decision": {"task": "gives", "target_precision": 0.5},
        "objective": {"metric": "valid/gives/pr_auc"},
        "n_trials": 2,
        "config": {
            "tasks": {"watches": {"weight": 1.0, "loss": "mse"}, "gives": {"weight": 1.0, "loss": "bce"}},
            "network": {"depth": 2, "width": 32, "head_width": 8, "dropout": 0.0},
            "optimizer": {"lr": 0.01, "batch_size": 256},
            "training": {"max_epochs": 10, "patience": 3},
        },
        "arms": {"single": {"tasks": {"watches": None}}, "joint": {}},
        "space": {"optimizer": {"lr": {"low": 0.001, "high": 0.01, "log": True}}},
        "pruner": {"name": "none"},
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work_off(study: Study, trainer: Any, data: Any, runs: Path) -> None:
    study.store.start_study(study.id, study.spec.n_trials, 0)
    worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), "cpu")
    told = WorkerOptions("cpu", str(runs), str(runs / "cache"), (study.name,))
    Worker(study, trainer, data, worker_id, told, threading.Event()).serve()
    study.store.end_worker(worker_id)


def document_of(folder: Path, population: Population) -> dict[str, Any]:
    """Search and evaluation of a population."""
    write_population(folder / "table.parquet", population)
    path = write_spec(folder, "planted", **spec_of(population))
    (folder / "runs").mkdir()
    options = RunOptions(
        str(path), data=str(folder / "table.parquet"), runs=str(folder / "runs"), storage=url(folder)
    )
    database = make_database(url(folder))
    try:
        spec, trainer = coordinator.read_spec(options)
        data = trainer.load(coordinator.data_spec(spec, trainer, options), SEARCH_ROLES)
        study = coordinator.open_study(spec, data.manifest, options, database)
        work_off(study, trainer, data, Path(options.runs))
        plan = make_plan(summarize(study), seeds=SEEDS, n_replicates=300)
        row = study.store.create_evaluation(study.id, 1, "planted.evaluation-1", plan.as_json())
        stored = study.store.get_study(study.id).data
        fits = coordinator.create_study(database, row.name, spec_of_fits(spec, plan), stored, plan.n_fits)
        work_off(fits, trainer, data, Path(options.runs))

        def data_of(roles: frozenset[Role]) -> Any:
            return trainer.load(coordinator.data_spec(spec, trainer, options), roles)

        judged = SimpleNamespace(runs=options.runs, artifacts=None, devices="cpu")
        return conclude(study, row, fits, plan, trainer, data_of, judged, lambda _: None)
    finally:
        database.close()


@pytest.mark.parametrize(
    ("population", "outcome"), [(HELPS, "helps"), (USELESS, "does not"), (SMALL, "undecided")],
    ids=["helps", "does not", "undecided"],
)  # fmt: skip
def test_the_verdict_is_what_was_planted(tmp_path: Path, population: Population, outcome: str):
    document = document_of(tmp_path, population)
    verdict = document["verdict"]
    assert (verdict["arm"], verdict["against"]) == ("joint", "single")
    assert verdict["outcome"] == outcome, verdict
    gain = verdict["relative"]
    if outcome == "helps":
        assert gain["low"] >= 0.03
        assert document["nominees"][0]["arm"] == "joint"
        assert document["gradient_cosine"]["tasks"] == ["watches", "gives"]
        assert document["arms"]["joint"]["metrics"]["watches_mae"]["value"] > 0
        assert "watches_mae" not in document["arms"]["single"]["metrics"]
    elif outcome == "does not":
        assert gain["high"] < 0.03
        (nominee,) = document["nominees"]
        assert nominee["certificate"]["status"] == "certified"
        assert nominee["check"]["kept"]
    else:
        assert gain["low"] < 0.03 <= gain["high"]
        assert verdict["positives_needed"] is None or verdict["positives_needed"] > 0
    groups = document["importance"]["groups"]
    assert len(groups) == population.n_columns
    assert groups[0]["drop"] > 0
    assert len(document["importance"]["units"]) > 0
