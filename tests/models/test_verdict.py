from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, ndtri
from scipy.stats import norm

from models.bootstrap import Draws, Sample, resample
from models.trainer import InputError
from models.verdict import fresh_probability, judge
from models.weighted import Scores


def planted(
    arm: float,
    against: float = 0.10,
    rows_error: float = 0.001,
    seeds: tuple[list[float], list[float]] = ([0.0], [0.0]),
    n_replicates: int = 4000,
) -> Draws:
    """Two arms: PR-AUC of the first moves with the rows by `rows_error`, of the second not; seeds as given."""
    moves = rows_error * ndtri((np.arange(n_replicates) + 0.5) / n_replicates)
    values = {"joint": {"pr_auc": arm + np.array(seeds[0])}, "single": {"pr_auc": against + np.array(seeds[1])}}
    replicates = {
        "joint": {"pr_auc": values["joint"]["pr_auc"] + moves[:, None]},
        "single": {"pr_auc": np.tile(values["single"]["pr_auc"], (n_replicates, 1))},
    }
    return Draws(n_replicates, 0, 1000, ("pr_auc",), values, replicates, np.ones(n_replicates), 0)


def test_helps_where_the_whole_interval_reaches_the_gain() -> None:
    verdict = judge(planted(0.110), "joint", "single", n_positive=5000)
    assert verdict.outcome == "helps"
    assert verdict.positives_needed is None
    assert verdict.relative.value == pytest.approx(0.10)
    assert (verdict.relative.low, verdict.relative.high) == pytest.approx((0.0804, 0.1196), abs=1e-4)


def test_does_not_where_all_of_it_is_below() -> None:
    verdict = judge(planted(0.1005), "joint", "single", n_positive=5000)
    assert verdict.outcome == "does not"
    assert verdict.relative.low < 0.0 < verdict.relative.high < 0.03
    assert verdict.positives_needed is None


def test_undecided_where_the_interval_holds_the_gain() -> None:
    verdict = judge(planted(0.105, rows_error=0.004), "joint", "single", n_positive=800)
    assert verdict.outcome == "undecided"
    assert verdict.relative.low < 0.03 < verdict.relative.high
    assert verdict.positives_needed is not None
    assert verdict.n_positive == 800


def test_both_readings_are_given_and_the_chosen_one_decides() -> None:
    """From 0.10 to 0.11 is ten per cent more and one percentage point."""
    points = judge(planted(0.110), "joint", "single", 0.03, "points", n_positive=5000)
    assert points.outcome == "does not"
    assert points.difference.value == pytest.approx(0.01)
    assert points.relative == judge(planted(0.110), "joint", "single", n_positive=5000).relative
    assert judge(planted(0.110), "joint", "single", 0.005, "points", n_positive=5000).outcome == "helps"


def test_an_interval_that_ends_at_the_gain_helps_or_is_undecided() -> None:
    draws = planted(0.110)
    found = draws.relative("joint", "single", "pr_auc")
    assert judge(draws, "joint", "single", found.low, n_positive=9).outcome == "helps"
    assert judge(draws, "joint", "single", np.nextafter(found.low, 1.0), n_positive=9).outcome == "undecided"
    assert judge(draws, "joint", "single", found.high, n_positive=9).outcome == "undecided"
    assert judge(draws, "joint", "single", np.nextafter(found.high, 1.0), n_positive=9).outcome == "does not"
    wider = judge(draws, "joint", "single", found.low, n_positive=9, confidence=0.99)
    assert wider.outcome == "undecided"
    assert wider.confidence == 0.99


@pytest.mark.parametrize(
    ("arm", "seeds"),
    [
        (0.107, ([0.0], [0.0])),
        (0.101, ([0.0], [0.0])),
        (0.107, ([-0.001, 0.0, 0.001, 0.0005, -0.0005], [0.0, 0.0005, -0.0005])),
    ],
)
def test_as_many_positives_as_said_would_decide(arm: float, seeds: tuple) -> None:
    """The rows' part of the spread falls with the root of the positives, the seeds' part does not."""
    undecided = judge(planted(arm, rows_error=0.006, seeds=seeds), "joint", "single", n_positive=1000)
    assert undecided.outcome == "undecided"
    assert undecided.positives_needed is not None
    for share, decided in ((1.15, True), (0.85, False)):
        error = 0.006 * math.sqrt(1000 / (1000 + share * undecided.positives_needed))
        more = judge(planted(arm, rows_error=error, seeds=seeds), "joint", "single", n_positive=1000)
        assert (more.outcome != "undecided") == decided


