from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit
from sklearn import metrics as sklearn_metrics

from models import bootstrap
from models.bootstrap import Draws, Sample, resample
from models.metrics import Ranking, Truth, read
from models.trainer import InputError
from models.weighted import Rows, Scores, Weighted


def scores_of(logits: np.ndarray, **amounts: tuple[np.ndarray, np.ndarray]) -> Scores:
    logits = np.asarray(logits, np.float32)
    raw = expit(logits.astype(np.float64))
    return Scores(logits, raw, raw**2, amounts)


@st.composite
def weighted_rows(draw: st.DrawFn) -> tuple[Sample, Scores, np.ndarray]:
    """A small sample with few or many ties, clustered units, and weights [U, 1..5] that leave metrics defined."""
    n, n_units = draw(st.integers(4, 60)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    logits = (rng.integers(0, levels, n) - levels / 2.0) * 8.0 / levels
    labels = (rng.random(n) < draw(st.sampled_from([0.1, 0.3, 0.9]))).astype(np.float32)
    labels[:2] = 1, 0
    amount = rng.integers(0, 4, n) * (labels if draw(st.booleans()) else 1.0)
    amount[0] = 2.0
    unit = rng.integers(0, n_units, n) * 7 - 3
    rows = Rows.of(labels, unit, amount, {})
    weights = rng.multinomial(rows.n_units, np.full(rows.n_units, 1.0 / rows.n_units), 4).T.astype(np.float64)
    weights = np.hstack([np.ones((rows.n_units, 1)), weights])
    return Sample(labels, unit, amount), scores_of(logits), weights[:, (rows.needs() @ weights > 0).all(0)]


@settings(max_examples=100, deadline=None)
@given(weighted_rows())
def test_weighting_units_is_repeating_their_rows(data: tuple) -> None:
    sample, scores, weights = data
    rows = Rows.of(sample.labels, sample.unit, sample.amount, {})
    found = Weighted(rows, scores).metrics(weights)
    for column in range(weights.shape[1]):
        repeated = np.repeat(np.arange(len(sample.labels)), weights[rows.unit, column].astype(int))
        truth = Truth.of(torch.tensor(sample.labels[repeated]), torch.tensor(sample.amount[repeated]), name="x")
        expected = read(Ranking.of(torch.tensor(scores.logits[repeated]), truth).metrics())
        for name in expected.keys() - {"pr_auc_se", "ece", "log_loss"}:
            loose = 1e-7 if "_at_" in name else 1e-12  # ties are shared out in float32 there
            assert found[name][column] == pytest.approx(expected[name], rel=1e-12, abs=loose), name
        assert found["log_loss_raw"][column] == pytest.approx(expected["log_loss"], rel=1e-6)
        if column == 0:  # the bins are those of the sample
            assert found["ece_raw"][0] == pytest.approx(expected["ece"], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(weighted_rows())
def test_equal_to_scikit_learn_with_sample_weights(data: tuple) -> None:
    sample, scores, weights = data
    rows = Rows.of(sample.labels, sample.unit, None, {})
    found = Weighted(rows, scores).metrics(weights)
    for column in range(weights.shape[1]):
        weight, labels = weights[rows.unit, column], sample.labels
        expected = {
            "pr_auc": sklearn_metrics.average_precision_score(labels, scores.logits, sample_weight=weight),
            "roc_auc": sklearn_metrics.roc_auc_score(labels, scores.logits, sample_weight=weight),
            "brier_raw": sklearn_metrics.brier_score_loss(labels, scores.raw, sample_weight=weight),
            "brier_calibrated": sklearn_metrics.brier_score_loss(labels, scores.calibrated, sample_weight=weight),
            "log_loss_raw": sklearn_metrics.log_loss(labels, scores.raw, sample_weight=weight),
            "log_loss_calibrated": sklearn_metrics.log_loss(labels, scores.calibrated, sample_weight=weight),
        }
        assert {name: found[name][column] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(weighted_rows())
def test_calibration_error_over_the_bins_of_the_sample(data: tuple) -> None:
    """By the definition: a tie group that an edge cuts belongs to each bin with the share of its places there."""
    sample, scores, weights = data
    rows = Rows.of(sample.labels, sample.unit, None, {})
    found = Weighted(rows, scores).metrics(weights)
    n = len(sample.labels)
    for name in ("raw", "calibrated"):
        expected = np.zeros(weights.shape[1])
        for b in range(20):
            low, high = n * b // 20, n * (b + 1) // 20
            residual = np.zeros(weights.shape[1])
            for i in range(n):
                start, size = (scores.logits > scores.logits[i]).sum(), (scores.logits == scores.logits[i]).sum()
                share = max(min(high, start + size) - max(low, start), 0) / size
                residual += share * weights[rows.unit[i]] * (getattr(scores, name)[i] - sample.labels[i])
            expected += np.abs(residual) / (rows.sizes @ weights)
        assert found[f"ece_{name}"] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(weighted_rows(), st.integers(0, 2**32))
def test_errors_of_amounts_by_the_definition(data: tuple, seed: int) -> None:
    sample, scores, weights = data
    rng, n = np.random.default_rng(seed), len(sample.labels)
    actual = np.where(sample.labels == 1, rng.lognormal(size=n), np.nan)
    pair = rng.lognormal(size=n), rng.lognormal(size=n)
    rows = Rows.of(sample.labels, sample.unit, None, {"gift": actual})
    found = Weighted(rows, dataclasses.replace(scores, amounts={"gift": pair})).metrics(weights)
    counts = ~np.isnan(actual)
    for column in range(weights.shape[1]):
        weight = weights[rows.unit, column][counts]
        for suffix, predicted in zip(("_raw", ""), pair, strict=True):
            error = (predicted - actual)[counts]
            expected = {
                f"gift_mae{suffix}": np.average(np.abs(error), weights=weight),
                f"gift_rmse{suffix}": math.sqrt(np.average(error**2, weights=weight)),
                f"gift_bias{suffix}": np.average(error, weights=weight),
            }
            assert {name: found[name][column] for name in expected} == pytest.approx(expected, rel=1e-9)


def clustered(
    rng: np.random.Generator, n_units: int, size: int = 4, n_seeds: int = 3, spread: float = 0.3
) -> tuple[Sample, dict[str, list[Scores]]]:
    """Users with rows that resemble each other, and two models whose seeds differ by weights of the features."""
    unit = np.repeat(np.arange(n_units), size)
    features = (rng.normal(size=(n_units, 3))[unit] + rng.normal(size=(len(unit), 3))) / math.sqrt(2.0)
    labels = (rng.random(len(unit)) < expit(1.5 * features[:, 0] + features[:, 1] - 2.5)).astype(np.float32)
    labels[:2] = 1, 0

    def fits(second: float) -> list[Scores]:
        weights = np.array([1.0, second, 0.0]) + rng.normal(0.0, spread, (n_seeds, 3))
        return [scores_of(features @ weight - 2.5) for weight in weights]

    amount = labels * rng.integers(1, 50, len(unit))
    return Sample(labels, unit, amount), {"both": fits(0.7), "one": fits(0.0)}


def test_values_are_those_of_the_sample_and_its_fits() -> None:
    sample, models = clustered(np.random.default_rng(0), 200)
    draws = resample(sample, models, 50)
    truth = Truth.of(torch.tensor(sample.labels), torch.tensor(sample.amount), name="x")
    for name, fits in models.items():
        expected = [read(Ranking.of(torch.tensor(fit.logits), truth).metrics()) for fit in fits]
        for metric in ("pr_auc", "roc_auc", "recall_at_5pct", "revenue_at_1pct", "capture_at_10pct"):
            values = [one[metric] for one in expected]
            assert draws.per_seed(name, metric) == pytest.approx(values, rel=1e-7)
            assert draws.value(name, metric) == pytest.approx(np.mean(values), rel=1e-7)
    assert draws.models == ("both", "one")
    assert draws.draws("both", "pr_auc").shape == (50,)
    assert draws.n_units == 200


def test_every_metric_has_a_finite_interval_around_its_value() -> None:
    sample, models = clustered(np.random.default_rng(1), 60)
    actual = np.where(sample.labels == 1, sample.amount, np.nan)
    sample = dataclasses.replace(sample, targets={"gift": actual, "never": np.full(len(actual), np.nan)})
    noisy = np.random.default_rng(2).lognormal(size=(2, len(actual)))
    pair = {"gift": (noisy[0], noisy[1]), "never": (noisy[0], noisy[1])}
    models["both"] = [dataclasses.replace(fit, amounts=pair) for fit in models["both"]]
    draws = resample(sample, models, 100)
    assert {metric.removesuffix("_raw") for metric in draws.metrics if metric.startswith("gift_")} == {
        "gift_mae", "gift_rmse", "gift_bias",
    }  # fmt: skip
    assert not [metric for metric in draws.metrics if metric.startswith("never")]
    assert draws.metrics_of("one") == tuple(name for name in draws.metrics if not name.startswith("gift"))
    assert len(draws.metrics) == len(draws.metrics_of("both")) == 2 + 9 + 6 + 6
    for model in models:
        for metric in draws.metrics_of(model):
            found = draws.interval(model, metric)
            assert -math.inf < found.low <= found.value <= found.high < math.inf
            assert found.value == draws.value(model, metric)
            if not metric.startswith(("gift", "log_loss")):
                assert found.low >= 0.0
                assert found.high <= 1.0


def test_what_is_undefined_without_money_or_negatives_is_left_out() -> None:
    sample, models = clustered(np.random.default_rng(1), 30)
    draws = resample(dataclasses.replace(sample, amount=None), models, 20)
    assert not [metric for metric in draws.metrics if metric.startswith(("capture", "revenue"))]
    assert resample(dataclasses.replace(sample, amount=0.0 * sample.amount), models, 20).metrics == draws.metrics
    positive = resample(Sample(np.ones(120), sample.unit), models, 20)
    assert "roc_auc" not in positive.metrics
    assert positive.value("one", "pr_auc") == 1.0


def test_models_are_compared_on_the_same_units() -> None:
    """Another scale of the same logits ranks alike: nothing is left of the difference in any replicate."""
    sample, models = clustered(np.random.default_rng(3), 100, n_seeds=1)
    fit = models["both"][0]
    draws = resample(sample, {"a": [fit], "b": [scores_of(2.0 * fit.logits)]}, 200)
    assert draws.interval("a", "pr_auc").high - draws.interval("a", "pr_auc").low > 0.05
    for found in (draws.difference("a", "b", "pr_auc"), draws.relative("a", "b", "pr_auc")):
        assert (found.value, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_swapped_models_mirror_their_difference() -> None:
    draws = resample(*clustered(np.random.default_rng(3), 100), 200)
    found, swapped = draws.difference("both", "one", "brier_raw"), draws.difference("one", "both", "brier_raw")
    assert (found.value, found.low, found.high) == pytest.approx((-swapped.value, -swapped.high, -swapped.low))


def test_rows_of_a_unit_stay_together() -> None:
    """Copies of every row tell nothing new if they belong to its unit; as units of their own they would."""
    sample, models = clustered(np.random.default_rng(4), 400, size=1, n_seeds=1)
    fit = models["both"][0]
    nine = np.repeat(np.arange(400), 9)
    copied = Sample(sample.labels[nine], sample.unit[nine])
    alone = Sample(sample.labels[nine], np.arange(len(nine)))

    def width(sample: Sample, fit: Scores) -> float:
        found = resample(sample, {"a": [fit]}, 400).interval("a", "brier_raw")
        return found.high - found.low

    once, together = width(sample, fit), width(copied, scores_of(fit.logits[nine]))
    assert together == pytest.approx(once, rel=1e-9)
    assert width(alone, scores_of(fit.logits[nine])) == pytest.approx(once / 3.0, rel=0.2)


def test_spread_of_a_mean_over_clusters_by_the_textbook() -> None:
    sample, models = clustered(np.random.default_rng(5), 500, n_seeds=1)
    fit = models["both"][0]
    per_unit = np.bincount(sample.unit, weights=(fit.raw - sample.labels) ** 2) / 4
    error = per_unit.std(ddof=1) / math.sqrt(500)
    found = resample(sample, {"a": [fit]}, 4000).interval("a", "brier_raw")
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    narrow = resample(sample, {"a": [fit]}, 4000).interval("a", "brier_raw", confidence=0.8)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.2816 * error, rel=0.05)


def shifted(shifts: list[float], noise: np.ndarray | None = None) -> tuple[Sample, list[Scores]]:
    """300 rows whose amount each seed misses by its own shift: that is its bias, whatever is drawn."""
    labels, actual = np.arange(300) % 3 == 0, np.linspace(1.0, 9.0, 300)
    noise = np.zeros((len(shifts), 300)) if noise is None else noise
    predicted = [actual + shift + extra for shift, extra in zip(shifts, noise, strict=True)]
    fits = [scores_of(np.zeros(300), amount=(values, values)) for values in predicted]
    return Sample(labels, np.arange(300), None, {"amount": actual}), fits


def test_seeds_of_one_model_give_the_t_interval() -> None:
    shifts = [0.3, -0.1, 0.9, 0.4, 0.2]
    sample, fits = shifted(shifts)
    found = resample(sample, {"a": fits}, 4000).interval("a", "amount_bias")
    low, high = stats.t.interval(0.95, 4, np.mean(shifts), stats.sem(shifts))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.01)


def test_seeds_of_two_models_give_welchs_interval() -> None:
    ours, theirs = [0.3, -0.1, 0.9, 0.4, 0.2], [0.1, 0.15, 0.05]
    sample, fits = shifted(ours)
    draws = resample(sample, {"a": fits, "b": shifted(theirs)[1]}, 4000)
    found = draws.difference("a", "b", "amount_bias")
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.01)
    swapped = draws.difference("b", "a", "amount_bias")
    assert (-swapped.high, -swapped.low) == pytest.approx((found.low, found.high), rel=1e-9)


def test_one_seed_says_nothing_of_other_seeds() -> None:
    sample, fits = shifted([0.3])
    draws = resample(sample, {"a": fits, "b": shifted([0.1, 0.2])[1]}, 100)
    found = draws.interval("a", "amount_bias")
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))
    assert (draws.n_seeds("a"), draws.n_seeds("b")) == (1, 2)
    assert draws.difference("a", "b", "amount_bias").high > 0.5  # the seeds of b alone


