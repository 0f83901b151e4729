from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.gift import features, kuailive, naive
from models.gift.data import RawTable
from models.gift.history import Axis
from models.trainer import InputError
from tests.models.gift.kuailive_files import (
    DAY,
    HOUR,
    MIDNIGHT,
    MINUTE,
    Tables,
    clicks,
    events,
    gifts,
    hand_written,
    random_tables,
    rooms,
    write,
)

T = MIDNIGHT + 3 * DAY + 12 * HOUR  # Thursday noon in Beijing


def built(frames: Tables, snapshot_features: bool = False) -> RawTable:
    numeric, names, categorical = features.build(frames, snapshot_features)
    nothing = np.zeros(len(numeric), dtype=np.int64)
    return RawTable(numeric, names, categorical, {}, nothing, None, None)


def row_of(table: RawTable, row: int) -> dict[str, Any]:
    """One row's features, categories as their texts."""
    values: dict[str, Any] = dict(zip(table.numeric_names, table.numeric[row].tolist(), strict=True))
    for name, column in table.categorical.items():
        code = column.codes[row]
        values[name] = column.levels[code] if code >= 0 else None
    return values


def features_at(folder: Path, tables: Tables, user: int = 1, at: int = T) -> dict[str, Any]:
    """Features of the only click of `user` at time `at`."""
    table = kuailive.read(write(folder, tables), False)
    (row,) = np.flatnonzero((table.unit == user) & (table.order == at))
    return row_of(table, row)


# ------------------------------------------------------------------------------------------- the two agree


@pytest.mark.parametrize("seed", range(12))
def test_fast_and_plain_agree_on_random_tables(tmp_path: Path, seed: int) -> None:
    folder = write(tmp_path, random_tables(seed))
    table, (frames, _) = kuailive.read(folder, True), kuailive.read_frames(folder, True)
    rows = np.random.default_rng(seed).choice(len(table.unit), 25, replace=False).tolist()
    assert naive.differences(table, frames, rows) == []


def test_differences_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path, random_tables(3))
    table, (frames, _) = kuailive.read(folder, False), kuailive.read_frames(folder, False)
    place = table.numeric_names.index("pair_gifts")
    table.numeric[5, place] += 0.01
    table.categorical["weekday"].codes[7] += 1
    table.numeric_names = tuple("user_clicked" if n == "user_clicks" else n for n in table.numeric_names)
    faults = naive.differences(table, frames, [4, 5, 6, 7])
    assert [fault.split(":")[0] for fault in faults[:2]] == ["user_clicked", "user_clicks"]
    assert faults[2].startswith("row 5: pair_gifts: fast ")
    assert faults[3].startswith("row 7: weekday: fast ")
    assert len(faults) == 4


# ------------------------------------------------------------------------------------------- no future


def poisoned(frames: Tables, row: int, rng: np.random.Generator) -> Tables:
    """`frames` with everything changed that is known at or after the time of click `row`, which comes first."""
    t = int(frames["click"]["timestamp"].iloc[row])
    other = dict(frames)
    for kind in ("click", "gift", "comment", "like"):
        frame = frames[kind]
        index = np.arange(len(frame))
        future = (frame["timestamp"] >= t) & ((kind != "click") | (index != row))
        kept = frame[~(future & (rng.random(len(frame)) < 0.5))]
        kept = kept[kept.index != row] if kind == "click" else kept
        added = frame.sample(60, replace=True, random_state=int(rng.integers(2**31)))
        ties = rng.random(len(added)) < 0.3  # added at t itself, and later
        added = added.assign(timestamp=np.where(ties, t, t + rng.integers(0, DAY, len(added))))
        parts = [frame.iloc[[row]], kept, added] if kind == "click" else [kept, added]
        other[kind] = pd.concat(parts, ignore_index=True)
    click, gift = other["click"], other["gift"]
    known = click["timestamp"] + click["watch_live_time"].clip(lower=0) < t
    lowest = np.maximum(t - click["timestamp"], 0)  # what is known of the others: they still ran at t
    click["watch_live_time"] = np.where(known, click["watch_live_time"], lowest + rng.integers(0, DAY, len(click)))
    price = rng.integers(1, 9999, len(gift))
    gift["gift_price"] = np.where(gift["timestamp"] >= t, price, gift["gift_price"])
    room = frames["room"]
    room = room[~((room["start_timestamp"] >= t) & (rng.random(len(room)) < 0.5))]
    later = room.sample(20, replace=True, random_state=int(rng.integers(2**31)))
    later = later.assign(start_timestamp=t + rng.integers(0, DAY, len(later)))
    other["room"] = pd.concat([room, later], ignore_index=True).sample(frac=1.0, random_state=1)
    return other


