"""Databases with tables, closed after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.database import Database
from tests.searches import make_database


@pytest.fixture
def database(storage_url: str) -> Iterator[Database]:
    database = make_database(storage_url)
    yield database
    database.close()


@pytest.fixture
def sqlite(sqlite_with_tables_url: str) -> Iterator[Database]:
    database = Database(sqlite_with_tables_url)
    yield database
    database.close()
