"""All cuts of one ranking whose rows hang together by unit: what each is worth, and a ceiling of its bound.

`models.precision` says what the rows above one cut are worth from the counts of every unit, which is dear to ask of
all cuts. So there is a ceiling for each, from sums that grow row by row. The jackknife's variance

    (U - 1) / U * sum(((t_u n - t s_u) / (n (n - s_u)))^2)

(s_u rows and t_u true ones of unit u; n and t in all) is least with n for n - s_u, where the sums of s^2, s t and
t^2 suffice, and the quantiles of Student's t only take away. At one share more effective rows never lower the
bound, for a delta of at most 0.5. Hence the bound at that ceiling is never below the unit-wise one, and only the
cuts whose ceiling matters need be asked what they are worth exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from torch import Tensor

from models.metrics import Ranking
from models.precision import Floats, effective, lower_bound, worth

Ints = NDArray[np.int64]

_CELLS = 2**18  # counts of units held at a time
_SHARE_STEP, _ROWS_STEP = 0.001, 0.01  # shares and rows are rounded up on a grid of their logarithms
_ROUNDING = 1e-14  # of sums whose terms cancel, as a share of the terms
_SLACK = 1.0 + 1e-9  # more than rounding adds to a bound or a count
_LEAST_FREEDOM, _MANY = 0.05, 1e8  # degrees of freedom between which quantiles of Student's t are looked up


@dataclass(frozen=True)
class UnitCuts:
    """The cuts of one ranking, one per distinct score, from the highest score down.

    Shape: [C] `scores` float32, `n` rows selected, `n_true` true ones among them, `n_units` their units; [N] by
    descending score `unit`, numbered as they turn up, `true`.
    """

    scores: NDArray[np.float32]
    n: Ints
    n_true: Ints
    n_units: Ints
    unit: Ints
    true: NDArray[np.bool_]

    @classmethod
    def of(cls, ranking: Ranking, unit: Tensor | np.ndarray, n_rows: int | None = None) -> UnitCuts:
        """Take in the units [N] of the rows in the order of the ranking's logits, which must hold no NaN.

        Codes (`unit_codes`) are taken as they are; ids of another kind are coded first. With `n_rows` (at least 1)
        the first cuts alone: those that select no more rows, and the one after them where rows are tied.
        """
        if tuple(unit.shape) != (ranking.truth.n_rows,):
            raise ValueError(
                f"{ranking.truth.name}: expected units [{ranking.truth.n_rows}], got {list(unit.shape)}"
            )
        scores, codes, true = _descending(ranking, unit, n_rows)
        first = _first_of_unit(codes)
        number = np.empty(int(codes.max()) + 1, np.int64)
        number[codes[first]] = np.arange(np.count_nonzero(first))
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of each tie group
        n_true, n_units = np.cumsum(true)[last], np.cumsum(first)[last]
        return cls(scores[last], last + 1, n_true, n_units, number[codes], true)

    @cached_property
    def _squares(self) -> tuple[Ints, Ints, Ints]:
        """Sums over units of s^2, s t and t^2. Shape: each [C]."""
        order, true = _grouped(self.unit), self.true
        starts = np.flatnonzero(np.diff(self.unit[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        before = np.cumsum(true[order]) - true[order]
        s, t = np.empty((2, len(order)), np.int64)  # rows of the same unit above, true ones
        s[order] = np.arange(len(order)) - np.repeat(starts, sizes)
        t[order] = before - np.repeat(before[starts], sizes)
        added = 2 * s + 1, t + true * (s + 1), true * (2 * t + 1)  # by a row
        ss, st, tt = (np.cumsum(values)[self.n - 1] for values in added)
        return ss, st, tt

    def most_effective(self, delta: float) -> Floats:
        """What the rows of each cut are worth at most at a level (`models.precision.effective`). Shape: [C]."""
        ss, st, tt = self._squares
        rows, n_false, share = self.n.astype(np.float64), self.n - self.n_true, self.n_true / self.n
        terms = tt + share**2 * ss, 2.0 * share * st
        least = np.maximum(terms[0] - terms[1] - _ROUNDING * (terms[0] + terms[1]), 0.0) / rows**2
        least *= (self.n_units - 1) / self.n_units
        # rows that all agree are worth their units; elsewhere a variance of 0 leaves no ceiling but the rows
        mixed = (self.n_true > 0) & (n_false > 0)
        unknown = np.where(mixed, rows, 0.0)
        units = rows**2 / ss
        uneven = np.maximum(
            tt / np.maximum(self.n_true, 1.0) ** 2, (ss - 2 * st + tt) / np.maximum(n_false, 1.0) ** 2
        )
        freedom = 1.0 / np.maximum(uneven, 1.0 / units) - 1.0  # of mixed rows
        by_variance = share * (1.0 - share) * _most_left(rows - 1.0, freedom, delta)
        by_variance = np.divide(by_variance, least, out=unknown, where=mixed & (least > 0.0))
        most = np.minimum(np.maximum(by_variance, units) * _SLACK, rows)
        return np.where(self.n_units == self.n, rows, np.where(self.n_units == 1, 0.0, most))

    def ceilings(self, most: Floats, delta: float) -> Floats:
        """Bounds of the precision at 1 - delta that are at least the unit-wise ones, from `most_effective`. Shape:
        [C]. 1 where a delta above 0.5 leaves no order to rely on."""
        if delta > 0.5:
            return np.ones(len(self.n))
        some = (most > 0.0) & (self.n_true > 0)
        share = np.ceil(np.log(self.n_true[some] / self.n[some]) / _SHARE_STEP)
        rows = np.ceil(np.log(most[some]) / _ROWS_STEP)
        # neighbouring cuts mostly share their point of the grid
        first = np.flatnonzero(np.append(True, (share[1:] != share[:-1]) | (rows[1:] != rows[:-1]))[: len(share)])
        lengths = np.diff(first, append=len(share))
        share, rows = np.exp(_SHARE_STEP * share[first]), np.exp(_ROWS_STEP * rows[first]) * _SLACK
        found = np.zeros(len(self.n))
        found[some] = np.repeat(lower_bound(share * rows, (1.0 - share) * rows, delta) * _SLACK, lengths)
        return found

    def worth(self, cuts: Ints, delta: float) -> tuple[Floats, Floats]:
        """True and false rows that cuts (by number) are worth at a level, as for `Evidence`. Shape: both [K]."""
        order = np.argsort(-cuts)
        found, n_done = np.empty(len(cuts)), 0
        while n_done < len(cuts):
            n_units = int(self.n_units[cuts[order[n_done]]])  # the most of those that are left
            some = order[n_done : n_done + max(1, _CELLS // n_units)][::-1]
            found[some] = effective(*self._by_unit(cuts[some]), delta)
            n_done += len(some)
        return worth(self.n[cuts], self.n_true[cuts], found)

    def _by_unit(self, cuts: Ints) -> tuple[Floats, Floats]:
        """Rows and true rows by unit at each of `cuts`, which rise. Shape: both [K, units of the last]."""
        shape, ends = (len(cuts), int(self.n_units[cuts[-1]])), self.n[cuts]
        place = np.repeat(np.arange(len(cuts)) * shape[1], np.diff(ends, prepend=0)) + self.unit[: ends[-1]]
        added = (np.bincount(at, minlength=shape[0] * shape[1]) for at in (place, place[self.true[: ends[-1]]]))
        selected, true = (np.cumsum(counts.reshape(shape), axis=0, dtype=np.float64) for counts in added)
        return selected, true


def unit_codes(unit: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Ids of units [N] as codes from 0, int32: what is the same for all epochs is found out once."""
    return torch.from_numpy(np.unique(unit, return_inverse=True)[1].astype(np.int32)).to(device)


