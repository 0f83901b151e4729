"""The registry's tables, on SQLite and on PostgreSQL: versions, one champion, promotions that race."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.registry import RegistryConflict
from storage.rows import ModelRow
from storage.runs import Store
from storage.tables import models
from tests.race import counted, race


def add(store: Store, checksum: str = "c", name: str = "m", **changes: Any) -> ModelRow:
    values = {
        "evaluation": "s.evaluation-1", "artifact": f"models/{name}/{checksum}", "size_bytes": 7_000_000_000,
        "config": {"x": 0.5}, "metrics": {"pr_auc": {"value": 0.3}}, "certificate": {"status": "certified"},
        "data_hash": "d", "package_version": "0.2.0", **changes,
    }  # fmt: skip
    return store.add_model(name, checksum=checksum, **values)


def three(store: Store) -> None:
    for checksum in ("c1", "c2", "c3"):
        add(store, checksum)


def states(store: Store, name: str = "m") -> list[str]:
    return [row.state for row in store.models(name)]


class TestModels:
    def test_a_new_one_is_a_candidate(self, store: Store) -> None:
        row = add(store)
        assert (row.name, row.version, row.state) == ("m", 1, "candidate")
        assert (row.config, row.metrics, row.certificate) == (
            {"x": 0.5}, {"pr_auc": {"value": 0.3}}, {"status": "certified"},
        )  # fmt: skip
        assert row.size_bytes == 7_000_000_000
        assert (row.created_at, row.changed_at) == pytest.approx((time.time(), time.time()), abs=5)
        assert store.find_model("m", 1) == row

    def test_versions_count_within_a_name(self, store: Store) -> None:
        three(store)
        add(store, "c1", name="a")
        assert [(row.name, row.version) for row in store.models()] == [("a", 1), ("m", 1), ("m", 2), ("m", 3)]
        assert [row.version for row in store.models("m")] == [1, 2, 3]
        assert store.models("nobody") == []

    def test_the_same_evaluation_and_checksum_is_one(self, store: Store) -> None:
        first = add(store)
        assert add(store, config={"x": 9}) == first
        assert add(store, evaluation="s.evaluation-2").version == 2
        assert add(store, "other").version == 3

    def test_it_gets_the_metrics_of_an_evaluation_that_went_on(self, store: Store) -> None:
        first = add(store)
        store.promote("m", 1, None, {})
        again = add(store, metrics={"pr_auc": {"value": 0.31}})
        assert (again.version, again.state, again.created_at) == (1, "champion", first.created_at)
        assert store.find_model("m") == again
        assert again.metrics == {"pr_auc": {"value": 0.31}}

    def test_without_a_certificate(self, store: Store) -> None:
        assert add(store, certificate=None).certificate is None

    def test_several_at_once_get_a_number_each(self, store: Store, storage_url: str) -> None:
        assert sorted(race(5, added, storage_url, True)) == [1, 2, 3, 4, 5]

    def test_one_several_times_at_once_is_one(self, store: Store, storage_url: str) -> None:
        assert race(5, added, storage_url, False) == [1] * 5

    def test_it_outlives_its_study(self, store: Store, study: int) -> None:
        add(store)
        store.delete_study(study)
        assert len(store.models()) == 1

    def test_who_is_not_there(self, store: Store) -> None:
        add(store)
        assert store.find_model("m", 2) is None
        assert store.find_model("m") is None
        assert store.find_model("nobody", 1) is None


class TestPromote:
    def test_the_champion_takes_the_place_of_the_former_one(self, store: Store) -> None:
        three(store)
        before = store.find_model("m", 1)
        assert before is not None
        time.sleep(0.01)
        first = store.promote("m", 1, None, {"passed": True})
        assert (first.version, first.state) == (1, "champion")
        assert first.changed_at > before.changed_at
        assert store.find_model("m") == first
        assert store.promote("m", 3, 1, {"n": 2}).version == 3
        assert states(store) == ["retired", "candidate", "champion"]
        history = [(row.version, row.former, row.action, row.gate) for row in store.promotions("m")]
        assert history == [(1, None, "promote", {"passed": True}), (3, 1, "promote", {"n": 2})]
        assert store.promotions("m")[0].at == pytest.approx(time.time(), abs=5)

    def test_again_it_changes_nothing(self, store: Store) -> None:
        three(store)
        first = store.promote("m", 2, None, {})
        assert store.promote("m", 2, None, {}) == first  # its answer was lost
        assert store.promote("m", 2, 2, {}) == first
        assert len(store.promotions("m")) == 1

    def test_a_retired_one_may_come_back(self, store: Store) -> None:
        three(store)
        store.promote("m", 1, None, {})
        store.promote("m", 2, 1, {})
        store.promote("m", 1, 2, {})
        assert states(store) == ["champion", "retired", "candidate"]

    @pytest.mark.parametrize(("expected", "named"), [(None, "no champion"), (3, "version 3")])
    def test_who_judged_against_another_champion_is_told(
        self, store: Store, expected: int | None, named: str
    ) -> None:
        three(store)
        store.promote("m", 1, None, {})
        with pytest.raises(RegistryConflict, match=f"expected {named} in service, got version 1"):
            store.promote("m", 2, expected, {})
        assert states(store) == ["champion", "candidate", "candidate"]
        assert len(store.promotions("m")) == 1

    def test_a_version_that_is_not_there(self, store: Store) -> None:
        three(store)
        store.promote("m", 1, None, {})
        with pytest.raises(StorageError, match="m: expected version 7, got none"):
            store.promote("m", 7, 1, {})
        assert states(store) == ["champion", "candidate", "candidate"]
        assert len(store.promotions("m")) == 1

    def test_names_do_not_touch_each_other(self, store: Store) -> None:
        add(store, name="a")
        add(store, name="b")
        store.promote("a", 1, None, {})
        store.promote("b", 1, None, {})
        assert states(store, "a") == states(store, "b") == ["champion"]

    def test_the_database_itself_knows_one_champion_a_name(self, store: Store) -> None:
        three(store)
        store.promote("m", 1, None, {})
        with pytest.raises(StorageError), store.database.transaction() as connection:
            connection.execute(sa.update(models).where(models.c.version == 2).values(state="champion"))
        assert states(store) == ["champion", "candidate", "candidate"]

    def test_of_several_at_once_one_wins_and_the_others_are_told(self, store: Store, storage_url: str) -> None:
        for index in range(5):
            add(store, f"c{index}")
        store.promote("m", 1, None, {})
        told = race(4, promoted, storage_url)
        (winner,) = [version for version in told if version is not None]
        champion = store.find_model("m")
        assert champion is not None
        assert champion.version == winner
        assert sorted(states(store)) == ["candidate"] * 3 + ["champion", "retired"]
        assert len(store.promotions("m")) == 2


class TestRollback:
    def test_the_former_champion_is_champion_again(self, store: Store) -> None:
        three(store)
        store.promote("m", 1, None, {})
        store.promote("m", 2, 1, {})
        back = store.rollback("m", 2)
        assert (back.version, back.state) == (1, "champion")
        assert states(store) == ["champion", "retired", "candidate"]
        newest = store.promotions("m")[-1]
        assert (newest.version, newest.former, newest.action) == (1, 2, "rollback")

    def test_each_takes_back_one_promotion(self, store: Store) -> None:
        three(store)
        for version, champion in ((1, None), (2, 1), (3, 2), (1, 3)):
            store.promote("m", version, champion, {})
        assert [store.rollback("m", champion).version for champion in (1, 3, 2)] == [3, 2, 1]
        with pytest.raises(StorageError, match="expected a champion before this one, got none"):
            store.rollback("m", 1)
        assert states(store) == ["champion", "retired", "retired"]
        store.promote("m", 3, 1, {})
        assert store.rollback("m", 3).version == 1

    def test_nothing_to_go_back_to(self, store: Store) -> None:
        three(store)
        for champion in (None, 1):
            with pytest.raises(StorageError, match="expected a champion before this one"):
                store.rollback("m", champion)
            store.promote("m", 1, None, {})
        assert len(store.promotions("m")) == 1

    def test_who_expected_another_champion_is_told(self, store: Store) -> None:
        three(store)
        store.promote("m", 1, None, {})
        store.promote("m", 2, 1, {})
        with pytest.raises(RegistryConflict, match="expected version 1 in service, got version 2"):
            store.rollback("m", 1)
        assert states(store) == ["retired", "champion", "candidate"]

    def test_of_several_at_once_one_rolls_back(self, store: Store, storage_url: str) -> None:
        three(store)
        for version, champion in ((1, None), (2, 1), (3, 2)):
            store.promote("m", version, champion, {})
        assert sorted(race(4, rolled_back, storage_url), key=str) == [2, None, None, None]
        assert states(store) == ["retired", "champion", "retired"]


def test_each_call_is_one_transaction(store: Store) -> None:
    with counted(store.database.engine) as counter:
        three(store)
        store.promote("m", 1, None, {})
        store.promote("m", 2, 1, {})
        store.rollback("m", 2)
        store.models(), store.find_model("m"), store.promotions("m")
    assert counter.transactions == 9


def added(index: int, url: str, own: bool) -> int:
    database = Database(url)
    try:
        return add(Store(database), f"c{index}" if own else "c").version
    finally:
        database.close()


def promoted(index: int, url: str) -> int | None:
    database = Database(url)
    try:
        return Store(database).promote("m", index + 2, 1, {}).version
    except RegistryConflict:
        return None
    finally:
        database.close()


def rolled_back(_index: int, url: str) -> int | None:
    database = Database(url)
    try:
        return Store(database).rollback("m", 3).version
    except RegistryConflict:
        return None
    finally:
        database.close()
