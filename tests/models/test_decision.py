from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from models.decision import _highest_bound, decide, most_selected, precision_bound
from models.metrics import Ranking, Truth
from models.trainer import Decision


def ranking(scores: object, labels: object) -> Ranking:
    truth = Truth.of(torch.as_tensor(np.asarray(labels)), name="valid/gift")
    return Ranking.of(torch.as_tensor(np.asarray(scores, dtype=np.float32)), truth)


def decision(target: float, confidence: float = 0.9, min_selected: int = 1, range: object = None) -> Decision:
    return Decision(
        task="gift", target_precision=target, confidence=confidence, min_selected=min_selected, range=range
    )


def lower_bound(n: int, tp: int, confidence: float) -> float:
    return float(beta.ppf(1.0 - confidence, tp, n - tp + 1)) if tp else 0.0


def brute_force(scores: np.ndarray, labels: np.ndarray, rule: Decision) -> tuple[dict, list[dict]]:
    """The chosen cut and all allowed cuts, by going through every distinct score."""
    cuts = []
    for threshold in np.unique(scores):
        selected = scores >= threshold
        n, tp = int(selected.sum()), int(labels[selected].sum())
        p = 1.0 / (1.0 + math.exp(-float(threshold)))
        if n < rule.min_selected or (rule.range and not rule.range[0] <= p <= rule.range[1]):
            continue
        fine = tp > 0 and binom.sf(tp - 1, n, rule.target_precision) <= 1.0 - rule.confidence
        bound = lower_bound(n, tp, rule.confidence)
        cuts.append({"n": n, "tp": tp, "threshold": float(threshold), "bound": bound, "fine": fine})
    feasible = [cut for cut in cuts if cut["fine"]]
    chosen = max(feasible, key=lambda cut: (cut["tp"], -cut["n"])) if feasible else None
    return chosen, cuts


