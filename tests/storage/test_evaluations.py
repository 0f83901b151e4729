"""Evaluations, looks and certificates, on SQLite and on PostgreSQL."""

from __future__ import annotations

import time
from typing import Any

import pytest

from storage.database import Database, StorageError
from storage.rows import EvaluationRow
from storage.runs import Store
from tests.race import counted, race

NOW = {"abs": 5.0}


@pytest.fixture
def evaluation(store: Store, study: int) -> EvaluationRow:
    return store.create_evaluation(study, 1, "s.evaluation-1", {"seeds": 5})


class TestEvaluations:
    def test_a_new_one_has_come_to_nothing_yet(self, store: Store, study: int, evaluation: EvaluationRow) -> None:
        assert (evaluation.study_id, evaluation.number, evaluation.name) == (study, 1, "s.evaluation-1")
        assert evaluation.plan == {"seeds": 5}
        assert (evaluation.nominee, evaluation.document, evaluation.finished_at) == (None, None, None)
        assert evaluation.created_at == pytest.approx(time.time(), **NOW)
        assert store.find_evaluation("s.evaluation-1") == evaluation
        assert store.find_evaluation("s") is None

    def test_those_of_a_study_by_number(self, store: Store, study: int) -> None:
        other = store.create_study("other", "{}", "{}", "0.1", 10).id
        for number in (2, 1, 3):
            store.create_evaluation(study, number, f"s.evaluation-{number}", {})
        store.create_evaluation(other, 1, "other.evaluation-1", {})
        assert [row.number for row in store.evaluations(study)] == [1, 2, 3]
        assert [row.name for row in store.evaluations(other)] == ["other.evaluation-1"]

    @pytest.mark.parametrize(("number", "name"), [(1, "s.evaluation-2"), (2, "s.evaluation-1")])
    def test_a_taken_number_or_name_is_refused(
        self, store: Store, study: int, evaluation: EvaluationRow, number: int, name: str
    ) -> None:
        with pytest.raises(StorageError, match=f"expected evaluation {number} to be new, got one that is there"):
            store.create_evaluation(study, number, name, {})
        assert store.evaluations(study) == [evaluation]

    def test_of_several_at_once_one_begins_it(self, store: Store, study: int, storage_url: str) -> None:
        assert sorted(race(5, create_evaluation, storage_url, study)) == [False] * 4 + [True]
        assert len(store.evaluations(study)) == 1

    def test_the_nominee_is_fixed_once(self, store: Store, evaluation: EvaluationRow) -> None:
        assert store.set_nominee(evaluation.id, {"arm": "a"}) == {"arm": "a"}
        assert store.set_nominee(evaluation.id, {"arm": "b"}) == {"arm": "a"}
        found = store.find_evaluation(evaluation.name)
        assert found is not None
        assert found.nominee == {"arm": "a"}

    def test_everybody_hears_of_the_same_nominee(
        self, store: Store, evaluation: EvaluationRow, storage_url: str
    ) -> None:
        told = race(5, set_nominee, storage_url, evaluation.id)
        assert len({str(nominee) for nominee in told}) == 1

    def test_what_it_came_to(self, store: Store, evaluation: EvaluationRow) -> None:
        for text in ("first", "again"):
            store.finish_evaluation(evaluation.id, {"format": 1, "verdict": text, "x": None})
        found = store.find_evaluation(evaluation.name)
        assert found is not None
        assert found.document == {"format": 1, "verdict": "again", "x": None}
        assert found.finished_at == pytest.approx(time.time(), **NOW)

    def test_what_is_no_number_is_refused(self, store: Store, study: int, evaluation: EvaluationRow) -> None:
        bad = {"x": float("nan")}
        calls: list[Any] = [
            lambda: store.create_evaluation(study, 2, "n", bad), lambda: store.set_nominee(evaluation.id, bad),
            lambda: store.finish_evaluation(evaluation.id, bad),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ValueError, match="not JSON compliant"):
                call()
        assert store.evaluations(study) == [evaluation]

    def test_it_goes_with_its_study_and_says_so(self, store: Store, study: int, evaluation: EvaluationRow) -> None:
        store.delete_study(study)
        assert store.find_evaluation(evaluation.name) is None
        for call in (store.set_nominee, store.finish_evaluation):
            with pytest.raises(StorageError, match="evaluation 1 is gone"):
                call(evaluation.id, {})