def test_no_number_of_positives_decides_what_lies_between_seeds() -> None:
    seeds = ([-0.01, 0.0, 0.01], [0.005, -0.005, 0.0])
    verdict = judge(planted(0.107, seeds=seeds), "joint", "single", n_positive=1000)
    assert verdict.outcome == "undecided"
    assert verdict.positives_needed is None
    close = judge(planted(0.103 + 1e-9, rows_error=0.006), "joint", "single", n_positive=1000)
    assert close.positives_needed is None


@pytest.mark.parametrize("gain", [-0.002, 0.0, 0.001, 0.004])
def test_probability_on_fresh_data_by_the_normal_distribution(gain: float) -> None:
    """What is known is as uncertain as a fresh sample is: both together scatter by sqrt(2)."""
    found = fresh_probability(planted(0.1 + gain, rows_error=0.002), "joint", "single")
    assert found == pytest.approx(norm.cdf(gain / (0.002 * math.sqrt(2.0))), abs=2e-3)
    assert fresh_probability(planted(0.1 + gain, rows_error=0.002), "single", "joint") == pytest.approx(1.0 - found)


def test_probability_on_fresh_data_with_many_ties() -> None:
    assert fresh_probability(planted(0.1, rows_error=0.0), "joint", "single") == 0.5
    assert fresh_probability(planted(0.2, rows_error=0.0), "joint", "single") == 1.0


def test_seeds_that_scatter_lower_the_probability() -> None:
    seeds = ([-0.01, 0.0, 0.01], [0.005, -0.005, 0.0])
    assert 0.5 < fresh_probability(planted(0.104, seeds=seeds), "joint", "single") < 0.85
    assert fresh_probability(planted(0.104), "joint", "single") > 0.99


def population(n_rows: int, second: float, number: int) -> tuple[Draws, int]:
    """Scores with and without a second signal of that strength, on rows of that number."""
    rng = np.random.default_rng([14, number])
    unit = np.repeat(np.arange(n_rows // 2), 2)
    first, other = rng.normal(size=n_rows // 2)[unit], rng.normal(size=n_rows)
    labels = rng.random(n_rows) < expit(1.5 * first + second * other - 3.0)

    def fits(weight: float) -> list[Scores]:
        found = []
        for _ in range(4):
            logits = (1.5 * first + (weight + rng.normal(0.0, 0.02)) * other - 3.0).astype(np.float32)
            found.append(Scores(logits, expit(logits.astype(float)), expit(logits.astype(float))))
        return found

    return resample(Sample(labels, unit), {"joint": fits(second), "single": fits(0.0)}, 300), int(labels.sum())


def test_planted_populations_get_their_verdicts() -> None:
    for rows, second, expected in ((20_000, 1.0, "helps"), (40_000, 0.0, "does not"), (400, 0.5, "undecided")):
        draws, n_positive = population(rows, second, 0)
        verdict = judge(draws, "joint", "single", n_positive=n_positive)
        assert verdict.outcome == expected, verdict.sentence
        assert (verdict.positives_needed is not None) == (expected == "undecided")


def test_verdict_as_json_is_plain() -> None:
    verdict = judge(planted(0.110), "joint", "single", n_positive=5000).as_json()
    assert verdict["difference"].keys() == {"value", "low", "high"}
    assert all(type(value) is float for value in verdict["relative"].values())
    assert verdict["outcome"] == "helps"
    assert verdict["n_positive"] == 5000


def test_bad_questions_are_refused() -> None:
    draws = planted(0.110)
    with pytest.raises(InputError, match="reading: expected relative or points, got percent"):
        judge(draws, "joint", "single", 0.03, "percent", n_positive=9)
    with pytest.raises(InputError, match="metric ece_raw: expected one of which more is better"):
        judge(draws, "joint", "single", n_positive=9, metric="ece_raw")
    with pytest.raises(InputError, match="more is better"):
        fresh_probability(draws, "joint", "single", "brier_raw")
    with pytest.raises(InputError, match="model third: expected one of joint, single"):
        judge(draws, "third", "single", n_positive=9)
