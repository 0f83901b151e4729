"""URLs, errors and patience."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from storage import database as module
from storage.database import (
    Database,
    DatabaseUnavailable,
    StorageError,
    Unavailable,
    is_transient,
    mask,
    parse_url,
    retry,
)
from storage.tables import SCHEMA_VERSION, create_schema, schema


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("sqlite+pysqlite:////a.db", "sqlite:////a.db"),
        ("postgresql://u:p@h/n", "postgresql+psycopg://u:p@h/n"),
        ("postgres://u:p@h:1/n?sslmode=require", "postgresql+psycopg://u:p@h:1/n?sslmode=require"),
        ("postgresql+psycopg2://u@h/n", "postgresql+psycopg://u@h/n"),
    ],
)
def test_engines_we_ship_are_understood(url: str, expected: str) -> None:
    assert parse_url(url).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://u:secret@h/n", "expected sqlite or postgresql, got 'mysql' in mysql://u:***@h/n"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
        ("runs/tuner.db", "expected sqlite:///FILE or postgresql"),
        ("postgresql://u:secret@h:port/n", "expected sqlite:///FILE or postgresql"),
        ("", "expected sqlite:///FILE or postgresql"),
    ],
)
def test_other_urls_are_refused_in_one_line_without_the_password(url: str, expected: str) -> None:
    with pytest.raises(StorageError) as caught:
        Database(url)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@h/n", "postgresql://u@h/n?password=secret", "postgresql://u:secret@h:x/n"]
)
def test_passwords_are_masked(url: str) -> None:
    assert "secret" not in mask(url)


def test_the_name_of_a_database_hides_its_password() -> None:
    assert repr(Database("postgresql://u:secret@h/n")) == "postgresql://u:***@h/n"


class TestUnreachable:
    def refused(self, url: str, kind: type[StorageError]) -> str:
        started = time.monotonic()
        with pytest.raises(StorageError) as caught:
            create_schema(Database(url))
        assert time.monotonic() - started < 5.0
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_nobody_listens(self) -> None:
        message = self.refused("postgresql://u:secret@127.0.0.1:1/n", DatabaseUnavailable)
        assert "u:***@127.0.0.1:1" in message
        assert "refused" in message

    def test_no_such_database(self, postgresql_url: str) -> None:
        url = parse_url(postgresql_url).set(database="nowhere", password="secret")
        message = self.refused(url.render_as_string(hide_password=False), StorageError)
        assert 'database "nowhere" does not exist' in message

    def test_a_folder_in_place_of_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.db").mkdir()
        assert "unable to open" in self.refused(f"sqlite:///{tmp_path}/x.db", StorageError)

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        assert "cannot make the folder" in self.refused(f"sqlite:///{tmp_path}/x/y/z.db", StorageError)

    def test_a_lock_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "x.db.lock").mkdir()
        assert "x.db.lock" in self.refused(f"sqlite:///{tmp_path}/x.db", StorageError)

    def test_no_database_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "x.db").write_bytes(b"not a database, but long enough to be taken for one" * 50)
        assert "not a database" in self.refused(f"sqlite:///{tmp_path}/x.db", StorageError)


def operational(original: BaseException) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("select 1", {}, original)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (operational(sqlite3.OperationalError("database is locked")), True),
        (operational(sqlite3.OperationalError("no such table: trials")), False),
        (operational(sqlite3.OperationalError("database or disk is full")), False),
        (operational(psycopg.OperationalError("connection refused")), True),
        (operational(psycopg.OperationalError("could not translate host name: Name or service not known")), True),
        (operational(psycopg.OperationalError("the database system is starting up")), True),
        (operational(psycopg.OperationalError("sorry, too many clients already")), True),
        (operational(psycopg.OperationalError("no more connections allowed (max_client_conn)")), True),
        (operational(psycopg.OperationalError("session is read-only")), True),
        (operational(psycopg.OperationalError("password authentication failed for user")), False),
        (operational(psycopg.OperationalError("no pg_hba.conf entry for host")), False),
        (operational(psycopg.OperationalError("server does not support SSL, but SSL was required")), False),
        (operational(psycopg.errors.AdminShutdown("terminating connection")), True),
        (operational(psycopg.errors.CrashShutdown("another server process crashed")), True),
        (operational(psycopg.errors.CannotConnectNow("shutting down")), True),
        (operational(psycopg.errors.TooManyConnections("too many clients")), True),
        (operational(psycopg.errors.DeadlockDetected("deadlock")), True),
        (operational(psycopg.errors.LockNotAvailable("lock timeout")), True),
        (operational(psycopg.errors.ProtocolViolation("server conn crashed?")), True),  # as PgBouncer says it
        (operational(psycopg.errors.DiskFull("could not extend file")), False),
        (operational(psycopg.errors.DatabaseDropped("gone")), False),
        (sa.exc.InternalError("x", {}, psycopg.errors.ReadOnlySqlTransaction("read-only")), False),
        (sa.exc.ProgrammingError("x", {}, psycopg.errors.UndefinedTable("relation")), False),
        (sa.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back"), True),
        (sa.exc.InterfaceError("x", {}, psycopg.InterfaceError("closed"), connection_invalidated=True), True),
        (sa.exc.TimeoutError("QueuePool limit"), True),
        (DatabaseUnavailable("x"), True),
        (Unavailable("x"), True),
        (StorageError("x"), False),
        (sa.exc.IntegrityError("x", {}, sqlite3.IntegrityError("unique")), False),
        (ValueError("x"), False),
    ],
)
def test_what_can_help_when_asked_again(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


class Wire:
    """A TCP port in front of a PostgreSQL server's socket, that can be cut and mended."""

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self._server = f"{self.url.query['host']}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._whole = True
        self._threads[0].start()

    def tcp_url(self, **query: str) -> str:
        url = self.url.set(host="127.0.0.1", port=self.port, query=query)
        return url.render_as_string(hide_password=False)

    def cut(self) -> None:
        self._whole = False
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in [self._listener, *self._ends]:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._ends += [client, server]
            if not self._whole:
                client.shutdown(socket.SHUT_RDWR)
                continue
            server.connect(self._server)
            for ends in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=_carry, args=ends))
                self._threads[-1].start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class TestConnections:
    """PostgreSQL over TCP."""

    @pytest.fixture
    def wire(self, postgresql_url: str) -> Iterator[Wire]:
        wire = Wire(postgresql_url)
        yield wire
        wire.close()

    @pytest.fixture
    def database(self, wire: Wire) -> Iterator[Database]:
        database = Database(wire.tcp_url())
        yield database
        database.close()

    def test_both_ends_watch_the_network(self, database: Database) -> None:
        theirs = sa.text(
            "SELECT name FROM pg_settings WHERE name LIKE 'tcp_%' AND source = 'session' ORDER BY name"
        )
        with database.transaction() as connection:
            # The values are nought at a server that listens on a local socket alone.
            assert connection.scalars(theirs).all() == [
                "tcp_keepalives_count", "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_user_timeout",
            ]  # fmt: skip
            assert socket_options(connection) == [10, 5, 4, 30_000]

    def test_what_the_url_says_counts(self, wire: Wire) -> None:
        database = Database(wire.tcp_url(keepalives_idle="77"))
        with database.transaction() as connection:
            assert socket_options(connection) == [77, 5, 4, 30_000]
        database.close()

    def test_a_process_keeps_one_connection(self, database: Database, postgresql_url: str) -> None:
        query = "SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'"
        with psycopg.connect(postgresql_url, autocommit=True) as watching:

            def settled(expected: int) -> int:
                """The others' connections; the server takes its time with those that said goodbye."""
                deadline = time.monotonic() + 10.0
                while (found := watching.execute(query).fetchone()[0]) != expected:  # type: ignore[index]
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.02)
                return found

            with database.exclusive("x"), database.transaction(), database.transaction():
                assert settled(3) == 3
            assert settled(1) == 1

    def test_a_lost_connection_is_made_anew(self, database: Database, wire: Wire) -> None:
        def work() -> int:
            with database.transaction() as connection:
                return int(connection.scalar(sa.text("SELECT 7")) or 0)

        assert work() == 7
        wire.cut()
        wire.mend()
        assert work() == 7  # nobody notices an outage between two transactions
        wire.cut()
        with pytest.raises(DatabaseUnavailable):
            work()
        threading.Timer(0.3, wire.mend).start()
        assert retry(work, 30.0, "work") == 7

    def test_a_connection_lost_within_a_transaction_ends_it(self, database: Database, wire: Wire) -> None:
        def work() -> None:
            with database.transaction() as connection:
                connection.execute(sa.text("SELECT 1"))
                wire.cut()
                with contextlib.suppress(sa.exc.OperationalError):
                    connection.execute(sa.text("SELECT 2"))
                connection.execute(sa.text("SELECT 3"))

        with pytest.raises(DatabaseUnavailable, match="the connection was lost"):
            work()

    @pytest.mark.parametrize("checked", [True, False])
    def test_a_lock_lost_with_its_connection_is_told(self, database: Database, wire: Wire, checked: bool) -> None:
        def work() -> None:
            with database.exclusive("x"):
                wire.cut()
                if checked:
                    database.check_exclusive()
                    raise AssertionError

        with pytest.raises(DatabaseUnavailable):
            work()
        wire.mend()
        with database.exclusive("x"):
            database.check_exclusive()

    def test_the_lock_of_a_halted_process_ends(
        self, database: Database, wire: Wire, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_LONGEST_LOCK_S", 0.1)
        halted, other = threading.Event(), Database(wire.tcp_url())

        def hold() -> None:
            with database.exclusive("x"):
                holding.set()
                halted.wait(30.0)

        holding = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(hold)
            assert holding.wait(30.0)
            with other.exclusive("x"):
                halted.set()
            with pytest.raises(DatabaseUnavailable):
                held.result(30.0)
        other.close()

    def test_a_reader_writes_nothing(self, database: Database, wire: Wire) -> None:
        create_schema(database)
        reader = Database(wire.tcp_url(), read_only=True)
        with reader.transaction() as connection:
            assert connection.scalar(sa.select(schema.c.version)) == SCHEMA_VERSION
        for _ in range(2):  # the connection comes from the pool the second time
            with pytest.raises(StorageError, match="read-only transaction"), reader.transaction() as connection:
                connection.execute(schema.update().values(version=99))
        reader.close()

    def test_a_standby_is_no_place_to_write(self, database: Database, wire: Wire, postgresql_url: str) -> None:
        with database.transaction() as connection:
            connection.exec_driver_sql("ALTER DATABASE postgres SET default_transaction_read_only = on")
        database.close()
        try:
            with pytest.raises(DatabaseUnavailable, match="read-only"), database.transaction():
                pass
            reader = Database(wire.tcp_url(), read_only=True)
            with reader.transaction() as connection:
                assert connection.scalar(sa.text("SELECT 1")) == 1
            reader.close()
        finally:
            plain = parse_url(postgresql_url).set(drivername="postgresql").render_as_string(hide_password=False)
            with psycopg.connect(plain) as connection:
                connection.read_only = False
                connection.execute("ALTER DATABASE postgres RESET default_transaction_read_only")


def socket_options(connection: sa.Connection) -> list[int]:
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    with socket.socket(fileno=os.dup(connection.connection.driver_connection.fileno())) as ours:
        return [ours.getsockopt(socket.IPPROTO_TCP, option) for option in options]


class TestRetry:
    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Time passes by sleeping alone."""
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(module.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def failing(self, n_times: int, error: Exception) -> Callable[[], int]:
        calls = []

        def call() -> int:
            calls.append(1)
            if len(calls) <= n_times:
                raise error
            return len(calls)

        return call

    def test_until_it_succeeds(self) -> None:
        error = operational(sqlite3.OperationalError("database is locked"))
        assert retry(self.failing(9, error), 900.0, "x") == 10

    def test_until_patience_ends(self) -> None:
        error = operational(psycopg.OperationalError("connection refused\nIs the server running?"))
        with pytest.raises(DatabaseUnavailable, match=r"^storage: x: connection refused$"):
            retry(self.failing(10**6, error), 30.0, "x")
        assert 15.0 < module.time.monotonic() <= 30.0

    def test_never_where_it_cannot_help(self) -> None:
        call = self.failing(1, operational(sqlite3.OperationalError("no such table")))
        with pytest.raises(sa.exc.OperationalError):
            retry(call, 900.0, "x")
        assert call() == 2  # was called once

    def test_every_wait_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        retry(self.failing(2, Unavailable("the store is away")), 900.0, "upload")
        told = [(record.action, record.what, record.getMessage()) for record in caplog.records]  # type: ignore[attr-defined]
        assert told == [("retry", "upload", "away, trying again: the store is away")] * 2

    def test_what_is_away_for_good_is_raised_as_it_is(self) -> None:
        with pytest.raises(Unavailable, match=r"^the store is away$"):
            retry(self.failing(10**6, Unavailable("the store is away")), 30.0, "upload")
