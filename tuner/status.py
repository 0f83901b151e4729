"""The service at a glance: workers and their leases, every study's pace, the queue. From our own tables alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from storage.database import Database, DatabaseUnavailable, mask
from storage.runs import Holding, Store, StudyProgress, WorkerRow
from tuner.catalog import is_alive
from tuner.formats import clock, duration, print_parts, table
from tuner.notify import database_time

WATCH_EVERY_S = 2.0
# A table shows no more studies than this: those at work and in the queue first, then the newest.
N_STUDIES = 20

StudyState = Literal["running", "queued", "stopping", "stopped", "done", "idle"]
_BUSY = ("running", "stopping", "queued")


@dataclass(frozen=True)
class WorkerStatus:
    """A worker: `alive`; `stale` (its process is gone, or its lease has run out); or `ended` in order."""

    row: WorkerRow
    state: Literal["alive", "stale", "ended"]
    holdings: Sequence[Holding]


@dataclass(frozen=True)
class StudyStatus:
    """A study and its pace.

    Attributes:
        state: `running` trials; `queued` for workers; `stopping` (`tuner stop` waits for running trials);
            `stopped`; `done` (its total has ended); `idle` (budget left, but neither run nor queued).
        running, waiting: begun trials in the hands of a living worker, and the others.
        place: in the queue, from 1; None: not in it.
        trials_per_hour: ended in the last hour (or since the first began, if that is less); None before the first,
            and while nothing runs.
        remaining_s: to the total at that pace; None where nothing runs or ends.
    """

    progress: StudyProgress
    state: StudyState
    running: int
    waiting: int
    place: int | None
    trials_per_hour: float | None
    remaining_s: float | None

    @property
    def name(self) -> str:
        return self.progress.row.name

    @property
    def left(self) -> int:
        return max(0, self.progress.row.total - self.progress.n_ended)


@dataclass(frozen=True)
class ServiceStatus:
    """Everything at one time: `now`, in seconds since 1970 by the database's clock. `database` has no password."""

    database: str
    now: float
    studies: Sequence[StudyStatus]
    workers: Sequence[WorkerStatus]

    @property
    def queue(self) -> list[StudyStatus]:
        """The studies with budget left that wait for `tuner worker` or are served by it, in turn."""
        return sorted((s for s in self.studies if s.place is not None), key=lambda s: s.place or 0)


def read(database: Database) -> ServiceStatus:
    """Four queries, whatever the number of trials.

    Raises:
        DatabaseUnavailable, StorageError: nothing could be read.
    """
    store = Store(database)
    now = database_time(database)
    holdings = store.holdings()
    workers = [_worker(row, holdings.get(row.id, [])) for row in store.workers()]
    at_work = [held.study_name for w in workers if w.state == "alive" for held in w.holdings]
    progress = store.progress()
    waiting = sorted((p for p in progress if _is_queued(p)), key=lambda p: (p.row.queued_at or 0.0, p.row.id))
    places = {p.row.id: place for place, p in enumerate(waiting, start=1)}
    studies = [_study(p, at_work.count(p.row.name), places.get(p.row.id), now) for p in progress]
    return ServiceStatus(mask(database.url), now, studies, workers)


def _worker(row: WorkerRow, holdings: Sequence[Holding]) -> WorkerStatus:
    if row.ended_at is not None:
        return WorkerStatus(row, "ended", [])
    return WorkerStatus(row, "alive" if is_alive(row) else "stale", holdings)


def _is_queued(progress: StudyProgress) -> bool:
    return progress.row.queued_at is not None and progress.n_ended < progress.row.total


def _study(progress: StudyProgress, running: int, place: int | None, now: float) -> StudyStatus:
    state = _state(progress, running, place)
    pace = None
    if running and progress.first_started_at is not None and progress.n_ended:
        hours = min(3600.0, max(1.0, now - progress.first_started_at)) / 3600.0
        pace = progress.ended_last_hour / hours
    left = progress.row.total - progress.n_ended
    remaining_s = left / pace * 3600.0 if pace and state == "running" else None
    waiting = progress.running + progress.waiting - running
    return StudyStatus(progress, state, running, waiting, place, pace, remaining_s)


