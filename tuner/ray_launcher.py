"""`tuner run --launcher ray`: one supervisor per GPU, placed on an existing Ray cluster.

Ray starts the supervisors and tells when one is lost; nothing else passes through it. Trials, leases and
measurements are in the database as ever, so a lost node costs what a killed worker costs. What Ray sends between
its processes is pickled, and this is the one module that imports it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.trainer import InputError
from storage.database import CONNECT_TIMEOUT_S, Database, DatabaseUnavailable, StorageError, retry
from tuner.crew import LEAVING_S, POLL_S, Crew, RunFailed
from tuner.study import Study
from tuner.worker import WorkerOptions

try:
    import ray
except ImportError as error:
    raise InputError("--launcher ray: expected Ray, got no such package; pip install 'tuner[ray]'") from error

log = logging.getLogger("tuner")

# After a worker was lost its place is tried again, with this pause; elsewhere the others go on.
REPLACE_AFTER_S = 5.0
# Without any worker for this long nobody waits for a cluster that does not come back.
DESERTED_S = 600.0


@dataclass(frozen=True)
class _Ending:
    """How a supervisor ended: `refused` and `failed` say what `tuner run` has to say."""

    refused: str | None = None
    failed: str | None = None
    time_s: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


class _Supervisor:
    """On a node: a crew of one worker process, which is restarted and judged on its own host."""

    def __init__(self, worker: WorkerOptions, url: str, logs: str) -> None:
        self._study_name = worker.studies[0]
        self._worker = worker
        self._url = url
        self._logs = Path(logs)
        self._crew: Crew | None = None
        self._stopped = False

    def where(self) -> str:
        """The node's name; an answer means that the supervisor has been placed."""
        return os.uname().nodename

    def see_through(self) -> _Ending:
        """Work until nothing is left to do in the study, or `stop`."""
        database = Database(self._url)
        try:
            study = retry(lambda: Study.open(database, self._study_name), self._worker.outage_s, "study")

            def on_death(crashed: bool) -> int:
                study.recover(crashed=crashed)
                return study.store.count_measurements(study.id)

            crew = Crew([self._worker.device], self._worker, self._url, self._logs, log.info, on_death)
            self._crew = crew
            if self._stopped:
                crew.stop()
            crew.see_through()
            return _Ending(time_s=crew.time_s, peak_bytes=crew.peak_bytes)
        except (RunFailed, DatabaseUnavailable) as error:
            return _Ending(failed=str(error))
        except (InputError, StorageError) as error:
            return _Ending(refused=str(error))
        finally:
            database.close()

    def stop(self) -> None:
        self._stopped = True
        if self._crew is not None:
            self._crew.stop()


class _Place:
    """One slot of the cluster: the actor that was asked for, and what it has answered."""

    def __init__(self, slot: int, actor: Any) -> None:
        self.slot = slot
        self.actor = actor
        self.where = actor.where.remote()
        self.ending = actor.see_through.remote()
        self.host: str | None = None


def choose_devices(url: str, workers: int | None) -> list[str]:
    """Connect to the running cluster; one device a worker.

    With `workers` None: one worker per GPU of the cluster, or where it has none, one per CPU core.

    Raises:
        InputError: no cluster is running, or its nodes could not share this database.
    """
    if url.startswith("sqlite"):
        raise InputError(
            "--storage: expected PostgreSQL, which all nodes of a Ray cluster can reach, got SQLite; "
            "use --launcher local or postgresql://USER:PASSWORD@HOST/NAME"
        )
    if not ray.is_initialized():
        _connect()
    resources = ray.cluster_resources()
    n_gpus, n_cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    return ["cuda:0" if n_gpus else "cpu"] * (workers or n_gpus or n_cores)


def _connect() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _probe(os.environ.get("RAY_ADDRESS", "auto"))
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--launcher ray: expected a running Ray cluster of the same version, got: {reason}; "
            "start it with `ray start`, or name HOST:PORT of its head in RAY_ADDRESS"
        ) from error
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


def _probe(address: str) -> None:
    """Raises OSError or ValueError when nobody is at HOST:PORT; Ray itself would try for minutes."""
    if address not in ("", "auto"):
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


