"""One database: engine, transactions, locks and the errors they raise.

SQLite is the embedded default (local disk, any number of processes of one machine), PostgreSQL the engine that
distributes. Nothing here knows a table.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
    TimeoutError,
)

log = logging.getLogger("storage")
T = TypeVar("T")

# A writer that waits longer than this for SQLite's single write lock is told "database is locked".
SQLITE_BUSY_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10
# A cut network is noticed within half a minute: at our end, which waits for an answer, and at the server's, which
# holds a lock for us.
_KEEPALIVE = {"idle": 10, "interval": 5, "count": 4}
_USER_TIMEOUT_MS = 30_000
# Longer than anything that is done under a lock; then the server takes it from a process that was halted.
_LONGEST_LOCK_S = 300

# Beginnings of PostgreSQL's error codes that pass: connection lost, server stopping or starting, session ended for
# being idle, too many connections, out of memory, serialisation and deadlock, lock or statement timeout.
_PASSING_STATES = (
    "08", "57P01", "57P02", "57P03", "57P05", "25P03", "25P04", "53300", "53200", "40", "55P03", "57014",
)  # fmt: skip
# What a server or a pooler says while connecting, where there is no code, and will say again.
_LASTING_REFUSALS = (
    "authentication failed", "no password supplied", "does not exist", "no such user", "no such database",
    "no pg_hba.conf entry", "permission denied", "not permitted to log in", "certificate", "ssl was required",
    "does not support ssl", "unsupported startup parameter",
)  # fmt: skip


class StorageError(Exception):
    """The database refused; the message is one line: where: expected, got, way out."""


class Unavailable(StorageError):
    """Cannot be reached now. What was asked may be asked again (`retry`)."""


class DatabaseUnavailable(Unavailable):
    """The database cannot be reached now."""


def mask(url: str | URL) -> str:
    """The URL with its password replaced by ***; safe to print."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "<malformed URL>"
    if "password" in parsed.query:
        parsed = parsed.update_query_dict({"password": "***"})
    text = parsed.set(drivername=parsed.get_backend_name()).render_as_string(hide_password=True)
    return text.replace("%2A%2A%2A", "***")


def parse_url(url: str | URL) -> URL:
    """A SQLAlchemy URL whose driver is one we ship: sqlite, or PostgreSQL through psycopg.

    Raises:
        StorageError: malformed, or another engine.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise StorageError(
            f"storage: expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME, got {mask(url)}"
        ) from None
    backend = parsed.drivername.split("+")[0]
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise StorageError("storage: expected a SQLite file (sqlite:///FILE), got an in-memory database")
        return parsed.set(drivername="sqlite")
    raise StorageError(f"storage: expected sqlite or postgresql, got {backend!r} in {mask(url)}")


def engine_kwargs(url: URL, read_only: bool = False) -> dict[str, Any]:
    """Arguments for `sqlalchemy.create_engine`: one small pool a process, shared with Optuna.

    On PostgreSQL one connection stays; a lock and Optuna's nested ones come and go. What the URL itself says of a
    connection counts.
    """
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_BUSY_TIMEOUT_S}}
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        **{f"keepalives_{name}": value for name, value in _KEEPALIVE.items()},
        "tcp_user_timeout": _USER_TIMEOUT_MS,
    }
    if not read_only:  # after a failover the old primary may still answer, as a standby
        settings["target_session_attrs"] = "read-write"
    return {
        "pool_size": 1,
        "max_overflow": 3,
        "pool_pre_ping": True,
        "connect_args": {name: value for name, value in settings.items() if name not in url.query},
    }


def prepare_engine(engine: sa.Engine, read_only: bool = False) -> None:
    """Make connections safe and fast for several processes; call before the first one."""
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, read_only)
    else:
        _prepare_postgresql(engine, read_only)


def _prepare_sqlite(engine: sa.Engine, read_only: bool) -> None:
    """WAL and synchronous=NORMAL cost no durability against a killed process. BEGIN IMMEDIATE takes the write lock
    at once: without it two readers that both want to write fail with "database is locked", and Optuna hands one
    queued trial to two workers. A reader takes no lock and changes nothing, not even the journal mode.
    """

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(SQLITE_BUSY_TIMEOUT_S * 1000)}")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        else:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
            cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _prepare_postgresql(engine: sa.Engine, read_only: bool) -> None:
    """The server's end of a connection watches the network too. By statement: a pooler refuses start-up options."""
    settings = "; ".join(f"SET tcp_keepalives_{name} = {value}" for name, value in _KEEPALIVE.items())

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.autocommit = True
        connection.execute(f"{settings}; SET tcp_user_timeout = {_USER_TIMEOUT_MS}")
        connection.autocommit = False
        connection.read_only = read_only or None