def _state(progress: StudyProgress, running: int, place: int | None) -> StudyState:
    if progress.n_ended >= progress.row.total:
        return "done"
    if progress.row.stop is not None:
        return "stopping" if running else "stopped"
    if running:
        return "running"
    return "queued" if place is not None else "idle"


def as_json(status: ServiceStatus) -> dict[str, Any]:
    """`tuner status --format json`: everything, as plain values; times in seconds since 1970."""
    return {
        "database": status.database,
        "now": status.now,
        "queue": [study.name for study in status.queue],
        "studies": [_study_json(study) for study in status.studies],
        "workers": [_worker_json(worker) for worker in status.workers],
    }


def _study_json(study: StudyStatus) -> dict[str, Any]:
    progress, row = study.progress, study.progress.row
    return {
        "study": row.name, "state": study.state, "place": study.place, "stop": row.stop, "n_trials": row.total,
        "n_ended": progress.n_ended, "complete": progress.complete, "pruned": progress.pruned,
        "failed": progress.failed, "running": study.running, "waiting": study.waiting,
        "trials_per_hour": study.trials_per_hour, "remaining_s": study.remaining_s, "queued_at": row.queued_at,
        "started_at": row.started_at, "last_measured_at": progress.last_measured_at,
        "last_ended_at": progress.last_ended_at,
    }  # fmt: skip


def _worker_json(worker: WorkerStatus) -> dict[str, Any]:
    row = worker.row
    return {
        "worker": row.id, "state": worker.state, "host": row.identity.host, "pid": row.identity.pid,
        "device": row.device, "started_at": row.started_at, "lease_age_s": row.age_s, "ended_at": row.ended_at,
        "holdings": [
            {
                "study": held.study_name, "trial": held.number, "attempt": held.attempt, "arm": held.arm,
                "step": held.step, "claimed_at": held.claimed_at, "measured_at": held.measured_at,
            }
            for held in worker.holdings
        ],
    }  # fmt: skip


# --- for a person --------------------------------------------------------------------------------------------


def tables(status: ServiceStatus, width: int | None = None) -> Iterator[str | Table]:
    """What `tuner status` prints. Where `width` (None: the terminal's) is short of columns the less important ones
    are left out."""
    if width is None:
        console = Console()
        width = console.width if console.is_terminal else 400
    yield _headline(status)
    shown = _shown_studies(status.studies)
    if shown:
        yield ""
        yield _fitted("studies", _STUDY_COLUMNS, [_study_cells(study, status.now) for study in shown], width)
    if len(shown) < len(status.studies):
        yield f"other studies: {len(status.studies) - len(shown)} (`tuner studies` lists all)"
    workers = [w for w in status.workers if w.state == "alive" or w.holdings]
    if workers:
        yield ""
        workers.sort(key=lambda w: (w.row.identity.host, w.row.device, w.row.id))
        yield _fitted("workers", _WORKER_COLUMNS, [
            line for worker in workers for line in _worker_lines(worker, status.now)
        ], width)  # fmt: skip
    if len(workers) < len(status.workers):
        yield f"workers that ended or died lately: {len(status.workers) - len(workers)}"


def _headline(status: ServiceStatus) -> str:
    states = [worker.state for worker in status.workers]
    n_stale = sum(worker.state == "stale" and bool(worker.holdings) for worker in status.workers)
    stale = f" (and {n_stale} stale with a trial in hand)" if n_stale else ""
    left = sum(study.left for study in status.queue)
    queue = f"{len(status.queue)} ({left} {'trial' if left == 1 else 'trials'} to go)" if status.queue else "0"
    return (
        f"{status.database}  {clock(status.now)}\n"
        f"workers alive: {states.count('alive')}{stale}; studies in the queue: {queue}"
    )


def _shown_studies(studies: Sequence[StudyStatus]) -> list[StudyStatus]:
    def order(study: StudyStatus) -> tuple[bool, bool, int, float]:
        return study.state not in _BUSY, study.place is None, study.place or 0, -study.progress.row.started_at

    return sorted(studies, key=order)[:N_STUDIES]


