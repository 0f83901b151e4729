"""Daily bars of stocks, read from files and checked: prices, the market, industries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.stock.data import StockData, Universe
from models.stock.files import BarFiles, RawBars, find_files, read_bars, read_index, read_listing
from models.trainer import InputError

READER_VERSION = 2  # raise it with any change of a value read
MIN_DAYS = 60  # fewer have no room for a history, a horizon and four roles
_ROUNDING = 1e-3  # relative: adjusted prices are rounded to few digits
_PRICES = ("open", "high", "low", "close")


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
        market_close: [T] float64, of the index. None without an index.
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
    market_close: np.ndarray | None
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.stock)


def read(folder: Path, options: StockData) -> Bars:
    """Reads and checks the files that `options` name; `folder` may also be the file of the bars.

    Rows may come in any order. A bar with a volume of 0, or with neither a price nor a volume, is a suspended
    day and left out: nobody could trade at its price.

    Raises:
        InputError: a file or column that is missing; a value that cannot be one; two bars of one stock and day; an
            index that lacks a market day, or bars that lack a day of the index; one stock only, or fewer than 60
            market days.
    """
    files = find_files(folder, options)
    raw = read_bars(files.bars, options.columns)
    rows, facts = _kept(files, raw, options.universe)
    _refuse_wrong(raw, rows)
    rows, facts["unsorted"] = _sorted(raw, rows)
    present, stock = np.unique(raw.symbol[rows], return_inverse=True)
    names = tuple(raw.symbols[code] for code in present)
    dates, day = np.unique(raw.date[rows], return_inverse=True)
    _refuse_small(files, names, dates)
    stock = stock.astype(np.int32)
    market_close, facts["unsorted_index"] = _market(files, options, dates)
    industry, industries, unknown = _industries(files, options, names)
    return Bars(
        stocks=names,
        dates=dates,
        stock=stock,
        day=day.astype(np.int32),
        **_columns(raw, rows, stock),
        industry=industry,
        industries=industries,
        market_close=market_close,
        facts={"files": _file_names(files), **facts, **unknown},
    )


def _kept(files: BarFiles, raw: RawBars, universe: Universe) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows within the period that are no suspended days, and how many there were."""
    start, end = (int(f"{day:%Y%m%d}") if day is not None else None for day in (universe.start, universe.end))
    inside = np.ones(len(raw.date), bool)
    if start is not None:
        inside &= raw.date >= start
    if end is not None:
        inside &= raw.date <= end
    volume = raw.values["volume"]
    there = ~np.isnan(volume)
    for name in _PRICES:
        there |= ~np.isnan(raw.values[name])
    there &= volume != 0
    rows = np.flatnonzero(inside & there)
    if not len(rows):
        period = f"{start or raw.date.min()} .. {end or raw.date.max()}"
        raise InputError(
            f"{files.shown()}: expected bars with prices and volume within {period}, got none (the files' days: "
            f"{raw.date.min()} .. {raw.date.max()}); check data.universe.start and end"
        )
    return rows, {
        "bars_read": len(inside),
        "bars": len(rows),
        "outside_period": int((~inside).sum()),
        "suspended": int((inside & ~there).sum()),
    }


def _refuse_wrong(raw: RawBars, rows: np.ndarray) -> None:
    """Raises InputError about the first bar that cannot be one."""
    given = {name: values[rows] for name, values in raw.values.items()}
    needed = [name for name in (*_PRICES, "volume", "adjusted_close") if name in given]
    above_zero = [name for name in (*_PRICES, "adjusted_close", "pre_close") if name in given]
    for name in needed:
        expected = f"expected {', '.join(needed)}, or none of them on a suspended day"
        _refuse(raw, rows, np.isnan(given[name]), f"{expected}, got no {name}; fill it or drop the row")
    for name in above_zero:
        _refuse(
            raw, rows, given[name] <= 0, f"expected prices above 0, got {name} {{{name}:g}}; mend or drop the row"
        )
    for name in ("volume", "amount"):
        if name in given:
            expected = f"expected {name} of at least 0, got {{{name}:g}}; mend or drop the row"
            _refuse(raw, rows, given[name] < 0, expected)
    low, high = given["low"] * (1 - _ROUNDING), given["high"] * (1 + _ROUNDING)
    expected = "expected low <= high, got low {low:g} and high {high:g}; are the columns swapped?"
    _refuse(raw, rows, low > high, expected)
    for name in ("open", "close"):
        expected = f"expected {name} within low .. high ({{low:g}} .. {{high:g}}), got {{{name}:g}}"
        _refuse(raw, rows, (given[name] < low) | (given[name] > high), f"{expected}; mend or drop the row")


def _refuse(raw: RawBars, rows: np.ndarray, wrong: np.ndarray, message: str) -> None:
    if wrong.any():
        row = int(rows[np.argmax(wrong)])
        values = {name: float(column[row]) for name, column in raw.values.items()}
        raise InputError(f"{raw.of_row(row)}: {_bar(raw, row)}: {message.format(**values)}")


