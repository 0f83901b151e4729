"""What a threshold does on later rows: by hand, by scipy, and against populations whose truth is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import f1_score, recall_score

from models.certificate import Certificate, Sequence, certify
from models.check import Check, check, hold
from models.precision import JudgedRows
from models.trainer import Decision, InputError
from tests.models.populations import Population


def decision(unit: str = "row") -> Decision:
    return Decision(task="gift", target_precision=0.6, min_selected=30, unit=unit)


def certified(n: int = 1000, n_true: int = 700, unit: str = "row") -> Certificate:
    """Of n rows with the score 0 and a unit each."""
    scores, labels = np.zeros(n, np.float32), np.arange(n) < n_true
    return certify(scores, labels, np.arange(n), Sequence((0.0,), (n,)), decision(unit), 0.1)


def held(threshold: float, scores: np.ndarray, labels: np.ndarray, unit: np.ndarray, kind: str = "row") -> Check:
    return hold(threshold, 0.6, JudgedRows.of("test", scores, labels, unit, kind))


@pytest.mark.parametrize(
    ("n_true", "kept", "refuted", "says"),
    [(130, True, False, "kept"), (115, False, False, "may be chance"), (90, False, True, "not by chance alone")],
)
def test_a_check_on_test(n_true: int, kept: bool, refuted: bool, says: str) -> None:
    scores, labels = np.float32([1.0] * 200 + [-1.0] * 300), np.arange(500) < n_true
    labels[-20:] = True
    found = check(certified(), scores, labels, np.arange(500))
    interval = binomtest(n_true, 200).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.low_rows, found.high_rows) == (None, None), "the row is the unit: nothing to compare with"
    assert (found.n_rows, found.n_selected, found.n_true, found.precision) == (500, 200, n_true, n_true / 200)
    assert (found.kept, found.refuted) == (kept, refuted)
    recall = binomtest(n_true, n_true + 20).proportion_ci(0.95, method="exact")
    assert found.recall == pytest.approx(n_true / (n_true + 20))
    assert (found.recall_low, found.recall_high) == pytest.approx((recall.low, recall.high))
    assert says in found.sentence
    assert f"{n_true} of 200" in found.sentence


def test_a_check_treats_the_unit_as_the_unit_and_tells_what_rows_would_say() -> None:
    certificate = certified(unit="user")
    labels, unit = np.arange(200) < 90, np.arange(200) // 20
    rows = check(certificate, np.ones(200, np.float32), labels, np.arange(200))
    users = check(certificate, np.ones(200, np.float32), labels, unit)
    assert rows.refuted
    assert not users.refuted
    assert (users.n_units, users.n_selected) == (10, 200)
    assert users.low < rows.low < rows.high < users.high
    assert (users.low_rows, users.high_rows) == (rows.low, rows.high)
    assert users.n_effective < rows.n_effective == 200


def test_a_check_without_selected_rows_judges_nothing() -> None:
    found = check(certified(), -np.ones(50, np.float32), np.zeros(50), np.arange(50))
    assert (found.kept, found.refuted, found.precision, found.recall, found.f1) == (None, False, None, None, None)
    assert (found.low, found.high, found.recall_low, found.f1_high) == (0.0, 1.0, None, None)


def test_with_positives_but_none_selected_recall_and_f1_are_nothing_and_known_to_be_little() -> None:
    found = held(0.0, -np.ones(50, np.float32), np.arange(50) < 40, np.arange(50))
    assert (found.recall, found.f1, found.kept) == (0.0, 0.0, None)
    assert found.recall_low == found.f1_low == 0.0
    assert 0.0 < found.recall_high == pytest.approx(1 - 0.025 ** (1 / 40))


@pytest.mark.parametrize("kind", ["row", "user"])
def test_recall_and_f1_are_those_of_scikit_learn_and_lie_in_their_intervals(kind: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        scores = rng.normal(size=300).astype(np.float32)
        labels, unit = rng.random(300) < 1 / (1 + np.exp(-scores)), rng.integers(0, 40, 300)
        found = held(0.5, scores, labels, unit, kind)
        assert found.recall == pytest.approx(recall_score(labels, scores >= 0.5))
        assert found.f1 == pytest.approx(f1_score(labels, scores >= 0.5))
        assert found.recall_low < found.recall < found.recall_high
        assert found.f1_low < found.f1 < found.f1_high


def test_intervals_of_recall_and_f1_hold_where_rows_hang_together_and_those_of_rows_do_not() -> None:
    population = Population(0.4, (1.0,), shared=0.5, correlation=0.3)
    recall, precision = float(norm.sf(0.5 - 1.0)), population.precision(0, 0.5)
    truth = {"recall": recall, "f1": 2 * precision * recall / (precision + recall)}
    rng, n = np.random.default_rng(11), 300
    missed = {(kind, name): 0 for kind in ("row", "day") for name in truth}
    for _ in range(n):
        rows = population.draw(rng, 60, 20)
        for kind in ("row", "day"):
            found = held(0.5, rows.scores[0], rows.labels, rows.unit, kind).as_json()
            for name, value in truth.items():
                missed[kind, name] += not found[f"{name}_low"] <= value <= found[f"{name}_high"]
    allowed = binom.ppf(0.999, n, 0.05)
    assert max(missed["day", name] for name in truth) <= allowed
    assert min(missed["row", name] for name in truth) > allowed


def test_the_threshold_takes_equal_scores_along() -> None:
    scores = np.float32([0.1, 0.1, 0.3, -0.5])
    found = held(float(np.float32(0.1)), scores, np.array([1, 0, 1, 1]), np.arange(4))
    assert (found.n_selected, found.n_true) == (3, 2)
    assert found.recall == pytest.approx(2 / 3)


def test_a_check_is_json_and_back_and_an_older_one_lacks_what_is_new() -> None:
    found = held(0.0, np.zeros(50, np.float32), np.arange(50) < 40, np.arange(50) // 2, "user")
    content: dict[str, Any] = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert Check.from_json(content) == found
    new = ("low_rows", "high_rows", "recall_low", "recall_high", "f1", "f1_low", "f1_high")
    older = Check.from_json({name: value for name, value in content.items() if name not in new})
    assert (older.precision, older.f1, older.low_rows) == (found.precision, None, None)


def test_what_is_not_certified_is_not_checked() -> None:
    with pytest.raises(InputError, match="expected a certified threshold to check, got an infeasible"):
        check(certified(n_true=10), np.zeros(5, np.float32), np.ones(5), np.arange(5))
