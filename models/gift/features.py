"""Past-only features of KuaiLive clicks, whole columns at a time.

Everything a feature of a click at time t may use happened strictly before t: events with timestamp < t, rooms
and registrations that started before t. Ties are not past. A click's watch time is known only once it is over;
before that the click is running and counts with the time elapsed: at t it adds min(watch time, t - its start).
Histories count events by their own timestamp, never the labels of earlier clicks: a label may come from a gift
that is still to come. Room end times are never read.

The watch time elapsed by t is the sum over started clicks of (t - start) less that over ended clicks of
(t - end); within a window it is the difference of two such times. `models.gift.naive` computes the same numbers
the plain way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from models.gift.data import Categories
from models.gift.history import Axis, Events, Past
from models.gift.split import chunks
from models.trainer import InputError

FEATURES_VERSION = 1  # raise it with any change of a feature's value, name or order
SECOND, HOUR, DAY = 1_000, 3_600_000, 86_400_000  # ms
WINDOWS = {"10min": 10 * 60 * SECOND, "1h": HOUR, "1d": DAY, "7d": 7 * DAY}
BEIJING_OFFSET = 8 * HOUR  # no daylight saving time
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_log = logging.getLogger("models.gift")

_ALL = ""
# grouping -> (what, windows); `since` lists kinds of events instead
HISTORIES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "user": (
        ("clicks", (_ALL, "1h", "1d")),
        ("gifts", (_ALL, "7d")),
        ("gift_amount", (_ALL, "7d")),
        ("comments", (_ALL,)),
        ("likes", (_ALL,)),
        ("watch", (_ALL, "1h", "1d")),
        ("running", (_ALL,)),
        ("since", ("click", "gift")),
    ),
    "streamer": (
        ("clicks", (_ALL, "1h")),
        ("gifts", (_ALL, "1h", "7d")),
        ("gift_amount", (_ALL, "7d")),
        ("comments", (_ALL,)),
        ("likes", (_ALL,)),
        ("watch", (_ALL,)),
        ("since", ("click", "gift")),
    ),
    "pair": (
        ("clicks", (_ALL, "1d")),
        ("gifts", (_ALL, "7d")),
        ("gift_amount", (_ALL,)),
        ("comments", (_ALL,)),
        ("likes", (_ALL,)),
        ("watch", (_ALL, "1d")),
        ("since", ("click", "gift")),
    ),
    "room": (
        ("clicks", (_ALL, "10min")),
        ("gifts", (_ALL, "10min")),
        ("gift_amount", (_ALL,)),
        ("comments", (_ALL,)),
        ("likes", (_ALL,)),
        ("running", (_ALL,)),
        ("since", ("gift",)),
    ),
}
GROUPINGS = {
    "user": ("user_id",),
    "streamer": ("streamer_id",),
    "pair": ("user_id", "streamer_id"),
    "room": ("live_id",),
}
_FLAGS = {
    "user": ("is_live_streamer", "is_photo_author", *(f"onehot_feat{i}" for i in range(7))),
    "streamer": tuple(f"onehot_feat{i}" for i in range(7)),
}
_DATES = {
    "user": {"reg_timestamp": "registered", "first_watch_live_timestamp": "first_watch"},
    "streamer": {"reg_timestamp": "registered", "first_live_timestamp": "first_live"},
}
_PROFILE = {
    "user": ("age", "gender", "country", "device_brand", "device_price"),
    "streamer": ("age", "gender", "country", "device_brand", "device_price", "live_operation_tag"),
}
_SNAPSHOT = {  # counters of the last day: the future of nearly every click
    "user": ("fans_num", "follow_num", "accu_watch_live_cnt", "accu_watch_live_duration"),
    "streamer": (
        *("fans_user_num", "fans_group_fans_num", "follow_user_num", "accu_live_cnt"),
        *("accu_live_duration", "accu_play_cnt", "accu_play_duration"),
    ),
}
_ROOM = ("live_type", "live_content_category")


def profile_columns(name: str, snapshot_features: bool) -> tuple[str, ...]:
    """The text columns of file `name` that the features need."""
    if name == "room":
        return _ROOM
    if name not in _PROFILE:
        return ()
    snapshot = _SNAPSHOT[name] if snapshot_features else ()
    return (*_PROFILE[name], *_FLAGS[name], *_DATES[name], *snapshot)


def numeric_meanings() -> dict[str, str]:
    """Every numeric feature in column order, with its meaning in one line (t = the click's time)."""
    return dict(_numeric_meanings())


def _numeric_meanings() -> Iterator[tuple[str, str]]:
    subject = {"user": "user", "streamer": "streamer", "pair": "user with this streamer", "room": "room"}
    what = {
        "clicks": "log1p of the clicks",
        "gifts": "log1p of the gifts",
        "gift_amount": "log1p of the money in gifts",
        "comments": "log1p of the comments",
        "likes": "log1p of the likes",
        "watch": "log1p of the seconds watched (running clicks: elapsed so far)",
        "running": "log1p of the clicks still being watched just before t",
    }
    for group, histories in HISTORIES.items():
        for kind, windows in histories:
            for window in windows:
                if kind == "since":
                    text = f"log1p of the seconds since the last {window} of the {subject[group]}; missing: none"
                else:
                    past = f"in the {window} before t" if window else "before t"
                    text = f"{what[kind]} of the {subject[group]}" + ("" if kind == "running" else f", {past}")
                yield feature_name(group, kind, window), text
    yield "room_age", "log1p of the seconds since the latest known start of the room; missing: none before t"
    yield "hour_sin", "sine of the Beijing time of day"
    yield "hour_cos", "cosine of the Beijing time of day"
    for name in ("user", "streamer"):
        for column, event in _DATES[name].items():
            yield (
                f"{name}_{event}_days",
                f"log1p of the days since {column} of the {name}; missing: none before t",
            )
    for name in ("user", "streamer"):
        for column in _FLAGS[name]:
            yield f"{name}_{column}", f"{column} of the {name}'s profile, as it is"


def categorical_meanings(snapshot_features: bool) -> dict[str, str]:
    """Every categorical feature in order, with its meaning in one line."""
    meanings = {"weekday": "Beijing day of the week"}
    for name in ("user", "streamer"):
        meanings |= {f"{name}_{column}": f"{column} of the {name}'s profile" for column in _PROFILE[name]}
    meanings |= {f"room_{column}": f"{column} of the room" for column in _ROOM}
    for name in ("user", "streamer") if snapshot_features else ():
        text = "of the {}'s profile, a snapshot taken after the period (ordered ranges)"
        meanings |= {f"{name}_{column}": f"{column} {text.format(name)}" for column in _SNAPSHOT[name]}
    return meanings


def families() -> dict[str, tuple[str, ...]]:
    """The features, numeric and categorical, by what they tell of; all that `build` can make are there once."""
    found: dict[str, list[str]] = {}
    for group, histories in HISTORIES.items():
        names = [feature_name(group, kind, window) for kind, windows in histories for window in windows]
        found[f"{group} history"] = names
    found["room"] = ["room_age", *(f"room_{column}" for column in _ROOM)]
    found["time"] = ["hour_sin", "hour_cos", "weekday"]
    for name in ("user", "streamer"):
        columns = (*_FLAGS[name], *_PROFILE[name], *_SNAPSHOT[name])
        dates = [f"{name}_{event}_days" for event in _DATES[name].values()]
        found[f"{name} profile"] = [*dates, *(f"{name}_{column}" for column in columns)]
    return {family: tuple(names) for family, names in found.items()}


def feature_name(group: str, kind: str, window: str) -> str:
    """`user_clicks`, `user_clicks_1h`, `user_since_gift`."""
    return "_".join(part for part in (group, kind, window) if part)


def build(
    frames: Mapping[str, pd.DataFrame], snapshot_features: bool
) -> tuple[np.ndarray, tuple[str, ...], dict[str, Categories]]:
    """Features of every row of `frames["click"]` (the tables of `kuailive.read_frames`).

    Returns:
        numeric: [N, D] float32 in Fortran order, NaN where missing; names: [D]; categorical: name -> [N] codes.

    Raises:
        InputError: times too far apart for one period; a date or flag that cannot be read.
    """
    names = tuple(numeric_meanings())
    clicks = frames["click"]
    numeric = np.empty((len(clicks), len(names)), dtype=np.float32, order="F")
    column = {name: numeric[:, i] for i, name in enumerate(names)}
    with ThreadPoolExecutor(max_workers=2) as pool:  # numpy sorts and searches without the GIL
        histories = [pool.submit(_write_histories, group, frames, column) for group in HISTORIES]
        categorical = pool.submit(_write_rest, frames, column, snapshot_features).result()
        for done in histories:
            done.result()
    return numeric, names, {name: categorical[name] for name in categorical_meanings(snapshot_features)}


# ---------------------------------------------------------------------------------------------- histories


def _write_histories(group: str, frames: Mapping[str, pd.DataFrame], column: Mapping[str, np.ndarray]) -> None:
    started = time.perf_counter()
    codes, event_codes, n_groups = _group_codes(group, frames)
    clicks = frames["click"]
    times = clicks["timestamp"].to_numpy()
    event_times = {kind: frames[kind]["timestamp"].to_numpy() for kind in event_codes}
    first = min(int(t.min()) for t in (times, *event_times.values()) if len(t))
    axis = Axis(first, int(times.max()), n_groups)

    key = codes * axis.span + axis.relative(times)
    order = np.argsort(key)
    now = axis.relative(times)[order]
    base = key[order] - now
    # a click of unknown duration (the sentinel) counts as over at once
    ends = times + np.clip(clicks["watch_live_time"].to_numpy(), 0, axis.span)
    events = {"click": Events(axis, codes, times), "end": Events(axis, codes, ends)}
    for kind, code in event_codes.items():
        price = frames[kind]["gift_price"].to_numpy() if kind == "gift" else None
        events[kind] = Events(axis, code, event_times[kind], price)
    for rows in chunks(slice(0, len(order))):  # small enough for temporaries to stay in the cache
        past = {kind: Past(table, base[rows], now[rows]) for kind, table in events.items()}
        for kind, windows in HISTORIES[group]:
            for window in windows:
                column[feature_name(group, kind, window)][order[rows]] = np.log1p(_history(past, kind, window))
    _log.info(
        "features: %s histories in %.1f s", group, time.perf_counter() - started, extra={"action": "features"}
    )


def _history(past: Mapping[str, Past], kind: str, window: str) -> np.ndarray:
    if kind == "since":
        return past[window].since_last() / SECOND
    window_ms = WINDOWS.get(window)
    if kind == "gift_amount":
        return past["gift"].value(window_ms)
    if kind == "watch":
        return (past["click"].lapse(window_ms) - past["end"].lapse(window_ms)) / SECOND
    if kind == "running":
        # a click that ends at t exactly still runs just before t
        return past["click"].count(None) - past["end"].count(None)
    return past[kind.removesuffix("s")].count(window_ms)


def _group_codes(group: str, frames: Mapping[str, pd.DataFrame]) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Dense int64 codes of the clicks' groups; of the events' groups, -1 where no click has that group."""
    columns = GROUPINGS[group]
    code, levels = pd.factorize(frames["click"][columns[0]].to_numpy())
    codes = code.astype(np.int64)
    events = {
        kind: pd.Index(levels).get_indexer(frames[kind][columns[0]].to_numpy()).astype(np.int64)
        for kind in ("gift", "comment", "like")
    }
    n_groups = len(levels)
    for column in columns[1:]:
        code, levels = pd.factorize(frames["click"][column].to_numpy())
        joint, joint_levels = pd.factorize(codes * len(levels) + code)
        index, joint_index = pd.Index(levels), pd.Index(joint_levels)
        for kind, left in events.items():
            right = index.get_indexer(frames[kind][column].to_numpy())
            both = np.where((left < 0) | (right < 0), -1, left * len(levels) + right)
            events[kind] = joint_index.get_indexer(both).astype(np.int64)
        codes, n_groups = joint.astype(np.int64), len(joint_levels)
    return codes, events, n_groups


# ---------------------------------------------------------------------------------------------- the rest


def _write_rest(
    frames: Mapping[str, pd.DataFrame], column: Mapping[str, np.ndarray], snapshot_features: bool
) -> dict[str, Categories]:
    started = time.perf_counter()
    categorical = _write_clock(frames["click"]["timestamp"].to_numpy(), column)
    for name in ("user", "streamer"):
        categorical |= _write_profile(name, frames, column, snapshot_features)
    categorical |= _write_room(frames, column)
    _log.info("features: profiles and rooms in %.1f s", time.perf_counter() - started, extra={"action": "features"})
    return categorical


def _write_clock(times: np.ndarray, column: Mapping[str, np.ndarray]) -> dict[str, Categories]:
    local = times + BEIJING_OFFSET
    angle = (local % DAY) * (2 * np.pi / DAY)
    column["hour_sin"][:], column["hour_cos"][:] = np.sin(angle), np.cos(angle)
    weekday = (local // DAY + 3) % 7  # 1970-01-01 was a Thursday
    return {"weekday": Categories(weekday.astype(np.int32), WEEKDAYS)}


def _write_profile(
    name: str, frames: Mapping[str, pd.DataFrame], column: Mapping[str, np.ndarray], snapshot_features: bool
) -> dict[str, Categories]:
    profile, clicks = frames[name], frames["click"]
    code, ids = pd.factorize(clicks[f"{name}_id"].to_numpy())
    row = pd.Index(profile[f"{name}_id"]).get_indexer(ids)[code]  # -1: no profile
    times = clicks["timestamp"].to_numpy()
    for date, event in _DATES[name].items():
        start = _per_row(profile[date], _dates_ms(profile[date], f"{name}.{date}"), row)
        past = start < times
        column[f"{name}_{event}_days"][:] = np.log1p(np.where(past, (times - start) / DAY, np.nan))
    for flag in _FLAGS[name]:
        column[f"{name}_{flag}"][:] = _per_row(profile[flag], _numbers(profile[flag], f"{name}.{flag}"), row)
    wanted = (*_PROFILE[name], *(_SNAPSHOT[name] if snapshot_features else ()))
    return {f"{name}_{field}": _categories(profile[field], row) for field in wanted}


def _write_room(frames: Mapping[str, pd.DataFrame], column: Mapping[str, np.ndarray]) -> dict[str, Categories]:
    """Of a room's rows, the latest start before the click counts (an unknown start is the earliest)."""
    times = frames["click"]["timestamp"].to_numpy()
    room = frames["room"]
    if room.empty:
        row = np.full(len(times), -1)
    else:
        code, lives = pd.factorize(frames["click"]["live_id"].to_numpy())
        start = room["start_timestamp"].to_numpy()
        starts = np.sort(start)  # ranks instead of times: a wild start cannot overflow a key
        key = pd.Index(lives).get_indexer(room["live_id"].to_numpy()) * len(starts)
        key = key + np.searchsorted(starts, start)
        by_start = np.argsort(key)
        asked = code * len(starts) + np.searchsorted(starts, times) - 1  # the last start before the click
        position = np.searchsorted(key[by_start], asked, side="right") - 1
        row = by_start[np.maximum(position, 0)]
        row = np.where((position >= 0) & (key[row] // len(starts) == code), row, -1)
    start_or_nan = np.append(room["start_timestamp"].to_numpy().astype(np.float64), np.nan)
    start_or_nan[start_or_nan < 0] = np.nan
    column["room_age"][:] = np.log1p((times - start_or_nan[row]) / SECOND)
    return {f"room_{field}": _categories(room[field], row) for field in _ROOM}


def _categories(field: pd.Series, row: np.ndarray) -> Categories:
    codes = np.append(field.cat.codes.to_numpy().astype(np.int32), np.int32(-1))
    return Categories(codes[row], tuple(str(level) for level in field.cat.categories))


def _per_row(field: pd.Series, level_values: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[N] float64: the value of the field's level, NaN where field or profile is missing."""
    codes = np.append(field.cat.codes.to_numpy().astype(np.int64), -1)
    return np.append(level_values, np.nan)[codes[row]]


def _numbers(field: pd.Series, where: str) -> np.ndarray:
    levels = list(field.cat.categories)
    try:
        return np.array([float(level) for level in levels], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{where}: expected numbers, got {error.args[0].partition(': ')[2]}") from error


def _dates_ms(field: pd.Series, where: str) -> np.ndarray:
    """[L] float64: Unix ms of the levels, which are dates in Beijing time or Unix ms themselves."""
    levels = pd.Series(list(field.cat.categories), dtype=object)
    digits = levels.astype(str).str.fullmatch(r"\d{11,14}")
    values = np.full(len(levels), np.nan)
    values[digits] = levels[digits].astype(np.int64)
    try:
        dates = pd.to_datetime(levels[~digits].astype(str), format="ISO8601").dt.tz_localize("Asia/Shanghai")
    except (ValueError, TypeError, AttributeError) as error:
        bad = next(iter(levels[~digits][pd.to_datetime(levels[~digits], errors="coerce").isna()]), "others")
        raise InputError(f"{where}: expected dates such as 2025-05-05, got {bad!r}") from error
    values[~digits] = dates.dt.as_unit("ms").astype(np.int64)
    return values
