"""A second, plain implementation of the features: one click at a time, filters with `<`, no cleverness.

It exists to disagree with `models.gift.features`: tests and `tuner data describe` recompute chosen clicks here
and compare. Only the names of columns are shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from models.gift.data import RawTable

_BEIJING = ZoneInfo("Asia/Shanghai")
_WINDOW_MS = {"10min": 600_000, "1h": 3_600_000, "1d": 86_400_000, "7d": 604_800_000}
_HISTORIES = """
user:     clicks clicks_1h clicks_1d gifts gifts_7d gift_amount gift_amount_7d comments likes
          watch watch_1h watch_1d running since_click since_gift
streamer: clicks clicks_1h gifts gifts_1h gifts_7d gift_amount gift_amount_7d comments likes
          watch since_click since_gift
pair:     clicks clicks_1d gifts gifts_7d gift_amount comments likes watch watch_1d since_click since_gift
room:     clicks clicks_10min gifts gifts_10min gift_amount comments likes running since_gift
"""
_FLAGS = {
    "user": ["is_live_streamer", "is_photo_author"] + [f"onehot_feat{i}" for i in range(7)],
    "streamer": [f"onehot_feat{i}" for i in range(7)],
}
_DATES = {
    "user": {"registered": "reg_timestamp", "first_watch": "first_watch_live_timestamp"},
    "streamer": {"registered": "reg_timestamp", "first_live": "first_live_timestamp"},
}


def features_of(
    frames: Mapping[str, pd.DataFrame], rows: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, list[str | None]]]:
    """Features of `frames["click"].iloc[rows]` from the raw tables.

    Returns:
        numeric: name -> [len(rows)] float64, NaN where missing.
        categorical: name -> the level's text per row, None where missing. Profile fields that the tables do not
            hold (counters, without snapshot features) are left out.
    """
    numeric: dict[str, list[float]] = {}
    categorical: dict[str, list[str | None]] = {}
    for row in rows:
        click = {name: int(value) for name, value in frames["click"].iloc[row].items()}
        for name, value in _numbers_of(frames, click).items():
            numeric.setdefault(name, []).append(value)
        for name, text in _texts_of(frames, click).items():
            categorical.setdefault(name, []).append(text)
    return {name: np.array(values) for name, values in numeric.items()}, categorical


def differences(table: RawTable, frames: Mapping[str, pd.DataFrame], rows: Sequence[int]) -> list[str]:
    """What differs between `table` (the fast implementation) and this one, a line each; empty = they agree.

    Numbers agree within float32's precision. A feature that only one of the two knows is a difference.
    """
    numeric, categorical = features_of(frames, rows)
    one_only = (set(numeric) ^ set(table.numeric_names)) | (set(categorical) ^ set(table.categorical))
    faults = [f"{name}: in one implementation only" for name in sorted(one_only)]
    for place, name in enumerate(table.numeric_names):
        fast = np.asarray(table.numeric[list(rows), place], dtype=np.float64)
        plain = numeric.get(name, fast)
        same = np.isclose(fast, plain, rtol=1e-5, atol=1e-6, equal_nan=True)
        for i in np.flatnonzero(~same).tolist():
            faults.append(f"row {rows[i]}: {name}: fast {fast[i]:g}, plain {plain[i]:g}")
    for name, column in table.categorical.items():
        for i, text in enumerate(categorical.get(name, [])):
            code = int(column.codes[rows[i]])
            fast_text = column.levels[code] if code >= 0 else None
            if fast_text != text:
                faults.append(f"row {rows[i]}: {name}: fast {fast_text!r}, plain {text!r}")
    return faults


def _numbers_of(frames: Mapping[str, pd.DataFrame], click: dict[str, int]) -> dict[str, float]:
    t = click["timestamp"]
    values: dict[str, float] = {}
    for line in _HISTORIES.replace("\n      ", " ").split("\n"):
        group, _, features = line.partition(":")
        if group:
            past = {kind: _past(frames[kind], group, click) for kind in ("click", "gift", "comment", "like")}
            for feature in features.split():
                values[f"{group}_{feature}"] = math.log1p(_history(past, feature, t))
    room = _room_row(frames["room"], click)
    known = room is not None and room["start_timestamp"] >= 0
    values["room_age"] = math.log1p((t - room["start_timestamp"]) / 1000) if known else math.nan
    now = datetime.fromtimestamp(t / 1000, tz=_BEIJING)
    hours = now.hour + now.minute / 60 + (now.second + now.microsecond / 1e6) / 3600
    values["hour_sin"] = math.sin(hours / 24 * 2 * math.pi)
    values["hour_cos"] = math.cos(hours / 24 * 2 * math.pi)
    for name in ("user", "streamer"):
        profile = _profile_row(frames[name], f"{name}_id", click)
        for event, column in _DATES[name].items():
            date = _date_ms(profile.get(column))
            values[f"{name}_{event}_days"] = math.log1p((t - date) / 86_400_000 if date < t else math.nan)
        for column in _FLAGS[name]:
            text = profile.get(column)
            values[f"{name}_{column}"] = math.nan if text is None else float(text)
    return values


def _past(events: pd.DataFrame, group: str, click: dict[str, int]) -> pd.DataFrame:
    """The group's events strictly before the click."""
    mine = events["timestamp"] < click["timestamp"]
    if group in ("user", "pair"):
        mine &= events["user_id"] == click["user_id"]
    if group in ("streamer", "pair"):
        mine &= events["streamer_id"] == click["streamer_id"]
    if group == "room":
        mine &= events["live_id"] == click["live_id"]
    return events[mine]


