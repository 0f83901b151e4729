"""What `tuner run` takes up of an existing study, what it warns of, and what it refuses."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.trainer import InputError
from storage.database import Database, DatabaseUnavailable, StorageError
from storage.runs import Store
from tests.searches import METRIC, new_worker, work_off
from tests.tuner.toy_study import Said
from tuner import coordinator
from tuner.coordinator import RunOptions, read_spec, run
from tuner.crew import RunFailed
from tuner.study import Study

SPEC: dict[str, Any] = {
    "study": "toy",
    "trainer": "tests.toy:ToyTrainer",
    "data": {"content": "toy"},
    "decision": {"task": "toy", "target_precision": 0.5},
    "objective": {"metric": METRIC},
    "n_trials": 2,
    "seed": 42,
    "config": {"x": 0.5, "y": 0.5, "speed": 0.5},
    "arms": {"one": {}, "two": {"speed": 0.2}},
    "space": {"x": {"low": 0.0, "high": 1.0}},
}


class House:
    """A finished study of two trials, and how it is run again."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        spec, trainer = read_spec(self.options())
        database = Database(url)
        manifest = trainer.load(coordinator.data_spec(spec, trainer, self.options()), frozenset()).manifest
        study = coordinator.open_study(spec, manifest, self.options(), database)
        worker = new_worker(study)
        while (claim := study.claim(worker)) is not None:
            work_off(study, claim)
        study.store.end_worker(worker)
        database.close()

    def options(self, changes: dict[str, Any] | None = None, **flags: Any) -> RunOptions:
        path = self.folder / "toy.yaml"
        path.write_text(yaml.safe_dump({**SPEC, **(changes or {})}, sort_keys=False))
        given = {"storage": self.url, "runs": str(self.folder / "runs"), "devices": "cpu", "workers": 1}
        return RunOptions(str(path), **{**given, **flags})

    def again(self, changes: dict[str, Any] | None = None, **flags: Any) -> list[str]:
        said = Said()
        _, code = run(self.options(changes, **flags), said)
        assert code == 0
        return said.lines

    def row(self) -> Any:
        database = Database(self.url)
        row = Store(database).find_study("toy")
        database.close()
        return row


@pytest.fixture
def house(tmp_path: Path, sqlite_with_tables_url: str) -> House:
    return House(tmp_path, sqlite_with_tables_url)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {"x": {"low": 0.0, "high": 0.9}}}, "space.x.high: 1 -> 0.9"),
        ({"space": {"x": SPEC["space"]["x"], "y": SPEC["space"]["x"]}}, "space.y"),
        ({"config": {**SPEC["config"], "n_steps": 9}}, "config.n_steps: absent -> 9"),
        ({"arms": {"one": {}}}, "arms.two.speed: 0.2 -> absent"),
        ({"arms": {"two": {"speed": 0.2}, "one": {}}}, "arms: dealt in the order one, two -> two, one"),
        ({"objective": {"metric": "valid/toy/roc_auc"}}, "objective.metric"),
        ({"objective": {"metric": METRIC, "upper": 0.9}}, "objective.upper: 1 -> 0.9"),
        ({"decision": {"task": "toy", "target_precision": 0.6}}, "decision.target_precision: 0.5 -> 0.6"),
        ({"decision": {"task": "toy", "target_precision": 0.5, "min_selected": 9}}, "decision.min_selected"),
        ({"data": {"content": "other"}}, "data.content"),
        ({"seed": 43}, "seed: 42 -> 43"),
        ({"sampler": {"name": "random"}}, "sampler.name"),
        ({"pruner": {"name": "none"}}, "pruner.name"),
    ],
)
def test_what_makes_trials_incomparable_is_refused(house: House, changes: dict[str, Any], named: str) -> None:
    before = house.row()
    with pytest.raises(InputError) as caught:
        house.again(changes)
    message = str(caught.value)
    assert named in message
    assert "--name NEW" in message
    assert "tuner delete --study toy" in message
    assert "\n" not in message
    assert house.row() == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"seed": 43}, "seed: 42 -> 43"), ({"overrides": ("config.x=0.4",)}, "config.x: 0.5 -> 0.4")],
)
def test_so_are_flags(house: House, flags: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        house.again(**flags)


def test_other_data_under_the_same_options_are_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toy import ToyDataset, ToyTrainer

    load = ToyTrainer.load

    def changed(self: ToyTrainer, data: Any, roles: Any) -> ToyDataset:
        from dataclasses import replace

        return ToyDataset(replace(load(self, data, roles).manifest, data_hash="f" * 16, source="changed files"))

    monkeypatch.setattr(ToyTrainer, "load", changed)
    with pytest.raises(InputError, match=r"data: toy data 'toy' \(toy0{9}\) -> changed files \(f{12}\)"):
        house.again()


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, {"workers": 7}),
        ({}, {"devices": "cpu,cpu"}),
        ({}, {"timeout_s": 1.0}),
        ({}, {"n_trials": 2}),
        ({"description": "other words"}, {}),
        ({"data": {"content": "toy", "path": "elsewhere"}}, {}),
        ({"max_failures_in_a_row": 9}, {}),
        ({"config": {"x": 0.50, "speed": 0.5, "y": 0.5}}, {}),  # written otherwise
    ],
)
def test_what_is_free_to_change(house: House, changes: dict[str, Any], flags: dict[str, Any]) -> None:
    assert "study toy: all 2 trials have ended, nothing is to do" in house.again(changes, **flags)


