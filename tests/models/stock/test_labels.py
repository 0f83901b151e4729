"""Labels against a plain loop, and what must hold for every one of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.stock.bars import Bars
from models.stock.data import Label, Universe
from models.stock.labels import outcomes
from tests.models.stock.market import calendar, random_bars
from tests.models.stock.naive import naive_outcomes

FREE = Universe(min_history=20)
LIMITS = {"default": 0.1, "600007": None, "600014": {"2019-01-09": 0.1, "2019-01-30": 0.2}}


def one_stock(close: list[float], days: list[int] | None = None, n_days: int | None = None, **columns) -> Bars:
    """Bars of one stock, flat within the day unless `columns` say otherwise."""
    return stocks_of([close], [list(range(len(close))) if days is None else days], n_days, **columns)


def stocks_of(closes: list[list[float]], days: list[list[int]], n_days: int | None = None, **columns) -> Bars:
    close = np.concatenate(closes).astype(np.float32)
    n_days = max(map(max, days)) + 1 if n_days is None else n_days
    stock = np.repeat(np.arange(len(closes)), [len(c) for c in closes]).astype(np.int32)
    before = np.concatenate([[np.nan, *c[:-1]] for c in closes]).astype(np.float32)
    values = {"open": close, "high": close, "low": close, "pre_close": before, "volume": np.ones_like(close)}
    values |= {name: np.asarray(column, dtype=np.float32) for name, column in columns.items()}
    return Bars(
        stocks=tuple(f"S{i}" for i in range(len(closes))),
        dates=calendar(n_days),
        stock=stock,
        day=np.concatenate(days).astype(np.int32),
        close=close,
        amount=np.full_like(close, np.nan),
        industry=np.full(len(closes), -1, np.int32),
        industries=(),
        market_close=None,
        facts={},
        **values,
    )


def test_the_window_is_the_days_from_first_to_last():
    # Day 1 and 2 are too early, 6 too late; of 3, 4 and 5 the best counts.
    early = one_stock([10, 20, 20, 10.1, 10.2, 10.3, 20, 10, 10, 10, 10])
    assert outcomes(early, Label(), FREE).label[0] == 0
    for day in (3, 4, 5):
        close = [10.0] * 11
        close[day] = 10.5
        assert outcomes(one_stock(close), Label(), FREE).label[0] == 1


def test_a_rise_of_exactly_the_least_return_counts_although_prices_are_rounded():
    close = [10.0, 10, 10, 10.4, 10, 10, 10]  # 10.4 as float32 is 10.3999996
    assert outcomes(one_stock(close), Label(), FREE).label[0] == 1
    close[3] = 10.39
    assert outcomes(one_stock(close), Label(), FREE).label[0] == 0


def test_the_last_days_have_no_label_and_are_no_negatives():
    found = outcomes(one_stock([10.0] * 9), Label(), FREE)
    assert found.label[:4].tolist() == [0, 0, 0, 0]
    assert np.isnan(found.label[4:]).all()
    # Also where the window's rise has been seen already: who knows only risers would have none but risers.
    risen = outcomes(one_stock([10.0, 10, 10, 20, 20]), Label(), FREE)
    assert np.isnan(risen.label).all()
    assert risen.label_end.tolist() == [5, 6, 7, 8, 9]


def test_a_stock_that_ends_before_the_market_has_labels_from_what_is_left():
    found = outcomes(one_stock([10.0, 10, 10, 11], n_days=20), Label(), FREE)
    assert found.label[0] == 1  # day 3 exists, 4 and 5 do not
    assert np.isnan(found.label[1:]).all()  # no bar in the window: unknown, not 0


def test_suspended_days_count_as_days_of_the_window():
    bars = one_stock([10, 10.2, 11, 20], days=[0, 1, 5, 6], n_days=12)
    assert outcomes(bars, Label(), FREE).label[0] == 1  # day 5 is in 3 .. 5, though it is the second bar ahead
    late = one_stock([10, 10.2, 11, 20], days=[0, 1, 6, 7], n_days=12)
    assert np.isnan(outcomes(late, Label(), FREE).label[0])


def test_labels_never_cross_stocks():
    bars = stocks_of([[10.0] * 8, [100.0] * 8], [list(range(8)), list(range(8))])
    label = outcomes(bars, Label(), FREE).label
    assert np.array_equal(label, [0, 0, 0, *[np.nan] * 5] * 2, equal_nan=True)
    ended = stocks_of([[10.0] * 3, [100.0] * 12], [[0, 1, 2], list(range(12))])
    assert np.isnan(outcomes(ended, Label(), FREE).label[:3]).all()


def test_entry_at_the_open_of_the_next_market_day():
    close = [10.0, 10, 10, 10.5, 10, 10, 10, 10, 10, 10]
    opened = [10.0, 10.2, 10, 10, 10, 10, 10, 10, 10, 10]
    label = Label(entry="next_open")
    assert outcomes(one_stock(close), label, FREE).label[0] == 1
    assert outcomes(one_stock(close, open=opened), label, FREE).label[0] == 0  # 10.5 / 10.2 < 1.04
    absent = one_stock([10, 10.5, 10.5, 10.5, 10.5], days=[0, 2, 3, 4, 5], n_days=12)
    assert np.isnan(outcomes(absent, label, FREE).label[0])
    assert outcomes(absent, Label(), FREE).label[0] == 1


def test_exit_at_the_high():
    close = [10.0] * 10
    high = [10.0, 10, 10, 10, 10.6, 10, 10, 10, 10, 10]
    assert outcomes(one_stock(close, high=high), Label(), FREE).label[0] == 0
    assert outcomes(one_stock(close, high=high), Label(exit="high"), FREE).label[0] == 1


@pytest.mark.parametrize(
    ("symbol", "close", "high", "bought"),
    [
        ("600000.SH", 11.0, 11.0, False),
        ("600000.SH", 10.98, 10.98, False),  # a limit rounded to the tick
        ("600000.SH", 10.9, 10.9, True),
        ("600000.SH", 11.0, 11.2, True),  # came back from its high: there were sellers
        ("688001.SH", 11.0, 11.0, True),
        ("688001.SH", 12.0, 12.0, False),
        ("688800.SH", 12.0, 12.0, True),  # the longest prefix counts; null: no limit
    ],
)
def test_a_bar_closed_at_its_limit_could_not_be_bought(symbol, close, high, bought):
    limits = {"default": 0.10, "688": 0.20, "6888": None}
    bars = one_stock([10.0] * 20 + [close], high=[10.0] * 20 + [high])
    bars = dataclasses.replace(bars, stocks=(symbol,))
    assert outcomes(bars, Label(), Universe(min_history=20, limit_up=limits)).tradable[20] == bought


def test_a_limit_may_change_on_a_day():
    """0.10 became 0.20 on day 22; there was none before day 21."""
    close = [10.0 * 1.1**i for i in range(24)]
    first, then = (f"{day[:4]}-{day[4:6]}-{day[6:]}" for day in calendar(24)[[21, 22]].astype(str))
    universe = Universe(min_history=20, limit_up={"default": {then: 0.20, first: 0.10}})
    assert outcomes(one_stock(close), Label(), universe).tradable[20:].tolist() == [True, False, True, True]


def test_an_open_at_the_limit_is_no_entry():
    close = [10.0] * 21 + [11.0, 11, 12, 12, 12, 12, 12, 12]
    universe = Universe(min_history=20, limit_up={"default": 0.10})
    label = Label(entry="next_open")
    at_limit = one_stock(close, open=[*close[:21], 11.0, *close[22:]])
    assert np.isnan(outcomes(at_limit, label, universe).label[20])
    assert outcomes(at_limit, label, FREE).label[20] == 1
    assert outcomes(at_limit, Label(), universe).label[20] == 1  # the close of day 20 could be paid
    below = one_stock(close, open=[*close[:21], 10.9, *close[22:]])
    assert outcomes(below, label, universe).label[20] == 1


def test_no_limit_by_default():
    assert outcomes(one_stock([10.0] * 20 + [30.0]), Label(), Universe(min_history=20)).tradable[20]


def test_the_first_bars_of_a_stock_are_no_entries():
    bars = stocks_of([[10.0] * 30, [10.0] * 25], [list(range(30)), list(range(0, 50, 2))])
    tradable = outcomes(bars, Label(), Universe(min_history=22)).tradable
    assert tradable[:30].tolist() == [False] * 22 + [True] * 8
    assert tradable[30:].tolist() == [False] * 22 + [True] * 3


@st.composite
def definitions(draw) -> Label:
    first = draw(st.integers(1, 6))
    return Label(
        entry=draw(st.sampled_from(["close", "next_open"])),
        exit=draw(st.sampled_from(["close", "high"])),
        first=first,
        last=first + draw(st.integers(0, 6)),
        min_return=draw(st.sampled_from([0.005, 0.02, 0.04])),
    )


@settings(max_examples=30, deadline=None)
@given(definitions(), st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.0, 0.05, 0.2]))
def test_equal_to_a_plain_loop(label, seed, n_days, suspended):
    bars = random_bars(n_stocks=4, n_days=n_days, seed=seed, suspended=suspended, late=0.5, limit_up=0.1)
    universe = Universe(min_history=20, limit_up=LIMITS)
    found, plain = outcomes(bars, label, universe), naive_outcomes(bars, label, universe)
    assert found.label.dtype == np.float32
    assert found.label_end.dtype == np.int32
    assert np.array_equal(found.label, plain["label"], equal_nan=True)
    assert found.label_end.tolist() == plain["label_end"]
    assert found.tradable.tolist() == plain["tradable"]


@settings(max_examples=30, deadline=None)
@given(definitions(), st.integers(0, 10**6))
def test_every_known_label_is_of_a_window_that_is_over(label, seed):
    bars = random_bars(n_stocks=3, n_days=30, seed=seed)
    found = outcomes(bars, label, FREE)
    known = np.isfinite(found.label)
    assert set(found.label[known]) <= {0, 1}
    assert (found.label_end[known] < len(bars.dates)).all()
    # Prices outside the window and the entry change nothing: what follows label_end may be anything.
    t = 10
    later = (bars.day > t + label.last) & (np.arange(len(bars)) % 2 == 0)
    poisoned = dataclasses.replace(
        bars,
        **{c: np.where(later, 7 * getattr(bars, c), getattr(bars, c)) for c in ("open", "high", "low", "close")},
    )
    past = bars.day <= t
    assert np.array_equal(outcomes(poisoned, label, FREE).label[past], found.label[past], equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 3))
def test_a_wider_window_and_a_lower_bar_only_add_rises(seed, first, wider):
    bars = random_bars(n_stocks=3, n_days=40, seed=seed)
    narrow = outcomes(bars, Label(first=first, last=5), FREE).label
    wide = outcomes(bars, Label(first=max(first - wider, 1), last=5), FREE).label
    low = outcomes(bars, Label(first=first, last=5, min_return=0.02), FREE).label
    high = outcomes(bars, Label(first=first, last=5, exit="high"), FREE).label
    risen = narrow == 1
    assert (wide[risen] == 1).all()
    assert (low[risen] == 1).all()
    assert (high[risen] == 1).all()
