"""What the service asks of a database, on SQLite and on PostgreSQL: the queue, stops, uploads, progress."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.runs import Fenced, Holding, MeasurementRow, Recorded, Store
from storage.tables import attempts, notifications, runs, studies, workers
from tests.race import counted, race
from tests.storage.values import elsewhere, gone, me, measured


@pytest.fixture
def worker(store: Store, study: int) -> int:
    return store.register_worker(study, me(), "cpu")


def set_back(store: Store, column: sa.Column[float], by_s: float) -> None:
    """Make a time `by_s` older, in every row."""
    with store.database.transaction() as connection:
        connection.execute(column.table.update().values({column.name: column - by_s}))


def ended(store: Store, study: int, worker: int, number: int, outcome: str = "complete") -> None:
    store.claim(study, number, "a", worker)
    store.end_run(study, number, 1, outcome, "because" if outcome == "failed" else None)


class TestQueue:
    def queued(self, store: Store) -> list[str]:
        return [row.name for row in store.queued_studies()]

    def test_a_new_study_is_not_in_it(self, store: Store, study: int) -> None:
        row = store.get_study(study)
        assert (row.queued_at, row.stop) == (None, None)
        assert self.queued(store) == []

    def test_oldest_first(self, store: Store) -> None:
        for name in ("one", "two", "three"):
            store.create_study(name, "{}", "{}", "0.1", 10)
        for name in ("two", "three", "one"):
            store.queue_study(store.find_study(name).id)  # type: ignore[union-attr]
            time.sleep(0.005)
        assert self.queued(store) == ["two", "three", "one"]
        store.queue_study(store.find_study("two").id)  # type: ignore[union-attr]
        assert self.queued(store) == ["two", "three", "one"]  # it keeps its place

    def test_the_time_is_told_by_the_databases_clock(self, store: Store, study: int) -> None:
        store.queue_study(study)
        assert store.get_study(study).queued_at == pytest.approx(time.time(), abs=5)

    @pytest.mark.parametrize("mode", ["drain", "now"])
    def test_a_stop_takes_a_study_out_until_it_is_queued_again(self, store: Store, study: int, mode: Any) -> None:
        store.queue_study(study)
        store.stop_study(study, mode)
        assert self.queued(store) == []
        row = store.get_study(study)
        assert (row.queued_at, row.stop) == (None, mode)
        store.queue_study(study)
        assert self.queued(store) == ["s"]
        assert store.get_study(study).stop is None

    def test_a_run_lifts_a_stop_and_does_not_queue(self, store: Store, study: int) -> None:
        store.stop_study(study, "now")
        store.start_study(study, 10, 0)
        row = store.get_study(study)
        assert (row.queued_at, row.stop) == (None, None)

    def test_it_holds_what_has_not_reached_its_total(self, store: Store, worker: int) -> None:
        short = store.create_study("short", "{}", "{}", "0.1", 2).id
        store.queue_study(short)
        ended(store, short, worker, 0)
        store.claim(short, 1, "a", worker)
        assert self.queued(store) == ["short"]
        store.end_run(short, 1, 1, "failed", "because")
        assert self.queued(store) == []
        store.start_study(short, 2, 1)  # one more, for the failed one
        assert self.queued(store) == ["short"]

    def test_a_worker_is_told_of_a_stop_when_it_records(self, store: Store, study: int, worker: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        store.stop_study(other, "now")
        store.claim(study, 0, "a", worker)
        ended(store, study, worker, 1)
        assert store.record(study, 0, 1, measured(0)) == Recorded(1, None)
        store.stop_study(study, "drain")
        assert store.record(study, 0, 1, measured(1)) == Recorded(1, "drain")
        store.stop_study(study, "now")
        assert store.record(study, 0, 1, []) == Recorded(1, "now")


class TestWorkers:
    def ids(self, store: Store, study: int | None = None) -> list[int]:
        return [row.id for row in store.workers(study)]

    def test_one_of_the_service_belongs_to_the_studies_it_took_a_trial_of(self, store: Store, study: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        serving = store.register_worker(None, me(), "cuda:1")
        own = store.register_worker(study, me(), "cpu")
        assert (self.ids(store, study), self.ids(store, other)) == ([own], [])
        store.claim(other, 0, "a", serving)
        assert (self.ids(store, study), self.ids(store, other)) == ([own], [serving])
        assert [(row.id, row.study_id, row.device) for row in store.workers()] == [
            (serving, None, "cuda:1"), (own, study, "cpu"),
        ]  # fmt: skip

    def test_it_outlives_the_studies_it_served(self, store: Store, study: int) -> None:
        serving = store.register_worker(None, me(), "cpu")
        store.claim(study, 0, "a", serving)
        store.delete_study(study)
        assert self.ids(store) == [serving]

    def test_all_are_those_heard_of_lately(self, store: Store, study: int) -> None:
        long_ended = store.register_worker(study, me(), "cpu")
        store.end_worker(long_ended)
        set_back(store, workers.c.ended_at, 3700.0)
        silent = store.register_worker(None, elsewhere(), "cpu")
        set_back(store, workers.c.renewed_at, 90_000.0)
        late = store.register_worker(None, elsewhere(), "cpu")
        with store.database.transaction() as connection:
            late_by = {"renewed_at": workers.c.renewed_at - 80_000.0}
            connection.execute(workers.update().where(workers.c.id == late).values(late_by))
        just_ended = store.register_worker(study, me(), "cpu")
        store.end_worker(just_ended)
        living = store.register_worker(study, me(), "cpu")
        assert self.ids(store) == [late, just_ended, living]
        assert self.ids(store, study) == [long_ended, just_ended, living]
        assert silent not in self.ids(store)

    def test_what_each_has_in_hand(self, store: Store, study: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        idle, first, second, dead = (store.register_worker(None, who, "cpu") for who in (me(), me(), me(), gone()))
        ended(store, study, idle, 0)
        store.claim(study, 1, "a", idle)
        store.release(study, 1, 1, "stopped")
        store.claim(study, 1, "b", first)
        store.claim(other, 0, "c", second)
        store.record(other, 0, 1, measured(0, 1))
        store.claim(study, 2, "a", dead)
        with counted(store.database.engine) as counter:
            found = store.holdings()
        assert counter.transactions == 1
        now = pytest.approx(time.time(), abs=5)
        assert found == {
            first: [Holding("s", 1, 2, "a", None, now, None)],
            second: [Holding("other", 0, 1, "c", 1, now, now)],
            dead: [Holding("s", 2, 1, "a", None, now, None)],
        }

    def test_a_worker_may_have_several_in_hand(self, store: Store, study: int, worker: int) -> None:
        for number in (3, 2):
            store.claim(study, number, "a", worker)
        assert [held.number for held in store.holdings()[worker]] == [2, 3]


class TestMeasuredAgain:
    """An attempt that goes on below what older ones had measured."""

    @pytest.fixture
    def resumed(self, store: Store, study: int, worker: int) -> int:
        """Trial 0: attempt 1 measured steps 0 to 4 and uploaded 3; attempt 2 is at work."""
        store.claim(study, 0, "a", worker)
        store.record(study, 0, 1, measured(0, 1, 2, 3, 4), {"step": 3, "pr": {}})
        store.name_upload(study, 0, 1, 3)
        store.release(study, 0, 1, "lost")
        return store.claim(study, 0, "a", worker)

    def steps(self, store: Store, study: int) -> list[tuple[int, int]]:
        return [(row.step, row.attempt) for row in store.measurements(study, [0])[0]]

    def named(self, store: Store, study: int) -> tuple[int | None, ...]:
        run = store.get_run(study, 0)
        return run.checkpoint_attempt, run.checkpoint_step, run.uploaded_attempt, run.uploaded_step

    def test_a_step_of_an_older_attempt_is_replaced(self, store: Store, study: int, resumed: int) -> None:
        store.record(study, 0, resumed, [MeasurementRow(3, {"m0": 9.0}, 9.0)])
        assert self.steps(store, study) == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 1)]
        row = store.measurements(study, [0])[0][3]
        assert (row.metrics, row.elapsed_s) == ({"m0": 9.0}, 9.0)
        # Late news of the older attempt change nothing.
        store.record(study, 0, resumed, measured(3, attempt=1))
        assert store.measurements(study, [0])[0][3] == row

    def test_what_lies_beyond_is_taken_back(self, store: Store, study: int, resumed: int) -> None:
        assert store.supersede(study, 0, resumed, 2) == [3, 4]
        assert self.steps(store, study) == [(0, 1), (1, 1), (2, 1)]
        assert self.named(store, study) == (1, 2, 1, 2)
        assert store.curves(study, 0) is None
        store.record(study, 0, resumed, measured(3))
        assert self.steps(store, study)[-1] == (3, 2)
        assert self.named(store, study) == (2, 3, 1, 2)

    def test_what_lies_before_stays(self, store: Store, study: int, resumed: int) -> None:
        assert store.supersede(study, 0, resumed, 3) == [4]
        assert self.named(store, study) == (1, 3, 1, 3)
        assert store.curves(study, 0) == {"step": 3, "pr": {}}
        assert store.supersede(study, 0, resumed, 3) == []

    def test_all_of_it(self, store: Store, study: int, resumed: int) -> None:
        assert store.supersede(study, 0, resumed, -1) == [0, 1, 2, 3, 4]
        assert self.steps(store, study) == []
        assert self.named(store, study) == (None, None, None, None)

    def test_an_attempts_own_steps_and_uploads_stay(self, store: Store, study: int, resumed: int) -> None:
        store.record(study, 0, resumed, measured(3, 5))
        store.name_upload(study, 0, resumed, 5)
        assert store.supersede(study, 0, resumed, 2) == [4]
        assert self.steps(store, study) == [(0, 1), (1, 1), (2, 1), (3, 2), (5, 2)]
        assert self.named(store, study) == (2, 5, 2, 5)

    def test_an_upload_is_named_once_its_step_is_measured(self, store: Store, study: int, worker: int) -> None:
        """Measurements wait in a file while the database is away; a machine that is lost then takes them along."""
        attempt = store.claim(study, 0, "a", worker)
        assert not store.name_upload(study, 0, attempt, 0)
        store.record(study, 0, attempt, measured(0, 1))
        assert not store.name_upload(study, 0, attempt, 2)
        assert self.named(store, study) == (1, 1, None, None)
        assert store.name_upload(study, 0, attempt, 1)
        assert self.named(store, study) == (1, 1, 1, 1)

    def test_other_runs_are_not_touched(self, store: Store, study: int, worker: int, resumed: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        for study_id, number in ((study, 1), (other, 0)):
            store.claim(study_id, number, "a", worker)
            store.record(study_id, number, 1, measured(0, 1), {"step": 1})
        store.supersede(study, 0, resumed, -1)
        assert len(store.measurements(study, [1])[1]) == len(store.measurements(other, [0])[0]) == 2
        assert store.curves(study, 1) == store.curves(other, 0) == {"step": 1}
        assert store.count_measurements() == 4

    def test_one_transaction(self, store: Store, study: int, resumed: int) -> None:
        with counted(store.database.engine) as counter:
            store.supersede(study, 0, resumed, 1)
        assert counter.transactions == 1

    def test_only_the_current_attempt_may(self, store: Store, study: int, resumed: int) -> None:
        with pytest.raises(Fenced):
            store.supersede(study, 0, 1, -1)
        with pytest.raises(Fenced):
            store.name_upload(study, 0, 1, 4)
        assert len(self.steps(store, study)) == 5
        assert self.named(store, study) == (1, 4, 1, 3)


class TestCurves:
    def test_the_newest_stay(self, store: Store, study: int, worker: int) -> None:
        store.claim(study, 0, "a", worker)
        assert store.curves(study, 0) is None
        store.record(study, 0, 1, measured(0), {"step": 0, "pr": {"recall": [0.0, 1.0]}})
        store.record(study, 0, 1, measured(1))
        assert store.curves(study, 0) == {"step": 0, "pr": {"recall": [0.0, 1.0]}}
        store.record(study, 0, 1, measured(2), {"step": 2})
        assert store.curves(study, 0) == {"step": 2}

    def test_of_a_run_that_is_not_there(self, store: Store, study: int) -> None:
        assert store.curves(study, 7) is None

    def test_what_is_no_number_is_refused_whole(self, store: Store, study: int, worker: int) -> None:
        store.claim(study, 0, "a", worker)
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.record(study, 0, 1, measured(0), {"step": 0, "recall": [float("nan")]})
        assert store.count_measurements(study) == 0


class TestRuns:
    def test_when_it_was_measured_is_told_by_the_databases_clock(
        self, store: Store, study: int, worker: int
    ) -> None:
        store.claim(study, 0, "a", worker)
        assert store.get_run(study, 0).measured_at is None
        store.record(study, 0, 1, [])
        assert store.get_run(study, 0).measured_at is None
        store.record(study, 0, 1, measured(0))
        assert store.get_run(study, 0).measured_at == pytest.approx(time.time(), abs=5)

    def test_one_run(self, store: Store, study: int, worker: int) -> None:
        for number in range(3):
            store.claim(study, number, "a", worker)
        store.set_config(study, 1, 1, {"x": 0.5})
        assert store.get_run(study, 1) == store.runs(study)[1]
        assert store.get_run(study, 1).config == {"x": 0.5}
        with pytest.raises(StorageError, match="trial 7 of study 1 is gone"):
            store.get_run(study, 7)


class TestProgress:
    def test_nothing_yet(self, store: Store, study: int) -> None:
        (progress,) = store.progress()
        assert progress.row == store.get_study(study)
        assert (progress.n_ended, progress.running, progress.waiting, progress.ended_last_hour) == (0, 0, 0, 0)
        assert (progress.first_started_at, progress.last_measured_at, progress.last_ended_at) == (None, None, None)

    def test_every_run_is_counted_once(self, store: Store, study: int, worker: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        for number, outcome in enumerate(["complete", "complete", "complete", "pruned", "pruned", "failed"]):
            ended(store, study, worker, number, outcome)
        for _ in range(3):  # three attempts of one run
            store.claim(study, 6, "a", worker)
        store.record(study, 6, 3, measured(0))
        for number in (7, 8):
            store.claim(study, number, "a", worker)
            store.release(study, number, 1, "stopped")
        signed_off = store.register_worker(study, me(), "cpu")
        store.claim(study, 9, "a", signed_off)
        store.end_worker(signed_off)
        ended(store, other, worker, 0)
        first, second = store.progress()
        assert (first.complete, first.pruned, first.failed, first.running, first.waiting) == (3, 2, 1, 1, 3)
        assert (first.n_ended, first.ended_last_hour) == (6, 6)
        assert (second.row.name, second.complete, second.n_ended) == ("other", 1, 1)
        assert store.progress(other) == [second]

    def test_times(self, store: Store, study: int, worker: int) -> None:
        ended(store, study, worker, 0)
        set_back(store, runs.c.ended_at, 5000.0)
        set_back(store, attempts.c.claimed_at, 9000.0)
        store.claim(study, 1, "a", worker)
        store.record(study, 1, 1, measured(0))
        now = time.time()
        (progress,) = store.progress(study)
        assert progress.first_started_at == pytest.approx(now - 9000, abs=5)
        assert progress.last_measured_at == pytest.approx(now, abs=5)
        assert progress.last_ended_at == pytest.approx(now - 5000, abs=5)
        assert progress.ended_last_hour == 0
        store.claim(study, 0, "a", worker)  # a later attempt does not move the beginning
        assert store.progress(study)[0].first_started_at == progress.first_started_at

    def test_it_is_one_transaction(self, store: Store, study: int, worker: int) -> None:
        ended(store, study, worker, 0)
        with counted(store.database.engine) as counter:
            store.progress()
        assert counter.transactions == 1


class TestNotifications:
    def test_one_caller_of_many_may_tell(self, store: Store, study: int, storage_url: str) -> None:
        assert sorted(race(6, claim_notification, storage_url, study)) == [False] * 5 + [True]

    def test_occasions_are_told_apart(self, store: Store, study: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        occasions = [(study, "finished", "10"), (study, "finished", "20"), (study, "stalled", "10")]
        for occasion in [*occasions, (other, "finished", "10")]:
            assert store.claim_notification(*occasion)
            assert not store.claim_notification(*occasion)

    def test_who_did_not_tell_in_time_is_replaced_by_one(self, store: Store, study: int) -> None:
        assert store.claim_notification(study, "stalled", "k")
        set_back(store, notifications.c.claimed_at, 100.0)
        assert not store.claim_notification(study, "stalled", "k", again_after_s=120.0)
        assert store.claim_notification(study, "stalled", "k", again_after_s=90.0)
        assert not store.claim_notification(study, "stalled", "k", again_after_s=90.0)

    def test_what_was_told_is_not_told_again(self, store: Store, study: int) -> None:
        store.claim_notification(study, "stalled", "k")
        store.claim_notification(study, "stalled", "other")
        store.sent_notification(study, "stalled", "k")
        set_back(store, notifications.c.claimed_at, 1000.0)
        assert not store.claim_notification(study, "stalled", "k")
        assert store.claim_notification(study, "stalled", "other")

    def test_it_goes_with_its_study(self, store: Store, study: int, database: Database) -> None:
        store.claim_notification(study, "finished", "10")
        store.delete_study(study)
        with database.transaction() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(notifications)) == 0
            assert connection.scalar(sa.select(sa.func.count()).select_from(studies)) == 0


def claim_notification(_index: int, url: str, study: int) -> bool:
    database = Database(url)
    try:
        return Store(database).claim_notification(study, "finished", "10")
    finally:
        database.close()