class RayCrew:
    """Worker processes all over a Ray cluster; used like `Crew`.

    Args:
        n_workers: as for `choose_devices`, which may have been asked before.
        worker: what all of them are told, with one study; the device is filled in. `runs`, `cache` and `data_path`
            name folders of the node.
        url: of the database, with its password.
        logs: folder of logs, on the node; each worker has its own below it.
        say: is told what a person should know.

    Raises:
        InputError: as `choose_devices`.
    """

    def __init__(
        self, n_workers: int | None, worker: WorkerOptions, url: str, logs: Path, say: Callable[[str], None]
    ) -> None:
        self.devices = choose_devices(url, n_workers)
        self._worker = worker
        self._url = url
        self._logs = logs.absolute()
        self._say = say
        self._places: list[_Place] = []
        self._vacant: list[tuple[float, int]] = []  # (when to try again, slot)
        self._interrupts = 0
        self.time_s = {"serve_s": 0.0, "fit_s": 0.0}  # over all workers that ended in order
        self.peak_bytes = 0  # memory of the largest of them

    def see_through(self, tick: Callable[[], None] = lambda: None, timeout_s: float | None = None) -> int:
        """Place the workers and wait until all have ended: nothing is left to do, the time is up, a signal.

        A worker that is lost with its node is placed again when the cluster has room for it; meanwhile the others
        go on, and take up its trial when its lease has run out.

        Args:
            tick: called about twice a second meanwhile.

        Returns:
            The number of interrupts (SIGINT, SIGTERM): at the first workers stop in order, at the second at once.

        Raises:
            InputError: a worker refused what it was given. RunFailed: a worker gave up, or none could be placed.
        """
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._interrupt) for number in signals}
        try:
            for slot in range(len(self.devices)):
                self._place(slot)
            self._watch(tick, timeout_s)
        finally:
            for place in self._places:
                ray.kill(place.actor)
            ray.shutdown()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._interrupts

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupts += 1

    def _place(self, slot: int) -> None:
        gpu = self.devices[slot] != "cpu"
        # Threads for the work, for `stop` and for `where`. Spread: a lost node costs as few workers as possible.
        options = {"num_cpus": 0 if gpu else 1, "num_gpus": 1 if gpu else 0, "max_concurrency": 3}
        supervisor = ray.remote(_Supervisor).options(scheduling_strategy="SPREAD", **options)
        worker = replace(self._worker, device=self.devices[slot])
        actor = supervisor.remote(worker, self._url, str(self._logs / f"ray-{slot}"))
        self._places.append(_Place(slot, actor))

    def _watch(self, tick: Callable[[], None], timeout_s: float | None) -> None:
        started = inhabited = time.monotonic()
        stopping_since: float | None = None
        fault: InputError | RunFailed | None = None
        done = False
        patience = 1  # interrupts that are asked for in order; after a stop of another kind the first is at once
        while True:
            for place, ending in self._ended():
                found = self._heard(place, ending)
                fault = fault or found
                # Ended in order: the study is over, and who has no place yet needs none.
                done = done or ending is not None
            now = time.monotonic()
            placed = [place for place in self._places if place.host]
            inhabited = now if placed else inhabited
            if fault is None and not done and now - inhabited > DESERTED_S:
                fault = RunFailed(f"--launcher ray: the cluster had no room for a worker in {DESERTED_S:.0f} s")
            timed_out = timeout_s is not None and now - started > timeout_s
            if stopping_since is None and (self._interrupts or timed_out or fault):
                stopping_since = now
                patience = 1 if self._interrupts else 0
                self._say_stopping("interrupted" if self._interrupts else "time is up" if timed_out else "stopping")
                for place in placed:
                    place.actor.stop.remote()
            late = stopping_since is not None and now - stopping_since > self._worker.stop_grace_s + 2 * LEAVING_S
            if self._interrupts > patience or late or (not placed and (done or stopping_since is not None)):
                break
            if not done and stopping_since is None:
                self._fill_vacancies(now)
            tick()
        if fault is not None:
            raise fault

    def _say_stopping(self, word: str) -> None:
        again = "again" if self._interrupts else "Ctrl-C"
        self._say(f"{word}: workers stop at their next measurement ({again} to stop at once)")

    def _ended(self) -> list[tuple[_Place, _Ending | None]]:
        """Wait a moment; who has ended meanwhile, with None for the lost. Notes who has been placed."""
        waiting = {place.ending: place for place in self._places}
        waiting |= {place.where: place for place in self._places if place.host is None}
        if not waiting:
            time.sleep(POLL_S)
            return []
        began = time.monotonic()
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=POLL_S)
        ended: list[tuple[_Place, _Ending | None]] = []
        for reference in ready:
            place = waiting[reference]
            if place not in self._places:
                continue  # both of its answers have come
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise RunFailed(
                        f"--launcher ray: a node cannot start a worker: {str(error).strip().splitlines()[-1]}; "
                        "every node needs the same Python, tuner and Ray"
                    ) from error
                log.warning("worker lost: %s", error, extra={"action": "worker_lost", "slot": place.slot})
                ray.kill(place.actor)  # should it only have been cut off
                answer = None
            if reference == place.where and answer is not None:
                place.host = answer
                self._say(f"worker {place.slot}: on {answer}")
                continue
            self._places.remove(place)
            ended.append((place, answer))
        # ray.wait returns at once where everything has answered.
        time.sleep(max(0.0, POLL_S - (time.monotonic() - began)))
        return ended

    def _heard(self, place: _Place, ending: _Ending | None) -> InputError | RunFailed | None:
        if ending is None:
            self._say(f"worker {place.slot}: lost with {place.host or 'its node'}; the others go on")
            self._vacant.append((time.monotonic() + REPLACE_AFTER_S, place.slot))
            return None
        self.time_s = {key: spent + ending.time_s.get(key, 0.0) for key, spent in self.time_s.items()}
        self.peak_bytes = max(self.peak_bytes, ending.peak_bytes)
        if ending.refused:
            return InputError(ending.refused)
        return RunFailed(ending.failed) if ending.failed else None

    def _fill_vacancies(self, now: float) -> None:
        due = [slot for when, slot in self._vacant if when <= now]
        self._vacant = [(when, slot) for when, slot in self._vacant if when > now]
        for slot in due:
            self._place(slot)