def test_noise_of_single_seeds_is_counted_once() -> None:
    """Each seed misses every row by chance: the standard error of the mean of all is 1 / sqrt(rows x seeds)."""
    noise = np.random.default_rng(6).normal(size=(40, 300))
    sample, fits = shifted([0.0] * 40, noise)
    spread = resample(sample, {"a": fits}, 2000).draws("a", "amount_bias").std()
    assert spread == pytest.approx(1.0 / math.sqrt(300 * 40), rel=0.25)  # counted twice it would be 1.41 times that


def coverage(n_samples: int, n_seeds: int) -> tuple[float, float]:
    """How often ours and the plain percentile interval of a difference hold its true value 0."""
    ours = plain = 0
    for number in range(n_samples):
        rng = np.random.default_rng([7, number])
        unit = np.repeat(np.arange(60), 3)
        labels, actual = np.arange(180) % 4 == 0, np.zeros(180)
        common = rng.normal(0.0, 2.0, 60)[unit]  # missed alike by both models

        def fits(rng: np.random.Generator, unit: np.ndarray, common: np.ndarray) -> list[Scores]:
            own = rng.normal(0.0, 0.3, 60)[unit]
            missed = [rng.normal(0.0, 0.15) + common + own + rng.normal(0.0, 0.3, 180) for _ in range(n_seeds)]
            return [scores_of(np.zeros(180), amount=(one, one)) for one in missed]

        models = {name: fits(rng, unit, common) for name in ("a", "b")}
        draws = resample(Sample(labels, unit, None, {"amount": actual}), models, 200, seed=number)
        found = draws.difference("a", "b", "amount_bias")
        ours += found.low <= 0.0 <= found.high
        picked = [
            np.take_along_axis(draws._replicates[name]["amount_bias"], rng.integers(0, n_seeds, (200, n_seeds)), 1)
            for name in ("a", "b")
        ]
        low, high = np.quantile(picked[0].mean(1) - picked[1].mean(1), [0.025, 0.975])
        plain += low <= 0.0 <= high
    return ours / n_samples, plain / n_samples


