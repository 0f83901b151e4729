"""Statistics over the stocks of a day.

A column is [N] float64; a NaN is a stock whose value is not known, and does not count. Sums run over the rows in
their order, so a stock without a bar on a day has no part in that day, not even in the rounding.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; NaN where the denominator is 0."""
    out = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


class CrossSection:
    """Statistics over bars of `stock` [N] on `day` [N] of n_days, one bar a stock and day."""

    def __init__(self, stock: np.ndarray, day: np.ndarray, n_stocks: int, n_days: int):
        self._stock, self._day, self._shape = stock, day, (n_days, n_stocks)

    def mean(self, x: np.ndarray) -> np.ndarray:
        """[T]; NaN on a day without a known value."""
        count, total = self._sums(x, self._day, self._shape[0])
        return ratio(total, count)

    def others_mean(self, x: np.ndarray, group: np.ndarray) -> np.ndarray:
        """[N]: the mean over the other stocks of the bar's group ([S], -1: none) that day; NaN without one."""
        groups = group[self._stock]
        n_groups = int(group.max(initial=-1)) + 1
        cell = self._day.astype(np.int64) * n_groups + groups
        grouped = np.where(groups >= 0, x, np.nan)
        count, total = self._sums(grouped, cell, self._shape[0] * n_groups)
        own = np.isfinite(grouped)
        known = groups >= 0
        result = np.full(len(x), np.nan)
        others = count[cell[known]] - own[known]
        result[known] = ratio(total[cell[known]] - np.where(own, x, 0)[known], others)
        return result

    def rank(self, x: np.ndarray) -> np.ndarray:
        """[N]: the bar's place among those of its day, 0 (lowest) to 1; equals share the mean of their places; NaN
        where it has no other to be compared with."""
        panel = np.full(self._shape, np.inf, dtype=np.float32)  # what is not known stands behind all others
        known = np.isfinite(x)
        panel[self._day[known], self._stock[known]] = x[known]
        count = np.bincount(self._day[known], minlength=self._shape[0])
        place = rankdata(panel, axis=1)[self._day, self._stock] - 1
        others = np.where(known, count[self._day] - 1, 0)
        return ratio(place, others)

    def _sums(self, x: np.ndarray, cell: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(x)
        count = np.bincount(cell[known], minlength=n_cells)
        return count, np.bincount(cell[known], weights=x[known], minlength=n_cells)
