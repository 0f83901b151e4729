"""The process around a worker: `python -m tuner.worker_process`, started by a supervisor, one a device.

It stops in order, at the next measurement, on SIGTERM, SIGINT or the end of its standard input (its supervisor
died); its trial goes back in the queue. Its last line on standard output is JSON: how it ended.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import models
from models.location import locate
from models.trainer import SEARCH_ROLES, DataSpec, DiskError, FileStamp, InputError, Role
from storage.artifacts import open_artifacts
from storage.database import Database, DatabaseUnavailable, StorageError, Unavailable, retry
from storage.leases import LeaseThread, ProcessIdentity
from storage.runs import Store, StudyRow
from tuner import logs
from tuner.course import reason_of
from tuner.source import problems_of
from tuner.study import Study, TooManyFailures
from tuner.uploads import Uploads
from tuner.worker import IDLE_POLL_S, DeviceFault, Worker, WorkerOptions

log = logging.getLogger("tuner")

FAILED_EXIT = 1
REFUSED_EXIT = 2
INTERRUPTED_EXIT = 130
# Idle workers of a service look for work less and less often, down to this.
LONGEST_POLL_S = 5.0
# A study that cannot be served here (its data are not at hand, say) is tried again this often.
REFUSED_STUDY_S = 60.0


class Server:
    """Serves studies one after the other: those of its options, or whatever is queued, oldest first."""

    def __init__(
        self, database: Database, options: WorkerOptions, stop: threading.Event, worker_id: int,
        steady: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._database = database
        self._store = Store(database)
        self._options = options
        self._stop = stop
        self._worker_id = worker_id
        self._steady = steady
        self._artifacts = open_artifacts(options.artifacts) if options.artifacts else None
        self._worker: Worker | None = None  # of the study that was served last, with its data
        self._row: StudyRow | None = None
        self._refused_until: dict[str, float] = {}
        self._fit_s = 0.0

    @property
    def fit_s(self) -> float:
        return self._fit_s + (self._worker.fit_s if self._worker else 0.0)

    def serve(self) -> None:
        """Work until nothing is left to do (`stay`: until told to stop). Raises what Worker.serve raises."""
        if not self._options.stay:
            for name in self._options.studies:
                self._open(self._find(name)).serve()
            return
        poll_s = IDLE_POLL_S
        while not self._stop.is_set():
            rows = retry(self._store.queued_studies, self._options.outage_s, "queue")
            if any(self._work(row) for row in self._served(rows) if not self._stop.is_set()):
                poll_s = IDLE_POLL_S
            else:
                self._stop.wait(poll_s * random.uniform(0.5, 1.0))
                poll_s = min(2 * poll_s, LONGEST_POLL_S)

    def abandon(self) -> None:
        """Give back what is in hand and sign off, from another thread; the process ends right after."""
        if self._worker is not None:
            self._worker.abandon()
        with suppress(StorageError):
            self._store.end_worker(self._worker_id)

    def _find(self, name: str) -> StudyRow:
        row = retry(lambda: self._store.find_study(name), self._options.outage_s, "study")
        if row is None:
            raise StorageError(f"storage: study {name!r} is not in {self._database!r}")
        return row

    def _served(self, rows: Sequence[StudyRow]) -> Sequence[StudyRow]:
        now = time.monotonic()
        return [
            row
            for row in rows
            if (not self._options.studies or row.name in self._options.studies)
            and now >= self._refused_until.get(row.name, now)
        ]

    def _work(self, row: StudyRow) -> bool:
        """Take trials of a queued study, as long as it is the one to serve; False where there was none for us.
        One bad study stops no other."""
        try:
            if not self._is_open(row) and not self._has_work(row):
                return False
            worker = self._open(row)  # which may have taken long
            return not self._stop.is_set() and worker.work(self._is_next)
        except TooManyFailures as error:
            log.error("study stopped: %s", error, extra={"action": "study_stopped", "study": row.name})
            retry(lambda: self._store.stop_study(row.id, "drain"), self._options.outage_s, "stop")
        except InputError as error:
            log.error("study not served: %s", error, extra={"action": "study_refused", "study": row.name})
            self._refused_until[row.name] = time.monotonic() + REFUSED_STUDY_S
        except (Unavailable, DiskError):
            raise
        except StorageError:
            if self._is_there(row):
                raise
            log.warning("study deleted", extra={"action": "study_deleted", "study": row.name})
            self._forget()
        return False

    def _is_there(self, row: StudyRow) -> bool:
        found = self._store.find_study(row.name)
        return found is not None and found.id == row.id

    def _is_open(self, row: StudyRow) -> bool:
        return self._row is not None and (self._row.id, self._row.spec) == (row.id, row.spec)

    def _is_next(self) -> bool:
        """Whether the open study is still what would be served next, now that it leaves a slot free. Asked while
        others of its trials train: raises DatabaseUnavailable at once."""
        for row in self._served(self._store.queued_studies()):
            if self._row is not None and row.id == self._row.id:
                return self._is_open(row)  # a changed specification waits for what is in hand
            # What is wrong with another study is told in its turn.
            try:
                if self._has_work(row, 0.0):
                    return False
            except DatabaseUnavailable:
                raise
            except (InputError, StorageError) as error:
                log.info("not looked at for now: %s", error, extra={"action": "study_skipped", "study": row.name})
        return False

    def _has_work(self, row: StudyRow, patience_s: float | None = None) -> bool:
        """Asked before data are loaded, which may take minutes, and those of another study are dropped for them."""

        def ask() -> bool:
            study = Study.open(self._database, row.name)
            with study.search.without_patience() if patience_s == 0.0 else nullcontext():
                return study.has_work(self._worker_id, self._steady(), self._options.grace_s)

        return retry(ask, self._options.outage_s if patience_s is None else patience_s, "claim")

    def _forget(self) -> None:
        self._fit_s, self._worker, self._row = self.fit_s, None, None

    def _open(self, row: StudyRow) -> Worker:
        """The worker for a study; data stay loaded while it is the same study with the same specification."""
        if self._is_open(row):
            assert self._worker is not None
            return self._worker
        self._forget()
        study = retry(lambda: Study.open(self._database, row.name), self._options.outage_s, "study")
        own_folder(Path(self._options.runs) / row.name, row)
        trainer = models.get_trainer(study.spec.trainer)
        data = load_data(trainer, study.spec.data, json.loads(row.data), self._options)
        uploads = Uploads(self._artifacts, study.name, self._options.upload_every_s) if self._artifacts else None
        self._worker = Worker(
            study, trainer, data, self._worker_id, self._options, self._stop, self._steady, uploads
        )
        self._row = row
        log.info("study opened", extra={"action": "open", "study": row.name, "data": data.manifest.source})
        return self._worker


def own_folder(folder: Path, row: StudyRow) -> None:
    """Mark the study's folder of this machine as its own.

    A study that was deleted on another machine has left its checkpoints here; a new one of that name must not go
    on from them.

    Raises:
        InputError: it holds the trials of another study.
        DiskError: it cannot be written.
    """
    marker, mine = folder / "study.json", {"id": row.id, "name": row.name, "created_at": row.created_at}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(marker.read_bytes()) if marker.exists() else mine
        if found != mine and any((folder / "trials").glob("*")):
            raise InputError(
                f"{folder}: expected trials of this study, got those of another of its name; move the folder away"
            )
        draft = folder / f".study-{os.getpid()}"
        draft.write_text(json.dumps(mine))
        draft.replace(marker)
    except OSError as error:
        raise DiskError(error.errno, f"{marker}: cannot write ({error.strerror}); mend it, run again") from error


def load_data(
    trainer: Any, section: dict[str, Any], stored: dict[str, Any], options: WorkerOptions,
    roles: frozenset[Role] = SEARCH_ROLES,
) -> Any:  # fmt: skip
    """A study's data, with these roles opened: train and valid alone, but for an evaluation.

    Args:
        section: the specification's `data`; as stored it holds no path.
        stored: what the database keeps of the data: hash, files, simulation.

    Raises:
        InputError: the data are not here, cannot be loaded, or are others than those the study began with.
    """
    path = _data_path(stored, options)
    if "path" in trainer.Data.model_fields:
        section = {**section, "path": str(path or "simulated")}
    try:
        chosen = trainer.Data.model_validate(section)
    except ValidationError as error:
        fault = problems_of(error, trainer.Data, section, "data")[0]
        raise InputError(f"{fault.path}: {fault.message}; use the tuner version that began the study") from error
    given = options.data_path_given or options.data_path is None
    wanted = DataSpec(chosen, path, Path(options.cache), given and path is not None)
    try:
        data = trainer.load(wanted, roles)
    except (InputError, DiskError):
        raise
    except Exception as error:  # of any trainer's: the studies of others go on
        log.error("data not loaded", exc_info=error, extra={"action": "load_failed"})
        raise InputError(
            f"{path or 'simulated data'}: expected {stored['source']}, got {reason_of(error)}; the log tells where"
        ) from error
    if data.manifest.data_hash != stored["data_hash"]:
        raise InputError(
            f"{path or 'simulated data'}: expected {stored['source']} ({stored['data_hash'][:12]}), got "
            f"{data.manifest.source} ({data.manifest.data_hash[:12]}); the data or the tuner version changed since "
            "the study began: name the former data with --data, or make a new study with --name NEW"
        )
    return data


def _data_path(stored: dict[str, Any], options: WorkerOptions) -> Path | None:
    """Where the study's files are: as told, else where below the roots their hashes are found; None: simulated."""
    if options.data_path is not None:
        return Path(options.data_path)
    if stored["simulated"]:
        return None
    files = {
        name: FileStamp(**stamp) if isinstance(stamp, dict) else FileStamp(stamp, None)
        for name, stamp in stored["files"].items()
    }
    if not files:  # a trainer that makes its data itself
        return None
    return locate(files, [Path(root) for root in options.roots], Path(options.cache) / "file-hashes.json")


