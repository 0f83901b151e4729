"""What became of a bar: did its stock rise enough within the horizon, and could it have been bought?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np

from models.stock.bars import Bars
from models.stock.data import Label, Limit, Universe
from models.stock.rolling import Rolling

LABEL_VERSION = 2  # raise it with any change of a label

_ROUNDING = 1e-6  # of a return from float32 prices: from 10.00 to 10.40 is a rise of 4 %
_LIMIT_SLACK = 0.003  # exchanges round the limit's price to a tick
_AT_HIGH = 1 - 1e-4


@dataclass(frozen=True)
class Outcome:
    """Shape: each [N].

    `label` float32: 1 or 0, NaN where the window is not over or holds no bar, or where there was no entry.
    `label_end` int32: the market day t + last, which may lie beyond the last one. `tradable` bool: the bar could be
    bought and has its history (`Universe`).
    """

    label: np.ndarray
    label_end: np.ndarray
    tradable: np.ndarray


def outcomes(bars: Bars, label: Label, universe: Universe) -> Outcome:
    """The outcome of every bar, known or not, tradable or not."""
    label_end = (bars.day + label.last).astype(np.int32)
    limit = _limits(bars, universe.limit_up)
    entry = bars.close.astype(np.float64) if label.entry == "close" else _next_open(bars, limit)
    rise = _best_exit(bars, label) / entry - 1
    known = np.isfinite(rise) & (label_end < len(bars.dates))
    risen = np.where(known, rise >= label.min_return - _ROUNDING, np.nan).astype(np.float32)
    enough_history = Rolling(bars.stock).age >= universe.min_history
    could_not_be_bought = _at(limit, bars, bars.close) & (bars.close >= bars.high.astype(np.float64) * _AT_HIGH)
    return Outcome(risen, label_end, enough_history & ~could_not_be_bought)


def _next_open(bars: Bars, limit: np.ndarray) -> np.ndarray:
    """[N] the open of the market day after; NaN where the stock has no bar on it, or opened at its `limit` [N]."""
    price = np.full(len(bars), np.nan)
    follows = (bars.stock[1:] == bars.stock[:-1]) & (bars.day[1:] == bars.day[:-1] + 1)
    follows &= ~_at(limit, bars, bars.open)[1:]
    price[:-1][follows] = bars.open[1:][follows]
    return price


def _best_exit(bars: Bars, label: Label) -> np.ndarray:
    """[N] the highest exit price of the stock's bars on the market days of the window; NaN where it has none."""
    price = np.asarray(bars.high if label.exit == "high" else bars.close)
    best = np.full(len(bars), np.nan)
    for bars_ahead in range(1, min(label.last, len(bars) - 1) + 1):  # the k-th bar ahead is k days away or more
        ahead = bars.day[bars_ahead:] - bars.day[:-bars_ahead]
        within = (
            (bars.stock[bars_ahead:] == bars.stock[:-bars_ahead]) & (label.first <= ahead) & (ahead <= label.last)
        )
        np.fmax(best[:-bars_ahead], price[bars_ahead:], out=best[:-bars_ahead], where=within)
    return best


def _at(limit: np.ndarray, bars: Bars, price: np.ndarray) -> np.ndarray:
    """[N] bool: the bar's price is at its limit."""
    return price.astype(np.float64) / bars.pre_close - 1 >= limit - _LIMIT_SLACK


def _limits(bars: Bars, limits: Mapping[str, Limit]) -> np.ndarray:
    """[N] the rise of each bar at which there are no sellers, infinite without one: that of the longest prefix."""
    prefixes = [*sorted(limits.keys() - {"default"}, key=len, reverse=True), "default"]
    of_stock = [next((i for i, p in enumerate(prefixes) if s.startswith(p)), -1) for s in bars.stocks]
    by_day = np.array([_by_day(limits[p], bars.dates) for p in prefixes])
    return by_day[np.array(of_stock)[bars.stock], bars.day]


def _by_day(limit: Limit, dates: np.ndarray) -> np.ndarray:
    """[T]"""
    steps = sorted(limit.items()) if isinstance(limit, Mapping) else [(date.min, limit)]
    values = np.array([np.inf, *(np.inf if step is None else step for _, step in steps)])
    return values[np.searchsorted([int(f"{day:%Y%m%d}") for day, _ in steps], dates, side="right")]