class TestLooks:
    def test_opened_then_closed(self, store: Store) -> None:
        opened = store.open_look("d", "test", "s", "s.evaluation-1", "m1")
        assert (opened.data_hash, opened.role, opened.study, opened.evaluation, opened.model) == (
            "d", "test", "s", "s.evaluation-1", "m1",
        )  # fmt: skip
        assert opened.opened_at == pytest.approx(time.time(), **NOW)
        assert opened.scored_at is None
        store.close_look(opened.id)
        (closed,) = store.looks("d")
        assert closed.scored_at == pytest.approx(time.time(), **NOW)
        time.sleep(0.01)
        store.close_look(opened.id)
        assert store.looks("d") == [closed]

    def test_the_same_look_is_one(self, store: Store) -> None:
        first = store.open_look("d", "test", "s", "e", "m")
        store.close_look(first.id)
        again = store.open_look("d", "test", "s", "e", "m")
        assert again.id == first.id
        assert again.scored_at is not None
        assert len(store.looks("d")) == 1

    def test_who_looked_is_known_when_the_study_is_gone(self, store: Store, study: int) -> None:
        assert store.looked_by("s") == set()
        for evaluation, model in (("s.evaluation-1", "m"), ("s.evaluation-1", "n"), ("s.evaluation-2", "m")):
            store.open_look("d", "test", "s", evaluation, model)
        store.open_look("d", "test", "other", "other.evaluation-1", "m")
        store.delete_study(study)
        assert store.looked_by("s") == {"s.evaluation-1", "s.evaluation-2"}

    def test_another_role_model_or_evaluation_is_another(self, store: Store) -> None:
        looks = [("test", "e", "m"), ("calibrate", "e", "m"), ("test", "f", "m"), ("test", "e", "n")]
        for role, evaluation, model in looks:
            store.open_look("d", role, "s", evaluation, model)
        store.open_look("other", "test", "s", "g", "m")
        assert [(row.role, row.evaluation, row.model) for row in store.looks("d")] == looks
        assert [row.role for row in store.looks("d", "calibrate")] == ["calibrate"]
        assert len(store.looks("d", "test")) == 3

    def test_several_at_once_are_one(self, store: Store, storage_url: str) -> None:
        assert len(set(race(5, open_look, storage_url))) == 1
        assert len(store.looks("d")) == 1

    def test_it_outlives_its_study(self, store: Store, study: int) -> None:
        store.open_look("d", "test", "s", "s.evaluation-1", "m")
        store.delete_study(study)
        assert len(store.looks("d")) == 1


class TestCertificates:
    def test_numbered_on_its_data(self, store: Store) -> None:
        rows = [store.open_certificate("d", "s", "e", f"m{i}", lambda n: 0.1 / n) for i in range(3)]
        assert [row.number for row in rows] == [1, 2, 3]
        assert [row.delta for row in rows] == [0.1, 0.1 / 2, 0.1 / 3]
        elsewhere = store.open_certificate("other", "s", "f", "m0", lambda n: 0.1 / n)
        assert (elsewhere.number, elsewhere.delta) == (1, 0.1)
        assert store.certificates("d") == rows
        assert rows[0].opened_at == pytest.approx(time.time(), **NOW)
        assert (rows[0].content, rows[0].issued_at) == (None, None)

    def test_the_same_one_keeps_number_and_delta(self, store: Store) -> None:
        first = store.open_certificate("d", "s", "e", "m", lambda n: 0.1)
        store.open_certificate("d", "s", "f", "m", lambda n: 0.1)
        assert store.open_certificate("d", "s", "e", "m", lambda n: 0.7) == first
        assert len(store.certificates("d")) == 2

    def test_issued_once(self, store: Store) -> None:
        row = store.open_certificate("d", "s", "e", "m", lambda n: 0.1)
        store.issue_certificate(row.id, {"status": "certified"})
        (issued,) = store.certificates("d")
        assert issued.content == {"status": "certified"}
        assert issued.issued_at == pytest.approx(time.time(), **NOW)
        store.issue_certificate(row.id, {"status": "infeasible"})
        assert store.certificates("d") == [issued]
        assert store.open_certificate("d", "s", "e", "m", lambda n: 0.1) == issued

    def test_nothing_is_numbered_when_delta_cannot_be_told(self, store: Store) -> None:
        def no_delta(number: int) -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            store.open_certificate("d", "s", "e", "m", no_delta)
        assert store.certificates("d") == []

    def test_of_several_models_at_once_each_has_its_own_number(self, store: Store, storage_url: str) -> None:
        assert sorted(race(6, open_certificate, storage_url, True)) == [1, 2, 3, 4, 5, 6]
        assert [row.number for row in store.certificates("d")] == [1, 2, 3, 4, 5, 6]

    def test_of_one_model_at_once_there_is_one(self, store: Store, storage_url: str) -> None:
        assert race(6, open_certificate, storage_url, False) == [1] * 6

    def test_it_outlives_its_study(self, store: Store, study: int) -> None:
        store.open_certificate("d", "s", "s.evaluation-1", "m", lambda n: 0.1)
        store.delete_study(study)
        assert len(store.certificates("d")) == 1


def test_each_call_is_one_transaction(store: Store, study: int) -> None:
    with counted(store.database.engine) as counter:
        row = store.create_evaluation(study, 1, "s.evaluation-1", {})
        store.set_nominee(row.id, {})
        store.finish_evaluation(row.id, {})
        store.close_look(store.open_look("d", "test", "s", "e", "m").id)
        store.issue_certificate(store.open_certificate("d", "s", "e", "m", lambda n: 0.1).id, {})
        store.looks("d"), store.looked_by("s"), store.certificates("d"), store.evaluations(study)
    assert counter.transactions == 11


def create_evaluation(_index: int, url: str, study: int) -> bool:
    database = Database(url)
    try:
        Store(database).create_evaluation(study, 1, "s.evaluation-1", {})
    except StorageError:
        return False
    else:
        return True
    finally:
        database.close()


def set_nominee(index: int, url: str, evaluation: int) -> dict[str, Any]:
    database = Database(url)
    try:
        return Store(database).set_nominee(evaluation, {"arm": index})
    finally:
        database.close()


def open_look(_index: int, url: str) -> int:
    database = Database(url)
    try:
        return Store(database).open_look("d", "test", "s", "e", "m").id
    finally:
        database.close()


def open_certificate(index: int, url: str, own_model: bool) -> int:
    database = Database(url)
    try:
        model = f"m{index}" if own_model else "m"
        return Store(database).open_certificate("d", "s", "e", model, lambda n: 0.1 / n).number
    finally:
        database.close()
