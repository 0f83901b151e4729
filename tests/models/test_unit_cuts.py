"""models/unit_cuts.py and the decision rule where units count: the same as judging every cut by `Evidence`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

import models.decision
from models import unit_cuts
from models.curves import MAX_POINTS, curves
from models.decision import decide, precision_bound, range_of_logits
from models.metrics import Ranking, Truth
from models.precision import Evidence, JudgedRows, lower_bound, tail, worth
from models.trainer import Decision
from models.unit_cuts import UnitCuts, unit_codes

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def decision(target: float, confidence: float = 0.9, min_selected: int = 1, **more: object) -> Decision:
    given = {"task": "rise", "unit": "day", "target_precision": target, "confidence": confidence}
    return Decision(**given | {"min_selected": min_selected} | more)


def ranking(scores: object, labels: object) -> Ranking:
    truth = Truth.of(torch.as_tensor(np.asarray(labels)), name="valid/rise")
    return Ranking.of(torch.as_tensor(np.asarray(scores, np.float32)), truth)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Rows of few or many, even or uneven units that shift scores and labels; scores with few or many ties."""
    n, n_units = draw(st.integers(1, 120)), draw(st.sampled_from([1, 2, 5, 20, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    unit = (n_units * rng.random(n) ** draw(st.sampled_from([1, 3]))).astype(int)
    shift = rng.normal(size=n_units) * draw(st.sampled_from([0.0, 1.0, 5.0]))
    raw = rng.normal(size=n) + shift[unit] * draw(st.sampled_from([0.0, 0.7]))
    slope, base = draw(st.sampled_from([0.0, 2.0])), draw(st.sampled_from([-2.0, 0.0, 4.0, 40.0]))
    labels = (rng.random(n) < 1.0 / (1.0 + np.exp(-np.clip(base + slope * raw + shift[unit], -30, 30)))).astype(int)
    assume(labels.any())
    levels = draw(st.sampled_from([1, 3, 10, 1000]))
    return (np.floor(raw * levels) / levels).astype(np.float32), labels, unit


def judged(problem: Problem, confidence: float) -> list[tuple[float, Evidence]]:
    """Every cut from the highest score down."""
    scores, labels, unit = problem
    thresholds = np.unique(scores)[::-1]
    tallies = JudgedRows.of("valid", scores, labels, unit, "day").tallies(thresholds)
    return [(float(t), Evidence.of(k, 1.0 - confidence)) for t, k in zip(thresholds, tallies, strict=True)]


def check(problem: Problem, rule: Decision) -> None:
    scores, labels, unit = problem
    found = decide(ranking(scores, labels), rule, unit)
    low, high = range_of_logits(rule.range)
    cuts = [(t, e) for t, e in judged(problem, rule.confidence) if e.n >= rule.min_selected and low <= t <= high]
    if not cuts:
        nothing = {"recall": 0.0, "precision_bound": 0.0, "violation": rule.target_precision, "n_selected": 0.0}
        assert found == nothing | {"n_units": 0.0, "precision_bound_rows": 0.0}
        return
    feasible = [cut for cut in cuts if cut[1].p_value(rule.target_precision) <= 1.0 - rule.confidence]
    if feasible:
        threshold, best = max(feasible, key=lambda cut: (cut[1].n_true, -cut[1].n))
        bound = max(best.bound, rule.target_precision)
    else:
        threshold, best = max(cuts, key=lambda cut: (cut[1].bound, -cut[1].n))
        bound = best.bound
    assert (found["violation"] <= 0.0) == bool(feasible)
    if found["threshold"] != threshold:  # two bounds that differ by their rounding
        assert not feasible
        best = dict(cuts)[found["threshold"]]
    assert found["precision_bound"] == pytest.approx(bound, rel=1e-9, abs=1e-12)
    assert found["violation"] == rule.target_precision - found["precision_bound"]
    assert (found["n_selected"], found["n_units"]) == (best.n, best.n_units)
    assert (found["precision"], found["recall"]) == (best.n_true / best.n, best.n_true / labels.sum())
    assert found["precision_bound_rows"] == precision_bound(best.n, best.n_true, rule.confidence)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


@settings(max_examples=250, deadline=None)
@given(
    problem=problems(),
    target=st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.9]),
    confidence=st.sampled_from([0.2, 0.5, 0.6, 0.9, 0.99]),
    min_selected=st.sampled_from([1, 2, 10, 30, 121]),
    limits=st.sampled_from([None, (0.0, 1.0), (0.3, 0.7), (0.0, 0.2), (0.55, 0.56), (0.9999999, 1.0)]),
    first_rows=st.sampled_from([1, 5, 4096]),
)
def test_the_decision_is_that_of_judging_every_cut(
    problem: Problem, target: float, confidence: float, min_selected: int, limits: object, first_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.decision, "_FIRST_ROWS", first_rows)
        check(problem, decision(target, confidence, min_selected, range=limits))


@pytest.mark.parametrize("first_rows", [1, 100, 4096])
@pytest.mark.parametrize("target", [0.2, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_decision_is_that_of_judging_every_cut_of_more_rows(
    seed: int, target: float, first_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.decision, "_FIRST_ROWS", first_rows)
    rng = np.random.default_rng(seed)
    unit, shift = rng.integers(0, 60, 5000), rng.normal(size=60)
    scores = rng.normal(size=5000) + 0.3 * shift[unit]
    labels = rng.random(5000) < 1.0 / (1.0 + np.exp(1.0 - 0.7 * scores - 0.8 * shift[unit]))
    check((scores.astype(np.float32), labels.astype(int), unit), decision(target, min_selected=30))


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0.5, 0.7, 0.9, 0.99]), st.sampled_from([1, 7, 2**18]))
def test_ceilings_are_never_too_low_and_what_cuts_are_worth_is_that_of_evidence(
    problem: Problem, confidence: float, cells: int
) -> None:
    scores, labels, unit = problem
    cuts, delta = UnitCuts.of(ranking(scores, labels), unit), 1.0 - confidence
    expected = judged(problem, confidence)
    assert cuts.scores.tolist() == [t for t, _ in expected]
    evidence = [e for _, e in expected]
    for name in ("n", "n_true", "n_units"):
        assert getattr(cuts, name).tolist() == [getattr(e, name) for e in evidence]
    n_effective, bounds = (np.array([getattr(e, name) for e in evidence]) for name in ("n_effective", "bound"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_cuts, "_CELLS", cells)
        order = np.random.default_rng(0).permutation(len(expected))
        found = cuts.worth(order, delta)
    wanted = worth(cuts.n[order], cuts.n_true[order], n_effective[order])
    assert np.array(found) == pytest.approx(np.array(wanted), rel=1e-9, abs=1e-9)
    most = cuts.most_effective(delta)
    assert (most >= n_effective * (1.0 - 1e-12)).all()
    assert (most <= cuts.n).all()
    assert (cuts.ceilings(most, delta) >= bounds).all()
    assert (bounds <= precision_bound(cuts.n, cuts.n_true, confidence) + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 130))
