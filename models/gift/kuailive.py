"""KuaiLive: seven files -> one RawTable with a row per click.

Labels by last touch: a comment, like or gift belongs to the latest click of the same user in the same live
room at or before it. Events without such a click are orphans: counted in `facts`, in no label, but in every
history (`models.gift.features`), which counts events and never labels.

Source: the KuaiLive README and arXiv 2508.05633 for the schema; the quirks handled here (duplicate rooms, tied
timestamps, the sentinel -124, other column names, unsorted files) are those the published data show.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from models.gift import features
from models.gift.data import RawTable
from models.gift.kuailive_files import INTEGERS, SENTINEL, find_files, read_table
from models.trainer import InputError

LABEL_VERSION = 1  # raise it with any change of the last-touch rule below
_MISSING_TEXT = frozenset({"", str(SENTINEL), f"{SENTINEL}.0", "nan", "NaN", "None", "null"})
_log = logging.getLogger("models.gift")


def read(folder: Path, snapshot_features: bool) -> RawTable:
    """The clicks of a KuaiLive folder with past-only features and last-touch labels.

    Rows are ordered by (timestamp, user, live, streamer, watch time), whatever the order in the files. A
    missing watch time gives a NaN label. `snapshot_features` adds the profile counters, which were taken after
    the period. `split_key` is a hash of the user.

    Raises:
        InputError: missing folder, file or column; a malformed row (file and line); a file without rows.
    """
    frames, facts = read_frames(folder, snapshot_features)
    clicks = frames["click"]
    with ThreadPoolExecutor(1) as pool:
        labelling = pool.submit(last_touch_labels, frames)
        numeric, names, categorical = features.build(frames, snapshot_features)
        labels, facts["events"] = labelling.result()
    facts["label_version"], facts["features_version"] = LABEL_VERSION, features.FEATURES_VERSION
    user = clicks["user_id"].to_numpy()
    order = clicks["timestamp"].to_numpy()
    return RawTable(numeric, names, categorical, labels, user, order, _user_hash(user), facts)


def read_frames(folder: Path, snapshot_features: bool) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The raw tables by logical name, and facts about them.

    Guarantees: columns have their canonical names; ids, times and amounts are int64 (watch and start times hold
    the sentinel where missing); profile fields are categorical with their missing values unset, range strings
    in order; `click` is in row order; `user` and `streamer` have unique ids; `room` holds the clicked rooms
    alone, unique by (live_id, start_timestamp). Of a room that is there several times, all starts stay: which
    one counts for a click is the latest before it, as a later one is not known then.

    Raises:
        InputError: as `read`.
    """
    files = find_files(folder)
    facts: dict[str, Any] = {"rows": {}, "files": {name: path.name for name, path in files.items()}}
    frames: dict[str, pd.DataFrame] = {}
    with ThreadPoolExecutor(1) as pool:
        for name, path in files.items():
            started = time.perf_counter()
            table = read_table(path, name, features.profile_columns(name, snapshot_features))
            facts["rows"][name] = table.num_rows
            if name == "room":
                lives = pa.array(pd.unique(frames["click"]["live_id"]))
                table = table.filter(pc.is_in(table["live_id"], value_set=lives))
            frames[name] = _to_frame(table)
            if name == "click":
                ordering = pool.submit(_in_row_order, frames[name])  # while the other files are read
            _log.info(
                "%s: %d rows read in %.1f s", path.name, facts["rows"][name], time.perf_counter() - started,
                extra={"action": "file_read", "path": str(path)},
            )  # fmt: skip
    frames["click"] = ordering.result()
    facts["duplicates"] = {}
    for name, key in (("user", "user_id"), ("streamer", "streamer_id")):
        frames[name], facts["duplicates"][name] = _unique_profiles(frames[name], key)
    frames["room"], facts["duplicates"]["room"] = _unique_starts(frames["room"])
    facts |= _click_facts(frames)
    return frames, facts


# ---------------------------------------------------------------------------------------------- labels


