"""Labels and features a second time, bar by bar in plain Python: slow, and written apart from the fast ones."""

from __future__ import annotations

import math
from typing import Any

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
            entry = float(bars.open[by_day[s, d + 1]]) if (s, d + 1) in by_day else NAN
        unknown = end >= len(bars.dates) or not exits or math.isnan(entry)
        found["label"].append(NAN if unknown else float(max(exits) / entry >= 1 + label.min_return - 1e-6))
        found["label_end"].append(end)
        earlier = sum(other == s and e < d for other, e in by_day)
        found["tradable"].append(earlier >= universe.min_history and not _at_limit(bars, i, universe))
    return found


def _at_limit(bars: Bars, i: int, universe: Universe) -> bool:
    symbol = bars.stocks[bars.stock[i]]
    fitting = [p for p in universe.limit_up if p != "default" and symbol.startswith(p)]
    limit = universe.limit_up.get(max(fitting, key=len) if fitting else "default")
    if limit is None or math.isnan(bars.pre_close[i]):
        return False
    rise = float(bars.close[i]) / float(bars.pre_close[i]) - 1
    return rise >= limit - 0.003 and bars.close[i] >= bars.high[i] * 0.9999
