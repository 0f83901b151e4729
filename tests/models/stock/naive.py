"""Labels and features a second time, bar by bar in plain Python: slow, and written apart from the fast ones."""

from __future__ import annotations

import math
import statistics
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np

from models.stock.bars import Bars
from models.stock.data import Label, Universe

NAN = math.nan


def naive_outcomes(bars: Bars, label: Label, universe: Universe) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"label": [], "label_end": [], "tradable": []}
    by_day = {(s, d): i for i, (s, d) in enumerate(zip(bars.stock.tolist(), bars.day.tolist(), strict=True))}
    for i, (s, d) in enumerate(by_day):
        end = d + label.last
        prices = getattr(bars, label.exit)
        exits = [float(prices[by_day[s, e]]) for e in range(d + label.first, end + 1) if (s, e) in by_day]
        entry = float(bars.close[i])
        if label.entry == "next_open":
            after = by_day.get((s, d + 1))
            entry = NAN if after is None or _rises(bars, after, bars.open, universe) else float(bars.open[after])
        unknown = end >= len(bars.dates) or not exits or math.isnan(entry)
        found["label"].append(NAN if unknown else float(max(exits) / entry >= 1 + label.min_return - 1e-6))
        found["label_end"].append(end)
        earlier = sum(other == s and e < d for other, e in by_day)
        at_limit = _rises(bars, i, bars.close, universe) and bars.close[i] >= bars.high[i] * 0.9999
        found["tradable"].append(earlier >= universe.min_history and not at_limit)
    return found


def _rises(bars: Bars, i: int, price: np.ndarray, universe: Universe) -> bool:
    """To the limit."""
    symbol = bars.stocks[bars.stock[i]]
    fitting = [p for p in universe.limit_up if p != "default" and symbol.startswith(p)]
    limit = universe.limit_up.get(max(fitting, key=len) if fitting else "default")
    if isinstance(limit, dict):
        today = date.fromisoformat(str(bars.dates[bars.day[i]]))
        limit = ([None] + [limit[first] for first in sorted(limit) if first <= today])[-1]
    if limit is None or math.isnan(bars.pre_close[i]):
        return False
    return float(price[i]) / float(bars.pre_close[i]) - 1 >= limit - 0.003


def naive_features(bars: Bars) -> dict[str, list[float]]:
    """Every feature of every bar; a bar's history is the list of its stock's rows up to and including it."""
    market = _Market(bars)
    rows = [_Bar(bars, i) for i in range(len(bars))]
    found = {name: [formula(row) for row in rows] for name, formula in _OF_BAR.items()}
    for name, formula in _OF_MARKET.items():
        by_day = [formula(market, day) for day in range(len(bars.dates))]
        found[name] = [by_day[day] for day in bars.day]
    days: dict[int, list[int]] = {}
    for i, day in enumerate(bars.day.tolist()):
        days.setdefault(day, []).append(i)
    for name, (source, statistic) in _OF_DAY.items():
        values = [source(row) for row in rows]
        found[name] = [statistic(i, values, days[bars.day[i]], bars) for i in range(len(bars))]
    return found


class _Bar:
    """A bar and its stock's history, newest last."""

    def __init__(self, bars: Bars, i: int):
        history = [j for j in range(i + 1) if bars.stock[j] == bars.stock[i]]
        for name in ("high", "low", "close", "pre_close", "volume"):
            setattr(self, name, [float(getattr(bars, name)[j]) for j in history])
        self.change = [c / p - 1 for c, p in zip(self.close, self.pre_close, strict=True)]
        self.true_range = []
        for high, low, before in zip(self.high, self.low, self.pre_close, strict=True):
            known = [] if math.isnan(before) else [before]
            self.true_range.append(max([high, *known]) / min([low, *known]) - 1)


class _Market:
    """The market's returns and levels, a list by day."""

    def __init__(self, bars: Bars):
        self.change, self.close, self.mean_change = [], [], []
        for day in range(len(bars.dates)):
            today = [i for i in range(len(bars)) if bars.day[i] == day and not math.isnan(bars.pre_close[i])]
            mean = _mean([float(bars.close[i]) / float(bars.pre_close[i]) - 1 for i in today])
            self.mean_change.append(mean)
            if bars.market_close is None:
                level = self.close[-1] if day else 1.0
                self.change.append(mean)
                self.close.append(level if math.isnan(mean) else level * (1 + mean))
            else:
                self.close.append(float(bars.market_close[day]))
                self.change.append(self.close[-1] / self.close[-2] - 1 if day else NAN)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN


def _last(values: list[float], days: int) -> list[float]:
    """The last so many, all NaN where there are fewer or one is."""
    chosen = values[-days:]
    return chosen if len(chosen) == days and not any(map(math.isnan, chosen)) else [NAN] * days


def _quotient(a: float, b: float) -> float:
    return a / b if b else NAN


