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
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv, stdtrit

from models.trainer import InputError

Floats = NDArray[np.float64]


class Tally(NamedTuple):
    """Selected and true rows of one cut; by unit [U] where units repeat among the selected rows, else None."""

    n: int
    n_true: int
    n_units: int
    by_unit: tuple[Floats, Floats] | None

    @classmethod
    def of(cls, labels: np.ndarray, unit: np.ndarray) -> Tally:
        """Of rows that are all selected. Shape: both [N], any units."""
        codes = np.unique(unit, return_inverse=True)[1]
        return cls.of_units(np.bincount(codes), np.bincount(codes, labels))

    @classmethod
    def of_units(cls, selected: np.ndarray, true: np.ndarray) -> Tally:
        """Of what each unit has selected, and true among it; one without any does not count. Shape: both [U]."""
        seen = selected > 0
        n, n_units = int(selected.sum()), int(seen.sum())
        by_unit = None if n_units == n else (selected[seen].astype(np.float64), true[seen].astype(np.float64))
        return cls(n, int(true.sum()), n_units, by_unit)


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
        if self.unit is None:
            n_true = np.concatenate([[0], np.cumsum(labels)])
            yield from (Tally(end, int(n_true[end]), end, None) for end in ends)
            return
        unit, before = self.unit[chosen], 0
        selected, true = np.zeros(self.n_units), np.zeros(self.n_units)
        for end in ends:
            selected += np.bincount(unit[before:end], minlength=self.n_units)
            true += np.bincount(unit[before:end], labels[before:end], minlength=self.n_units)
            before = end
            yield Tally.of_units(selected, true)


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
        n_effective = float(tally.n) if tally.by_unit is None else float(effective(*tally.by_unit, delta))
        share = tally.n_true / tally.n if tally.n else 0.0
        return cls(tally.n, tally.n_true, tally.n_units, n_effective, share, delta)

    @property
    def _counts(self) -> tuple[Floats, Floats]:
        return worth(self.n, self.n_true, self.n_effective)

    @property
    def bound(self) -> float:
        """Lower Clopper-Pearson bound of the precision at 1 - delta; 0 without evidence."""
        return float(lower_bound(*self._counts, self.delta))

    @property
    def upper_bound(self) -> float:
        """Upper Clopper-Pearson bound of the precision at 1 - delta; 1 without evidence."""
        true, false = self._counts
        return 1.0 - float(lower_bound(false, true, self.delta))

    def p_value(self, target: float) -> float:
        """Probability of at least as many true rows if the precision were the target; at most delta iff the bound
        reaches it."""
        return float(tail(*self._counts, target))


def lower_bound(true: ArrayLike, false: ArrayLike, delta: float) -> Floats:
    """Lower Clopper-Pearson bound (one-sided, at 1 - delta) of a precision, by element; 0 without true rows.

    The precision at which `true` or more among `true + false` rows have the probability delta. The counts may be
    real-valued: at one share, a delta of at most 0.5 and more rows it is never lower.
    """
    true, false = np.asarray(true, np.float64), np.asarray(false, np.float64)
    some = true > 0.0
    return np.where(some, betaincinv(np.where(some, true, 1.0), false + 1.0, delta), 0.0)


def tail(true: ArrayLike, false: ArrayLike, precision: float) -> Floats:
    """Probability of `true` or more among `true + false` rows of a precision, element by element; 1 for none."""
    true, false = np.asarray(true, np.float64), np.asarray(false, np.float64)
    some = true > 0.0
    return np.where(some, betainc(np.where(some, true, 1.0), false + 1.0, precision), 1.0)


def worth(n: ArrayLike, n_true: ArrayLike, n_effective: ArrayLike) -> tuple[Floats, Floats]:
    """True and false rows that samples are worth; whole numbers where one is worth all its rows."""
    n, n_true, n_effective = (np.asarray(count, np.float64) for count in (n, n_true, n_effective))
    share = np.divide(n_true, n, out=np.zeros(np.broadcast(n, n_true).shape), where=n > 0.0)
    whole = n_effective == n
    true = np.where(whole, n_true, share * n_effective)
    return true, np.where(whole, n - n_true, (1.0 - share) * n_effective)


def effective(selected: Floats, true: Floats, delta: float) -> Floats:
    """Independent rows that these rows of units are worth; all of them where no unit repeats.

    Shape: [..., U] rows by unit and the true ones of them, at least one row together; a unit without rows does not
    count. Returns [...].
    """
    n, n_true = selected.sum(-1), true.sum(-1)
    n_units, units = (selected > 0.0).sum(-1), _evenness(selected)
    # what leaving a unit out moves the precision by; of whole numbers, so that units that agree give 0
    moved = true * n[..., None] - n_true[..., None] * selected
    left = n[..., None] * (n[..., None] - selected)
    residuals = np.divide(moved, left, out=np.zeros(moved.shape), where=left > 0.0)
    variance = (residuals**2).sum(-1) * (n_units - 1) / n_units
    vary = variance > 0.0
    freedom = np.minimum(np.minimum(units, _evenness(true)), _evenness(selected - true)) - 1.0
    precision = n_true / n
    by_variance = np.divide(precision * (1.0 - precision), variance, out=np.zeros(n.shape), where=vary)
    by_units = units * np.where(vary, _fewer(n - 1.0, units - 1.0, delta), 1.0)
    found = np.minimum(np.maximum(by_variance * _fewer(n - 1.0, freedom, delta), by_units), n)
    return np.where(n_units == n, n, np.where(n_units == 1, 0.0, found))


def _evenness(weights: Floats) -> Floats:
    """Kish's effective number of units: how many of equal weight would be as uneven as these; 0 of nothing.

    Shape: [..., U] -> [...].
    """
    total = weights.sum(-1)
    return np.divide(total**2, (weights**2).sum(-1), out=np.zeros(total.shape), where=total > 0.0)


def _fewer(rows: Floats, freedom: Floats, delta: float) -> Floats:
    """(t[rows] / t[freedom])^2 at level delta: what a variance of few degrees of freedom costs; 0 of none."""
    some = freedom >= 0.05  # below, the quantile is beyond all measure
    level = 1.0 - min(delta, 0.4)  # near the median there is no quantile to compare
    rows, freedom = np.where(some, rows, 1.0), np.where(some, freedom, 1.0)
    return np.where(some, (stdtrit(rows, level) / stdtrit(freedom, level)) ** 2, 0.0)
