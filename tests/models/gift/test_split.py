"""models/gift/split.py: whole days, ties, groups and duplicates stay on one side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gift import split
from models.gift.data import Categories, Split, load
from models.trainer import ROLES, InputError
from tests.models.gift.tables import (
    ALL,
    SHARES,
    make_frame,
    options,
    raw_of,
    spec,
)


def roles_of(assignment: split.Assignment) -> np.ndarray:
    n = sum(assignment.counts.values())
    roles = np.full(n, "", object)
    for role, rows in assignment.rows.items():
        assert (roles[rows] == "").all()
        roles[rows] = role
    return roles


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "Europe/Zurich", "America/New_York"])
def test_days_are_whole_and_local_and_calibrate_is_the_last_third_of_the_validation_time(zone: str) -> None:
    rng = np.random.default_rng(1)
    start = pd.Timestamp("2024-03-01", tz=zone)  # New York and Zurich change their clocks in these weeks
    end = start + pd.DateOffset(days=40)
    low, high = (int(t.timestamp() * 1000) for t in (start, end))
    order = np.sort(rng.integers(low, high, 20_000))
    found = roles_of(split.assign(raw_of(order), Split(by="day", timezone=zone, **SHARES)))
    day = pd.to_datetime(order, unit="ms", utc=True).tz_convert(zone).normalize()
    number = pd.factorize(day, sort=True)[0]
    period = np.select([number < 28, number < 34], ["train", "middle"], "test")
    np.testing.assert_array_equal(found == "train", period == "train")
    np.testing.assert_array_equal(found == "test", period == "test")
    middle = [int(pd.Timestamp(day[period == p].min()).timestamp() * 1000) for p in ("middle", "test")]
    third = middle[0] + (middle[1] - middle[0]) * 2 / 3
    np.testing.assert_array_equal(found == "calibrate", (period == "middle") & (order >= round(third)))


def test_day_ranges_are_stated_in_local_time() -> None:
    day = 86_400_000
    beijing_midnight = int(pd.Timestamp("2025-05-05", tz="Asia/Shanghai").timestamp() * 1000)
    order = beijing_midnight + np.arange(21 * 24) * day // 24
    ranges = split.assign(raw_of(order), Split(by="day", timezone="Asia/Shanghai", **SHARES)).ranges
    assert ranges["train"] == "2025-05-05T00:00:00+08:00 .. 2025-05-20T00:00:00+08:00"
    assert ranges["calibrate"] == "2025-05-22T00:00:00+08:00 .. 2025-05-23T00:00:00+08:00"
    assert ranges["test"] == "2025-05-23T00:00:00+08:00 .. 2025-05-25T23:00:00+08:00 (included)"


def test_too_few_days_are_refused_and_three_are_enough() -> None:
    given = Split(by="day", **SHARES)
    with pytest.raises(InputError, match="at least 3 days for `day`, got 2"):
        split.assign(raw_of([0, 86_400_000]), given)
    hours = np.arange(72) * 3_600_000
    assert split.assign(raw_of(hours), given).counts == {"train": 24, "valid": 16, "calibrate": 8, "test": 24}


def test_whole_numbers_that_are_no_milliseconds_are_not_cut_into_days() -> None:
    seconds = np.linspace(1.4e9, 1.7e9, 500).astype(np.int64)  # ten years, that would be four days of 1970 in ms
    raw = raw_of(seconds, facts={"order_is_time": False})
    with pytest.raises(InputError, match="expected ms since the epoch or dates in when, got whole numbers as low"):
        split.assign(raw, Split(by="day", column="when", **SHARES))
    assert split.assign(raw, Split(by="time", column="when", **SHARES)).counts["train"] == 350


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=60))
def test_equal_times_stay_on_one_side_and_roles_follow_time(times: list[int]) -> None:
    found = roles_of(split.assign(raw_of(times), Split(by="time", column="t", **SHARES)))
    ranks = {role: rank for rank, role in enumerate(ROLES)}
    by_time = sorted(zip(times, (ranks[role] for role in found), strict=True))
    assert [rank for _, rank in by_time] == sorted(rank for _, rank in by_time)
    assert all(len({rank for t, rank in by_time if t == time}) == 1 for time in set(times))


def test_shares_of_time_hash_and_group() -> None:
    n = 40_000
    expected = np.array(list(SHARES.values()))
    by_time = split.assign(raw_of(np.random.default_rng(0).permutation(n)), Split(by="time", column="t", **SHARES))
    assert [by_time.counts[role] for role in ROLES] == [28_000, 4_000, 2_000, 6_000]
    numeric = np.arange(n, dtype=np.float32)[:, None]
    table = raw_of(unit=np.arange(n), numeric=numeric, numeric_names=("a",))
    for by in ("hash", "group"):
        counts = split.assign(table, Split(by=by, **SHARES)).counts
        error = np.sqrt(n * expected * (1 - expected))
        assert (np.abs(np.array([counts[role] for role in ROLES]) - n * expected) < 4 * error).all()


def test_a_group_is_in_one_role() -> None:
    unit = np.random.default_rng(0).integers(0, 300, 5000)
    found = roles_of(split.assign(raw_of(unit=unit), Split(by="group", **SHARES)))
    assert pd.Series(found).groupby(unit).nunique().max() == 1
    assert set(found) == set(ROLES)


def test_row_content_is_hashed_whatever_the_order_of_columns_rows_or_levels() -> None:
    rng = np.random.default_rng(0)
    numeric = np.round(rng.normal(size=(500, 2)), 1).astype(np.float32)
    numeric[::7, 0] = np.nan
    codes = rng.integers(-1, 3, 500).astype(np.int32)
    table = raw_of(
        unit=np.arange(500), numeric=numeric, numeric_names=("a", "b"),
        categorical={"c": Categories(codes, ("x", "y", "z"))},
    )  # fmt: skip
    keys = split.content_hash(table)
    swapped = raw_of(
        unit=np.arange(500), numeric=numeric[:, ::-1], numeric_names=("b", "a"),
        categorical={"c": Categories(np.where(codes < 0, -1, 2 - codes).astype(np.int32), ("z", "y", "x"))},
    )  # fmt: skip
    np.testing.assert_array_equal(split.content_hash(swapped), keys)
    content = pd.DataFrame(numeric).assign(c=codes).fillna(99.0)
    distinct = content.drop_duplicates()
    assert len(distinct) < 500
    assert len(np.unique(keys)) == len(distinct)
    assert pd.Series(keys).groupby([content[c] for c in content]).nunique().max() == 1


def test_zero_has_no_sign_and_missing_has_one_form() -> None:
    odd_nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    table = raw_of(
        unit=np.arange(4), numeric=np.array([[0.0], [-0.0], [np.nan], [odd_nan]], np.float32), numeric_names=("a",)
    )
    keys = split.content_hash(table)
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_duplicates_stay_on_one_side_whatever_their_labels(tmp_path: Path) -> None:
    frame = make_frame(1500)
    copies = frame.sample(600, random_state=1).assign(weeks=3, paid=1.0, income="50000+.", when=9)
    both = pd.concat([frame, copies], ignore_index=True)
    given = options(split={"by": "hash", **SHARES})
    dataset = load(spec(tmp_path, both, given), ALL)
    where = {int(row): role for role in ROLES for row in dataset.part(role).unit}
    assert all(where[1500 + i] == where[row] for i, row in enumerate(copies.index))
    assert len(set(where.values())) == 4
