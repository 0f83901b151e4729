"""Exported models of the toy trainer, and as much of an evaluation's document as the registry asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.database import Database
from storage.rows import ModelRow
from storage.runs import Store
from tests.searches import make_spec
from tuner.registry import add_candidate

VALUE = 0.8  # of the toy's curve
CERTIFIED = {"status": "certified", "target": 0.6, "confidence": 0.9, "threshold": 0.25, "precision": 0.7,
             "bound": 0.62, "certifiable_precision": 0.65, "number_on_set": 1}  # fmt: skip
INFEASIBLE = CERTIFIED | {"status": "infeasible", "threshold": None, "precision": None, "bound": None,
                          "certifiable_precision": 0.52}  # fmt: skip
CHECK = {"precision": 0.68, "low": 0.61, "high": 0.74, "kept": True, "refuted": False}


def write_export(folder: Path, *, value: float = VALUE, certificate: dict[str, Any] | None = None,
                 metrics: dict[str, float] | None = None, **verdict: Any) -> Path:  # fmt: skip
    """A model folder as `conclude` leaves it."""
    certificate = CERTIFIED if certificate is None else certificate
    folder.mkdir(parents=True)
    content = {"trainer": "tests.toy:ToyTrainer", "value": value, "weights": ""}
    (folder / "model.json").write_text(json.dumps(content))
    told = {
        "format": 1, "study": "s", "evaluation": "s.evaluation-1", "task": "toy",
        "calibrator": {"kind": "platt", "slope": 0.5, "intercept": -1.0},
        "smearing": {"money": {"factor": 1.5, "transform": "log1p"}},
        "threshold": certificate["threshold"], "certificate": certificate,
        "metrics": metrics or {"pr_auc": 0.55, "ece_calibrated": 0.02}, **verdict,
    }  # fmt: skip
    (folder / "verdict.json").write_text(json.dumps(told))
    return folder


def document(certificate: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Of an evaluation with one nominee, of arm `one`."""
    intervals = {
        "pr_auc": {"value": 0.54, "low": 0.5, "high": 0.58, "per_seed": [0.53, 0.55]},
        "ece_calibrated": {"value": 0.025, "low": 0.01, "high": 0.04, "per_seed": [0.03, 0.02]},
    }
    nominee = {"arm": "one", "number": 1, "certificate": certificate or CERTIFIED, "check": CHECK}
    return {
        "study": "s", "evaluation": "s.evaluation-1", "data": {"data_hash": "d"},
        "arms": {"one": {"config": {"x": 0.5}, "metrics": intervals}},
        "nominees": [nominee], "leak": {"features": [["hint", 0.4]], "best": 0.4}, **changes,
    }  # fmt: skip


def make_model(
    database: Database, folder: Path, name: str = "s", artifacts: str | None = None, number: int = 1,
    gate: dict[str, Any] | None = None, **export: Any,
) -> ModelRow:  # fmt: skip
    """A candidate below `folder`/runs, of evaluation `number` of a stored study `s` with this gate."""
    store, evaluation = Store(database), f"s.evaluation-{number}"
    spec = json.loads(make_spec().to_json()) | {"gate": gate or {}}
    study = store.create_study("s", json.dumps(spec), '{"data_hash": "d"}', "0.2.0", 10)
    row = store.find_evaluation(evaluation) or store.create_evaluation(study.id, number, evaluation, {})
    told = document(export.get("certificate"), evaluation=evaluation)
    exported = write_export(folder / f"export-{number}-{name}", value=VALUE - number / 100, **export)
    model = add_candidate(store, name, exported, told, folder / "runs", artifacts)
    store.finish_evaluation(row.id, told | {"model": {"name": name, "version": model.version}})
    return model