def test_the_first_cuts_are_those_of_all(problem: Problem, n_rows: int) -> None:
    scores, labels, unit = problem
    ranked = ranking(scores, labels)
    every, first = UnitCuts.of(ranked, unit), UnitCuts.of(ranked, unit, n_rows)
    n_cuts = min(int(np.searchsorted(every.n, n_rows)) + 1, len(every.n))
    for name in ("scores", "n", "n_true", "n_units"):
        assert getattr(first, name).tolist() == getattr(every, name)[:n_cuts].tolist()
    for name in ("unit", "true"):
        assert getattr(first, name).tolist() == getattr(every, name)[: first.n[-1]].tolist()
    assert first.most_effective(0.1) == pytest.approx(every.most_effective(0.1)[:n_cuts], rel=1e-12)


@pytest.mark.parametrize("delta", [0.45, 0.1, 0.001])
def test_what_quantiles_leave_is_never_told_too_low(delta: float) -> None:
    places = np.geomspace(0.05, 1e12, 300)
    rows, freedom = (grid.ravel() for grid in np.meshgrid(places, places))
    rows, freedom = rows[freedom <= rows], freedom[freedom <= rows]
    level = 1.0 - min(delta, 0.4)
    exact = (stdtrit(rows, level) / stdtrit(freedom, level)) ** 2
    found = unit_cuts._most_left(rows, freedom, delta)
    assert (found * (1.0 + 1e-9) >= exact).all()
    assert (found <= 1.0).all()
    usual = freedom >= 2.0
    assert (found[usual] <= 1.06 * exact[usual]).all()
    assert unit_cuts._most_left(np.array([9.0]), np.array([-1.0]), delta) >= 0.0


