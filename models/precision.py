"""What the rows above a threshold say of its precision, and how much they are worth where rows hang together.

Independent rows: the number of true ones is binomial, and tail and bound (Clopper-Pearson) are exact.

Rows of one user or day are no independent draws. Where the unit is not the row and units repeat among the selected
rows, n is replaced by the effective sample size of Korn and Graubard (1998): p(1 - p) / var(p), times
(t[n-1] / t[df])^2 at the level of the test, at most n, and Clopper-Pearson with real-valued counts. The original
was seen to fail with few or very unequal units (bound too high in up to 0.31 of samples for a delta of 0.10), so:

- var(p) is the jackknife's over units, larger than the linearised one where single units weigh much;
- df is one less than the effective number of units (sum w)^2 / sum w^2, of all selected rows, of the true or of the
  false ones, whichever is least: two units with all the false rows tell little of how false rows vary;
- a sample is worth at least its effective number of units (with their t), and just that where all units agree
  exactly. A single unit proves nothing: its bound is 0.

Unlike the row's binomial this is an approximation for many units. In simulations at delta 0.10 (1,000 samples a
case; 5 to 2,000 units; within-unit correlations 0.05, 0.3 and 1; precisions 0.10, 0.60 and 0.90) the bound was too
high in at most 0.11 of samples, the rows' own bound in up to 0.61. The exception: log-normal sizes (sigma 1.5, so
that a few units hold most rows) at precision 0.90: 0.17.

Source: Clopper and Pearson 1934; Korn and Graubard 1998, "Confidence intervals for proportions with small
expected number of positive counts estimated from survey data"; Parker et al. 2017 (NCHS presentation standards)
on few degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, stdtrit

from models.trainer import InputError

Floats = NDArray[np.float64]


class Tally(NamedTuple):
    """Selected and true rows of one cut; by unit [U] where units repeat among the selected rows, else None."""

    n: int
    n_true: int
    n_units: int
    by_unit: tuple[Floats, Floats] | None


@dataclass(frozen=True)
class JudgedRows:
    """The rows of one role. Shape: each [N]; `unit` codes in 0..n_units - 1, None where the unit is the row."""

    scores: NDArray[np.float32]
    labels: NDArray[np.bool_]
    unit: NDArray[np.int64] | None
    n_units: int

    @classmethod
    def of(cls, role: str, scores: np.ndarray, labels: np.ndarray, unit: np.ndarray, kind: str) -> JudgedRows:
        scores, labels, unit = np.asarray(scores), np.asarray(labels), np.asarray(unit)
        if scores.ndim != 1 or not scores.shape == labels.shape == unit.shape:
            raise InputError(
                f"{role}: expected scores, labels and units of one length, got shapes {scores.shape}, "
                f"{labels.shape} and {unit.shape}"
            )
        if scores.dtype != np.float32 or not np.isfinite(scores).all():
            found = scores.dtype if scores.dtype != np.float32 else "nan or infinity"
            raise InputError(f"{role}: expected raw scores, finite float32 logits, got {found}")
        odd = (labels != 0) & (labels != 1)
        if odd.any():
            raise InputError(
                f"{role}: expected labels 0 or 1, got {labels[odd][0]}; leave out rows without a label"
            )
        if kind == "row":
            return cls(scores, labels == 1, None, len(scores))
        units, codes = np.unique(unit, return_inverse=True)
        return cls(scores, labels == 1, codes, len(units))

    def tallies(self, thresholds: NDArray[np.float32]) -> Iterator[Tally]:
        """One tally for each of `thresholds`, which fall; what a looser cut adds is all that is counted again."""
        if len(thresholds) == 0:
            return
        chosen = np.flatnonzero(self.scores >= thresholds[-1])
        chosen = chosen[np.argsort(-self.scores[chosen], kind="stable")]
        ends = np.searchsorted(-self.scores[chosen], -thresholds, side="right").tolist()
        labels = self.labels[chosen]
        n_true = np.concatenate([[0], np.cumsum(labels)])
        if self.unit is None:
            yield from (Tally(end, int(n_true[end]), end, None) for end in ends)
            return
        unit, before = self.unit[chosen], 0
        selected, true = np.zeros(self.n_units), np.zeros(self.n_units)
        for end in ends:
            selected += np.bincount(unit[before:end], minlength=self.n_units)
            true += np.bincount(unit[before:end], labels[before:end], minlength=self.n_units)
            before, seen = end, selected > 0
            n_units = int(seen.sum())
            by_unit = None if n_units == end else (selected[seen], true[seen])
            yield Tally(end, int(n_true[end]), n_units, by_unit)


@dataclass(frozen=True)
class Evidence:
    """What one cut's rows say of its precision, at one level. `share` is the precision observed, 0 without rows."""

    n: int
    n_true: int
    n_units: int
    n_effective: float
    share: float
    delta: float

    @classmethod
    def of(cls, tally: Tally, delta: float) -> Evidence:
        n_effective = float(tally.n) if tally.by_unit is None else _effective(*tally.by_unit, delta)
        share = tally.n_true / tally.n if tally.n else 0.0
        return cls(tally.n, tally.n_true, tally.n_units, n_effective, share, delta)

    @property
    def _counts(self) -> tuple[float, float]:
        """True and false rows that the sample is worth; whole numbers where it is worth all its rows."""
        if self.n_effective == self.n:
            return float(self.n_true), float(self.n - self.n_true)
        return self.share * self.n_effective, (1.0 - self.share) * self.n_effective

    @property
    def bound(self) -> float:
        """Lower Clopper-Pearson bound of the precision at 1 - delta; 0 without evidence."""
        true, false = self._counts
        return float(betaincinv(true, false + 1.0, self.delta)) if true > 0.0 else 0.0

    @property
    def upper_bound(self) -> float:
        """Upper Clopper-Pearson bound of the precision at 1 - delta; 1 without evidence."""
        true, false = self._counts
        return 1.0 - float(betaincinv(false, true + 1.0, self.delta)) if false > 0.0 else 1.0

    def p_value(self, target: float) -> float:
        """Probability of at least as many true rows if the precision were the target; at most delta iff the bound
        reaches it."""
        true, false = self._counts
        return float(betainc(true, false + 1.0, target)) if true > 0.0 else 1.0


