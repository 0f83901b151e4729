"""A database with our tables and one study in it: on SQLite, then on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.database import Database
from storage.runs import Store
from storage.tables import create_schema


@pytest.fixture
def database(storage_url: str) -> Iterator[Database]:
    database = Database(storage_url)
    create_schema(database)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def study(store: Store) -> int:
    return store.create_study("s", "{}", '{"data_hash": "d"}', "0.1", 10).id
