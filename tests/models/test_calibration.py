from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit
from scipy.stats import binomtest
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from models.calibration import (
    Calibrator,
    FocalInverse,
    _fit_isotonic,
    _fit_platt,
    _folds,
    fit_calibrator,
    reliability,
    smeared,
    smearing,
)
from models.trainer import InputError

LOSSES = [(0.25, 2.0), (0.5, 2.0), (0.75, 2.0), (0.05, 5.0), (0.99, 0.5), (0.3, 1.0), (0.7, 0.0)]


def focal_risk(score: float, eta: float, alpha: float, gamma: float) -> float:
    """Expected focal loss of a logit where the true probability is `eta`; written from the loss's definition."""
    log_p, log_q = log_expit(score), log_expit(-score)
    positive = -alpha * math.exp(gamma * log_q) * log_p
    negative = -(1.0 - alpha) * math.exp(gamma * log_p) * log_q
    return eta * positive + (1.0 - eta) * negative


def best_score(eta: float, alpha: float, gamma: float) -> float:
    grid = np.linspace(-25.0, 25.0, 1001)
    start = grid[np.argmin([focal_risk(s, eta, alpha, gamma) for s in grid])]
    bounds = (start - 0.1, start + 0.1)
    found = minimize_scalar(
        focal_risk, bounds=bounds, args=(eta, alpha, gamma), method="bounded", options={"xatol": 1e-9}
    )
    return float(found.x)


@pytest.mark.parametrize(("alpha", "gamma"), LOSSES)
@pytest.mark.parametrize("eta", [0.0005, 0.0148, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_it_inverts_the_minimiser_of_the_focal_risk(alpha: float, gamma: float, eta: float) -> None:
    score = torch.tensor(best_score(eta, alpha, gamma), dtype=torch.float64)
    assert FocalInverse(alpha, gamma)(score).item() == pytest.approx(eta, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "eta", "output"),
    [
        (0.25, 0.0148, 0.123),
        (0.5, 0.0148, 0.174),
        (0.75, 0.0148, 0.240),
        (0.25, 0.05, 0.18),
        (0.5, 0.05, 0.25),
        (0.75, 0.05, 0.33),
        (0.25, 0.5, 0.40),
        (0.5, 0.5, 0.50),
        (0.75, 0.5, 0.60),
    ],
)
def test_published_outputs_of_a_perfect_model(alpha: float, eta: float, output: float) -> None:
    decimals = 0.0005 if eta == 0.0148 else 0.005
    low, high = FocalInverse(alpha, 2.0)(torch.tensor(logit([output - 1.05 * decimals, output + 1.05 * decimals])))
    assert low < eta < high


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9])
def test_without_gamma_it_is_the_shift_of_the_prior(alpha: float) -> None:
    scores = np.linspace(-30.0, 30.0, 61)
    expected = expit(scores + math.log((1.0 - alpha) / alpha))
    assert FocalInverse(alpha, 0.0)(torch.tensor(scores)).numpy() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(-60.0, 60.0, width=32), min_size=2, max_size=30, unique=True),
    alpha=st.floats(0.05, 0.99),
    gamma=st.floats(0.0, 5.0),
)
def test_strictly_increasing_with_the_stated_slope(scores: list[float], alpha: float, gamma: float) -> None:
    ordered = torch.tensor(sorted(scores), dtype=torch.float64)
    rise, run = torch.diff(FocalInverse(alpha, gamma).logits(ordered)), torch.diff(ordered)
    rounding = 1e-12 * (1.0 + gamma) * 60.0
    assert bool((rise >= run - rounding).all())
    assert bool((rise <= (1.0 + gamma) * run + rounding).all())
    assert bool((rise[run > 1e-9] > 0.0).all())


