"""URLs, errors and patience."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from storage import database as module
from storage.database import Database, DatabaseUnavailable, StorageError, is_transient, mask, parse_url, retry
from storage.tables import create_schema


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
    assert repr(Database("postgresql://u:secret@h/n")) == "Database(postgresql+psycopg://u:***@h/n)"


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
        (operational(psycopg.OperationalError("the database system is starting up")), True),
        (operational(psycopg.OperationalError("password authentication failed for user")), False),
        (sa.exc.TimeoutError("QueuePool limit"), True),
        (DatabaseUnavailable("x"), True),
        (StorageError("x"), False),
        (sa.exc.IntegrityError("x", {}, sqlite3.IntegrityError("unique")), False),
        (ValueError("x"), False),
    ],
)
def test_what_can_help_when_asked_again(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


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
