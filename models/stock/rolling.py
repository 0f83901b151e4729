"""Windows over each stock's own bars, whole columns at a time.

A column is [N] float64, sorted by (stock, day). The window of w is a bar and the w - 1 bars of its stock before;
where there are fewer, or one value is NaN, the result is NaN. A window's result is a function of its values alone,
to the bit: nothing is added to a running sum and taken out again, so neither what lies outside nor how long the
history is can show in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from models.stock.crosssection import ratio

Combine = Callable[..., np.ndarray]  # an associative ufunc


class Rolling:
    """Windows over bars whose stocks are `stock` [N], equal numbers adjacent."""

    def __init__(self, stock: np.ndarray):
        n_bars = len(stock)
        first = np.flatnonzero(np.diff(stock, prepend=-1))
        self._first, self._n_bars = first, np.diff(first, append=n_bars)
        self.age = np.arange(n_bars) - np.repeat(first, self._n_bars)  # bars of the stock before

    def before(self, x: np.ndarray, bars: int) -> np.ndarray:
        """The value so many bars before."""
        return self._masked(np.concatenate([np.full(min(bars, len(x)), np.nan), x[:-bars]]), bars + 1)

    def sum(self, x: np.ndarray, window: int) -> np.ndarray:
        return self._combined(np.add, x, window)

    def mean(self, x: np.ndarray, window: int) -> np.ndarray:
        return self.sum(x, window) / window

    def max(self, x: np.ndarray, window: int) -> np.ndarray:
        return self._combined(np.maximum, x, window)

    def min(self, x: np.ndarray, window: int) -> np.ndarray:
        return self._combined(np.minimum, x, window)

    def std(self, x: np.ndarray, window: int) -> np.ndarray:
        """With window - 1 in the denominator."""
        return np.sqrt(self.products(x, x, window) / (window - 1))

    def products(self, x: np.ndarray, y: np.ndarray, window: int) -> np.ndarray:
        """The window's sum of (x - mean of x) (y - mean of y)."""
        total = np.zeros(len(x))
        if x is y:
            for lag, deviation in self._deviations(x, window):
                total[lag:] += np.square(deviation, out=deviation)
        else:
            for (lag, deviation), (_, other) in zip(
                self._deviations(x, window), self._deviations(y, window), strict=True
            ):
                total[lag:] += np.multiply(deviation, other, out=deviation)
        return self._masked(total, window)

    def correlation(self, x: np.ndarray, y: np.ndarray, window: int) -> np.ndarray:
        """Pearson's; NaN where one of them does not change."""
        x_squares, y_squares = self.products(x, x, window), self.products(y, y, window)
        return ratio(self.products(x, y, window), np.sqrt(x_squares) * np.sqrt(y_squares))

    def rsi(self, close: np.ndarray, period: int) -> np.ndarray:
        """Wilder's relative strength index of a stock's closes, 0 to 100; the one recursion, from its first bar on.

        The first value, after `period` changes, takes their means; each later one smooths by 1 / period. 0 where
        the close never changed.

        Source: J. W. Wilder, New Concepts in Technical Trading Systems, 1978; as TA-Lib computes it.
        """
        result = np.full(len(close), np.nan)
        order = np.argsort(-self._n_bars, kind="stable")  # so that the stocks that still have bars come first
        first, n_bars = self._first[order], self._n_bars[order]
        up, down = np.zeros((2, len(first)))
        for age in range(1, n_bars[0] if len(first) else 0):
            row = first[: np.searchsorted(-n_bars, -age)] + age
            change = close[row] - close[row - 1]
            up, down = up[: len(row)], down[: len(row)]
            for strength, moved in ((up, change), (down, -change)):
                if age > period:
                    strength *= period - 1
                strength += np.maximum(moved, 0)
                if age >= period:
                    strength /= period
            if age >= period:
                moves = up + down
                result[row] = 100 * np.divide(up, moves, out=np.zeros_like(up), where=moves > 0)
        return result

    def _combined(self, combine: Combine, x: np.ndarray, window: int) -> np.ndarray:
        """Puts the window together from spans of 1, 2, 4, ... bars: 2 log2(window) operations."""
        spans, covered, span, result = x, 0, 1, None
        while True:
            if window & span:
                result = spans if result is None else _lagged(combine, result, spans, covered)
                covered += span
            if 2 * span > window:
                return self._masked(result.copy() if result is x else result, window)
            spans = _lagged(combine, spans, spans, span)
            span *= 2

    def _deviations(self, x: np.ndarray, window: int) -> Iterator[tuple[int, np.ndarray]]:
        """Per lag, the value so many bars before less the mean of the window, from row `lag` on."""
        mean = self.mean(x, window)
        for lag in range(min(window, len(x))):
            yield lag, x[: len(x) - lag] - mean[lag:]

    def _masked(self, x: np.ndarray, window: int) -> np.ndarray:
        x[self.age < window - 1] = np.nan
        return x


def _lagged(combine: Combine, x: np.ndarray, y: np.ndarray, lag: int) -> np.ndarray:
    """x combined with the values of y so many rows before; what precedes the first of them stays."""
    result = x.copy()
    combine(x[lag:], y[: max(len(y) - lag, 0)], out=result[lag:])
    return result
