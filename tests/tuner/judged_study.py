"""A finished evaluation whose every score is a formula, for the tests of what is concluded from it.

The trainer fits like the toy; what it predicts are draws around a planted signal, the stronger the higher the toy's
curve. Units are users with four rows each, who come on one of fifty days; positives carry an amount.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from models.trainer import (
    SEARCH_ROLES,
    Ablation,
    DataSpec,
    Decision,
    Features,
    InputError,
    Labels,
    Measurement,
    Predictions,
    Role,
    Run,
)
from storage.database import Database
from storage.leases import ProcessIdentity
from storage.rows import EvaluationRow
from storage.tables import runs
from tests.searches import make_database
from tests.toy import ToyTrainer, _read
from tests.tuner.toy_study import url, write_spec
from tuner import coordinator
from tuner.plan import Plan, PlannedArm, spec_of_fits
from tuner.study import Study
from tuner.summary import summarize
from tuner.verdict import conclude
from tuner.worker import Worker, WorkerOptions

N_ROWS = {"train": 400, "valid": 3000, "calibrate": 3000, "test": 2000}
_ROLE_SEEDS = {"train": 1, "valid": 2, "calibrate": 3, "test": 4}


@lru_cache
def world(role: str) -> dict[str, np.ndarray]:
    """The truth of one role; about one row in five is positive."""
    rng = np.random.default_rng(_ROLE_SEEDS[role])
    n = N_ROWS[role]
    signal = rng.normal(size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(2.2 - 2.0 * signal))).astype(np.float32)
    amount = np.where(labels == 1, np.expm1(1.0 + rng.normal(size=n).clip(-0.9)), 0.0)
    return {"signal": signal, "labels": labels, "amount": amount, "unit": np.arange(n) // 4}


@dataclass(frozen=True)
class JudgedData:
    manifest: Any
    roles: frozenset[Role]

    def require(self, role: Role) -> None:
        if role not in self.roles:
            raise KeyError(role)


class JudgedTrainer(ToyTrainer):
    """The toy with labels, features and scores. It counts what it is asked, for all instances together."""

    asked: Mapping[str, list[Any]] = {"predict": [], "ablate": [], "export": []}

    def check(self, config: Any, data: Any, decision: Decision) -> list[Any]:
        return []

    def fit(self, config: Any, data: Any, run: Run) -> Iterator[Measurement]:
        for found in super().fit(config, data, run):
            roc_auc = 0.5 + found.metrics["valid/toy/pr_auc"] / 2
            yield replace(found, metrics={**found.metrics, "valid/toy/roc_auc": roc_auc})

    def predict(self, checkpoint: Path, data: Any, role: Role, device: str = "cpu") -> Predictions:
        if isinstance(data, JudgedData):
            data.require(role)
        self.asked["predict"].append((str(checkpoint), role))
        return self._predictions(checkpoint, role)

    def _predictions(self, checkpoint: Path, role: Role) -> Predictions:
        truth = world(role)
        rng, height = _model(checkpoint, role)
        noise = rng.normal(size=len(truth["signal"]))
        logits = (3.0 * height * truth["signal"] + (1 - height) * noise - 2.0).astype(np.float32)
        amount = np.expm1(np.full(len(logits), 0.8)).astype(np.float32)
        return Predictions({"toy": logits, "amount": amount}, {"toy": logits.astype(np.float64) * 0.7})

    def labels(self, data: Any, role: Role, decision: Decision) -> Labels:
        data.require(role)
        truth = world(role)
        amount = np.where(truth["labels"] == 1, truth["amount"], np.nan).astype(np.float32)
        unit = truth["unit"] if decision.unit == "user" else np.arange(len(truth["unit"]))
        groups = {"user": truth["unit"], "day": truth["unit"] % 50}
        return Labels(
            {"toy": truth["labels"], "amount": amount}, unit, truth["amount"], {"amount": "log1p"}, groups=groups
        )

    def features(self, data: Any, role: Role) -> Features:
        data.require(role)
        truth, rng = world(role), np.random.default_rng(9)
        numeric = np.stack([truth["signal"] + rng.normal(size=N_ROWS[role]), rng.normal(size=N_ROWS[role])], axis=1)
        codes = (truth["signal"] > 0).astype(np.int32)[:, None] + 1
        return Features(numeric.astype(np.float32), ("hint", "noise"), codes, ("side",), (3,))

    def ablate(
        self, checkpoint: Path, data: Any, role: Role, decision: Decision, device: str = "cpu"
    ) -> Iterator[Ablation]:
        self.asked["ablate"].append(str(checkpoint))
        scores = self._predictions(checkpoint, role).scores["toy"]
        rng, _ = _model(checkpoint, role)
        yield Ablation("group", "nothing", scores)
        yield Ablation("group", "signal", rng.normal(size=len(scores)).astype(np.float32))
        yield Ablation("unit", "shared.0", scores + rng.normal(size=len(scores)).astype(np.float32))

    def export(self, checkpoint: Path, data: Any, folder: Path) -> None:
        self.asked["export"].append(str(checkpoint))
        (folder / "model.json").write_text(json.dumps({"trainer": "tests.tuner.judged_study:JudgedTrainer"}))
        (folder / "weights.txt").write_text(_read(checkpoint)[1])


def _model(checkpoint: Path, role: str) -> tuple[np.random.Generator, float]:
    """Randomness that the fit's weights and the role decide, and how good the fit is."""
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: expected a checkpoint, got nothing")
    measurement, weights = _read(checkpoint)
    digest = hashlib.sha256(f"{weights} {role}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")), measurement.metrics["valid/toy/pr_auc"]


