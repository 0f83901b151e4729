"""Features against a plain loop, against published values, and under a poisoned future.

`python -m tests.models.stock.test_features` writes the golden numbers anew.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.stock import features
from models.stock.bars import Bars
from models.stock.features import GROUPS, SEED, build, names
from models.stock.rolling import Rolling
from models.trainer import InputError
from tests.models.stock.market import calendar, random_bars
from tests.models.stock.naive import naive_features

GOLDEN = Path(__file__).with_name("golden_features.csv")
PAGE = Path(__file__).parents[3] / "docs" / "stock-features.md"
PRICES = ("open", "high", "low", "close", "pre_close")


def replace(bars: Bars, **columns) -> Bars:
    """With columns of [N] replaced by what `columns` make of them."""
    made = {name: np.asarray(make(getattr(bars, name)), np.float32) for name, make in columns.items()}
    return dataclasses.replace(bars, **made)


def keep(bars: Bars, rows: np.ndarray) -> Bars:
    columns = (*PRICES, "stock", "day", "volume", "amount")
    return dataclasses.replace(bars, **{name: getattr(bars, name)[rows] for name in columns})


def odd_bars(seed: int, index: bool, n_stocks: int = 7, n_days: int = 90) -> Bars:
    """A random market with all that is odd: gaps, late listings, an industry of one, stocks without an industry, a
    constant price, days without volume, first days without the close before."""
    bars = random_bars(n_stocks, n_days, seed, suspended=0.04, late=0.4, limit_up=0.05, n_industries=2, index=index)
    industry = np.array([0, 0, 0, 1, 1, 2, -1], np.int32)[:n_stocks]
    first = np.diff(bars.stock, prepend=-1) != 0
    constant, idle = bars.stock == 2, (bars.stock == 1) & (bars.day // 7 % 3 == 0)
    bars = replace(
        bars,
        **{name: lambda x: np.where(constant, 8.0, x) for name in PRICES},
        volume=lambda x: np.where(idle, 0.0, x),
    )
    return replace(
        dataclasses.replace(bars, industry=industry, industries=("a", "b", "c")),
        pre_close=lambda x: np.where(first & (bars.stock % 2 == 0), np.nan, x),
    )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_a_plain_loop(seed, index):
    bars = odd_bars(seed, index)
    made, plain = build(bars), naive_features(bars)
    assert sorted(plain) == sorted(names())
    assert not np.isinf(made).any()
    for column, name in enumerate(names()):
        expected = np.array(plain[name])
        np.testing.assert_allclose(made[:, column], expected, rtol=1e-5, atol=1e-7, equal_nan=True, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 70), st.booleans())
def test_equal_to_a_plain_loop_on_markets_of_any_size(seed, n_stocks, n_days, index):
    bars = random_bars(
        n_stocks, n_days, seed, suspended=0.1, late=0.5, n_industries=min(n_stocks - 1, 2), index=index
    )
    made, plain = build(bars), naive_features(bars)
    for column, name in enumerate(names()):
        np.testing.assert_allclose(made[:, column], plain[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_every_feature_is_known_somewhere():
    made = build(random_bars(8, 120, seed=1))
    assert dict(zip(names(), np.isfinite(made).any(axis=0).tolist(), strict=True)) == dict.fromkeys(names(), True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("day", [40, 65, 88])
def test_a_poisoned_future_changes_nothing_to_the_bit(day, index):
    bars = odd_bars(4, index)
    made = build(bars)[bars.day <= day]
    rng = np.random.default_rng(day)
    later = bars.day > day
    noise = rng.lognormal(0, 3, len(bars))
    poisoned = replace(
        bars, **{name: lambda x: np.where(later, x * noise, x) for name in (*PRICES, "volume", "amount")}
    )
    if index:
        changed = np.where(
            np.arange(len(bars.dates)) > day, 1e6 * rng.random(len(bars.dates)) + 1, bars.market_close
        )
        poisoned = dataclasses.replace(poisoned, market_close=changed)
    assert same(build(poisoned)[bars.day <= day], made)
    thinned = keep(poisoned, ~later | (rng.random(len(bars)) < 0.5))
    assert same(build(thinned)[thinned.day <= day], made)
    ended = dataclasses.replace(keep(bars, ~later), dates=bars.dates[: day + 1])
    if index:
        ended = dataclasses.replace(ended, market_close=bars.market_close[: day + 1])
    assert same(build(ended), made)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_listing_to_come_changes_nothing_before(place):
    """Whatever its name's place among the stocks, and though its industry and its days are there already."""
    bars, day = odd_bars(5, index=False), 60
    moved = bars.stock + (bars.stock >= place)
    new_days = np.arange(day + 1, len(bars.dates), dtype=np.int32)
    stock = np.concatenate([moved, np.full(len(new_days), place)]).astype(np.int32)
    days = np.concatenate([bars.day, new_days])
    order = np.lexsort((days, stock))
    rng = np.random.default_rng(0)

    def grown(x):
        return np.concatenate([x, 20 * rng.random(len(new_days), dtype=np.float32) + 1])[order]

    listed = dataclasses.replace(
        bars,
        stocks=tuple(f"S{i}" for i in range(len(bars.stocks) + 1)),
        stock=stock[order],
        day=days[order],
        industry=np.insert(bars.industry, place, 1),
        **{name: grown(getattr(bars, name)) for name in (*PRICES, "volume", "amount")},
    )
    old = (listed.day <= day) & (listed.stock != place)
    assert same(build(listed)[old], build(bars)[bars.day <= day])


