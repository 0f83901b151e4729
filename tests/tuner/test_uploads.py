"""Uploads in the background: the newest step wins, stores and databases go away and come back, nothing hangs."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.artifacts import ArtifactError, ArtifactUnavailable
from storage.database import DatabaseUnavailable
from storage.runs import Fenced
from tests.tuner.stored_runs import Gate, WatchedStore, files_of, needed_of, write_step
from tuner import logs
from tuner import uploads as module
from tuner.uploads import RunUploads, Uploads

NEVER_S = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return WatchedStore(tmp_path / "store")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(module, "LONGEST_DELAY_S", 0.05)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("uploads ")]


class Named(list[int]):
    """The steps that were named, in order; `before` may refuse."""

    def __init__(self) -> None:
        self.before = lambda _step: None

    def __call__(self, step: int) -> None:
        self.before(step)
        self.append(step)


@pytest.fixture
def named() -> Named:
    return Named()


def opened(store: WatchedStore, run: Path, named: Named, every_s: float = 0.0, attempt: int = 1) -> RunUploads:
    return Uploads(store, "study", every_s).open(3, attempt, run, named)


def offer(up: RunUploads, run: Path, *steps: int) -> None:
    for step in steps:
        write_step(run, 1, step)
        up.offer(step)


def wait_for(condition: object, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.action for record in caplog.records if hasattr(record, "action")]


class TestOffer:
    def test_the_newest_one_goes_up(self, store: WatchedStore, run: Path, named: Named) -> None:
        store.before = gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named) as up:
            offer(up, run, 0)
            assert gate.reached.wait(20)
            offer(up, run, 1, 2, 3, 4)  # none of them waits for the store
            gate.open.set()
            up.finish(20)
            assert not list(run.glob(".uploading-*/*"))
        assert named == [0, 4]
        assert store.snapshots() == ["1/00000", "1/00004"]

    def test_not_more_often_than_told(self, store: WatchedStore, run: Path, named: Named) -> None:
        started = time.monotonic()
        with opened(store, run, named, every_s=0.2) as up:
            for step in range(40):
                offer(up, run, step)
                time.sleep(0.01)
            n_uploads = len(named)
            longest = (time.monotonic() - started) / 0.2
            assert n_uploads <= longest
            wait_for(lambda: named and named[-1] == 39)  # the last one's turn comes without a further offer
        assert n_uploads >= 1

    def test_the_first_one_waits_for_its_turn(self, store: WatchedStore, run: Path, named: Named) -> None:
        with opened(store, run, named, every_s=NEVER_S) as up:
            offer(up, run, 0, 1, 2)
            time.sleep(0.05)
            assert not store.calls
            up.finish(20)
            assert named == [2]

    def test_the_trainer_may_drop_the_step_meanwhile(
        self, store: WatchedStore, run: Path, named: Named, tmp_path: Path
    ) -> None:
        store.before = gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named) as up:
            offer(up, run, 0)
            expected = needed_of(run, 1, 0)
            assert gate.reached.wait(20)
            for step in (1, 2, 3):
                write_step(run, 1, step)
            assert not (run / "attempt-1" / "step-00000").exists()
            assert not (run / "attempt-1" / "best-00000.bin").exists()
            gate.open.set()
            up.finish(20)
        other = tmp_path / "other"
        assert Uploads(store, "study").restore(3, other, (1, 0)) == (1, 0)
        assert files_of(other) == expected
        assert expected["attempt-1/measurements.jsonl"].count("\n") == 1

    def test_a_step_is_named_once_it_is_stored(self, store: WatchedStore, run: Path, named: Named) -> None:
        seen = []
        named.before = lambda step: seen.append((step, store.snapshots()))
        with opened(store, run, named) as up:
            offer(up, run, 0)
            up.finish(20)
        assert seen == [(0, ["1/00000"])]

    def test_a_measurement_without_a_checkpoint_is_the_trainers_fault(
        self, store: WatchedStore, run: Path, named: Named
    ) -> None:
        with opened(store, run, named) as up:
            write_step(run, 1, 0)
            write_step(run, 2, 1)  # a later attempt's
            with pytest.raises(RuntimeError, match="expected the checkpoint of step 1 before its measurement"):
                up.offer(1)

    def test_the_log_names_the_trial(
        self, store: WatchedStore, run: Path, named: Named, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen = []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(logs.EventFormatter().format(record))  # type: ignore[method-assign]
        logging.getLogger("tuner").addHandler(handler)
        try:
            with (
                caplog.at_level(logging.INFO, "tuner"),
                logs.context(study="study", trial=3, attempt=1),
                opened(store, run, named) as up,
            ):
                offer(up, run, 0)
                up.finish(20)
        finally:
            logging.getLogger("tuner").removeHandler(handler)
        (line,) = seen
        assert "action=upload study=study trial=3 attempt=1" in line
        assert "step=0" in line


class TestFinish:
    def test_nothing_was_offered(self, store: WatchedStore, run: Path, named: Named) -> None:
        with opened(store, run, named) as up:
            up.finish(0)
        assert not store.calls

    def test_it_is_there_already(self, store: WatchedStore, run: Path, named: Named) -> None:
        with opened(store, run, named) as up:
            offer(up, run, 0)
            up.finish(20)
            n_calls = len(store.calls)
            up.finish(0)
        assert len(store.calls) == n_calls

    def test_a_slow_store_exhausts_its_patience(self, store: WatchedStore, run: Path, named: Named) -> None:
        store.before = gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named) as up:
            offer(up, run, 0)
            assert gate.reached.wait(20)
            with pytest.raises(
                ArtifactUnavailable, match=r"step 0 of study/trials/00003 is not stored after 0\.05 s"
            ):
                up.finish(0.05)
            gate.open.set()
            up.finish(20)
        assert named == [0]

    def test_two_threads_may_wait(self, store: WatchedStore, run: Path, named: Named) -> None:
        store.before = gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named, every_s=NEVER_S) as up:
            offer(up, run, 0)
            other = threading.Thread(target=up.finish, args=(20,))
            other.start()
            assert gate.reached.wait(20)
            with pytest.raises(ArtifactUnavailable):
                up.finish(0.01)
            offer(up, run, 1)
            gate.open.set()
            other.join()
        assert named == [0, 1]

    def test_after_it_steps_wait_for_their_turn_again(self, store: WatchedStore, run: Path, named: Named) -> None:
        with opened(store, run, named, every_s=NEVER_S) as up:
            offer(up, run, 0)
            up.finish(20)
            offer(up, run, 1)
            time.sleep(0.05)
            assert named == [0]


class TestTrouble:
    def test_a_store_that_comes_back(
        self, store: WatchedStore, run: Path, named: Named, caplog: pytest.LogCaptureFixture
    ) -> None:
        away = iter(range(6))

        def before(_what: str, _key: str) -> None:
            if next(away, None) is not None:
                raise ArtifactUnavailable("artifacts: away")

        store.before = before
        with opened(store, run, named) as up:
            offer(up, run, 0)
            up.finish(20)
        assert named == [0]
        retries = [r for r in caplog.records if getattr(r, "action", "") == "upload_retry"]
        assert len(retries) == 6
        assert all("away" in record.getMessage() for record in retries)

    def test_tries_become_rarer(
        self, store: WatchedStore, run: Path, named: Named, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LONGEST_DELAY_S", 0.08)
        monkeypatch.setattr(module.random, "uniform", lambda _low, high: high)
        times: list[float] = []

        def before(_what: str, _key: str) -> None:
            times.append(time.monotonic())
            if len(times) < 7:
                raise ArtifactUnavailable("away")

        store.before = before
        with opened(store, run, named) as up:
            offer(up, run, 0)
            wait_for(lambda: named)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)][:6]
        for gap, least in zip(gaps, (0.01, 0.02, 0.04, 0.08, 0.08, 0.08), strict=True):
            assert gap >= least

    def test_training_goes_on_while_it_is_away_and_the_newest_goes_up_after(
        self, store: WatchedStore, run: Path, named: Named
    ) -> None:
        is_away = threading.Event()
        is_away.set()

        def before(what: str, _key: str) -> None:
            if is_away.is_set() and what == "put":
                raise ArtifactUnavailable("artifacts: away")

        store.before = before
        with opened(store, run, named) as up:
            offer(up, run, *range(6))
            wait_for(lambda: up._trouble)
            with pytest.raises(ArtifactUnavailable, match="away"):
                up.finish(0.1)
            offer(up, run, 6)
            is_away.clear()
            up.finish(20)
        assert named in ([6], [5, 6])  # step 5 may have been under way
        assert not list(run.glob(".*"))

    def test_what_half_an_upload_left_is_deleted(self, store: WatchedStore, run: Path, named: Named) -> None:
        n_puts = iter(range(100))

        def before(what: str, _key: str) -> None:
            if what == "put" and next(n_puts) == 2:
                raise ArtifactUnavailable("away")

        store.before = before
        gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named) as up:
            offer(up, run, 0)
            offer(up, run, 1)
            up.finish(20)
            store.before = gate
            gate.open.set()
            offer(up, run, 2)
            up.finish(20)
            offer(up, run, 3)
            up.finish(20)
        needed = set()
        for path in store.root.rglob("step-*.json"):
            files = json.loads(json.loads(path.read_text())["content"])["files"]
            needed |= {path.name} | {stamp["sha256"] for stamp in files.values()}
        assert {path.name for path in store.root.rglob("*") if path.is_file()} == needed

    @pytest.mark.parametrize("error", [ArtifactError("artifacts: full"), Fenced("taken over"), KeyError("a bug")])
    def test_what_cannot_be_mended_is_told_at_the_next_call(
        self, store: WatchedStore, run: Path, named: Named, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(_step: int) -> None:
            raise error

        named.before = refuse
        with opened(store, run, named) as up:
            offer(up, run, 0)
            wait_for(lambda: up._error)
            write_step(run, 1, 1)
            for _ in range(2):
                with pytest.raises(type(error), match=str(error)):
                    up.offer(1)
                with pytest.raises(type(error), match=str(error)):
                    up.finish(20)
        assert ("upload_failed" in actions(caplog)) == (not isinstance(error, Fenced))
        assert not list(run.glob(".*"))

    def test_who_waits_is_told_at_once(self, store: WatchedStore, run: Path, named: Named) -> None:
        def refuse(_what: str, _key: str) -> None:
            raise ArtifactError("artifacts: read-only")

        store.before = refuse
        with opened(store, run, named, every_s=NEVER_S) as up:
            offer(up, run, 0)
            with pytest.raises(ArtifactError, match="read-only"):
                up.finish(NEVER_S)

    def test_a_database_that_comes_back(self, store: WatchedStore, run: Path, named: Named) -> None:
        is_away = threading.Event()
        is_away.set()

        def before(_step: int) -> None:
            if is_away.is_set():
                raise DatabaseUnavailable("storage: away")

        named.before = before
        with opened(store, run, named) as up:
            offer(up, run, 0)
            wait_for(lambda: up._trouble)
            with pytest.raises(DatabaseUnavailable, match="away"):
                up.finish(0.1)
            offer(up, run, 1)
            # Uploads go on; none of them takes from the database what it knows.
            wait_for(lambda: store.snapshots() == ["1/00000", "1/00001"])
            is_away.clear()
            up.finish(20)
        assert named == [1]

    def test_a_step_is_named_while_the_store_is_away(self, store: WatchedStore, run: Path, named: Named) -> None:
        is_away = threading.Event()

        def refuse_database(_step: int) -> None:
            if not is_away.is_set():
                raise DatabaseUnavailable("storage: away")

        def refuse_store(what: str, _key: str) -> None:
            if is_away.is_set() and what == "put":
                raise ArtifactUnavailable("artifacts: away")

        named.before, store.before = refuse_database, refuse_store
        with opened(store, run, named) as up:
            offer(up, run, 0)
            wait_for(lambda: store.snapshots())
            is_away.set()
            offer(up, run, 1)
            wait_for(lambda: named == [0])


class TestLeaving:
    def test_nothing_is_left(self, store: WatchedStore, run: Path, named: Named) -> None:
        with opened(store, run, named, every_s=NEVER_S) as up:
            offer(up, run, 0, 1)
            assert list(run.glob(".uploading-*"))
        assert not list(run.glob(".*"))
        assert not store.calls

    def test_it_does_not_wait_for_a_store_that_hangs(
        self, store: WatchedStore, run: Path, named: Named, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CLOSE_S", 0.05)
        store.before = gate = Gate(lambda what, _key: what == "put")
        with opened(store, run, named) as up:
            offer(up, run, 0)
            assert gate.reached.wait(20)
        assert up._thread is not None
        assert up._thread.daemon
        assert up._thread.is_alive()
        gate.open.set()
        up._thread.join(20)
        assert not list(run.glob(".*"))

    def test_what_a_killed_attempt_staged_goes_with_the_next(
        self, store: WatchedStore, run: Path, named: Named
    ) -> None:
        write_step(run, 1, 0)
        (run / ".uploading-1-abc").mkdir()
        (run / ".uploading-2-abc").mkdir()
        with opened(store, run, named, attempt=2):
            assert not (run / ".uploading-1-abc").exists()
            assert (run / ".uploading-2-abc").exists()