def is_transient(error: BaseException) -> bool:
    """Whether asking again later can help: the connection broke, or SQLite's lock was not free in time.

    A full disk, of the server or here, is not waited for: it needs somebody.
    """
    if isinstance(error, Unavailable | TimeoutError):  # TimeoutError: no connection of the pool was free in time
        return True
    # PendingRollbackError: a second use of a connection that broke.
    if isinstance(error, PendingRollbackError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state.startswith(_PASSING_STATES)
    text = str(error.orig).lower()
    if isinstance(error.orig, sqlite3.Error):
        return isinstance(error, OperationalError) and ("locked" in text or "busy" in text)
    return isinstance(error, OperationalError) and not any(words in text for words in _LASTING_REFUSALS)


def retry(call: Callable[[], T], patience_s: float, what: str) -> T:
    """Call until it succeeds, for at most `patience_s`, with exponential back-off and jitter.

    Raises:
        Unavailable: still failing with a transient error when patience ended.
    """
    deadline = time.monotonic() + patience_s
    delay_s = 0.1
    while True:
        try:
            return call()
        except (SQLAlchemyError, Unavailable) as error:
            if not is_transient(error):
                raise
            if time.monotonic() + delay_s > deadline:
                if isinstance(error, Unavailable):
                    raise
                raise DatabaseUnavailable(f"storage: {what}: {_reason(error)}") from None
            log.warning(
                "away, trying again: %s", _reason(error),
                extra={"action": "retry", "what": what, "delay_s": round(delay_s, 1)},
            )  # fmt: skip
            time.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, 10.0)


def _reason(error: BaseException) -> str:
    """First line of the driver's own message: it names host and port, never the password."""
    if isinstance(error, PendingRollbackError):
        return "the connection was lost"
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__


class Database:
    """An engine on one database, with one error vocabulary.

    Args:
        url: sqlite:///FILE (the folder is made) or postgresql://USER:PASSWORD@HOST:PORT/NAME.
        read_only: every write is refused by the database, and on SQLite no writer waits for a reader.
    """

    def __init__(self, url: str | URL, read_only: bool = False) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.path = Path(str(self.url.database)).absolute()
            self.url = self.url.set(database=str(self.path))
        self.engine = sa.create_engine(self.url, **engine_kwargs(self.url, read_only))
        prepare_engine(self.engine, read_only)
        self._exclusive = threading.RLock()
        self._depth = 0
        self._lock_connection: sa.Connection | None = None

    def __repr__(self) -> str:
        return mask(self.url)

    def close(self) -> None:
        self.engine.dispose()

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The database's own clock in seconds since 1970: the one clock that all machines share."""
        if self.is_sqlite:
            return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0")
        return sa.literal_column("extract(epoch from clock_timestamp())::double precision")

    def insert(self, table: sa.Table) -> Any:
        """An INSERT in the database's own dialect, which knows ON CONFLICT."""
        return sqlite_insert(table) if self.is_sqlite else postgresql_insert(table)

    def exists(self) -> bool:
        """Whether there is something to connect to (a SQLite file is made only by `make_folder`)."""
        return not self.is_sqlite or self.path.exists()

    def make_folder(self) -> None:
        if self.is_sqlite:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"storage: cannot make the folder {self.path.parent} ({error.strerror})"
                ) from error

    @contextmanager
    def transaction(self, one_moment: bool = False) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, rolled back on any error.

        Args:
            one_moment: all it reads is of the moment of its first query, whatever others write meanwhile. So it
                is on SQLite anyway.

        Raises:
            DatabaseUnavailable: no connection, or it broke.
            StorageError: any other refusal of the database.
        """
        try:
            with self.engine.connect() as connection:
                if one_moment and not self.is_sqlite:
                    connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            kind = DatabaseUnavailable if is_transient(error) else StorageError
            raise kind(f"storage: {mask(self.url)}: {_reason(error)}") from error

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock `name` against every other process of every machine; re-entrant in one thread (under
        the same name).

        It is not a transaction: other connections of the holder (Optuna's) may write meanwhile, which SQLite's
        own write lock would forbid. It ends with the process that holds it, and on PostgreSQL with the connection
        too: `check_exclusive` tells.
        """
        with self._exclusive:
            if self._depth:
                yield
                return
            self._depth += 1
            try:
                with self._file_lock() if self.is_sqlite else self._advisory_lock(name):
                    yield
            finally:
                self._depth -= 1

    def check_exclusive(self) -> None:
        """Raises DatabaseUnavailable when the lock held by this thread was lost with its connection."""
        if self._lock_connection is not None:
            try:
                self._lock_connection.execute(sa.select(1))
            except SQLAlchemyError as error:
                raise DatabaseUnavailable(f"storage: {mask(self.url)}: {_reason(error)}") from error

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        try:
            descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"storage: {self.path}.lock: expected a writable file ({error.strerror}); "
                "mend its permissions or use another --storage"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _advisory_lock(self, name: str) -> Iterator[None]:
        key = int.from_bytes(hashlib.blake2b(f"tuner:{name}".encode(), digest_size=8).digest(), signed=True)
        with self.transaction() as connection:
            # Bound to this transaction: a pooler or a broken connection cannot leave it behind.
            halted = sa.func.set_config("idle_in_transaction_session_timeout", f"{_LONGEST_LOCK_S}s", True)
            connection.execute(sa.select(halted, sa.func.pg_advisory_xact_lock(key)))
            self._lock_connection = connection
            try:
                yield
            finally:
                self._lock_connection = None
