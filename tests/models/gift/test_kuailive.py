from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gift import kuailive
from models.gift.data import RawTable
from models.gift.kuailive_files import FILES, find_files
from models.trainer import InputError
from tests.models.gift.kuailive_files import (
    HOUR,
    MIDNIGHT,
    Tables,
    clicks,
    events,
    gifts,
    hand_written,
    random_tables,
    rooms,
    users,
    write,
)

T = MIDNIGHT + 12 * HOUR


def assert_same(one: RawTable, other: RawTable) -> None:
    assert one.numeric_names == other.numeric_names
    np.testing.assert_array_equal(one.numeric, other.numeric)
    assert list(one.categorical) == list(other.categorical)
    for name, column in one.categorical.items():
        assert column.levels == other.categorical[name].levels
        np.testing.assert_array_equal(column.codes, other.categorical[name].codes)
    assert list(one.labels) == list(other.labels)
    for name, label in one.labels.items():
        np.testing.assert_array_equal(label, other.labels[name])
    np.testing.assert_array_equal(one.unit, other.unit)
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.split_key, other.split_key)
    assert one.facts | {"files": None} == other.facts | {"files": None}


def labels_of(tables: Tables, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    frames, _ = kuailive.read_frames(write(folder, tables), False)
    return kuailive.last_touch_labels(frames)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    tables = random_tables(1)
    plain = kuailive.read(write(tmp_path / "plain", tables), True)
    other = kuailive.read(write(tmp_path / "other", tables, dict.fromkeys(FILES, suffix)), True)
    assert_same(plain, other)


def test_order_of_rows_and_columns_and_other_names_do_not_matter(tmp_path: Path) -> None:
    tables = random_tables(2)
    tables["user"] = pd.concat([tables["user"], users([3, 7], np.random.default_rng(5))])  # conflicting rows
    plain = kuailive.read(write(tmp_path / "plain", tables), True)
    names = {"is_live_streamer": "is_live_author", "is_photo_author": "is_video_author"}
    of_streamer = {"fans_user_num": "fans_num", "fans_group_fans_num": "fans_group_num"}
    shuffled = {}
    for name, frame in tables.items():
        frame = frame.sample(frac=1.0, random_state=3)[sorted(frame.columns)]
        renames = {"streamer_id": "author_id"} | names | (of_streamer if name == "streamer" else {})
        shuffled[name] = frame.rename(columns=renames)
    assert_same(plain, kuailive.read(write(tmp_path / "shuffled", shuffled), True))
    assert plain.facts["duplicates"]["user"] == 2


def test_rows_are_ordered_by_time_user_live_streamer_watch(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks(
            (2, 20, 2, T, 1), (1, 20, 2, T, 9), (1, 20, 2, T, 3), (1, 10, 1, T, 7), (9, 10, 1, T - 1, 5)
        )
    }
    frames, facts = kuailive.read_frames(write(tmp_path, tables), False)
    columns = ["timestamp", "user_id", "live_id", "watch_live_time"]
    rows = frames["click"][columns].to_numpy().tolist()
    assert rows == [[T - 1, 9, 10, 5], [T, 1, 10, 7], [T, 1, 20, 3], [T, 1, 20, 9], [T, 2, 20, 1]]
    assert facts["clicks_tied_in_time"] == 3
    assert facts["clicks_without"] == {"user": 1, "streamer": 0, "room": 0}


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_row_order_equals_a_full_sort(seed: int) -> None:
    frame = random_tables(seed)["click"]
    keys = ["timestamp", "user_id", "live_id", "streamer_id", "watch_live_time"]
    expected = frame.sort_values(keys)[keys].to_numpy()
    np.testing.assert_array_equal(kuailive._in_row_order(frame)[keys].to_numpy(), expected)


def test_profile_levels_are_ordered_and_the_sentinel_is_missing(tmp_path: Path) -> None:
    tables = hand_written()
    tables["click"] = clicks(*((user, 10, 1, T + user, 1) for user in range(1, 7)))
    tables["user"] = users([1, 2, 3, 4, 5, 6], np.random.default_rng(0))
    tables["user"]["age"] = ["50+", "18-23", "<18", "-124", "24-30", ""]
    tables["user"]["device_price"] = ["10-100", "5000+", "0", "0-10", "1000-5000", "100-1000"]
    read = kuailive.read(write(tmp_path, tables), False)
    assert read.categorical["user_age"].levels == ("<18", "18-23", "24-30", "50+")
    assert read.categorical["user_age"].codes.tolist() == [3, 1, 0, -1, 2, -1]
    prices = ("0", "0-10", "10-100", "100-1000", "1000-5000", "5000+")
    assert read.categorical["user_device_price"].levels == prices


def test_snapshot_counters_only_when_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, hand_written())
    counters = {"user_fans_num", "user_accu_watch_live_cnt", "streamer_accu_play_cnt", "streamer_fans_user_num"}
    without, with_them = kuailive.read(folder, False), kuailive.read(folder, True)
    assert not counters & set(without.categorical)
    assert counters <= set(with_them.categorical)
    assert len(with_them.categorical) - len(without.categorical) == 11
    for column in ("accu_live_cnt", "fans_num"):  # and the files need not hold them
        for name in ("user", "streamer"):
            frame = pd.read_csv(folder / f"{name}.csv")
            frame.drop(columns=column, errors="ignore").to_csv(folder / f"{name}.csv", index=False)
    assert_same(without, kuailive.read(folder, False))


