"""Does one arm beat another by as much as was asked for: an answer from the replicates of `models.bootstrap`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from models.bootstrap import Draws, Interval, Reading
from models.trainer import InputError

Outcome = Literal["helps", "does not", "undecided"]

_RISING = ("pr_auc", "roc_auc", "recall_", "revenue_", "capture_")  # metrics of which more is better


@dataclass(frozen=True)
class Verdict:
    """Whether `arm` beats `against` by at least `min_gain`, with the figures that say so.

    `min_gain` is a share of the metric of `against` (reading `relative`) or a difference of the metric itself
    (`points`: 0.03 are three percentage points). Both are given, the reading's own decides: `helps` iff the whole
    interval is at least `min_gain`, `does not` iff all of it is below, else `undecided`.
    `positives_needed` are the positives more than `n_positive` that would decide it if the estimate stayed where it
    is; None where it is decided, or where no number would do: the gain is too close to `min_gain`, or the seeds lie
    too far apart.
    """

    arm: str
    against: str
    metric: str
    min_gain: float
    reading: Reading
    confidence: float
    difference: Interval
    relative: Interval
    outcome: Outcome
    n_positive: int
    positives_needed: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    draws: Draws,
    arm: str,
    against: str,
    min_gain: float = 0.03,
    reading: Reading = "relative",
    *,
    n_positive: int,
    metric: str = "pr_auc",
    confidence: float = 0.95,
) -> Verdict:
    """Judge `arm` against `against`.

    Args:
        n_positive: positives of the sample that was resampled.

    Raises:
        InputError: an unknown arm, a metric of which less is better, an unknown reading.
    """
    _check(metric, reading)
    difference = draws.difference(arm, against, metric, confidence)
    relative = draws.relative(arm, against, metric, confidence)
    decides = relative if reading == "relative" else difference
    outcome: Outcome = "undecided"
    if decides.low >= min_gain:
        outcome = "helps"
    elif decides.high < min_gain:
        outcome = "does not"
    needed = None
    if outcome == "undecided":
        spread = draws.contrast(arm, against, metric, reading)
        needed = _positives_needed(decides, min_gain, spread.rows_variance, spread.seeds_variance, n_positive)
    return Verdict(
        arm, against, metric, min_gain, reading, confidence, difference, relative, outcome, n_positive, needed
    )


def fresh_probability(draws: Draws, arm: str, against: str, metric: str = "pr_auc") -> float:
    """Probability that `arm` beats `against` once more: on a fresh sample of this size, with as many fresh seeds.

    What is known of the difference is as uncertain as its replicates say, and the next one scatters as much around
    it: the share of all pairs of replicates whose deviations together leave the difference above 0, ties half.

    Raises:
        InputError: an unknown arm, a metric of which less is better.
    """
    _check(metric, "points")
    spread = draws.contrast(arm, against, metric, "points")
    deviations = np.sort(spread.replicates - spread.value)
    limits = -spread.replicates  # the next deviation has to be above it
    above = len(deviations) - np.searchsorted(deviations, limits, side="right")
    tied = len(deviations) - np.searchsorted(deviations, limits, side="left") - above
    return float((above + tied / 2.0).mean() / len(deviations))


def _check(metric: str, reading: str) -> None:
    if not metric.startswith(_RISING):
        raise InputError(f"verdict: metric {metric}: expected one of which more is better, such as pr_auc")
    if reading not in ("relative", "points"):
        raise InputError(f"verdict: reading: expected relative or points, got {reading}")


def _positives_needed(
    interval: Interval, min_gain: float, rows: float, seeds: float, n_positive: int
) -> int | None:
    """More positives that would take the interval's end off `min_gain`, when its value stays.

    The rows' part of the variance falls as 1 / positives, the seeds' part does not fall.
    """
    gap = interval.value - min_gain
    reach = interval.value - interval.low if gap >= 0.0 else interval.high - interval.value
    if reach <= 0.0 or rows + seeds <= 0.0:
        return None
    by_rows, by_seeds = reach**2 * rows / (rows + seeds), reach**2 * seeds / (rows + seeds)
    room = gap**2 - by_seeds
    if room <= 0.0 or by_rows / room > 1e6:  # beyond a million times the sample nothing is known
        return None
    return max(math.ceil(n_positive * (by_rows / room - 1.0)), 1)
