"""Fixtures of the gift tests."""

from __future__ import annotations

import pytest

from models.gift.data import GiftData, load
from models.trainer import DataSpec
from tests.models.gift.tables import KUAILIVE, SEARCH


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """A specification whose default path is absent, its cache filled once."""
    folder = tmp_path_factory.mktemp("kuailive")
    given = DataSpec(GiftData(**KUAILIVE), folder / "data" / "KuaiLive", folder / "cache")
    load(given, SEARCH)
    return given
