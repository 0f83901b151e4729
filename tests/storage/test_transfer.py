"""What two databases know of the same data is known once where they meet: looks, certificates, models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.runs import Store
from storage.tables import certificates, create_schema, looks
from storage.transfer import Side, Transfer

DATA = "d"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Store]:
    """A database with a study `s` and its first evaluation."""
    database = Database(f"sqlite:///{tmp_path}/source.db")
    create_schema(database)
    store = Store(database)
    row = store.create_study("s", "{}", json.dumps({"data_hash": DATA}), "0.1", 10)
    store.create_evaluation(row.id, 1, "s.evaluation-1", {})
    store.create_study("s.evaluation-1", "{}", json.dumps({"data_hash": DATA}), "0.1", 2)
    yield store
    database.close()


@contextmanager
def transfer(source: Store, target: Store, new: str = "s") -> Iterator[Transfer]:
    with source.database.transaction() as reading, target.database.transaction() as writing:
        yield Transfer(Side(source.database, reading), Side(target.database, writing), "s", new)


def moved(source: Store, target: Store, new: str = "s") -> list[tuple[int, int]]:
    """All that hangs on the study's data; the study itself is not there."""
    with transfer(source, target, new) as copy:
        copy.copy_models()
        copy.copy_looks()
        return copy.copy_certificates()


def look(store: Store, evaluation: str, model: str, role: str = "test", close: bool = True) -> None:
    found = store.open_look(DATA, role, evaluation.partition(".")[0], evaluation, model)
    if close:
        store.close_look(found.id)


def certificate(store: Store, evaluation: str, model: str, content: dict[str, Any] | None = None) -> float:
    row = store.open_certificate(
        DATA, evaluation.partition(".")[0], evaluation, model, lambda number: 0.1 / number**2
    )
    if content is not None:
        store.issue_certificate(row.id, content)
    return row.delta


def model(store: Store, checksum: str, name: str = "s") -> int:
    key = f"models/{name}/{checksum}"
    return store.add_model(name, f"{name}.evaluation-1", key, checksum, 1, {}, {}, None, DATA, "0.1").version


def events(store: Store) -> list[tuple[str, str, str]]:
    return [(row.evaluation, row.role, row.model) for row in store.looks(DATA)]


# --- looks -----------------------------------------------------------------------------------------------------


def test_a_look_is_known_once_under_whichever_name(source: Store, store: Store) -> None:
    look(source, "s.evaluation-1", "m")
    look(source, "other.evaluation-1", "n")
    moved(source, store)
    assert store.looks(DATA) == source.looks(DATA)
    moved(source, store)
    moved(source, store, "new")
    assert len(store.looks(DATA)) == 2


def test_a_look_goes_under_the_studys_new_name(source: Store, store: Store) -> None:
    look(source, "s.evaluation-1", "m")
    look(source, "s.evaluation-1/again-1", "m")
    look(source, "s2.evaluation-1", "m")
    moved(source, store, "new")
    assert events(store) == [
        ("new.evaluation-1", "test", "m"),
        ("new.evaluation-1/again-1", "test", "m"),
        ("s2.evaluation-1", "test", "m"),
    ]
    assert {row.study for row in store.looks(DATA)} == {"new", "s2"}


def test_a_look_that_was_open_is_closed_by_who_knows_better(source: Store, store: Store) -> None:
    look(source, "s.evaluation-1", "m", close=False)
    certificate(source, "s.evaluation-1", "m")
    moved(source, store)
    look(source, "s.evaluation-1", "m")
    certificate(source, "s.evaluation-1", "m", {"status": "certified"})
    moved(source, store)
    assert store.looks(DATA) == source.looks(DATA)
    assert store.certificates(DATA) == source.certificates(DATA)
    assert store.certificates(DATA)[0].content == {"status": "certified"}
    # What is known better here stays.
    with source.database.transaction() as connection:
        connection.execute(looks.update().values(scored_at=None))
        connection.execute(certificates.update().values(content=None, issued_at=None))
    moved(source, store)
    assert store.looks(DATA)[0].scored_at is not None
    assert store.certificates(DATA)[0].content == {"status": "certified"}


