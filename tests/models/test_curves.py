"""models/curves.py: what is drawn is exact, small and plain."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import precision_recall_curve

from models.calibration import FocalInverse
from models.curves import MAX_POINTS, N_BINS, curves
from models.decision import decide
from models.metrics import Ranking, Truth
from models.trainer import Decision

DECISION = Decision(task="gift", target_precision=0.3, confidence=0.9)


def ranked(scores: np.ndarray, labels: np.ndarray, amounts: np.ndarray | None = None) -> Ranking:
    money = None if amounts is None else torch.as_tensor(amounts)
    truth = Truth.of(torch.as_tensor(labels), money, name="valid/gift")
    return Ranking.of(torch.as_tensor(scores.astype(np.float32)), truth)


def many(n: int = 20_000, decimals: int = 7, rate: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = rng.random(n) < rate
    return (rng.normal(size=n) - 3.0 + 1.5 * labels).round(decimals).astype(np.float32), labels


def chosen_of(ranking: Ranking, decision: Decision = DECISION) -> dict[str, float]:
    return decide(ranking, decision)


def points(curve: dict[str, list[float]]) -> list[tuple[float, ...]]:
    return list(zip(*curve.values(), strict=True))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 600))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 3, 40, 10**6]))
    scores = ((rng.integers(0, levels, n) - levels / 2.0) * 12.0 / levels).astype(np.float32)
    labels = rng.random(n) < draw(st.sampled_from([0.02, 0.3, 0.95]))
    assume(labels.any())
    return scores, labels


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_point_is_on_the_staircase_of_scikit_learn(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = problem
    ranking = ranked(scores, labels)
    chosen = chosen_of(ranking)
    drawn = curves(ranking, DECISION, chosen.get("threshold"))["pr"]
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    # where several thresholds at the end have all positives scikit-learn has them all, too
    exact = {float(t): (r, p) for r, p, t in zip(recall, precision, thresholds, strict=False)}
    assert 1 <= len(drawn["recall"]) <= MAX_POINTS
    for r, p, _, threshold in points(drawn):
        assert (r, p) == pytest.approx(exact[threshold], rel=1e-12)
    assert drawn["threshold"] == sorted(set(drawn["threshold"]), reverse=True)
    assert drawn["threshold"][0] == scores.max()
    assert (drawn["recall"][-1], drawn["precision"][-1]) == pytest.approx((1.0, labels.mean()))
    if "threshold" in chosen:
        at = drawn["threshold"].index(chosen["threshold"])
        names = {"recall": "recall", "precision": "precision", "bound": "precision_bound"}
        for name, decided in names.items():
            assert drawn[name][at] == pytest.approx(chosen[decided], rel=1e-9)


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    scores, labels = many()
    decision = Decision(task="gift", target_precision=0.3, confidence=0.8)
    drawn = curves(ranked(scores, labels), decision, None)["pr"]
    for recall, precision, bound, threshold in points(drawn):
        n, tp = int((scores >= threshold).sum()), int(labels[scores >= threshold].sum())
        assert (recall, precision) == pytest.approx((tp / labels.sum(), tp / n))
        expected = stats.beta.ppf(0.2, tp, n - tp + 1) if tp else 0.0
        assert bound == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("with_money", [False, True])
def test_points_are_spread_evenly_over_the_recall(with_money: bool) -> None:
    scores, labels = many(n=100_000)
    drawn = curves(ranked(scores, labels, labels * 5.0 if with_money else None), DECISION, None)["pr"]
    recall = np.array(drawn["recall"])
    assert len(recall) >= MAX_POINTS - 5
    assert np.diff(recall).max() < 1.5 / (MAX_POINTS - 3)


def test_a_cut_that_ends_at_negatives_is_drawn_where_it_was_chosen() -> None:
    """The smallest cut that is allowed may end at a negative; no positive has its score."""
    scores, labels = np.arange(100, 0, -1, dtype=np.float32), np.arange(100) < 10
    decision = Decision(task="gift", target_precision=0.9, min_selected=30)
    chosen = decide(ranked(scores, labels), decision)
    assert chosen["n_selected"] == 30
    drawn = curves(ranked(scores, labels), decision, chosen["threshold"])["pr"]
    at = drawn["threshold"].index(chosen["threshold"])
    assert drawn["precision"][at] == pytest.approx(1 / 3)
    assert len(curves(ranked(scores, labels), decision, None)["pr"]["recall"]) == len(drawn["recall"]) - 1


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([None, FocalInverse(0.25, 2.0)]))
def test_bins_share_out_all_rows_and_hold_whole_tie_groups(problem, inverse) -> None:
    scores, labels = problem
    probability = inverse or torch.sigmoid
    drawn = curves(ranked(scores, labels), DECISION, None, probability)["calibration"]
    count, predicted, observed = (np.array(drawn[name]) for name in ("count", "predicted", "observed"))
    assert 1 <= len(count) <= N_BINS
    assert all(type(n) is int and n > 0 for n in drawn["count"])
    order = np.argsort(scores, kind="stable")
    p = probability(torch.as_tensor(scores[order])).double().numpy()
    edges = np.concatenate([[0], np.cumsum(count)])
    assert edges[-1] == len(scores)
    ordered = scores[order]
    assert all(ordered[e - 1] < ordered[e] for e in edges[1:-1])
    for b, (start, end) in enumerate(itertools.pairwise(edges)):
        assert predicted[b] == pytest.approx(p[start:end].mean(), rel=1e-6)
        assert observed[b] == pytest.approx(labels[order][start:end].mean(), rel=1e-9)


def test_bins_expect_equally_many_positives() -> None:
    scores, labels = many(n=50_000)
    drawn = curves(ranked(scores, labels), DECISION, None)["calibration"]
    expected = np.array(drawn["count"]) * np.array(drawn["predicted"])
    assert len(expected) == N_BINS
    assert expected == pytest.approx(np.full(N_BINS, expected.mean()), abs=1.0)  # one row more or less


def test_a_calibrated_model_lies_on_the_diagonal() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(-4.0, 1.5, 200_000).astype(np.float32)
    labels = rng.random(len(scores)) < 1.0 / (1.0 + np.exp(-scores.astype(np.float64)))
    for shift, is_near in ((0.0, True), (0.5, False)):
        drawn = curves(ranked(scores + np.float32(shift), labels), DECISION, None)["calibration"]
        count, predicted, observed = (np.array(drawn[n]) for n in ("count", "predicted", "observed"))
        deviations = np.abs(observed - predicted) / np.sqrt(predicted * (1 - predicted) / count)
        assert (deviations.max() < 4.0) == is_near


def test_scores_so_low_that_nothing_is_expected_make_one_bin() -> None:
    drawn = curves(ranked(np.array([-200.0, -150.0, -120.0]), np.array([0, 1, 0])), DECISION, None)
    assert drawn["calibration"] == {"predicted": [0.0], "observed": [pytest.approx(1 / 3)], "count": [3]}


def test_all_is_plain_json() -> None:
    scores, labels = many()
    drawn = curves(ranked(scores, labels), DECISION, -3.0)
    assert json.loads(json.dumps(drawn, allow_nan=False)) == drawn
    assert len(json.dumps(drawn)) < 20_000
    for curve in drawn.values():
        assert len({len(values) for values in curve.values()}) == 1
        assert all(type(v) in (int, float) and math.isfinite(v) for values in curve.values() for v in values)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(odd: float) -> None:
    with pytest.raises(FloatingPointError, match="valid/gift: expected finite logits"):
        curves(ranked(np.array([0.0, odd, 1.0]), np.array([0, 1, 1])), DECISION, None)
