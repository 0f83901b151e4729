"""The service: studies queued in the database, served by supervisors on any number of machines.

A supervisor (`tuner worker`) trains nothing and owns no trial: it starts one worker process a device, replaces
those that die, and puts back at once what they held.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.trainer import InputError
from storage.artifacts import open_artifacts
from storage.database import Database, DatabaseUnavailable, StorageError, retry
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.runs import Store, StudyRow
from tuner.catalog import find_name, open_database
from tuner.coordinator import Observer, RunOptions, open_study, prepare, tell_of_lower_total
from tuner.crew import Crew, choose_devices
from tuner.notify import Notifier
from tuner.study import Study
from tuner.worker import AUTO, OUTAGE_S, STOP_GRACE_S, UPLOAD_EVERY_S, WorkerOptions

log = logging.getLogger("tuner")

CHECK_EVERY_S = 30.0
# A database that restarts while a supervisor starts is waited for this long.
START_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ServiceOptions:
    """What `tuner worker` was asked for.

    Args:
        roots: folders below which data are found by their hashes.
        artifacts: URL of the artifact store; None: checkpoints stay in `runs`.
    """

    storage: str
    studies: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("data",)
    devices: str = "auto"
    workers: int | None = None
    runs: str = "runs"
    slots: int | Literal["auto"] = AUTO
    artifacts: str | None = None
    upload_every_s: float = UPLOAD_EVERY_S
    stop_grace_s: float = STOP_GRACE_S
    metrics_port: int | None = None
    outage_s: float = OUTAGE_S
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S


def submit(options: RunOptions, observer: Observer) -> StudyRow:
    """Put a study and its budget into the queue: made, or continued if what was asked for is what it is.

    Raises:
        InputError, StorageError: refused, nothing was written.
    """
    spec, manifest, database = prepare(options)
    try:
        observer.say(f"data: {manifest.source}")
        study = open_study(spec, manifest, options, database)
        tell_of_lower_total(study, options, observer)
        study.store.start_study(study.id, options.n_trials or spec.n_trials, 0)
        study.store.queue_study(study.id)
        return study.store.get_study(study.id)
    finally:
        database.close()


def stop(url: str, reference: str, name: str | None, now: bool) -> tuple[str, int]:
    """Take a study out of the queue; what runs of it is finished, or with `now` left at its next measurement.

    Returns:
        The study's name and how many of its trials are running.
    """
    database = open_database(url, read_only=False)
    try:
        store = Store(database)
        found = store.find_study(find_name(database, reference, name))
        assert found is not None
        store.stop_study(found.id, "now" if now else "drain")
        return found.name, store.progress(found.id)[0].running
    finally:
        database.close()


def serve(options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Serve queued studies on this machine's devices until a signal.

    Raises:
        InputError, StorageError: refused before anything was started.
        RunFailed: a worker gave up, or all keep dying.
    """
    devices = choose_devices(options.devices, options.workers)
    if options.artifacts:
        open_artifacts(options.artifacts)
    patience_s = min(options.outage_s, START_PATIENCE_S)
    database = retry(lambda: open_database(options.storage, read_only=False), patience_s, "database")
    try:
        retry(lambda: _warn(database, options, say), patience_s, "database")
        supervisor = _Supervisor(database, options, devices, say)
        crew = supervisor.crew()
        url = database.url.render_as_string(hide_password=False)
        if options.metrics_port is not None:
            from tuner.metrics import serve_metrics

            serve_metrics(options.metrics_port, url, crew)
        # What died here before we began says nothing of its trial.
        retry(supervisor.put_back, patience_s, "put back")
        try:
            crew.see_through(supervisor.tick)
        finally:
            supervisor.close()
    finally:
        database.close()


def _warn(database: Database, options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Say what is no fault, and yet may not be what was meant."""
    if not options.artifacts and not database.is_sqlite:
        say("no artifact store (--artifacts): a trial that moves to another machine begins again there")
    for root in options.roots:
        if not Path(root).exists():
            say(f"--data {root}: no such folder; studies of real data are not served without theirs")
    stored = [row.name for row in Store(database).studies()]
    for name in set(options.studies) - set(stored):
        there = f"there is {', '.join(stored)}" if stored else "there is none yet"
        say(f"--study {name}: not in the database ({there}); waiting for it")


class _Supervisor:
    """What a supervisor does beside its worker processes."""

    def __init__(
        self, database: Database, options: ServiceOptions, devices: list[str], say: Callable[[str], None]
    ) -> None:
        self._database = database
        self._store = Store(database)
        self._options = options
        self._devices = devices
        self._say = say
        self._notifier = Notifier(database)
        self._next_check = 0.0
        self._greeted = False

    def crew(self) -> Crew:
        options = self._options
        worker = WorkerOptions(
            device="", runs=str(Path(options.runs).absolute()), cache=str(Path(options.runs).absolute() / "cache"),
            studies=options.studies, roots=tuple(str(Path(root).absolute()) for root in options.roots),
            artifacts=options.artifacts, upload_every_s=options.upload_every_s, stay=True,
            slots=options.slots, stop_grace_s=options.stop_grace_s, outage_s=options.outage_s,
            renew_every_s=options.renew_every_s, grace_s=options.grace_s,
        )  # fmt: skip
        url = self._database.url.render_as_string(hide_password=False)
        return Crew(self._devices, worker, url, Path(options.runs) / "worker-logs", self._say, self._on_death)

    def tick(self) -> None:
        if not self._greeted:  # only now: a signal that follows finds workers to stop in order
            served = ", ".join(self._options.studies) or "every queued study"
            self._say(f"serving {served}; workers: {', '.join(self._devices)}")
            self._greeted = True
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_EVERY_S
        try:
            self._notifier.check()
        except StorageError as error:  # in nobody's way
            log.warning("notifications not looked for: %s", error, extra={"action": "outage"})

    def close(self) -> None:
        try:
            self.put_back()
            self._notifier.close()
        except StorageError as error:  # in the way of no other reason to leave
            log.warning("not put back: %s", error, extra={"action": "outage"})

    def _on_death(self, crashed: bool) -> int:
        self.put_back(crashed)
        # A worker that dies of a trial is no reason to stop: the poison rule ends that trial, then its study.
        return self._store.count_measurements() + self._store.count_attempts()

    def put_back(self, crashed: bool = False) -> None:
        """Put back what workers held that died on this machine; whatever is left is for whoever asks next."""
        names = {held.study_name for holdings in self._store.holdings().values() for held in holdings}
        for name in sorted(names):
            try:
                Study.open(self._database, name).recover(crashed=crashed)
            except DatabaseUnavailable:
                raise
            except (StorageError, InputError) as error:  # deleted meanwhile, or of another version
                log.warning("not put back: %s", error, extra={"action": "outage", "study": name})
