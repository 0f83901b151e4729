"""Tiny KuaiLive folders with every quirk, written by hand or at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

MIDNIGHT = 1_746_374_400_000  # 2025-05-05 00:00 Beijing, a Monday
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
Tables = dict[str, pd.DataFrame]


def clicks(*rows: tuple[int, int, int, int, int]) -> pd.DataFrame:
    """(user, live, streamer, time, watch)"""
    names = ["user_id", "live_id", "streamer_id", "timestamp", "watch_live_time"]
    return pd.DataFrame(list(rows), columns=names, dtype="int64")


def events(*rows: tuple[int, int, int, int]) -> pd.DataFrame:
    """(user, live, streamer, time)"""
    return pd.DataFrame(list(rows), columns=["user_id", "live_id", "streamer_id", "timestamp"], dtype="int64")


def gifts(*rows: tuple[int, int, int, int, int]) -> pd.DataFrame:
    """(user, live, streamer, time, price)"""
    names = ["user_id", "live_id", "streamer_id", "timestamp", "gift_price"]
    return pd.DataFrame(list(rows), columns=names, dtype="int64")


def rooms(*rows: tuple[int, int, int, str]) -> pd.DataFrame:
    """(live, start, type, category)"""
    frame = pd.DataFrame(
        list(rows), columns=["live_id", "start_timestamp", "live_type", "live_content_category"]
    ).astype({"live_id": "int64", "start_timestamp": "int64", "live_type": "int64"})
    day = pd.to_datetime(frame["start_timestamp"].clip(lower=0), unit="ms").dt.strftime("%Y%m%d").astype("int64")
    frame.insert(0, "p_date", day)
    frame["streamer_id"] = frame["live_id"] // 10
    frame["end_timestamp"] = frame["start_timestamp"] + HOUR
    frame["live_name_id"] = -1
    return frame


def users(ids: list[int], rng: np.random.Generator) -> pd.DataFrame:
    n = len(ids)
    frame = pd.DataFrame({"user_id": ids})
    frame["gender"] = rng.choice(["M", "F"], n)
    frame["age"] = rng.choice(["18-23", "24-30", "<18", "50+", "-124"], n)
    frame["country"] = rng.choice(["China", "Japan", ""], n)
    frame["device_brand"] = rng.choice(["APPLE", "HUAWEI"], n)
    frame["device_price"] = rng.choice(["0", "0-1000", "1000-5000", "5000+"], n)
    frame["reg_timestamp"] = rng.choice(["2019-01-02", "2025-05-06", "-124"], n)
    frame["first_watch_live_timestamp"] = rng.choice(["2020-02-29", "2025-05-05"], n)
    frame["fans_num"] = rng.choice(["0-10", "10-100", "100-1000"], n)
    frame["follow_num"] = rng.choice(["10-100", "1000-10000"], n)
    frame["accu_watch_live_cnt"] = "0-50000"
    frame["accu_watch_live_duration"] = rng.choice(["0-1000000000", "1000000000+"], n)
    frame["is_live_streamer"] = rng.integers(0, 2, n)
    frame["is_photo_author"] = rng.integers(0, 2, n)
    for i in range(7):
        frame[f"onehot_feat{i}"] = rng.choice([0, 1, -124], n)
    return frame


def streamers(ids: list[int], rng: np.random.Generator) -> pd.DataFrame:
    n = len(ids)
    frame = pd.DataFrame({"streamer_id": ids})
    frame["gender"] = rng.choice(["M", "F"], n)
    frame["age"] = rng.choice(["18-23", "31-40"], n)
    frame["country"] = "China"
    frame["device_brand"] = rng.choice(["APPLE", "DESKTOP", "-124"], n)
    frame["device_price"] = rng.choice(["0", "5000+"], n)
    frame["live_operation_tag"] = rng.choice(["Relationship", "Game", ""], n)
    frame["reg_timestamp"] = rng.choice(["2018-07-01", "2025-05-07"], n)
    frame["first_live_timestamp"] = rng.choice(["2021-03-04", "2025-05-06"], n)
    for name in ("fans_user_num", "fans_group_fans_num", "follow_user_num", "accu_live_cnt"):
        frame[name] = rng.choice(["0-10", "10-100", "100+"], n)
    for name in ("accu_live_duration", "accu_play_cnt", "accu_play_duration"):
        frame[name] = rng.choice(["0-1000", "1000-20000"], n)
    for i in range(7):
        frame[f"onehot_feat{i}"] = rng.choice([0, 1, -124], n)
    return frame


def random_tables(seed: int, n_clicks: int = 120) -> Tables:
    """A few users, streamers and rooms with many ties in time, re-entries, orphans, repeated and unknown rooms,
    missing values and rows without a profile. Live l belongs to streamer l // 10."""
    rng = np.random.default_rng(seed)
    span = int(rng.choice([40, 20 * MINUTE, 3 * HOUR, 9 * DAY]))
    start = MIDNIGHT + int(rng.integers(0, DAY))
    user_ids, lives = [3, 7, 20, 90], np.array([10, 11, 20, 30, 31, 32])

    def times(n: int) -> np.ndarray:
        grid = rng.integers(0, span, max(2, n // 2))  # half as many values as rows: ties within and across files
        return start + np.round(rng.choice(grid, n), -1 if span > 100 else 0).astype(np.int64)

    def some(n: int) -> dict[str, np.ndarray]:
        live = rng.choice(lives, n)
        return {
            "user_id": rng.choice(user_ids, n),
            "live_id": live,
            "streamer_id": live // 10,
            "timestamp": times(n),
        }

    click = some(n_clicks)
    watch = np.where(rng.random(n_clicks) < 0.7, rng.integers(0, span // 4 + 2, n_clicks), span * 3)
    click["watch_live_time"] = np.where(rng.random(n_clicks) < 0.05, -124, watch)
    gift = some(n_clicks // 3)
    gift["gift_price"] = rng.choice([1, 1, 2, 10, 5200], len(gift["user_id"]))
    n_rooms = 9
    opened = rng.choice(lives[:-1], n_rooms), start + rng.integers(-span, span, n_rooms)
    room = rooms(
        *(
            (int(live), int(begin), int(rng.choice([1, 2, -124])), str(rng.choice(["shop", "game", ""])))
            for live, begin in zip(*opened, strict=True)
        ),
        (10, -124, 3, "chat"),
        (777, start, 1, "never clicked"),
    )
    return {
        "click": pd.DataFrame(click),
        "comment": pd.DataFrame(some(n_clicks // 2)),
        "like": pd.DataFrame(some(n_clicks // 4)),
        "gift": pd.DataFrame(gift),
        "user": users(user_ids[:-1], rng),
        "streamer": streamers([1, 2], rng),
        "room": room,
    }


def hand_written() -> Tables:
    """Two users, two streamers, three rooms; no event. Tests put theirs in."""
    rng = np.random.default_rng(0)
    return {
        "click": clicks((1, 10, 1, MIDNIGHT + HOUR, 5000)),
        "comment": events(),
        "like": events(),
        "gift": gifts((1, 10, 1, MIDNIGHT + HOUR, 2)),
        "user": users([1, 2], rng),
        "streamer": streamers([1, 2], rng),
        "room": rooms((10, MIDNIGHT, 1, "shop"), (20, MIDNIGHT, 2, "game")),
    }


def write(folder: Path, tables: Tables, suffixes: dict[str, str] | None = None) -> Path:
    """Writes the tables, as .csv unless `suffixes` says .csv.gz or .parquet for some."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        suffix = (suffixes or {}).get(name, ".csv")
        if suffix == ".parquet":
            frame.to_parquet(folder / f"{name}{suffix}", index=False)
        else:
            frame.to_csv(folder / f"{name}{suffix}", index=False)
    return folder