@pytest.mark.parametrize(("alpha", "gamma"), LOSSES)
def test_extreme_logits_stay_finite_and_follow_the_asymptote(alpha: float, gamma: float) -> None:
    scores = torch.tensor([-3.4e38, -1e4, -745.0, -100.0, 100.0, 745.0, 1e4, 3.4e38])
    calibrated = FocalInverse(alpha, gamma).logits(scores)
    assert bool(torch.isfinite(calibrated).all())
    shift = math.log((1.0 - alpha) / alpha) - torch.sign(scores.double()) * math.log1p(gamma)
    expected = (1.0 + gamma) * scores.double() + shift
    assert calibrated.numpy() == pytest.approx(expected.numpy(), rel=1e-12)
    probabilities = FocalInverse(alpha, gamma)(scores)
    assert probabilities[0] == 0.0
    assert probabilities[-1] == 1.0


def test_the_centre_is_smooth() -> None:
    near = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    calibrated = FocalInverse(0.25, 2.0).logits(near)
    assert calibrated[1].item() == pytest.approx(math.log(3.0), rel=1e-15)
    assert torch.diff(calibrated).tolist() == pytest.approx([2.676e-9] * 2, rel=1e-3)


def test_its_input_is_left_alone_and_any_shape_is_taken() -> None:
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    before = scores.detach().clone()
    calibrated = FocalInverse(0.25, 2.0)(scores)
    assert calibrated.shape == (2, 3)
    assert not calibrated.requires_grad
    assert scores.detach().equal(before)


@pytest.mark.parametrize(
    ("alpha", "gamma", "message"),
    [
        (0.0, 2.0, "focal alpha"),
        (1.0, 2.0, "focal alpha"),
        (math.nan, 2.0, "focal alpha"),
        (0.25, -0.1, "focal gamma"),
        (0.25, math.inf, "focal gamma"),
        (0.25, math.nan, "focal gamma"),
    ],
)
def test_bad_parameters_are_refused(alpha: float, gamma: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FocalInverse(alpha, gamma)


# ---------------------------------------------------------------------------------------- fitted calibrators


def population(n: int, seed: int, slope: float = 0.5, shift: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels whose true logit is slope * logit + shift."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(-2.0, 2.0, n)
    return logits, (generator.random(n) < expit(slope * logits + shift)).astype(np.float64)


def rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


samples = st.lists(
    st.tuples(st.floats(-30.0, 30.0, width=32) | st.sampled_from([-1.0, 0.0, 2.0]), st.booleans()),
    min_size=2,
    max_size=60,
).filter(lambda sample: 0 < sum(label for _, label in sample) < len(sample))


def columns(sample: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = zip(*sample, strict=True)
    return np.array(logits, np.float64), np.array(labels, np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_platt_equals_logistic_regression_on_softened_labels(seed: int) -> None:
    logits, labels = population(400, seed)
    n_positive = labels.sum()
    high, low = (n_positive + 1) / (n_positive + 2), 1 / (len(labels) - n_positive + 2)
    target = np.where(labels == 1, high, low)
    twice = np.concatenate([logits, logits])[:, None]
    reference = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(
        twice, np.repeat([1, 0], len(logits)), sample_weight=np.concatenate([target, 1 - target])
    )
    found = _fit_platt(logits, labels)
    assert found.slope == pytest.approx(reference.coef_[0, 0], rel=1e-6)
    assert found.intercept == pytest.approx(reference.intercept_[0], rel=1e-6)


@settings(deadline=None)
@given(sample=samples)
def test_platt_is_at_the_least_risk_of_all_slopes_that_do_not_fall(sample: list[tuple[float, bool]]) -> None:
    logits, labels = columns(sample)
    n_positive = labels.sum()
    target = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (len(labels) - n_positive + 2))

    def risk(slope: float, intercept: float) -> float:
        score = slope * logits + intercept
        return float(np.mean(np.logaddexp(0, score) - target * score))

    found = _fit_platt(logits, labels)
    least = risk(found.slope, found.intercept)
    for factor in (0.0, 0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        for shift in (-1.0, -1e-3, 0.0, 1e-3, 1.0):
            assert risk(found.slope * factor, found.intercept + shift) >= least - 1e-12
    for step in (1e-3, 0.1):  # also where the slope is 0, and no factor moves it
        best = min(risk(found.slope + step, found.intercept + shift) for shift in np.linspace(-3, 3, 61))
        assert best >= least - 1e-12


def test_a_score_that_points_the_wrong_way_is_flattened_not_turned() -> None:
    logits, labels = population(500, 1, slope=-0.8)
    found = _fit_platt(logits, labels)
    assert found.slope == 0.0
    assert found(logits) == pytest.approx(np.full(500, labels.mean()), abs=2 / 500)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e37])
def test_platt_copes_with_any_scale_and_with_separable_rows(scale: float) -> None:
    logits, labels = population(300, 2)
    scaled, plain = _fit_platt(logits * scale, labels), _fit_platt(logits, labels)
    assert scaled(logits * scale) == pytest.approx(plain(logits), rel=1e-6)
    separable = _fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]) * scale, np.array([0.0, 0.0, 1.0, 1.0]))
    assert separable(np.array([-1.0, 1.0]) * scale) == pytest.approx([0.25, 0.75], abs=0.1)


