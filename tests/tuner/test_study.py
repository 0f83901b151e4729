"""A study in service: claims, stops, ends, and what a crash between any two writes leaves behind."""

from __future__ import annotations

import gc
import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from storage.database import Database, DatabaseUnavailable, StorageError, retry
from storage.runs import Fenced, MeasurementRow
from tests.searches import (
    METRIC,
    VIOLATION,
    dead,
    elsewhere,
    make_database,
    make_spec,
    make_study,
    measure,
    new_worker,
    suggest_all,
    value_of,
    work_off,
)
from tuner.study import MAX_BARREN_CRASHES, Claim, Study, TooManyFailures, outcome_of


def claim(study: Study, worker: int | None = None, **kwargs: Any) -> Claim:
    claimed = study.claim(worker or new_worker(study), **kwargs)
    assert claimed is not None
    return claimed


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.search.trials()]


def outcomes(study: Study, number: int = 0) -> list[str | None]:
    return [a.outcome for a in study.store.attempts(study.id) if a.number == number]


class TestClaim:
    def test_numbers_arms_and_attempts(self, database: Database) -> None:
        study = make_study(database, make_spec(n_trials=3))
        claims = [claim(study) for _ in range(3)]
        assert [(c.number, c.attempt, c.arm) for c in claims] == [(0, 1, "one"), (1, 1, "two"), (2, 1, "one")]
        assert study.claim(new_worker(study)) is None
        assert not study.is_over()

    def test_the_total_counts_ended_trials(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=2))
        worker = new_worker(study)
        work_off(study, claim(study, worker))
        study.end(claim(study, worker), "failed", "because")
        assert study.is_over()
        assert study.claim(worker) is None
        study.store.start_study(study.id, 2, 1)  # --retry-failed
        assert not study.is_over()
        assert claim(study, worker).number == 2

    def test_an_interrupted_trial_goes_first(self, database: Database) -> None:
        study = make_study(database, make_spec())
        first, _second = claim(study), claim(study)
        config = suggest_all(study, first)
        study.stop(first)
        assert states(study) == ["waiting", "running"]
        again = claim(Study.open(database, "toy"))
        assert (again.number, again.attempt) == (0, 2)
        assert suggest_all(study, again) == config
        assert claim(study).number == 2
        assert outcomes(study) == ["stopped", None]

    def test_a_worker_that_asks_holds_nothing(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec())
        worker = new_worker(study)
        assert claim(study, worker).number == 0
        again = claim(study, worker)  # the database went away before it heard of the first claim
        assert (again.number, again.attempt) == (0, 2)
        assert outcomes(study) == ["lost", None]

    def test_a_trial_too_many_is_not_run(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=2))
        worker = new_worker(study)
        for _ in range(2):
            work_off(study, claim(study, worker))
        study.search.ask()  # by somebody whose lock was lost with its connection
        assert study.claim(worker) is None
        assert states(study) == ["complete", "complete", "waiting"]
        assert study.is_over()
        study.store.start_study(study.id, 3, 0)
        assert claim(study, worker).number == 2

    def test_a_lost_lock_gives_no_claim(self, postgresql_url: str) -> None:
        database = make_database(postgresql_url)
        study = make_study(database, make_spec(n_trials=1))
        worker = new_worker(study)
        ask = study.search.ask

        def ask_after_the_lock_broke() -> Any:
            with psycopg.connect(postgresql_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                )
            study.search.ask = ask  # type: ignore[method-assign]
            return ask()

        study.search.ask = ask_after_the_lock_broke  # type: ignore[method-assign]
        with pytest.raises(DatabaseUnavailable):
            study.claim(worker)
        assert study.store.runs(study.id) == []
        assert claim(study, worker).number == 0  # the trial that was created then
        assert states(study) == ["running"]
        database.close()

    def test_a_missing_study_is_told(self, sqlite: Database) -> None:
        with pytest.raises(StorageError, match="study 'nothing' is not in"):
            Study.open(sqlite, "nothing")

    def test_whether_the_living_hold_all_that_is_left(self, database: Database) -> None:
        study = make_study(database, make_spec(n_trials=2))
        assert not study.is_held()  # there is a trial to begin
        first = study.claim(new_worker(study, elsewhere()))
        assert not study.is_held()
        assert study.claim(new_worker(study)) is not None
        assert study.is_held()
        assert first is not None
        study.stop(first)
        assert not study.is_held()
        again = study.claim(new_worker(study, dead()))
        assert again is not None
        assert not study.is_held()  # its owner is dead
        again = study.claim(new_worker(study, elsewhere()))
        assert again is not None
        assert study.is_held()
        assert not study.is_held(judge_others=True, grace_s=-1.0)
        work_off(study, again)
        assert study.is_held()  # the other one
        study.store.stop_study(study.id, "drain")
        assert not study.is_held()

    def test_a_deleted_study_is_told(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec())
        worker = new_worker(study)
        study.store.delete_study(study.id)
        with pytest.raises(StorageError, match="deleted"):
            study.claim(worker)


