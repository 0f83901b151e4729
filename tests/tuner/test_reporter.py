"""The way of a measurement when an attempt goes on below what an earlier one had measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.trainer import Measurement
from storage.database import Database, DatabaseUnavailable
from storage.runs import Fenced, Store
from tests.searches import METRIC, VIOLATION, make_spec, make_study, new_worker
from tuner.reporter import Journal, Reporter
from tuner.study import Claim, Study


@pytest.fixture
def study(sqlite: Database) -> Study:
    return make_study(sqlite, make_spec(n_trials=1))


class Attempt:
    """One attempt at the only trial, on a machine whose folder of runs is `directory`."""

    def __init__(self, study: Study, directory: Path) -> None:
        self.study = study
        self.directory = directory
        claim = study.claim(new_worker(study))
        assert claim is not None
        self.claim: Claim = claim
        self.reporter = Reporter(study, claim, directory)
        self.reporter.resume()

    def measure(self, step: int, value: float, trained: bool = True, flush: bool = True, **curves: Any) -> None:
        """`trained`: its checkpoint is this attempt's; else the trainer tells the step it goes on from."""
        if trained:
            folder = self.directory / f"attempt-{self.claim.attempt}" / f"step-{step:05d}"
            folder.mkdir(parents=True)
        metrics = {METRIC: value, VIOLATION: -0.1}
        self.reporter.add(Measurement(step, metrics, step + 1.0, curves or None))
        if flush:
            self.reporter.flush()

    def stop(self) -> None:
        self.study.stop(self.claim)


def stored(study: Study) -> list[tuple[int, int, float]]:
    rows = study.store.measurements(study.id, [0])[0]
    return [(row.step, row.attempt, row.metrics[METRIC]) for row in rows]


def test_steps_beyond_the_checkpoint_are_superseded(study: Study, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path / "here")
    for step in range(5):
        first.measure(step, 0.1 * step)
    first.stop()
    # Elsewhere, from the upload of step 2.
    there = tmp_path / "there"
    (there / "attempt-1" / "step-00002").mkdir(parents=True)
    second = Attempt(study, there)
    second.measure(2, 0.2, trained=False)
    assert stored(study) == [(0, 1, 0.0), (1, 1, 0.1), (2, 1, 0.2)]
    # Optuna's table too, or a trial pruned here would keep a value that nobody stands for.
    assert study.search.study.trials[0].intermediate_values == {0: 0.0, 1: 0.1, 2: 0.2}
    assert (study.store.runs(study.id)[0].checkpoint_attempt, study.store.runs(study.id)[0].checkpoint_step) == (
        1,
        2,
    )
    second.measure(3, 0.35)
    second.measure(4, 0.4)
    assert stored(study)[3:] == [(3, 2, 0.35), (4, 2, 0.4)]
    optuna = study.search.study.trials[0].intermediate_values
    assert optuna == {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.35, 4: 0.4}


def test_a_run_that_begins_again_supersedes_everything(study: Study, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path / "here")
    for step in range(3):
        first.measure(step, 0.1, pr={"recall": [step]})
    first.stop()
    second = Attempt(study, tmp_path / "there")
    second.measure(0, 0.5)
    assert stored(study) == [(0, 2, 0.5)]
    assert study.store.curves(study.id, 0) is None  # those of step 2 are gone with it