def test_what_was_free_to_change_is_taken_over(house: House) -> None:
    house.again({"max_failures_in_a_row": 9, "data": {"content": "toy", "path": "elsewhere"}})
    database = Database(house.url)
    spec = Study.open(database, "toy").spec
    database.close()
    assert spec.max_failures_in_a_row == 9
    assert "path" not in spec.data  # the database knows data by their content


def test_a_lower_total_is_told_only_to_who_asked_for_it(house: House) -> None:
    lowered = house.again(n_trials=1)
    assert "n-trials: the study's total is 2 already and is never lowered (asked for 1)" in lowered
    assert house.row().n_trials == 2
    silent = house.again({"n_trials": 1})
    assert not any("n-trials" in line for line in silent)


def test_another_package_version_is_warned_of(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coordinator, "version", lambda _name: "99.0")
    with caplog.at_level(logging.WARNING):
        house.again()
    assert any("this is 99.0" in record.getMessage() for record in caplog.records)
    assert house.row().package_version == "99.0"
    caplog.clear()
    house.again()
    assert not caplog.records


def test_another_name_is_another_study(house: House) -> None:
    said = Said()
    options = house.options({"seed": 43}, name="new")
    spec, trainer = read_spec(options)
    database = Database(house.url)
    manifest = trainer.load(coordinator.data_spec(spec, trainer, options), frozenset()).manifest
    study = coordinator.open_study(spec, manifest, options, database)
    assert (study.name, study.search.trials()) == ("new", [])
    database.close()
    assert said.lines == []