@dataclass
class Evaluated:
    """All that `conclude` is given, and what it said."""

    study: Study
    fits: Study
    evaluation: EvaluationRow
    plan: Any
    options: Any
    said: list[str] = field(default_factory=list)

    def data_of(self, roles: frozenset[Role]) -> JudgedData:
        data = DataSpec(JudgedTrainer.Data.model_validate(self.study.spec.data), Path("."), Path("cache"))
        manifest = JudgedTrainer().load(data, roles).manifest
        return JudgedData(replace(manifest, rows=N_ROWS), roles)

    def refresh(self) -> EvaluationRow:
        """The evaluation's row as it is now."""
        (row,) = self.study.store.evaluations(self.study.id)
        return row

    def place(self, arm: str) -> int:
        return [planned.name for planned in self.plan.arms].index(arm)

    def change_plan(self, **changes: Any) -> None:
        self.plan = replace(self.plan, **changes)

    def change_decision(self, **changes: Any) -> None:
        for study in (self.study, self.fits):
            decision = study.spec.decision.model_copy(update=changes)
            study.spec = study.spec.model_copy(update={"decision": decision})

    def fail(self, numbers: Iterable[int]) -> None:
        """Let some fits have failed instead."""
        failed = set(numbers)
        trials = [
            replace(trial, state="failed") if trial.number in failed else trial
            for trial in self.fits.search.trials()
        ]
        self.fits.search.trials = lambda: trials  # type: ignore[method-assign]
        with self.study.database.transaction() as connection:
            connection.execute(
                runs.update()
                .where(runs.c.study_id == self.fits.id, runs.c.number.in_(failed))
                .values(failure="RuntimeError: planted", best_step=None)
            )


def work_off(study: Study, runs: Path) -> None:
    """Every trial of a study, in this process."""
    trainer = JudgedTrainer()
    data = Evaluated(study, study, None, None, None).data_of(SEARCH_ROLES)  # type: ignore[arg-type]
    worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), "cpu")
    told = WorkerOptions("cpu", str(runs), str(runs / "cache"), (study.name,))
    Worker(study, trainer, data, worker_id, told, threading.Event()).serve()
    study.store.end_worker(worker_id)


