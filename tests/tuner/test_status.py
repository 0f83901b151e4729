"""The service at a glance: what is told of workers, studies and the queue, and how it fits a terminal."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from rich.console import Console

from storage.database import Database, DatabaseUnavailable
from storage.leases import GRACE_S
from storage.runs import Store
from storage.tables import attempts, runs
from tests.searches import dead, elsewhere, new_worker, work_off
from tests.tuner.service_studies import age_lease, begin, make, taken
from tuner import formats, status
from tuner.status import ServiceStatus, StudyStatus
from tuner.study import Study


def shift(database: Database, column: sa.Column, seconds: float) -> None:
    with database.transaction() as connection:
        connection.execute(column.table.update().values({column.name: column - seconds}))


def the(study: Study) -> StudyStatus:
    return next(s for s in status.read(study.database).studies if s.name == study.name)


# --- workers -------------------------------------------------------------------------------------------------


def test_workers_and_what_they_hold(database: Database) -> None:
    study = make(database, n_ended=1)
    busy, idle, gone, signed_off = (new_worker(study, who) for who in (None, elsewhere(), dead(), elsewhere()))
    claim = begin(study, busy, n_steps=3)
    study.store.end_worker(signed_off)
    found = {worker.row.id: worker for worker in status.read(database).workers}
    assert [found[w].state for w in (busy, idle, gone, signed_off)] == ["alive", "alive", "stale", "ended"]
    (holding,) = found[busy].holdings
    assert (holding.study_name, holding.number, holding.attempt, holding.step) == ("toy", claim.number, 1, 2)
    assert found[idle].holdings == []
    assert 0 <= found[idle].row.age_s < 60


def test_a_worker_with_several_trials_has_a_line_for_each(sqlite: Database) -> None:
    study = make(sqlite, n_trials=4)
    study.store.queue_study(study.id)
    worker = new_worker(study)
    begin(study, worker, n_steps=3)
    assert study.claim(worker, in_hand=[0]) is not None
    found = status.read(sqlite)
    assert (the(study).running, the(study).waiting) == (2, 0)
    (told,) = (w["holdings"] for w in status.as_json(found)["workers"] if w["worker"] == worker)
    assert [(held["trial"], held["step"]) for held in told] == [(0, 2), (1, None)]
    (shown,) = (w for w in found.workers if w.row.id == worker)
    lines = status._worker_lines(shown, found.now)
    assert [(line["worker"], line["trial"], line["step"]) for line in lines] == [(worker, 0, 2), (worker, 1, None)]


def test_a_lease_of_another_host_runs_out(sqlite: Database) -> None:
    study = make(sqlite)
    worker = new_worker(study, elsewhere())
    begin(study, worker)
    age_lease(sqlite, worker, GRACE_S - 60)
    assert (the(study).state, the(study).running, the(study).waiting) == ("running", 1, 0)
    age_lease(sqlite, worker, 120)
    found = status.read(sqlite)
    assert found.workers[-1].state == "stale"
    assert found.workers[-1].holdings
    assert (the(study).state, the(study).running, the(study).waiting) == ("idle", 0, 1)


# --- studies -------------------------------------------------------------------------------------------------


def test_the_states_of_a_study(database: Database) -> None:
    study = make(database, n_trials=2)
    store = study.store
    assert the(study).state == "idle"
    store.queue_study(study.id)
    assert (the(study).state, the(study).place) == ("queued", 1)
    worker = new_worker(study, elsewhere())
    claim = begin(study, worker)
    assert (the(study).state, the(study).place) == ("running", 1)
    store.stop_study(study.id, "drain")
    assert (the(study).state, the(study).place) == ("stopping", None)
    study.stop(claim)
    assert (the(study).state, the(study).running, the(study).waiting) == ("stopped", 0, 1)
    store.queue_study(study.id)
    for _ in range(2):
        work_off(study, taken(study, worker))
    assert (the(study).state, the(study).place, the(study).left) == ("done", None, 0)


def test_the_queue_is_in_the_order_of_queueing(sqlite: Database) -> None:
    first, second, third = (make(sqlite, name, n_trials=3) for name in ("first", "second", "third"))
    for study in (third, first, second):
        study.store.queue_study(study.id)
        time.sleep(0.01)
    second.store.stop_study(second.id, "now")
    found = status.read(sqlite)
    assert [(s.name, s.place) for s in found.queue] == [("third", 1), ("first", 2)]
    assert [row.name for row in Store(sqlite).queued_studies()] == ["third", "first"]


def test_pace_and_time_to_go(database: Database) -> None:
    study = make(database, n_trials=10, n_ended=4)
    worker = new_worker(study, elsewhere())
    assert the(study).remaining_s is None  # nobody is at it
    begin(study, worker)
    shift(database, attempts.c.claimed_at, 1800)
    found = the(study)
    assert found.trials_per_hour == pytest.approx(8.0, rel=0.05)  # 4 in half an hour
    assert found.remaining_s == pytest.approx(6 / 8 * 3600, rel=0.05)
    shift(database, attempts.c.claimed_at, 7200)
    assert the(study).trials_per_hour == pytest.approx(4.0)  # in the last hour
    shift(database, runs.c.ended_at, 7200)
    assert (the(study).trials_per_hour, the(study).remaining_s) == (0.0, None)


def test_before_the_first_trial_has_ended_there_is_no_pace(sqlite: Database) -> None:
    study = make(sqlite)
    begin(study, new_worker(study))
    assert (the(study).trials_per_hour, the(study).remaining_s) == (None, None)


def test_an_empty_database(database: Database) -> None:
    found = status.read(database)
    assert (found.studies, found.workers, found.queue) == ([], [], [])
    assert text_of(found, 80).splitlines()[1] == "workers alive: 0; studies in the queue: 0"


# --- JSON and tables -----------------------------------------------------------------------------------------


@pytest.fixture
def service(sqlite: Database) -> ServiceStatus:
    """Three studies with long names, two hosts, one worker that died with a trial in hand."""
    names = ("mvp13", "mvp13-second-seed-with-a-rather-long-name", "stock")
    studies = [make(sqlite, name, n_ended=2) for name in names]
    hosts = [replace(elsewhere(), host=f"gpu-{i}.cluster.example.org") for i in range(2)]
    held = [new_worker(study, host) for study in studies[:2] for host in hosts]
    for worker, study in zip(held, [studies[0], studies[0], studies[1], studies[1]], strict=True):
        begin(study, worker, n_steps=2)
    new_worker(studies[0], hosts[0])
    age_lease(sqlite, held[1], GRACE_S + 60)
    for study in reversed(studies):
        study.store.queue_study(study.id)
        time.sleep(0.01)  # SQLite's clock counts milliseconds
    return status.read(sqlite)


def text_of(found: ServiceStatus, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in status.tables(found, width):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_json_says_all(service: ServiceStatus) -> None:
    told = json.loads(formats.to_json(status.as_json(service)))
    assert told["queue"] == ["stock", "mvp13-second-seed-with-a-rather-long-name", "mvp13"]
    study = told["studies"][0]
    assert (study["study"], study["state"], study["n_ended"], study["running"], study["waiting"]) == (
        "mvp13", "running", 2, 1, 1,
    )  # fmt: skip
    assert study["remaining_s"] > 0
    states = [worker["state"] for worker in told["workers"]]
    assert (states.count("alive"), states.count("stale"), states.count("ended")) == (4, 1, 3)
    (holding,) = next(w["holdings"] for w in told["workers"] if w["state"] == "stale")
    assert (holding["study"], holding["step"]) == ("mvp13", 1)


def test_no_password_is_shown(service: ServiceStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    url = Database("postgresql://ann:s3cret@db/tuner").url
    monkeypatch.setattr(Store, "progress", lambda _: [])
    monkeypatch.setattr(Store, "workers", lambda _: [])
    monkeypatch.setattr(Store, "holdings", lambda _: {})
    monkeypatch.setattr(status, "database_time", lambda _: 0.0)
    found = status.read(SimpleNamespace(url=url, is_sqlite=False))  # type: ignore[arg-type]
    assert found.database == "postgresql://ann:***@db/tuner"


def test_a_wide_terminal_shows_every_column(service: ServiceStatus) -> None:
    text = text_of(service, 200)
    assert "workers alive: 4 (and 1 stale with a trial in hand); studies in the queue: 3 (24 trials to go)" in text
    assert "study  " in text
    header = next(line for line in text.splitlines() if line.startswith("study "))
    assert header.split("  ")[0] == "study"
    for name in ("queue", "trials", "running", "waiting", "complete", "pruned", "failed", "trials/h", "to go"):
        assert name in header
    row = next(line for line in text.splitlines() if line.startswith("stock "))
    assert row.split()[:4] == ["stock", "queued", "1", "2/10"]
    assert "stale, 11.0 min" in text
    assert "workers that ended or died lately: 3" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
def test_what_matters_fits_every_terminal(service: ServiceStatus, width: int) -> None:
    text = text_of(service, width)
    assert all(len(line) <= width for line in text.splitlines()[2:])
    studies, workers_shown = text.split("\nworkers\n")
    assert "trials" in studies.splitlines()[4]
    assert "2/10" in studies
    headers = workers_shown.splitlines()[0].split()
    assert headers[-2:] == ["trial", "step"] or "measured" in headers
    assert {"host", "device", "lease", "age", "study"} <= set(headers)
    assert "cuda:…" not in text
    assert "cpu" in workers_shown
    assert "stale, 11.0 min" in workers_shown


def test_columns_go_by_how_little_they_matter(service: ServiceStatus) -> None:
    def header(width: int) -> list[str]:
        return text_of(service, width).split("\nworkers\n")[1].splitlines()[0].split()

    seen = [header(width) for width in (200, 120, 100, 60)]
    for wide, narrow in itertools.pairwise(seen):
        assert set(narrow) <= set(wide)
    assert "attempt" in seen[0]
    assert "attempt" not in seen[1]
    assert "arm" not in seen[3]


def test_a_stale_worker_without_a_trial_is_only_counted(sqlite: Database) -> None:
    study = make(sqlite)
    new_worker(study, dead())
    text = text_of(status.read(sqlite), 100)
    assert "workers alive: 0; " in text
    assert "workers that ended or died lately: 2" in text
    assert "stale," not in text


def test_more_studies_than_fit_are_counted_and_those_at_work_come_first(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "N_STUDIES", 2)
    make(sqlite, "old", 1, 1)
    queued, newest = make(sqlite, "queued"), make(sqlite, "newest")
    queued.store.queue_study(queued.id)
    newest.store.start_study(newest.id, 1, 0)
    lines = text_of(status.read(sqlite), 100).splitlines()
    assert [line.split()[0] for line in lines[5:7]] == ["queued", "newest"]
    assert "other studies: 1 (`tuner studies` lists all)" in lines


# --- live ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Between two looks something happens; after the last one Ctrl-C."""

    def tick(*happens: Callable[[], Any]) -> list[float]:
        left, slept = list(happens), []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        return slept

    return tick