def _history(past: dict[str, pd.DataFrame], feature: str, t: int) -> float:
    what, _, suffix = feature.rpartition("_")
    if what == "since":
        times = past[suffix]["timestamp"]
        return (t - times.max()) / 1000 if len(times) else math.nan
    window = _WINDOW_MS.get(suffix)
    what = what if window is not None else feature
    since = t - window if window is not None else -(10**18)
    if what == "watch":
        begin = past["click"]["timestamp"].to_numpy()
        end = np.minimum(begin + np.maximum(past["click"]["watch_live_time"].to_numpy(), 0), t)
        return float(np.maximum(end - np.maximum(begin, since), 0).sum()) / 1000
    if what == "running":
        watch = past["click"]["watch_live_time"].clip(lower=0)
        return int((past["click"]["timestamp"] + watch >= t).sum())
    kinds = {"clicks": "click", "gifts": "gift", "gift_amount": "gift", "comments": "comment", "likes": "like"}
    kind = kinds[what]
    recent = past[kind][past[kind]["timestamp"] >= since]
    return float(recent["gift_price"].sum()) if what == "gift_amount" else len(recent)


def _texts_of(frames: Mapping[str, pd.DataFrame], click: dict[str, int]) -> dict[str, str | None]:
    now = datetime.fromtimestamp(click["timestamp"] / 1000, tz=_BEIJING)
    texts: dict[str, str | None] = {"weekday": now.strftime("%A")}
    room = _room_row(frames["room"], click)
    for column in ("live_type", "live_content_category"):
        texts[f"room_{column}"] = None if room is None or pd.isna(room[column]) else str(room[column])
    for name in ("user", "streamer"):
        numeric = {f"{name}_id", *_FLAGS[name], *_DATES[name].values()}
        profile = _profile_row(frames[name], f"{name}_id", click)
        for column in frames[name].columns:
            if column not in numeric:
                texts[f"{name}_{column}"] = profile.get(column)
    return texts


def _room_row(room: pd.DataFrame, click: dict[str, int]) -> pd.Series | None:
    """The room's row with the latest start before the click."""
    rows = room[(room["live_id"] == click["live_id"]) & (room["start_timestamp"] < click["timestamp"])]
    return None if rows.empty else rows.sort_values("start_timestamp").iloc[-1]


def _profile_row(profile: pd.DataFrame, key: str, click: dict[str, int]) -> dict[str, str]:
    """The present fields of the profile as texts; none where the id has no profile."""
    rows = profile[profile[key] == click[key]]
    fields = {} if rows.empty else rows.iloc[0].drop(key).to_dict()
    return {column: str(value) for column, value in fields.items() if not pd.isna(value)}


def _date_ms(text: str | None) -> float:
    """Unix ms of a date in Beijing time, or of Unix ms as text; infinite (never past) where missing."""
    if text is None:
        return math.inf
    if text.isdigit() and len(text) > 8:
        return float(text)
    return datetime.fromisoformat(text).replace(tzinfo=_BEIJING).timestamp() * 1000
