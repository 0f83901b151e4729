"""Facts and checks about the data for people: what is there, how it was split, and whether anything leaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from models.description import check, table, usable_check
from models.prepared import open_array
from models.stock import features
from models.stock.bars import Bars, read
from models.stock.data import Label, Part, StockData, open_part, prepare, read_statistics, refuse_unusable
from models.stock.origin import Origin, find_origin
from models.trainer import ROLES, DataSpec, Role

N_RECOMPUTED = 200
RECENT_DAYS = 20
JUMP, FEW_JUMPS = 0.005, 0.001  # of a price; of the bars: a dividend or split a stock and year is four times that
FEW_ENDED = 0.01  # of the stocks: exchanges delist more than that within years
_SWING = ("min", "median", "max")

_WHY = {
    "outside_universe": "stock not drawn (universe.n_stocks)",
    "short_history": "first days of a stock (universe.min_history)",
    "limit_up": "closed at its limit: could not be bought (universe.limit_up)",
    "label_unknown": "no label: the window is not over, or without a bar; no entry at the next open",
    "purged": "the label's window reaches into the next role",
    "suspended": "suspended day: no volume, or neither it nor a price",
    "outside_period": "outside universe.start .. end",
}


def describe(data: DataSpec, seed: int = 0) -> dict[str, Any]:
    """`{"tables": {title: {"columns", "rows"}}, "checks": [{"name", "ok", "detail"}]}`. Opens every role.

    The checks look at the data a second time, by other means than those that prepared it. `seed` chooses the rows
    and the day that are looked at. Raises InputError for input that cannot be prepared at all.
    """
    options: StockData = data.options
    origin = find_origin(data)
    folder = prepare(data, origin, frozenset(ROLES), usable=frozenset())
    statistics, dates = read_statistics(folder), open_array(folder / "dates.npy")
    parts = {role: open_part(folder / role) for role in ROLES}
    bars = read(origin.path, options)
    generator = np.random.default_rng(seed)
    return {
        "tables": {
            "data": table(["what", "value"], _identity(origin, statistics)),
            "files": table(["for", "file"], list(statistics["facts"]["files"].items())),
            "roles": _roles_table(statistics["roles"]),
            "rows without a role": _dropped_table(statistics),
            "features": _features_table(statistics),
        },
        "checks": [
            usable_check(lambda: refuse_unusable(statistics["roles"], frozenset(ROLES))),
            _order_check(parts, dates, options.split.embargo),
            _labels_check(parts, bars, options.label, generator),
            _past_check(parts, bars, generator),
            _adjusted_check(bars),
            _survivors_check(bars),
        ],
    }


def _identity(origin: Origin, statistics: Mapping[str, Any]) -> list[list[Any]]:
    facts, first, last = statistics["facts"], *statistics["days"]
    n_stocks = len(statistics["stocks"])
    rows = [
        ["source", origin.source],
        ["path", str(origin.path)],
        ["data hash", origin.data_hash],
        ["bars", facts["bars"]],
        ["days", f"{first} .. {last}"],
        ["stocks", n_stocks],
        ["stocks with rows", statistics["stocks_in_universe"]],
        ["stocks of unknown industry", facts["stocks_without_industry"]],
        ["industries", statistics["industries"]],
        ["market", "index" if "index" in facts["files"] else "equal-weighted mean of all stocks"],
        ["features", len(statistics["feature_names"])],
        ["rows out of order, sorted", facts["unsorted"]],
    ]
    return rows + (
        [["index rows out of order, sorted", facts["unsorted_index"]]] if facts["unsorted_index"] else []
    )


def _roles_table(roles: Mapping[str, Any]) -> dict[str, Any]:
    columns = ["role", "first day", "last day", "days", "stocks", "rows", "positives", "base rate"]
    rows = []
    for role in ROLES:
        counts = roles[role]
        swing = counts.get("daily_base_rate", {})
        period = counts.get("range", ["", ""])
        rows.append(
            [role, *period, *(counts[name] for name in ("days", "stocks", "rows", "positives", "base_rate"))]
            + [swing.get(name, "") for name in _SWING]
        )
    return table([*columns, *(f"{name} of a day" for name in _SWING)], rows)


def _dropped_table(statistics: Mapping[str, Any]) -> dict[str, Any]:
    counts = {**statistics["fates"], **statistics["facts"]}
    return table(["why", "bars"], [[text, counts[name]] for name, text in _WHY.items()])


def _features_table(statistics: Mapping[str, Any]) -> dict[str, Any]:
    names = ("feature_names", "feature_mean", "feature_std", "feature_missing")
    rows = list(zip(*(statistics[name] for name in names), strict=True))
    return table(["feature", "train mean", "train std", "unknown in train"], rows)


def _order_check(parts: Mapping[Role, Part], dates: np.ndarray, embargo: int) -> dict[str, Any]:
    """What a label of one role knows lies before the first day of the next."""
    faults, gaps = [], []
    for (before, one), (after, other) in pairwise((role, part) for role, part in parts.items() if len(part)):
        end, first = int(one.label_end.max()), int(other.day.min())
        gaps.append(f"{before} .. {after} {first - end - 1}")
        if end + embargo >= first:
            faults.append(
                f"labels of {before} reach {dates[min(end, len(dates) - 1)]}, {after} begins {dates[first]}"
            )
    detail = "; ".join(faults) or f"market days between them: {', '.join(gaps)}"
    return check("labels end before the next role begins", not faults, detail)


def _labels_check(
    parts: Mapping[Role, Part], bars: Bars, label: Label, generator: np.random.Generator
) -> dict[str, Any]:
    """Some labels by a loop over the days of each one's window."""
    faults, n = [], 0
    for role, part in parts.items():
        for row in generator.choice(len(part), min(N_RECOMPUTED, len(part)), replace=False):
            stock, day, n = int(part.stock[row]), int(part.day[row]), n + 1
            rise = _rise(bars, stock, day, label)
            at_threshold = abs(rise - label.min_return) <= 1e-5  # prices are float32: it may fall to either side
            if np.isnan(rise) or (not at_threshold and (rise > label.min_return) != part.labels[row]):
                faults.append(f"{role}: {bars.stocks[stock]} on {bars.dates[day]} rises by {rise:.4f}")
    return check("labels equal a second look at the prices", not faults, "; ".join(faults[:5]) or f"{n} rows agree")