def _effective(selected: Floats, true: Floats, delta: float) -> float:
    """Independent rows that these rows of units are worth. Shape: [U] rows by unit, each at least 1."""
    n, n_true = selected.sum(), true.sum()
    precision = n_true / n
    units = _evenness(selected)
    if len(selected) == 1:
        return 0.0
    # what leaving a unit out moves the precision by; of whole numbers, so that units that agree give 0
    residuals = (true * n - n_true * selected) / (n * (n - selected))
    variance = float((residuals**2).sum() * (len(selected) - 1) / len(selected))
    if variance <= 0.0:
        return min(units, n)
    freedom = min(units, _evenness(true), _evenness(selected - true)) - 1.0
    by_variance = precision * (1.0 - precision) / variance * _fewer(n - 1.0, freedom, delta)
    return float(min(max(by_variance, units * _fewer(n - 1.0, units - 1.0, delta)), n))


def _evenness(weights: Floats) -> float:
    """Kish's effective number of units: how many of equal weight would be as uneven as these; 0 of nothing."""
    total = weights.sum()
    return float(total**2 / (weights**2).sum()) if total > 0.0 else 0.0


def _fewer(rows: float, freedom: float, delta: float) -> float:
    """(t[rows] / t[freedom])^2 at level delta: what a variance of few degrees of freedom costs; 0 of none."""
    if freedom < 0.05:  # the quantile is beyond all measure
        return 0.0
    level = 1.0 - min(delta, 0.4)  # near the median there is no quantile to compare
    return float((stdtrit(rows, level) / stdtrit(freedom, level)) ** 2)
