"""Telling a webhook that a study has finished, stands still or keeps failing: once, whichever machine sees it."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import ValidationError

from storage.database import Database, StorageError, Unavailable, retry
from storage.runs import Holding, Store, StudyProgress, StudyRow
from tuner.formats import duration
from tuner.spec import NotifyEvent, NotifySpec
from tuner.study import MAX_BARREN_CRASHES

log = logging.getLogger("tuner")

# Nobody is told of what is older, when a study that ended long ago is first seen.
RECENT_S = 86400.0
# Somebody else tries when the one that claimed an event has not told of it by then. Sending begins within a quarter
# of that time, a webhook may take half of it, and the database that is to hear of it a quarter.
AGAIN_AFTER_S = 120.0
# A trial that killed its workers is looked for among so many of the newest.
_NEWEST = 20


@dataclass(frozen=True)
class Notice:
    """One event of a study; `key` tells the occasion from the next one of its kind."""

    event: NotifyEvent
    key: str
    text: str
    details: Mapping[str, Any]


class Notifier:
    """Tells the webhooks of a database's studies what is new; any number of machines may have one.

    Delivery is at least once: a notice comes twice only where its sender dies between the webhook's answer and
    the database hearing of it; both have the same `id`.

    Args:
        names: watch these studies alone; None: all.
    """

    def __init__(self, database: Database, names: Sequence[str] | None = None) -> None:
        self._store = Store(database)
        self._names = names
        self._posting: threading.Thread | None = None

    def check(self) -> None:
        """See what is new and send it from a thread of its own, so that no webhook holds the caller up.

        Raises:
            DatabaseUnavailable, StorageError: not looked.
        """
        if self._posting is not None and self._posting.is_alive():
            return
        due = list(self._due())
        if due:
            self._posting = threading.Thread(target=self._send, args=(due,), name="notify", daemon=True)
            self._posting.start()

    def close(self) -> None:
        """Check once more, and wait until all is sent or has failed."""
        self._join()
        self.check()
        self._join()

    def _join(self) -> None:
        if self._posting is not None:
            self._posting.join()

    def _due(self) -> Iterator[tuple[StudyProgress, NotifySpec, Notice]]:
        """What this process has the right to tell now."""
        watched = {
            row.id: spec
            for row in self._store.studies()
            if (self._names is None or row.name in self._names) and (spec := _spec_of(row)) is not None
        }
        if not watched:
            return
        now = database_time(self._store.database)
        holdings = [held for all_of_one in self._store.holdings().values() for held in all_of_one]
        for progress in self._store.progress():
            if (spec := watched.get(progress.row.id)) is None:
                continue
            for notice in notices(self._store, progress, spec, holdings, now):
                if self._claim(progress, notice):
                    yield progress, spec, notice

    def _claim(self, progress: StudyProgress, notice: Notice) -> bool:
        row = progress.row
        try:
            return self._store.claim_notification(row.id, notice.event, notice.key, AGAIN_AFTER_S)
        except Unavailable:
            raise
        except StorageError:
            if self._store.find_study(row.name) is None:  # deleted meanwhile
                return False
            raise

    def _send(self, due: Sequence[tuple[StudyProgress, NotifySpec, Notice]]) -> None:
        begun = time.monotonic()
        for progress, spec, notice in due:
            if time.monotonic() - begun > AGAIN_AFTER_S / 4:
                return  # whoever looks next claims the rest again
            fields = {"study": progress.row.name, "event": notice.event}
            try:
                _post(spec, body(progress, notice))
                self._mark(progress.row.id, notice)
                log.info("notified: %s", notice.text, extra={"action": "notify", **fields})
            except _NotSent as error:
                log.warning("not notified for now: %s", error, extra={"action": "notify_failed", **fields})
            except Unavailable as error:
                log.warning("notified, maybe twice: %s", error, extra={"action": "outage", **fields})

    def _mark(self, study_id: int, notice: Notice) -> None:
        told = notice.event, notice.key
        retry(lambda: self._store.sent_notification(study_id, *told), AGAIN_AFTER_S / 4, "notify")


def notices(
    store: Store, progress: StudyProgress, spec: NotifySpec, holdings: Sequence[Holding], now: float
) -> Iterator[Notice]:
    """What there is to tell of a study, told before or not.

    Args:
        holdings: those of all studies.
        now: seconds since 1970, by the database's clock.
    """
    if "finished" in spec.on and progress.n_ended >= progress.row.total:
        if now - (progress.last_ended_at or 0.0) < RECENT_S:
            yield _finished(progress)
    elif "stalled" in spec.on and progress.row.stop is None:
        since = _active_at(progress, holdings)
        if spec.stalled_after_s <= now - since < spec.stalled_after_s + RECENT_S:
            yield _stalled(progress, since, now)
    if "failed" in spec.on and progress.failed:
        yield from _failed(store, progress)


def _finished(progress: StudyProgress) -> Notice:
    text = (
        f"study {progress.row.name} has finished: {progress.complete} trials complete, {progress.pruned} pruned, "
        f"{progress.failed} failed"
    )
    return Notice("finished", str(progress.row.total), text, {})


def _stalled(progress: StudyProgress, since: float, now: float) -> Notice:
    row = progress.row
    text = (
        f"study {row.name} stands still: nothing measured for {duration(now - since)}, "
        f"{progress.n_ended} of {row.total} trials ended"
    )
    return Notice("stalled", f"{since:.3f}", text, {"still_s": round(now - since)})


def _failed(store: Store, progress: StudyProgress) -> Iterator[Notice]:
    """Since the newest run of the study began: all of the newest trials failed, or one that kills its workers."""
    row = progress.row
    limit = json.loads(row.spec)["max_failures_in_a_row"]
    newest = store.newest_ended(row.id, row.started_at, max(limit, _NEWEST))
    in_a_row = newest[:limit]
    if len(in_a_row) == limit and all(failure for _, failure in in_a_row):
        number, failure = in_a_row[0]
        text = f"study {row.name} keeps failing: {limit} trials in a row, the newest (trial {number}): {failure}"
        # By the start of the run: of several workers each may add one to the row.
        yield Notice("failed", f"row-{row.started_at:.3f}", text, {"trial": number, "failure": failure})
    for number, failure in newest:
        if failure and store.barren_crashes(row.id, number) >= MAX_BARREN_CRASHES:
            text = f"study {row.name}: trial {number} has failed: {failure}"
            yield Notice("failed", f"trial-{number}", text, {"trial": number, "failure": failure})


def _active_at(progress: StudyProgress, holdings: Sequence[Holding]) -> float:
    """When anything last happened to a study: begun, queued, a trial claimed, measured or ended."""
    row = progress.row
    claimed = [holding.claimed_at for holding in holdings if holding.study_name == row.name]
    times = (row.started_at, row.queued_at, progress.last_measured_at, progress.last_ended_at, *claimed)
    return max(time for time in times if time is not None)


def body(progress: StudyProgress, notice: Notice) -> dict[str, Any]:
    """What the webhook is sent: plain JSON values."""
    row = progress.row
    return {
        "id": f"{row.name}/{notice.event}/{notice.key}",
        "event": notice.event,
        "study": row.name,
        "text": notice.text,
        "n_trials": row.total,
        "n_ended": progress.n_ended,
        "complete": progress.complete,
        "pruned": progress.pruned,
        "failed": progress.failed,
        "running": progress.running,
        "waiting": progress.waiting,
        **notice.details,
    }


class _NotSent(Exception):
    """The webhook did not take it; the message names its host alone, since its path may be a secret."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _spec_of(row: StudyRow) -> NotifySpec | None:
    told = json.loads(row.spec).get("notify")
    try:
        return NotifySpec.model_validate(told) if told else None
    except ValidationError:
        return None  # of another version of tuner, whose supervisors tell


def _post(spec: NotifySpec, message: Mapping[str, Any]) -> None:
    host = urlsplit(spec.url).hostname
    request = urllib.request.Request(
        spec.url, json.dumps(message, allow_nan=False).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        _opener.open(request, timeout=spec.timeout_s).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise _NotSent(f"{host}: HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise _NotSent(f"{host}: {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _NotSent(f"{host}: {type(error).__name__}") from None


def database_time(database: Database) -> float:
    """Seconds since 1970 by the clock that all machines share."""
    with database.transaction() as connection:
        return float(connection.execute(sa.select(database.now)).scalar_one())