@pytest.mark.parametrize("seed", range(8))
def test_poisoning_the_future_changes_no_feature(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames, _ = kuailive.read_frames(write(tmp_path, random_tables(seed)), False)
    before = built(frames)
    for row in rng.choice(len(frames["click"]), 12, replace=False).tolist():
        after = built(poisoned(frames, row, rng))
        old, new = row_of(before, row), row_of(after, 0)
        assert list(old) == list(new)
        np.testing.assert_equal(new, old)


def test_poison_would_show(tmp_path: Path) -> None:
    """The same poison one millisecond earlier is past, and does change features: the test above can fail."""
    rng = np.random.default_rng(0)
    frames, _ = kuailive.read_frames(write(tmp_path, random_tables(0)), False)
    row = len(frames["click"]) // 2
    other = poisoned(frames, row, rng)
    t = int(frames["click"]["timestamp"].iloc[row])
    for kind in ("click", "gift", "comment", "like"):
        other[kind].loc[other[kind]["timestamp"] == t, "timestamp"] -= 1
    other["click"].loc[0, "timestamp"] = t
    old, new = row_of(built(frames), row), row_of(built(other), 0)
    for name in ("user_clicks", "user_gifts", "user_comments", "user_likes", "user_gift_amount", "user_running"):
        assert old[name] != new[name], name


# ------------------------------------------------------------------------------------------- values by hand


def test_ties_are_not_past_and_windows_begin_at_their_edge(tmp_path: Path) -> None:
    past = (T - HOUR - 1, T - HOUR, T - 1, T)
    tables = hand_written() | {
        "click": clicks((1, 10, 1, T, 5), *((1, 20, 2, t, 1) for t in past)),
        "gift": gifts(*((2, 10, 1, t, 10) for t in past)),
        "comment": events(*((1, 20, 2, t) for t in past)),
        "like": events(*((1, 10, 1, t) for t in past)),
    }
    table = kuailive.read(write(tmp_path, tables), False)
    (row,) = np.flatnonzero((table.order == T) & (table.labels["watch_time"] == 5))
    got = row_of(table, row)
    expected = {
        "user_clicks": 3,
        "user_clicks_1h": 2,
        "user_clicks_1d": 3,
        "user_comments": 3,
        "user_likes": 3,
        "user_gifts": 0,
        "streamer_clicks": 0,
        "streamer_gifts": 3,
        "streamer_gifts_1h": 2,
        "streamer_gift_amount": 30,
        "room_gifts": 3,
        "room_gifts_10min": 1,
        "room_gift_amount": 30,
        "pair_clicks": 0,
        "pair_likes": 3,
        "pair_comments": 0,
        "pair_gifts": 0,
        "room_likes": 3,
        "user_since_click": 0.001,
        "streamer_since_gift": 0.001,
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(np.log1p(value)), name
    assert np.isnan(got["user_since_gift"])
    assert np.isnan(got["pair_since_click"])


def test_a_running_click_counts_with_the_time_elapsed(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks(
            (1, 10, 1, T, 777_000),  # its own watch time is an outcome
            (1, 20, 2, T - 10 * MINUTE, 4 * MINUTE),  # over
            (1, 20, 2, T - 2 * MINUTE, 10 * HOUR),  # runs
            (1, 10, 1, T - 90 * MINUTE, 40 * MINUTE),  # over; 10 of its minutes lie in the last hour
            (1, 10, 1, T - 5 * MINUTE, 5 * MINUTE),  # ends at t exactly: not known to be over before t
            (1, 10, 1, T - 3 * MINUTE, -124),  # of unknown duration
        )
    }
    got = features_at(tmp_path, tables)
    assert got["user_watch"] == pytest.approx(np.log1p((4 + 2 + 40 + 5) * 60))
    assert got["user_watch_1h"] == pytest.approx(np.log1p((4 + 2 + 10 + 5) * 60))
    assert got["pair_watch"] == pytest.approx(np.log1p((40 + 5) * 60))
    assert got["user_running"] == pytest.approx(np.log1p(2))
    assert got["room_running"] == pytest.approx(np.log1p(1))


def test_histories_count_orphans_at_their_own_time_and_no_later_gift_of_an_earlier_click(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks((1, 10, 1, T - HOUR, 5), (1, 10, 1, T, 5), (2, 20, 2, T, 5)),
        "gift": gifts(
            (1, 30, 1, T - 2 * HOUR, 100),  # an orphan: that room was never clicked
            (1, 10, 1, T + 1, 5000),  # by last touch of the click at t, hence in no feature of either
            (2, 10, 1, T - 1, 7),
        ),
    }
    got = features_at(tmp_path, tables)
    assert got["user_gift_amount"] == got["pair_gift_amount"] == pytest.approx(np.log1p(100))
    assert got["pair_since_gift"] == pytest.approx(np.log1p(7200))
    assert got["streamer_gift_amount"] == pytest.approx(np.log1p(107))
    assert got["room_gifts"] == pytest.approx(np.log1p(1))


def test_only_a_room_start_before_the_click_is_known(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks((1, 10, 1, T, 5), (1, 20, 2, T + 1, 5), (1, 30, 3, T + 2, 5), (1, 40, 4, T + 3, 5)),
        "room": rooms(
            *((10, T - 2 * MINUTE, 1, "shop"), (10, T - 5 * MINUTE, 2, "game"), (10, T, 3, "chat")),
            *((20, T + 1, 1, "shop"), (30, -124, 4, "game")),
        ),
    }
    got = features_at(tmp_path, tables)
    assert (got["room_live_type"], got["room_live_content_category"]) == ("1", "shop")
    assert got["room_age"] == pytest.approx(np.log1p(120))
    for at, live_type in ((T + 1, None), (T + 2, "4"), (T + 3, None)):  # too late; unknown start; unknown room
        other = features_at(tmp_path, tables, at=at)
        assert np.isnan(other["room_age"])
        assert other["room_live_type"] == live_type


@pytest.mark.parametrize(
    ("at", "weekday", "hour"),
    [(MIDNIGHT, "Monday", 0.0), (MIDNIGHT - 1, "Sunday", 24.0), (MIDNIGHT + 18 * HOUR, "Monday", 18.0)],
)
def test_clock_is_beijing_time(tmp_path: Path, at: int, weekday: str, hour: float) -> None:
    got = features_at(tmp_path, hand_written() | {"click": clicks((1, 10, 1, at, 5))}, at=at)
    assert got["weekday"] == weekday
    assert got["hour_sin"] == pytest.approx(np.sin(hour / 12 * np.pi), abs=1e-6)
    assert got["hour_cos"] == pytest.approx(np.cos(hour / 12 * np.pi), abs=1e-6)


def test_dates_of_the_profile_count_from_beijing_midnight_once_past(tmp_path: Path) -> None:
    tables = hand_written() | {"click": clicks((1, 10, 1, T, 5), (2, 10, 1, T, 5), (3, 10, 1, T, 5))}
    tables["user"]["reg_timestamp"] = ["2025-05-07", "2025-05-09"]
    tables["user"]["first_watch_live_timestamp"] = [str(T - DAY), "-124"]
    tables["user"]["onehot_feat0"] = [1, -124]
    first, second, third = (features_at(tmp_path, tables, user=user) for user in (1, 2, 3))
    assert first["user_registered_days"] == pytest.approx(np.log1p(1.5))
    assert first["user_first_watch_days"] == pytest.approx(np.log1p(1.0))
    assert first["user_onehot_feat0"] == 1.0
    for other in (second, third):  # a later or missing date; no profile
        assert np.isnan(
            [other["user_registered_days"], other["user_first_watch_days"], other["user_onehot_feat0"]]
        ).all()
    assert third["user_gender"] is None


# ------------------------------------------------------------------------------------------- the table itself


def test_every_feature_has_a_meaning_in_one_line(tmp_path: Path) -> None:
    table = kuailive.read(write(tmp_path, random_tables(1)), True)
    numeric, categorical = features.numeric_meanings(), features.categorical_meanings(True)
    assert tuple(numeric) == table.numeric_names
    assert tuple(categorical) == tuple(table.categorical)
    for meaning in (*numeric.values(), *categorical.values()):
        assert meaning
        assert "\n" not in meaning
    assert len(set(numeric.values())) == len(numeric)
    assert not set(numeric) & set(categorical)


def test_the_matrix_is_written_once_column_by_column(tmp_path: Path) -> None:
    table = kuailive.read(write(tmp_path, random_tables(1)), False)
    assert table.numeric.dtype == np.float32
    assert table.numeric.flags.f_contiguous
    assert not np.isinf(table.numeric).any()
    never_missing = [name for name in table.numeric_names if not name.endswith("_days")]
    never_missing = [n for n in never_missing if "_since_" not in n and "onehot" not in n and "_is_" not in n]
    never_missing.remove("room_age")
    places = [table.numeric_names.index(name) for name in never_missing]
    assert not np.isnan(table.numeric[:, places]).any()
    for column in table.categorical.values():
        assert column.codes.dtype == np.int32
        assert column.codes.min() >= -1
        assert column.codes.max() < len(column.levels)


def test_features_do_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    frames = random_tables(9)
    for name, columns in (("user", ("user", False)), ("streamer", ("streamer", False)), ("room", ("room", False))):
        for column in features.profile_columns(*columns):
            text = frames[name][column].astype(str).replace({"-124": None, "": None})
            frames[name][column] = pd.Categorical(text, categories=sorted(text.dropna().unique()))
    straight = built(frames)
    order = rng.permutation(len(frames["click"]))
    mixed = built(frames | {"click": frames["click"].iloc[order].reset_index(drop=True)})
    np.testing.assert_array_equal(mixed.numeric, straight.numeric[order])


def test_keys_that_would_not_fit_are_refused() -> None:
    Axis(0, 2**40, 2**20)
    with pytest.raises(InputError, match="expected one period in Unix milliseconds"):
        Axis(0, 2**40, 2**23)
