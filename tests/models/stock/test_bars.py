"""models/stock/bars.py and files.py: what is read of files of every form."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.stock.bars import Bars, read
from models.stock.data import StockData
from tests.models.stock.market import frame, random_bars, write_files

BARS = random_bars(n_stocks=6, n_days=80, seed=3)
ARRAYS = [field.name for field in fields(Bars) if field.name not in ("stocks", "industries", "facts")]
Change = Callable[[pd.DataFrame], Any]


def assert_same(found: Bars, expected: Bars) -> None:
    assert (found.stocks, found.industries) == (expected.stocks, expected.industries)
    for name in ARRAYS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)


def changed_table(change: Change) -> pd.DataFrame:
    table = frame(BARS)
    found = change(table)
    return table if found is None else found


def read_changed(folder: Path, change: Change, form: Any = "parquet", **options: Any) -> Bars:
    return read(folder, write_files(folder, BARS, form, changed_table(change), **options))


@pytest.mark.parametrize("form", ["parquet", "csv", "folder"])
def test_every_form_of_the_files_gives_the_same_bars(tmp_path: Path, form: Any) -> None:
    found = read(tmp_path, write_files(tmp_path, BARS, form))
    assert_same(found, BARS)
    assert found.facts["bars_read"] == found.facts["bars"] == len(BARS)
    assert found.facts["files"]["bars"] == {"folder": "daily: 6 files"}.get(form, f"daily.{form}")
    assert found.facts["stocks_without_industry"] == 1  # the generator's last stock


@pytest.mark.parametrize("suffix", [".csv.gz", ".tsv"])
def test_packed_and_tab_separated_files(tmp_path: Path, suffix: str) -> None:
    options = write_files(tmp_path, BARS)
    frame(BARS).to_csv(tmp_path / f"daily{suffix}", index=False, sep="\t" if suffix == ".tsv" else ",")
    assert_same(read(tmp_path, options.model_copy(update={"bars": f"daily{suffix}"})), BARS)


def test_the_path_may_be_the_file_of_the_bars(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS)
    (tmp_path / "daily.parquet").rename(tmp_path / "renamed.parquet")
    assert_same(read(tmp_path / "renamed.parquet", options), BARS)


@pytest.mark.parametrize(
    ("dates", "form"),
    [
        (lambda d: d.astype(str), "parquet"),
        (lambda d: pd.to_datetime(d.astype(str)).dt.strftime("%Y-%m-%d"), "csv"),
        (lambda d: pd.to_datetime(d.astype(str)).dt.strftime("%Y/%m/%d"), "csv"),
        (lambda d: d.astype(float), "csv"),
        (lambda d: d.astype(float), "parquet"),
        (lambda d: pd.to_datetime(d.astype(str)), "parquet"),
        (lambda d: pd.to_datetime(d.astype(str)), "csv"),
        (lambda d: pd.to_datetime(d.astype(str)).dt.date, "parquet"),
        (lambda d: pd.to_datetime(d.astype(str)).dt.strftime("%Y-%m-%d 15:00:00"), "csv"),
        # midnight in Shanghai is the day before in UTC
        (lambda d: pd.to_datetime(d.astype(str)).dt.tz_localize("Asia/Shanghai"), "parquet"),
    ],
)
def test_dates_in_every_form(tmp_path: Path, dates: Callable[[pd.Series], Any], form: Any) -> None:
    found = read_changed(tmp_path, lambda t: t.assign(trade_date=dates(t["trade_date"])), form)
    assert_same(found, BARS)


def test_symbols_are_text_and_sorted(tmp_path: Path) -> None:
    numbers = {symbol: 10 * (6 - i) for i, symbol in enumerate(BARS.stocks)}
    options = write_files(
        tmp_path, BARS, table=changed_table(lambda t: t.assign(ts_code=t["ts_code"].map(numbers)))
    )
    found = read(tmp_path, options.model_copy(update={"listing": None}))
    assert found.stocks == ("10", "20", "30", "40", "50", "60")
    np.testing.assert_array_equal(np.bincount(found.stock), np.bincount(BARS.stock)[::-1])
    first = read(tmp_path, options.model_copy(update={"listing": None})).close[0]
    assert first == BARS.close[BARS.stock == 5][0]


def test_leading_zeros_of_symbols_stay(tmp_path: Path) -> None:
    names = {symbol: f"00000{i}" for i, symbol in enumerate(BARS.stocks)}
    options = write_files(tmp_path, BARS, "csv", changed_table(lambda t: t.assign(ts_code=t["ts_code"].map(names))))
    assert read(tmp_path, options.model_copy(update={"listing": None})).stocks == tuple(names.values())


def test_a_file_a_stock_may_name_it(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS, "folder")
    for file in (tmp_path / "daily").iterdir():
        pd.read_csv(file).drop(columns="ts_code").to_csv(file, index=False)
    (tmp_path / "daily" / "README.txt").write_text("no bars")
    nameless = options.columns.model_copy(update={"symbol": None})
    assert_same(read(tmp_path, options.model_copy(update={"columns": nameless})), BARS)


def test_columns_by_other_names_and_without_optional_ones(tmp_path: Path) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        return table.rename(columns={"vol": "volume"}).drop(columns=["pre_close", "amount", "change"])

    columns = {"volume": "volume", "pre_close": None, "amount": None}
    found = read_changed(tmp_path, change, columns=columns)
    assert np.isnan(found.amount).all()
    first = np.flatnonzero(np.diff(found.stock, prepend=-1))
    assert np.isnan(found.pre_close[first]).all()
    rest = np.setdiff1d(np.arange(len(found)), first)
    np.testing.assert_array_equal(found.pre_close[rest], found.close[rest - 1])  # over a suspension too


def test_a_missing_pre_close_is_that_of_the_bar_before(tmp_path: Path) -> None:
    found = read_changed(tmp_path, lambda t: t.__setitem__("pre_close", t["pre_close"].where(t.index != 7)))
    assert found.pre_close[7] == found.close[6]
    np.testing.assert_allclose(found.pre_close[8:], BARS.pre_close[8:])


def test_adjusted_prices_keep_the_changes_of_the_day(tmp_path: Path) -> None:
    factor = np.where(frame(BARS).index % 80 < 40, 0.5, 1.0)
    found = read_changed(tmp_path, lambda t: t.assign(adj=t["close"] * factor), columns={"adjusted_close": "adj"})
    for name in ("open", "high", "low", "close", "pre_close"):
        np.testing.assert_allclose(getattr(found, name), getattr(BARS, name) * factor, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(found.volume, BARS.volume)


def test_rows_in_any_order_give_the_same_bars_and_are_counted(tmp_path: Path) -> None:
    def by_day(table: pd.DataFrame) -> pd.DataFrame:
        return table.sort_values(["trade_date", "ts_code"])

    def swapped(table: pd.DataFrame) -> pd.DataFrame:
        order = np.arange(len(table))
        order[[3, 4, 10, 11]] = [4, 3, 11, 10]
        return table.iloc[order]

    for number, (change, unsorted) in enumerate([(by_day, 0), (swapped, 2), (lambda t: t[::-1], len(BARS) - 6)]):
        found = read_changed(tmp_path / str(number), change)
        assert_same(found, BARS)
        assert found.facts["unsorted"] == unsorted


def test_suspended_days_are_dropped_and_counted(tmp_path: Path) -> None:
    empty = ["open", "high", "low", "close", "pre_close", "vol", "amount"]

    def change(table: pd.DataFrame) -> None:
        table.loc[[5, 6, 20], empty] = np.nan
        table.loc[20, "vol"] = 0.0  # nothing was traded: as good as missing
        table.loc[21, "vol"] = 0.0  # some repeat the last price on such a day
        table.loc[22, empty] = 0.0

    found = read_changed(tmp_path, change)
    assert found.facts["suspended"] == 5
    assert found.facts["bars_read"] == len(BARS)
    kept = np.delete(np.arange(len(BARS)), [5, 6, 20, 21, 22])
    np.testing.assert_array_equal(found.close, BARS.close[kept])
    np.testing.assert_array_equal(found.day, BARS.day[kept])  # other stocks have bars on these days


def test_the_period_of_the_universe(tmp_path: Path) -> None:
    universe = {"start": "2019-01-10", "end": "2019-04-10"}

    def change(table: pd.DataFrame) -> None:  # what lies outside is not looked at
        table.loc[table["trade_date"] < 20190110, "close"] = -1.0

    found = read_changed(tmp_path, change, universe=universe)
    assert (found.dates[0], found.dates[-1]) == (20190110, 20190410)
    inside = (BARS.dates[BARS.day] >= 20190110) & (BARS.dates[BARS.day] <= 20190410)
    np.testing.assert_array_equal(found.close, BARS.close[inside])
    assert found.facts["outside_period"] == (~inside).sum()
    assert len(found.market_close) == len(found.dates)


def test_an_index_may_be_unsorted_and_longer(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS)
    index = pd.read_csv(tmp_path / "index.csv")
    index.loc[len(index)] = ["2018-12-28", 1.0]
    index.loc[len(index)] = ["2030-01-01", 1.0]
    index[::-1].to_csv(tmp_path / "index.csv", index=False)
    found = read(tmp_path, options)
    assert_same(found, BARS)
    assert found.facts["unsorted_index"] == len(index) - 2  # 2018 .. 2019-04 stood in reverse


def test_the_listing_with_a_prefix_and_gaps(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS)
    one, two, three, four, *_ = BARS.stocks
    rows = [
        ["$" + one, " banks "],
        ["$" + two, ""],
        ["$" + three, "apples"],
        ["$ELSE", "x"],
        ["$" + four, "banks"],
    ]
    pd.DataFrame(rows, columns=["Symbol", "Sector"]).to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    listing = {"file": "table.tsv", "symbol": "Symbol", "industry": "Sector", "prefix": "$"}
    found = read(tmp_path, StockData(**{**options.model_dump(), "listing": listing}))
    assert found.industries == ("apples", "banks")
    assert found.industry.tolist() == [1, -1, 0, 1, -1, -1]
    assert found.facts["stocks_without_industry"] == 3


def test_without_index_and_listing(tmp_path: Path) -> None:
    found = read(tmp_path, write_files(tmp_path, random_bars(5, 70, index=False, n_industries=0)))
    assert found.market_close is None
    assert found.industries == ()
    assert (found.industry == -1).all()


def test_prices_may_miss_their_range_by_rounding(tmp_path: Path) -> None:
    def change(table: pd.DataFrame) -> None:
        table.loc[3, "high"] = table.loc[3, ["open", "close"]].max() * (1 - 5e-4)
        table.loc[3, "low"] = table.loc[3, ["open", "close"]].min()

    assert len(read_changed(tmp_path, change)) == len(BARS)


def test_half_a_million_bars_take_a_second(tmp_path: Path) -> None:
    market = random_bars(n_stocks=500, n_days=1000, seed=1, suspended=0.0, late=0.0)
    options = write_files(tmp_path, market)
    start = time.process_time()
    found = read(tmp_path, options)
    assert len(found) == 500_000
    assert time.process_time() - start < 5.0  # measured: below 1; leaves room for a busy machine