def test_prices_of_another_scale_change_nothing_to_the_bit():
    """Of a split, or of an adjustment to a later price: no feature can tell which stock it is by its price."""
    bars = odd_bars(6, index=True)
    scale = np.array([2.0, 0.25, 1, 1024, 0.5, 8, 4])[bars.stock]
    assert same(build(replace(bars, **{name: lambda x: x * scale for name in PRICES})), build(bars))


@pytest.mark.parametrize("index", [True, False])
def test_a_window_knows_nothing_before_it(index):
    """The stock's own and the market's, but for RSI and a market without an index: these come down from the first
    day, and so does what other stocks of a shorter history have to say."""
    bars = odd_bars(7, index, n_days=130)
    first = 10
    excepted = {
        "rsi",
        *GROUPS["breadth"],
        *GROUPS["industry"],
        *GROUPS["rank"],
        *(() if index else GROUPS["market"]),
    }
    columns = [i for i, name in enumerate(names()) if name not in excepted]
    shorter = keep(bars, bars.day >= first)
    shorter = dataclasses.replace(shorter, day=shorter.day - first, dates=bars.dates[first:])
    if index:
        shorter = dataclasses.replace(shorter, market_close=bars.market_close[first:])
    full, short = build(bars)[bars.day >= first][:, columns], build(shorter)[:, columns]
    old_enough = Rolling(shorter.stock).age >= 61
    assert old_enough.sum() > 50
    assert same(full[old_enough], short[old_enough])


def test_names_are_the_columns_and_every_one_is_in_one_group():
    assert names()[: len(SEED)] == SEED
    assert len(set(names())) == len(names()) == build(random_bars(3, 30)).shape[1]
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(names())
    made = build(random_bars(3, 30))
    assert made.dtype == np.float32


def test_the_market_without_an_index_is_the_mean_of_all_stocks():
    bars = random_bars(5, 40, seed=2, index=False)
    change = bars.close.astype(np.float64) / bars.pre_close - 1
    expected = np.array([change[bars.day == day].mean() for day in range(40)])
    np.testing.assert_allclose(build(bars)[:, names().index("market_pct_chg")], expected[bars.day], rtol=1e-5)


def test_the_market_is_joined_by_its_day():
    """A stock that misses days gets the change of its own days, however many values the index has."""
    bars = random_bars(4, 60, seed=3, suspended=0.2)
    index = bars.market_close
    expected = np.concatenate([[np.nan], index[1:] / index[:-1] - 1])[bars.day]
    np.testing.assert_allclose(build(bars)[:, 0], expected, rtol=1e-6)


def test_a_missing_value_of_the_index_is_an_error():
    bars = random_bars(3, 30)
    index = bars.market_close.copy()
    index[[7, 9]] = np.nan
    with pytest.raises(InputError, match=rf"index: .* got none on 2, the first {bars.dates[7]}; complete the file"):
        build(dataclasses.replace(bars, market_close=index))
    with pytest.raises(InputError, match="index: expected a value for each of 30 market days, got 29"):
        build(dataclasses.replace(bars, market_close=index[:-1]))


# The example of StockCharts' page on the RSI, with its published values.
CLOSES = [
    *(44.3389, 44.0902, 44.1497, 43.6124, 44.3278, 44.8264, 45.0955, 45.4245, 45.8433, 46.0826, 45.8931),
    *(46.0328, 45.6140, 46.2820, 46.2820, 46.0028, 46.0328, 46.4116, 46.2222, 45.6439, 46.2122, 46.2521),
    *(45.7137, 46.4515, 45.7835, 45.3548, 44.0288, 44.1783, 44.2181, 44.5672, 43.4205, 42.6628, 43.1314),
]
PUBLISHED = [
    *(70.53, 66.32, 66.55, 69.41, 66.36, 57.97, 62.93, 63.26, 56.06, 62.38),
    *(54.71, 50.42, 39.99, 41.46, 41.87, 45.46, 37.30, 33.08, 37.77),
]


def rsi(*closes: list[float]) -> np.ndarray:
    stock = np.repeat(np.arange(len(closes)), [len(c) for c in closes])
    return Rolling(stock).rsi(np.concatenate(closes), 14)


