"""A database server, hosts, and the service on them, for one test each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.postgresql import PostgresqlServer
from tests.e2e.service import Service
from tests.hosts import Network, NoHosts

LEAVING_S = 30.0


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No process that names the test's folder outlives it."""
    yield
    deadline = time.monotonic() + LEAVING_S
    while left := [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@pytest.fixture
def network() -> Iterator[Network]:
    """Hosts of namespaces; where the kernel forbids them the test fails, unless TUNER_NO_NS=1."""
    if os.environ.get("TUNER_NO_NS") == "1":
        pytest.skip("TUNER_NO_NS=1: no namespaces here")
    try:
        network = Network()
    except NoHosts as error:
        pytest.fail(f"{error} (TUNER_NO_NS=1 leaves these tests out)")
    yield network
    network.close()


@pytest.fixture
def server() -> Iterator[PostgresqlServer]:
    server = PostgresqlServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def network_server(network: Network) -> Iterator[PostgresqlServer]:
    """A server that the hosts of the network reach."""
    server = PostgresqlServer(network.address, network.within)
    server.start()
    yield server
    server.close()


@pytest.fixture
def service(tmp_path: Path, server: PostgresqlServer, nothing_left: None) -> Iterator[Service]:
    service = Service(tmp_path, server)
    yield service
    service.close()


@pytest.fixture
def spread_service(tmp_path: Path, network_server: PostgresqlServer, nothing_left: None) -> Iterator[Service]:
    """The service on hosts that share an artifact store and nothing else."""
    (tmp_path / "store").mkdir()
    service = Service(tmp_path, network_server, f"file://{tmp_path}/store")
    yield service
    service.close()