def test_intervals_hold_as_often_as_they_say_with_few_seeds() -> None:
    ours, plain = coverage(120, n_seeds=3)
    assert ours >= 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / 120)
    assert plain < 0.91 < ours


def test_intervals_of_pr_auc_hold_for_clustered_rows_and_varying_seeds() -> None:
    sample, models = clustered(np.random.default_rng(8), 20_000, n_seeds=40)
    known = Truth.of(torch.tensor(sample.labels), name="x")
    precision = {
        name: np.mean([Ranking.of(torch.tensor(fit.logits), known).average_precision().item() for fit in fits])
        for name, fits in models.items()
    }
    truth = precision["both"] - precision["one"]
    held, n_samples = 0, 60
    for number in range(n_samples):
        sample, models = clustered(np.random.default_rng([9, number]), 150)
        found = resample(sample, models, 200, seed=number).difference("both", "one", "pr_auc")
        held += found.low <= truth <= found.high
    assert held / n_samples >= 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / n_samples)


def test_few_units_widen_the_interval_as_students_t_does() -> None:
    """Ten units of one row each: the t interval of their mean, as near as a bootstrap of ten comes to it."""
    wide = []
    for number in range(30):
        missed = np.random.default_rng([10, number]).normal(size=10)
        fit = scores_of(np.zeros(10), amount=(missed, missed))
        sample = Sample(np.ones(10), np.arange(10), None, {"amount": np.zeros(10)})
        found = resample(sample, {"a": [fit]}, 1000).interval("a", "amount_bias")
        low, high = stats.t.interval(0.95, 9, missed.mean(), stats.sem(missed))
        wide.append((found.high - found.low) / (high - low))
    assert np.mean(wide) == pytest.approx(1.0, abs=0.06)  # 0.8 without


