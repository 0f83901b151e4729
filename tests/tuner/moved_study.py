"""A study with everything a study can have, and all that a database knows of one, for tests of how it is moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa

from storage.database import Database
from storage.rows import MeasurementRow
from storage.runs import Store
from storage.tables import (
    attempts,
    certificates,
    evaluations,
    looks,
    measurements,
    models,
    promotions,
    runs,
    studies,
)
from tests import searches
from tests.searches import METRIC, VIOLATION, make_spec, measure, new_worker, suggest_all, work_off
from tuner.optuna_storage import RetryingStorage
from tuner.study import Claim, Study

DATA_HASH = "da7a"
DATA = json.dumps({"data_hash": DATA_HASH, "source": "toy data", "simulated": False})
OF_STUDIES = (runs, attempts, measurements)
ON_DATA = (looks, certificates)
_SPEC_OF_FITS = make_spec(n_trials=2, replicate=True, space={}, pruner={"name": "none"})
DOCUMENT = {
    "study": "toy", "evaluation": "toy.evaluation-1", "seeds": 2, "model": {"name": "toy", "version": 1},
    "arms": {"one": {"config": {"x": 0.1}}},
}  # fmt: skip


def fill(database: Database) -> Study:
    """Trials 0 complete, 1 infeasible, 2 pruned, 3 failed, 4 interrupted after two steps, 5 at work, 6 queued by a
    person; one evaluation with a complete and a running fit; looks and certificates of this study and another."""
    study = searches.make_study(database, make_spec(n_trials=8))
    store = study.store
    store.update_study(study.id, study.spec.to_json(), "0.3.0", DATA)
    worker = new_worker(study)
    work_off(study, claimed(study, worker))
    claim = claimed(study, worker)
    start(study, claim, 2, violation=0.3)
    study.end(claim, "complete")
    for state, failure in (("pruned", None), ("failed", "RuntimeError: planted")):
        claim = claimed(study, worker)
        start(study, claim, 1)
        store.record(study.id, claim.number, claim.attempt, [], curves={"step": 0, "pr": [0.5]})
        study.end(claim, state, failure)
    claim = claimed(study, worker)
    start(study, claim, 2)
    assert store.name_upload(study.id, claim.number, claim.attempt, 1)
    # Another worker takes what comes next, so this one is put back afterwards.
    at_work = claimed(study, new_worker(study))
    start(study, at_work, 3)
    study.stop(claim)
    study.search.study.enqueue_trial({"x": 0.25}, user_attrs={"why": "a hunch", "numbers": [1, 2.5, None]})
    _decorate(study)
    store.queue_study(study.id)
    store.claim_notification(study.id, "stalled", "once")
    _evaluate(database, study)
    return study


def claimed(study: Study, worker: int) -> Claim:
    claim = study.claim(worker)
    assert claim is not None
    return claim


def start(study: Study, claim: Claim, n_steps: int, violation: float = -0.1) -> None:
    config = suggest_all(study, claim)
    study.store.set_config(study.id, claim.number, claim.attempt, config)
    for step in range(n_steps):
        measure(study, claim, step, 0.1 + step / 7, violation)


def _decorate(study: Study) -> None:
    """What people and the dashboard leave with Optuna, and values that are no ordinary numbers."""
    storage, optunas = study.search.storage, study.search.study
    optunas.set_user_attr("note", {"of": "a person", "number": 0.1 + 0.2})
    storage.set_study_system_attr(optunas._study_id, "dashboard:note_ver", 3)
    at_work = optunas.trials[5]._trial_id
    for step, value in ((10, float("nan")), (11, float("inf")), (12, float("-inf")), (13, 1 / 3)):
        storage.set_trial_intermediate_value(at_work, step, value)
    storage.set_trial_system_attr(at_work, "tpe:relative_params:0", '{"x": 0.1}')


def _evaluate(database: Database, study: Study) -> None:
    store = study.store
    row = store.create_evaluation(study.id, 1, "toy.evaluation-1", {"arms": [], "seeds": 2})
    fits = searches.make_study(database, _SPEC_OF_FITS, "toy.evaluation-1")
    store.update_study(fits.id, fits.spec.to_json(), "0.3.0", DATA)
    worker = new_worker(fits)
    work_off(fits, claimed(fits, worker), 3)
    start(fits, claimed(fits, worker), 1)
    store.set_nominee(row.id, {"nominees": ["one"]})
    store.finish_evaluation(row.id, DOCUMENT)
    store.create_evaluation(study.id, 2, "toy.evaluation-2", {"arms": [], "seeds": 9})  # whose fits were not begun
    seen(store, "other", "other.evaluation-1", "a")
    seen(store, "toy", "toy.evaluation-1", "b")
    store.open_look("elsewhere", "test", "third", "third.evaluation-1", "c")  # at other data
    for version, checksum in enumerate(("c1", "c2", "c3"), 1):
        store.add_model("toy", "toy.evaluation-1", f"models/toy/{checksum}", checksum, 10, {}, {"own": {}}, None,
                        DATA_HASH, "0.3.0")  # fmt: skip
        if version < 3:
            store.promote("toy", version, version - 1 or None, {"passed": True})
    store.add_model("other", "other.evaluation-1", "models/other/c", "c4", 10, {}, {}, None, DATA_HASH, "0.3.0")


def seen(store: Store, study: str, evaluation: str, model: str) -> None:
    """Looks at test and calibrate, a certificate; what is of test is closed."""
    look = store.open_look(DATA_HASH, "test", study, evaluation, model)
    store.close_look(look.id)
    certificate = store.open_certificate(DATA_HASH, study, evaluation, model, lambda number: 0.1 / number**2)
    store.open_look(DATA_HASH, "calibrate", study, evaluation, model)
    store.issue_certificate(certificate.id, {"status": "infeasible", "of": model})


def dump(database: Database, name: str = "toy", called: str = "toy") -> dict[str, Any]:
    """All that a database knows of a study, with names for ids.

    Args:
        called: in place of its name.
    """
    found: dict[str, Any] = {"trials": {}}
    with database.transaction() as connection:
        names = dict(connection.execute(sa.select(studies.c.id, studies.c.name)).all())
        wanted = [n for n in names.values() if n == name or n.startswith(f"{name}.evaluation-")]
        for table in (studies, *OF_STUDIES, evaluations, *ON_DATA, models, promotions):
            rows = [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for row in rows:
                row.pop("id", None)
                if row.get("document") is not None:
                    row["document"] = json.loads(row["document"])
                if "study_id" in row:
                    row["study_id"] = names[row["study_id"]]
            found[table.name] = [row for row in rows if _is_of(table, row, name, wanted)]
    for each in wanted:
        trials = RetryingStorage(database)
        found["trials"][each] = optuna_trials(optuna.load_study(study_name=each, storage=trials))
    for row in found[studies.name]:
        assert row.pop("created_at") > 0  # of each database its own
    text = json.dumps(found, sort_keys=True, default=repr)
    found = json.loads(text.replace(f'"{name}"', f'"{called}"').replace(f'"{name}.eval', f'"{called}.eval'))
    return {table: _in_order(rows) if isinstance(rows, list) else rows for table, rows in found.items()}


def _is_of(table: sa.Table, row: dict[str, Any], name: str, wanted: list[str]) -> bool:
    if table in ON_DATA:
        return row["data_hash"] == DATA_HASH
    if table in (models, promotions):
        return row["name"] == name
    return row.get("study_id", row.get("name")) in wanted


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def optuna_trials(study: optuna.Study) -> list[dict[str, Any]]:
    """Everything that Optuna knows of a study's trials, but their ids."""
    return [
        {
            name: json.loads(json.dumps(value, sort_keys=True, default=repr))
            for name, value in vars(trial).items()
            if name != "_trial_id"
        }
        for trial in study.get_trials()
    ]


def as_copied(found: dict[str, Any]) -> dict[str, Any]:
    """A dump as it has to be after a copy: nobody works there, and nothing is queued."""
    copied = json.loads(json.dumps(found))
    measured = {(run["study_id"], run["number"]): run["measured_at"] for run in copied[runs.name]}
    for attempt in copied[attempts.name]:
        attempt["worker_id"] = 0
        if attempt["released_at"] is None:
            attempt["outcome"] = "lost"
            attempt["released_at"] = measured[attempt["study_id"], attempt["number"]]
    for row in copied[studies.name]:
        row["queued_at"] = row["stop"] = None
    for of_study in copied["trials"].values():
        for trial in of_study:
            trial["state"] = 4 if trial["state"] == 0 else trial["state"]
    return {table: _in_order(rows) if isinstance(rows, list) else rows for table, rows in copied.items()}


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def row_of(step: int, value: float = 0.5) -> MeasurementRow:
    return MeasurementRow(step, {METRIC: value, VIOLATION: -0.1}, 1.0)
