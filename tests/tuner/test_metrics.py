"""What Prometheus sees, read with its own parser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.trainer import InputError
from storage.database import Database, DatabaseUnavailable
from storage.leases import GRACE_S
from storage.runs import MeasurementRow
from tests.searches import METRIC, VIOLATION, elsewhere, new_worker, suggest_all, work_off
from tests.tuner.service_studies import age_lease, begin, make, taken
from tuner import metrics
from tuner.metrics import MetricsServer, device_memory, serve_metrics


@dataclass
class Processes:
    """Stands for a supervisor's workers."""

    pids: Mapping[int, int] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def _no_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No nvidia-smi but the one a test makes."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def nvidia_smi(tmp_path: Path, script: str) -> None:
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def serving(database: Database) -> Iterator[MetricsServer]:
    server = serve(database, Processes())
    yield server
    server.close()


def serve(database: Database, crew: Processes) -> MetricsServer:
    return serve_metrics(0, database.url.render_as_string(hide_password=False), crew)


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(server: MetricsServer) -> Samples:
    """(name, sorted labels) -> value, as Prometheus's own parser reads the page."""
    url = f"http://127.0.0.1:{server.port}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        page = response.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        assert family.type == "gauge"
        assert family.documentation
        assert family.name.startswith("tuner_")
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


def test_trials_workers_leases_and_the_queue(database: Database, serving: MetricsServer) -> None:
    study = make(database, "toy-1", n_trials=10, n_ended=3)
    other = make(database, "other", n_trials=4)
    make(database, "done", n_trials=1, n_ended=1)
    busy, away = new_worker(study), new_worker(study, elsewhere())
    study.end(begin(study, busy), "failed", "NaN")
    begin(study, busy)
    begin(study, away)
    age_lease(database, away, GRACE_S + 100)
    for each in (study, other):
        each.store.queue_study(each.id)
    found = scrape(serving)
    assert value(found, "tuner_database_up") == 1
    states = ("complete", "pruned", "failed", "running", "waiting")
    assert [value(found, "tuner_trials", study="toy-1", state=state) for state in states] == [3, 0, 1, 1, 1]
    assert value(found, "tuner_study_budget_trials", study="toy-1") == 10
    assert value(found, "tuner_queue_studies") == 2
    assert value(found, "tuner_queue_trials") == 6 + 4
    assert value(found, "tuner_workers", state="alive") == 1
    assert value(found, "tuner_workers", state="stale") == 1
    ages = {dict(labels)["worker"]: age for (n, labels), age in found.items() if n == "tuner_lease_age_seconds"}
    assert set(ages) == {str(busy), str(away)}
    assert ages[str(busy)] < 60
    assert GRACE_S + 100 <= ages[str(away)] < GRACE_S + 160
    assert ("tuner_lease_age_seconds", (("device", "cpu"), ("host", "elsewhere"), ("worker", str(away)))) in found


def test_the_newest_epoch_of_running_trials(sqlite: Database) -> None:
    study = make(sqlite, n_ended=1)
    first, second, third = (new_worker(study) for _ in range(3))
    for worker, elapsed in ((first, (5.0, 12.5)), (second, (3.0,)), (third, ())):
        claim = taken(study, worker)
        suggest_all(study, claim)
        rows = [MeasurementRow(i, {METRIC: 0.5, VIOLATION: 0.0}, s) for i, s in enumerate(elapsed)]
        study.store.record(study.id, claim.number, claim.attempt, rows)
    server = serve(sqlite, Processes())
    found = scrape(server)
    server.close()
    epochs = {dict(labels)["trial"]: s for (n, labels), s in found.items() if n == "tuner_epoch_seconds"}
    assert epochs == {"1": 7.5, "2": 3.0}
    assert value(found, "tuner_epoch_seconds", study="toy", trial="1") == 7.5


def test_every_scrape_looks_anew(sqlite: Database) -> None:
    study = make(sqlite)
    server = serve(sqlite, Processes())
    assert value(scrape(server), "tuner_trials", study="toy", state="complete") == 0
    work_off(study, taken(study, new_worker(study)))
    assert value(scrape(server), "tuner_trials", study="toy", state="complete") == 1
    server.close()