def last_touch_labels(frames: Mapping[str, pd.DataFrame]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Labels of every click by last touch (LABEL_VERSION), and what became of the events.

    An event goes to the latest click of the same (user, live) with click time <= event time; among clicks that
    tie in all three, to the last in row order.

    Returns:
        labels: watch_time (ms, NaN where missing), has_comment, has_like, has_gift (0/1), gift_amount (sum of
            the prices, 0 where none), each [N] float64 in the row order of `frames["click"]`.
        events: per kind rows, attributed, orphans; for gifts the same of the sums of the prices.
    """
    clicks = frames["click"]
    n_clicks = len(clicks)
    watch = clicks["watch_live_time"].to_numpy()
    labels = {"watch_time": np.where(watch == SENTINEL, np.nan, watch).astype(np.float64)}
    facts: dict[str, Any] = {}
    touch = _LastTouch(clicks)
    for kind in ("comment", "like", "gift"):
        events = frames[kind]
        click = touch.click_of(events)
        hit = click >= 0
        counts = np.bincount(click[hit], minlength=n_clicks)
        labels[f"has_{kind}"] = (counts > 0).astype(np.float64)
        facts[kind] = _balance(kind, hit, np.ones(len(events), np.int64), int(counts.sum()), "")
        if kind == "gift":
            price = events["gift_price"].to_numpy()
            amount = np.zeros(n_clicks, np.int64)
            np.add.at(amount, click[hit], price[hit])
            labels["gift_amount"] = amount.astype(np.float64)
            facts[kind] |= _balance(kind, hit, price, int(amount.sum()), "_sum")
        told = ", ".join(f"{key} {value}" for key, value in facts[kind].items())
        _log.info("%s: %s", kind, told, extra={"action": "labelled"})
    return labels, facts


def _balance(kind: str, hit: np.ndarray, weight: np.ndarray, in_labels: int, suffix: str) -> dict[str, int]:
    """Attributed + orphans = rows of the file; `in_labels` is what really arrived in the labels."""
    total, orphans = int(weight.sum()), int(weight[~hit].sum())
    if in_labels + orphans != total:
        raise AssertionError(f"{kind}{suffix}: {in_labels} in labels + {orphans} orphans != {total} in the file")
    return {f"rows{suffix}": total, f"attributed{suffix}": in_labels, f"orphans{suffix}": orphans}


class _LastTouch:
    """Clicks sorted by (user, live, time, row), to be searched by events."""

    def __init__(self, clicks: pd.DataFrame) -> None:
        user_code, users = pd.factorize(clicks["user_id"].to_numpy())
        live_code, lives = pd.factorize(clicks["live_id"].to_numpy())
        session, sessions = pd.factorize(user_code.astype(np.int64) * len(lives) + live_code)
        self._users, self._lives, self._sessions = pd.Index(users), pd.Index(lives), pd.Index(sessions)
        self._times = _distinct(clicks["timestamp"].to_numpy())
        rank = np.searchsorted(self._times, clicks["timestamp"].to_numpy())
        key = session * len(self._times) + rank
        self._row = np.argsort(key, kind="stable")  # stable: among ties the last in row order comes last
        self._key = key[self._row]

    def click_of(self, events: pd.DataFrame) -> np.ndarray:
        """[M] row of the click that each event belongs to, -1 for orphans."""
        user = self._users.get_indexer(events["user_id"].to_numpy())
        live = self._lives.get_indexer(events["live_id"].to_numpy())
        pair = np.where((user < 0) | (live < 0), -1, user.astype(np.int64) * len(self._lives) + live)
        session = self._sessions.get_indexer(pair)
        rank = np.searchsorted(self._times, events["timestamp"].to_numpy(), side="right") - 1  # latest <= t
        position = np.searchsorted(self._key, session * len(self._times) + rank, side="right") - 1
        known = (session >= 0) & (rank >= 0) & (position >= 0)
        known &= self._key[np.maximum(position, 0)] // len(self._times) == session
        return np.where(known, self._row[np.maximum(position, 0)], -1)


def _distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, five times as fast on millions of nearly sorted integers as its hashing."""
    values = np.sort(values)
    return values[np.insert(np.diff(values) > 0, 0, True)]


# ---------------------------------------------------------------------------------------------- frames


def _to_frame(table: pa.Table) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_integer(column.type):
            columns[name] = column.to_numpy()
        else:
            columns[name] = _category(column)
    return pd.DataFrame(columns, copy=False)


def _category(column: pa.ChunkedArray) -> pd.Categorical:
    """A text column as ordered levels: ranges by their bounds, then words; missing texts unset."""
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all: no rows
        return pd.Categorical([])
    texts = [_level(text) for text in array.dictionary.to_pylist()]
    levels = sorted({text for text in texts if text is not None}, key=range_order)
    position = {text: code for code, text in enumerate(levels)}
    recode = np.array([-1 if text is None else position[text] for text in texts] + [-1], dtype=np.int32)
    codes = array.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(recode[codes], categories=pd.Index(levels, dtype=object), ordered=True)


def _level(text: str | None) -> str | None:
    """A field's text without what the file format did to it (`1.0`, `true`); None where missing."""
    if text is None or text.strip() in _MISSING_TEXT:
        return None
    text = text.strip()
    return {"true": "1", "false": "0"}.get(text) or (text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text)


def range_order(level: str) -> tuple[int, float, float, str]:
    """Sort key that puts ranges (`0`, `<10`, `10-100`, `5000+`) in numeric order, and words after them."""
    match = re.fullmatch(r"([<>]?)=?(\d+)(?:\s*[-~]\s*(\d+)|(\+))?", level)
    if match is None:
        return (1, 0.0, 0.0, level)
    sign, low, high, _ = match.groups()
    if sign == "<":
        return (0, -np.inf, float(low), level)
    open_ended = sign == ">" or match[4] is not None
    return (0, float(low), np.inf if open_ended else float(high or low), level)


def _in_row_order(clicks: pd.DataFrame) -> pd.DataFrame:
    """Sorted by (timestamp, user, live, streamer, watch time). One key of (time, user) sorts nearly everything;
    only its ties are compared further."""
    time_rank = clicks["timestamp"].to_numpy() - clicks["timestamp"].min()
    user, users = pd.factorize(clicks["user_id"].to_numpy(), sort=True)
    if int(time_rank.max()) >= 2**62 // len(users):
        raise InputError("click timestamps: expected one period in Unix milliseconds; correct the outlier")
    key = time_rank * len(users) + user
    order = np.argsort(key)
    repeated = np.diff(key[order]) == 0
    tied = np.flatnonzero(np.append(repeated, False) | np.insert(repeated, 0, False))
    rows = order[tied]
    ties = [clicks[name].to_numpy()[rows] for name in ("watch_live_time", "streamer_id", "live_id")]
    order[tied] = rows[np.lexsort([*ties, key[rows]])]
    return pd.DataFrame({name: clicks[name].to_numpy()[order] for name in clicks.columns}, copy=False)


def _unique_profiles(frame: pd.DataFrame, key: str) -> tuple[pd.DataFrame, int]:
    """One row per id. Which of several rows stays does not depend on their order in the file."""
    repeated = frame[key].duplicated(keep=False)
    if not repeated.any():
        return frame, 0
    fields = [frame[c].cat.codes if c != key else frame[c] for c in frame.columns]
    order = np.lexsort([np.asarray(values) for values in reversed(fields)])
    frame = frame.iloc[order]
    first = ~frame[key].duplicated()
    return frame[first].reset_index(drop=True), int((~first).sum())


def _unique_starts(room: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Rows unique by (live, start), and how many rows repeat a live. Which start counts for a click is decided
    by the click's time: the latest before it (`features`), as a later one is not known then."""
    fields = [room[c] if c in INTEGERS["room"] else room[c].cat.codes for c in room.columns]
    names = list(room.columns)
    keys = sorted(range(len(names)), key=lambda i: {"live_id": 2, "start_timestamp": 1}.get(names[i], 0))
    room = room.iloc[np.lexsort([np.asarray(fields[i]) for i in keys])]
    same_live, same_start = (np.diff(room[name].to_numpy()) == 0 for name in ("live_id", "start_timestamp"))
    last = np.append(~(same_live & same_start), True)[: len(room)]
    return room[last].reset_index(drop=True), int(same_live.sum())


def _click_facts(frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    clicks = frames["click"]
    unknown = {}
    for name, key in (("user", "user_id"), ("streamer", "streamer_id"), ("room", "live_id")):
        unknown[name] = int((~clicks[key].isin(frames[name][key])).sum())
    times = clicks["timestamp"].to_numpy()
    return {
        "clicks_without": unknown,
        "clicks_tied_in_time": int((np.diff(times) == 0).sum()),
        "first_click": int(times[0]),
        "last_click": int(times[-1]),
    }


def _user_hash(user: np.ndarray) -> np.ndarray:
    """[N] uint64, splitmix64 of the user id."""
    x = user.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(31))