def test_replacements_are_as_many_as_failures(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(house.url)
    study = Study.open(database, "toy")
    study.store.start_study(study.id, 4, 0)
    worker = new_worker(study)
    for _ in range(2):
        claim = study.claim(worker)
        assert claim is not None
        study.end(claim, "failed", "because")
    study.store.end_worker(worker)
    house.again(n_trials=4)
    assert study.store.get_study(study.id).total == 4

    class Refused(Exception):
        pass

    def no_crew(*_: Any) -> Any:
        raise Refused

    for _ in range(2):  # asked twice, added once
        monkeypatch.setattr(coordinator, "Crew", no_crew)
        with pytest.raises(Refused):
            house.again(n_trials=4, retry_failed=True)
        assert study.store.get_study(study.id).total == 6
    database.close()


def test_an_unreachable_database_is_told_before_data_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.toy import ToyTrainer

    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    monkeypatch.setattr(ToyTrainer, "load", lambda *_: pytest.fail("prepared"))
    options = RunOptions(
        str(tmp_path / "toy.yaml"), storage="postgresql://u:secret@127.0.0.1:1/n", devices="cpu",
        runs=str(tmp_path / "runs"),
    )  # fmt: skip
    with pytest.raises(StorageError, match=r"u:\*\*\*@127.0.0.1:1"):
        run(options, Said())
    assert not (tmp_path / "runs").exists()


def test_time_is_up_then_one_interrupt_stops_at_once(house: House) -> None:
    class Impatient(Said):
        def say(self, line: str) -> None:
            super().say(line)
            if line.startswith("time is up"):
                os.kill(os.getpid(), signal.SIGINT)

    said, started = Impatient(), time.monotonic()
    slow = {"config": {**SPEC["config"], "step_s": 100.0}}
    _, code = run(house.options(slow, name="slow", timeout_s=4.0), said)
    assert code == 130
    assert time.monotonic() - started < 60
    assert "(Ctrl-C to stop at once)" in said.lines[-2]  # then what it has cost


def test_several_trials_at_once_in_a_process_that_one_of_them_kills(house: House) -> None:
    """A real process, killed again and again: nobody but the one that kills it fails by that."""
    spec = {
        "config": {**SPEC["config"], "n_steps": 4}, "sampler": {"name": "random"}, "max_failures_in_a_row": 2,
        "arms": {"one": {}, "kills": {"fault": "kill", "fault_step": 0, "fault_attempts": 2}, "two": {}},
    }  # fmt: skip
    said = house.again(spec, name="slots", n_trials=6, slots=3)
    database = Database(house.url)
    study = Study.open(database, "slots")
    attempts = study.store.attempts(study.id)
    runs = study.store.runs(study.id)
    database.close()
    assert [trial.state for trial in study.search.trials()] == ["complete"] * 6, said
    assert {run.failure for run in runs} == {None}
    crashed = [attempt.number for attempt in attempts if attempt.outcome == "crashed"]
    # Each of the two killed its process twice: the first time beside others, then alone.
    assert crashed.count(1) == crashed.count(4) == 2
    logged = "".join(path.read_text() for path in (house.folder / "runs/slots/logs").glob("*.log"))
    assert re.search(r"action=claim study=slots trial=2 attempt=1 .*slot=2", logged)


def test_a_run_that_cannot_go_on_still_writes_its_results(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(coordinator.Crew):
        def see_through(self, *_: Any) -> int:
            raise RunFailed("three failed")

    monkeypatch.setattr(coordinator, "Crew", Broken)
    options = house.options(n_trials=4)
    results = Path(options.runs) / "toy" / "results.json"
    with pytest.raises(RunFailed, match="three failed"):
        coordinator.run(options, Said())
    assert json.loads(results.read_text())["n_ended"] == 2


def test_a_run_says_what_it_cost(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tuner"):
        said = house.again(n_trials=4)
    (line,) = (line for line in said if "peak memory" in line)
    told = re.fullmatch(
        r"2 trials in \d+ s; peak memory: (\d+) MB in this process, (\d+) MB in the largest worker", line
    )
    assert told is not None, line
    (event,) = (record for record in caplog.records if getattr(record, "action", "") == "run_ended")
    assert event.n_trials == 2
    assert 0 < event.wall_s < 60
    assert [int(part) for part in told.groups()] == [
        round(event.peak_bytes / 1e6), round(event.worker_peak_bytes / 1e6)
    ]  # fmt: skip
    # A worker holds an interpreter with NumPy and SQLAlchemy, and nothing of what a test's process has held before.
    assert 30e6 < event.worker_peak_bytes < 400e6
    assert event.peak_bytes > 60e6
    assert not any("peak memory" in line for line in house.again())  # nothing was to do


def test_of_workers_that_died_no_memory_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(coordinator.Crew):
        def see_through(self, *_: Any) -> int:
            raise RunFailed("worker processes keep dying")

    monkeypatch.setattr(coordinator, "Crew", Dead)
    said = Said()
    with pytest.raises(RunFailed):
        run(house.options(n_trials=4), said)
    assert re.fullmatch(r"0 trials in 0 s; peak memory: \d+ MB in this process", said.lines[-1])


def test_a_folder_that_cannot_be_written_is_one_line(house: House, tmp_path: Path) -> None:
    (tmp_path / "flat").write_text("")
    with pytest.raises(InputError, match="expected a folder"):
        coordinator.run(house.options(n_trials=4, runs=str(tmp_path / "flat")), Said())


def test_a_run_that_an_outage_ended_says_so_though_the_database_is_still_away(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GivenUp:
        devices = ("cpu",)
        time_s: dict[str, float] = {}  # noqa: RUF012
        peak_bytes = 0

        def see_through(self, *_: Any) -> int:
            def away(*_: Any, **__: Any) -> Any:
                raise DatabaseUnavailable("still away")

            monkeypatch.setattr(Study, "recover", away)
            raise RunFailed("storage: claim: away")

    monkeypatch.setattr(coordinator, "_crew", lambda *_: GivenUp())
    with pytest.raises(RunFailed, match="storage: claim: away"):
        house.again(n_trials=5)


def test_credentials_in_the_artifacts_url_get_into_no_command_line(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "_crew", lambda *_: pytest.fail("workers are given the URL as an argument"))
    with pytest.raises(StorageError, match="expected a URL without credentials") as caught:
        house.again(n_trials=5, artifacts="s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)