def test_replicates_without_positives_or_money_are_drawn_again() -> None:
    labels = np.zeros(40)
    labels[[0, 1, 5]] = 1.0  # in two of eight units
    amount = np.zeros(40)
    amount[0] = 3.0  # in one
    unit = np.arange(40) // 5
    actual = np.where(np.arange(40) == 7, 1.0, np.nan)  # counts in the other one
    rng = np.random.default_rng(0)
    fits = [scores_of(rng.normal(size=40), amount=(np.ones(40), np.ones(40))) for _ in range(2)]
    draws = resample(Sample(labels, unit, amount, {"amount": actual}), {"a": fits}, 300)
    assert draws.n_redrawn > 100
    for metric in draws.metrics:
        assert np.isfinite(draws._replicates["a"][metric]).all(), metric
        found = draws.interval("a", metric)
        assert np.isfinite([found.low, found.value, found.high]).all()
    assert resample(*clustered(np.random.default_rng(0), 100), 100).n_redrawn == 0


def test_calibration_error_does_not_grow_by_being_resampled() -> None:
    """Repeated rows make every replicate's bins noisier than the sample's."""
    rng = np.random.default_rng(11)
    logits = rng.normal(-2.0, 1.0, 1000).astype(np.float32)
    labels = rng.random(1000) < expit(logits)
    draws = resample(Sample(labels, np.arange(1000)), {"a": [scores_of(logits)]}, 400)
    found, drawn = draws.interval("a", "ece_raw"), draws._replicates["a"]["ece_raw"]
    assert np.quantile(drawn, 0.1) > found.value  # what a plain percentile interval would leave out
    centred, bias = draws.draws("a", "ece_raw"), drawn.mean() - found.value
    assert (found.low, found.high) == pytest.approx(
        (np.quantile(centred, 0.025) - bias, np.quantile(centred, 0.975)), rel=1e-9
    )
    assert centred.mean() == pytest.approx(found.value, rel=0.02)


