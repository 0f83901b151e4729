"""`tuner db`: all tables of a database, ours and Optuna's, and how they get to this package's version."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from storage.database import Database, StorageError
from storage.leases import GRACE_S, is_dead
from storage.migrations import migrate
from storage.runs import Store, WorkerRow
from storage.tables import SCHEMA_VERSION, check_schema, create_schema, has_schema, schema_version
from tuner.optuna_schema import optuna_versions, upgrade_optuna
from tuner.optuna_storage import RetryingStorage


def upgrade(url: str) -> list[str]:
    """Bring all tables to this package's versions, and make them where there are none.

    Returns:
        Lines that say what was done.

    Raises:
        StorageError: workers are at work, the tables are newer than this package, or the database refused; our
            tables are as they were.

    Guarantees:
        Process-safe; may be repeated, also after a kill. A SQLite file that is changed was copied to
        FILE.schema-VERSION.bak before.
    """
    database = Database(url)
    try:
        database.make_folder()
        with database.exclusive("schema"):
            return [*_upgrade_ours(database), *_upgrade_optunas(database)]
    finally:
        database.close()


def check(url: str) -> list[str]:
    """The versions of all tables, as lines.

    Raises:
        StorageError: they are not there, or not of this package's versions.
    """
    database = Database(url, read_only=True)
    try:
        if not (has_schema(database) and RetryingStorage(database).has_schema()):
            raise StorageError(
                f"storage: {database!r}: expected the tuner's tables, got none; `tuner db upgrade` makes them"
            )
        check_schema(database)
        versions = optuna_versions(database)
        if not versions.equal:
            raise StorageError(
                f"storage: {database!r}: expected Optuna schema {versions.expected}, got {versions.found}; stop "
                "every worker, then `tuner db upgrade`"
            )
        return [f"tuner schema {SCHEMA_VERSION}: as expected", f"Optuna schema {versions.found}: as expected"]
    finally:
        database.close()


def _upgrade_ours(database: Database) -> list[str]:
    if not has_schema(database):
        create_schema(database)
        return [f"tuner schema {SCHEMA_VERSION}: made"]
    lines: list[str] = []

    def begin(version: int) -> None:
        lines.extend(_prepare(database, version))

    found = migrate(database, begin)
    if found == SCHEMA_VERSION:
        return [f"tuner schema {SCHEMA_VERSION}: up to date"]
    return [*lines, f"tuner schema {found}: upgraded to {SCHEMA_VERSION}"]


def _upgrade_optunas(database: Database) -> list[str]:
    storage = RetryingStorage(database)
    if not storage.has_schema():
        storage.create_schema()
        return [f"Optuna schema {optuna_versions(database).found}: made"]
    versions = optuna_versions(database)
    if versions.equal:
        return [f"Optuna schema {versions.found}: up to date"]
    lines = _prepare(database, schema_version(database))
    upgrade_optuna(database)
    return [*lines, f"Optuna schema {versions.found}: upgraded to {versions.expected}"]


def _prepare(database: Database, version: int) -> list[str]:
    """Refuse while anybody works on the tables; back them up where that is one file."""
    # What is asked of the table of workers here has been the same in every version.
    alive = [worker for worker in Store(database).workers() if _may_write(worker)]
    if alive:
        names = ", ".join(f"{worker.identity.host} pid {worker.identity.pid}" for worker in alive)
        raise StorageError(
            f"storage: {database!r}: expected no worker, got {names} at work; stop them, then `tuner db upgrade`"
        )
    if not database.is_sqlite:
        return ["no backup was made: pg_dump makes one"]
    backup = database.path.with_name(f"{database.path.name}.schema-{version}.bak")
    _copy(database.path, backup)
    return [f"backup: {backup}"]


def _may_write(worker: WorkerRow) -> bool:
    """Whether it lives, for all that can be known here: on another host its lease has not run out."""
    if worker.ended_at is not None:
        return False
    dead = is_dead(worker.identity)
    return worker.age_s <= GRACE_S if dead is None else not dead


def _copy(source: Path, target: Path) -> None:
    """A consistent copy of a SQLite file that others may have open; whole, or not there."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        reading, writing = sqlite3.connect(source), sqlite3.connect(temporary)
        try:
            reading.backup(writing)
            writing.execute("PRAGMA journal_mode=DELETE")
        finally:
            reading.close()
            writing.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(
            f"storage: {target}: cannot write the backup ({error}); free space or mend the folder's permissions"
        ) from error
