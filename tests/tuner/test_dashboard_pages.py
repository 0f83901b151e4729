"""Our pages and what they show, of a study whose trials go on while they are looked at."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.database import Database, DatabaseUnavailable
from storage.runs import MeasurementRow
from tests.searches import (
    METRIC,
    VIOLATION,
    dead,
    make_database,
    make_spec,
    make_study,
    new_worker,
    suggest_all,
    work_off,
)
from tests.tuner.wsgi import Browser
from tuner.optuna_dashboard import dashboard_app
from tuner.optuna_study import delete_study
from tuner.pages import pages_app
from tuner.pages_feed import COLUMNS, Feed
from tuner.study import Claim, Study

CURVES = {
    "step": 1,
    "pr": {"recall": [0.1, 1.0], "precision": [0.9, 0.1], "bound": [0.7, 0.05], "threshold": [2.0, -3.0]},
    "calibration": {"predicted": [0.1], "observed": [0.2], "count": [50]},
}


def record(study: Study, claim: Claim, step: int, value: float, violation: float = -0.1, **more: Any) -> None:
    metrics = {METRIC: value, VIOLATION: violation, "valid/toy/threshold": 0.5, "valid/toy/recall": 0.2}
    curves = more.pop("curves", None)
    row = MeasurementRow(step, {**metrics, **more}, 10.0 * (step + 1))
    study.store.record(study.id, claim.number, claim.attempt, [row], curves)
    study.search.report(claim.trial, step, value)


def run(study: Study, worker: int, values: list[float], end: str = "complete", violation: float = -0.1) -> Claim:
    """A trial that measures `values` and ends."""
    claim = study.claim(worker)
    assert claim is not None
    study.store.set_config(study.id, claim.number, claim.attempt, suggest_all(study, claim))
    for step, value in enumerate(values):
        record(study, claim, step, value, violation)
    study.end(claim, end, *(["it broke"] if end == "failed" else []))
    return claim


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a study of two arms: trials 0 to 4 have ended, 2 infeasible and 3 pruned."""
    path = tmp_path_factory.mktemp("stored") / "tuner.db"
    database = make_database(f"sqlite:///{path}")
    study = make_study(database, make_spec(n_trials=10, description="A toy"))
    study.store.start_study(study.id, 10, 0)
    worker = new_worker(study)
    run(study, worker, [0.1, 0.4, 0.3])
    run(study, worker, [0.2, 0.5])
    run(study, worker, [0.7, 0.8], violation=0.2)
    run(study, worker, [0.15], "pruned")
    run(study, worker, [0.3, 0.6])
    database.close()
    return path


@pytest.fixture
def study(stored: Path, tmp_path: Path) -> Iterator[Study]:
    shutil.copy(stored, tmp_path / "tuner.db")
    database = Database(f"sqlite:///{tmp_path}/tuner.db")
    yield Study.open(database, "toy")
    database.close()


@pytest.fixture
def browser(study: Study) -> Browser:
    return Browser(dashboard_app(study.database))


@pytest.fixture
def feed(study: Study, monkeypatch: pytest.MonkeyPatch) -> Feed:
    monkeypatch.setattr("tuner.pages_feed.FRESH_S", 0.0)
    return Feed(study.database)