@settings(deadline=None)
@given(sample=samples)
def test_isotonic_equals_scikit_learn(sample: list[tuple[float, bool]]) -> None:
    logits, labels = columns(sample)
    logits = np.round(logits, 2)  # the reference takes logits that differ by the last bits for equal
    n_positive = labels.sum()
    low, high = 1 / (len(labels) - n_positive + 2), (n_positive + 1) / (n_positive + 2)
    reference = IsotonicRegression(y_min=low, y_max=high, out_of_bounds="clip").fit(logits, labels)
    found = _fit_isotonic(logits, labels)
    for at in (logits, np.linspace(-35.0, 35.0, 50)):
        assert found(at) == pytest.approx(reference.predict(at), abs=1e-6)


@settings(deadline=None)
@given(sample=samples, kind=st.sampled_from(["platt", "isotonic"]), asked=st.lists(st.floats(-1e38, 1e38)))
def test_every_kind_never_falls_stays_inside_and_survives_json(
    sample: list[tuple[float, bool]], kind: str, asked: list[float]
) -> None:
    logits, labels = columns(sample)
    found = {"platt": _fit_platt, "isotonic": _fit_isotonic}[kind](logits, labels)
    again = Calibrator.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found
    at = np.unique(np.concatenate([asked, logits, np.nextafter(logits, -np.inf), np.nextafter(logits, np.inf)]))
    probabilities = found(at)
    assert probabilities.dtype == np.float64
    assert (np.diff(probabilities) >= 0).all()
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert np.array_equal(again(at), probabilities)


def test_identity_is_the_sigmoid_kept_away_from_certainty() -> None:
    found = Calibrator("identity")(np.array([-800.0, -3.0, 0.0, 3.0, 800.0]))
    assert found[1:4] == pytest.approx(expit([-3.0, 0.0, 3.0]), rel=1e-15)
    assert found[0] > 0.0
    assert found[4] < 1.0
    assert np.isfinite(np.log([found[0], 1 - found[4]])).all()


def test_a_level_stretch_is_kept_by_its_ends() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 1.0])
    found = _fit_isotonic(np.arange(10.0), labels)
    assert found.logits == (0.0, 3.0, 4.0, 8.0, 9.0)
    assert found.probabilities == pytest.approx((1 / 7, 1 / 7, 0.8, 0.8, 6 / 7))


@pytest.mark.parametrize(
    ("slope", "shift", "expected"), [(1.0, 0.0, "identity"), (0.4, -1.0, "platt")], ids=["true", "stretched"]
)
def test_the_kind_is_chosen_that_the_rows_need(slope: float, shift: float, expected: str) -> None:
    chosen = [fit_calibrator(*population(4000, s, slope, shift), rows(4000))[1]["chosen"] for s in range(5)]
    assert chosen.count(expected) >= 4