def test_unit_order_and_split_key(tmp_path: Path) -> None:
    read = kuailive.read(write(tmp_path, random_tables(4)), False)
    assert (np.diff(read.order) >= 0).all()
    assert read.unit.dtype == np.int64
    assert read.split_key.dtype == np.uint64
    assert len(set(zip(read.unit, read.split_key, strict=True))) == len(set(read.unit)) == len(set(read.split_key))
    assert read.facts["label_version"] == kuailive.LABEL_VERSION


def test_some_files_may_have_no_rows(tmp_path: Path) -> None:
    tables = hand_written() | {"comment": events(), "like": events(), "room": rooms()}
    read = kuailive.read(write(tmp_path, tables), False)
    assert read.labels["has_comment"].tolist() == [0.0]
    assert read.categorical["room_live_type"].codes.tolist() == [-1]


def test_repeated_rooms_do_not_multiply_clicks(tmp_path: Path) -> None:
    room = rooms((10, MIDNIGHT, 1, "shop"), (10, MIDNIGHT + HOUR, 2, "game"), (10, MIDNIGHT, 1, "shop"))
    read = kuailive.read(write(tmp_path, hand_written() | {"room": room, "click": clicks((1, 10, 1, T, 5))}), False)
    assert read.facts["duplicates"]["room"] == 2
    assert read.numeric.shape[0] == 1
    category = read.categorical["room_live_content_category"]
    assert category.levels[category.codes[0]] == "game"  # the latest start
    age = read.numeric[0, read.numeric_names.index("room_age")]
    assert age == pytest.approx(np.log1p(11 * 3600))


def test_room_end_is_never_read(tmp_path: Path) -> None:
    tables = random_tables(6)
    before = kuailive.read(write(tmp_path / "a", tables), False)
    tables["room"] = tables["room"].drop(columns="end_timestamp")
    assert_same(before, kuailive.read(write(tmp_path / "b", tables), False))


def test_the_coordinator_needs_no_torch() -> None:
    code = "import sys, models.gift.kuailive, models.gift.naive; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- labels


def test_an_event_belongs_to_the_latest_click_at_or_before_it(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks((1, 10, 1, T, 500), (1, 10, 1, T + 100, 7), (1, 20, 2, T + 150, 8), (2, 10, 1, T, -124)),
        "gift": gifts(
            (1, 10, 1, T + 99, 3),
            (1, 10, 1, T + 100, 10),  # at the very time of the second click
            (1, 10, 1, T + 10**9, 5),  # long after: no window in this rule
            (1, 20, 2, T + 149, 1000),  # before the click of that room: an orphan
            (2, 20, 2, T + 500, 70),  # never clicked: an orphan
            (77, 10, 1, T + 500, 30),  # an unknown user: an orphan
        ),
        "comment": events((2, 10, 1, T), (2, 10, 1, T + 1), (2, 10, 1, T - 1)),
    }
    labels, facts = labels_of(tables, tmp_path)
    # row order: user 1 T, user 2 T, user 1 T+100, user 1 live 20
    np.testing.assert_array_equal(labels["gift_amount"], [3, 0, 15, 0])
    np.testing.assert_array_equal(labels["has_gift"], [1, 0, 1, 0])
    np.testing.assert_array_equal(labels["has_comment"], [0, 1, 0, 0])
    np.testing.assert_array_equal(labels["has_like"], [0, 0, 0, 0])
    np.testing.assert_array_equal(labels["watch_time"], [500, np.nan, 7, 8])
    assert facts["gift"] == {
        "rows": 6,
        "attributed": 3,
        "orphans": 3,
        "rows_sum": 1118,
        "attributed_sum": 18,
        "orphans_sum": 1100,
    }
    assert facts["comment"] == {"rows": 3, "attributed": 2, "orphans": 1}
    assert facts["like"] == {"rows": 0, "attributed": 0, "orphans": 0}


