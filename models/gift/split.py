"""Which row belongs to which role: by local day, by time, by group, or by the content of the row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from models.gift.data import RawTable, Split
from models.trainer import ROLES, InputError, Role

CHUNK_ROWS = 10_000  # temporaries fit the cache; at powers of two columns would crowd into the same of its sets
Rows = np.ndarray | slice


@dataclass(frozen=True)
class Assignment:
    """`rows` of each role in file order (a slice where they lie together); `ranges` are for people."""

    rows: dict[Role, Rows]
    counts: dict[Role, int]
    ranges: dict[Role, str]


def assign(raw: RawTable, split: Split) -> Assignment:
    """Gives every row a role. Raises InputError where a time is missing or there are too few days."""
    if split.by in ("day", "time"):
        if raw.order is None:
            raise InputError(f"split.by: {split.by} needs data with a time, got none; name split.column")
        if split.by == "day" and not raw.facts.get("order_is_time", True):
            # taken for ms, seconds or dates such as 20250505 would all lie on a few days of 1970
            raise InputError(
                f"split.by: day: expected ms since the epoch or dates in {split.column}, got whole numbers as low "
                f"as {int(np.min(raw.order))}; convert them, or use `time`"
            )
        return _by_time(raw, split)
    if split.by == "group":
        keys = raw.split_key if raw.split_key is not None else mix(raw.unit.astype(np.uint64))
    else:
        keys = content_hash(raw)
    shares = np.cumsum([split.train, split.valid, split.calibrate])
    bounds = np.array([int(share * 2.0**53) << 11 for share in shares], np.uint64)
    roles = np.searchsorted(bounds, keys, side="right").astype(np.int8)
    what = {"group": "groups", "hash": "row contents"}[split.by]
    return _collect(roles, {r: f"{getattr(split, r):.0%} of the {what}" for r in ROLES})


def _by_time(raw: RawTable, split: Split) -> Assignment:
    order = np.asarray(raw.order)
    if not len(order):
        return _collect(np.zeros(0, np.int8), dict.fromkeys(ROLES, "no rows"))
    bounds = _day_bounds(order, split) if split.by == "day" else _time_bounds(order, split)
    roles = np.searchsorted(np.array(bounds, np.int64), order, side="right").astype(np.int8)
    zone = ZoneInfo(split.timezone)
    is_time = split.by == "day" or bool(raw.facts.get("order_is_time", True))
    edges: list[Any] = [int(order.min()), *bounds, int(order.max())]
    text = [_moment(edge, zone) if is_time else str(edge) for edge in edges]
    ranges = {
        role: f"{text[i]} .. {text[i + 1]}" + (" (included)" if i == len(ROLES) - 1 else "")
        for i, role in enumerate(ROLES)
    }
    return _collect(roles, ranges)


def _moment(milliseconds: int, zone: ZoneInfo) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone(zone).isoformat(timespec="seconds")


def _day_bounds(order: np.ndarray, split: Split) -> list[int]:
    """First moments of valid, calibrate and test. Shares are of the local days that have rows."""
    midnights = local_midnights(int(order.min()), int(order.max()), split.timezone)
    day = np.searchsorted(midnights, order, side="right") - 1
    present = np.unique(day)
    n = len(present)
    if n < 3:
        raise InputError(f"split.by: expected rows on at least 3 days for `day`, got {n}; use `time` or `hash`")
    first = min(max(round(split.train * n), 1), n - 2)
    last = min(max(round((1.0 - split.test) * n), first + 1), n - 1)
    valid, test = int(midnights[present[first]]), int(midnights[present[last]])
    # The validation period is shared out by time, not by day: three days rarely divide otherwise.
    share = split.valid / (split.valid + split.calibrate)
    return [valid, valid + round((test - valid) * share), test]


def _time_bounds(order: np.ndarray, split: Split) -> list[int]:
    """First moments of valid, calibrate and test. Shares are of the rows; equal times stay on one side."""
    shares = np.cumsum([split.train, split.valid, split.calibrate])
    ranks = np.clip(np.round(shares * len(order)).astype(np.int64), 0, len(order) - 1)
    return [int(value) for value in np.partition(order, ranks)[ranks]]


def local_midnights(first_ms: int, last_ms: int, timezone: str) -> np.ndarray:
    """The local midnights (ms since the epoch) from the day of `first_ms` to the day after `last_ms`."""
    zone = ZoneInfo(timezone)
    day = datetime.fromtimestamp(first_ms / 1000, UTC).astimezone(zone).date()
    end = datetime.fromtimestamp(last_ms / 1000, UTC).astimezone(zone).date() + timedelta(days=1)
    midnights = []
    while day <= end:
        midnights.append(round(datetime.combine(day, time(), zone).timestamp() * 1000))
        day += timedelta(days=1)
    return np.array(midnights, np.int64)


def local_days(order: np.ndarray, timezone: str) -> np.ndarray:
    """[N] int64 number of the local day of each time (ms since the epoch), counted from that of the first."""
    midnights = local_midnights(int(order.min()), int(order.max()), timezone)
    return np.searchsorted(midnights, order, side="right").astype(np.int64) - 1


def _collect(roles: np.ndarray, ranges: dict[Role, str]) -> Assignment:
    rows: dict[Role, Rows] = {}
    counts: dict[Role, int] = {}
    for code, role in enumerate(ROLES):
        index = np.flatnonzero(roles == code)
        counts[role] = len(index)
        together = len(index) and index[-1] - index[0] + 1 == len(index)
        rows[role] = slice(int(index[0]), int(index[-1]) + 1) if together else index
    return Assignment(rows, counts, ranges)


def chunks(rows: Rows, size: int = CHUNK_ROWS) -> Iterator[Rows]:
    """The same rows in pieces of at most `size`."""
    if isinstance(rows, slice):
        for start in range(rows.start, rows.stop, size):
            yield slice(start, min(start + size, rows.stop))
    else:
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on [N] uint64: a fixed hash, equal on every machine."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def level_hashes(levels: tuple[str, ...]) -> np.ndarray:
    """[L + 1] uint64: a hash per level, and one for "missing" at the end (where code -1 finds it)."""
    return np.array([*(text_hash(f"={level}") for level in levels), text_hash("missing")], np.uint64)


def content_hash(raw: RawTable) -> np.ndarray:
    """[N] uint64 hash of the feature values: equal rows get equal hashes, whatever the columns' order."""
    n = len(raw.unit)
    keys = np.zeros(n, np.uint64)
    numeric = sorted(range(len(raw.numeric_names)), key=raw.numeric_names.__getitem__)
    salts = {name: np.uint64(text_hash(name)) for name in (*raw.numeric_names, *raw.categorical)}
    for start in range(0, n, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, n))
        block, key = np.array(raw.numeric[rows], np.float32), keys[rows]
        block[block == 0] = 0.0  # -0.0 equals 0.0 but has other bits
        block[np.isnan(block)] = np.nan
        for column in numeric:
            bits = np.ascontiguousarray(block[:, column]).view(np.uint32).astype(np.uint64)
            key = mix(key ^ bits ^ salts[raw.numeric_names[column]])
        keys[rows] = key
    for name in sorted(raw.categorical):
        column = raw.categorical[name]
        keys = mix(keys ^ level_hashes(column.levels)[column.codes] ^ salts[name])
    return keys
