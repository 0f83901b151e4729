"""A simulator of KuaiLive: seven CSV files with the schema, the quirks and the published statistics.

KuaiLive (arXiv 2508.05633; Zenodo 16565801, CC BY-NC-SA 4.0) cannot be shipped. What is simulated here is
calibrated to its published counts and distributions; no row of it was used. What was never published (most level
names and their shares, room durations, profile x behaviour) is invented: profiles are independent of behaviour,
except the counters of the snapshot. `simulated_world` holds the behaviour, this module the files.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from models.gift import simulated_world as world
from models.gift.simulated_world import Clicks, People, Rooms
from models.trainer import InputError

SIMULATOR_VERSION = 1
MARKER = "simulated.json"
SCALES = (0.001, 1.0)
MISSING = -124  # KuaiLive's sentinel in live_type and in the streamers' one-hot features

# Shares of the quirks. 5 % of events have no earlier click of their user and room, 7 % of gifts come after the
# watch ended (12 % of gifts outside the watch window, as audited), 86 % of the attributed ones at their click.
ORPHANS, GIFT_LATE, GIFT_AT_CLICK = 0.055, 0.07, 0.93

AGES = ("12-17", "18-23", "24-30", "31-40", "41-49", "50-59", "60+")
BRANDS = (
    *("APPLE", "HUAWEI", "OPPO", "VIVO", "XIAOMI", "HONOR", "REDMI", "REALME", "SAMSUNG", "ONEPLUS", "MEIZU"),
    *("IQOO", "NUBIA", "LENOVO", "ZTE", "DESKTOP"),
)
TAGS = (
    *("Relationship", "Music", "Dance", "Talk", "Game", "Shop", "Food", "Outdoor", "Sport", "Crafts", "Pets"),
    *("Education", "Other"),
)
TENS = (0, 10, 100, 1000, 10_000, 100_000)


def _ranges(edges: tuple[int, ...], decay: float) -> dict[str, float]:
    """Range strings such as `0-10`, `10-100`, `100+`, each `decay` times as frequent as the one before."""
    names = [f"{low}-{high}" for low, high in pairwise(edges)] + [f"{edges[-1]}+"]
    return {name: decay**i for i, name in enumerate(names)}


COMMON = {
    "country": {"China": 99.2, "Vietnam": 0.3, "Malaysia": 0.3, "America": 0.2},
    "device_brand": {brand: 0.75**i for i, brand in enumerate(BRANDS)},
}
# Levels and their shares (ages, genders as published, the rest invented), in the order of the file's columns.
# A string is a date column, from then to the first day. COUNTERS follow activity or popularity, noisily.
PROFILES: dict[str, dict[str, dict[str, float] | str]] = {
    "user": {
        "age": dict(zip(AGES, (16.93, 12.0, 14.0, 17.93, 18.0, 14.0, 7.14), strict=True)),
        "gender": {"M": 61.85, "F": 38.15},
        **COMMON,
        "device_price": _ranges((0, 1000, 2000, 3000, 5000), 0.8),
        "reg_timestamp": "2014-01-01",
        "fans_num": _ranges(TENS, 0.4),
        "follow_num": _ranges((0, 10, 100, 1000, 10_000), 0.9),
        "first_watch_live_timestamp": "2017-01-01",
        "accu_watch_live_cnt": _ranges((0, 50_000, 100_000, 200_000, 500_000), 0.4),
        "accu_watch_live_duration": _ranges((0, 10**9, 2 * 10**9, 5 * 10**9, 10**10, 2 * 10**10), 0.6),
        "is_live_streamer": {"0": 0.8, "1": 0.2},
        "is_photo_author": {"0": 0.3, "1": 0.7},
    },
    "streamer": {
        "gender": {"F": 62.83, "M": 37.17},
        "age": dict(zip(AGES, (0.93, 14.0, 22.0, 26.01, 20.0, 12.0, 5.06), strict=True)),
        **COMMON,
        "device_price": {"0": 0.1, **_ranges((1, 1000, 2000, 3000, 5000), 0.8)},
        "live_operation_tag": {tag: 0.85**i for i, tag in enumerate(TAGS)},
        "fans_user_num": _ranges((*TENS, 1_000_000, 10_000_000), 0.9),
        "fans_group_fans_num": _ranges((*TENS, 1_000_000), 0.4),
        "follow_user_num": _ranges((0, 10, 100, 1000, 5000), 0.7),
        "first_live_timestamp": "2016-01-01",
        "accu_live_cnt": _ranges((0, 10, 50, 100, 500, 1000, 5000), 1.0),
        "accu_live_duration": _ranges((0, *(10**k for k in range(5, 12))), 1.1),
        "accu_play_cnt": _ranges((0, *(10**k for k in range(2, 8))), 0.9),
        "accu_play_duration": _ranges((0, *(10**k for k in range(4, 14))), 1.0),
        "reg_timestamp": "2014-01-01",
    },
}
COUNTERS = {
    *("fans_num", "follow_num", "accu_watch_live_cnt", "accu_watch_live_duration", "fans_user_num"),
    *("fans_group_fans_num", "accu_live_cnt", "accu_live_duration", "accu_play_cnt", "accu_play_duration"),
}


def simulate(out: Path, scale: float, seed: int) -> dict[str, int]:
    """Write a simulated KuaiLive into the folder `out`; return the number of rows per file.

    Args:
        out: a folder that is absent, empty, or already holds this very simulation (which is then kept).
        scale: 0.001 to 1; of users, streamers and rooms together (1 = 23,772 users, 4.9 M clicks, 11.8 M rooms).
        seed: non-negative; decides everything random.

    Raises:
        InputError: scale or seed out of range, or `out` holds something else.

    Guarantees: the folder appears complete or not at all, also when several processes make it at once; the same
        (SIMULATOR_VERSION, scale, seed) gives the same bytes. Beside the CSV files lies `simulated.json`.
    """
    out = Path(out)
    if not SCALES[0] <= scale <= SCALES[1]:
        raise InputError(f"simulate: scale: expected {SCALES[0]} to {SCALES[1]} (got {scale}); choose one inside")
    if seed < 0:
        raise InputError(f"simulate: seed: expected a whole number >= 0 (got {seed})")
    identity = {"version": SIMULATOR_VERSION, "scale": float(scale), "seed": int(seed)}
    if (kept := _kept(out, identity)) is not None:
        return kept
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        rows = _write_files(temp, float(scale), int(seed))
        (temp / MARKER).write_text(json.dumps({**identity, "rows": rows}, indent=1) + "\n")
        _make_durable(temp)
        try:
            os.replace(temp, out)
        except OSError:
            if (kept := _kept(out, identity)) is None:  # else another process was faster
                raise
            return kept
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return rows


def _kept(out: Path, identity: dict[str, float]) -> dict[str, int] | None:
    """The rows of the simulation in `out` if it is the one asked for; None if the folder is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        marker = dict(json.loads((out / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{out}: expected a new or empty folder (it holds other files); choose another") from None
    if {key: marker.get(key) for key in identity} != identity:
        found = {key: marker.get(key) for key in identity}
        raise InputError(
            f"{out}: expected the simulation {identity} (got {found}); delete it or choose another folder"
        )
    if missing := [name for name in marker["rows"] if not (out / f"{name}.csv").exists()]:
        raise InputError(f"{out}: expected {len(marker['rows'])} CSV files (missing: {missing}); delete the folder")
    return marker["rows"]


def _make_durable(folder: Path) -> None:
    for path in [*sorted(folder.iterdir()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    folder.chmod(0o755)


def _write_files(folder: Path, scale: float, seed: int) -> dict[str, int]:
    def stream(stage: int) -> np.random.Generator:
        """One generator per stage, so that a change in one leaves the draws of the others alone."""
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SIMULATOR_VERSION, stage)))

    people = world.make_people(stream(0), scale)
    clicks = world.make_clicks(stream(1), people)
    world.choose_gifts(stream(2), people, clicks)
    world.watch(stream(3), people, clicks)
    world.stamp(stream(4), clicks)
    rooms = world.make_rooms(stream(5), people, clicks, scale)
    rows = {}
    rows["click"] = _write_clicks(folder, stream(6), people, clicks, rooms)
    for stage, (name, total, weight) in enumerate(
        (("comment", world.N_COMMENTS, 1.0), ("like", world.N_LIKES, 0.6))
    ):
        source = world.choose_reactions(
            stream(7 + stage), people, clicks, max(round(total * scale), len(people.clicks)), weight
        )
        rows[name] = _write_events(folder, name, stream(9 + stage), people, clicks, rooms, source)
    rows["gift"] = _write_events(
        folder, "gift", stream(11), people, clicks, rooms, clicks.gift_click, clicks.gift_price
    )
    rows["user"] = _write_profiles(folder, "user", stream(12), people.user_id, np.log(people.clicks))
    rows["streamer"] = _write_profiles(
        folder, "streamer", stream(13), people.streamer_id, np.log(people.popularity)
    )
    rows["room"] = _write_rooms(folder, stream(14), people, rooms)
    return rows


def _write_clicks(folder: Path, rng: np.random.Generator, people: People, clicks: Clicks, rooms: Rooms) -> int:
    columns = {
        "user_id": people.user_id[clicks.user],
        "live_id": rooms.live_id[clicks.room],
        "streamer_id": people.streamer_id[clicks.streamer],
        "timestamp": clicks.time,
        "watch_live_time": clicks.watch,
    }
    return _write_csv(folder / "click.csv", columns, rng)


def _write_events(
    folder: Path,
    name: str,
    rng: np.random.Generator,
    people: People,
    clicks: Clicks,
    rooms: Rooms,
    source: np.ndarray,
    price: np.ndarray | None = None,
) -> int:
    """Events of the clicks `source`; some are late, some come before their click or in a room never clicked."""
    n = len(source)
    watch, streamer, room = clicks.watch[source], clicks.streamer[source], clicks.room[source].copy()
    kind, spread = rng.random(n), rng.random(n)
    delay = (spread * watch).astype(np.int64)
    if price is not None:
        delay = np.where(rng.random(n) < GIFT_AT_CLICK, 0, (spread * 0.1 * watch).astype(np.int64))
        delay = np.where(kind > 1 - GIFT_LATE, watch + 1 + (spread * 60_000).astype(np.int64), delay)
    time = clicks.time[source] + delay
    early = kind < ORPHANS / 2
    time[early] = clicks.time[source][early] - 1 - (spread[early] * 5000).astype(np.int64)
    strange = np.flatnonzero((kind >= ORPHANS / 2) & (kind < ORPHANS))
    first, count = rooms.offset[streamer[strange]], np.diff(rooms.offset)[streamer[strange]]
    room[strange] = other = first + (rng.random(len(strange)) * count).astype(np.int64)
    time[strange] = rooms.start[other] + (spread[strange] * (rooms.end - rooms.start)[other]).astype(np.int64)
    columns = {
        "user_id": people.user_id[clicks.user[source]],
        "live_id": rooms.live_id[room],
        "streamer_id": people.streamer_id[streamer],
        "timestamp": np.clip(time, world.FIRST_MS, world.LAST_MS),
    }
    if price is not None:
        columns["gift_price"] = price
    return _write_csv(folder / f"{name}.csv", columns, rng)


def _write_rooms(folder: Path, rng: np.random.Generator, people: People, rooms: Rooms) -> int:
    """One row per room, and a second one for a few: the next day's, often with another title."""
    n = len(rooms.start)
    repeats = rng.choice(n, round(n * world.N_ROOM_REPEATS / world.N_ROOMS), replace=False)
    room = np.r_[np.arange(n), repeats]
    day = np.clip((rooms.start - world.START_MS) // world.DAY_MS, 0, 20)[room]
    day[n:] = np.minimum(day[n:] + (rng.random(len(repeats)) < 0.8), 20)
    first_day = dt.date(2025, 5, 5)
    dates = [int((first_day + dt.timedelta(days=d)).strftime("%Y%m%d")) for d in range(21)]
    title = np.where(rng.random(n) < 0.2, -1, rng.integers(0, n // 3 + 1, n))[room]
    renamed = n + np.flatnonzero(rng.random(len(repeats)) < 0.5)
    title[renamed] = rng.integers(0, n // 3 + 1, len(renamed))
    kind = rng.choice([1, 2, 3, MISSING], n, p=[0.9, 0.05, 0.03, 0.02])
    columns = {
        "p_date": np.array(dates)[day],
        "live_id": rooms.live_id[room],
        "streamer_id": people.streamer_id[rooms.streamer[room]],
        "live_type": kind[room],
        "start_timestamp": rooms.start[room],
        "end_timestamp": rooms.end[room],
        "live_content_category": _levels(rng, n, {"show": 0.6, "chat": 0.28, "shop": 0.12}).take(room),
        "live_name_id": title,
    }
    return _write_csv(folder / "room.csv", columns, rng)


def _levels(
    rng: np.random.Generator, n: int, shares: dict[str, float], score: np.ndarray | None = None
) -> pa.Array:
    """[n] category levels with these shares; with a `score`, its ranks decide, noisily, on the ordered levels."""
    edges = np.cumsum(list(shares.values()))
    u = rng.random(n)
    if score is not None:
        u = (np.argsort(np.argsort(score + rng.standard_normal(n), kind="stable"), kind="stable") + 0.5) / n
    codes = np.minimum(np.searchsorted(edges / edges[-1], u, side="right"), len(shares) - 1)
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), list(shares))


def _write_profiles(
    folder: Path, name: str, rng: np.random.Generator, identity: np.ndarray, activity: np.ndarray
) -> int:
    n = len(identity)
    columns: dict[str, np.ndarray | pa.Array] = {f"{name}_id": identity}
    for column, shares in PROFILES[name].items():
        if isinstance(shares, str):
            span = (dt.date(2025, 5, 5) - dt.date.fromisoformat(shares)).days
            day = np.datetime64(shares) + rng.integers(0, span, n)
            columns[column] = pa.array(day)
        else:
            columns[column] = _levels(rng, n, shares, activity if column in COUNTERS else None)
    for i in range(7):
        flags = (rng.random(n) < 0.1 + 0.1 * i).astype(np.int64)
        if name == "streamer":
            flags[rng.random(n) < 0.03] = MISSING
        columns[f"onehot_feat{i}"] = flags
    return _write_csv(folder / f"{name}.csv", columns, rng)


def _write_csv(path: Path, columns: dict[str, np.ndarray | pa.Array], rng: np.random.Generator) -> int:
    """Write the rows in a random order: none of KuaiLive's files is globally sorted."""
    table = pa.table(columns)
    table = table.take(pa.array(rng.permutation(table.num_rows)))
    with open(path, "wb") as file:
        file.write((",".join(table.column_names) + "\n").encode())
        pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=False, quoting_style="none"))
    return table.num_rows