class TestEnd:
    def test_the_best_step_is_the_value(self, database: Database) -> None:
        study = make_study(database, make_spec())
        claimed = claim(study)
        for step, value in enumerate([0.2, 0.7, 0.7, 0.4]):
            measure(study, claimed, step, value, violation=-0.1 * step)
        outcome = study.end(claimed, "complete")
        assert outcome is not None
        assert (outcome.step, outcome.value, outcome.violation, outcome.feasible) == (1, 0.7, -0.1, True)
        assert study.search.trials()[0].value == 0.7
        assert study.store.runs(study.id)[0].best_step == 1
        assert study.search.study.trials[0].constraints == {"violation": -0.1}

    def test_the_best_of_a_loss_is_the_smallest(self, sqlite: Database) -> None:
        spec = make_spec(objective={"metric": METRIC, "direction": "minimize"})
        study = make_study(sqlite, spec)
        claimed = claim(study)
        for step, value in enumerate([0.7, 0.2, 0.4]):
            measure(study, claimed, step, value, violation=0.3)
        outcome = study.end(claimed, "complete")
        assert outcome is not None
        assert (outcome.step, outcome.feasible) == (1, False)
        assert study.search.study.trials[0].constraints == {"violation": pytest.approx(1.2)}

    def test_nothing_measured_is_no_outcome(self) -> None:
        assert outcome_of([], make_spec()) is None

    @pytest.mark.parametrize("state", ["complete", "pruned", "failed"])
    def test_every_ending_stands_in_both_tables(self, sqlite: Database, state: str) -> None:
        study = make_study(sqlite, make_spec())
        claimed = claim(study)
        measure(study, claimed, 0, 0.5)
        study.end(claimed, state, "because" if state == "failed" else None)
        run = study.store.runs(study.id)[0]
        assert (states(study), outcomes(study)) == ([state], [state])
        assert (run.ended_at is not None, run.failure, run.best_step) == (
            True, *(("because", None) if state == "failed" else (None, 0)),
        )  # fmt: skip

    def test_ending_again_changes_nothing(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec())
        claimed = claim(study)
        measure(study, claimed, 0, 0.5)
        first = study.end(claimed, "complete")
        before = study.store.runs(study.id), study.search.trials()
        assert study.end(claimed, "complete") == first
        assert (study.store.runs(study.id), study.search.trials()) == before

    def test_three_failures_in_a_row_stop_the_study(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec())
        worker = new_worker(study)

        def fail(n: int) -> None:
            for _ in range(n):
                study.end(claim(study, worker), "failed", "the card burnt")

        fail(2)
        work_off(study, claim(study, worker))
        fail(3)
        with pytest.raises(TooManyFailures, match=r"3 trials failed in a row.*trial 5.*the card burnt"):
            study.claim(worker)
        study.store.start_study(study.id, 10, 0)  # the next `tuner run` begins to count anew
        fail(2)
        work_off(study, claim(study, worker))
        assert Counter(states(study)) == {"failed": 7, "complete": 2}

    def test_failures_at_the_end_of_the_total_leave_a_study_done(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=3))
        worker = new_worker(study)
        for _ in range(3):
            study.end(claim(study, worker), "failed", "the card burnt")
        assert study.claim(worker) is None
        assert study.is_over()


