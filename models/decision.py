"""The decision rule: the threshold with the highest recall whose precision holds at a confidence.

A cut point selects every row whose logit is at least the threshold, so tied rows stay on one side. Its
precision is judged by the one-sided lower Clopper-Pearson bound for `tp` positives among `n` selected rows.
The bound rises with `tp` and falls with `n`, hence only cuts that end at a positive row can be optimal (a
cut that ends at a negative is beaten by the one before it), and for each `tp` there is a largest `n` that
still reaches the target. That limit is computed once; an epoch then costs one comparison on the device.

Where rows hang together by unit the bound counts units (`models.precision`): it may rise as well with a negative of
another unit, so every distinct score is a cut, and a ceiling of each bound (`models.unit_cuts`) says which few need
be judged exactly. The result is that of judging all of them.

The threshold is chosen on the rows that judge it: it is a search threshold, no certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, ndtri
from torch import Tensor

from models.metrics import Ranking
from models.precision import lower_bound, tail, worth
from models.trainer import Decision
from models.unit_cuts import Ints, UnitCuts

_FIRST_CUTS = 16  # judged at a time, then twice as many each time
_FIRST_ROWS = 4096  # looked at where no cut reaches the target, then as many as may matter
_ROUNDED = 1.0 - 1e-9  # a bound less what rounding may add to it


def precision_bound(n_selected: ArrayLike, n_true: ArrayLike, confidence: float) -> NDArray[np.float64]:
    """Lower Clopper-Pearson bound (one-sided) of a precision, element by element.

    The precision p at which `n_true` or more positives among `n_selected` rows have the probability
    1 - confidence; 0 without positives. Source: Clopper and Pearson 1934, by the beta quantile.
    """
    n, tp = np.asarray(n_selected, np.float64), np.asarray(n_true, np.float64)
    return lower_bound(tp, n - tp, 1.0 - confidence)


def _tail(n: NDArray[np.int64], tp: NDArray[np.int64], p: float) -> NDArray[np.float64]:
    """P(at least tp positives among n rows of precision p), for tp >= 1."""
    possible = n >= tp
    return np.where(possible, betainc(tp, np.where(possible, n - tp + 1, 1), p), 0.0)


@lru_cache(maxsize=64)
def most_selected(target: float, confidence: float, n_positive: int) -> NDArray[np.int64]:
    """For each number of positives 0..n_positive, the most rows a cut may select and still reach `target`.

    bound(n, tp) >= target  <=>  n <= most_selected[tp]. Entry 0 is 0: without positives nothing is reached.
    Found by bisection on the binomial tail from its normal approximation, hence exact in float64.
    Shape: [n_positive + 1] int64, read-only, cached.
    """
    tp = np.arange(1, n_positive + 1, dtype=np.int64)
    alpha = 1.0 - confidence
    # The row at which the tp-th positive turns up is negative binomial: its alpha-quantile, with skew.
    z, spread = ndtri(alpha), np.sqrt(tp * (1.0 - target))
    guess = (tp + z * spread + (z * z - 1.0) * (2.0 - target) / 6.0) / target
    low = np.maximum(tp - 1, np.floor(guess).astype(np.int64) - 2)  # tp - 1 rows cannot hold tp positives: fine
    high = low + 4
    step = 4
    while (wrong := _tail(low, tp, target) > alpha).any():
        low, step = np.where(wrong, np.maximum(tp - 1, low - step), low), 2 * step
    step = 4
    while (wrong := _tail(high, tp, target) <= alpha).any():
        high, step = np.where(wrong, high + step, high), 2 * step
    while (open_ := high - low > 1).any():
        middle = np.where(open_, (low + high) // 2, low)
        fine = _tail(middle, tp, target) <= alpha
        low, high = np.where(fine, middle, low), np.where(fine, high, middle)
    limits = np.concatenate(([0], low)).astype(np.int64)
    limits.flags.writeable = False
    return limits


@lru_cache(maxsize=64)
def _limits_on(device: torch.device, target: float, confidence: float, n_positive: int) -> Tensor:
    return torch.tensor(most_selected(target, confidence, n_positive), device=device)


def decide(ranking: Ranking, decision: Decision, unit: Tensor | np.ndarray | None = None) -> dict[str, float]:
    """Choose the threshold for one epoch's scores.

    Feasible: the cut with the highest recall that reaches the target with at least `min_selected` rows and a
    threshold inside the range; of equal recall the one with fewest rows. Otherwise the nearest: the allowed
    cut with the highest bound.

    Args:
        unit: ids [N] of what `decision.unit` names, in the order of the ranking's logits; best as codes
            (`models.unit_cuts.unit_codes`). Without them, or where the unit is the row, rows count.

    Returns:
        `threshold` (logit; select where score >= threshold), `precision`, `recall`, `precision_bound`,
        `violation` (target minus bound; feasible iff <= 0), `n_selected`. Where no cut is allowed at all
        (fewer rows than `min_selected`, or no score inside the range) nothing is selected: `threshold` and
        `precision` are left out, recall and bound are 0 and the violation is the target.
        Where units count also `n_units` of the selected rows, and `precision_bound_rows`, what the bound of the
        same cut were if rows counted.

    Raises:
        FloatingPointError: a logit is NaN.
        ValueError: units of another length than the logits.
    """
    if unit is not None and decision.unit != "row":
        return _decide_by_unit(ranking, decision, unit)
    n, tp, scores, allowed = _cuts(ranking, decision)
    n_rows, n_positive = ranking.truth.n_rows, ranking.truth.n_positive
    limits = _limits_on(n.device, decision.target_precision, decision.confidence, n_positive)
    feasible = allowed & (n <= limits[tp])
    best = torch.where(feasible, tp * (n_rows + 1) - n, -1).argmax().view(1)  # most positives, then fewest rows
    # float64 holds counts up to 2^53 and every float32 score exactly; NaN sorts last
    chosen = (feasible[best], allowed.any().view(1), n[best], tp[best], scores[best], ranking.ascending[-1:])
    values = torch.cat([value.double() for value in chosen]).tolist()
    found, any_allowed, n_best, tp_best, threshold, highest = values
    _refuse_nan(ranking, highest)
    if not any_allowed:
        return _nothing(decision)
    if not found:
        cuts = torch.stack([n.double(), tp.double(), scores.double()])[:, allowed].cpu().numpy()
        nearest = _highest_bound(cuts[0], cuts[1], decision.confidence)
        n_best, tp_best, threshold = cuts[:, nearest].tolist()
    bound = float(precision_bound(n_best, tp_best, decision.confidence))
    return _chosen(ranking, decision, threshold, n_best, tp_best, bound, bool(found))


def _chosen(
    ranking: Ranking, decision: Decision, threshold: float, n: float, tp: float, bound: float, is_feasible: bool
) -> dict[str, float]:
    # The binomial tail has judged; the quantile's last bit may not contradict it.
    target = decision.target_precision
    bound = max(bound, target) if is_feasible else min(bound, math.nextafter(target, 0.0))
    return {
        "threshold": threshold,
        "precision": tp / n,
        "recall": tp / ranking.truth.n_positive,
        "precision_bound": bound,
        "violation": target - bound,
        "n_selected": n,
    }


def _nothing(decision: Decision) -> dict[str, float]:
    return {"recall": 0.0, "precision_bound": 0.0, "n_selected": 0.0, "violation": decision.target_precision}


def _refuse_nan(ranking: Ranking, highest: float) -> None:
    if math.isnan(highest):
        raise FloatingPointError(f"{ranking.truth.name}: expected finite logits, got nan; the model diverged")


def _decide_by_unit(ranking: Ranking, decision: Decision, unit: Tensor | np.ndarray) -> dict[str, float]:
    _refuse_nan(ranking, float(ranking.ascending[-1]))
    delta, rows = 1.0 - decision.confidence, _RowBounds.of(ranking, decision)
    low, high = range_of_logits(decision.range)
    n_rows, is_feasible = rows.up_to_target(decision), True
    while True:
        cuts = UnitCuts.of(ranking, unit, max(n_rows, _FIRST_ROWS))
        in_range = (cuts.scores >= low) & (cuts.scores <= high)
        allowed = np.flatnonzero((cuts.n >= decision.min_selected) & in_range)
        most, best, highest = cuts.most_effective(delta), None, 0.0
        ceilings = cuts.ceilings(most, delta)
        if is_feasible:
            best = _highest_recall(cuts, allowed[ceilings[allowed] >= decision.target_precision], most, decision)
            is_feasible = best is not None
        if best is None and len(allowed):
            best, highest = _nearest(cuts, allowed, ceilings, delta)
        n_rows = 0 if is_feasible else rows.above(highest)
        if n_rows <= len(cuts.unit):
            break
    if best is None:
        return _nothing(decision) | {"n_units": 0.0, "precision_bound_rows": 0.0}
    bound = float(lower_bound(*cuts.worth(np.array([best]), delta), delta)[0])
    n, tp = float(cuts.n[best]), float(cuts.n_true[best])
    return _chosen(ranking, decision, float(cuts.scores[best]), n, tp, bound, is_feasible) | {
        "n_units": float(cuts.n_units[best]),
        "precision_bound_rows": float(precision_bound(n, tp, decision.confidence)),
    }


@dataclass(frozen=True)
class _RowBounds:
    """How far down a ranking a bound by units can matter, which at a delta of at most 0.5 is never above that of
    the same cut by rows. Shape: [P] `n` rows and `tp` true ones at each positive, from the highest score down."""

    n: Ints
    tp: Ints
    n_rows: int
    delta: float

    @classmethod
    def of(cls, ranking: Ranking, decision: Decision) -> _RowBounds:
        n, tp = torch.stack([ranking.end, ranking.true_positives.long()]).cpu().numpy()
        return cls(n[tp > 0], tp[tp > 0], ranking.truth.n_rows, 1.0 - decision.confidence)

    def up_to_target(self, decision: Decision) -> int:
        """Rows of the largest cut that may reach the target; 0 where none does."""
        if self.delta > 0.5:
            return self.n_rows
        limits = most_selected(decision.target_precision, decision.confidence, int(self.tp[-1]))[self.tp]
        return min(self.n_rows, int(limits.max(where=self.n <= limits, initial=0)))

    def above(self, bound: float) -> int:
        """Rows of the largest cut that may have a higher bound than this."""
        if self.delta > 0.5:
            return self.n_rows
        higher = np.flatnonzero(tail(self.tp, self.n - self.tp, bound * _ROUNDED) <= self.delta)
        if len(higher) == 0:
            return 0
        # the cuts up to the next positive have fewer true rows than rows like it, and may yet be above
        return int(np.append(self.n, self.n_rows)[higher[-1] + 1])


def _highest_recall(cuts: UnitCuts, candidates: Ints, most: NDArray[np.float64], decision: Decision) -> int | None:
    """The first cut that reaches the target, in order of falling recall, of equal recall of rising rows."""
    candidates = candidates[np.lexsort((candidates, -cuts.n_true[candidates]))]
    target, delta, size = decision.target_precision, 1.0 - decision.confidence, _FIRST_CUTS
    for start in range(0, len(candidates), _FIRST_ROWS):
        rivals = candidates[start : start + _FIRST_ROWS]
        if delta <= 0.5:  # without the grid that ceilings are on
            at_most = worth(cuts.n[rivals], cuts.n_true[rivals], most[rivals])
            rivals = rivals[tail(*at_most, target * _ROUNDED) <= delta]
        while len(rivals):
            some, rivals, size = rivals[:size], rivals[size:], 2 * size
            reached = tail(*cuts.worth(some, delta), target) <= delta
            if reached.any():
                return int(some[reached.argmax()])
    return None


def _nearest(cuts: UnitCuts, allowed: Ints, ceilings: NDArray[np.float64], delta: float) -> tuple[int, float]:
    """The cut with the highest bound, of equal bounds that with fewest rows; and that bound."""
    best, highest, size = int(allowed[0]), 0.0, _FIRST_CUTS
    rivals = allowed[np.argsort(-ceilings[allowed], kind="stable")]
    while len(rivals := rivals[ceilings[rivals] > highest]):
        some, rivals, size = np.sort(rivals[:size]), rivals[size:], 2 * size
        bounds = lower_bound(*cuts.worth(some, delta), delta)
        first = int(bounds.argmax())
        if (bounds[first], -some[first]) > (highest, -best):
            best, highest = int(some[first]), float(bounds[first])
    return best, highest


def _cuts(ranking: Ranking, decision: Decision) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cut points that can be optimal: rows selected, positives among them, threshold, allowed.

    One per marked row, and the smallest allowed cut, which may end at negatives. Shape: [U + 1] each.
    """
    n_rows, ascending = ranking.truth.n_rows, ranking.ascending
    low, high = range_of_logits(decision.range)
    lightest = torch.searchsorted(ascending, ascending.new_tensor([high]), right=True) - 1  # highest score in range
    position = lightest.clamp(min=0, max=max(n_rows - decision.min_selected, 0))
    score = ascending[position]
    n_smallest, tp_smallest = ranking.selected(score)
    n = torch.cat([ranking.end, n_smallest])
    tp = torch.cat([ranking.true_positives, tp_smallest]).to(torch.int64)
    scores = torch.cat([ranking.scores, score])
    allowed = (n >= decision.min_selected) & (scores >= low) & (scores <= high)
    return n, tp, scores, allowed