def test_rsi_has_the_published_values():
    found = rsi(CLOSES)
    assert np.isnan(found[:14]).all()
    assert found[14:].round(2).tolist() == PUBLISHED


def test_rsi_has_talibs_values():
    """Of TA-Lib 0.6 (`talib.RSI(close, 14)`), where prices stand still at first and where they never move."""
    found = rsi([10.0] * 16 + [10.5, 10.25, 10.25, 11.0])
    np.testing.assert_allclose(found[14:], [0, 0, 100, 65, 65, 84.21825], rtol=1e-6)
    assert rsi([10.0] * 20)[14:].tolist() == [0] * 6
    assert rsi(list(range(1, 21)))[14:].tolist() == [100] * 6
    assert rsi(list(range(21, 1, -1)))[14:].tolist() == [0] * 6
    exact = [70.5327895, 66.3185618, 66.5498299, 69.4063053, 66.3551691, 57.9748557, 62.9296068, 63.2571476]
    np.testing.assert_allclose(rsi(CLOSES)[14:22], exact, rtol=2e-9)


def test_rsi_of_a_stock_knows_no_other():
    apart = [rsi(CLOSES[:9]), rsi(CLOSES), rsi(CLOSES[5:25])]
    assert np.array_equal(rsi(CLOSES[:9], CLOSES, CLOSES[5:25]), np.concatenate(apart), equal_nan=True)


def golden_bars() -> Bars:
    """Three stocks over 70 days, made of integers so that no generator of random numbers has a part in it."""
    n_days = 70
    stock, day = (axis.ravel().astype(np.int32) for axis in np.mgrid[:4, :n_days])
    there = (stock == 0) | ((stock * 31 + day * 7) % 11 > 0)
    stock, day = stock[there], day[there]
    close = 10 + stock + (day * day * (3 + stock) % 47 - day * stock) / 64
    pre_close = np.where(np.diff(stock, prepend=-1) != 0, close, np.roll(close, 1))
    opened = pre_close + (day * 5 % 7 - 3) / 32
    volume = 1000 + day * day * 37 % 911
    return Bars(
        stocks=("A", "B", "C", "D"),
        dates=calendar(n_days),
        stock=stock,
        day=day,
        open=opened.astype(np.float32),
        high=(np.maximum(opened, close) + day % 3 / 16).astype(np.float32),
        low=(np.minimum(opened, close) - day % 4 / 16).astype(np.float32),
        close=close.astype(np.float32),
        pre_close=pre_close.astype(np.float32),
        volume=volume.astype(np.float32),
        amount=(volume * close * (1 + stock)).astype(np.float32),
        industry=np.array([0, 0, 1, 1], np.int32),
        industries=("a", "b"),
        market_close=3000.0 + np.arange(n_days) ** 2 * 13 % 101,
        facts={},
    )


def golden_rows(bars: Bars) -> dict[str, list[float]]:
    """Every feature of the bars of the last two days."""
    made = build(bars)[bars.day >= len(bars.dates) - 2]
    return {name: [float(f"{x:.7g}") for x in made[:, column]] for column, name in enumerate(names())}


def test_golden_numbers():
    with GOLDEN.open(newline="") as file:
        written = {name: [float(x) for x in values] for name, *values in csv.reader(file)}
    found = golden_rows(golden_bars())
    assert list(written) == list(found)
    for name, values in found.items():
        np.testing.assert_allclose(values, written[name], rtol=2e-6, atol=1e-9, err_msg=f"{name}: {__doc__}")


def test_the_groups_that_are_the_same_for_all_stocks_of_a_day():
    bars = random_bars(6, 120, suspended=0.0, late=0.0)
    built = build(bars)
    group = {name: group for group, of in GROUPS.items() for name in of}
    for column, name in enumerate(names()):
        days = [built[bars.day == day, column] for day in range(60, 120)]
        same_for_all = all(np.array_equal(x, np.full_like(x, x[0]), equal_nan=True) for x in days)
        assert same_for_all == (group[name] in features.EVERYWHERE), name


def test_the_page_lists_every_feature_with_its_group():
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = [(row[1].strip().strip("`"), row[2].strip()) for row in rows]
    group = {name: group for group, of in GROUPS.items() for name in of}
    assert listed == [(name, group[name]) for name in names()]
    assert all(cell.strip() for row in rows for cell in row[1:-1])
    assert f"## The list ({len(names())})" in PAGE.read_text()
    assert features.FEATURES_VERSION == 1


if __name__ == "__main__":
    with GOLDEN.open("w", newline="") as golden_file:
        csv.writer(golden_file, lineterminator="\n").writerows(
            [name, *map(str, values)] for name, values in golden_rows(golden_bars()).items()
        )
