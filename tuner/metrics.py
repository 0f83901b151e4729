"""Prometheus metrics of the service, read from the database whenever they are asked for."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import psutil
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from models.trainer import InputError
from storage.database import Database, StorageError
from storage.runs import Store
from tuner import status
from tuner.status import ServiceStatus

log = logging.getLogger("tuner")

# Prometheus gives up a scrape after ten seconds: what cannot be had by then is left out.
DATABASE_WITHIN_S = 5.0
DEVICES_WITHIN_S = 3.0


class MetricsServer:
    """Serves `/metrics` from threads of its own until closed."""

    def __init__(self, port: int, host: str, registry: CollectorRegistry) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise InputError(
                f"--metrics-port {port}: expected a free port of {host}, got {error.strerror}; name another"
            ) from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Crew(Protocol):
    """Worker processes of this machine: the process id of each slot's."""

    @property
    def pids(self) -> Mapping[int, int]: ...


def serve_metrics(port: int, url: str, crew: Crew, host: str = "127.0.0.1") -> MetricsServer:
    """Serve the metrics of the database at `url`, of this machine's devices and of its worker processes.

    Args:
        port: 0: a free one.

    Raises:
        InputError: the port is taken, or `host` is not this machine's.
    """
    registry = CollectorRegistry()
    registry.register(ServiceCollector(url, crew))
    return MetricsServer(port, host, registry)


@dataclass(frozen=True)
class _Reading:
    status: ServiceStatus
    epoch_s: Mapping[tuple[str, int], float]  # study, trial -> seconds of its newest epoch


class ServiceCollector(Collector):
    """What one scrape sees. It never raises and always answers in time: while the database is away or slow its
    metrics are absent (stale values would look like a service that goes on) and `tuner_database_up` is 0."""

    def __init__(self, url: str, crew: Crew) -> None:
        self._url = url
        self._crew = crew
        self._reading: _Reading | None = None
        self._reader: threading.Thread | None = None
        self._lock = threading.Lock()

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # else the registry would collect once to know the names

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            reading = self._read_in_time()
        up = GaugeMetricFamily("tuner_database_up", "Whether the database answered this scrape.")
        up.add_metric([], float(reading is not None))
        yield up
        if reading is not None:
            yield from _studies(reading)
            yield from _workers(reading.status)
        yield _worker_memory(self._crew.pids)
        yield from _device_memory()

    def _read_in_time(self) -> _Reading | None:
        """One reader at a time; one that hangs is left to itself, and what it finds late is too old to tell."""
        if self._reader is None or not self._reader.is_alive():
            self._reading = None
            self._reader = threading.Thread(target=self._read, name="metrics", daemon=True)
            self._reader.start()
            self._reader.join(DATABASE_WITHIN_S)
            if not self._reader.is_alive():
                return self._reading
        return None

    def _read(self) -> None:
        # A connection of its own: the supervisor's pool is small, and it must not wait for a scrape.
        try:
            database = Database(self._url, read_only=True)
            try:
                found = status.read(database)
                self._reading = _Reading(found, _epoch_seconds(Store(database), found))
            finally:
                database.close()
        except StorageError as error:
            log.warning("database not read for metrics: %s", error, extra={"action": "outage"})


def _epoch_seconds(store: Store, found: ServiceStatus) -> dict[tuple[str, int], float]:
    """How long the newest epoch of every running trial took."""
    ids = {study.name: study.progress.row.id for study in found.studies}
    held: dict[str, list[int]] = {}
    for worker in found.workers:
        for holding in worker.holdings if worker.state == "alive" else ():
            held.setdefault(holding.study_name, []).append(holding.number)
    seconds = {}
    for name, numbers in held.items():
        if name not in ids:  # made between the two queries
            continue
        for number, rows in store.measurements(ids[name], numbers).items():
            if rows:
                before = rows[-2].elapsed_s if len(rows) > 1 else 0.0
                seconds[name, number] = rows[-1].elapsed_s - before
    return seconds


def _studies(reading: _Reading) -> Iterator[GaugeMetricFamily]:
    found = reading.status
    trials = _gauge("tuner_trials", "Trials of a study by state.", "study", "state")
    budget = _gauge("tuner_study_budget_trials", "Ended trials that a study is to have.", "study")
    for study in found.studies:
        progress = study.progress
        counts = {
            "complete": progress.complete, "pruned": progress.pruned, "failed": progress.failed,
            "running": study.running, "waiting": study.waiting,
        }  # fmt: skip
        for state, n in counts.items():
            trials.add_metric([study.name, state], n)
        budget.add_metric([study.name], progress.row.total)
    yield trials
    yield budget
    epochs = _gauge("tuner_epoch_seconds", "Training time of a running trial's newest epoch.", "study", "trial")
    for (name, number), seconds in sorted(reading.epoch_s.items()):
        epochs.add_metric([name, str(number)], seconds)
    yield epochs
    queue = _gauge("tuner_queue_studies", "Studies in the queue with budget left.")
    queue.add_metric([], len(found.queue))
    yield queue
    left = _gauge("tuner_queue_trials", "Trials that the studies in the queue have yet to end.")
    left.add_metric([], sum(study.left for study in found.queue))
    yield left


def _workers(found: ServiceStatus) -> Iterator[GaugeMetricFamily]:
    workers = _gauge("tuner_workers", "Workers, all machines: alive, or stale with a trial in hand.", "state")
    shown = [w for w in found.workers if w.state == "alive" or (w.state == "stale" and w.holdings)]
    for state in ("alive", "stale"):
        workers.add_metric([state], sum(worker.state == state for worker in shown))
    yield workers
    leases = _gauge("tuner_lease_age_seconds", "Time since a worker renewed its lease.", "worker", "host", "device")
    for worker in shown:
        row = worker.row
        leases.add_metric([str(row.id), row.identity.host, row.device], row.age_s)
    yield leases


def _worker_memory(pids: Mapping[int, int]) -> GaugeMetricFamily:
    memory = _gauge("tuner_worker_memory_bytes", "Resident memory of this machine's worker processes.", "slot")
    for slot, pid in sorted(pids.items()):
        try:
            memory.add_metric([str(slot)], psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            continue  # it ended meanwhile
    return memory


def _device_memory() -> Iterator[GaugeMetricFamily]:
    used = _gauge("tuner_device_memory_bytes", "Memory in use on a CUDA device, whoever uses it.", "device")
    size = _gauge("tuner_device_memory_size_bytes", "Memory that a CUDA device has.", "device")
    for device, (used_bytes, size_bytes) in device_memory().items():
        used.add_metric([device], used_bytes)
        size.add_metric([device], size_bytes)
    yield used
    yield size


def device_memory() -> dict[str, tuple[int, int]]:
    """`cuda:<i>` -> (bytes in use, bytes in all) of the devices that CUDA shows this process, by nvidia-smi; none
    where there is no nvidia-smi or it does not answer."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=DEVICES_WITHIN_S, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi: %s", type(error).__name__, extra={"action": "devices_unread"})
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[2].isdigit() and row[3].isdigit()]  # not "[N/A]"
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        rows = [row for name in names for row in rows if name == row[0] or row[1].startswith(name)]
    return {f"cuda:{i}": (int(row[2]) << 20, int(row[3]) << 20) for i, row in enumerate(rows)}


def _gauge(name: str, what: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, labels=labels)