@pytest.mark.parametrize("delta", [0.5, 0.4, 0.1, 0.01, 1e-6])
def test_more_effective_rows_never_lower_the_bound(delta: float) -> None:
    rows = np.geomspace(1e-3, 1e6, 2000)
    for share in (1e-4, 0.01, 0.3, 0.6, 0.99, 1.0):
        bounds = lower_bound(share * rows, (1.0 - share) * rows, delta)
        assert np.diff(bounds).min() >= -1e-300
    beyond = lower_bound(0.3 * rows, 0.7 * rows, 0.6)
    assert np.diff(beyond).min() < 0.0  # why a confidence below 0.5 has no ceilings


def test_ceilings_leave_few_cuts_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    unit, shift = rng.integers(0, 126, 20_000), rng.normal(size=126)
    scores = rng.normal(size=20_000).astype(np.float32)
    labels = rng.random(20_000) < 1.0 / (1.0 + np.exp(1.0 - 0.5 * scores - shift[unit]))
    n_judged, asked = 0, UnitCuts.worth

    def counted(self: UnitCuts, cuts: np.ndarray, delta: float) -> tuple:
        nonlocal n_judged
        n_judged += len(cuts)
        return asked(self, cuts, delta)

    monkeypatch.setattr(UnitCuts, "worth", counted)
    for target in (0.25, 0.35, 0.9):
        decide(ranking(scores, labels), decision(target, min_selected=30), unit)
    assert n_judged < 2000


# ---- one word means one thing


def test_forty_rows_of_one_day_are_one_event() -> None:
    """A day on which all that is selected rises: 40 of 40 rows, but one draw; the other days are as usual."""
    rng = np.random.default_rng(0)
    unit = np.r_[np.zeros(40, int), np.repeat(np.arange(1, 11), 4)]
    labels = np.r_[np.ones(40), rng.random(40) < 0.5].astype(int)
    ranked = ranking(np.r_[np.full(40, 2.0), np.full(40, 1.0)], labels)
    rule = decision(0.6, min_selected=60)
    rows, days = (decide(ranked, rule.model_copy(update={"unit": kind}), unit) for kind in ("row", "day"))
    assert rows["violation"] < 0.0 < days["violation"]
    assert days["precision_bound"] < 0.25 < 0.6 < rows["precision_bound"]
    assert days["precision_bound_rows"] == rows["precision_bound"]
    assert (days["n_selected"], days["n_units"]) == (80.0, 11.0)


def test_one_unit_proves_nothing() -> None:
    found = decide(ranking(-np.arange(50), np.ones(50)), decision(0.1, min_selected=7), np.zeros(50, int))
    assert (found["precision_bound"], found["violation"]) == (0.0, 0.1)
    assert (found["n_selected"], found["n_units"], found["precision"]) == (7.0, 1.0, 1.0)
    assert found["precision_bound_rows"] == pytest.approx(0.1 ** (1 / 7))


def test_units_that_all_agree_are_worth_their_number() -> None:
    found = decide(ranking(np.zeros(60), np.ones(60)), decision(0.5), np.arange(60) % 12)
    assert found["precision_bound"] == pytest.approx(0.1 ** (1 / 12))
    assert (found["violation"] < 0.0, found["n_units"]) == (True, 12.0)


def test_a_negative_of_another_unit_may_be_what_makes_a_cut_feasible() -> None:
    ranked, unit = ranking(-np.arange(10), np.arange(10) < 5), np.maximum(np.arange(10) - 4, 0)
    assert lower_bound(*UnitCuts.of(ranked, unit).worth(np.array([4]), 0.1), 0.1) == 0.0  # one unit, all true
    found = decide(ranked, decision(0.02), unit)
    assert found["violation"] <= 0.0
    assert found["n_units"] > 1.0


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.3, 0.6]))
def test_where_no_unit_repeats_units_are_rows(problem: Problem, target: float) -> None:
    scores, labels, _ = problem
    ranked, unit = ranking(scores, labels), np.random.default_rng(0).permutation(len(scores))
    by_unit = decide(ranked, decision(target), unit)
    by_row = decide(ranked, decision(target, unit="row"))
    assert by_unit["violation"] == pytest.approx(by_row["violation"], abs=1e-12)
    assert by_unit["recall"] == by_row["recall"] or by_row["violation"] > 0.0
    assert by_unit["n_units"] == by_unit["n_selected"]