def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_watching_shows_what_comes_until_ctrl_c(
    sqlite: Database, ticking: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    study = make(sqlite)
    slept = ticking(lambda: study.store.queue_study(study.id), lambda: begin(study, new_worker(study)))
    console = screen()
    status.watch(sqlite, console, every_s=7.0)
    text = shown(console)
    assert text.index(" idle ") < text.index(" queued ") < text.index(" running      1")
    assert slept == [7.0, 7.0, 7.0]
    assert "toy    running" in capsys.readouterr().out  # the last picture stays


def test_watching_without_a_terminal_prints_one_after_the_other(
    sqlite: Database, ticking: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    study = make(sqlite)
    ticking(lambda: study.store.queue_study(study.id))
    status.watch(sqlite, Console(file=io.StringIO()))
    assert capsys.readouterr().out.count("workers alive: 0") == 2


def test_watching_outlives_the_database(
    sqlite: Database, ticking: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(sqlite)
    read = status.read

    def away(_: Database) -> ServiceStatus:
        raise DatabaseUnavailable("storage: connection refused")

    ticking(lambda: monkeypatch.setattr(status, "read", away), lambda: monkeypatch.setattr(status, "read", read))
    console = screen()
    status.watch(sqlite, console)
    pictures = shown(console).split("workers alive: 0")
    assert len(pictures) == 4
    assert ["database away" in picture for picture in pictures] == [False, True, False, False]
    assert "storage: connection refused" in pictures[1]


def test_a_large_database_is_looked_at_less_often(
    sqlite: Database, ticking: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = ticking(lambda: None)
    clock = itertools.count(0.0, 0.5)  # a look takes half a second
    status.time.monotonic = lambda: next(clock)  # type: ignore[attr-defined]
    status.watch(sqlite, screen(), every_s=2.0)
    assert slept == [2.0, 10.0]
