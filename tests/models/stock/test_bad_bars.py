"""models/stock/bars.py and files.py: every input that is refused, with its place and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.stock.bars import read
from models.stock.data import StockData
from models.trainer import InputError
from tests.models.stock.market import frame, random_bars, write_files

BARS = random_bars(n_stocks=6, n_days=80, seed=3)
Change = Callable[[pd.DataFrame], Any]


def changed_table(change: Change) -> pd.DataFrame:
    return change(frame(BARS))


def refused(folder: Path, options: StockData) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(row: int, column: str, value: Any) -> Change:
    """A change of one cell."""
    return lambda table: table.assign(**{column: table[column].astype(np.float64).where(table.index != row, value)})


ALL_OR_NONE = "expected open, high, low, close, volume, or none of them on a suspended day"
ROW = f"{BARS.stocks[0]} on {BARS.dates[7]}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (at(7, "close", 0.0), f"{ROW}: expected prices above 0, got close 0; mend or drop the row"),
        (at(7, "low", -1.5), f"{ROW}: expected prices above 0, got low -1.5; mend or drop the row"),
        (at(7, "pre_close", 0.0), f"{ROW}: expected prices above 0, got pre_close 0; mend or drop the row"),
        (at(7, "vol", -3.0), f"{ROW}: expected volume of at least 0, got -3; mend or drop the row"),
        (at(7, "amount", -3.0), f"{ROW}: expected amount of at least 0, got -3; mend or drop the row"),
        (at(7, "close", np.nan), f"{ROW}: {ALL_OR_NONE}, got no close; fill it or drop the row"),
        (at(7, "vol", np.nan), f"{ROW}: {ALL_OR_NONE}, got no volume; fill it or drop the row"),
        (at(7, "high", 0.5), f"{ROW}: expected low <= high, got low "),
        (at(7, "close", 500.0), f"{ROW}: expected close within low .. high ("),
        (at(7, "open", 0.1), f"{ROW}: expected open within low .. high ("),
        (at(7, "close", np.inf), "column close: expected a finite number, got inf"),
        (at(7, "vol", 1e39), "column vol: expected a number within +-3.4e+38, got 1e+39"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["parquet", "csv", "folder"])
def test_a_value_that_cannot_be_one_is_named_with_file_and_row(
    tmp_path: Path, change: Change, expected: str, form: Any
) -> None:
    message = refused(tmp_path, write_files(tmp_path, BARS, form, changed_table(change)))
    place = {"parquet": "daily.parquet: row 8", "csv": "daily.csv:9", "folder": f"daily/{BARS.stocks[0]}.csv:9"}[
        form
    ]
    assert message.startswith(f"{tmp_path / place}: {expected}"), message


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("close", "twelve", "column close: expected a number, got 'twelve'; mend it"),
        ("trade_date", "yesterday", "column trade_date: expected a date such as 20180102 or 2018-01-02, got 'yest"),
        (
            "trade_date",
            "1546387200000",
            "column trade_date: expected a date such as 20180102 or 2018-01-02, got '15",
        ),
        ("trade_date", None, "column trade_date: expected a value, got none"),
        ("ts_code", None, "column ts_code: expected a value, got none"),
        ("ts_code", "  ", "column ts_code: expected a value, got none"),
    ],
)
def test_a_text_that_is_no_value_of_its_column(tmp_path: Path, column: str, value: Any, expected: str) -> None:
    table = changed_table(lambda t: t.assign(**{column: t[column].astype(object).where(t.index != 7, value)}))
    assert refused(tmp_path, write_files(tmp_path, BARS, "csv", table)).startswith(
        f"{tmp_path / 'daily.csv'}:9: {expected}"
    )


def test_a_stock_in_a_later_file_is_named_with_that_file(tmp_path: Path) -> None:
    row = int(np.searchsorted(BARS.stock, 4)) + 2
    table = changed_table(at(row, "close", -1.0))
    message = refused(tmp_path, write_files(tmp_path, BARS, "folder", table))
    assert message.startswith(f"{tmp_path / 'daily' / BARS.stocks[4]}.csv:4: {BARS.stocks[4]} on ")


@pytest.mark.parametrize("distance", [1, 30])
def test_two_bars_of_a_stock_and_day(tmp_path: Path, distance: int) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        again = table.iloc[[7]]
        return pd.concat([table[: 7 + distance], again, table[7 + distance :]])

    message = refused(tmp_path, write_files(tmp_path, BARS, "csv", changed_table(change)))
    file = tmp_path / "daily.csv"
    assert message == (
        f"{file}:{9 + distance}: {ROW}: expected one bar a stock and day, got a second (the first: {file}:9); "
        "drop one of them"
    )


def test_two_files_of_the_same_stock(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS, "folder")
    first = tmp_path / "daily" / f"{BARS.stocks[0]}.csv"
    (tmp_path / "daily" / "zz.csv").write_bytes(first.read_bytes())
    assert f"zz.csv:2: {BARS.stocks[0]} on {BARS.dates[0]}: expected one bar" in refused(tmp_path, options)


def test_missing_columns_show_the_nearest(tmp_path: Path) -> None:
    table = frame(BARS).rename(columns={"vol": "volume", "ts_code": "code"})
    message = refused(tmp_path, write_files(tmp_path, BARS, table=table))
    assert message == (
        f"{tmp_path / 'daily.parquet'}: expected column 'ts_code', 'vol', got none such; the nearest are code, "
        "pre_close, close, volume; data.columns says what they are called, null where there are none"
    )


@pytest.mark.parametrize(
    ("missing", "option", "way_out"),
    [
        ("daily.parquet", "data.bars", "name the folder with --data"),
        (
            "index.csv",
            "data.index.file",
            "leave data.index out: the equal-weighted mean of all stocks is the market then",
        ),
        ("listing.csv", "data.listing.file", "leave data.listing out: no industry is known then"),
    ],
)
def test_missing_files(tmp_path: Path, missing: str, option: str, way_out: str) -> None:
    options = write_files(tmp_path, BARS)
    (tmp_path / missing).rename(tmp_path / f"x_{missing}")
    message = refused(tmp_path, options)
    expected = f"expected the file that {option} names, got none; {tmp_path} has x_{missing}"
    assert message.startswith(f"{tmp_path / missing}: {expected}")
    assert message.endswith(f"; put it there, mend {option}, or {way_out}")


def test_a_missing_file_shows_the_nearest(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS).model_copy(update={"bars": "dayly.parquet"})
    assert f"got none; {tmp_path} has daily.parquet; put it there, mend data.bars" in refused(tmp_path, options)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    options = write_files(tmp_path / "data", BARS, "folder")
    assert "no such file or folder; check data.path, or name it with --data" in refused(tmp_path / "none", options)
    for file in (tmp_path / "data" / "daily").iterdir():
        file.unlink()
    assert refused(tmp_path / "data", options) == (
        f"{tmp_path / 'data' / 'daily'}: expected a CSV file a stock in this folder, got none; check data.bars"
    )


def test_files_of_another_kind_and_empty_ones(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS)
    (tmp_path / "daily.xlsx").write_bytes(b"")
    other = options.model_copy(update={"bars": "daily.xlsx"})
    assert "expected a file ending in .parquet, .csv" in refused(tmp_path, other)
    (tmp_path / "daily.parquet").write_bytes(b"PAR1")
    assert f"{tmp_path / 'daily.parquet'}: expected a readable table" in refused(tmp_path, options)
    frame(BARS)[:0].to_parquet(tmp_path / "daily.parquet")
    assert refused(tmp_path, options) == (
        f"{tmp_path / 'daily.parquet'}: expected daily bars, got an empty file; drop it, or give one with rows"
    )


def test_a_single_file_needs_its_symbols(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS, columns={"symbol": None})
    assert "expected a column of symbols in a single file, got columns.symbol: null" in refused(tmp_path, options)


def test_one_stock_alone(tmp_path: Path) -> None:
    table = changed_table(lambda t: t[t["ts_code"] == BARS.stocks[0]])
    assert refused(tmp_path, write_files(tmp_path, BARS, table=table)) == (
        f"{tmp_path / 'daily.parquet'}: expected bars of at least 2 stocks, got {BARS.stocks[0]} alone; give "
        "others: features compare a stock with its market"
    )


def test_fewer_than_60_market_days(tmp_path: Path) -> None:
    table = changed_table(lambda t: t[t["trade_date"] <= BARS.dates[58]])
    assert refused(tmp_path, write_files(tmp_path, BARS, table=table)) == (
        f"{tmp_path / 'daily.parquet'}: expected at least 60 market days, got 59 (20190102 .. {BARS.dates[58]}); "
        "give a longer history"
    )
    table = changed_table(lambda t: t[t["trade_date"] <= BARS.dates[59]])
    assert len(read(tmp_path, write_files(tmp_path, BARS, table=table)).dates) == 60


def test_no_bar_within_the_period(tmp_path: Path) -> None:
    message = refused(tmp_path, write_files(tmp_path, BARS, universe={"start": "2031-01-01"}))
    assert message == (
        f"{tmp_path / 'daily.parquet'}: expected bars with prices and volume within 20310101 .. {BARS.dates[-1]}, "
        f"got none (the files' days: 20190102 .. {BARS.dates[-1]}); check data.universe.start and end"
    )


EVERY_DAY = f": expected every market day of 20190102 .. {BARS.dates[-1]}"


def index_of(days: slice | list[int], close: Any = 3000.0) -> pd.DataFrame:
    return pd.DataFrame({"date": np.delete(BARS.dates, days), "close": close})


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (index_of([7]), f"{EVERY_DAY}, got none for {BARS.dates[7]}; give an index"),
        (index_of([7, 9, 30]), f"{EVERY_DAY}, got none for {BARS.dates[7]} and 2 more; give an index"),
        (index_of(slice(0, 7)), f"{EVERY_DAY}, got none for 20190102 and 6 more; give an index"),
        (index_of([], 0.0), ":2: column close: expected a close above 0, got 0"),
        (index_of([], np.nan), ":2: column close: expected a value, got none"),
        (pd.concat([index_of([])] * 2), ":82: expected a row a day, got 20190102 again (before: {file}:2); drop"),
        (index_of([]).rename(columns={"close": "price"}), ": expected column 'close', got none such"),
        (index_of([]).assign(date="soon"), ":2: column date: expected a date such as 20180102"),
    ],
)  # fmt: skip
def test_an_index_with_faults(tmp_path: Path, index: pd.DataFrame, expected: str) -> None:
    options = write_files(tmp_path, BARS)
    file = tmp_path / "index.csv"
    index.to_csv(file, index=False)
    assert refused(tmp_path, options).startswith(f"{file}{expected.format(file=file)}")


@pytest.mark.parametrize(("days", "got"), [([7], ""), ([7, 8, 40], " and 2 more")])
def test_bars_with_a_gap(tmp_path: Path, days: list[int], got: str) -> None:
    options = write_files(tmp_path, BARS, table=changed_table(lambda t: t[~t["trade_date"].isin(BARS.dates[days])]))
    assert refused(tmp_path, options) == (
        f"{tmp_path / 'daily.parquet'}: expected bars on every day of the index within 20190102 .. "
        f"{BARS.dates[-1]}, got none on {BARS.dates[7]}{got}; complete them, or drop days that were none of the "
        "market from index.csv"
    )


def test_a_listing_with_faults(tmp_path: Path) -> None:
    options = write_files(tmp_path, BARS)
    file = tmp_path / "listing.csv"
    good = pd.read_csv(file)
    pd.concat([good, good[2:3]]).to_csv(file, index=False)
    assert refused(tmp_path, options) == (
        f"{file}:8: expected a row a stock, got {BARS.stocks[2]} again; drop one of them"
    )
    good.assign(ts_code="$" + good["ts_code"]).to_csv(file, index=False)
    assert refused(tmp_path, options) == (
        f"{file}: expected the stocks of the bars ({BARS.stocks[0]}, ...), got others (${BARS.stocks[0]}, ...); "
        "check data.listing.symbol and prefix"
    )
    good.rename(columns={"industry": "sector"}).to_csv(file, index=False)
    assert "expected column 'industry', got none such" in refused(tmp_path, options)