def test_a_step_needs_isotonic() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0.0, 2.0, 4000)
    labels = (generator.random(4000) < np.where(np.abs(logits) < 1.5, 0.3, np.where(logits > 0, 0.35, 0.02))) * 1.0
    found, facts = fit_calibrator(logits, labels, rows(4000))
    assert facts["chosen"] == found.kind == "isotonic"


def test_the_choice_is_made_out_of_fold_and_its_losses_are_reproducible_by_hand() -> None:
    logits, labels = population(600, 3)
    unit = np.repeat(rows(150), 4)
    found, facts = fit_calibrator(logits, labels, unit, n_folds=4, seed=5)
    fold = _folds(labels, unit, 4, 5)
    out = np.empty(600)
    for k in range(4):
        inside = fold == k
        reference = _SigmoidCalibration().fit(logits[~inside], labels[~inside])
        out[inside] = reference.predict(logits[inside])
    assert facts["log_loss"]["platt"] == pytest.approx(log_loss(labels, out), rel=1e-5)
    assert facts["log_loss"]["identity"] == pytest.approx(log_loss(labels, expit(logits)), rel=1e-9)
    assert facts["chosen"] == found.kind == min(facts["log_loss"], key=facts["log_loss"].get)
    assert facts["n_folds"] == 4
    assert found == _fit_platt(logits, labels), "fitted on all rows"
    assert fit_calibrator(logits, labels, unit, n_folds=4, seed=5)[0] == found


def test_isotonic_does_not_win_by_overfitting_few_positives() -> None:
    wins = 0
    for seed in range(40):
        logits, labels = population(300, seed, slope=1.0, shift=-1.5)
        if labels.sum() < 2:
            continue
        found, _ = fit_calibrator(logits, labels, rows(300), seed=seed)
        inside = {
            "platt": log_loss(labels, _fit_platt(logits, labels)(logits)),
            "isotonic": log_loss(labels, _fit_isotonic(logits, labels)(logits)),
        }
        assert inside["isotonic"] < inside["platt"], "on the rows it was fitted on it always wins"
        wins += found.kind == "isotonic"
    assert wins <= 8, "on rows it was not fitted on it seldom does"


def test_rows_of_one_unit_do_not_vouch_for_each_other() -> None:
    """Units of 40 rows with one score and one fate: within a unit isotonic would know the label by heart."""
    generator = np.random.default_rng(1)
    score, fate = generator.normal(0, 1, 60), generator.random(60) < 0.4
    logits, labels, unit = np.repeat(score, 40), np.repeat(fate * 1.0, 40), np.repeat(rows(60), 40)
    assert fit_calibrator(logits, labels, rows(2400))[1]["chosen"] == "isotonic"
    assert fit_calibrator(logits, labels, unit)[1]["chosen"] != "isotonic"


@settings(deadline=None)
@given(
    unit=st.lists(st.integers(0, 12), min_size=5, max_size=80),
    n_folds=st.integers(2, 6),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_folds_keep_units_together_and_share_out_the_positive_ones(
    unit: list[int], n_folds: int, seed: int, data: st.DataObject
) -> None:
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=len(unit), max_size=len(unit))), np.float64)
    units = np.array(unit) * 1000 - 7
    fold = _folds(labels, units, n_folds, seed)
    n_units = len(np.unique(units))
    assert all(len(set(fold[units == u])) == 1 for u in units)
    assert set(fold) == set(range(min(n_folds, n_units)))
    positive = {int(u): fold[units == u][0] for u in units[labels == 1]}
    counts = np.bincount(list(positive.values()), minlength=n_folds) if positive else np.zeros(n_folds)
    assert counts.max() - counts.min() <= 2 if len(positive) >= n_folds else counts.max() <= 1


