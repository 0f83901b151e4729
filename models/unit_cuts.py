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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Ranking
from models.precision import Floats, effective, lower_bound, worth

Ints = NDArray[np.int64]

_CELLS = 2**18  # counts of units held at a time
_SHARE_STEP, _ROWS_STEP = 0.001, 0.01  # shares and rows are rounded up on a grid of their logarithms
_ROUNDING = 1e-14  # of sums whose terms cancel, as a share of the terms
_SLACK = 1.0 + 1e-9  # more than rounding adds to a bound or a count


@dataclass(frozen=True)
class UnitCuts:
    """The cuts of one ranking, one per distinct score, from the highest score down.

    Shape: [C] `scores` float32, `n` rows selected, `n_true` true ones among them, `n_units` their units and
    `most_effective`, what they are worth at most; [N] by descending score `unit`, numbered as they turn up, `true`.
    """

    scores: NDArray[np.float32]
    n: Ints
    n_true: Ints
    n_units: Ints
    most_effective: Floats
    unit: Ints
    true: NDArray[np.bool_]

    @classmethod
    def of(cls, ranking: Ranking, unit: Tensor | np.ndarray) -> UnitCuts:
        """Take in the units [N] of the rows in the order of the ranking's logits, which must hold no NaN.

        Codes (`unit_codes`) are taken as they are; ids of another kind are coded first.
        """
        if tuple(unit.shape) != (ranking.truth.n_rows,):
            raise ValueError(
                f"{ranking.truth.name}: expected units [{ranking.truth.n_rows}], got {list(unit.shape)}"
            )
        scores, codes, true = _descending(ranking, unit)
        n_rows, order = len(codes), _grouped(codes)
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        sizes = np.diff(starts, append=n_rows)
        before = np.cumsum(true[order]) - true[order]
        s, t = np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)  # rows of the same unit above, true ones
        s[order] = np.arange(n_rows) - np.repeat(starts, sizes)
        t[order] = before - np.repeat(before[starts], sizes)
        number = np.empty(int(codes.max()) + 1, np.int64)
        number[codes[s == 0]] = np.arange(len(starts))

        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of each tie group
        n, n_true, n_units = last + 1, np.cumsum(true)[last], np.cumsum(s == 0)[last]
        # what a row adds to the sums of s^2, s t and t^2
        added = 2 * s + 1, t + true * (s + 1), true * (2 * t + 1)
        most = _most_effective(n, n_true, n_units, *(np.cumsum(values)[last] for values in added))
        return cls(scores[last], n, n_true, n_units, most, number[codes], true)

    def ceilings(self, delta: float) -> Floats:
        """Bounds of the precision at 1 - delta that are at least the unit-wise ones. Shape: [C].

        1 where a delta above 0.5 leaves no order to rely on.
        """
        if delta > 0.5:
            return np.ones(len(self.n))
        some = (self.most_effective > 0.0) & (self.n_true > 0)
        share = np.ceil(np.log(self.n_true[some] / self.n[some]) / _SHARE_STEP)
        rows = np.ceil(np.log(self.most_effective[some]) / _ROWS_STEP)
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


def _descending(ranking: Ranking, unit: Tensor | np.ndarray) -> tuple[NDArray[np.float32], Ints, NDArray[np.bool_]]:
    """Scores, codes of units and truth of all rows by descending score; of equal scores by code.

    Sorted as whole numbers that hold all three, which takes a tenth of the time of a permutation.
    """
    if not isinstance(unit, Tensor):
        unit = torch.from_numpy(unit.astype(np.int64)) if unit.dtype.kind in "iu" else unit_codes(unit)
    if unit.is_floating_point() or not bool(((unit >= 0) & (unit < 2 * len(unit))).all()):
        unit = unit_codes(unit.cpu().numpy())
    bits = (ranking.logits + 0.0).view(torch.int32)  # + 0.0: no negative zero
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # in the order of the floats
    keys = (-rising << 32) | (unit.to(rising.device).long() << 1) | (ranking.truth.signs < 0)
    keys = np.sort(keys.cpu().numpy())
    rising = (-(keys >> 32)).astype(np.int32)
    scores = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    return scores, (keys & 0xFFFFFFFF) >> 1, (keys & 1) == 1


def _grouped(codes: Ints) -> Ints:
    """Positions by code, of equal codes in their order."""
    return np.sort(codes << 32 | np.arange(len(codes))) & 0xFFFFFFFF


def _most_effective(n: Ints, n_true: Ints, n_units: Ints, ss: Ints, st: Ints, tt: Ints) -> Floats:
    """Ceiling of `effective` at each cut, from the sums over units of s^2, s t and t^2. Shape: each [C]."""
    share, rows = n_true / n, n.astype(np.float64)
    terms = tt + share**2 * ss, 2.0 * share * st
    least = np.maximum(terms[0] - terms[1] - _ROUNDING * (terms[0] + terms[1]), 0.0) / rows**2
    least *= (n_units - 1) / n_units
    # rows that all agree are worth their units; elsewhere a variance of 0 leaves no ceiling but the rows
    mixed = (n_true > 0) & (n_true < n)
    unknown = np.where(mixed, rows, 0.0)
    by_variance = np.divide(share * (1.0 - share), least, out=unknown, where=mixed & (least > 0.0))
    most = np.minimum(np.maximum(by_variance, rows**2 / ss) * _SLACK, rows)
    return np.where(n_units == n, rows, np.where(n_units == 1, 0.0, most))