def check(scores: np.ndarray, labels: np.ndarray, rule: Decision) -> None:
    found = decide(ranking(scores, labels), rule)
    chosen, cuts = brute_force(scores, labels, rule)
    assert all(math.isfinite(value) for value in found.values())
    assert found["violation"] == rule.target_precision - found["precision_bound"]
    if not cuts:
        nothing = {"recall": 0.0, "precision_bound": 0.0, "violation": rule.target_precision, "n_selected": 0.0}
        assert found == nothing
        return
    if chosen is None:
        assert found["violation"] > 0.0
        assert found["precision_bound"] == pytest.approx(max(cut["bound"] for cut in cuts), rel=1e-9, abs=1e-12)
        chosen = next(cut for cut in cuts if cut["threshold"] == found["threshold"])
        if chosen["tp"] == 0:
            assert chosen["n"] == min(cut["n"] for cut in cuts)
    assert (found["violation"] <= 0.0) == chosen["fine"]
    assert found["threshold"] == chosen["threshold"]
    assert found["n_selected"] == chosen["n"] == (scores >= found["threshold"]).sum()
    assert found["precision"] == chosen["tp"] / chosen["n"]
    assert found["recall"] == chosen["tp"] / labels.sum()
    assert found["precision_bound"] == pytest.approx(chosen["bound"], rel=1e-9, abs=1e-12)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A few to many rows, scores with few or many ties, labels related to them or not."""
    n = draw(st.integers(1, 60))
    levels = draw(st.sampled_from([1, 2, 5, 20, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = rng.normal(size=n)
    labels = (rng.random(n) < 1.0 / (1.0 + np.exp(draw(st.sampled_from([-4.0, 0.0, 4.0])) * raw))).astype(int)
    assume(labels.any())
    return (np.floor(raw * levels / 3.0) * 3.0 / levels).astype(np.float32), labels


@settings(max_examples=300, deadline=None)
@given(
    data=scored(),
    target=st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.9]),
    confidence=st.sampled_from([0.2, 0.5, 0.9, 0.99]),
    min_selected=st.sampled_from([1, 2, 5, 30, 61]),
    limits=st.sampled_from([None, (0.0, 1.0), (0.3, 0.7), (0.0, 0.2), (0.55, 0.56), (0.9999999, 1.0)]),
)
def test_against_every_cut_point(
    data: tuple, target: float, confidence: float, min_selected: int, limits: object
) -> None:
    check(*data, decision(target, confidence, min_selected, limits))


@pytest.mark.parametrize("target", [0.05, 0.2, 0.4, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_against_every_cut_point_on_more_rows(seed: int, target: float) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(3000) < 0.1).astype(int)
    scores = (rng.normal(size=3000) + 1.2 * labels).round(3).astype(np.float32)
    check(scores, labels, decision(target, min_selected=30))


@pytest.mark.parametrize("target", [0.05, 0.3])
def test_constant_scores_leave_one_cut(target: float) -> None:
    labels = np.arange(1000) % 10 == 0
    check(np.zeros(1000, np.float32), labels.astype(int), decision(target, min_selected=30))


def test_all_rows_positive_select_all() -> None:
    found = decide(ranking(np.arange(50), np.ones(50)), decision(0.9, min_selected=30))
    assert (found["recall"], found["n_selected"], found["threshold"]) == (1.0, 50.0, 0.0)
    assert found["precision_bound"] == pytest.approx(0.1 ** (1 / 50))


def test_the_smallest_allowed_cut_may_end_at_a_negative() -> None:
    labels = np.r_[np.ones(3), np.zeros(97)]
    found = decide(ranking(-np.arange(100), labels), decision(0.05, min_selected=30))
    assert (found["n_selected"], found["threshold"]) == (30.0, -29.0)
    assert found["precision_bound"] == pytest.approx(lower_bound(30, 3, 0.9))


@pytest.mark.parametrize(("target", "n"), [(0.5, 2), (0.25, 1), (0.5, 3)])
def test_a_bound_that_equals_the_target_is_feasible(target: float, n: int) -> None:
    confidence = 1.0 - target**n  # n positives of n have the bound (1 - confidence) ** (1 / n): exact in binary
    found = decide(ranking(-np.arange(20), np.arange(20) < n), decision(target, confidence))
    assert (found["violation"], found["n_selected"]) == (0.0, n)
    above = math.nextafter(target, 1.0)
    found = decide(ranking(-np.arange(20), np.arange(20) < n), decision(above, confidence))
    assert 0.0 < found["violation"] < 1e-12


def test_neighbouring_floats_are_told_apart() -> None:
    scores = np.full(40, 1.0, np.float32)
    scores[20:] = np.nextafter(np.float32(1.0), np.float32(0.0))
    found = decide(ranking(scores, np.arange(40) < 20), decision(0.8, min_selected=5))
    assert (found["n_selected"], found["threshold"]) == (20.0, 1.0)
    assert (scores >= found["threshold"]).sum() == 20


def test_the_range_is_inclusive_and_in_probabilities() -> None:
    scores = np.array([2.0, 0.0, -2.0], np.float32)
    found = decide(ranking(scores, [1, 1, 1]), decision(0.2, range=(0.5, 1.0)))
    assert (found["threshold"], found["n_selected"]) == (0.0, 2.0)
    found = decide(ranking(scores, [1, 1, 1]), decision(0.2, range=(0.0, 0.5)))
    assert (found["threshold"], found["n_selected"]) == (-2.0, 3.0)
    found = decide(ranking(scores, [1, 1, 1]), decision(0.2, range=(0.0, math.nextafter(0.5, 0.0))))
    assert found["threshold"] == -2.0
    found = decide(ranking(scores[:2], [1, 1]), decision(0.2, range=(math.nextafter(0.5, 1.0), 1.0)))
    assert found["threshold"] == 2.0


def test_without_any_positive_in_range_the_fewest_rows_are_nearest() -> None:
    labels = np.r_[np.zeros(50), np.ones(5)]
    found = decide(ranking(-np.arange(55) / 10.0, labels), decision(0.5, min_selected=7, range=(0.05, 0.9)))
    assert (found["n_selected"], found["recall"], found["precision_bound"]) == (7.0, 0.0, 0.0)
    assert found["violation"] == 0.5


def test_diverged_scores_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match=r"valid/gift: expected finite logits, got nan"):
        decide(ranking([1.0, math.nan, 0.0], [1, 0, 1]), decision(0.5))


def test_of_equal_recall_the_fewest_rows_are_selected_also_where_negatives_carry_money() -> None:
    labels = torch.tensor([1, 1, 0, 0, 0])
    truth = Truth.of(labels, torch.tensor([1.0, 0.0, 5.0, 0.0, 2.0]), name="valid/gift")
    found = decide(Ranking.of(torch.arange(5, 0, -1), truth), decision(0.2))
    assert (found["n_selected"], found["threshold"]) == (2.0, 4.0)


def test_the_ends_of_the_range_are_not_rounded_onto_a_score() -> None:
    p = 1.0 / (1.0 + math.exp(-1.0))
    below, above = p * (1.0 - 1e-10), p * (1.0 + 1e-10)  # as float32 logits both would round to 1.0
    two = ranking([1.0, 0.0], [1, 1])
    assert "threshold" not in decide(two, decision(0.9, range=(0.6, below)))
    assert decide(two, decision(0.9, range=(0.6, above)))["threshold"] == 1.0
    assert decide(two, decision(0.9, range=(below, 1.0)))["threshold"] == 1.0
    assert "threshold" not in decide(two, decision(0.9, range=(above, 1.0)))


@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.9, 0.999])
def test_the_nearest_cut_has_the_highest_bound(confidence: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = rng.integers(1, 400, 40)
        tp = rng.binomial(n, rng.beta(1, 9, 40) if rng.random() < 0.5 else 1.0 - 1.0 / (n + 1.0))
        found = _highest_bound(n.astype(float), tp.astype(float), confidence)
        bounds = precision_bound(n, tp, confidence)
        assert bounds[found] == bounds.max()


def test_bound_and_violation_never_contradict_the_tail() -> None:
    """The bound as a target: rounding decides, and must decide the same way everywhere."""
    contradictions = 0
    for n in range(30, 90):
        for tp in range(5, 25, 4):
            target = float(precision_bound(n, tp, 0.9))
            found = decide(ranking(np.zeros(n), np.arange(n) < tp), decision(target))
            feasible = bool(n <= most_selected(target, 0.9, tp)[tp])
            assert (found["violation"] <= 0.0) == feasible
            assert found["violation"] == target - found["precision_bound"]
            contradictions += not feasible
    assert contradictions > 0


def test_precision_bound_is_clopper_pearson() -> None:
    n, tp = np.array([1, 1, 30, 30, 1000, 10**6]), np.array([0, 1, 0, 29, 137, 60_000])
    for confidence in (0.3, 0.9, 0.999):
        found = precision_bound(n, tp, confidence)
        exact = [
            binomtest(int(k), int(m), alternative="greater").proportion_ci(confidence, method="exact").low
            for m, k in zip(n, tp, strict=True)
        ]
        assert found == pytest.approx(exact, rel=1e-9)
    assert precision_bound(30, 29, 0.9).shape == ()
    assert precision_bound([[10], [20]], [1, 2, 3], 0.9).shape == (2, 3)


@pytest.mark.parametrize("target", [0.004, 0.1, 0.6, 0.97])
@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.9, 0.999])
def test_the_limits_match_every_number_of_rows(target: float, confidence: float) -> None:
    n_rows = 300
    limits = most_selected(target, confidence, n_rows)
    n = np.arange(1, n_rows + 1)
    for tp in range(1, n_rows + 1):
        fine = (n >= tp) & (binom.sf(tp - 1, n, target) <= 1.0 - confidence)
        assert np.array_equal(fine, (n >= tp) & (n <= limits[tp])), tp
    assert limits[0] == 0
    assert bool((np.diff(limits[1:]) > 0).all())


@pytest.mark.parametrize(("target", "n_positive"), [(0.1, 100_000), (0.001, 2_000), (0.9, 50_000)])
def test_the_limits_are_exact_and_quick_for_a_million_rows(target: float, n_positive: int) -> None:
    start = time.process_time()
    limits = most_selected(target, 0.9, n_positive)
    assert time.process_time() - start < 3.0
    tp = np.unique(np.geomspace(1, n_positive, 200).astype(int))
    alpha = 1.0 - 0.9
    assert bool((np.where(limits[tp] < tp, 0.0, binom.sf(tp - 1, limits[tp], target)) <= alpha).all())
    assert bool((binom.sf(tp - 1, limits[tp] + 1, target) > alpha).all())