def test_a_single_unit_leaves_the_logits_as_they_are() -> None:
    logits, labels = population(200, 4)
    found, facts = fit_calibrator(logits, labels, np.zeros(200, np.int64))
    assert found == Calibrator("identity")
    assert facts["chosen"] == "identity"
    assert list(facts["log_loss"]) == ["identity"]
    assert facts["n_folds"] == 0


def test_one_positive_is_enough_to_calibrate() -> None:
    labels = np.zeros(50)
    labels[7] = 1.0
    found, facts = fit_calibrator(np.linspace(-3, 3, 50), labels, rows(50))
    assert all(math.isfinite(loss) for loss in facts["log_loss"].values())
    assert found(np.array([0.0])).shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0.0, 0.0, 0.0])}, "0 positives among 3 rows"),
        ({"labels": np.array([1.0, 1.0, 1.0])}, "3 positives among 3 rows"),
        ({"labels": np.array([0.0, 1.0, np.nan])}, "labels 0 or 1"),
        ({"labels": np.array([0.0, 1.0])}, "of one length"),
        ({"n_folds": 1}, "at least 2 folds, got 1"),
    ],
)
def test_rows_that_cannot_calibrate_are_refused(change: dict[str, object], message: str) -> None:
    given_rows = {"logits": np.zeros(3), "labels": np.array([0.0, 1.0, 0.0]), "unit": rows(3)} | change
    with pytest.raises(InputError, match=message):
        fit_calibrator(**given_rows)


def test_a_diverged_model_is_not_calibrated() -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        fit_calibrator(np.array([0.0, np.nan]), np.array([0.0, 1.0]), rows(2))
    with pytest.raises(FloatingPointError, match="diverged"):
        Calibrator("identity")(np.array([np.inf]))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"kind": "beta"},
        {"kind": "platt", "slope": -1.0, "intercept": 0.0},
        {"kind": "platt", "slope": 1.0, "intercept": math.nan},
        {"kind": "platt", "slope": "steep"},
        {"kind": "isotonic"},
        {"kind": "isotonic", "logits": [0.0, 0.0], "probabilities": [0.1, 0.2]},
        {"kind": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.2, 0.1]},
        {"kind": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.2]},
        {"kind": "isotonic", "logits": [0.0], "probabilities": [1.0]},
        {"kind": "isotonic", "logits": [math.inf], "probabilities": [0.5]},
        {"kind": "isotonic", "logits": 3, "probabilities": [0.5]},
        [],
    ],
)
def test_a_damaged_calibrator_is_refused(content: object) -> None:
    with pytest.raises(InputError, match="calibrator: expected"):
        Calibrator.from_json(content)


# ---------------------------------------------------------------------------------------- reliability