def trials(answer: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    assert answer is not None
    rows = [dict(zip(answer["columns"], values, strict=True)) for values in answer["trials"]]
    return {row["number"]: row for row in rows}


# --- a study ---------------------------------------------------------------------------------------------------


def test_the_trials_of_a_study(feed: Feed) -> None:
    answer = feed.study("toy")
    assert answer is not None
    assert answer["columns"] == COLUMNS
    found = trials(answer)
    assert [t["state"] for t in found.values()] == ["complete", "complete", "complete", "pruned", "complete"]
    assert [t["value"] for t in found.values()] == [0.4, 0.5, 0.8, 0.15, 0.6]
    assert [t["step"] for t in found.values()] == [1, 1, 1, 0, 1]
    assert [t["feasible"] for t in found.values()] == [True, True, False, True, True]
    assert found[0]["last_step"] == 2
    assert found[0]["elapsed_s"] == 20.0
    assert found[0]["recall"] == 0.2
    assert answer["progress"]["n_ended"] == 5
    assert answer["description"] == "A toy"
    assert answer["threshold_status"] == "search threshold, not certified"


def test_arms_side_by_side(feed: Feed) -> None:
    answer = feed.study("toy")
    assert answer is not None
    one, two = answer["arms"]
    assert (one["arm"], one["default"], one["best"], one["feasible"]) == ("one", 0, 4, True)  # not 2: infeasible
    assert one["mean"] == pytest.approx((0.4 + 0.8 + 0.6) / 3)
    assert one["sd"] == pytest.approx(0.2)
    assert (one["n_feasible"], one["counts"]["complete"]) == (2, 3)
    assert one["curves"] == {"default": [[0, 1, 2], [0.1, 0.4, 0.3]], "best": [[0, 1], [0.3, 0.6]]}
    assert (two["default"], two["best"], two["sd"], two["counts"]["pruned"]) == (1, 1, None, 1)
    assert two["overlay"] == [["speed", 0.2]]


def test_an_arm_without_a_feasible_trial_shows_the_nearest(sqlite: Database) -> None:
    study = make_study(sqlite, make_spec(arms={"one": {}}))
    worker = new_worker(study)
    run(study, worker, [0.9], violation=0.3)
    run(study, worker, [0.5], violation=0.1)
    run(study, worker, [0.6], violation=0.1)
    (arm,) = Feed(sqlite).study("toy")["arms"]  # type: ignore[index]
    assert (arm["best"], arm["feasible"], arm["n_feasible"]) == (2, False, 0)


def test_a_loss_is_minimised(sqlite: Database) -> None:
    study = make_study(sqlite, make_spec(arms={"one": {}}, objective={"metric": METRIC, "direction": "minimize"}))
    worker = new_worker(study)
    run(study, worker, [0.9, 0.4, 0.7])
    run(study, worker, [0.5])
    answer = Feed(sqlite).study("toy")
    assert [t["value"] for t in trials(answer).values()] == [0.4, 0.5]
    assert answer is not None
    assert answer["arms"][0]["best"] == 0


def test_only_what_changed_is_sent_again(study: Study, feed: Feed) -> None:
    first = feed.study("toy")
    assert first is not None
    assert first["all"]
    assert trials(feed.study("toy", first["version"])) == {}

    worker = new_worker(study)
    claim = study.claim(worker)
    assert claim is not None
    begun = feed.study("toy", first["version"])
    assert {n: t["state"] for n, t in trials(begun).items()} == {5: "running"}
    assert begun is not None
    assert not begun["all"]
    assert [held["trial"] for w in begun["workers"] for held in w["holdings"]] == [5]

    record(study, claim, 0, 0.25)
    measured = feed.study("toy", begun["version"])
    assert [(t["value"], t["last_step"]) for t in trials(measured).values()] == [(0.25, 0)]

    study.end(claim, "complete")
    assert measured is not None
    ended = feed.study("toy", measured["version"])
    assert {n: t["state"] for n, t in trials(ended).items()} == {5: "complete"}
    assert sorted(trials(feed.study("toy", first["version"]))) == [5]
    assert sorted(trials(feed.study("toy"))) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("since", ["", "x", "0.0", "abcd1234.7", "."])
def test_a_version_of_another_server_brings_everything(feed: Feed, since: str) -> None:
    answer = feed.study("toy", since)
    assert answer is not None
    assert answer["all"]
    assert len(answer["trials"]) == 5


@pytest.mark.parametrize("number", ["²", "9" * 5000])
def test_a_version_that_is_no_number_brings_everything(feed: Feed, number: str) -> None:
    birth = feed.study("toy")["version"].partition(".")[0]  # type: ignore[index]
    answer = feed.study("toy", f"{birth}.{number}")
    assert answer is not None
    assert answer["all"]


def test_states_of_trials_that_did_not_go_well(study: Study, feed: Feed) -> None:
    claim = study.claim(new_worker(study))
    assert claim is not None
    record(study, claim, 0, 0.3)
    study.stop(claim)
    version = feed.study("toy")["version"]  # type: ignore[index]
    assert trials(feed.study("toy"))[5]["state"] == "waiting"
    again = study.claim(new_worker(study))
    assert again is not None
    assert (again.number, again.attempt) == (5, 2)
    resumed = trials(feed.study("toy", version))[5]
    assert (resumed["state"], resumed["attempts"], resumed["value"]) == ("running", 2, 0.3)
    study.end(again, "failed", "RuntimeError: the toy was told to fail")
    failed = trials(feed.study("toy", version))[5]
    assert (failed["state"], failed["failure"]) == ("failed", "RuntimeError: the toy was told to fail")


def test_many_trials_read_at_once_are_the_same(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = study.claim(new_worker(study))
    assert claim is not None
    record(study, claim, 0, 0.3)
    few = trials(Feed(study.database).study("toy"))
    monkeypatch.setattr("tuner.pages_feed.MANY", 0)
    assert trials(Feed(study.database).study("toy")) == few
    assert few[5]["value"] == 0.3


def test_a_big_study_is_not_read_again_at_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.pages_feed.FRESH_S_PER_TRIAL", 1000.0)
    monkeypatch.setattr("tuner.pages_feed.FRESH_S", 1000.0)
    feed = Feed(study.database)
    version = feed.study("toy")["version"]  # type: ignore[index]
    study.claim(new_worker(study))
    answer = feed.study("toy", version)
    assert trials(answer) == {}
    assert answer is not None
    assert answer["progress"]["running"] == 1  # the counts are always fresh


def test_another_study_of_the_same_name(study: Study, feed: Feed) -> None:
    assert len(trials(feed.study("toy"))) == 5
    delete_study(study.database, "toy")
    study.store.delete_study(study.id)
    assert feed.study("toy") is None
    again = make_study(study.database, make_spec())
    work_off(again, again.claim(new_worker(again)))  # type: ignore[arg-type]
    assert sorted(trials(feed.study("toy"))) == [0]


# --- a trial ---------------------------------------------------------------------------------------------------


def test_a_trial_with_its_curves(study: Study, feed: Feed) -> None:
    worker = new_worker(study)
    claim = study.claim(worker)
    assert claim is not None
    study.store.set_config(study.id, claim.number, claim.attempt, suggest_all(study, claim))
    record(study, claim, 0, 0.2, **{"train/cosine/a/b": -0.5})
    record(study, claim, 1, 0.6, curves=CURVES, **{"train/a/loss_share": 0.7})
    record(study, claim, 2, 0.5)
    found = feed.trial("toy", claim.number)
    assert found is not None
    trial = found[1]
    assert trial is not None
    assert (trial["state"], trial["step"], trial["value"], trial["steps"]) == ("running", 1, 0.6, [0, 1, 2])
    assert trial["series"][METRIC] == [0.2, 0.6, 0.5]
    assert trial["series"]["train/cosine/a/b"] == [-0.5, None, None]
    assert trial["series"]["train/a/loss_share"] == [None, 0.7, None]
    assert trial["elapsed"] == [10.0, 20.0, 30.0]
    assert trial["curves"] == CURVES
    assert dict(map(tuple, trial["config"])).keys() >= {"x", "shape", "n_steps"}
    assert trial["searched"] == ["shape", "speed", "x", "y"]
    assert trial["checkpoint"] == {"attempt": 1, "step": 2}
    assert trial["uploaded"] is None
    assert [(t["attempt"], t["device"], t["outcome"]) for t in trial["tries"]] == [(1, "cpu", None)]


def test_a_trial_is_sent_again_when_it_went_on(study: Study, feed: Feed) -> None:
    claim = study.claim(new_worker(study))
    assert claim is not None
    seen: list[str] = []
    for change in (
        lambda: None,
        lambda: record(study, claim, 0, 0.2),
        lambda: record(study, claim, 1, 0.3),
        lambda: study.store.name_upload(study.id, claim.number, claim.attempt, 1),
        lambda: study.stop(claim),
        lambda: study.claim(new_worker(study)),
    ):
        change()
        version, trial = feed.trial("toy", claim.number, seen[-1] if seen else "") or ("", None)
        assert trial is not None
        assert version not in seen
        seen.append(version)
        assert feed.trial("toy", claim.number, version) == (version, None)


def test_there_is_no_such_trial(feed: Feed) -> None:
    assert feed.trial("toy", 99) is None
    assert feed.trial("other", 0) is None
    assert feed.study("other") is None


# --- the service, and the pages themselves ---------------------------------------------------------------------


def test_the_service(study: Study, browser: Browser) -> None:
    claim = study.claim(new_worker(study))
    new_worker(study, dead())
    answer = browser.ask("/tuner/api/service").json
    assert [w["state"] for w in answer["workers"]] == ["alive", "alive", "stale"]
    assert claim is not None
    assert answer["workers"][1]["holdings"][0]["trial"] == claim.number
    assert answer["studies"][0]["study"] == "toy"
    assert answer["dashboard_ids"] == {"toy": 1}


def test_pages_are_shells_for_their_scripts(browser: Browser) -> None:
    for path, script in (("/", "service"), ("/studies/toy", "study"), ("/studies/toy/trials/3", "trial")):
        answer = browser.ask(f"/tuner{path}")
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert f"/tuner/static/{script}.js" in answer.text
        assert "log out" not in answer.text.lower()  # nobody is logged in
    assert browser.ask("/tuner").headers["location"] == "/tuner/"


def test_names_in_addresses_are_escaped(browser: Browser) -> None:
    page = browser.ask('/tuner/studies/"><script>alert(1)</script>').text
    assert "<script>alert" not in page


def test_a_log_out_form_where_somebody_is_logged_in(study: Study) -> None:
    browser = Browser(dashboard_app(study.database, "secret"))
    browser.log_in("secret")
    token = re.search(r'name="token" value="([0-9a-f]{64})"', browser.ask("/tuner/").text)
    assert token is not None
    assert browser.ask("/tuner/logout", "POST", {"token": token[1]}).status == 303
    assert browser.ask("/tuner/").status == 303


def test_everything_a_page_loads_is_served_here(browser: Browser) -> None:
    seen, wanted = set(), ["/tuner/", "/tuner/studies/toy", "/tuner/studies/toy/trials/1", "/dashboard"]
    while wanted:
        path = wanted.pop()
        if path in seen or path == "/static/bundle.js":
            continue
        seen.add(path)
        answer = browser.ask(path)
        assert answer.status == 200, path
        if path == "/tuner/static/plotly.js":
            assert len(answer.body) > 1_000_000
            continue
        assert not re.search(r"""(src|href|from|import)\s*[=(]?\s*["']?(https?:)?//""", answer.text), path
        wanted += re.findall(r'(?:src|href)="(/(?:tuner/)?static/[^"]+)"', answer.text)
        wanted += [f"/tuner/static/{name}" for name in re.findall(r'from "\./([a-z]+\.js)"', answer.text)]
    assert {
        f"/tuner/static/{name}" for name in ("live.js", "plots.js", "bridge.js", "style.css", "plotly.js")
    } <= seen


def test_the_pages_need_no_inline_script(browser: Browser) -> None:
    for path in ("/tuner/", "/tuner/studies/toy", "/tuner/login"):
        text = Browser(browser.app).ask(path).text
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son[a-z]+=|javascript:", text)


def test_files_are_asked_for_again_by_their_tag(browser: Browser) -> None:
    answer = browser.ask("/tuner/static/plotly.js")
    assert answer.headers["content-encoding"] == "gzip"
    again = browser.ask("/tuner/static/plotly.js", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    plain = browser.ask("/tuner/static/style.css", headers={"Accept-Encoding": ""})
    assert plain.body.startswith(b"/*")


@pytest.mark.parametrize("name", ["page.html", "..%2fweb.py", "../web.py", "login.html", "x.js"])
def test_other_files_are_not_served(browser: Browser, name: str) -> None:
    assert browser.ask(f"/tuner/static/{name}").status == 404


def test_a_trial_over_http(browser: Browser) -> None:
    answer = browser.ask("/tuner/api/studies/toy/trials/0")
    assert answer.json["value"] == 0.4
    assert answer.json["dashboard_id"] == 1
    assert answer.headers["cache-control"] == "no-store"
    again = browser.ask("/tuner/api/studies/toy/trials/0", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status == 304


@pytest.mark.parametrize("path", ["/tuner/api/studies/x", "/tuner/api/studies/toy/trials/77", "/tuner/dashboard/9"])
def test_what_is_not_there(browser: Browser, path: str) -> None:
    answer = browser.ask(path)
    assert answer.status == 404
    assert answer.json["reason"].startswith("expected a ")


def test_links_from_the_dashboard(browser: Browser) -> None:
    assert b"/tuner/static/bridge.js" in browser.ask("/dashboard/studies/1").body
    assert browser.ask("/tuner/dashboard/1").headers["location"] == "/tuner/studies/toy"
    assert browser.ask("/tuner/dashboard/1/3").headers["location"] == "/tuner/studies/toy/trials/3"


def test_the_database_is_away(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise DatabaseUnavailable("storage: postgresql://u:***@h/db: connection refused")

    browser = Browser(pages_app(study.database, dict))
    monkeypatch.setattr("tuner.pages_feed.status.read", away)
    answer = browser.ask("/tuner/api/service")
    assert (answer.status, answer.json["reason"]) == (503, "storage: postgresql://u:***@h/db: connection refused")
