"""Webhooks: what is told, once over all machines, and what happens where they do not answer."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from storage.database import Database, DatabaseUnavailable
from storage.runs import Store, StudyRow
from storage.tables import attempts, notifications, runs, studies
from tests.searches import dead, elsewhere, make_spec, make_study, new_worker, suggest_all, work_off
from tuner import notify
from tuner.notify import Notifier, NotifySpec
from tuner.study import Study


class Webhook(ThreadingHTTPServer):
    """Takes what is posted; answers with `status`, after `hold` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        self.hold = threading.Event()
        self.hold.set()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                webhook.hold.wait(20)
                posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook.got.append({**posted, "type": self.headers["Content-Type"]})
                self.send_response(webhook.status)
                if webhook.status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                webhook.got.append({"event": "redirected"})
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/t0ken"

    @property
    def events(self) -> list[str]:
        return [posted["event"] for posted in self.got]


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setenv("no_proxy", "*")
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


def make(database: Database, webhook: Webhook, name: str = "toy", n_trials: int = 2, **told: Any) -> Study:
    """A study of the toy trainer that tells the webhook."""
    spec = make_spec(study=name, n_trials=n_trials, notify={"url": webhook.url, **told})
    return make_study(database, spec, name)


def told(database: Database, *names: str) -> None:
    notifier = Notifier(database, names or None)
    notifier.check()
    notifier.close()


def fail(study: Study, worker: int, reason: str = "NaN") -> None:
    claim = study.claim(worker)
    assert claim is not None
    suggest_all(study, claim)
    study.end(claim, "failed", reason)


def shift(database: Database, study: Study, seconds: float) -> None:
    """Everything of the study happened so much earlier."""
    with database.transaction() as connection:
        row = studies.c.started_at - seconds
        connection.execute(studies.update().where(studies.c.id == study.id).values(started_at=row))
        for column in (runs.c.ended_at, runs.c.measured_at, attempts.c.claimed_at):
            table = column.table
            connection.execute(
                table.update().where(table.c.study_id == study.id).values({column.name: column - seconds})
            )


# --- the specification ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "hooks.example.org/x", "ftp://host/x", "file:///etc/passwd", "https://", "https:///path", "http://h:port/x",
     "https://h/a b", "https://h/a\nb", "https://[x/"],
)  # fmt: skip
def test_what_is_no_webhook_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValidationError, match="expected a URL like https://host/path"):
        NotifySpec(url=url)


