"""Daily bars of stocks, read from files and checked: prices, the market, industries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bars:
    """N daily bars of S stocks over T market days, sorted by (stock, day), one a stock and day.

    A market day is one on which any stock has a bar; a suspended day of a stock is one without its bar. Prices are
    finite, above 0 and adjusted (see `BarColumns.adjusted_close`).

    Shape:
        stocks: S names, sorted. dates: [T] int32 as 20180102, ascending.
        stock, day: [N] int32, indexes into `stocks` and `dates`.
        open, high, low, close, volume: [N] float32.
        pre_close: [N] float32, the close that the day's change refers to: of the file, else of the stock's bar
            before; NaN at a first bar without.
        amount: [N] float32, NaN where the files have none.
        industry: [S] int32, an index into `industries`, -1 where unknown.
        listed: [S] int32, the date of listing as 20180102, 0 where unknown.
        market_close: [T] float64, of the index; NaN where it has no value. None without an index.
    `facts` are counts for people: bars and files read, what was dropped and why.
    """

    stocks: tuple[str, ...]
    dates: np.ndarray
    stock: np.ndarray
    day: np.ndarray
    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    pre_close: np.ndarray
    volume: np.ndarray
    amount: np.ndarray
    industry: np.ndarray
    industries: tuple[str, ...]
    listed: np.ndarray
    market_close: np.ndarray | None
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.stock)