class TestFences:
    """A frozen worker of another host wakes after its trial was given to somebody else."""

    @pytest.fixture
    def study(self, database: Database) -> Study:
        return make_study(database, make_spec(n_trials=1))

    def frozen(self, study: Study) -> Claim:
        zombie = claim(study, new_worker(study, elsewhere()))
        suggest_all(study, zombie)
        measure(study, zombie, 0, 0.5)
        return zombie

    def assert_refused(self, study: Study, zombie: Claim) -> None:
        with pytest.raises(Fenced):
            study.store.record(study.id, 0, zombie.attempt, [MeasurementRow(1, {METRIC: 0.9}, 1.0)])
        with pytest.raises(Fenced):
            study.store.set_config(study.id, 0, zombie.attempt, {})
        with pytest.raises(Fenced):
            study.end(zombie, "complete")
        with pytest.raises(Fenced):
            study.stop(zombie)

    def test_its_lease_protects_it_until_it_has_run_out_and_only_who_may_judge_it(self, study: Study) -> None:
        self.frozen(study)
        other = Study.open(study.database, "toy")
        worker = new_worker(other)
        assert other.claim(worker, judge_others=True, grace_s=600.0) is None
        assert other.claim(worker, judge_others=False, grace_s=-1.0) is None
        assert claim(other, worker, judge_others=True, grace_s=-1.0).attempt == 2
        assert outcomes(study) == ["lost", None]

    def test_it_is_refused_while_its_trial_waits(self, study: Study) -> None:
        zombie = self.frozen(study)
        Study.open(study.database, "toy").recover(judge_others=True, grace_s=-1.0)
        assert states(study) == ["waiting"]
        self.assert_refused(study, zombie)
        assert states(study) == ["waiting"]

    def test_it_is_refused_while_another_trains(self, study: Study) -> None:
        zombie = self.frozen(study)
        other = Study.open(study.database, "toy")
        mine = claim(other, judge_others=True, grace_s=-1.0)
        self.assert_refused(study, zombie)
        measure(other, mine, 1, 0.6)
        other.end(mine, "complete")
        assert states(study) == ["complete"]
        assert other.search.trials()[0].value == 0.6

    def test_it_is_refused_after_the_end_and_its_trial_counts_once(self, study: Study) -> None:
        zombie = self.frozen(study)
        other = Study.open(study.database, "toy")
        mine = claim(other, judge_others=True, grace_s=-1.0)
        other.end(mine, "complete")
        self.assert_refused(study, zombie)
        assert states(study) == ["complete"]
        assert outcomes(study) == ["lost", "complete"]
        assert study.is_over()
        assert study.claim(new_worker(study)) is None
        assert len(study.store.runs(study.id)) == 1


class TestBarrenCrashes:
    def crash(self, study: Study, *steps: int) -> None:
        """A worker of this host takes the trial, measures and dies; its coordinator sees it."""
        claimed = claim(study, new_worker(study, dead()))
        assert claimed.number == 0
        for step in steps:
            measure(study, claimed, step, 0.5)
        study.recover(crashed=True)

    def test_a_trial_that_kills_its_worker_each_time_fails(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=1))
        self.crash(study, 0)
        for _ in range(MAX_BARREN_CRASHES - 1):
            assert states(study) == ["waiting"]
            self.crash(study)
        assert states(study) == ["waiting"]  # the first crash had measured something
        self.crash(study)
        assert states(study) == ["failed"]
        run = study.store.runs(study.id)[0]
        assert run.failure == "its worker process died 3 times in a row without a new checkpoint"
        assert outcomes(study) == ["crashed"] * 4
        assert study.is_over()

    def test_one_that_advances_never_does(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=1))
        for step in range(8):
            self.crash(study, step)
            assert states(study) == ["waiting"]
        work_off(study, claim(study))

    def test_a_machine_that_goes_down_is_no_crash_of_the_trial(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=1))
        for _ in range(6):
            claim(study, new_worker(study, dead()))
            study.recover()  # at the start of the next `tuner run`
            assert states(study) == ["waiting"]
        assert set(outcomes(study)) == {"lost"}

    def test_another_worker_that_finds_it_first_counts_it_too(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec(n_trials=1))
        for _ in range(MAX_BARREN_CRASHES):
            claim(study, new_worker(study, dead()))
        assert study.claim(new_worker(study)) is None
        assert states(study) == ["failed"]


class Killed(BaseException):
    """kill -9, as seen from inside."""