def _descending(
    ranking: Ranking, unit: Tensor | np.ndarray, n_rows: int | None
) -> tuple[NDArray[np.float32], Ints, NDArray[np.bool_]]:
    """Scores, codes of units and truth by descending score; of equal scores by code. All rows, or the first ones.

    Sorted as whole numbers that hold all three, which takes a tenth of the time of a permutation.
    """
    if not isinstance(unit, Tensor):
        unit = torch.from_numpy(unit.astype(np.int64)) if unit.dtype.kind in "iu" else unit_codes(unit)
    if unit.is_floating_point() or not bool(((unit >= 0) & (unit < 2 * len(unit))).all()):
        unit = unit_codes(unit.cpu().numpy())
    logits, positive, unit = ranking.logits, ranking.truth.signs < 0, unit.to(ranking.logits.device)
    if n_rows is not None and n_rows < len(logits):
        first = (logits >= ranking.ascending[-n_rows]).nonzero().flatten()
        logits, positive, unit = logits[first], positive[first], unit[first]
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: no negative zero
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # in the order of the floats
    keys = (-rising << 32) | (unit.long() << 1) | positive
    keys = np.sort(keys.cpu().numpy())
    rising = (-(keys >> 32)).astype(np.int32)
    scores = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    return scores, (keys & 0xFFFFFFFF) >> 1, (keys & 1) == 1


def _first_of_unit(codes: Ints) -> NDArray[np.bool_]:
    """Which rows are the first with their code. Shape: [N]."""
    order = _grouped(codes)
    first = np.zeros(len(codes), bool)
    first[order[np.flatnonzero(np.diff(codes[order], prepend=-1))]] = True
    return first


def _grouped(codes: Ints) -> Ints:
    """Positions by code, of equal codes in their order."""
    return np.sort(codes << 32 | np.arange(len(codes))) & 0xFFFFFFFF


def _most_left(rows: Floats, freedom: Floats, delta: float) -> Floats:
    """A ceiling of (t[rows] / t[freedom])^2 at level delta, as `models.precision` has it, by element."""
    quantiles = _quantiles(min(delta, 0.4))

    def places(values: Floats) -> Floats:
        return np.log(np.maximum(values, _LEAST_FREEDOM) / _LEAST_FREEDOM) / _ROWS_STEP

    above = quantiles[np.minimum(np.floor(places(rows)), len(quantiles) - 2).astype(np.int64)]
    below = quantiles[np.minimum(np.ceil(places(freedom)), len(quantiles) - 1).astype(np.int64)]
    return np.minimum((above / below) ** 2, 1.0)


@lru_cache(maxsize=8)
def _quantiles(delta: float) -> Floats:
    """Of Student's t at 1 - delta, which fall; the last stands for all that is beyond."""
    places = np.arange(int(np.log(_MANY / _LEAST_FREEDOM) / _ROWS_STEP))
    return np.append(stdtrit(_LEAST_FREEDOM * np.exp(places * _ROWS_STEP), 1.0 - delta), ndtri(1.0 - delta))