def test_sure_and_wrong_probabilities_stay_finite() -> None:
    labels, logits = np.arange(40) % 2, np.where(np.arange(40) % 4 < 2, 60.0, -60.0).astype(np.float32)
    raw = expit(logits.astype(np.float64))
    sure = Scores(logits, raw, np.round(raw))
    draws = resample(Sample(labels, np.arange(40)), {"a": [sure]}, 20)
    assert draws.value("a", "log_loss_raw") == pytest.approx(30.0)
    assert math.isfinite(draws.interval("a", "log_loss_calibrated").high)


def figures(draws: Draws, model: str) -> dict[str, np.ndarray]:
    return {metric: draws.draws(model, metric) for metric in draws.metrics_of(model)}


def test_same_seed_same_draws_whatever_else_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, models = clustered(np.random.default_rng(12), 80)
    whole = resample(sample, models, 70, seed=5)
    again, alone = resample(sample, models, 70, seed=5), resample(sample, {"both": models["both"]}, 70, seed=5)
    other = resample(sample, models, 70, seed=6)
    monkeypatch.setattr(bootstrap, "_BLOCK_ENTRIES", 80 * 17)
    monkeypatch.setattr(bootstrap, "_CHUNK_BYTES", 80 * 21)
    pieces = resample(sample, models, 70, seed=5)
    for metric, values in figures(whole, "both").items():
        assert (figures(again, "both")[metric] == values).all()
        assert figures(alone, "both")[metric] == pytest.approx(values, rel=1e-12)
        assert figures(pieces, "both")[metric] == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert (figures(other, "both")["pr_auc"] != figures(whole, "both")["pr_auc"]).any()
    assert whole.difference("both", "one", "pr_auc") == again.difference("both", "one", "pr_auc")