def _rise(bars: Bars, stock: int, day: int, label: Label) -> float:
    """The best exit over the entry, minus 1; NaN where one of them is not there."""
    first, end = np.searchsorted(bars.stock, (stock, stock + 1))
    row_of = {int(bars.day[row]): row for row in range(first, end)}
    entry, entry_day = (bars.close, day) if label.entry == "close" else (bars.open, day + 1)
    window = [row_of[later] for later in range(day + label.first, day + label.last + 1) if later in row_of]
    if entry_day not in row_of or not window:
        return float("nan")
    exits = bars.close if label.exit == "close" else bars.high
    return float(max(exits[window])) / float(entry[row_of[entry_day]]) - 1.0


def _past_check(parts: Mapping[Role, Part], bars: Bars, generator: np.random.Generator) -> dict[str, Any]:
    """Features of one day of each role, built from the bars up to that day alone."""
    faults, shown = [], []
    for role, part in parts.items():
        if len(part):
            day = int(generator.choice(part.day))
            rows = slice(*np.searchsorted(part.day, (day, day + 1)))
            past = _until(bars, day)
            built = features.build(past)[past.day == day]
            built = built[np.searchsorted(past.stock[past.day == day], part.stock[rows])]
            same = ((built == part.features[rows]) | (np.isnan(built) & np.isnan(part.features[rows]))).all(axis=0)
            changed = (name for name, ok in zip(features.names(), same, strict=True) if not ok)
            faults += [f"{role}: {name} on {bars.dates[day]}" for name in changed]
            shown.append(str(bars.dates[day]))
    detail = "; ".join(faults[:5]) or f"the same without the days after: {', '.join(shown)}"
    return check("features know nothing of the days after", not faults, detail)


def _until(bars: Bars, day: int) -> Bars:
    """The bars up to `day`."""
    kept = bars.day <= day
    names = ("stock", "day", "open", "high", "low", "close", "pre_close", "volume", "amount")
    market = None if bars.market_close is None else bars.market_close[: day + 1]
    columns = {name: getattr(bars, name)[kept] for name in names}
    return replace(bars, dates=bars.dates[: day + 1], market_close=market, **columns)


def _adjusted_check(bars: Bars) -> dict[str, Any]:
    """Raw prices fall where a dividend or split goes off, and with them the close that the change refers to."""
    follows = bars.stock[1:] == bars.stock[:-1]
    n_jumps = int((np.abs(bars.pre_close[1:] / bars.close[:-1] - 1)[follows] > JUMP).sum())
    ok = n_jumps <= FEW_JUMPS * follows.sum()
    detail = f"{n_jumps} of {follows.sum()} bars refer to another close than that of the bar before"
    way_out = "; give adjusted prices, name them in columns.adjusted_close, or set columns.pre_close: null"
    return check("prices are adjusted", ok, detail if ok else detail + way_out)


def _survivors_check(bars: Bars) -> dict[str, Any]:
    """No fault of the files, so never failed; but results on survivors alone are too good."""
    n_stocks = len(bars.stocks)
    present = np.unique(bars.stock[bars.day >= len(bars.dates) - RECENT_DAYS])
    ended = n_stocks - len(present)
    detail = f"{ended} of {n_stocks} stocks have no bar in the last {RECENT_DAYS} days"
    if ended < FEW_ENDED * n_stocks:
        detail = f"WARNING: only {detail}: delisted ones seem to be missing, so results look too good"
    return check("delisted stocks are there", True, detail)
