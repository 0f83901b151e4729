"""A worker process: which studies it serves, where it finds their data, how it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.trainer import SEARCH_ROLES, DataSpec, DiskError, InputError
from storage.database import Database, DatabaseUnavailable
from storage.leases import ProcessIdentity
from storage.runs import Store
from tests.searches import elsewhere, make_spec
from tests.toy import ToyDataset, ToyTrainer
from tests.tuner.toy_study import ROOT
from tuner import worker_process
from tuner.optuna_study import Search, delete_study
from tuner.study import Study
from tuner.worker import DeviceFault, WorkerOptions
from tuner.worker_process import Server, load_data, own_folder, serve

TOY = {"data_hash": f"{'toy':0<16}", "source": "toy data 'toy'", "simulated": False, "files": {}}


@pytest.fixture
def database(sqlite_with_tables_url: str) -> Iterator[Database]:
    database = Database(sqlite_with_tables_url)
    yield database
    database.close()


def queue(database: Database, name: str, n_trials: int = 2, data: Any = None, **changes: Any) -> Study:
    spec = make_spec(study=name, n_trials=n_trials, **changes)
    search = Search(database, spec, name, create=True)
    store = Store(database)
    row = store.create_study(name, spec.to_json(), json.dumps(data or TOY), "0.1.0", n_trials)
    store.queue_study(row.id)
    return Study(database, row, spec, search)


def options(tmp_path: Path, **changes: Any) -> WorkerOptions:
    return WorkerOptions(
        **{
            "device": "cpu",
            "runs": str(tmp_path / "runs"),
            "cache": str(tmp_path / "cache"),
            "stay": True,
            **changes,
        }
    )


def stopped_at_step_1(study: Study, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any trial that measures its step 1 stops the study."""
    fit = ToyTrainer.fit

    def stopping(self: ToyTrainer, config: Any, data: Any, run: Any) -> Any:
        for measurement in fit(self, config, data, run):
            if measurement.step == 1:
                study.store.stop_study(study.id, mode)
            yield measurement

    monkeypatch.setattr(ToyTrainer, "fit", stopping)