def range_of_logits(limits: tuple[float, float] | None) -> tuple[float, float]:
    """A range of probabilities as the float32 logits that lie inside it."""
    if limits is None:
        return -math.inf, math.inf
    low, high = (_logit(p) for p in limits)
    low32, high32 = np.float32(low), np.float32(high)
    if float(low32) < low:  # numpy would compare in float32
        low32 = np.nextafter(low32, np.float32(np.inf))
    if float(high32) > high:
        high32 = np.nextafter(high32, np.float32(-np.inf))
    return float(low32), float(high32)


def _logit(p: float) -> float:
    if p in (0.0, 1.0):
        return -math.inf if p == 0.0 else math.inf
    return math.log(p) - math.log1p(-p)


def _highest_bound(n: NDArray[np.float64], tp: NDArray[np.float64], confidence: float) -> int:
    """Index of the cut with the highest lower bound; without any positive the one with fewest rows.

    The Wilson bound guesses the winner, the binomial tail at its exact bound finds those that beat it, until
    none does. So quantiles, which are dear, are taken of a few cuts only.
    """
    if tp.max() == 0:
        return int(n.argmin())
    z = ndtri(confidence)
    centre, spread = tp + z * z / 2.0, z * np.sqrt(tp * (1.0 - tp / n) + z * z / 4.0)
    best = int(((centre - spread) / (n + z * z)).argmax())
    while True:
        bound = float(precision_bound(n[best], tp[best], confidence))
        rivals = (tp > 0) & (tp > bound * n) if confidence >= 0.5 else tp > 0  # there the bound is below tp / n
        rivals = np.flatnonzero(rivals)
        if len(rivals) == 0:
            return best
        tails = betainc(tp[rivals], n[rivals] - tp[rivals] + 1.0, bound)
        better = int(rivals[tails.argmin()])
        if tails.min() >= 1.0 - confidence or precision_bound(n[better], tp[better], confidence) <= bound:
            return best
        best = better