def test_progress_counts_every_replicate_of_every_fit() -> None:
    sample, models = clustered(np.random.default_rng(0), 30)
    seen: list[tuple[int, int]] = []
    resample(sample, models, 50, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300, 300)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_relative_is_the_difference_as_a_share() -> None:
    sample, models = clustered(np.random.default_rng(13), 400, n_seeds=1)
    draws = resample(sample, models, 500)
    found, base = draws.relative("both", "one", "pr_auc"), draws.value("one", "pr_auc")
    assert found.value == pytest.approx(draws.difference("both", "one", "pr_auc").value / base)
    ratio = draws._replicates["both"]["pr_auc"][:, 0] / draws._replicates["one"]["pr_auc"][:, 0] - 1.0
    assert found.high - found.low == pytest.approx(np.diff(np.quantile(ratio, [0.025, 0.975]))[0], rel=0.05)


def test_bad_questions_are_refused() -> None:
    sample, models = clustered(np.random.default_rng(0), 30)
    draws = resample(sample, models, 20)
    with pytest.raises(InputError, match="model three: expected one of both, one"):
        draws.value("three", "pr_auc")
    with pytest.raises(InputError, match="metric auc of one: expected one of pr_auc, roc_auc"):
        draws.interval("one", "auc")
    with pytest.raises(InputError, match="expected another model to compare with, got itself"):
        draws.difference("one", "one", "pr_auc")
    _, fits = shifted([0.0, 0.0])
    biased = resample(shifted([0.0])[0], {"a": fits, "b": fits}, 10)
    with pytest.raises(InputError, match="amount_bias of b: expected other than 0"):
        biased.relative("a", "b", "amount_bias")


def test_bad_samples_and_scores_are_refused() -> None:
    sample, models = clustered(np.random.default_rng(0), 30)
    fit, replace = models["one"][0], dataclasses.replace
    n = len(sample.labels)
    odd = fit.logits.copy()
    odd[3] = np.nan
    refused = [
        (replace(sample, unit=np.zeros(n)), models, InputError, "expected at least 2 units to draw from, got 1"),
        (replace(sample, labels=np.zeros(n)), models, InputError, "sample: no positives among 120 rows"),
        (replace(sample, labels=sample.labels + 1), models, InputError, "sample: expected labels 0 or 1"),
        (replace(sample, amount=-sample.amount - 1), models, InputError, "sample: expected amounts >= 0"),
        (replace(sample, unit=np.zeros(3)), models, ValueError, r"sample/unit: expected shape \[120\], got \[3\]"),
        (sample, {"a": []}, ValueError, "a: expected at least one fit"),
        (sample, {"a": [replace(fit, raw=fit.raw[:5])]}, ValueError, r"a/0/raw: expected shape \[120\], got \[5\]"),
        (sample, {"a": [replace(fit, logits=odd)]}, FloatingPointError, "a/0/logits: expected a finite number"),
        (sample, {"a": [fit, scores_of(odd, t=(odd, odd))]}, ValueError, "a: expected the same amounts of every"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="expected at least 2 replicates, got 1"):
        resample(sample, models, 1)
    for bad, fits, error, message in refused:
        with pytest.raises(error, match=message):
            resample(bad, fits, 10)
    target = np.where(np.arange(n) == 3, np.nan, 1.0)  # predictions count where there is something to predict
    with_target = replace(sample, targets={"t": target})
    resample(with_target, {"a": [replace(fit, amounts={"t": (odd, odd)})]}, 10)
    with pytest.raises(FloatingPointError, match="a/0/t, before smearing: expected a finite number, got nan"):
        resample(replace(sample, targets={"t": target[::-1]}), {"a": [replace(fit, amounts={"t": (odd, odd)})]}, 10)