@settings(deadline=None)
@given(
    sample=st.lists(st.tuples(st.sampled_from([0.05, 0.1, 0.2, 0.4, 0.8]) | st.floats(0.01, 0.99), st.booleans())),
    n_bins=st.integers(1, 8),
)
def test_reliability_bins_are_whole_tie_groups_of_about_equal_mass(
    sample: list[tuple[float, bool]], n_bins: int
) -> None:
    probabilities, labels = np.array(sample, np.float64).reshape(-1, 2).T
    bins = reliability(probabilities, labels, np.arange(len(sample)), n_bins)
    ascending = np.sort(probabilities)
    edges = np.cumsum([0, *(b["count"] for b in bins)])
    assert edges[-1] == len(sample)
    assert len(bins) <= n_bins
    for edge in edges[1:-1]:
        assert ascending[edge - 1] < ascending[edge]
    wanted = [len(sample) * b // n_bins for b in range(1, n_bins)]
    assert {int(np.sum(probabilities < ascending[w])) for w in wanted if sample} - {0} == set(edges[1:-1].tolist())
    for entry, start, end in zip(bins, edges[:-1], edges[1:], strict=True):
        inside = (probabilities >= ascending[start]) & (probabilities <= ascending[end - 1])
        assert entry["predicted"] == pytest.approx(probabilities[inside].mean())
        assert entry["observed"] == pytest.approx(labels[inside].mean())
        exact = binomtest(int(labels[inside].sum()), int(inside.sum())).proportion_ci(0.95, "exact")
        assert (entry["low"], entry["high"]) == pytest.approx((exact.low, exact.high))


def test_reliability_without_ties_has_equal_bins_and_shows_a_good_calibration() -> None:
    logits, labels = population(20_000, 5, slope=1.0, shift=0.0)
    bins = reliability(expit(logits), labels, np.arange(len(labels)))
    assert [b["count"] for b in bins] == [1000] * 20
    inside = [b["low"] <= b["predicted"] <= b["high"] for b in bins]
    assert sum(inside) >= 17
    assert json.loads(json.dumps(bins)) == bins


def test_reliability_of_rows_that_hang_together_in_days_holds_as_often_as_it_says() -> None:
    """60 days of 40 rows whose rate swings: the share of intervals that hold the true rate of a bin."""
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(60), 40)
    held = {"day": 0, "row": 0}
    for _ in range(150):
        level = rng.normal(size=60)[day]
        probabilities = expit(rng.normal(size=len(day)))
        labels = rng.random(len(day)) < expit(logit(probabilities) + level)
        rates = [expit(logit(probabilities)[:, None] + rng.normal(size=200)).mean(1)]  # over days not drawn
        middle = np.argsort(probabilities)[len(day) // 3 : len(day) * 2 // 3]
        for kind, unit in (("day", day), ("row", np.arange(len(day)))):
            entry = reliability(probabilities, labels, unit, 3)[1]
            held[kind] += entry["low"] <= rates[0][middle].mean() <= entry["high"]
    assert held["day"] >= 0.9 * 150
    assert held["row"] < 0.7 * 150


# ---------------------------------------------------------------------------------------- smearing


def test_smearing_gives_back_the_mean_of_a_log_normal_target() -> None:
    generator = np.random.default_rng(0)
    centre = generator.normal(2.0, 1.0, 200_000)
    actual = np.expm1(centre + generator.normal(0.0, 0.8, 200_000)).clip(0)
    predicted = np.expm1(centre)
    factor = smearing(predicted, actual, "log1p")
    assert factor == pytest.approx(math.exp(0.8**2 / 2), rel=0.02)
    assert predicted.mean() < 0.8 * actual.mean()
    assert smeared(predicted, factor, "log1p").mean() == pytest.approx(actual.mean(), rel=0.02)


def test_smearing_counts_known_rows_alone_and_leaves_plain_targets() -> None:
    predicted, actual = np.array([1.0, 3.0, 9.0]), np.array([3.0, np.nan, 9.0])
    assert smearing(predicted, actual, "log1p") == pytest.approx((4 / 2 + 10 / 10) / 2)
    assert smearing(predicted, actual, "none") == 1.0
    assert smeared(predicted, 1.0, "none").tolist() == predicted.tolist()
    assert smeared(predicted, 2.0, "log1p").tolist() == [3.0, 7.0, 19.0]
    assert smeared(predicted.astype(np.float32), 2.0, "log1p").dtype == np.float64


def test_an_amount_is_never_negative() -> None:
    assert smearing(np.array([-0.999]), np.array([3.0]), "log1p") == 4.0
    assert smeared(np.array([-0.5, 0.1]), 0.5, "log1p").tolist() == [0.0, 0.0]


def test_smearing_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="rows with a known target, got none"):
        smearing(np.ones(2), np.full(2, np.nan), "log1p")
    with pytest.raises(InputError, match="transform log1p or none, got 'sqrt'"):
        smearing(np.ones(2), np.ones(2), "sqrt")
    with pytest.raises(InputError, match="transform log1p or none, got 'sqrt'"):
        smeared(np.ones(2), 1.0, "sqrt")