def test_tied_clicks_share_nothing_the_last_row_gets_it(tmp_path: Path) -> None:
    tables = hand_written() | {
        "click": clicks((1, 10, 1, T, 900), (1, 10, 1, T, 20), (1, 10, 1, T, 300)),
        "gift": gifts((1, 10, 1, T + 5, 4)),
    }
    labels, _ = labels_of(tables, tmp_path)
    np.testing.assert_array_equal(labels["watch_time"], [20, 300, 900])
    np.testing.assert_array_equal(labels["gift_amount"], [0, 0, 4])


def brute_force(frames: Tables, kind: str) -> tuple[np.ndarray, np.ndarray, int]:
    """[N] counts and sums of the events of `kind` per click, and the orphans."""
    click = frames["click"].to_dict("records")
    counts, sums, orphans = np.zeros(len(click)), np.zeros(len(click)), 0
    for event in frames[kind].to_dict("records"):
        best = None
        for row, candidate in enumerate(click):
            same = all(candidate[key] == event[key] for key in ("user_id", "live_id"))
            if same and candidate["timestamp"] <= event["timestamp"]:
                best = row  # rows come in order of time, so the last match is the latest
        if best is None:
            orphans += 1
        else:
            counts[best] += 1
            sums[best] += event.get("gift_price", 0)
    return counts, sums, orphans


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_labels_equal_brute_force_and_no_event_is_lost(seed: int) -> None:
    tables = random_tables(seed, n_clicks=40)
    frames = tables | {"click": kuailive._in_row_order(tables["click"])}
    labels, facts = kuailive.last_touch_labels(frames)
    for kind in ("comment", "like", "gift"):
        counts, sums, orphans = brute_force(frames, kind)
        np.testing.assert_array_equal(labels[f"has_{kind}"], counts > 0)
        assert facts[kind]["orphans"] == orphans
        assert facts[kind]["attributed"] + facts[kind]["orphans"] == facts[kind]["rows"] == len(frames[kind])
        if kind == "gift":
            np.testing.assert_array_equal(labels["gift_amount"], sums)
            total = frames["gift"]["gift_price"].sum()
            assert facts[kind]["attributed_sum"] + facts[kind]["orphans_sum"] == facts[kind]["rows_sum"] == total


