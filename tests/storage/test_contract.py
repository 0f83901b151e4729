"""What every database must do for us: the same tests on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time

import pytest
import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.leases import ProcessIdentity
from storage.runs import Fenced, MeasurementRow, Store
from storage.tables import SCHEMA_VERSION, check_schema, create_schema, has_schema, schema, workers
from tests.race import counted, race
from tests.storage.values import elsewhere, gone, me, measured


class TestStudies:
    def test_an_existing_study_is_returned_as_it_is(self, store: Store) -> None:
        first = store.create_study("s", "spec", "data", "0.1", 10)
        assert store.create_study("s", "other", "other", "0.2", 99) == first
        assert store.find_study("s") == first == store.get_study(first.id)
        assert [row.name for row in store.studies()] == ["s"]

    def test_totals_are_raised_and_never_lowered(self, store: Store, study: int) -> None:
        for n_trials, n_replacements, expected in [(20, 0, 20), (5, 2, 22), (20, 1, 22), (21, 2, 23)]:
            store.start_study(study, n_trials, n_replacements)
            assert store.get_study(study).total == expected

    def test_the_start_is_told_by_the_databases_clock(self, store: Store, study: int) -> None:
        before = store.get_study(study).started_at
        time.sleep(0.02)
        store.start_study(study, 10, 0)
        assert before < store.get_study(study).started_at == pytest.approx(time.time(), abs=5)

    def test_what_may_change_is_taken_over(self, store: Store, study: int) -> None:
        store.update_study(study, '{"new": 1}', "0.2", '{"told": "anew"}')
        row = store.get_study(study)
        assert (row.spec, row.package_version, row.n_trials) == ('{"new": 1}', "0.2", 10)
        assert row.data == '{"told": "anew"}'

    def test_a_deleted_study_takes_everything_along(self, store: Store, study: int, database: Database) -> None:
        worker = store.register_worker(study, me(), "cpu")
        store.claim(study, 0, "a", worker)
        store.record(study, 0, 1, measured(0, 1))
        other = store.create_study("other", "{}", "{}", "0.1", 1).id
        store.claim(other, 0, "a", store.register_worker(other, me(), "cpu"))
        store.delete_study(study)
        assert [row.name for row in store.studies()] == ["other"]
        with pytest.raises(StorageError, match="is gone"):
            store.get_study(study)
        with database.transaction() as connection:
            rows = {
                name: connection.scalar(sa.text(f"select count(*) from tuner_{name}"))
                for name in ("runs", "attempts", "measurements", "workers")
            }
        assert rows == {"runs": 1, "attempts": 1, "measurements": 0, "workers": 1}
        with pytest.raises(Fenced):
            store.record(study, 0, 1, measured(2))


class TestClaims:
    def test_each_claim_raises_the_attempt(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        assert [store.claim(study, 7, "a", worker) for _ in range(3)] == [1, 2, 3]
        assert store.claim(study, 8, "b", worker) == 1
        assert [(run.number, run.arm, run.attempt) for run in store.runs(study)] == [(7, "a", 3), (8, "b", 1)]

    def test_an_attempt_that_was_never_released_ends_with_the_next(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        store.claim(study, 0, "a", worker)
        store.claim(study, 1, "a", worker)
        store.claim(study, 0, "a", worker)
        assert [(a.number, a.attempt, a.outcome) for a in store.attempts(study)] == [
            (0, 1, "lost"), (0, 2, None), (1, 1, None),
        ]  # fmt: skip
        assert [a.released_at is None for a in store.attempts(study)] == [False, True, True]

    @pytest.mark.parametrize("write", ["record", "set_config"])
    def test_only_the_current_attempt_writes(self, store: Store, study: int, write: str) -> None:
        def written(attempt: int) -> None:
            if write == "record":
                store.record(study, 0, attempt, measured(attempt))
            else:
                store.set_config(study, 0, attempt, {"attempt": attempt})

        worker = store.register_worker(study, me(), "cpu")
        with pytest.raises(Fenced, match="no such run"):
            written(1)
        store.claim(study, 0, "a", worker)
        written(1)
        store.claim(study, 0, "a", worker)
        with pytest.raises(Fenced, match="expected attempt 1 to be the current one, got attempt 2"):
            written(1)
        written(2)
        store.release(study, 0, 2, "lost")  # put back in the queue: nobody's
        with pytest.raises(Fenced, match="given up"):
            written(2)
        store.claim(study, 0, "a", worker)
        store.end_run(study, 0, 3, "complete")
        with pytest.raises(Fenced, match="ended"):
            written(3)
        assert [row.step for row in store.measurements(study, [0])[0]] == ([1, 2] if write == "record" else [])
        assert store.runs(study)[0].config == (None if write == "record" else {"attempt": 2})

    def test_current_is_who_holds_or_has_ended_the_run(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        assert not store.is_current(study, 0, 1)
        store.claim(study, 0, "a", worker)
        assert store.is_current(study, 0, 1)
        store.release(study, 0, 1, "stopped")
        assert not store.is_current(study, 0, 1)
        store.claim(study, 0, "a", worker)
        assert store.is_current(study, 0, 2)
        store.end_run(study, 0, 2, "pruned")
        assert store.is_current(study, 0, 2)
        assert not store.is_current(study, 0, 1)

    def test_ending_is_idempotent(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        store.claim(study, 0, "a", worker)
        store.end_run(study, 0, 1, "failed", "because", None)
        ended = store.runs(study), store.attempts(study)
        store.end_run(study, 0, 1, "complete", None, 4)
        assert (store.runs(study), store.attempts(study)) == ended
        assert ended[0][0].failure == "because"
        assert ended[1][0].outcome == "failed"
        assert store.runs(study, open_only=True) == []

    def test_the_newest_ends_are_told_first(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        for number, failure in enumerate([None, "one", "two"]):
            store.claim(study, number, "a", worker)
            store.end_run(study, number, 1, "failed" if failure else "complete", failure)
            time.sleep(0.005)
        store.claim(study, 3, "a", worker)
        assert store.newest_ended(study, 0.0, 2) == [(2, "two"), (1, "one")]
        assert store.newest_ended(study, 0.0, 9) == [(2, "two"), (1, "one"), (0, None)]
        assert store.newest_ended(study, time.time() + 60, 9) == []


class TestMeasurements:
    def test_recording_twice_changes_nothing(self, store: Store, study: int) -> None:
        store.claim(study, 0, "a", store.register_worker(study, me(), "cpu"))
        store.record(study, 0, 1, measured(0, 1, n_metrics=3))
        first = store.measurements(study, [0])
        changed = [MeasurementRow(1, {"m0": 99.0}, 99.0)]
        store.record(study, 0, 1, changed + measured(2))
        after = store.measurements(study, [0])[0]
        assert after[:2] == first[0]
        assert [row.step for row in after] == [0, 1, 2]
        assert after[0].metrics == {"m0": 0.0, "m1": 1 / 7, "m2": 2 / 7}  # to the last bit
        assert store.count_measurements(study) == 3

    @pytest.mark.parametrize("n_metrics", [1, 60])
    @pytest.mark.parametrize("n_steps", [1, 5])
    def test_one_transaction_whatever_the_number_of_metrics(
        self, store: Store, study: int, n_metrics: int, n_steps: int
    ) -> None:
        store.claim(study, 0, "a", store.register_worker(study, me(), "cpu"))
        with counted(store.database.engine) as counter:
            store.record(study, 0, 1, measured(*range(n_steps), n_metrics=n_metrics))
        assert counter.transactions == 1
        assert len(store.measurements(study, [0])[0][0].metrics) == n_metrics

    def test_the_run_names_the_attempt_that_holds_its_newest_checkpoint(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        store.claim(study, 0, "a", worker)
        store.record(study, 0, 1, measured(0))
        store.claim(study, 0, "a", worker)
        # Steps that the first attempt had measured, but not stored before it died.
        store.record(study, 0, 2, measured(1, 2, attempt=1))
        run = store.runs(study)[0]
        assert (run.checkpoint_attempt, run.checkpoint_step) == (1, 2)
        store.record(study, 0, 2, measured(3))
        run = store.runs(study)[0]
        assert (run.checkpoint_attempt, run.checkpoint_step) == (2, 3)
        store.record(study, 0, 2, [])
        assert store.runs(study)[0] == run

    def test_recording_counts_the_ended_runs(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        for number in range(3):
            store.claim(study, number, "a", worker)
        assert store.record(study, 0, 1, measured(0)).n_ended == 0
        store.end_run(study, 1, 1, "complete")
        assert store.record(study, 0, 1, []).n_ended == 1
        store.end_run(study, 2, 1, "failed", "because")
        assert store.record(study, 0, 1, measured(1)).n_ended == 2

    def test_the_best_measurement_is_that_of_the_best_step(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        for number, best in enumerate([1, 0, None]):
            store.claim(study, number, "a", worker)
            store.record(study, number, 1, measured(0, 1, 2))
            if best is not None:
                store.end_run(study, number, 1, "complete", best_step=best)
        assert {number: row.step for number, row in store.best_measurements(study).items()} == {0: 1, 1: 0}

    def test_what_is_no_number_is_refused_whole(self, store: Store, study: int) -> None:
        store.claim(study, 0, "a", store.register_worker(study, me(), "cpu"))
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.record(study, 0, 1, [*measured(0), MeasurementRow(1, {"m": float("nan")}, 1.0)])
        assert store.count_measurements(study) == 0

    def test_crashes_count_until_something_new_is_measured(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")

        def attempt(outcome: str, *steps: int, of: int = 0) -> int:
            number = store.claim(study, 0, "a", worker)
            store.record(study, 0, number, measured(*steps, attempt=of))
            store.release(study, 0, number, outcome)
            return store.barren_crashes(study, 0)

        assert attempt("crashed") == 1
        assert attempt("crashed") == 2
        assert attempt("lost") == 2  # a lost machine says nothing
        assert attempt("crashed", 0) == 0
        assert attempt("crashed", 0, of=4) == 1  # nothing new: the fourth attempt had measured it
        assert attempt("stopped") == 1
        assert attempt("crashed") == 2
        assert attempt("crashed", 1) == 0


class TestLeases:
    def held(self, store: Store, study: int, owner: ProcessIdentity, **judge: object) -> str | None:
        worker = store.register_worker(study, owner, "cpu")
        store.claim(study, 0, "a", worker)
        return store.held_runs(study, **{"judge_others": True, **judge}).get(0)  # type: ignore[arg-type]

    def test_a_living_process_of_this_host_holds_its_run_however_old_its_lease(
        self, store: Store, study: int
    ) -> None:
        assert self.held(store, study, me(), grace_s=-1.0) == "alive"

    def test_a_dead_pid_is_seen_at_once(self, store: Store, study: int) -> None:
        assert self.held(store, study, gone(), judge_others=False) == "died"

    def test_a_reused_pid_is_another_process(self, store: Store, study: int) -> None:
        assert self.held(store, study, dataclasses.replace(me(), process_start=1)) == "died"

    def test_another_host_is_judged_by_the_age_of_its_lease(self, store: Store, study: int) -> None:
        assert self.held(store, study, elsewhere(), grace_s=60.0) == "alive"
        assert store.held_runs(study, True, grace_s=-1.0) == {0: "expired"}

    def test_who_may_not_judge_leaves_other_hosts_alone(self, store: Store, study: int) -> None:
        assert self.held(store, study, elsewhere(), judge_others=False, grace_s=-1.0) == "alive"

    def test_a_pid_means_nothing_on_another_host(self, store: Store, study: int) -> None:
        far = dataclasses.replace(gone(), boot="another boot")
        assert self.held(store, study, far, grace_s=60.0) == "alive"

    def test_the_age_is_told_by_the_databases_clock(
        self, store: Store, study: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = store.register_worker(study, elsewhere(), "cpu")
        store.claim(study, 0, "a", worker)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert store.held_runs(study, True, grace_s=60.0) == {0: "alive"}
        with store.database.transaction() as connection:
            connection.execute(workers.update().values(renewed_at=workers.c.renewed_at - 100))
        assert store.workers(study)[0].age_s == pytest.approx(100, abs=5)
        assert store.held_runs(study, True, grace_s=60.0) == {0: "expired"}
        store.renew(worker)
        assert store.workers(study)[0].age_s == pytest.approx(0, abs=5)
        assert store.held_runs(study, True, grace_s=60.0) == {0: "alive"}

    def test_released_ended_and_signed_off_hold_nothing(self, store: Store, study: int) -> None:
        worker = store.register_worker(study, me(), "cpu")
        for number in range(4):
            store.claim(study, number, "a", worker)
        store.release(study, 0, 1, "stopped")
        store.end_run(study, 1, 1, "complete")
        assert store.held_runs(study, False) == {2: "alive", 3: "alive"}
        store.end_worker(worker)
        assert store.held_runs(study, False) == {}

    def test_who_asks_for_a_run_holds_none(self, store: Store, study: int) -> None:
        asking, other = (store.register_worker(study, me(), "cpu") for _ in range(2))
        store.claim(study, 0, "a", asking)
        store.claim(study, 1, "a", other)
        assert store.held_runs(study, False, claimant=asking) == {0: "expired", 1: "alive"}

    def test_but_for_those_that_it_knows_to_have_in_hand(self, store: Store, study: int) -> None:
        asking = store.register_worker(study, elsewhere(), "cpu")  # it lives, whatever the age of its lease
        for number in range(3):
            store.claim(study, number, "a", asking)
        fates = store.held_runs(study, True, grace_s=-1.0, claimant=asking, in_hand=[0, 2])
        assert fates == {0: "alive", 1: "expired", 2: "alive"}

    def test_only_the_current_attempt_holds(self, store: Store, study: int) -> None:
        store.claim(study, 0, "a", store.register_worker(study, me(), "cpu"))
        store.claim(study, 0, "a", store.register_worker(study, gone(), "cpu"))
        assert store.held_runs(study, False) == {0: "died"}

    def test_another_study_is_not_asked(self, store: Store, study: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 1).id
        store.claim(other, 0, "a", store.register_worker(other, me(), "cpu"))
        assert store.held_runs(study, True) == {}


class TestSchema:
    def test_six_processes_make_it_at_once(self, storage_url: str) -> None:
        assert race(6, make_all_tables, storage_url) == [True] * 6

    def test_it_is_made_once(self, database: Database) -> None:
        create_schema(database)
        with database.transaction() as connection:
            assert connection.execute(sa.select(schema.c.version)).scalars().all() == [SCHEMA_VERSION]

    def test_another_version_is_refused(self, database: Database) -> None:
        with database.transaction() as connection:
            connection.execute(schema.update().values(version=SCHEMA_VERSION + 1))
        for check in (check_schema, create_schema):
            with pytest.raises(StorageError, match=rf"expected tuner schema {SCHEMA_VERSION}, got") as caught:
                check(database)
            assert "\n" not in str(caught.value)

    def test_an_empty_database_has_none(self, storage_url: str) -> None:
        database = Database(storage_url)
        assert not has_schema(database)
        database.close()
        if database.is_sqlite:
            assert not database.path.exists()  # looking makes nothing

    def test_what_was_not_committed_is_not_there(self, store: Store, database: Database) -> None:
        def broken() -> None:
            with database.transaction() as connection:
                connection.execute(schema.update().values(version=99))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken()
        check_schema(database)


def make_all_tables(_index: int, url: str) -> bool:
    from tuner.optuna_study import create_optuna_schema

    database = Database(url)
    try:
        create_schema(database)
        create_optuna_schema(database)
        return has_schema(database)
    finally:
        database.close()


class TestExclusive:
    def test_one_holder_at_a_time(self, database: Database, storage_url: str) -> None:
        spans = sorted(race(4, hold, storage_url))
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))

    def test_it_can_be_entered_again(self, database: Database) -> None:
        with database.exclusive("x"), database.exclusive("x"):
            pass
        with database.exclusive("x"):
            pass

    def test_others_write_while_it_is_held(self, store: Store, study: int) -> None:
        with store.database.exclusive("x"):
            store.start_study(study, 11, 0)
            store.database.check_exclusive()
        assert store.get_study(study).n_trials == 11

    def test_it_ends_with_its_process(self, database: Database, storage_url: str) -> None:
        race(1, die_holding, storage_url)
        started = time.monotonic()
        with database.exclusive("x"):
            assert time.monotonic() - started < 5.0


def hold(_index: int, url: str) -> tuple[float, float]:
    database = Database(url)
    with database.exclusive("x"):
        start = time.monotonic()
        time.sleep(0.05)
        span = start, time.monotonic()
    database.close()
    return span


def die_holding(_index: int, url: str) -> None:
    """A child of the process takes the lock and is killed with it."""
    child = os.fork()
    if child == 0:
        Database(url).exclusive("x").__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