def _bar(raw: RawBars, row: int) -> str:
    return f"{raw.symbols[raw.symbol[row]]} on {raw.date[row]}"


def _sorted(raw: RawBars, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """`rows` by (stock, date), and how many had a later bar of their stock before them in the files."""
    key = raw.symbol[rows].astype(np.int64) * 100_000_000 + raw.date[rows]
    if (np.diff(key) > 0).all():
        return rows, 0
    by_stock = np.argsort(raw.symbol[rows], kind="stable")
    step = np.diff(key[by_stock])
    order = np.argsort(key, kind="stable")
    twice = np.flatnonzero(np.diff(key[order]) == 0)
    if len(twice):
        first, again = (int(rows[order[twice[0] + i]]) for i in (0, 1))
        raise InputError(
            f"{raw.of_row(again)}: {_bar(raw, again)}: expected one bar a stock and day, got a second (the first: "
            f"{raw.of_row(first)}); drop one of them"
        )
    return rows[order], int((step < 0).sum())


def _refuse_small(files: BarFiles, names: Sequence[str], dates: np.ndarray) -> None:
    if len(names) < 2:
        raise InputError(
            f"{files.shown()}: expected bars of at least 2 stocks, got {names[0]} alone; give others: "
            "features compare a stock with its market"
        )
    if len(dates) < MIN_DAYS:
        raise InputError(
            f"{files.shown()}: expected at least {MIN_DAYS} market days, got {len(dates)} "
            f"({dates[0]} .. {dates[-1]}); give a longer history"
        )


def _columns(raw: RawBars, rows: np.ndarray, stock: np.ndarray) -> dict[str, np.ndarray]:
    """The prices, adjusted, and what was traded, each [N] float32."""
    given = {name: values[rows] for name, values in raw.values.items()}
    missing = np.full(len(rows), np.nan, np.float32)
    columns = {name: given.get(name, missing) for name in (*_PRICES, "pre_close", "volume", "amount")}
    if "adjusted_close" in given:
        factor = given["adjusted_close"] / given["close"]
        columns |= {name: columns[name] * factor for name in ("open", "high", "low", "pre_close")}
        columns["close"] = given["adjusted_close"]
    before = np.full(len(rows), np.nan, np.float32)
    before[1:] = np.where(stock[1:] == stock[:-1], columns["close"][:-1], np.nan)
    columns["pre_close"] = np.where(np.isnan(columns["pre_close"]), before, columns["pre_close"])
    return columns


def _market(files: BarFiles, options: StockData, dates: np.ndarray) -> tuple[np.ndarray | None, int]:
    """The index's close on each market day, and how many of its rows were out of order."""
    if files.index is None or options.index is None:
        return None, 0
    days, close, unsorted = read_index(files.index, options.index)
    period = f"{dates[0]} .. {dates[-1]}"
    absent = dates[~np.isin(dates, days)]
    if len(absent):
        raise InputError(
            f"{files.index}: expected every market day of {period}, got none for {_some(absent)}; give an index "
            "that covers them, set data.universe.start and end, or leave data.index out: the mean of all stocks is "
            "the market then"
        )
    gap = days[(dates[0] < days) & (days < dates[-1]) & ~np.isin(days, dates)]
    if len(gap):
        raise InputError(
            f"{files.shown()}: expected bars on every day of the index within {period}, got none on {_some(gap)}; "
            f"complete them, or drop days that were none of the market from {files.index.name}"
        )
    return close[np.searchsorted(days, dates)], unsorted


def _some(days: np.ndarray) -> str:
    return f"{days[0]}{f' and {len(days) - 1} more' if len(days) > 1 else ''}"


def _industries(
    files: BarFiles, options: StockData, names: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...], dict[str, int]]:
    """Industry by stock, its names, and how many of the stocks have none."""
    table: Mapping[str, str | None] = {}
    if files.listing is not None and options.listing is not None:
        table = read_listing(files.listing, options.listing)
        if not any(name in table for name in names):
            raise InputError(
                f"{files.listing}: expected the stocks of the bars ({names[0]}, ...), got others "
                f"({next(iter(table), 'none')}, ...); check data.listing.symbol and prefix"
            )
    found = [table.get(name) for name in names]
    industries = tuple(sorted({industry for industry in found if industry is not None}))
    code = {industry: index for index, industry in enumerate(industries)}
    industry = np.array([-1 if name is None else code[name] for name in found], np.int32)
    return industry, industries, {"stocks_without_industry": int((industry < 0).sum())}


def _file_names(files: BarFiles) -> dict[str, str]:
    """What people are shown of the files, by what each is for."""
    n = len(files.bars)
    names = {"bars": files.bars[0].name if n == 1 else f"{files.bars[0].parent.name}: {n} files"}
    others = {"index": files.index, "listing": files.listing}
    return names | {what: file.name for what, file in others.items() if file is not None}
