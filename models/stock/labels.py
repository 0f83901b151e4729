"""What became of a bar: did its stock rise enough within the horizon, and could it have been bought?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.stock.bars import Bars
from models.stock.data import Label, Universe
from models.stock.rolling import Rolling

LABEL_VERSION = 1  # raise it with any change of a label

_ROUNDING = 1e-6  # of a return from float32 prices: from 10.00 to 10.40 is a rise of 4 %
_LIMIT_SLACK = 0.003  # exchanges round the limit's price to a tick
_AT_HIGH = 1 - 1e-4


@dataclass(frozen=True)
class Outcome:
    """Shape: each [N].

    `label` float32: 1 or 0, NaN where the window is not over or holds no bar. `label_end` int32: the market day
    t + last, which may lie beyond the last one. `tradable` bool: the bar could be bought and has its history
    (`Universe`).
    """

    label: np.ndarray
    label_end: np.ndarray
    tradable: np.ndarray


def outcomes(bars: Bars, label: Label, universe: Universe) -> Outcome:
    """The outcome of every bar, known or not, tradable or not."""
    label_end = (bars.day + label.last).astype(np.int32)
    entry = bars.close.astype(np.float64) if label.entry == "close" else _next_open(bars)
    rise = _best_exit(bars, label) / entry - 1
    known = np.isfinite(rise) & (label_end < len(bars.dates))
    risen = np.where(known, rise >= label.min_return - _ROUNDING, np.nan).astype(np.float32)
    enough_history = Rolling(bars.stock).age >= universe.min_history
    return Outcome(risen, label_end, enough_history & ~_limit_up(bars, universe.limit_up))


def _next_open(bars: Bars) -> np.ndarray:
    """[N] the open of the market day after; NaN where the stock has no bar on it."""
    price = np.full(len(bars), np.nan)
    follows = (bars.stock[1:] == bars.stock[:-1]) & (bars.day[1:] == bars.day[:-1] + 1)
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


def _limit_up(bars: Bars, limits: Mapping[str, float | None]) -> np.ndarray:
    """[N] bool: the bar closed at its high, at the limit of its symbol (that of the longest prefix)."""
    prefixes = sorted(limits.keys() - {"default"}, key=len, reverse=True)
    of_stock = (next((p for p in prefixes if s.startswith(p)), "default") for s in bars.stocks)
    limit = np.array([np.inf if limits[p] is None else limits[p] for p in of_stock], dtype=np.float64)
    close = bars.close.astype(np.float64)
    return (close / bars.pre_close - 1 >= limit[bars.stock] - _LIMIT_SLACK) & (close >= bars.high * _AT_HIGH)
