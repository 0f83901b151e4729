from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import BinaryClassificationController
from scipy.special import expit, logit
from scipy.stats import binom, binomtest
from scipy.stats import t as student
from sklearn.metrics import average_precision_score

from models.certificate import (
    Certificate,
    Sequence,
    certify,
    joint_confidence,
    plan_sequence,
    share_of_delta,
)
from models.decision import precision_bound
from models.precision import Evidence, JudgedRows
from models.trainer import Decision, InputError
from tests.models.populations import Population, Rows


def decision(target: float = 0.6, min_selected: int = 30, unit: str = "row", limits: object = None) -> Decision:
    return Decision(task="gift", target_precision=target, min_selected=min_selected, unit=unit, range=limits)


def logits(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


def of(n: int, n_true: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n rows of one score, of which n_true are true."""
    return logits(np.zeros(n)), np.arange(n) < n_true, np.arange(n)


def lower(selected: object, true: object, delta: float) -> Evidence:
    """The evidence of units with so many selected and true rows."""
    sizes, hits = np.asarray(selected), np.asarray(true)
    unit = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([np.arange(n) < k for n, k in zip(sizes, hits, strict=True)])
    rows = JudgedRows.of("test", logits(np.zeros(len(unit))), labels, unit, "user")
    (tally,) = rows.tallies(logits([0.0]))
    return Evidence.of(tally, delta)


# The whole path on populations whose truth is known.


def plain_rule(scores: np.ndarray, labels: np.ndarray, target: float) -> float | None:
    """The threshold of highest recall whose precision on these very rows reaches the target."""
    order = np.argsort(-scores, kind="stable")
    n = np.arange(1, len(order) + 1)
    fine = np.flatnonzero((np.cumsum(labels[order]) / n >= target) & (n >= 30))
    return float(scores[order[fine[-1]]]) if len(fine) else None


def pointwise_rule(scores: np.ndarray, labels: np.ndarray, target: float, delta: float) -> float | None:
    """The threshold of highest recall whose Clopper-Pearson bound on these very rows reaches the target."""
    order = np.argsort(-scores, kind="stable")
    n = np.arange(1, len(order) + 1)
    fine = np.flatnonzero((precision_bound(n, np.cumsum(labels[order]), 1.0 - delta) >= target) & (n >= 30))
    return float(scores[order[fine[-1]]]) if len(fine) else None


def nominate(valid: Rows) -> int:
    return int(np.argmax([average_precision_score(valid.labels, scores) for scores in valid.scores]))


def test_the_confidence_is_kept_on_500_populations_and_that_of_the_plain_rule_is_not() -> None:
    rng = np.random.default_rng(11)
    rule, delta, n_populations = decision(), 0.1, 500
    broken = {"plain": 0, "pointwise": 0, "certificate": 0, "first bound": 0}
    certified = 0
    for _ in range(n_populations):
        shift = rng.uniform(1.0, 2.2)
        shifts = tuple((shift + 0.1 * rng.normal(size=5)).tolist())
        population = Population(float(rng.uniform(0.03, 0.3)), shifts)
        valid, calibrate = population.draw(rng, 2000), population.draw(rng, 2000)
        model = nominate(valid)
        sequence = plan_sequence(valid.scores[model], valid.labels, valid.unit, rule)
        rows = (calibrate.scores[model], calibrate.labels, calibrate.unit)
        found = certify(*rows, sequence, rule, delta)
        certified += found.status == "certified"
        first = population.precision(model, sequence.thresholds[0])
        broken["first bound"] += found.certifiable_precision > first
        chosen = {
            "plain": plain_rule(valid.scores[model], valid.labels, 0.6),
            "pointwise": pointwise_rule(*rows[:2], 0.6, delta),
            "certificate": found.threshold,
        }
        for name, threshold in chosen.items():
            broken[name] += threshold is not None and population.precision(model, threshold) < 0.6
    allowed = binom.ppf(0.999, n_populations, delta)
    assert broken["certificate"] <= allowed
    assert broken["first bound"] <= allowed
    assert broken["certificate"] <= broken["pointwise"]
    assert broken["plain"] >= 0.4 * n_populations
    assert certified >= 0.5 * n_populations  # and it is no empty promise


@pytest.mark.parametrize("n", [30, 97, 1000])
@pytest.mark.parametrize(("target", "delta"), [(0.6, 0.1), (0.1, 0.05), (0.95, 0.2)])
def test_at_the_worst_precision_a_cut_passes_with_probability_delta_at_most(
    n: int, target: float, delta: float
) -> None:
    sequence = Sequence((0.0,), (n,))
    passes = [
        certify(*of(n, n_true), sequence, decision(target), delta).status == "certified" for n_true in range(n + 1)
    ]
    false = binom.pmf(np.arange(n + 1), n, target)[passes].sum()
    assert false <= delta
    assert passes == sorted(passes)
    assert not any(passes) or false + binom.pmf(passes.index(True) - 1, n, target) > delta  # no power given away


def test_a_sequence_of_cuts_that_are_all_just_below_the_target_keeps_delta() -> None:
    rng = np.random.default_rng(3)
    sequence = Sequence(tuple(np.linspace(2.0, -2.0, 40).astype(np.float32).tolist()), tuple(range(40)))
    n_certified = 0
    for _ in range(1000):
        scores = rng.normal(size=2000).astype(np.float32)
        labels = rng.random(2000) < 0.5999
        n_certified += certify(scores, labels, scores, sequence, decision(), 0.1).status == "certified"
    assert n_certified <= binom.ppf(0.999, 1000, 0.1)


# Units.


@pytest.mark.parametrize(("n_units", "rows_of_unit"), [(20, 150), (150, 30)], ids=["twenty days", "many users"])
def test_with_strong_clusters_the_unit_keeps_the_confidence_and_the_row_does_not(
    n_units: int, rows_of_unit: int
) -> None:
    rng = np.random.default_rng(5)
    n_populations, delta = 300, 0.1
    false, bounds = {"row": 0, "day": 0}, {"row": 0, "day": 0}
    for _ in range(n_populations):
        population = Population(0.3, (float(rng.uniform(0.8, 1.6)),), shared=0.5, correlation=0.3)
        valid, calibrate = (population.draw(rng, n_units, rows_of_unit) for _ in range(2))
        for unit in false:
            rule = decision(unit=unit)
            sequence = plan_sequence(valid.scores[0], valid.labels, valid.unit, rule)
            found = certify(calibrate.scores[0], calibrate.labels, calibrate.unit, sequence, rule, delta)
            false[unit] += found.threshold is not None and population.precision(0, found.threshold) < 0.6
            first = population.precision(0, sequence.thresholds[0])
            bounds[unit] += found.certifiable_precision > first
    allowed = binom.ppf(0.999, n_populations, delta)
    assert max(false["day"], bounds["day"]) <= allowed
    assert false["row"] > allowed


@pytest.mark.parametrize("correlation", [0.05, 0.3, 0.999])
@pytest.mark.parametrize(("precision", "n_units", "spread"), [(0.1, 30, 1.5), (0.6, 5, 0.0), (0.6, 200, 1.5)])
def test_the_bound_of_units_holds_with_few_and_with_unequal_ones(
    precision: float, n_units: int, spread: float, correlation: float
) -> None:
    rng = np.random.default_rng(8)
    total = 1.0 / correlation - 1.0
    too_high = 0
    for _ in range(400):
        sizes = 1 + np.floor(10.0 * np.exp(spread * rng.normal(size=n_units))).astype(int)
        true = rng.binomial(sizes, rng.beta(precision * total, (1.0 - precision) * total, n_units))
        too_high += lower(sizes, true, 0.1).bound > precision
    assert too_high <= binom.ppf(0.999, 400, 0.1)


def test_the_effective_sample_size_is_that_of_korn_and_graubard_with_the_jackknife() -> None:
    sizes, true = np.array([10, 4, 7, 12, 1, 6]), np.array([6, 1, 5, 11, 0, 2])
    n, p = sizes.sum(), true.sum() / sizes.sum()
    without = np.array([(true.sum() - true[i]) / (n - sizes[i]) for i in range(6)])
    variance = 5.0 / 6.0 * ((without - p) ** 2).sum()

    def units(weights: np.ndarray) -> float:
        return weights.sum() ** 2 / (weights**2).sum()

    freedom = min(units(sizes), units(true), units(sizes - true)) - 1.0
    expected = p * (1 - p) / variance * (student.ppf(0.9, n - 1) / student.ppf(0.9, freedom)) ** 2
    found = lower(sizes, true, 0.1)
    assert found.n_effective == pytest.approx(expected)
    assert expected < n
    assert found.p_value(found.bound) == pytest.approx(0.1)
    assert found.bound < precision_bound(n, true.sum(), 0.9)
    assert (found.n, found.n_true, found.n_units) == (40, 25, 6)


def test_units_that_agree_are_worth_their_number_and_one_unit_nothing() -> None:
    assert lower([9] * 12, [9] * 12, 0.1).n_effective == 12.0
    assert lower([9] * 12, [9] * 12, 0.1).bound == pytest.approx(0.1 ** (1 / 12))
    assert lower([3] * 7, [1] * 7, 0.1).n_effective == 7.0
    uneven = lower([100, 1, 1], [100, 1, 1], 0.1)
    assert uneven.n_effective == pytest.approx(102**2 / 10002)
    assert (lower([50], [50], 0.1).bound, lower([50], [50], 0.1).upper_bound) == (0.0, 1.0)
    assert lower([50], [50], 0.1).p_value(0.01) == 1.0
    assert lower([5, 5, 5], [0, 0, 0], 0.1).bound == 0.0


def test_whole_units_that_are_true_or_false_are_worth_no_more_than_their_number() -> None:
    found = lower([20] * 40, [20] * 30 + [0] * 10, 0.1)
    assert found.bound <= precision_bound(40, 30, 0.9)
    assert found.bound == pytest.approx(precision_bound(40, 30, 0.9), abs=0.01)


def test_units_that_never_repeat_among_the_selected_rows_are_judged_exactly() -> None:
    scores, labels = logits([1.0] * 50 + [0.0] * 50), np.arange(100) % 50 < 45
    unit = np.arange(100) % 50  # each once above, and once below
    found = certify(scores, labels, unit, Sequence((1.0,), (50,)), decision(unit="user"), 0.1)
    same = certify(scores, labels, unit, Sequence((1.0,), (50,)), decision(), 0.1)
    assert [replace(test, bound_rows=None) for test in found.tested] == list(same.tested)
    assert [test.bound_rows for test in found.tested] == [test.bound for test in same.tested]
    assert (found.n_units, same.n_units, found.n_effective) == (50, 100, 50.0)
    assert any("selected twice" in line for line in found.assumptions)


def test_names_of_units_and_the_order_of_rows_change_nothing() -> None:
    rng = np.random.default_rng(2)
    rows = Population(0.3, (1.4,), shared=0.3).draw(rng, 40, 20)
    rule = decision(unit="user")
    order, names = rng.permutation(800), rng.permutation(10_000)[:40] - 5000
    plain = (rows.scores[0], rows.labels, rows.unit)
    mixed = (rows.scores[0][order], rows.labels[order], names[rows.unit[order]])
    sequence = plan_sequence(*plain, rule)
    assert plan_sequence(*mixed, rule) == sequence
    a, b = certify(*plain, sequence, rule, 0.1), certify(*mixed, sequence, rule, 0.1)
    assert a.threshold == b.threshold
    assert [test.n_effective for test in a.tested] == pytest.approx([test.n_effective for test in b.tested])


def test_few_units_are_said_to_be_few() -> None:
    scores, labels, unit = *of(60, 50)[:2], np.arange(60) % 3
    found = certify(scores, labels, unit, Sequence((0.0,), (60,)), decision(unit="day"), 0.1)
    assert any("Only 3 units" in line for line in found.assumptions)


# Tests of the sequence.


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([2, 7, 50, 10_000]),
    target=st.sampled_from([0.1, 0.4, 0.6, 0.9]),
    min_selected=st.sampled_from([1, 5, 30]),
    delta=st.sampled_from([0.02, 0.1, 0.5]),
)
def test_certify_against_the_binomial_cut_by_cut(
    seed: int, levels: int, target: float, min_selected: int, delta: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = logits(np.floor(rng.normal(size=300) * levels) / levels)
    labels = rng.random(300) < 1.0 / (1.0 + np.exp(-2.0 * scores))
    cuts = np.unique(scores)[::-1][:: max(1, len(np.unique(scores)) // 15)]
    sequence = Sequence(tuple(cuts.tolist()), tuple(range(len(cuts))))
    found = certify(scores, labels, scores, sequence, decision(target, min_selected), delta)
    threshold, n_tested = None, 0
    for cut in cuts.tolist():
        n, n_true = int((scores >= cut).sum()), int(labels[scores >= cut].sum())
        test, n_tested = found.tested[n_tested], n_tested + 1
        p_value = binomtest(n_true, n, target, alternative="greater").pvalue
        assert (test.threshold, test.n_selected, test.n_true, test.n_units) == (cut, n, n_true, n)
        assert test.p_value == pytest.approx(p_value, rel=1e-9)
        assert test.bound == pytest.approx(float(precision_bound(n, n_true, 1.0 - delta)), rel=1e-9, abs=1e-12)
        assert test.passed == (p_value <= delta and n >= min_selected)
        assert (test.bound >= target) == (test.p_value <= delta)
        if not test.passed:
            break
        threshold = cut
    assert len(found.tested) == n_tested
    assert found.threshold == threshold
    assert found.confidence == 1.0 - delta
    assert found.certifiable_precision == found.tested[0].bound
    if threshold is None:
        assert found.status == "infeasible"
        assert (found.precision, found.bound, found.recall, found.n_effective) == (None,) * 4
        assert (found.n_selected, found.n_true) == (0, 0)
    else:
        chosen = scores >= threshold
        assert found.status == "certified"
        assert found.precision == labels[chosen].mean() >= target
        assert found.recall == labels[chosen].sum() / labels.sum()
        assert found.n_effective == found.n_selected == chosen.sum()


@pytest.mark.parametrize("seed", range(6))
def test_mapie_passes_the_same_cuts_of_the_same_sequence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    population = Population(0.15, (2.2,))
    valid, calibrate = population.draw(rng, 1500), population.draw(rng, 1500)
    sequence = plan_sequence(valid.scores[0], valid.labels, valid.unit, decision())
    scores = calibrate.scores[0]
    found = certify(scores, calibrate.labels, calibrate.unit, sequence, decision(), 0.1)
    # MAPIE wants probabilities; any rising function will do that keeps float32 logits apart
    cuts = np.array(sequence.thresholds, np.float64)
    controller = BinaryClassificationController(
        lambda x: np.stack([1.0 - x, x], axis=1),
        "precision",
        target_level=0.6,
        confidence_level=0.9,
        list_predict_params=squashed(cuts),
        fwer_method="fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fixed sequence testing requires a monotonic risk")
        controller.calibrate(squashed(scores.astype(np.float64)), calibrate.labels.astype(int))
    passed = [test.threshold for test in found.tested if test.passed]
    assert len(passed) > 3
    assert sorted(controller.valid_predict_params) == sorted(squashed(np.array(passed)))
    for p_value, test in zip(controller.p_values[: len(found.tested), 0], found.tested, strict=True):
        # MAPIE rounds n * (1 - precision) up: the last bit of a float may cost it one true row, never gain one
        n, n_true = test.n_selected, test.n_true
        exact, rounded = binom.cdf([n - n_true, n - n_true + 1], n, 0.4)
        assert test.p_value == pytest.approx(exact)
        assert exact * (1.0 - 1e-9) <= p_value <= rounded * (1.0 + 1e-9)


def squashed(values: np.ndarray) -> np.ndarray:
    return 0.5 + values / 100.0


def test_the_sequence_issues_certificates_where_mapies_default_grid_hardly_does() -> None:
    rng = np.random.default_rng(1)
    base_rate, shift = 0.06, 1.8
    population = Population(base_rate, (shift,))
    ours = mapies = 0
    for _ in range(15):
        valid, calibrate = population.draw(rng, 3000), population.draw(rng, 3000)
        sequence = plan_sequence(valid.scores[0], valid.labels, valid.unit, decision())
        found = certify(calibrate.scores[0], calibrate.labels, calibrate.unit, sequence, decision(), 0.1)
        ours += found.status == "certified"
        controller = BinaryClassificationController(
            lambda x: np.stack([1.0 - x, x], axis=1), "precision", target_level=0.6, confidence_level=0.9
        )
        chances = expit(shift * calibrate.scores[0] - shift**2 / 2.0 + logit(base_rate))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # that there is no solution
            controller.calibrate(chances, calibrate.labels.astype(int))
        mapies += controller.best_predict_param is not None
    assert ours >= 8
    assert mapies <= 3


# The plan.


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 400),
    levels=st.sampled_from([1, 3, 20, 10_000]),
    slope=st.sampled_from([-1.0, 0.0, 2.0, 8.0]),
    min_selected=st.sampled_from([1, 10, 30]),
    limits=st.sampled_from([None, (0.3, 0.7), (0.6, 1.0), (0.0, 0.2)]),
    unit=st.sampled_from(["row", "user"]),
)
def test_every_cut_of_a_plan_is_allowed(
    seed: int, n: int, levels: int, slope: float, min_selected: int, limits: object, unit: str
) -> None:
    rng = np.random.default_rng(seed)
    scores = logits(np.floor(rng.normal(size=n) * levels) / levels)
    labels = rng.random(n) < 1.0 / (1.0 + np.exp(-slope * scores))
    sequence = plan_sequence(scores, labels, rng.integers(0, 30, n), decision(0.6, min_selected, unit, limits))
    low, high = limits or (0.0, 1.0)
    counts = [int((scores >= threshold).sum()) for threshold in sequence.thresholds]
    assert list(sequence.n_selected) == counts
    assert all(count >= min_selected for count in counts)
    assert all(low <= 1.0 / (1.0 + math.exp(-threshold)) <= high for threshold in sequence.thresholds)
    assert list(sequence.thresholds) == sorted(set(sequence.thresholds), reverse=True)
    assert set(sequence.thresholds) <= set(scores.tolist())
    p = 1.0 / (1.0 + np.exp(-scores.astype(np.float64)))
    inside = (p >= low + 1e-6) & (p <= high - 1e-6) & ((scores[:, None] <= scores).sum(1) >= min_selected)
    assert sequence.thresholds or not inside.any()
    assert Sequence.from_json(json.loads(json.dumps(sequence.as_json()))) == sequence


def stairs(*steps: tuple[int, float], factor: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in falling order of score: so many rows of which this share is true, evenly spread."""
    labels = np.concatenate([np.floor((np.arange(n * factor) + 1) * q + 1e-9) for n, q in steps])
    starts = np.cumsum([0] + [n * factor for n, _ in steps[:-1]])
    hits = np.concatenate([np.diff(np.append(0.0, part)) for part in np.split(labels, starts[1:])])
    return logits(-np.arange(len(hits)) / 64.0), hits, np.arange(len(hits))


def test_a_plan_starts_where_valid_leaves_no_doubt_and_ends_where_it_is_clearly_below() -> None:
    rows = stairs((400, 0.9), (400, 0.5), (3200, 0.1))
    sequence = plan_sequence(*rows, decision())
    cumulative = np.cumsum(rows[1])
    p_values = [binom.sf(cumulative[n - 1] - 1, n, 0.6) for n in sequence.n_selected]
    start = sequence.n_selected[0]
    stricter = int(start / 1.06)
    assert p_values[0] <= 1e-8 < binom.sf(cumulative[stricter - 1] - 1, stricter, 0.6)
    sure = np.maximum(p_values, 1e-8)
    assert (np.diff(sure) >= 0.0).all()  # ever less sure
    dense = np.array([n for n in sequence.n_selected if n <= 400])
    assert (np.diff(dense) <= np.ceil(0.05 * dense[:-1]) + 1).all()  # of those that are sure none is left out
    last = sequence.n_selected[-1]
    shares = cumulative / np.arange(1, len(cumulative) + 1)
    fits = int(np.flatnonzero(shares >= 0.6)[-1]) + 1
    assert fits <= last <= 1.35 * fits
    assert len(sequence.thresholds) < 60


def test_a_plan_of_a_hopeless_model_starts_where_most_can_be_promised() -> None:
    rows = stairs((50, 0.3), (450, 0.4), (3500, 0.05))
    sequence = plan_sequence(*rows, decision())
    found = certify(*rows, sequence, decision(), 0.1)
    assert found.status == "infeasible"
    cumulative, n = np.cumsum(rows[1]), np.arange(1, 4001)
    best = precision_bound(n, cumulative, 0.9)[29:].max()
    assert best - 0.01 <= found.certifiable_precision <= best


def test_a_cut_that_looks_less_sure_than_a_looser_one_is_no_obstacle() -> None:
    rows = stairs((60, 0.9), (40, 0.25), (300, 0.72), (3000, 0.05))
    sequence = plan_sequence(*rows, decision())
    assert sequence.n_selected[0] < 70
    assert not any(80 < n < 120 for n in sequence.n_selected)
    every = Sequence(tuple(rows[0][59:420:10].tolist()), tuple(range(60, 421, 10)))
    assert certify(*rows, every, decision(), 0.1).n_selected < 100
    assert certify(*rows, sequence, decision(), 0.1).n_selected > 400


def test_a_smaller_calibrate_set_moves_the_first_cut_to_more_rows() -> None:
    rows = stairs((40, 1.0), (200, 0.9), (2000, 0.1))
    small = decision(0.6, min_selected=30)
    assert plan_sequence(*rows, small, n_rows=560).n_selected[0] > 4 * 30
    assert plan_sequence(*rows, small).n_selected[0] < 4 * 30
    assert plan_sequence(*rows, small, n_rows=10**7).n_selected[0] >= 30


def test_with_much_data_the_loosest_true_threshold_is_nearly_reached() -> None:
    rng = np.random.default_rng(4)
    population = Population(0.1, (2.0,))
    valid, calibrate = population.draw(rng, 200_000), population.draw(rng, 200_000)
    sequence = plan_sequence(valid.scores[0], valid.labels, valid.unit, decision())
    found = certify(calibrate.scores[0], calibrate.labels, calibrate.unit, sequence, decision(), 0.1)
    assert 0.6 <= population.precision(0, found.threshold) <= 0.625
    assert found.certifiable_precision > 0.8


def test_ties_stay_on_one_side() -> None:
    scores, labels = logits([2.0] * 100 + [1.0] * 100), np.concatenate([np.ones(100), np.zeros(100)])
    sequence = plan_sequence(scores, labels, np.arange(200), decision())
    assert sequence.n_selected[0] == 100
    found = certify(scores, labels, np.arange(200), sequence, decision(), 0.1)
    assert (found.threshold, found.n_selected, found.precision) == (2.0, 100, 1.0)


def test_logits_that_are_one_probability_in_float32_are_told_apart() -> None:
    scores = logits([20.0] * 50 + [19.0] * 50 + [18.0] * 50)
    labels = np.repeat([1.0, 1.0, 0.0], 50)
    sequence = plan_sequence(scores, labels, np.arange(150), decision(0.9))
    assert certify(scores, labels, np.arange(150), sequence, decision(0.9), 0.1).threshold == 19.0


def test_without_an_allowed_cut_nothing_is_certified() -> None:
    few = plan_sequence(*of(29, 29), decision())
    outside = plan_sequence(*of(100, 100), decision(limits=(0.9, 1.0)))
    assert few == outside == Sequence((), ())
    found = certify(*of(100, 100), few, decision(), 0.1)
    assert (found.status, found.certifiable_precision, found.tested) == ("infeasible", 0.0, ())


def test_a_cut_with_fewer_rows_than_min_selected_on_calibrate_does_not_pass() -> None:
    found = certify(*of(29, 29), Sequence((0.0,), (50,)), decision(), 0.1)
    assert found.status == "infeasible"
    assert found.tested[0].p_value < 0.1
    assert found.certifiable_precision == pytest.approx(0.1 ** (1 / 29))


def test_a_cut_that_selects_nothing_on_calibrate_does_not_pass() -> None:
    found = certify(*of(100, 100), Sequence((1.0, 0.0), (40, 80)), decision(min_selected=1), 0.1)
    assert found.status == "infeasible"
    assert (found.tested[0].n_selected, found.tested[0].p_value, found.tested[0].bound) == (0, 1.0, 0.0)
    users = certify(*of(100, 100), Sequence((1.0, 0.0), (40, 80)), decision(unit="user"), 0.1)
    assert [replace(test, bound_rows=None) for test in users.tested] == list(found.tested)


# Delta, JSON, errors.


def certified(n: int = 1000, n_true: int = 700, unit: str = "row") -> Certificate:
    return certify(*of(n, n_true), Sequence((0.0,), (n,)), decision(unit=unit), 0.1)


def test_what_is_certified_is_json_and_back() -> None:
    for found in (certified(), certified(n_true=10)):
        text = json.dumps(found.as_json(), allow_nan=False)
        assert Certificate.from_json(json.loads(text)) == found
        assert Certificate.from_json(json.loads(text) | {"number_on_set": 1}) == found


def test_a_certificate_that_knows_no_bound_by_rows_is_read() -> None:
    content = json.loads(json.dumps(certified().as_json()))
    for part in (content, *content["tested"]):
        del part["bound_rows"]
    assert Certificate.from_json(content) == certified()


def test_beside_the_bound_of_units_stands_what_rows_would_say() -> None:
    scores, labels, unit = *of(400, 320)[:2], np.arange(400) // 10
    found = certify(scores, labels, unit, Sequence((0.0,), (400,)), decision(unit="day"), 0.1)
    rows = certify(scores, labels, unit, Sequence((0.0,), (400,)), decision(), 0.1)
    assert found.bound < found.bound_rows == rows.bound
    assert found.tested[0].bound_rows == rows.tested[0].bound
    assert (rows.bound_rows, rows.tested[0].bound_rows) == (None, None)
    none = certify(scores, labels, unit, Sequence((0.0,), (400,)), decision(0.9, unit="day"), 0.1)
    assert (none.status, none.bound_rows) == ("infeasible", None)
    assert none.tested[0].bound_rows == rows.tested[0].bound


def test_the_certificate_says_what_it_assumes() -> None:
    assert any("independent draws" in line for line in certified().assumptions)
    assert any("binomial" in line for line in certified().assumptions)
    users = certify(*of(90, 80)[:2], np.arange(90) // 3, Sequence((0.0,), (90,)), decision(unit="user"), 0.1)
    assert any("approximation" in line for line in users.assumptions)
    assert any("Each user of calibrate is as good as new" in line for line in users.assumptions)
    assert users.unit == "user"


def test_shares_of_delta() -> None:
    assert [share_of_delta(0.1, 1, j) for j in (1, 2, 4)] == [0.1, 0.05, 0.025]
    assert [share_of_delta(0.1, 4, j) for j in (1, 4, 5)] == [0.025, 0.025, 0.02]
    for m in range(1, 9):
        spent = [share_of_delta(0.1, m, j) for j in range(1, m + 1)]
        assert joint_confidence(spent) == pytest.approx(0.9)
    assert joint_confidence([0.1, 0.05]) == pytest.approx(0.85)
    assert joint_confidence([0.9, 0.9]) == 0.0
    assert joint_confidence([]) == 1.0
    for bad in ((0.0, 1, 1), (1.0, 1, 1), (0.1, 0, 1), (0.1, 1, 0)):
        with pytest.raises(InputError, match="certificate: "):
            share_of_delta(*bad)


def test_bad_input_is_named() -> None:
    scores, labels, unit = of(50, 40)
    sequence = Sequence((0.0,), (50,))
    bad = [
        ("one length", (scores, labels[:-1], unit)),
        ("float32 logits, got float64", (scores.astype(np.float64), labels, unit)),
        ("nan or infinity", (np.full(50, np.nan, np.float32), labels, unit)),
        ("labels 0 or 1, got nan", (scores, np.full(50, np.nan), unit)),
    ]
    for message, rows in bad:
        for act in (
            lambda rows: plan_sequence(*rows, decision()),
            lambda rows: certify(*rows, sequence, decision(), 0.1),
        ):
            with pytest.raises(InputError, match=message):
                act(rows)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="delta"):
            certify(scores, labels, unit, sequence, decision(), delta)
    for thresholds, counts in (((1.0, 1.0), (1, 2)), ((1.0,), (1, 2)), ((0.1,), (1,)), ((math.inf,), (1,))):
        with pytest.raises(InputError, match="sequence: "):
            Sequence(thresholds, counts)