# ------------------------------------------------------------------------------------------- bad input


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        kuailive.read(folder, False)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def replace_line(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_missing_folder_and_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere: expected a folder")
    folder = write(tmp_path / "data", hand_written())
    assert find_files(folder)["like"] == folder / "like.csv"
    (folder / "like.csv").rename(folder / "like.csv.gz")
    assert_refused(folder, "like.csv.gz: expected a CSV file")
    (folder / "like.csv.gz").unlink()
    assert_refused(folder, "expected like.csv, like.csv.gz or like.parquet")


def test_a_file_in_two_formats(tmp_path: Path) -> None:
    folder = write(tmp_path, hand_written())
    (folder / "gift.parquet").write_bytes(b"")
    assert_refused(folder, "expected one file of gift, got gift.csv and gift.parquet")


@pytest.mark.parametrize("name", FILES)
def test_missing_columns(tmp_path: Path, name: str) -> None:
    column = {"user": "onehot_feat3", "streamer": "live_operation_tag", "room": "live_type"}.get(name, "live_id")
    tables = hand_written()
    tables[name] = tables[name].drop(columns=column)
    assert_refused(write(tmp_path, tables), f"{name}.csv: expected a column {column}, got ")


def test_the_other_names_are_named_when_none_is_there(tmp_path: Path) -> None:
    tables = hand_written()
    tables["click"] = tables["click"].rename(columns={"streamer_id": "anchor"})
    assert_refused(
        write(tmp_path, tables), "expected a column streamer_id or author_id, got user_id, live_id, anchor"
    )


@pytest.mark.parametrize(
    ("name", "line", "got"),
    [
        (
            "click",
            "1,10,1,soon,5",
            "click.csv:4: timestamp: expected Unix milliseconds of the years 2000 to 2099, got 'soon'",
        ),
        ("click", "1,10,1,5", "click.csv:4: expected 5 fields, got 4"),
        ("click", "1,10,1,5,5,", "click.csv:4: expected 5 fields, got 6"),
        ("click", "1,10,1,1746374400022,-3", "click.csv:4: watch_live_time: expected an integer >= 0, got '-3'"),
        ("click", "1,10,,1746374400022,3", "click.csv:4: streamer_id: expected an integer, got ''"),
        ("click", "1,10,1.5,1746374400022,3", "click.csv:4: streamer_id: expected an integer, got '1.5'"),
        ("gift", "1,10,1,-124,3", "gift.csv:4: timestamp: expected Unix milliseconds of"),
        ("gift", "1,10,1,1746374400,3", "gift.csv:4: timestamp: expected Unix milliseconds of the years 2000"),
        ("click", "1,10,1,1746374400022000,3", "click.csv:4: timestamp: expected Unix milliseconds of the years"),
        ("room", "20250505,1,1,-123,7,8,shop,-1", "room.csv:4: "),
        ("gift", "1,10,1,1746374400022,", "gift.csv:4: gift_price: expected an integer >= 0, got ''"),
        (
            "gift",
            "1,10,99999999999999999999,1746374400022,3",
            "gift.csv:4: streamer_id: expected an integer, got '9999",
        ),
    ],
)
def test_malformed_rows_are_named_with_file_and_line(tmp_path: Path, name: str, line: str, got: str) -> None:
    tables = hand_written()
    tables[name] = pd.concat([tables[name]] * 4)
    folder = write(tmp_path, tables)
    replace_line(folder / f"{name}.csv", 4, line)
    assert_refused(folder, got, "correct or remove the line")


def test_line_numbers_count_blank_lines_and_compressed_files(tmp_path: Path) -> None:
    folder = write(tmp_path, hand_written())
    text = (folder / "gift.csv").read_text() + "\n\n1,10,1,1746374400022,free\n"
    (folder / "gift.csv").unlink()
    (folder / "gift.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert_refused(folder, "gift.csv.gz:5: gift_price: expected an integer >= 0, got 'free'")
    (folder / "gift.csv.gz").write_bytes(gzip.compress(text.encode())[:-20])
    assert_refused(folder, "gift.csv.gz: expected a CSV file, got one that cannot be read")


def test_a_bad_row_of_parquet(tmp_path: Path) -> None:
    tables = hand_written()
    tables["gift"] = gifts((1, 10, 1, T, 3), (1, 10, 1, T, -1))
    folder = write(tmp_path, tables, {"gift": ".parquet"})
    assert_refused(folder, "gift.parquet: row 2: gift_price: expected an integer >= 0, got -1")
    tables["gift"]["gift_price"] = [0.5, 1.0]
    write(tmp_path, tables, {"gift": ".parquet"})
    assert_refused(folder, "gift.parquet: gift_price: expected integers")
    (folder / "gift.parquet").write_bytes(b"no parquet")
    assert_refused(folder, "gift.parquet: expected a parquet file")


@pytest.mark.parametrize("name", ["click", "gift", "user", "streamer"])
def test_files_without_rows(tmp_path: Path, name: str) -> None:
    tables = hand_written()
    tables[name] = tables[name].iloc[:0]
    assert_refused(write(tmp_path, tables), f"{name}.csv: expected rows, got a header alone")


@pytest.mark.parametrize("name", FILES)
def test_empty_files(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, hand_written())
    (folder / f"{name}.csv").write_bytes(b"")
    assert_refused(folder, f"{name}.csv: expected a header line, got an empty file")


@pytest.mark.parametrize(
    ("column", "value", "got"),
    [
        ("reg_timestamp", "yesterday", "user.reg_timestamp: expected dates such as 2025-05-05, got 'yesterday'"),
        ("onehot_feat2", "maybe", "user.onehot_feat2: expected numbers, got 'maybe'"),
    ],
)
def test_unreadable_profile_fields(tmp_path: Path, column: str, value: str, got: str) -> None:
    tables = hand_written()
    tables["user"][column] = [value, "-124"]
    assert_refused(write(tmp_path, tables), got)