class Service:
    """A worker process's work in this process, stopped when `until` says so."""

    def __init__(self, database: Database, options: WorkerOptions) -> None:
        self.stop = threading.Event()
        self.url = database.url.render_as_string(hide_password=False)
        self.options = options

    def run(self, until: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        """Serve until `until()` is true at a moment when nothing was found to do."""

        def wait(_seconds: float) -> bool:
            if until():
                self.stop.set()
            return self.stop.is_set()

        quick = threading.Event()
        monkeypatch.setattr(quick, "wait", lambda timeout=None: wait(timeout) if timeout else None)
        monkeypatch.setattr(quick, "is_set", self.stop.is_set)
        monkeypatch.setattr(worker_process, "_leave_in_time", lambda *_: None)
        return serve(self.options, self.url, quick)


def states(study: Study) -> Counter[str]:
    return Counter(trial.state for trial in study.search.trials())


class TestQueue:
    def test_every_queued_study_is_served_the_oldest_first(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        studies = [queue(database, name) for name in ("old", "new")]
        spent = Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert [states(study) for study in studies] == [{"complete": 2}] * 2
        ended = [[run.ended_at for run in study.store.runs(study.id)] for study in studies]
        assert max(ended[0]) < min(ended[1])  # type: ignore[type-var]
        assert spent["serve_s"] > spent["fit_s"] > 0
        (worker,) = Store(database).workers()
        assert worker.ended_at is not None

    def test_only_what_is_named(self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = queue(database, "one"), queue(database, "two")
        Service(database, options(tmp_path, studies=("two",))).run(lambda: True, monkeypatch)
        assert (states(one), states(two)) == ({}, {"complete": 2})

    def test_what_is_submitted_later_is_served_too(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Study] = []

        def until() -> bool:
            if not made:
                made.append(queue(database, "late"))
                return False
            return True

        Service(database, options(tmp_path)).run(until, monkeypatch)
        assert states(made[0]) == {"complete": 2}

    def test_a_stopped_study_is_left_alone(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = queue(database, "toy")
        study.store.stop_study(study.id, "drain")
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(study) == {}

    @pytest.mark.parametrize(("mode", "left"), [("drain", "complete"), ("now", "waiting")])
    def test_a_study_stopped_while_a_trial_runs(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, left: str
    ) -> None:
        study = queue(database, "toy")
        fit = ToyTrainer.fit
        stopped_at_step_1(study, mode, monkeypatch)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(study) == {left: 1}
        n_steps = len(study.store.measurements(study.id, [0])[0])
        assert n_steps == (4 if mode == "drain" else 2)
        monkeypatch.setattr(ToyTrainer, "fit", fit)
        study.store.queue_study(study.id)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(study) == {"complete": 2}

    def test_one_bad_study_stops_no_other(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        refused = queue(database, "refused", data={**TOY, "data_hash": "f" * 16})
        unknown = queue(database, "unknown", trainer="tests.nothing:Trainer")
        failing = queue(database, "failing", 9, config={"x": 0.5, "n_steps": 3, "fault": "raise"}, arms={"one": {}},
                        space={"x": {"low": 0.0, "high": 1.0}})  # fmt: skip
        good = queue(database, "good")
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert (states(refused), states(unknown)) == ({}, {})
        assert states(failing) == {"failed": 3}
        assert states(good) == {"complete": 2}
        assert Store(database).get_study(failing.id).stop == "drain"
        told = {record.action: record.getMessage() for record in caplog.records if hasattr(record, "action")}
        assert "3 trials failed in a row" in told["study_stopped"]
        messages = [r.getMessage() for r in caplog.records if getattr(r, "action", "") == "study_refused"]
        assert any(
            "expected toy data 'toy' (ffffffffffff), got toy data 'toy' (toy000000000)" in m for m in messages
        )
        assert any("cannot be imported" in m for m in messages)

    def test_nor_does_one_whose_data_break_the_trainer_or_of_another_version(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken, newer, good = queue(database, "broken", seed=7), queue(database, "newer"), queue(database, "good")
        newer.store.update_study(newer.id, '{"unheard": 1}', "99.0", json.dumps(TOY))
        broken.store.update_study(
            broken.id, broken.spec.to_json(), "0.1.0", json.dumps({**TOY, "source": "broken"})
        )
        load, calls = ToyTrainer.load, iter([KeyError("column")])

        def breaking(self: ToyTrainer, data: DataSpec, roles: Any) -> ToyDataset:
            if (error := next(calls, None)) is not None:
                raise error
            return load(self, data, roles)

        monkeypatch.setattr(ToyTrainer, "load", breaking)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert [states(study) for study in (broken, newer, good)] == [{}, {}, {"complete": 2}]
        messages = [r.getMessage() for r in caplog.records if getattr(r, "action", "") == "study_refused"]
        assert len(messages) == 2
        assert "expected broken, got KeyError: 'column'" in messages[0]
        assert "got one of 99.0" in messages[1]

    def test_one_whose_deletion_was_cut_short_is_refused(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue(database, "doomed", 1)
        good = queue(database, "good", 1)
        delete_study(database, "doomed")  # of Optuna's tables; ours are next
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(good) == {"complete": 1}
        assert "its deletion was cut short; repeat `tuner delete --study doomed --yes`" in caplog.text

    def test_one_deleted_between_two_trials_is_forgotten(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        doomed, good = queue(database, "doomed", 3), queue(database, "good", 1)
        rows, end = Store(database).queued_studies(), Study.end

        def deleting(self: Study, *given: Any) -> Any:
            outcome = end(self, *given)
            if self.name == "doomed":
                delete_study(database, "doomed")
                doomed.store.delete_study(doomed.id)
            return outcome

        monkeypatch.setattr(Study, "end", deleting)
        monkeypatch.setattr(Store, "queued_studies", lambda self: rows)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(good) == {"complete": 1}
        assert "study_deleted" in [getattr(record, "action", "") for record in caplog.records]

    def test_data_are_loaded_only_where_a_trial_is_left(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The oldest study's last trials are in other hands: a worker must not load its data before each trial."""
        held, other = queue(database, "held", 1), queue(database, "other", 3)
        assert held.claim(held.store.register_worker(None, elsewhere(), "cpu")) is not None
        load, loaded = ToyTrainer.load, []

        def watched(self: ToyTrainer, data: DataSpec, roles: Any) -> ToyDataset:
            loaded.append(data)
            return load(self, data, roles)

        monkeypatch.setattr(ToyTrainer, "load", watched)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert [states(study) for study in (held, other)] == [{"running": 1}, {"complete": 3}]
        assert len(loaded) == 1

    def test_a_deleted_study_is_forgotten(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        doomed, good = queue(database, "doomed", 1), queue(database, "good", 1)
        queued = Store.queued_studies
        rows = queued(Store(database))
        doomed.store.delete_study(doomed.id)
        monkeypatch.setattr(Store, "queued_studies", lambda self: rows)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(good) == {"complete": 1}

    def test_a_changed_specification_is_read_again(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = queue(database, "toy", 9, config={"x": 0.5, "n_steps": 3, "fault": "raise"}, arms={"one": {}},
                      space={"x": {"low": 0.0, "high": 1.0}})  # fmt: skip
        raised: list[int] = []

        def until() -> bool:
            if raised:
                return True
            raised.append(1)
            spec = study.spec.model_copy(update={"max_failures_in_a_row": 5})
            study.store.update_study(study.id, spec.to_json(), "0.1.0", json.dumps(TOY))
            study.store.queue_study(study.id)
            return False

        Service(database, options(tmp_path)).run(until, monkeypatch)
        assert states(study) == {"failed": 5}

    def test_an_outage_longer_than_patience_ends_the_worker(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(_self: Store) -> Any:
            raise DatabaseUnavailable("storage: away")

        monkeypatch.setattr(Store, "queued_studies", away)
        with pytest.raises(DatabaseUnavailable, match="away"):
            Service(database, options(tmp_path, outage_s=0.2)).run(lambda: True, monkeypatch)
        assert Store(database).workers()[0].ended_at is not None


class TestSlots:
    """Several trials at once in the service."""

    def test_a_free_slot_goes_to_the_oldest_study_that_has_work(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = (
            queue(database, "old", 1),
            queue(database, "new", 6, arms={"a": {"n_steps": 2}, "b": {"n_steps": 3}}),
        )
        other = old.store.register_worker(None, elsewhere(), "cpu")
        held = old.claim(other)
        assert held is not None
        fit, order = ToyTrainer.fit, []

        def giving_back(self: ToyTrainer, config: Any, data: Any, run: Any) -> Any:
            which = (run.directory.parents[1].name, int(run.directory.name))
            order.append(which)
            for measurement in fit(self, config, data, run):
                if which == ("new", 1) and measurement.step == 1:
                    old.stop(held)  # now the oldest has work again
                yield measurement

        monkeypatch.setattr(ToyTrainer, "fit", giving_back)
        monkeypatch.setattr("tuner.worker.LOOK_AGAIN_S", 0.0)
        Service(database, options(tmp_path, slots=2)).run(lambda: True, monkeypatch)
        assert (states(old), states(new)) == ({"complete": 1}, {"complete": 6})
        # What was under way was finished, nothing more of it begun.
        assert order == [("new", 0), ("new", 1), ("old", 0), ("new", 2), ("new", 3), ("new", 4), ("new", 5)]

    @pytest.mark.parametrize(("mode", "left"), [("drain", "complete"), ("now", "waiting")])
    def test_of_a_study_that_is_stopped_nothing_more_is_begun(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, left: str
    ) -> None:
        study = queue(database, "toy", 9, pruner={"name": "none"})
        stopped_at_step_1(study, mode, monkeypatch)
        Service(database, options(tmp_path, slots=3)).run(lambda: True, monkeypatch)
        assert states(study) == {left: 3}

    def test_a_bad_study_that_is_older_is_in_nobodys_way(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        newer, good = queue(database, "newer"), queue(database, "good", 5)
        newer.store.update_study(newer.id, '{"unheard": 1}', "99.0", json.dumps(TOY))
        monkeypatch.setattr(worker_process, "REFUSED_STUDY_S", 0.0)
        Service(database, options(tmp_path, slots=2)).run(lambda: True, monkeypatch)
        assert states(good) == {"complete": 5}

    def test_a_changed_specification_takes_nothing_away_from_who_trains(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is in hand is seen to its end; what follows is begun by the new one."""
        study = queue(database, "toy", 6, arms={"a": {"n_steps": 6}, "b": {"n_steps": 2}}, pruner={"name": "none"})
        fit = ToyTrainer.fit

        def changing(self: ToyTrainer, config: Any, data: Any, run: Any) -> Any:
            for measurement in fit(self, config, data, run):
                if (int(run.directory.name), measurement.step) == (0, 1):
                    spec = study.spec.model_copy(update={"max_failures_in_a_row": 5})
                    study.store.update_study(study.id, spec.to_json(), "0.1.0", json.dumps(TOY))
                yield measurement

        monkeypatch.setattr(ToyTrainer, "fit", changing)
        monkeypatch.setattr("tuner.worker.LOOK_AGAIN_S", 0.0)
        Service(database, options(tmp_path, slots=2)).run(lambda: True, monkeypatch)
        assert states(study) == {"complete": 6}
        assert [(a.number, a.attempt, a.outcome) for a in study.store.attempts(study.id)] == [
            (number, 1, "complete") for number in range(6)
        ]

    @pytest.mark.parametrize(("slots", "signs_off"), [(1, True), (2, False)])
    def test_who_leaves_trials_to_the_death_of_the_process_does_not_sign_off(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, signs_off: bool
    ) -> None:
        """Else they would count as given back and not as crashed, and nobody would ever find out whose it was."""
        study = queue(database, "toy", 4)

        def broken(self: ToyTrainer, fits: Any) -> list[Any]:
            return [RuntimeError("CUDA error: an illegal memory access was encountered") for _ in fits]

        monkeypatch.setattr(ToyTrainer, "advance", broken)
        with pytest.raises(DeviceFault) as caught:
            Service(database, options(tmp_path, slots=slots)).run(lambda: True, monkeypatch)
        assert caught.value.shared is not signs_off
        (worker,) = Store(database).workers()
        assert (worker.ended_at is not None) is signs_off
        assert states(study) == ({"failed": 1} if signs_off else {"running": 2})
        if not signs_off:  # its process is gone
            monkeypatch.setattr("storage.workers.is_dead", lambda _owner: True)
            study.recover(crashed=True)
            assert {attempt.outcome for attempt in study.store.attempts(study.id)} == {"crashed"}


class TestFolder:
    def test_checkpoints_of_a_deleted_study_are_not_lent_to_the_next_one_of_its_name(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It was deleted on another machine, where this one's files are out of reach."""
        old = queue(database, "toy", 1)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        delete_study(database, "toy")
        old.store.delete_study(old.id)
        new = queue(database, "toy", 1)
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(new) == {}
        assert "got those of another of its name; move the folder away" in caplog.text
        (tmp_path / "runs" / "toy").rename(tmp_path / "away")
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)
        assert states(new) == {"complete": 1}
        Service(database, options(tmp_path)).run(lambda: True, monkeypatch)  # its own are taken

    def test_one_that_cannot_be_written_is_a_disk_error(self, database: Database, tmp_path: Path) -> None:
        (tmp_path / "flat").write_text("")
        row = Store(database).get_study(queue(database, "toy").id)
        with pytest.raises(DiskError, match=r"study\.json: cannot write"):
            own_folder(tmp_path / "flat" / "toy", row)


class TestLeaving:
    def test_told_to_stop_while_data_are_loaded_it_takes_no_trial_and_loads_no_more(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        studies = [queue(database, name) for name in ("old", "new")]
        load, loaded = ToyTrainer.load, []
        service = Service(database, options(tmp_path))

        def slow(self: ToyTrainer, data: DataSpec, roles: Any) -> ToyDataset:
            loaded.append(data)
            service.stop.set()
            return load(self, data, roles)

        monkeypatch.setattr(ToyTrainer, "load", slow)
        service.run(lambda: True, monkeypatch)
        assert [states(study) for study in studies] == [{}, {}]
        assert len(loaded) == 1

    def test_who_abandons_its_trial_signs_off(self, database: Database, tmp_path: Path) -> None:
        """Else nobody but its own host would know, and others wait for its lease to run out."""
        study = queue(database, "toy")
        worker_id = study.store.register_worker(None, ProcessIdentity.current(), "cpu")
        server = Server(database, options(tmp_path), threading.Event(), worker_id, lambda: False)
        assert study.claim(worker_id) is not None  # and the database went away before it could say so
        server.abandon()
        study.recover()
        assert states(study) == {"waiting": 1}


class TestData:
    def load(self, tmp_path: Path, stored: dict[str, Any], section: Any = None, **changes: Any) -> ToyDataset:
        return load_data(ToyTrainer(), section or {}, stored, options(tmp_path, **changes))

    def stored(self, content: bytes, name: str = "toy.csv") -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        stamp = {"sha256": digest, "size_bytes": len(content)}
        return {"data_hash": digest, "source": f"toy file {name}", "simulated": False, "files": {name: stamp}}

    def test_found_below_a_root_by_content(self, tmp_path: Path) -> None:
        content = b"a,b\n1,2\n"
        for folder, found in (("one", b"a,b\n9,9\n"), ("two/deep", content)):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "toy.csv").write_bytes(found)
        roots = (str(tmp_path / "nowhere"), str(tmp_path / "one"), str(tmp_path / "two"))
        data = self.load(tmp_path, self.stored(content), {"file": "toy.csv"}, roots=roots)
        assert data.manifest.files["toy.csv"].sha256 == hashlib.sha256(content).hexdigest()

    def test_what_differs_is_refused_naming_both(self, tmp_path: Path) -> None:
        (tmp_path / "toy.csv").write_bytes(b"a,b\n9,9\n")
        stored = self.stored(b"a,b\n1,2\n")
        with pytest.raises(InputError) as caught:
            self.load(tmp_path, stored, {"file": "toy.csv"}, roots=(str(tmp_path),))
        message = str(caught.value)
        assert stored["data_hash"][:12] in message
        assert hashlib.sha256(b"a,b\n9,9\n").hexdigest()[:12] in message
        assert "\n" not in message

    def test_a_path_that_was_given_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "toy.csv").write_bytes(b"1")
        told = {"data_path": str(tmp_path), "data_path_given": True}
        data = self.load(tmp_path, self.stored(b"1"), {"file": "toy.csv"}, **told)
        assert data.manifest.source == "toy file toy.csv"
        with pytest.raises(InputError, match=r"expected toy file toy.csv .*got toy file toy.csv"):
            self.load(tmp_path, self.stored(b"2"), {"file": "toy.csv"}, **told)

    def test_simulated_data_are_made_again_and_nothing_is_looked_for(self, tmp_path: Path) -> None:
        asked: list[Any] = []

        class Simulating(ToyTrainer):
            def load(self, data: DataSpec, roles: Any) -> ToyDataset:
                asked.append((data.path, data.path_given, roles))
                return super().load(data, roles)

        (tmp_path / "toy.csv").write_bytes(b"1")
        stored = {**TOY, "simulated": True}
        load_data(Simulating(), {}, stored, options(tmp_path, roots=(str(tmp_path),)))
        assert asked == [(None, False, SEARCH_ROLES)]

    def test_another_generator_is_refused(self, tmp_path: Path) -> None:
        stored = {**TOY, "simulated": True, "data_hash": "0" * 16, "source": "toy, generator version 0"}
        with pytest.raises(InputError, match=r"expected toy, generator version 0 .*the tuner version changed"):
            self.load(tmp_path, stored)

    def test_a_section_of_another_version_is_refused_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError,
            match=r"^data\.unknown: unknown key: expected one of .*, got 'unknown'; use the tuner version that",
        ):
            self.load(tmp_path, TOY, {"unknown": 1})

    def test_only_train_and_valid_are_opened(self, tmp_path: Path) -> None:
        assert frozenset({"train", "valid"}) == SEARCH_ROLES


def test_options_survive_the_way_to_the_process(tmp_path: Path) -> None:
    given = options(tmp_path, studies=("a", "b"), roots=("/x",), artifacts="file:///y", outage_s=1.5, slots=3)
    assert WorkerOptions.from_json(json.dumps(dataclasses.asdict(given))) == given


@pytest.mark.skipif("VmHWM" not in Path("/proc/self/status").read_text(), reason="this kernel does not tell it")
def test_peak_memory_is_that_of_the_process_alone() -> None:
    """It knows what was freed since, and nothing of what the parent held at its birth, as `getrusage` does."""
    code = (
        "from tuner.worker_process import peak_bytes\n"
        "before = peak_bytes()\n"
        "held = bytearray(b'x' * 60_000_000)\n"  # twice: the text and its copy
        "del held\n"
        "print(before, peak_bytes())"
    )
    of_the_parent = bytearray(b"x" * 500_000_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    assert 100e6 < after - before < 200e6
    assert after < len(of_the_parent)
