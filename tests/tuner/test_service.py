"""The queue: what `submit` stores, what `stop` changes, what a supervisor puts back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from models.trainer import InputError
from storage.database import Database, DatabaseUnavailable, StorageError
from storage.runs import Store, StudyRow
from storage.tables import SCHEMA_VERSION
from tests.searches import dead, elsewhere, new_worker
from tests.tuner.toy_study import Said, write_spec
from tuner import service
from tuner.cli import main
from tuner.coordinator import RunOptions
from tuner.crew import Crew, RunFailed
from tuner.study import Study


def submit(folder: Path, url: str, name: str = "toy", changes: Any = None, **flags: Any) -> StudyRow:
    spec = write_spec(folder, name, **(changes or {}))
    options = RunOptions(str(spec), storage=url, runs=str(folder / "runs"), **flags)
    return service.submit(options, Said())


class TestSubmit:
    def test_study_and_budget_are_queued(self, storage_url: str, tmp_path: Path) -> None:
        row = submit(tmp_path, storage_url, n_trials=200)
        assert (row.name, row.total, row.stop) == ("toy", 200, None)
        database = Database(storage_url)
        assert [queued.name for queued in Store(database).queued_studies()] == ["toy"]
        assert Study.open(database, "toy").search.trials() == []
        database.close()

    def test_what_is_stored_holds_no_path(self, sqlite_url: str, tmp_path: Path) -> None:
        data = tmp_path / "somewhere"
        data.mkdir()
        (data / "toy.csv").write_text("1")
        changes = {"data": {"path": str(tmp_path / "elsewhere"), "file": "toy.csv"}}
        row = submit(tmp_path, sqlite_url, changes=changes, data=str(data))
        assert str(tmp_path) not in row.spec + row.data
        stamp = json.loads(row.data)["files"]["toy.csv"]
        assert (len(stamp["sha256"]), stamp["size_bytes"]) == (64, 1)

    def test_again_it_raises_the_budget_and_keeps_its_place(self, sqlite_url: str, tmp_path: Path) -> None:
        first = submit(tmp_path, sqlite_url, n_trials=5)
        submit(tmp_path, sqlite_url, "other")
        again = submit(tmp_path, sqlite_url, n_trials=9)
        assert (again.total, again.queued_at) == (9, first.queued_at)
        assert submit(tmp_path, sqlite_url, n_trials=3).total == 9

    def test_a_lower_budget_is_told(self, sqlite_url: str, tmp_path: Path) -> None:
        submit(tmp_path, sqlite_url, n_trials=5)
        said = Said()
        options = RunOptions(str(write_spec(tmp_path)), storage=sqlite_url, runs=str(tmp_path / "runs"), n_trials=3)
        assert service.submit(options, said).total == 5
        assert "n-trials: the study's total is 5 already and is never lowered (asked for 3)" in said.lines

    def test_another_specification_is_refused(self, sqlite_url: str, tmp_path: Path) -> None:
        before = submit(tmp_path, sqlite_url)
        with pytest.raises(InputError, match=r"study 'toy' exists and differs: seed: 42 -> 7"):
            submit(tmp_path, sqlite_url, seed=7)
        database = Database(sqlite_url)
        assert Store(database).find_study("toy") == before
        database.close()

    def test_it_lifts_a_stop(self, sqlite_url: str, tmp_path: Path) -> None:
        submit(tmp_path, sqlite_url)
        assert service.stop(sqlite_url, "toy", None, now=True) == ("toy", 0)
        row = submit(tmp_path, sqlite_url)
        assert row.stop is None
        assert row.queued_at is not None


class TestStop:
    @pytest.mark.parametrize(("now", "mode"), [(False, "drain"), (True, "now")])
    def test_it_takes_the_study_out_of_the_queue(
        self, sqlite_url: str, tmp_path: Path, now: bool, mode: str
    ) -> None:
        submit(tmp_path, sqlite_url)
        database = Database(sqlite_url)
        study = Study.open(database, "toy")
        claim = study.claim(new_worker(study))
        assert claim is not None
        assert service.stop(sqlite_url, "toy", None, now) == ("toy", 1)
        row = study.store.get_study(study.id)
        assert (row.stop, row.queued_at) == (mode, None)
        assert study.claim(new_worker(study)) is None
        assert study.is_over()
        # What runs may finish.
        study.end(claim, "failed", "because")
        database.close()

    def test_an_unknown_study_is_one_line(self, sqlite_with_tables_url: str) -> None:
        with pytest.raises(StorageError, match="study 'nothing' is not in"):
            service.stop(sqlite_with_tables_url, "nothing", None, now=False)


class TestSupervisor:
    def test_what_dead_workers_of_this_machine_held_is_put_back(self, sqlite_url: str, tmp_path: Path) -> None:
        for name in ("one", "two"):
            submit(tmp_path, sqlite_url, name)
        database = Database(sqlite_url)
        one, two = (Study.open(database, name) for name in ("one", "two"))
        for study, owner in ((one, None), (one, dead()), (two, elsewhere()), (two, dead())):
            assert study.claim(new_worker(study, owner)) is not None
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"))
        supervisor = service._Supervisor(database, options, ["cpu"], print)
        supervisor.put_back(crashed=True)
        for study in (one, two):
            assert sorted(trial.state for trial in study.search.trials()) == ["running", "waiting"]
            outcomes = [attempt.outcome for attempt in study.store.attempts(study.id)]
            assert outcomes in (["crashed", None], [None, "crashed"])
        database.close()

    def test_a_study_that_kills_workers_does_not_stop_the_supervisor(self, sqlite_url: str, tmp_path: Path) -> None:
        """Nothing is measured, yet each death was in a trial: the poison rule and the study's limit see to that."""
        submit(tmp_path, sqlite_url)
        database = Database(sqlite_url)
        study = Study.open(database, "toy")
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"))
        supervisor = service._Supervisor(database, options, ["cpu"], print)
        told = [supervisor._on_death(True)]
        for _ in range(3):
            assert study.claim(new_worker(study, dead())) is not None
            told.append(supervisor._on_death(True))
        assert len(set(told)) == 4
        assert supervisor._on_death(True) == told[-1]  # one that died with nothing in hand
        assert [trial.state for trial in study.search.trials()] == ["failed"]
        database.close()

    def test_its_workers_are_told_how_many_trials_to_train_at_once(
        self, sqlite_with_tables_url: str, tmp_path: Path
    ) -> None:
        database = Database(sqlite_with_tables_url)
        for slots in (4, "auto"):
            options = service.ServiceOptions(sqlite_with_tables_url, runs=str(tmp_path / "runs"), slots=slots)
            assert service._Supervisor(database, options, ["cpu"], print).crew()._worker.slots == slots
        database.close()

    def test_who_died_before_the_start_crashed_nothing(
        self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kill everything three times, start it again: an innocent trial must not end as failed by that."""
        submit(tmp_path, sqlite_url)
        database = Database(sqlite_url)
        study = Study.open(database, "toy")
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"), devices="cpu", workers=1)

        def all_are_killed(self: Crew, tick: Any) -> int:
            assert study.claim(new_worker(study, dead())) is not None
            raise RunFailed("killed")

        monkeypatch.setattr(Crew, "see_through", all_are_killed)
        monkeypatch.setattr(service._Supervisor, "close", lambda self: None)
        for _ in range(3):
            with pytest.raises(RunFailed):
                service.serve(options, lambda line: None)
        monkeypatch.setattr(Crew, "see_through", lambda self, tick: 0)
        service.serve(options, lambda line: None)
        assert [attempt.outcome for attempt in study.store.attempts(study.id)] == ["lost"] * 3
        assert [trial.state for trial in study.search.trials()] == ["waiting"]
        database.close()

    def test_a_supervisor_says_that_it_serves_when_a_signal_stops_it_in_order(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        """Whoever stops it at that word must not see it interrupted half-way through its start."""
        submit(tmp_path, sqlite_url)
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            if line.startswith("serving"):
                os.kill(os.getpid(), signal.SIGTERM)

        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"), devices="cpu", workers=1)
        service.serve(options, hear)
        assert any("stop at their next measurement" in line for line in said)

    def test_a_database_that_goes_away_while_it_starts_is_waited_for(
        self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(tmp_path, sqlite_url)
        put_back, tries = service._Supervisor.put_back, []

        def is_away_once(self: service._Supervisor, crashed: bool = False) -> None:
            tries.append(crashed)
            if len(tries) == 1:
                raise DatabaseUnavailable("the server closed the connection")
            put_back(self, crashed)

        monkeypatch.setattr(service._Supervisor, "put_back", is_away_once)
        monkeypatch.setattr(Crew, "see_through", lambda self, tick: 0)
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"), devices="cpu", workers=1)
        service.serve(options, lambda line: None)
        assert len(tries) == 3  # failed, done, and once more at the end

    def test_a_fault_puts_back_too(self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        submit(tmp_path, sqlite_url)
        database = Database(sqlite_url)
        study = Study.open(database, "toy")

        def one_refuses(self: Crew, tick: Any) -> int:
            assert study.claim(new_worker(study, dead())) is not None
            raise InputError("the disk is full")

        monkeypatch.setattr(Crew, "see_through", one_refuses)
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"), devices="cpu", workers=1)
        with pytest.raises(InputError, match="the disk is full"):
            service.serve(options, lambda line: None)
        assert [trial.state for trial in study.search.trials()] == ["waiting"]
        database.close()

    def test_a_study_of_another_version_is_in_nobodys_way(self, sqlite_url: str, tmp_path: Path) -> None:
        for name in ("newer", "toy"):
            submit(tmp_path, sqlite_url, name)
        database = Database(sqlite_url)
        newer, toy = (Study.open(database, name) for name in ("newer", "toy"))
        for study in (newer, toy):
            assert study.claim(new_worker(study, dead())) is not None
        newer.store.update_study(newer.id, '{"unheard": 1}', "99.0", "{}")
        options = service.ServiceOptions(storage=sqlite_url, runs=str(tmp_path / "runs"))
        service._Supervisor(database, options, ["cpu"], print).put_back()
        assert [trial.state for trial in toy.search.trials()] == ["waiting"]
        with pytest.raises(InputError, match=r"expected a specification of this tuner version, got one of 99\.0"):
            Study.open(database, "newer")
        database.close()

    def test_without_a_database_nothing_is_started(self, tmp_path: Path) -> None:
        options = service.ServiceOptions(storage=f"sqlite:///{tmp_path}/no.db", devices="cpu")
        with pytest.raises(StorageError, match="expected a database, got no such file"):
            service.serve(options, print)

    def test_what_may_not_have_been_meant_is_said(self, sqlite_url: str, tmp_path: Path) -> None:
        submit(tmp_path, sqlite_url)
        database = Database(sqlite_url)
        options = service.ServiceOptions(
            storage=sqlite_url, studies=("toy", "tyo"), roots=(str(tmp_path), str(tmp_path / "gone"))
        )
        said: list[str] = []
        service._warn(database, options, said.append)
        assert said == [
            f"--data {tmp_path / 'gone'}: no such folder; studies of real data are not served without theirs",
            "--study tyo: not in the database (there is toy); waiting for it",
        ]
        database.close()

    def test_a_database_that_restarts_meanwhile_is_waited_for(
        self, sqlite_with_tables_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened, away = service.open_database, [True, True, False]

        def sometimes(*args: Any, **kwargs: Any) -> Database:
            if away.pop(0):
                raise DatabaseUnavailable("storage: starting up")
            return opened(*args, **kwargs)

        monkeypatch.setattr(service, "open_database", sometimes)
        monkeypatch.setattr("storage.database.time.sleep", lambda _s: None)
        monkeypatch.setattr(service.Crew, "see_through", lambda *_: 0)
        options = service.ServiceOptions(sqlite_with_tables_url, devices="cpu", runs=str(tmp_path / "runs"))
        service.serve(options, print)
        assert not away

    def test_an_artifact_store_that_is_none_is_refused_at_once(self, sqlite_with_tables_url: str) -> None:
        options = service.ServiceOptions(storage=sqlite_with_tables_url, devices="cpu", artifacts="ftp://x/y")
        with pytest.raises(StorageError, match="expected file:///"):
            service.serve(options, print)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path)
    assert main(["submit", "--study", "toy", "--n-trials", "7"]) == 0
    assert "study toy: queued, 7 trials in all" in capsys.readouterr().out
    assert main(["status", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [study["study"] for study in told["studies"]] == ["toy"]
    assert main(["status"]) == 0
    assert "toy" in capsys.readouterr().out
    assert main(["stop", "--study", "toy"]) == 0
    assert capsys.readouterr().out == "study toy: stopped\n"
    assert main(["db", "check"]) == 0
    assert f"schema {SCHEMA_VERSION}" in capsys.readouterr().out
    assert main(["logs", "--study", "toy"]) == 2
    assert "expected a folder of logs, got none" in capsys.readouterr().err
    logs = tmp_path / "runs" / "toy" / "logs"
    logs.mkdir(parents=True)
    (logs / "run.log").write_text("2026-01-01T00:00:00.000Z INFO action=claim msg=hello\n")
    assert main(["logs", "--study", "toy"]) == 0
    assert "hello" in capsys.readouterr().out
