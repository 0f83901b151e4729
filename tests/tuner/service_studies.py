"""Studies in the hands of several workers, for the tests of what watches the service."""

from __future__ import annotations

from storage.database import Database
from storage.tables import workers
from tests.searches import make_spec, make_study, measure, new_worker, suggest_all, work_off
from tuner.study import Claim, Study


def make(database: Database, name: str = "toy", n_trials: int = 10, n_ended: int = 0) -> Study:
    study = make_study(database, make_spec(study=name, n_trials=n_trials), name)
    worker = new_worker(study)
    for _ in range(n_ended):
        work_off(study, taken(study, worker))
    study.store.end_worker(worker)
    return study


def taken(study: Study, worker: int) -> Claim:
    claim = study.claim(worker)
    assert claim is not None
    return claim


def begin(study: Study, worker: int, n_steps: int = 0) -> Claim:
    """A trial in the worker's hands."""
    claim = taken(study, worker)
    suggest_all(study, claim)
    for step in range(n_steps):
        measure(study, claim, step, 0.5)
    return claim


def age_lease(database: Database, worker: int, seconds: float) -> None:
    with database.transaction() as connection:
        earlier = workers.c.renewed_at - seconds
        connection.execute(workers.update().where(workers.c.id == worker).values(renewed_at=earlier))
