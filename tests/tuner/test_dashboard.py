from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import waitress
from optuna.trial import create_trial

from models.trainer import InputError
from storage.database import Database, StorageError
from storage.leases import ProcessIdentity
from tests import searches
from tests.tuner.toy_study import ROOT, files_below, make_study, summary_of, url
from tests.tuner.wsgi import Browser
from tuner.catalog import open_database
from tuner.optuna_dashboard import DashboardStorage, dashboard_app, serve
from tuner.optuna_study import delete_study
from tuner.study import Study

HALF_FEASIBLE = {
    "config": {"x": 0.3, "y": 0.6, "shape": "a", "n_steps": 5, "violation": 0.25},
    "arms": {"a": {}},
    "n_trials": 12,
    "space": {"x": {"low": 0.0, "high": 1.0}, "violation": {"choices": [-0.1, 0.25]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy`: its default is the best of all and infeasible; `hard`: nothing is feasible; `fits`: no search."""
    folder = tmp_path_factory.mktemp("dashboard")
    make_study(folder, **HALF_FEASIBLE)
    make_study(folder, "hard", n_trials=3, config={**HALF_FEASIBLE["config"], "y": 0.1})
    nothing = {"space": {}, "sampler": {"name": "random"}, "pruner": {"name": "none"}}
    make_study(folder, "fits", **{**HALF_FEASIBLE, "n_trials": 3, "replicate": True, **nothing})
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    database = open_database(url(folder))
    server = waitress.create_server(dashboard_app(database), host="127.0.0.1", port=0, threads=2)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server.effective_port
    server.close()  # wakes the loop, which finds no socket left
    thread.join(timeout=20)
    assert not thread.is_alive()
    database.close()


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        response = connection.getresponse()
        body = response.read()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(body) if is_json and body else body
    finally:
        connection.close()


def study_id(port: int, name: str) -> int:
    return next(s["study_id"] for s in ask(port, "/api/studies")[1]["study_summaries"] if s["study_name"] == name)


def detail(port: int, name: str) -> dict[str, Any]:
    status, body = ask(port, f"/api/studies/{study_id(port, name)}?after=0")
    assert status == 200
    return body


def test_the_page_is_served(port: int) -> None:
    status, body = ask(port, "/dashboard")
    assert status == 200
    assert b"<html" in body
    assert ask(port, "/dashboard", "HEAD") == (200, b"")


def test_trials_states_and_intermediate_values(port: int, folder: Path) -> None:
    shown = detail(port, "toy")
    summary = summary_of(folder)
    assert [t["number"] for t in shown["trials"]] == list(range(12))
    assert [t["state"].lower() for t in shown["trials"]] == [t.state for t in summary.trials]
    assert {"Complete", "Pruned"} == {t["state"] for t in shown["trials"]}
    assert all(t["intermediate_values"] for t in shown["trials"])
    assert shown["objective_names"] == ["valid/toy/pr_auc"]


def test_infeasible_trials_carry_their_true_violation(port: int, folder: Path) -> None:
    shown = {t["number"]: t["constraints"] for t in detail(port, "toy")["trials"]}
    truth = {t.number: [t.violation] for t in summary_of(folder).trials}
    assert shown == truth
    assert {value for (value,) in truth.values()} == {-0.1, 0.25}


def test_decisions_are_attributes_of_trials(port: int) -> None:
    trial = detail(port, "toy")["trials"][0]
    attributes = {a["key"]: a["value"] for a in trial["user_attrs"]}
    assert attributes["feasible"] == "False"
    assert attributes["violation"] == "0.25"
    assert attributes["arm"] == "a"
    assert attributes["best step"] == "4"


def test_the_best_trial_is_the_feasible_best(port: int, folder: Path) -> None:
    summary = summary_of(folder)
    shown = detail(port, "toy")
    assert summary.best is not None
    assert [t["number"] for t in shown["best_trials"]] == [summary.best.number]
    # Optuna's own storage would show an infeasible one: the default is the best of all.
    assert summary.trials[0].value == max(t.value or 0.0 for t in summary.trials)
    assert summary.best.number != 0


def test_no_best_trial_where_nothing_is_feasible(port: int) -> None:
    shown = detail(port, "hard")
    assert shown["best_trials"] == []
    assert len(shown["trials"]) == 3


def test_a_study_shows_its_data_and_its_constraint(port: int) -> None:
    attributes = {a["key"]: a["value"] for a in detail(port, "toy")["user_attrs"]}
    assert attributes["data"] == "toy data 'toy'"
    assert attributes["constraint"] == "toy: precision >= 0.4, confidence 0.9, unit row, at least 30 rows"
    assert attributes["thresholds"] == "search threshold, not certified"


def test_importances_and_csv(port: int) -> None:
    number = study_id(port, "toy")
    status, body = ask(port, f"/api/studies/{number}/param_importances")
    assert status == 200
    assert {i["name"] for i in body["param_importances"][0]} == {"x", "violation"}
    status, body = ask(port, f"/csv/{number}")
    assert status == 200
    assert body.count(b"\n") == 13


def test_fits_that_differ_by_their_seed_have_no_importances(port: int) -> None:
    number = study_id(port, "fits")
    assert ask(port, f"/api/studies/{number}/param_importances") == (200, {"param_importances": [[]]})
    assert ask(port, "/api/studies/999/param_importances")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(port: int, folder: Path, method: str) -> None:
    before = files_below(folder)
    for path in ("/api/studies", "/api/studies/1", "/api/trials/1/tell", "/incompatible-rdb-schema"):
        status, body = ask(port, path, method)
        assert status == 403
        assert "GET or HEAD" in body["reason"]
    assert len(detail(port, "toy")["trials"]) == 12
    assert files_below(folder) == before


def test_looking_changes_nothing(port: int, folder: Path) -> None:
    before = {name: facts for name, facts in files_below(folder).items() if not name.endswith("-shm")}
    detail(port, "toy")
    assert {name: facts for name, facts in files_below(folder).items() if not name.endswith("-shm")} == before


def test_another_name_for_this_machine_is_refused(port: int) -> None:
    assert ask(port, "/api/studies", host="evil.example")[0] == 403
    assert ask(port, "/api/studies", host=f"localhost:{port}")[0] == 200
    assert ask(port, "/api/studies", host=f"[::1]:{port}")[0] == 200


def test_an_unknown_study(port: int) -> None:
    assert ask(port, "/api/studies/99")[0] == 404


def test_a_running_study_is_read_anew(tmp_path: Path) -> None:
    make_study(tmp_path, n_trials=2)
    database = open_database(url(tmp_path))
    server = waitress.create_server(dashboard_app(database), host="127.0.0.1", port=0, threads=1)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ask(server.effective_port, "/api/studies/1")[1]["trials"][1]["constraints"] == [-0.1]
        make_study(tmp_path, "second", n_trials=1)
        names = [s["study_name"] for s in ask(server.effective_port, "/api/studies")[1]["study_summaries"]]
        assert names == ["toy", "second"]
    finally:
        server.close()
        thread.join(timeout=20)
        database.close()


def test_long_answers_are_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.optuna_dashboard.PACK_BYTES", 1000)
    database = open_database(url(folder))
    try:
        browser = Browser(dashboard_app(database))
        packed = browser.ask("/api/studies/1")
        assert packed.headers["content-encoding"] == "gzip"
        plain = browser.ask("/api/studies/1", headers={"Accept-Encoding": ""})
        assert "content-encoding" not in plain.headers
        assert packed.json == plain.json
        assert len(packed.json["trials"]) == 12
    finally:
        database.close()


def test_a_study_of_several_objectives_of_another_program(sqlite: Database) -> None:
    browser = Browser(dashboard_app(sqlite, allow_edit=True))
    content = {"study_name": "theirs", "directions": ["maximize", "minimize"]}
    browser.ask("/api/studies", "POST", body=json.dumps(content).encode(), content_type="application/json")
    storage = DashboardStorage(sqlite)
    trial = create_trial(values=[1.0, 2.0])
    storage.create_new_trial(storage.ids()["theirs"], trial)
    answer = browser.ask("/api/studies/1")
    assert answer.status == 200
    assert len(answer.json["best_trials"]) == 1


def test_a_study_deleted_elsewhere_leaves_nothing_behind(sqlite: Database) -> None:
    """SQLite gives its number, and those of its trials, to the next study."""
    browser = Browser(dashboard_app(sqlite))
    for name, n_trials in (("first", 3), ("second", 2)):
        study = searches.make_study(sqlite, searches.make_spec(n_trials=n_trials), name)
        study.store.start_study(study.id, n_trials, 0)
        worker = searches.new_worker(study)
        while claim := study.claim(worker):
            searches.work_off(study, claim)
        assert [s["study_name"] for s in browser.ask("/api/studies").json["study_summaries"]] == [name]
        browser.app = forget_for_seconds(browser.app)
        assert len(browser.ask("/api/studies/1").json["trials"]) == n_trials
        delete_study(sqlite, name)
        study.store.delete_study(study.id)


def forget_for_seconds(app: Any) -> Any:
    """What optuna-dashboard itself keeps for two seconds, it keeps no longer."""
    app._app.__closure__[0].cell_contents._app._inmemory_cache.clear()
    return app


# --- with a password, and with editing -------------------------------------------------------------------------


def test_with_a_password_nothing_is_readable_without_it(folder: Path) -> None:
    database = open_database(url(folder))
    try:
        browser = Browser(dashboard_app(database, "secret"))
        for path in ("/api/studies", "/api/studies/1", "/csv/1", "/static/bundle.js", "/tuner/api/studies/toy"):
            assert browser.ask(path).status == 401
        assert browser.ask("/dashboard").status == 303
        browser.log_in("secret")
        assert browser.ask("/api/studies").json["study_summaries"]
        assert browser.ask("/csv/1").status == 200
        assert "unsafe-eval" in browser.ask("/dashboard").headers["content-security-policy"]  # its plots need it
    finally:
        database.close()


@pytest.fixture
def edited(sqlite: Database) -> tuple[Study, Browser]:
    """A study with two trials, one of them running, and a browser that may write."""
    study = searches.make_study(sqlite, searches.make_spec(n_trials=2))
    worker = searches.new_worker(study)
    claim = study.claim(worker)
    assert claim is not None
    searches.work_off(study, claim)
    study.claim(worker)
    return study, Browser(dashboard_app(sqlite, allow_edit=True))


def test_a_note_can_be_written(edited: tuple[Study, Browser]) -> None:
    _, browser = edited
    note = {"version": 1, "body": "seen"}
    assert browser.ask(
        "/api/studies/1/note", "PUT", body=json.dumps(note).encode(), content_type="application/json"
    ).status == 204  # fmt: skip
    assert browser.ask("/api/studies/1").json["note"]["body"] == "seen"


def test_edits_that_would_part_the_tables_are_refused(edited: tuple[Study, Browser]) -> None:
    study, browser = edited
    running = browser.ask("/api/studies/1").json["trials"][1]["trial_id"]
    for path, method, reason in (
        ("/api/studies/1/rename", "POST", "expected to keep its name"),
        (f"/api/trials/{running}/tell", "POST", "its worker tells the end"),
        ("/api/studies/1", "DELETE", "expected no worker, got"),
    ):
        answer = browser.ask(path, method, body=b"{}", content_type="application/json")
        assert answer.status == 409
        assert reason in answer.json["reason"]
    assert [t.state for t in study.search.trials()] == ["complete", "running"]


@pytest.mark.parametrize("spelled", ["/api/studies/1\xff", "/api/studies/\xef\xbc\x91", "/api/studies/1\n"])
def test_a_path_spelled_otherwise_is_the_same_edit(edited: tuple[Study, Browser], spelled: str) -> None:
    study, browser = edited

    def ask(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return app({**environ, "PATH_INFO": spelled}, start_response)

    app, browser.app = browser.app, ask
    answer = browser.ask("/", "DELETE", body=b"{}", content_type="application/json")
    assert answer.status == 409
    assert "expected no worker, got" in answer.json["reason"]
    assert len(study.store.studies()) == 1


def test_a_study_is_deleted_on_both_sides(edited: tuple[Study, Browser]) -> None:
    study, browser = edited
    for worker in study.store.workers(study.id):
        study.store.end_worker(worker.id)
    answer = browser.ask("/api/studies/1", "DELETE", body=b"{}", content_type="application/json")
    assert answer.status == 204
    assert study.store.studies() == []
    assert browser.ask("/api/studies").json["study_summaries"] == []
    assert browser.ask("/tuner/api/studies/toy").status == 404


def test_a_study_of_another_program_is_its_own(edited: tuple[Study, Browser]) -> None:
    _, browser = edited
    content = {"study_name": "theirs", "directions": ["maximize"]}
    made = browser.ask("/api/studies", "POST", body=json.dumps(content).encode(), content_type="application/json")
    number = made.json["study_summary"]["study_id"]
    assert browser.ask(f"/api/studies/{number}").json["trials"] == []
    renamed = browser.ask(
        f"/api/studies/{number}/rename", "POST", body=b'{"study_name": "other"}', content_type="application/json"
    )
    assert renamed.status == 201
    names = [s["study_name"] for s in browser.ask("/api/studies").json["study_summaries"]]
    assert sorted(names) == ["other", "toy"]


def test_a_worker_of_the_service_keeps_what_it_holds(sqlite: Database) -> None:
    study = searches.make_study(sqlite, searches.make_spec(n_trials=2))
    worker = study.store.register_worker(None, ProcessIdentity.current(), "cpu")
    storage = DashboardStorage(sqlite)
    row = study.store.get_study(study.id)
    assert storage.workers_on(row) == []
    claim = study.claim(worker)
    assert len(storage.workers_on(row)) == 1
    assert claim is not None
    searches.work_off(study, claim)
    assert storage.workers_on(row) == []  # alive, but at another study by now


# --- the server --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_only_this_machine(folder: Path, host: str) -> None:
    with pytest.raises(InputError, match="expected a password in TUNER_DASHBOARD_PASSWORD"):
        serve(url(folder), host, 0, print)


@pytest.mark.parametrize("password", ["", "  "])
def test_an_empty_password_is_none(folder: Path, password: str) -> None:
    with pytest.raises(InputError, match="expected a password"):
        serve(url(folder), "0.0.0.0", 0, print, password=password)


def test_a_password_that_is_no_text_is_refused(folder: Path) -> None:
    undecodable = b"\xff\xfe".decode(errors="surrogateescape")  # as the environment gives it
    with pytest.raises(InputError, match="TUNER_DASHBOARD_PASSWORD: expected printable text"):
        serve(url(folder), "127.0.0.1", 0, print, password=undecodable)


def test_no_long_body_is_taken_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(app: Any, sockets: list[socket.socket], max_request_body_size: int = 2**30, **options: Any) -> Any:
        sockets[0].close()
        assert max_request_body_size <= 1_000_000
        raise KeyboardInterrupt

    monkeypatch.setattr(waitress, "create_server", create)
    with pytest.raises(KeyboardInterrupt):
        serve(url(folder), "127.0.0.1", 0, print)


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be opened"):
            serve(url(folder), "127.0.0.1", port, print)


def test_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected a database"):
        serve(url(tmp_path), "127.0.0.1", 0, print)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(folder: Path, number: signal.Signals) -> None:
    deaf = ["env", "--ignore-signal=INT"]  # as a shell starts what it puts in the background
    command = [*deaf, sys.executable, "-u", "-m", "tuner", "dashboard", "--port", "0", "--storage", url(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            port = int(line.split("/dashboard")[0].rpartition(":")[2])
            assert ask(port, "/api/studies")[0] == 200
            process.send_signal(number)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