def test_another_ones_look_under_the_same_name_is_a_further_look(source: Store, store: Store) -> None:
    for each in (store, source):  # two databases, each with a study `other` of its own
        look(each, "other.evaluation-1", "m")
        certificate(each, "other.evaluation-1", "m")
    moved(source, store)
    assert events(store) == [("other.evaluation-1", "test", "m"), ("other.evaluation-1/again-1", "test", "m")]
    assert [row.evaluation for row in store.certificates(DATA)] == [
        "other.evaluation-1", "other.evaluation-1/again-1",
    ]  # fmt: skip


@pytest.mark.parametrize("evaluation", ["s.evaluation-1", "s.evaluation-1/again-2"])
def test_a_study_does_not_take_the_looks_of_a_deleted_namesake_for_its_own(
    source: Store, store: Store, evaluation: str
) -> None:
    look(store, evaluation, "x")
    look(source, "s.evaluation-1", "m")
    with pytest.raises(StorageError, match=r"expected nothing of s\.evaluation-1.* --study NEW"):
        moved(source, store)
    assert events(store) == [(evaluation, "test", "x")]
    moved(source, store, "new")
    assert events(store)[1:] == [("new.evaluation-1", "test", "m")]


def test_looks_at_other_data_stay_where_they_are(source: Store, store: Store) -> None:
    source.open_look("other data", "test", "s", "s.evaluation-1", "m")
    moved(source, store)
    with store.database.transaction() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(looks)) == 0


# --- certificates ----------------------------------------------------------------------------------------------


def test_certificates_are_numbered_on_and_keep_what_they_spent(source: Store, store: Store) -> None:
    here = [certificate(store, "other.evaluation-1", name) for name in "ab"]
    came = [certificate(source, "s.evaluation-1", name, {"number_on_set": n}) for n, name in enumerate("cde", 1)]
    assert moved(source, store) == [(1, 3), (2, 4), (3, 5)]
    rows = store.certificates(DATA)
    assert [(row.number, row.model) for row in rows] == list(enumerate("abcde", 1))
    assert [row.delta for row in rows] == [*here, *came]
    assert [row.content for row in rows[2:]] == [{"number_on_set": n} for n in (1, 2, 3)]  # as it was issued
    assert moved(source, store) == []
    row = store.open_certificate(DATA, "t", "t.evaluation-1", "f", lambda number: 0.1 / number**2)
    assert (row.number, row.delta) == (6, 0.1 / 36)


# --- models ------------------------------------------------------------------------------------------------------


def test_models_come_with_their_champion_and_history(source: Store, store: Store) -> None:
    for checksum in "abc":
        source.promote("s", model(source, checksum), None if checksum == "a" else ord(checksum) - ord("a"), {})
    source.rollback("s", 3)
    model(source, "z", "another")
    with transfer(source, store) as copy:
        assert copy.copy_models() == 3
    assert store.models() == source.models("s")
    assert store.promotions("s") == source.promotions("s")
    champion = store.rollback("s", 2)  # goes on where it was
    assert champion.version == 1
    with transfer(source, store, "new") as copy:
        assert copy.copy_models() == 3
    first = store.models("new")[0]
    assert (first.evaluation, first.artifact) == ("new.evaluation-1", "models/s/a")


def test_what_a_deleted_study_left_in_the_registry_stays_as_it_is(source: Store, store: Store) -> None:
    model(source, "a")
    with transfer(source, store) as copy:
        copy.copy_models()
    store.promote("s", model(store, "b"), None, {})
    with transfer(source, store) as copy:
        assert copy.copy_models() == 0
    assert [(m.version, m.state) for m in store.models("s")] == [(1, "candidate"), (2, "champion")]


def test_models_of_another_study_of_this_name_are_refused(source: Store, store: Store) -> None:
    model(source, "a")
    model(store, "x")
    told = r"registry: s: expected no model of this name, got version 1 of another study; take .* --study NEW"
    with pytest.raises(StorageError, match=told):
        moved(source, store)
    assert [row.checksum for row in store.models()] == ["x"]


# --- a study that is gone --------------------------------------------------------------------------------------


def test_a_study_that_is_not_there_is_told(source: Store, store: Store) -> None:
    with pytest.raises(StorageError, match="study 's' is not in"), transfer(store, source):
        pass