def test_nothing_is_superseded_where_the_newest_step_is_at_hand(study: Study, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path)
    for step in range(3):
        first.measure(step, 0.1)
    first.stop()
    second = Attempt(study, tmp_path)
    second.measure(2, 0.1, trained=False)
    second.measure(3, 0.2)
    assert [row[:2] for row in stored(study)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_a_step_known_to_the_checkpoint_alone_is_its_attempts(study: Study, tmp_path: Path) -> None:
    """Killed between checkpoint and journal."""
    first = Attempt(study, tmp_path)
    first.measure(0, 0.1)
    (tmp_path / "attempt-1" / "step-00001").mkdir()
    first.stop()
    second = Attempt(study, tmp_path)
    second.measure(1, 0.2, trained=False)
    assert [row[:2] for row in stored(study)] == [(0, 1), (1, 1)]
    assert study.store.runs(study.id)[0].checkpoint_attempt == 1


def test_what_waits_in_the_journal_beyond_the_checkpoint_is_dropped(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Attempt(study, tmp_path)
    first.measure(0, 0.1)
    for step in (1, 2):  # the database was away
        first.measure(step, 0.9, flush=False)
    first.stop()
    # The checkpoint of step 2 is found damaged.
    second = Attempt(study, tmp_path)
    second.measure(1, 0.9, trained=False)
    second.measure(2, 0.3)
    assert stored(study) == [(0, 1, 0.1), (1, 1, 0.9), (2, 2, 0.3)]


def test_superseding_waits_for_the_database(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Attempt(study, tmp_path / "here")
    for step in range(4):
        first.measure(step, 0.1)
    first.stop()
    second = Attempt(study, tmp_path / "there")
    supersede, away = Store.supersede, [True, True, False]

    def sometimes(self: Store, *args: Any) -> Any:
        if away.pop(0):
            raise DatabaseUnavailable("away")
        return supersede(self, *args)

    monkeypatch.setattr(Store, "supersede", sometimes)
    for step in range(2):
        with pytest.raises(DatabaseUnavailable):
            second.measure(step, 0.5)
    second.measure(2, 0.5)
    assert stored(study) == [(0, 2, 0.5), (1, 2, 0.5), (2, 2, 0.5)]
    assert not away


def test_a_zombie_supersedes_nothing(study: Study, database: Database, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path / "here")
    for step in range(3):
        first.measure(step, 0.1)
    first.stop()
    zombie = Attempt(study, tmp_path / "there")
    zombie.stop()
    owner = Attempt(study, tmp_path / "here")
    owner.measure(2, 0.1, trained=False)
    with pytest.raises(Fenced):
        zombie.measure(0, 0.9)
    assert [row[0] for row in stored(study)] == [0, 1, 2]
    assert list(study.search.study.trials[0].intermediate_values) == [0, 1, 2]


def test_curves_of_the_best_step_are_kept(study: Study, tmp_path: Path) -> None:
    attempt = Attempt(study, tmp_path)
    attempt.measure(0, 0.1, pr={"recall": [0.0]})
    attempt.measure(1, 0.2, pr={"recall": [1.0]})
    attempt.measure(2, 0.15)  # not the best: it has none
    assert study.store.curves(study.id, 0) == {"step": 1, "pr": {"recall": [1.0]}}


def test_curves_that_were_superseded_come_back_with_the_step_they_are_of(study: Study, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path / "here")
    for step in range(3):
        first.measure(step, 0.1 + step, pr={"recall": [step]})
    first.stop()
    there = tmp_path / "there"
    (there / "attempt-1" / "step-00001").mkdir(parents=True)
    second = Attempt(study, there)
    second.measure(1, 1.1, trained=False, pr={"recall": [1]})  # a trainer draws them again
    assert study.store.curves(study.id, 0) == {"step": 1, "pr": {"recall": [1]}}


def test_curves_survive_an_outage_and_a_death(study: Study, tmp_path: Path) -> None:
    first = Attempt(study, tmp_path)
    first.measure(0, 0.1, flush=False, pr={"recall": [0.0]})
    first.measure(1, 0.2, flush=False, pr={"recall": [1.0]})
    first.measure(2, 0.1, flush=False)
    first.stop()
    second = Attempt(study, tmp_path)
    second.measure(2, 0.1, trained=False)
    assert study.store.curves(study.id, 0) == {"step": 1, "pr": {"recall": [1.0]}}
    assert Journal(tmp_path, 1).curves_at({0}) == {"step": 0, "pr": {"recall": [0.0]}}
    assert Journal(tmp_path, 1).curves_at({2}) is None