# Columns and how much each matters: the highest numbers are the first to go where the terminal is narrow.
_STUDY_COLUMNS = {
    "study": 0, "state": 0, "queue": 3, "trials": 0, "running": 1, "waiting": 4, "complete": 5, "pruned": 5,
    "failed": 2, "trials/h": 1, "to go": 0, "measured": 3,
}  # fmt: skip
_WORKER_COLUMNS = {
    "worker": 1, "host": 0, "pid": 3, "device": 0, "lease age": 0, "study": 0, "trial": 0, "attempt": 5, "arm": 4,
    "step": 0, "measured": 2,
}  # fmt: skip

_LONG = ("study", "host")


def _study_cells(study: StudyStatus, now: float) -> dict[str, Any]:
    progress = study.progress
    to_go = duration(study.remaining_s) if study.state == "running" else ""
    return {
        "study": study.name, "state": study.state, "queue": study.place,
        "trials": f"{progress.n_ended}/{progress.row.total}", "running": study.running, "waiting": study.waiting,
        "complete": progress.complete, "pruned": progress.pruned, "failed": progress.failed,
        "trials/h": _pace(study.trials_per_hour), "to go": to_go, "measured": _ago(progress.last_measured_at, now),
    }  # fmt: skip


def _worker_lines(worker: WorkerStatus, now: float) -> list[dict[str, Any]]:
    """One for each trial that it has in hand."""
    row = worker.row
    cells = {
        "worker": row.id, "host": row.identity.host, "pid": row.identity.pid, "device": row.device,
        "lease age": ("stale, " if worker.state == "stale" else "") + duration(row.age_s),
    }  # fmt: skip
    if not worker.holdings:
        return [{**cells, "study": "idle"}]
    return [
        {
            **cells, "study": held.study_name, "trial": held.number, "attempt": held.attempt, "arm": held.arm,
            "step": held.step, "measured": _ago(held.measured_at, now),
        }
        for held in worker.holdings
    ]  # fmt: skip


def _pace(per_hour: float | None) -> float | None:
    return per_hour if per_hour is None else round(per_hour, 1 if per_hour < 10 else None)


def _ago(moment: float | None, now: float) -> str:
    return "" if moment is None else f"{duration(max(0.0, now - moment))} ago"


def _fitted(title: str, columns: Mapping[str, int], cells: Sequence[Mapping[str, Any]], width: int) -> Table:
    """A table without the columns that matter least, as many as must for the others to fit; then names are cut."""
    kept = list(columns)
    while True:
        drawn = table(title, kept, [[row.get(name) for name in kept] for row in cells])
        for index in (kept.index(name) for name in _LONG if name in kept):
            drawn.columns[index].no_wrap = False  # rich narrows these first
        worst = max(columns[name] for name in kept)
        if worst == 0 or Console(width=10_000).measure(drawn).maximum <= width:
            return drawn
        kept = [name for name in kept if columns[name] < worst]


def watch(database: Database, console: Console | None = None, every_s: float = WATCH_EVERY_S) -> None:
    """Show the status live until Ctrl-C: on a terminal in place, elsewhere one table after the other.

    A database that goes away meanwhile is told above what was last known.

    Raises:
        DatabaseUnavailable, StorageError: nothing could be read at the beginning, or not for another reason later.
    """
    console = console or Console()
    readings = _readings(database, every_s)
    parts: list[str | Table] = []
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            # The alternate screen: nothing is left of an earlier, wider picture when the terminal shrinks.
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for status, trouble in readings:
                    parts = [*trouble, *tables(status, console.width)]
                    live.update(Group(*(Text(p) if isinstance(p, str) else p for p in parts)), refresh=True)
        else:
            for status, trouble in readings:
                print_parts([*trouble, *tables(status), ""])
    print_parts(parts)


def _readings(database: Database, every_s: float) -> Iterator[tuple[ServiceStatus, list[str]]]:
    """The status again and again, and what stands in the way of a newer one. A large database takes long to read:
    never is more than a twentieth of the time spent on it."""
    status, trouble, cost_s = read(database), [], 0.0
    while True:
        yield status, trouble
        time.sleep(max(every_s, 20 * cost_s))
        begun = time.monotonic()
        try:
            status, trouble = read(database), []
            cost_s = time.monotonic() - begun
        except DatabaseUnavailable as error:
            trouble = [f"database away, below is what was known at {clock(status.now)}: {error}"]
