"""Small random markets, as `Bars` and as files in Tushare's manner, for all tests of the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from models.stock.bars import Bars
from models.stock.data import StockData
from models.trainer import ROLES, DataSpec, Role

SEARCH: frozenset[Role] = frozenset({"train", "valid"})
ALL: frozenset[Role] = frozenset(ROLES)
LIMIT = 0.10
_REACH = 5  # days over which planted knowledge of a stock's rise comes true


def random_bars(
    n_stocks: int = 12,
    n_days: int = 200,
    seed: int = 0,
    *,
    suspended: float = 0.02,
    late: float = 0.2,
    limit_up: float = 0.01,
    n_industries: int = 3,
    index: bool = True,
    strength: float = 0.0,
) -> Bars:
    """A random walk a stock, with a common and an industry's part; equal seeds give equal markets.

    Args:
        suspended: share of days on which a spell of 1-8 days without bars begins (never for the first stock).
        late: share of stocks that are listed within the first half (never the first).
        limit_up: share of bars that rise by `LIMIT` and close at their high.
        n_industries: 0 for none; with some, the last stock's is unknown.
        strength: of a planted signal. A bar's volume, relative to those before, says where the stock goes over the
            next 5 days; at 1 the volume over its mean of 20 days has a ROC-AUC of about 0.68, at 0.3 of 0.62.
    """
    rng = np.random.default_rng(seed)
    shape = (n_stocks, n_days)
    industry = np.full(n_stocks, -1, np.int32)
    if n_industries:
        industry[:-1] = np.arange(n_stocks - 1) % n_industries
    signal = rng.standard_normal(shape)
    change = 0.015 * rng.standard_normal(shape) + 0.006 * rng.standard_normal(n_days)
    change += 0.005 * rng.standard_normal((n_industries + 1, n_days))[industry]
    for lag in range(1, _REACH + 1):
        change[:, lag:] += 0.012 * strength * signal[:, :-lag]
    change = np.where(rng.random(shape) < limit_up, np.log(1 + LIMIT), np.clip(change, -0.1, 0.09))
    there = _bars_there(rng, shape, suspended, late)
    columns = _prices(rng, change, there)
    columns["volume"] = rng.lognormal(10, 1, (n_stocks, 1)) * np.exp(
        0.5 * signal + 0.1 * rng.standard_normal(shape)
    )
    columns["amount"] = columns["volume"] * columns["close"] / 10  # in thousands, of lots of 100
    stock, day = (axis.astype(np.int32) for axis in np.nonzero(there))
    dates = calendar(n_days)
    market = (3000 * np.exp(np.cumsum(0.01 * rng.standard_normal(n_days)))).round(2)
    return Bars(
        stocks=tuple(f"{600000 + 7 * i}.SH" for i in range(n_stocks)),
        dates=dates,
        stock=stock,
        day=day,
        **{name: values[there].astype(np.float32) for name, values in columns.items()},
        industry=industry,
        industries=tuple(f"industry {chr(97 + i)}" for i in range(n_industries)),
        market_close=market if index else None,
        facts={},
    )


def _prices(rng: np.random.Generator, change: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
    """[S, T] each, from the change of the day's close; a day without a bar has none, and the price stops."""
    shape = change.shape
    close = rng.lognormal(2.5, 0.6, (shape[0], 1)) * np.exp(np.cumsum(np.where(there, change, 0.0), axis=1))
    pre_close = np.concatenate([close[:, :1] / np.exp(change[:, :1]), close[:, :-1]], axis=1)
    at_limit = change >= np.log(1 + LIMIT) - 1e-12
    opened = pre_close * np.exp(0.004 * rng.standard_normal(shape))
    opened = np.where(at_limit, np.minimum(opened, close), opened)
    above, below = np.exp(np.abs(0.006 * rng.standard_normal((2, *shape))))
    high = np.maximum(opened, close) * np.where(at_limit, 1.0, above)
    low = np.minimum(opened, close) / below
    return {"open": opened, "high": high, "low": low, "close": close, "pre_close": pre_close}


def calendar(n_days: int, first: str = "2019-01-02") -> np.ndarray:
    """[T] int32 working days as 20190102."""
    days = np.busday_offset(first, np.arange(n_days), roll="forward")
    return np.char.replace(days.astype(str), "-", "").astype(np.int32)


def _bars_there(rng: np.random.Generator, shape: tuple[int, int], suspended: float, late: float) -> np.ndarray:
    there = np.ones(shape, bool)
    begins = rng.random(shape) < suspended
    length = rng.integers(1, 9, shape)
    start = np.where(rng.random(shape[0]) < late, rng.integers(1, max(shape[1] // 2, 2), shape[0]), 0)
    for stock in range(1, shape[0]):
        for day in np.flatnonzero(begins[stock]):
            there[stock, day : day + length[stock, day]] = False
        there[stock, : start[stock]] = False
        there[stock, start[stock]] = True
    return there


def frame(bars: Bars) -> pd.DataFrame:
    """The bars as Tushare has them, one row each, in the order of `bars`."""
    table = pd.DataFrame(
        {
            "ts_code": np.array(bars.stocks)[bars.stock],
            "trade_date": bars.dates[bars.day],
            "open": bars.open,
            "high": bars.high,
            "low": bars.low,
            "close": bars.close,
            "pre_close": bars.pre_close,
        }
    )
    table["change"] = table["close"] - table["pre_close"]
    table["pct_chg"] = 100 * table["change"] / table["pre_close"]
    return table.assign(vol=bars.volume, amount=bars.amount)


def write_files(
    folder: Path,
    bars: Bars,
    form: Literal["parquet", "csv", "folder"] = "parquet",
    table: pd.DataFrame | None = None,
    **changed: Any,
) -> StockData:
    """Writes bars (or `table` in their place), index.csv and listing.csv, and gives the options that read them.

    `form`: daily.parquet, daily.csv, or daily/SYMBOL.csv a stock. `changed` replaces sections of the options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = frame(bars) if table is None else table
    chosen: dict[str, Any] = {"path": folder, "bars": {"folder": "daily"}.get(form, f"daily.{form}")}
    if form == "parquet":
        table.to_parquet(folder / "daily.parquet", index=False)
    elif form == "csv":
        table.to_csv(folder / "daily.csv", index=False)
    else:
        (folder / "daily").mkdir(exist_ok=True)
        for symbol, rows in table.groupby("ts_code"):
            rows.to_csv(folder / "daily" / f"{symbol}.csv", index=False)
    if bars.market_close is not None:
        days = [f"{d // 10000}-{d // 100 % 100:02}-{d % 100:02}" for d in bars.dates.tolist()]
        pd.DataFrame({"date": days, "close": bars.market_close}).to_csv(folder / "index.csv", index=False)
        chosen["index"] = {"file": "index.csv"}
    if bars.industries:
        listing = {
            "ts_code": bars.stocks,
            "industry": [bars.industries[code] if code >= 0 else None for code in bars.industry],
        }
        pd.DataFrame(listing).to_csv(folder / "listing.csv", index=False)
        chosen["listing"] = {"file": "listing.csv"}
    chosen["universe"] = {"min_history": 20, "limit_up": {"default": LIMIT}}
    return StockData(**{**chosen, **changed})


def spec(folder: Path, options: StockData, cache: str = "cache") -> DataSpec:
    """The files of `folder` as a person names them, with a cache beside them."""
    return DataSpec(options, folder, folder.parent / f"{folder.name}-{cache}", path_given=True)
