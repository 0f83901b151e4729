"""models/stock/split.py: roles by unique days, purged and embargoed; folds; the universe."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.stock.bars import Bars
from models.stock.data import Label, Part, Split, Universe
from models.stock.labels import Outcome, outcomes
from models.stock.split import FATES, FIRST_YEAR, Fold, fates, first_days, folds, in_universe
from models.trainer import ROLES, InputError
from tests.models.stock.market import calendar, random_bars

BARS = random_bars(n_stocks=10, n_days=200, seed=2, suspended=0.03, late=0.4)
SMALL = Universe(min_history=20, limit_up={"default": 0.10})


def told(bars: Bars = BARS, label: Label | None = None, universe: Universe = SMALL, **split: Any) -> np.ndarray:
    """What becomes of every bar, by name."""
    outcome = outcomes(bars, label or Label(), universe)
    return np.array(FATES)[fates(bars, outcome, universe, Split(**split))]


def shares(*given: float) -> dict[str, float]:
    return dict(zip(ROLES, given, strict=True))


def text(day: int) -> str:
    return f"{day // 10000}-{day // 100 % 100:02}-{day % 100:02}"


@st.composite
def splits(draw: st.DrawFn) -> dict[str, Any]:
    """Shares or first days, and an embargo."""
    embargo = {"embargo": draw(st.integers(0, 12))}
    if draw(st.booleans()):
        parts = draw(st.lists(st.integers(1, 10), min_size=4, max_size=4))
        return {**shares(*(part / sum(parts) for part in parts)), **embargo}
    days = sorted(draw(st.lists(st.integers(1, 280), min_size=3, max_size=3, unique=True)))
    first = date(2019, 1, 2)
    return {**{role: first + timedelta(days=d) for role, d in zip(ROLES[1:], days, strict=True)}, **embargo}


@settings(max_examples=60, deadline=None)
@given(split=splits(), last=st.integers(1, 20), first=st.integers(1, 20), seed=st.integers(0, 3))
def test_no_label_of_a_role_knows_of_a_day_of_the_next_one(
    split: dict[str, Any], last: int, first: int, seed: int
) -> None:
    bars = random_bars(n_stocks=5, n_days=120, seed=seed, suspended=0.05)
    label = Label(first=min(first, last), last=last)
    found = told(bars, label, **split)
    outcome = outcomes(bars, label, SMALL)
    begins = [0, *first_days(bars.dates, Split(**split)), len(bars.dates)]
    for k, role in enumerate(ROLES):
        rows = found == role
        assert ((bars.day[rows] >= begins[k]) & (bars.day[rows] < begins[k + 1])).all()
        assert not np.isnan(outcome.label[rows]).any()
        assert outcome.tradable[rows].all()
        if k < 3:
            assert (outcome.label_end[rows] + split["embargo"] < begins[k + 1]).all()
        later = np.isin(found, ROLES[k + 1 :])
        if rows.any() and later.any():
            assert outcome.label_end[rows].max() + split["embargo"] < bars.day[later].min()


@settings(max_examples=30, deadline=None)
@given(split=splits())
def test_nothing_but_what_is_purged_is_lost_between_roles(split: dict[str, Any]) -> None:
    found, outcome = told(**split), outcomes(BARS, Label(), SMALL)
    usable = outcome.tradable & ~np.isnan(outcome.label)
    np.testing.assert_array_equal(usable, np.isin(found, (*ROLES, "purged")))
    begins = np.array(first_days(BARS.dates, Split(**split)))
    crosses = [
        ((day < begins) & (begins <= end + split["embargo"])).any()
        for day, end in zip(BARS.day, outcome.label_end, strict=True)
    ]
    np.testing.assert_array_equal(found == "purged", usable & np.array(crosses))


def test_the_cut_is_by_days_and_not_by_rows_of_sorted_stocks() -> None:
    """Cut by rows of (stock, date), the same dates would lie in train and test."""
    found = told(**shares(0.6, 0.1, 0.1, 0.2))
    assert first_days(BARS.dates, Split()) == (120, 140, 160)
    days = {role: np.unique(BARS.day[found == role]) for role in ROLES}
    assert all(days[one].max() < days[other].min() for one, other in itertools.pairwise(ROLES))
    for role in ROLES[1:]:  # and they have every stock
        assert len(np.unique(BARS.stock[found == role])) == len(BARS.stocks), role


def test_last_bars_of_a_stock_have_no_role() -> None:
    """What happens after the data end is not known, and no negative."""
    found = told()
    last_days = BARS.day >= len(BARS.dates) - 5
    assert (found[last_days] != "test").all()
    assert (found[last_days & (BARS.stock == 0)] == "label_unknown").all()
    ended = replace(BARS, **{name: getattr(BARS, name)[~gone] for gone in [_gone(BARS)] for name in _ROWS})
    of_stock = (ended.stock == 3) & (ended.day == 149)
    outcome = outcomes(ended, Label(), SMALL)
    assert of_stock.sum() == 1
    assert np.isnan(outcome.label[of_stock]).all()  # its last bar, though other stocks go on for 50 days


_ROWS = ("stock", "day", "open", "high", "low", "close", "pre_close", "volume", "amount")


def _gone(bars: Bars) -> np.ndarray:
    return (bars.stock == 3) & (bars.day >= 150)


def test_the_first_reason_counts() -> None:
    universe = SMALL.model_copy(update={"n_stocks": 6})
    found = told(universe=universe)
    drawn = in_universe(BARS, universe)[BARS.stock]
    np.testing.assert_array_equal(found == "outside_universe", ~drawn)
    first = np.searchsorted(BARS.stock, BARS.stock)
    young = np.arange(len(BARS)) - first < 20
    np.testing.assert_array_equal(found == "short_history", drawn & young)
    outcome = outcomes(BARS, Label(), universe)
    np.testing.assert_array_equal(found == "limit_up", drawn & ~young & ~outcome.tradable)
    unknown = np.isnan(outcome.label)
    np.testing.assert_array_equal(found == "label_unknown", drawn & outcome.tradable & unknown)
    assert all((found == fate).any() for fate in FATES)


def test_an_embargo_takes_days_before_a_boundary_only() -> None:
    without, with_it = told(), told(embargo=7)
    assert BARS.day[without == "train"].max() == 114  # 114 + 5 < 120
    assert BARS.day[with_it == "train"].max() == 107
    for role in ROLES[1:]:
        assert BARS.day[without == role].min() == BARS.day[with_it == role].min()
    np.testing.assert_array_equal(without == "test", with_it == "test")  # nothing comes after test


def test_first_days_that_are_no_market_days() -> None:
    dates = calendar(200)
    saturday = "2019-06-15"
    split = Split(valid=saturday, calibrate=text(int(dates[150])), test=text(int(dates[170])))
    valid, calibrate, test = first_days(dates, split)
    assert dates[valid] == 20190617
    assert (calibrate, test) == (150, 170)


def test_days_beyond_the_data_leave_a_role_empty() -> None:
    found = told(valid="2019-05-01", calibrate="2019-06-03", test="2031-01-01")
    assert not (found == "test").any()
    assert (found == "calibrate").any()


# ------------------------------------------------------------------------------------------------ folds


def part_of(rng: np.random.Generator, n_days: int, per_day: int, horizon: int, first: int = 100) -> Part:
    day = np.sort(np.repeat(np.arange(first, first + n_days, dtype=np.int32), rng.integers(1, per_day + 1, n_days)))
    n = len(day)
    labels = (rng.random(n) < 0.5).astype(np.float32)
    nothing = np.zeros(n, np.int32)
    return Part(np.zeros((n, 1), np.float32), labels, day, nothing, day + np.int32(horizon), np.arange(n))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 100), n_days=st.integers(4, 60), n=st.integers(1, 8), horizon=st.integers(1, 9),
    embargo=st.integers(0, 9),
)  # fmt: skip
def test_folds_walk_forward_and_cover_valid(seed: int, n_days: int, n: int, horizon: int, embargo: int) -> None:
    valid = part_of(np.random.default_rng(seed), n_days, 6, horizon)
    split = Split(folds=n, embargo=embargo)
    try:
        found = folds(valid, np.arange(300), split)
    except InputError:
        days = np.array_split(np.unique(valid.day), n)
        classes = [len(np.unique(valid.labels[np.isin(valid.day, part)])) for part in days]
        assert n > n_days or min(classes) < 2
        return
    assert [fold.part.start for fold in found] == [0, *(fold.part.stop for fold in found[:-1])]
    assert found[-1].part.stop == len(valid)
    for fold in found:
        assert fold.first_day == valid.day[fold.part].min()
        own = valid.day < fold.first_day
        np.testing.assert_array_equal(
            fold.before, np.flatnonzero(own & (valid.label_end + embargo < fold.first_day))
        )
    lengths = [len(np.unique(valid.day[fold.part])) for fold in found]
    assert max(lengths) - min(lengths) <= 1


def test_one_fold_is_valid_as_it_is() -> None:
    valid = part_of(np.random.default_rng(0), 20, 5, 5)
    (only,) = folds(valid, np.arange(300), Split())
    assert isinstance(only, Fold)
    assert (only.part, only.first_day, len(only.before)) == (slice(0, len(valid)), 100, 0)


def test_folds_that_cannot_be_measured() -> None:
    valid = part_of(np.random.default_rng(0), 8, 5, 5)
    with pytest.raises(InputError, match=r"^data\.split\.folds: expected at most the 8 days of valid, got 9$"):
        folds(valid, np.arange(300), Split(folds=9))
    labels = np.where(valid.day >= 104, 1.0, valid.labels)
    with pytest.raises(InputError) as caught:
        folds(replace(valid, labels=labels), np.arange(300), Split(folds=2))
    assert str(caught.value) == (
        "data.split.folds: expected both values of the label in every part of valid, got one in part 2 of 2 "
        "(104 .. 107); use fewer folds or a longer valid"
    )


# ------------------------------------------------------------------------------------------------ the universe


def test_a_universe_is_drawn_from_the_first_year_without_a_look_at_what_follows() -> None:
    """Not the first n of a list, and not those that are still there today."""
    bars = random_bars(n_stocks=40, n_days=300, seed=5, late=0.0)
    late = bars.stock >= 30
    kept = ~late | (bars.day >= FIRST_YEAR)
    bars = replace(bars, **{name: getattr(bars, name)[kept] for name in _ROWS})
    universe = Universe(n_stocks=12)
    drawn = np.flatnonzero(in_universe(bars, universe))
    assert len(drawn) == 12
    assert drawn.max() < 30
    assert drawn.tolist() != list(range(12))
    # what happens later changes nothing: half of the stocks end
    ends = (bars.stock % 2 == 0) & (bars.day > FIRST_YEAR)
    shorter = replace(bars, **{name: getattr(bars, name)[~ends] for name in _ROWS})
    np.testing.assert_array_equal(np.flatnonzero(in_universe(shorter, universe)), drawn)


def test_draws_are_fixed_nested_and_hang_on_the_seed() -> None:
    bars = random_bars(n_stocks=40, n_days=70)
    ten, twenty = (in_universe(bars, Universe(n_stocks=n)) for n in (10, 20))
    assert (ten.sum(), twenty.sum()) == (10, 20)
    assert (twenty | ~ten).all()
    assert (in_universe(bars, Universe(n_stocks=10, seed=1)) != ten).any()
    assert np.flatnonzero(ten).tolist() == [0, 1, 11, 21, 28, 30, 32, 35, 37, 38]  # the same on every machine
    more = replace(bars, stocks=(*bars.stocks, "never traded"))
    np.testing.assert_array_equal(in_universe(more, Universe(n_stocks=10))[:-1], ten)


def test_all_stocks_where_no_number_or_too_large_a_one_is_given() -> None:
    assert in_universe(BARS, SMALL).all()
    assert in_universe(BARS, Universe(n_stocks=500)).all()


def test_outcomes_of_stocks_outside_do_not_matter(tmp_path: Path) -> None:
    universe = SMALL.model_copy(update={"n_stocks": 4})
    outcome = outcomes(BARS, Label(), universe)
    outside = ~in_universe(BARS, universe)[BARS.stock]
    changed = Outcome(np.where(outside, 1.0, outcome.label), outcome.label_end, outcome.tradable | outside)
    one, other = (fates(BARS, given, universe, Split()) for given in (outcome, changed))
    np.testing.assert_array_equal(one, other)