def _momentum(close: list[float], days: int) -> float:
    return close[-1] / close[-1 - days] - 1 if len(close) > days else NAN


def _ma(close: list[float], days: int) -> float:
    return close[-1] / _mean(_last(close, days)) - 1


def _volatility(change: list[float], days: int) -> float:
    chosen = _last(change, days)
    return math.sqrt(sum((x - _mean(chosen)) ** 2 for x in chosen) / (days - 1))


def _surge(volume: list[float], days: int) -> float:
    return _quotient(volume[-1], _mean(_last(volume[:-1], days)))


def _position(bar: _Bar, days: int) -> float:
    low, high = min(_last(bar.low, days)), max(_last(bar.high, days))
    return _quotient(bar.close[-1] - low, high - low)


def _rsi(close: list[float]) -> float:
    """As Wilder wrote it down: relative strength RS = mean gain / mean loss, index 100 - 100 / (1 + RS)."""
    changes = [b - a for a, b in pairwise(close)]
    if len(changes) < 14:
        return NAN
    gain, loss = _mean([max(x, 0) for x in changes[:14]]), _mean([max(-x, 0) for x in changes[:14]])
    for x in changes[14:]:
        gain, loss = (13 * gain + max(x, 0)) / 14, (13 * loss + max(-x, 0)) / 14
    if loss == 0:
        return 100.0 if gain else 0.0
    return 100 - 100 / (1 + gain / loss)


def _correlation(xs: list[float], ys: list[float]) -> float:
    if math.isnan(xs[0]) or len(set(xs)) == 1 or len(set(ys)) == 1:
        return NAN
    return statistics.correlation(xs, ys)


def _is(condition: bool, x: float) -> float:
    return NAN if math.isnan(x) else float(condition)


_OF_BAR = {
    "ma5": lambda b: _ma(b.close, 5),
    "ma10": lambda b: _ma(b.close, 10),
    "ma20": lambda b: _ma(b.close, 20),
    "momentum_5": lambda b: _momentum(b.close, 5),
    "momentum_10": lambda b: _momentum(b.close, 10),
    "momentum_20": lambda b: _momentum(b.close, 20),
    "momentum_60": lambda b: _momentum(b.close, 60),
    "rsi": lambda b: _rsi(b.close),
    "volatility_10": lambda b: _volatility(b.change, 10),
    "volatility_20": lambda b: _volatility(b.change, 20),
    "true_range_14": lambda b: _mean(_last(b.true_range, 14)),
    "volume_ratio": lambda b: _surge(b.volume, 5),
    "volume_ratio_20": lambda b: _surge(b.volume, 20),
    "volume_trend": lambda b: _quotient(_mean(_last(b.volume, 5)), _mean(_last(b.volume, 60))),
    "price_volume_20": lambda b: _correlation(_last(b.close, 20), _last(b.volume, 20)),
    "position_20": lambda b: _position(b, 20),
}
_OF_MARKET = {
    "breadth_return_5": lambda m, day: _mean(_last(m.mean_change[: day + 1], 5)),
    "market_pct_chg": lambda m, day: m.change[day],
    "market_ma20": lambda m, day: _ma(m.close[: day + 1], 20),
}


# Of the rows of a day: i is the bar's own row, `values` those of all bars.
def _of_all(i: int, values: list[float], today: list[int], bars: Bars) -> float:
    return _mean([values[j] for j in today if not math.isnan(values[j])])


def _of_others(i: int, values: list[float], today: list[int], bars: Bars) -> float:
    industry = [int(bars.industry[s]) for s in bars.stock]
    others = [j for j in today if j != i and industry[j] == industry[i] >= 0]
    return _mean([values[j] for j in others if not math.isnan(values[j])])


def _over_others(i: int, values: list[float], today: list[int], bars: Bars) -> float:
    return values[i] - _of_others(i, values, today, bars)


def _place(i: int, values: list[float], today: list[int], bars: Bars) -> float:
    own = np.float32(values[i])
    others = [np.float32(values[j]) for j in today if j != i and not math.isnan(values[j])]
    if math.isnan(own) or not others:
        return NAN
    return (sum(x < own for x in others) + 0.5 * sum(x == own for x in others)) / len(others)


_OF_DAY = {
    "breadth_ma20": (lambda b: _is(_ma(b.close, 20) > 0, _ma(b.close, 20)), _of_all),
    "industry_excess_20": (lambda b: _momentum(b.close, 20), _over_others),
    "industry_momentum_1": (lambda b: b.change[-1], _of_others),
    "rank_momentum_1": (lambda b: b.change[-1], _place),
    "rank_momentum_5": (lambda b: _momentum(b.close, 5), _place),
    "rank_volatility_60": (lambda b: _volatility(b.change, 60), _place),
    "rank_volume_ratio": (lambda b: _surge(b.volume, 20), _place),
}