def test_the_database_away_leaves_no_stale_value(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(sqlite)
    server = serve(sqlite, Processes({0: os.getpid()}))
    assert "tuner_trials" in names(scrape(server))

    def away(_: Database) -> None:
        raise DatabaseUnavailable("storage: connection refused")

    with monkeypatch.context() as patched:
        patched.setattr(metrics.status, "read", away)
        found = scrape(server)
    assert names(found) == {"tuner_database_up", "tuner_worker_memory_bytes"}
    assert value(found, "tuner_database_up") == 0
    assert "database not read for metrics: storage: connection refused" in caplog.text
    assert value(scrape(server), "tuner_database_up") == 1
    server.close()


def test_no_database_at_all_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken_port:
        taken_port.bind(("127.0.0.1", 0))  # nobody listens
        url = f"postgresql://ann:s3cret@127.0.0.1:{taken_port.getsockname()[1]}/tuner"
        server = serve_metrics(0, url, Processes())
        assert scrape(server) == {("tuner_database_up", ()): 0.0}
        server.close()
    assert "s3cret" not in caplog.text


def test_a_database_that_hangs_does_not_hold_a_scrape_up(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    make(sqlite)
    answer = threading.Event()
    read = metrics.status.read
    readers = []

    def slow(database: Database) -> object:
        readers.append(threading.current_thread())
        answer.wait(30)
        return read(database)

    monkeypatch.setattr(metrics.status, "read", slow)
    monkeypatch.setattr(metrics, "DATABASE_WITHIN_S", 0.2)
    server = serve(sqlite, Processes())
    for _ in range(3):
        began = time.monotonic()
        assert value(scrape(server), "tuner_database_up") == 0
        assert time.monotonic() - began < 5
    assert len(readers) == 1  # they do not pile up
    answer.set()
    readers[0].join(10)
    monkeypatch.setattr(metrics, "DATABASE_WITHIN_S", 20.0)
    assert value(scrape(server), "tuner_database_up") == 1
    server.close()


def test_memory_of_worker_processes(sqlite: Database) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    server = serve(sqlite, Processes({0: os.getpid(), 1: gone.pid}))
    found = scrape(server)
    server.close()
    memory = {labels: size for (n, labels), size in found.items() if n == "tuner_worker_memory_bytes"}
    assert list(memory) == [(("slot", "0"),)]
    assert 10e6 < memory[(("slot", "0"),)] < 100e9


def test_a_taken_port_is_told_in_one_line(sqlite: Database) -> None:
    server = serve(sqlite, Processes())
    with pytest.raises(InputError, match=rf"--metrics-port {server.port}: expected a free port.*Address already"):
        serve_metrics(server.port, "sqlite:///x.db", Processes())
    server.close()


# --- devices -------------------------------------------------------------------------------------------------

FOUR = """cat <<END
0, GPU-aaaa-1, 1024, 81559
1, GPU-bbbb-2, 0, 81559
2, GPU-cccc-3, [N/A], [N/A]
3, GPU-dddd-4, 2, 16384
END"""
GIB = 1 << 30


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, [1024, 0, 2]),
        ("3,0", [2, 1024]),
        ("GPU-bbbb-2, GPU-dddd", [0, 2]),
        ("", []),
    ],
)
def test_devices_are_those_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, used: list[int]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    nvidia_smi(tmp_path, FOUR)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = device_memory()
    assert list(found) == [f"cuda:{i}" for i in range(len(used))]
    assert [bytes_used for bytes_used, _ in found.values()] == [mib << 20 for mib in used]


def test_device_memory_is_exposed(sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    nvidia_smi(tmp_path, "echo '0, GPU-x, 2048, 16384'")
    server = serve(sqlite, Processes())
    found = scrape(server)
    server.close()
    assert value(found, "tuner_device_memory_bytes", device="cuda:0") == 2 * GIB
    assert value(found, "tuner_device_memory_size_bytes", device="cuda:0") == 16 * GIB


@pytest.mark.parametrize("script", ["exit 9", "exec sleep 20", "echo 'No devices were found'"])
def test_nvidia_smi_that_fails_or_hangs_leaves_devices_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(metrics, "DEVICES_WITHIN_S", 0.3)
    nvidia_smi(tmp_path, script)
    began = time.monotonic()
    assert device_memory() == {}
    assert time.monotonic() - began < 10


def test_without_nvidia_smi_there_are_no_devices(caplog: pytest.LogCaptureFixture) -> None:
    assert device_memory() == {}
    assert not caplog.records