def search(folder: Path, database: Database, **changes: Any) -> Study:
    """A finished search of three arms; `joint` learns best."""
    path = write_spec(
        folder,
        "judged",
        **{
            "trainer": "tests.tuner.judged_study:JudgedTrainer",
            "decision": {"task": "toy", "target_precision": 0.5, "min_selected": 30, "unit": "user"},
            "arms": {"single": {"x": 0.9}, "joint": {"shape": "b"}, "other": {"x": 0.1, "y": 0.9}},
            "space": {"y": {"low": 0.4, "high": 0.8}},
            "config": {"x": 0.3, "y": 0.6, "n_steps": 3, "violation": -0.1},
            "n_trials": 6,
            "pruner": {"name": "none"},
            **changes,
        },
    )
    options = coordinator.RunOptions(str(path), runs=str(folder / "runs"), storage=url(folder))
    spec, trainer = coordinator.read_spec(options)
    manifest = trainer.load(coordinator.data_spec(spec, trainer, options), frozenset()).manifest
    study = coordinator.open_study(spec, manifest, options, database)
    study.store.start_study(study.id, spec.n_trials, 0)
    work_off(study, folder / "runs")
    return study


# --- evaluations -----------------------------------------------------------------------------------------------


def make(folder: Path, seeds: int = 3, **changes: Any) -> None:
    """A finished search in `folder`, and the ended fits of its first evaluation."""
    (folder / "runs").mkdir()
    database = make_database(url(folder))
    try:
        study = search(folder, database, **changes)
        plan = plan_of(study, seeds)
        row = study.store.create_evaluation(study.id, 1, "judged.evaluation-1", plan.as_json())
        spec = spec_of_fits(study.spec, plan)
        fits = coordinator.create_study(database, row.name, spec, study.store.get_study(study.id).data, plan.n_fits)
        fits.store.start_study(fits.id, spec.n_trials, 0)
        work_off(fits, folder / "runs")
    finally:
        database.close()


def plan_of(study: Study, seeds: int) -> Plan:
    """The best trial of every arm, and the default of the best arm."""
    summary = summarize(study)
    best = {arm: max((t for t in summary.trials if t.arm == arm), key=lambda t: t.value) for arm in study.spec.arms}
    arms = [PlannedArm(arm, arm, t.number, "searched", 1, dict(t.config)) for arm, t in best.items()]
    default = {**summary.defaults["joint"].config, "y": 0.8}
    arms.append(PlannedArm("joint/default", "joint", None, "default", 0, default))
    return Plan(tuple(arms), seeds, 1, 200, summary.data["data_hash"])


@contextmanager
def opened(template: Path, folder: Path) -> Iterator[Evaluated]:
    """A copy of what `make` made, opened for a conclusion."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    database = Database(url(folder))
    try:
        study = Study.open(database, "judged")
        (row,) = study.store.evaluations(study.id)
        fits = Study.open(database, row.name)
        options = SimpleNamespace(runs=str(folder / "runs"), artifacts=None, devices="cpu")
        yield Evaluated(study, fits, row, Plan.from_json(row.plan), options)
    finally:
        database.close()


def concluded(evaluated: Evaluated) -> dict[str, Any]:
    """The document."""
    evaluated.said.clear()
    return conclude(
        evaluated.study, evaluated.refresh(), evaluated.fits, evaluated.plan, JudgedTrainer(), evaluated.data_of,
        evaluated.options, evaluated.said.append,
    )  # fmt: skip


def scores_of(evaluated: Evaluated, model: str, role: str) -> np.ndarray:
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name / "scores"
    return load_file(folder / f"{model}-{role}.safetensors")["scores/toy"]


def score_files(evaluated: Evaluated) -> dict[str, tuple[int, int]]:
    """Every score file that is there, and when it was written."""
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name / "scores"
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("[!.]*")}


def kept(evaluated: Evaluated, before: Mapping[str, Any]) -> bool:
    """Whether no score file that was there before was written again."""
    return score_files(evaluated).items() >= before.items()