def serve(options: WorkerOptions, url: str, stop: threading.Event) -> dict[str, float]:
    """Open database and lease, then work.

    Returns:
        `serve_s`, the time from the first claim to the end, and `fit_s`, the part of it inside the trainer.

    Raises:
        InputError, and what Worker.serve raises.
    """
    database = Database(url)
    ended = threading.Event()
    signs_off = True
    try:
        store = Store(database)
        study_id = None
        if not options.stay:
            row = retry(lambda: store.find_study(options.studies[0]), options.outage_s, "study")
            study_id = row.id if row else None
        worker_id = retry(
            lambda: store.register_worker(study_id, ProcessIdentity.current(), options.device),
            options.outage_s, "register",
        )  # fmt: skip
        logs.set_default(worker=worker_id)
        try:
            with LeaseThread(lambda: store.renew(worker_id), options.renew_every_s) as lease:
                server = Server(database, options, stop, worker_id, lambda: lease.steady)
                threading.Thread(
                    target=_leave_in_time, args=(server, options, stop, ended), name="stop", daemon=True
                ).start()
                started = time.monotonic()
                server.serve()
                return {"serve_s": time.monotonic() - started, "fit_s": server.fit_s}
        except DeviceFault as fault:
            signs_off = not fault.shared  # else what it holds would count as given back, and not as crashed
            raise
        finally:
            ended.set()
            # Also where it gives up: other hosts need not wait for its lease to run out.
            if signs_off:
                with suppress(DatabaseUnavailable):
                    store.end_worker(worker_id)
    finally:
        database.close()


