"""The version of Optuna's own tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from alembic.util.exc import CommandError
from sqlalchemy.exc import SQLAlchemyError

from storage.database import Database, StorageError


@dataclass(frozen=True)
class OptunaVersions:
    """Of the tables: as `found`, and as this Optuna `expected` them."""

    found: str
    expected: str

    @property
    def equal(self) -> bool:
        return self.found == self.expected


def optuna_versions(database: Database) -> OptunaVersions:
    """Of tables that are there (RetryingStorage.has_schema)."""
    with _plain_storage(database) as storage:
        return OptunaVersions(storage.get_current_version(), storage.get_head_version())


def upgrade_optuna(database: Database) -> None:
    """Bring Optuna's tables to this Optuna's version, by Optuna's own migrations. The caller holds the lock.

    Raises:
        StorageError: they are newer than this Optuna, or the database refused.
    """
    # Without a handler there, Optuna's migrations set up the process's logging.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with _plain_storage(database) as storage:
            storage.upgrade()
    except (CommandError, SQLAlchemyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(
            f"storage: {database!r}: Optuna {optuna.__version__} cannot upgrade its tables ({reason}); restore "
            "the backup, or use the Optuna version that wrote them"
        ) from error
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _plain_storage(database: Database) -> Iterator[optuna.storages.RDBStorage]:
    """Optuna's storage on an engine of its own: it nests two connections, which ours forbids on SQLite."""
    url = database.url.render_as_string(hide_password=False)
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True, skip_compatibility_check=True)
    except SQLAlchemyError as error:
        raise StorageError(f"storage: {database!r}: {str(error).splitlines()[0]}") from error
    try:
        yield storage
    finally:
        storage.engine.dispose()