def test_a_url_with_a_password_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected a URL without a user name or password") as caught:
        NotifySpec(url="https://ann:s3cret@host/x")
    assert "s3cret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "wrong",
    [{"on": []}, {"on": ["began"]}, {"stalled_after_s": 0}, {"stalled_after_s": float("inf")}, {"timeout_s": 0},
     {"timeout_s": 61}, {"to": "x"}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NotifySpec.model_validate({"url": "https://host/x", **wrong})


def test_defaults() -> None:
    spec = NotifySpec(url="https://host/x")
    assert (spec.on, spec.stalled_after_s, spec.timeout_s) == (("finished", "stalled", "failed"), 1800.0, 10.0)


# --- finished ------------------------------------------------------------------------------------------------


def test_a_finished_study_is_told_once_by_all_machines(database: Database, webhook: Webhook) -> None:
    study = make(database, webhook)
    worker = new_worker(study)
    for _ in range(2):
        told(database)
        claim = study.claim(worker)
        assert claim is not None
        work_off(study, claim)
    told(database)
    told(database)
    assert webhook.got == [
        {
            "id": "toy/finished/2", "event": "finished", "study": "toy",
            "text": "study toy has finished: 2 trials complete, 0 pruned, 0 failed",
            "n_trials": 2, "n_ended": 2, "complete": 2, "pruned": 0, "failed": 0, "running": 0, "waiting": 0,
            "type": "application/json",
        }
    ]  # fmt: skip
    study.store.start_study(study.id, 3, 0)  # a higher total is another end
    told(database)
    claim = study.claim(worker)
    assert claim is not None
    work_off(study, claim)
    told(database)
    assert [posted["id"] for posted in webhook.got] == ["toy/finished/2", "toy/finished/3"]


def test_eight_notifiers_at_once_tell_once(database: Database, webhook: Webhook) -> None:
    study = make(database, webhook, n_trials=1)
    claim = study.claim(new_worker(study))
    assert claim is not None
    work_off(study, claim)
    database.engine.dispose()
    urls = [Database(database.url.render_as_string(hide_password=False)) for _ in range(8)]
    threads = [threading.Thread(target=told, args=(one,)) for one in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in urls:
        one.close()
    assert webhook.events == ["finished"]


def test_only_what_was_asked_for_is_told(sqlite: Database, webhook: Webhook) -> None:
    quiet = make(sqlite, webhook, "quiet", n_trials=1, on=["stalled"])
    none = make_study(sqlite, make_spec(study="none", n_trials=1), "none")
    other = make(sqlite, webhook, "other", n_trials=1)
    watched = make(sqlite, webhook, "watched", n_trials=1)
    for study in (quiet, none, other, watched):
        claim = study.claim(new_worker(study))
        assert claim is not None
        work_off(study, claim)
    told(sqlite, "watched", "quiet", "none")
    assert [posted["study"] for posted in webhook.got] == ["watched"]


def test_what_ended_long_ago_is_no_news(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, n_trials=1)
    claim = study.claim(new_worker(study))
    assert claim is not None
    work_off(study, claim)
    shift(sqlite, study, notify.RECENT_S + 60)
    told(sqlite)
    assert webhook.got == []


# --- stalled -------------------------------------------------------------------------------------------------


def test_a_study_that_stands_still_is_told_once_each_time(database: Database, webhook: Webhook) -> None:
    study = make(database, webhook, n_trials=4, stalled_after_s=100)
    worker = new_worker(study)
    claim = study.claim(worker)
    assert claim is not None
    work_off(study, claim)
    shift(database, study, 90)
    told(database)
    assert webhook.got == []
    shift(database, study, 30)
    told(database)
    told(database)
    assert webhook.events == ["stalled"]
    assert webhook.got[0]["text"] == "study toy stands still: nothing measured for 2.0 min, 1 of 4 trials ended"
    assert 120 <= webhook.got[0]["still_s"] <= 150
    claim = study.claim(worker)  # it goes on ...
    assert claim is not None
    told(database)
    assert len(webhook.got) == 1
    shift(database, study, 120)  # ... and stalls in the hands of its worker
    told(database)
    assert webhook.events == ["stalled", "stalled"]


def test_a_queued_study_that_nobody_serves_stalls(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, stalled_after_s=100)
    shift(sqlite, study, 200)
    study.store.queue_study(study.id)
    told(sqlite)
    assert webhook.got == []  # it was queued just now
    with sqlite.transaction() as connection:
        connection.execute(studies.update().values(queued_at=studies.c.queued_at - 150))
    told(sqlite)
    assert webhook.events == ["stalled"]


def test_a_study_that_was_just_claimed_does_not_stall(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, stalled_after_s=100)
    shift(sqlite, study, 200)
    study.claim(new_worker(study))
    told(sqlite)
    assert webhook.got == []


@pytest.mark.parametrize("mode", ["drain", "now"])
def test_a_stopped_study_does_not_stall(sqlite: Database, webhook: Webhook, mode: Any) -> None:
    study = make(sqlite, webhook, stalled_after_s=100)
    shift(sqlite, study, 200)
    study.store.stop_study(study.id, mode)
    told(sqlite)
    assert webhook.got == []


def test_a_study_given_up_long_ago_is_no_news(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, stalled_after_s=100)
    shift(sqlite, study, notify.RECENT_S + 200)
    told(sqlite)
    assert webhook.got == []


# --- failed --------------------------------------------------------------------------------------------------


def test_failures_in_a_row_are_told_once_for_each_run_of_the_study(database: Database, webhook: Webhook) -> None:
    study = make(database, webhook, n_trials=20)
    worker = new_worker(study)
    fail(study, worker)
    fail(study, worker)
    told(database)
    assert webhook.got == []
    fail(study, worker, "loss is NaN")
    told(database)
    assert webhook.events == ["failed"]
    assert webhook.got[0]["text"] == (
        "study toy keeps failing: 3 trials in a row, the newest (trial 2): loss is NaN"
    )
    assert (webhook.got[0]["trial"], webhook.got[0]["failure"]) == (2, "loss is NaN")
    study.store.stop_study(study.id, "drain")  # as its workers do
    told(database)
    assert len(webhook.got) == 1
    shift(database, study, 10)
    study.store.start_study(study.id, 20, 0)
    told(database)
    assert len(webhook.got) == 1  # what failed before counts no more
    for _ in range(3):
        fail(study, worker)
    told(database)
    assert len(webhook.got) == 2


def test_a_success_between_failures_is_no_row(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, n_trials=20)
    worker = new_worker(study)
    for _ in range(2):
        fail(study, worker)
    claim = study.claim(worker)
    assert claim is not None
    work_off(study, claim)
    for _ in range(2):
        fail(study, worker)
    told(sqlite)
    assert webhook.got == []


def test_a_trial_that_killed_its_workers_is_told_by_its_number(sqlite: Database, webhook: Webhook) -> None:
    study = make(sqlite, webhook, n_trials=20)
    for _ in range(3):
        claim = study.claim(new_worker(study, dead()))
        assert claim is not None
        assert claim.number == 0
        study.recover(crashed=True)
    told(sqlite)
    told(sqlite)
    assert webhook.events == ["failed"]
    assert webhook.got[0]["id"] == "toy/failed/trial-0"
    assert "died 3 times in a row without a new checkpoint" in webhook.got[0]["text"]


# --- a webhook that does not answer --------------------------------------------------------------------------


@pytest.fixture
def finished(sqlite: Database, webhook: Webhook) -> StudyRow:
    study = make(sqlite, webhook, n_trials=1)
    claim = study.claim(new_worker(study, elsewhere()))
    assert claim is not None
    work_off(study, claim)
    return study.store.get_study(study.id)


def age_claims(database: Database, seconds: float) -> None:
    with database.transaction() as connection:
        connection.execute(notifications.update().values(claimed_at=notifications.c.claimed_at - seconds))


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_refusal_is_logged_without_its_path_and_tried_again(
    sqlite: Database, webhook: Webhook, finished: StudyRow, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.status = status
    told(sqlite)
    told(sqlite)
    assert webhook.events == ["finished"]  # not again at once
    record = next(r for r in caplog.records if r.levelno == logging.WARNING)
    assert record.getMessage() == f"not notified for now: 127.0.0.1: HTTP {status}"
    assert (record.action, record.study, record.event) == ("notify_failed", "toy", "finished")  # type: ignore[attr-defined]
    assert "t0ken" not in caplog.text
    webhook.status = 200
    age_claims(sqlite, notify.AGAIN_AFTER_S + 1)
    told(sqlite)
    age_claims(sqlite, notify.AGAIN_AFTER_S + 1)
    told(sqlite)
    assert webhook.events == ["finished", "finished"]


def test_nobody_there_is_logged_too(
    sqlite: Database, webhook: Webhook, finished: StudyRow, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.shutdown()
    webhook.server_close()
    told(sqlite)
    text = caplog.text
    assert "not notified for now: 127.0.0.1: [Errno 111] Connection refused" in text
    assert "t0ken" not in text


def test_a_slow_webhook_does_not_hold_the_caller_up(sqlite: Database, webhook: Webhook, finished: StudyRow) -> None:
    webhook.hold.clear()
    notifier = Notifier(sqlite)
    notifier.check()
    other = make(sqlite, webhook, "other", n_trials=1)
    claim = other.claim(new_worker(other))
    assert claim is not None
    work_off(other, claim)
    notifier.check()
    assert [thread.name for thread in threading.enumerate()].count("notify") == 1
    assert webhook.got == []
    webhook.hold.set()
    notifier.close()
    assert [posted["study"] for posted in webhook.got] == ["toy", "other"]


def test_one_that_never_answers_is_given_up_after_its_time(
    sqlite: Database, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    study = make(sqlite, webhook, n_trials=1, timeout_s=0.1)
    claim = study.claim(new_worker(study))
    assert claim is not None
    work_off(study, claim)
    webhook.hold.clear()
    began = time.monotonic()
    told(sqlite)
    assert time.monotonic() - began < 4
    assert "not notified for now: 127.0.0.1: " in caplog.text
    with sqlite.transaction() as connection:
        assert connection.scalar(sa.select(notifications.c.sent_at)) is None


def test_what_cannot_begin_in_time_is_left_to_the_next(
    sqlite: Database, webhook: Webhook, finished: StudyRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "AGAIN_AFTER_S", -1.0)
    told(sqlite)
    assert webhook.got == []


def test_the_database_away_is_the_callers_to_know(
    sqlite: Database, webhook: Webhook, finished: StudyRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise DatabaseUnavailable("storage: away")

    monkeypatch.setattr(Store, "claim_notification", away)
    with pytest.raises(DatabaseUnavailable):
        Notifier(sqlite).check()
    assert webhook.got == []


def test_a_section_of_another_version_is_passed_over(
    sqlite: Database, webhook: Webhook, finished: StudyRow
) -> None:
    spec = json.loads(finished.spec)
    spec["notify"] = {**spec["notify"], "of_later": True}
    Store(sqlite).update_study(finished.id, json.dumps(spec), "99", finished.data)
    told(sqlite)
    assert webhook.got == []


def test_a_study_deleted_meanwhile_is_passed_over(
    sqlite: Database, webhook: Webhook, finished: StudyRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Store.claim_notification

    def deleted(store: Store, study_id: int, *told: Any) -> bool:
        store.delete_study(study_id)
        return claim(store, study_id, *told)

    monkeypatch.setattr(Store, "claim_notification", deleted)
    told(sqlite)
    assert webhook.got == []