def test_without_units_or_where_the_row_is_the_unit_rows_count() -> None:
    ranked = ranking(np.arange(50), np.arange(50) > 20)
    by_row = decide(ranked, decision(0.6, unit="row"))
    assert decide(ranked, decision(0.6, unit="row"), np.zeros(50, int)) == by_row
    assert decide(ranked, decision(0.6)) == by_row
    assert "n_units" not in by_row


def test_the_kind_of_ids_and_the_order_of_rows_change_nothing() -> None:
    rng = np.random.default_rng(4)
    unit, scores = rng.integers(0, 9, 300), rng.normal(size=300).round(1)
    labels = rng.random(300) < 1.0 / (1.0 + np.exp(-scores - 0.2 * unit))
    rule, expected = decision(0.6), decide(ranking(scores, labels), decision(0.6), unit)
    names = np.array([f"2023-01-{day + 1:02}" for day in range(9)])
    dates = names.astype("datetime64[D]")
    for ids in (
        names[unit], dates[unit], unit - 2**62, unit.astype(np.int8), unit / 8.0, unit_codes(names[unit]),
        torch.as_tensor(unit * 10**12 - 5), torch.as_tensor(unit / 8.0), torch.as_tensor(unit, dtype=torch.int16),
    ):  # fmt: skip
        assert decide(ranking(scores, labels), rule, ids) == expected
    order = rng.permutation(300)
    mixed = decide(ranking(scores[order], labels[order]), rule, unit[order])
    assert mixed == pytest.approx(expected)


def test_zeros_of_either_sign_are_one_score_and_infinite_ones_are_scores() -> None:
    scores = np.array([math.inf, math.inf, 0.0, -0.0, 0.0, -1.5, -math.inf], np.float32)
    cuts = UnitCuts.of(ranking(scores, [1, 1, 1, 0, 1, 1, 0]), np.array([0, 1, 0, 1, 2, 2, 3]))
    assert cuts.scores.tolist() == [math.inf, 0.0, -1.5, -math.inf]
    assert (cuts.n.tolist(), cuts.n_true.tolist()) == ([2, 5, 6, 7], [2, 4, 5, 5])
    assert cuts.n_units.tolist() == [2, 3, 3, 4]


def test_diverged_scores_and_units_of_another_length_are_errors() -> None:
    with pytest.raises(FloatingPointError, match=r"valid/rise: expected finite logits, got nan"):
        decide(ranking([1.0, math.nan, 0.0], [1, 0, 1]), decision(0.5), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"valid/rise: expected units \[3\], got \[2\]"):
        decide(ranking([1.0, 2.0, 0.0], [1, 0, 1]), decision(0.5), np.zeros(2, int))


def test_bound_and_violation_never_contradict_the_tail() -> None:
    """The bound as a target: rounding decides, and must decide the same way everywhere."""
    unit = np.arange(40) % 7
    outcomes = set()
    for n_true in range(3, 38):
        scores, labels = np.zeros(40), np.arange(40) < n_true
        (_, evidence) = judged((scores.astype(np.float32), labels, unit), 0.9)[0]
        for target in (evidence.bound, math.nextafter(evidence.bound, 1.0)):
            found = decide(ranking(scores, labels), decision(target), unit)
            fine = bool(tail(*worth(40, n_true, evidence.n_effective), target) <= 1.0 - 0.9)
            assert (found["violation"] <= 0.0) == fine
            assert found["violation"] == target - found["precision_bound"]
            outcomes.add(fine)
    assert outcomes == {False, True}


# ---- the curve


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.3, 0.9]))
def test_bounds_of_the_curve_are_those_of_the_decision(problem: Problem, target: float) -> None:
    scores, labels, unit = problem
    ranked, rule = ranking(scores, labels), decision(target)
    chosen = decide(ranked, rule, unit)
    drawn = curves(ranked, rule, chosen["threshold"], unit=unit)["pr"]
    evidence = dict(judged(problem, rule.confidence))
    assert drawn["bound"] == pytest.approx([evidence[t].bound for t in drawn["threshold"]], rel=1e-9, abs=1e-12)
    at = drawn["threshold"].index(chosen["threshold"])
    assert drawn["bound"][at] == pytest.approx(chosen["precision_bound"])
    assert len(drawn["bound"]) <= MAX_POINTS
    by_row = curves(ranked, rule, chosen["threshold"])["pr"]
    assert curves(ranked, rule.model_copy(update={"unit": "row"}), chosen["threshold"], unit=unit)["pr"] == by_row
    assert {n: v for n, v in by_row.items() if n != "bound"} == {n: v for n, v in drawn.items() if n != "bound"}