class Accident:
    """At the n-th commit of a database the process is killed, or the answer is lost."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dialect = database.engine.dialect
        self.do_commit = self.dialect.do_commit
        self.error = sqlite3.OperationalError if database.is_sqlite else psycopg.OperationalError
        self.countdown = -1
        self.kind = ""
        monkeypatch.setattr(self.dialect, "do_commit", self)
        monkeypatch.setattr("storage.database.time.sleep", lambda _s: None)

    def at(self, n: int, kind: str) -> None:
        self.countdown, self.kind = n, kind

    @property
    def happened(self) -> bool:
        return self.countdown < 0

    def __call__(self, connection: Any) -> None:
        self.do_commit(connection)
        self.countdown -= 1
        if self.countdown == -1:
            raise Killed if self.kind == "killed" else self.error("database is locked")


def serve(study: Study, worker: int, endings: list[str]) -> None:
    """What a worker does until every trial has ended; trial i ends as endings[i] (stopped: then complete)."""

    def insist(call: Callable[..., Any], *args: Any) -> Any:
        return retry(lambda: call(*args), 900.0, "x")

    while (claimed := insist(study.claim, worker)) is not None:
        config = insist(suggest_all, study, claimed)
        insist(study.store.set_config, study.id, claimed.number, claimed.attempt, config)
        stored = insist(study.store.measurements, study.id, [claimed.number])[claimed.number]
        for row in stored:
            insist(study.search.report, claimed.trial, row.step, row.metrics[METRIC])
        if not stored:
            insist(measure, study, claimed, 0, value_of(config, 0))
        ending = endings[claimed.number]
        try:
            if ending == "stopped" and claimed.attempt == 1:
                insist(study.stop, claimed)
            elif ending == "failed":
                insist(study.end, claimed, "failed", "told to")
            else:
                insist(study.end, claimed, "complete")
        except Fenced:  # its stop succeeded, but the answer was lost
            assert insist(study.search.trials)[claimed.number].state == "waiting"


def settled(study: Study) -> tuple[Any, ...]:
    """What people can see of a study, apart from times and attempts."""
    trials = study.search.study.trials
    runs = study.store.runs(study.id)
    rows = study.store.measurements(study.id, [run.number for run in runs])
    return (
        [(t.number, t.state.name, t.values, t.params, t.intermediate_values, t.constraints) for t in trials],
        [(t.user_attrs["arm"]) for t in trials],
        [(r.number, r.arm, r.config, r.best_step, r.ended_at is not None, bool(r.failure)) for r in runs],
        {number: [(row.step, row.metrics) for row in of_run] for number, of_run in rows.items()},
    )


# The connections of a killed process are never closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["killed", "answer lost"])
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_an_accident_at_any_commit_changes_nothing_in_the_end(
    kind: str, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the worker after every single commit of a study, or lose the answer: the study that another worker
    then finishes is the same as one that nobody disturbed."""
    database = make_database(request.getfixturevalue(f"{backend}_url"))
    endings = ["stopped", "failed"]
    spec = make_spec(n_trials=2, sampler={"name": "random"})
    undisturbed = make_study(database, spec, "undisturbed")
    serve(undisturbed, new_worker(undisturbed), endings)
    expected = settled(undisturbed)
    assert [trial[1] for trial in expected[0]] == ["COMPLETE", "FAIL"]
    accident = Accident(database, monkeypatch)
    # Not every one, to save time: the strides go through all kinds of them.
    n, stride = 0, 2 if backend == "sqlite" else 7
    finished = False
    while not finished:
        study = make_study(database, spec, f"s{n}")
        worker = new_worker(study, dead())
        accident.at(n, kind)
        try:
            serve(study, worker, endings)
        except Killed:
            study.search.storage.scoped_session.remove()
            again = Study.open(database, study.name)
            again.recover()
            serve(again, new_worker(again), endings)
        finished = not accident.happened
        accident.at(-1, "")
        assert settled(Study.open(database, study.name)) == expected, f"commit {n}"
        assert all(attempt.outcome for attempt in study.store.attempts(study.id)), f"commit {n}"
        n += stride
    assert n > 40
    database.close()
    gc.collect()