def _leave_in_time(server: Server, options: WorkerOptions, stop: threading.Event, ended: threading.Event) -> None:
    """Told to stop, and no measurement in time: give the trial back as it is, and go."""
    stop.wait()
    if ended.wait(options.stop_grace_s):
        return
    log.warning(
        "no measurement within %.0f s: leaving at the newest checkpoint", options.stop_grace_s,
        extra={"action": "abandon"},
    )  # fmt: skip
    abandoning = threading.Thread(target=server.abandon, daemon=True)
    abandoning.start()
    abandoning.join(15.0)
    _tell({"reason": None, "serve_s": 0.0, "fit_s": 0.0})
    os._exit(0)


def _stop_on_signals(stop: threading.Event) -> None:
    def handler(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(INTERRUPTED_EXIT)
        stop.set()

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)

    def watch_parent() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()


_supervisor = 1  # the descriptor on which the ending is told


def _tell(ending: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the supervisor died
        os.write(_supervisor, json.dumps({**ending, "peak_bytes": peak_bytes()}).encode() + b"\n")


def peak_bytes() -> int:
    """The most memory that this process has held at once, with the files that it has mapped and read."""
    with suppress(OSError), Path("/proc/self/status").open() as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Not the first choice: a process starts with what its parent held when it was made.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    global _supervisor
    atexit.register(gc.freeze)  # as in `tuner.cli.main`: the supervisor waits for this process
    logs.configure()
    stop = threading.Event()
    _stop_on_signals(stop)
    # What a trainer prints belongs to the log; it would fill a pipe that nobody reads before the end.
    _supervisor = os.dup(1)
    os.dup2(2, 1)
    options = WorkerOptions.from_json(sys.argv[1])
    ending: dict[str, Any] = {"reason": None}
    code = 0
    try:
        ending |= serve(options, os.environ["TUNER_STORAGE"], stop)
    except DeviceFault as error:
        log.error("worker leaves its place to a new process: %s", error, extra={"action": "device_fault"})
        return FAILED_EXIT  # without a word: its supervisor starts another
    except (TooManyFailures, Unavailable) as error:  # neither is anybody's bad input
        ending["reason"], code = str(error), FAILED_EXIT
        log.error("worker stops: %s", error, extra={"action": "failed"})
    except (InputError, StorageError, DiskError) as error:
        ending["reason"], code = str(error), REFUSED_EXIT
        log.error("worker stops: %s", error, extra={"action": "refused"})
    _tell(ending)
    return code


if __name__ == "__main__":
    sys.exit(main())