class TestCrashPoints:
    """The same, one by one, where the state in between can be told."""

    @pytest.fixture
    def study(self, sqlite: Database) -> Study:
        return make_study(sqlite, make_spec(n_trials=1))

    def finish(self, study: Study) -> None:
        again = Study.open(study.database, "toy")
        work_off(again, claim(again))
        assert states(again) == ["complete"]
        assert len(again.store.runs(again.id)) == 1
        assert again.is_over()

    def test_between_ask_and_claim(self, study: Study) -> None:
        study.search.ask()
        assert states(study) == ["running"]
        study.recover()
        assert states(study) == ["waiting"]
        self.finish(study)
        assert outcomes(study) == ["complete"]

    def test_between_constraint_and_tell(self, study: Study) -> None:
        claimed = claim(study, new_worker(study, dead()))
        claimed.trial.set_constraint("violation", -0.1)
        study.recover()
        self.finish(study)
        assert study.search.study.trials[0].constraints == {"violation": -0.1}
        assert outcomes(study) == ["lost", "complete"]

    def test_between_tell_and_end(self, study: Study) -> None:
        claimed = claim(study, new_worker(study, dead()))
        measure(study, claimed, 0, 0.5)
        measure(study, claimed, 1, 0.4)
        study.search.end(claimed.trial, "complete", 0.5, -0.1)
        assert study.store.runs(study.id)[0].ended_at is None
        study.recover()
        run = study.store.runs(study.id)[0]
        assert (run.ended_at is not None, run.best_step, outcomes(study)) == (True, 0, ["complete"])
        assert study.is_over()
        assert study.claim(new_worker(study)) is None

    def test_between_tell_and_end_of_a_failure(self, study: Study) -> None:
        claimed = claim(study, new_worker(study, dead()))
        study.search.end(claimed.trial, "failed", None, None)
        study.recover()
        assert "before it could say why" in str(study.store.runs(study.id)[0].failure)

    def test_between_requeue_and_release(self, study: Study) -> None:
        study.search.requeue(claim(study, new_worker(study, dead())).number)
        study.recover()
        assert states(study) == ["waiting"]
        self.finish(study)
        assert outcomes(study) == ["lost", "complete"]

    def test_between_release_and_requeue(self, study: Study) -> None:
        claimed = claim(study)  # alive, but it has given up
        study.store.release(study.id, 0, claimed.attempt, "lost")
        study.recover()
        assert states(study) == ["waiting"]
        self.finish(study)

    @pytest.mark.parametrize("n_crashes", [0, MAX_BARREN_CRASHES - 1])
    def test_a_last_word_that_arrives_while_the_trial_is_taken_for_lost(
        self, study: Study, monkeypatch: pytest.MonkeyPatch, n_crashes: int
    ) -> None:
        """A server ends what a killed client had begun; a lock goes down with the server, its client does not."""
        for _ in range(n_crashes):
            claim(study, new_worker(study, dead()))
            study.recover(crashed=True)
        claimed = claim(study, new_worker(study, dead()))
        if not n_crashes:
            measure(study, claimed, 0, 0.5)
        held = study.store.held_runs

        def late(*arguments: Any) -> Any:
            fates = held(*arguments)
            study.search.end(claimed.trial, "complete", 0.5, -0.1)
            return fates

        monkeypatch.setattr(study.store, "held_runs", late)
        study.recover(crashed=True)
        monkeypatch.undo()
        study.recover()
        run = study.store.runs(study.id)[0]
        assert (states(study), run.failure, run.best_step) == (["complete"], None, None if n_crashes else 0)
        assert run.ended_at is not None
        assert study.is_over()

    def test_a_living_worker_is_left_alone(self, study: Study) -> None:
        claim(study)
        study.recover(judge_others=True, grace_s=-1.0, crashed=True)
        assert states(study) == ["running"]
        assert outcomes(study) == [None]


def test_statements_on_optunas_tables_are_optunas_alone(sqlite: Database) -> None:
    """Ours never write there: the tables of a study are touched through Optuna's storage only."""
    study = make_study(sqlite, make_spec(n_trials=1))
    worker = new_worker(study)
    mixed = []

    def seen(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        ours = "tuner_" in statement
        theirs = any(f" {name}" in statement for name in ("trials", "studies", "trial_params"))
        mixed.append(ours and theirs)

    sa.event.listen(sqlite.engine, "before_cursor_execute", seen)
    work_off(study, claim(study, worker))
    study.recover()
    sa.event.remove(sqlite.engine, "before_cursor_execute", seen)
    assert len(mixed) > 20
    assert not any(mixed)
    assert VIOLATION in study.store.measurements(study.id, [0])[0][0].metrics
