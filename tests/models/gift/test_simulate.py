"""The simulator against the published figures of KuaiLive (arXiv 2508.05633 and public analyses of the data).

Tolerances say what is claimed: the counts and marginals that are drawn by quantile are near exact; shares that
come out of the whole story (repeats, history, money) are given with the spread seen over seeds, or with the
distance that is accepted. Everything is asserted at scale 0.1.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, roc_auc_score

from models.gift import kuailive, simulate, simulated_world
from models.trainer import InputError

SCALE = 0.1
FILES = ("click", "comment", "like", "gift", "user", "streamer", "room")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kuailive") / "data"
    simulate.simulate(out, SCALE, 42)
    return out


@pytest.fixture(scope="module")
def frames(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(folder / f"{name}.csv") for name in FILES}


@pytest.fixture(scope="module")
def raw(folder: Path):
    return kuailive.read(folder, snapshot_features=False)


def feature(raw, name: str) -> np.ndarray:
    return np.asarray(raw.numeric[:, raw.numeric_names.index(name)])


def gini(money: pd.Series) -> float:
    money = np.sort(money.to_numpy(dtype=float))
    n = len(money)
    return float((2 * np.arange(1, n + 1) - n - 1) @ money / (n * money.sum()))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- what identifies a simulation ------------------------------------------------------------------------------


def test_the_same_version_scale_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    rows = simulate.simulate(tmp_path / "a", 0.002, 7)
    simulate.simulate(tmp_path / "b", 0.002, 7)
    simulate.simulate(tmp_path / "c", 0.002, 8)
    first, second, third = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert all(first[name] != third[name] for name in first)
    marker = json.loads((tmp_path / "a" / "simulated.json").read_text())
    assert marker == {"version": simulate.SIMULATOR_VERSION, "scale": 0.002, "seed": 7, "rows": rows}
    for name in FILES:
        with open(tmp_path / "a" / f"{name}.csv") as file:
            assert sum(1 for _ in file) == rows[name] + 1


@pytest.mark.parametrize("scale", [0.001, 0.003])
def test_the_smallest_scales_keep_every_promise(tmp_path: Path, scale: float) -> None:
    rows = simulate.simulate(tmp_path / "data", scale, 1)
    gift = pd.read_csv(tmp_path / "data" / "gift.csv")
    assert gift["user_id"].nunique() == rows["user"] == round(23_772 * scale)
    assert rows["click"] == round(4_909_515 * scale)


def test_an_existing_simulation_is_kept_and_anything_else_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    rows = simulate.simulate(out, 0.002, 7)  # an empty folder is free
    stamp = os.stat(out / "click.csv").st_mtime_ns
    assert simulate.simulate(out, 0.002, 7) == rows
    assert os.stat(out / "click.csv").st_mtime_ns == stamp
    with pytest.raises(InputError, match="expected the simulation"):
        simulate.simulate(out, 0.002, 8)
    (out / "click.csv").unlink()
    with pytest.raises(InputError, match=r"missing: \['click'\]"):
        simulate.simulate(out, 0.002, 7)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="new or empty folder"):
        simulate.simulate(tmp_path / "other", 0.002, 7)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(simulate, "_write_rooms", full)
    with pytest.raises(OSError, match="No space left"):
        simulate.simulate(tmp_path / "data", 0.002, 7)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_returns_the_winners_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, durable = tmp_path / "data", simulate._make_durable

    def overtaken(folder: Path) -> None:
        monkeypatch.setattr(simulate, "_make_durable", durable)
        simulate.simulate(out, 0.002, 7)
        durable(folder)

    monkeypatch.setattr(simulate, "_make_durable", overtaken)
    assert simulate.simulate(out, 0.002, 7)["click"] == round(4_909_515 * 0.002)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("scale", "seed"), [(0.0, 1), (-1.0, 1), (1.5, 1), (float("nan"), 1), (0.0005, 1), (0.01, -1)]
)
def test_impossible_scales_and_seeds_are_refused(tmp_path: Path, scale: float, seed: int) -> None:
    with pytest.raises(InputError, match="expected"):
        simulate.simulate(tmp_path / "data", scale, seed)
    assert list(tmp_path.iterdir()) == []


# --- schema and quirks -----------------------------------------------------------------------------------------


def test_columns_are_those_of_kuailive(frames) -> None:
    event = ["user_id", "live_id", "streamer_id", "timestamp"]
    assert list(frames["click"]) == [*event, "watch_live_time"]
    assert list(frames["comment"]) == list(frames["like"]) == event
    assert list(frames["gift"]) == [*event, "gift_price"]
    assert list(frames["room"]) == [
        *("p_date", "live_id", "streamer_id", "live_type", "start_timestamp", "end_timestamp"),
        *("live_content_category", "live_name_id"),
    ]
    onehot = [f"onehot_feat{i}" for i in range(7)]
    assert list(frames["user"]) == [
        *("user_id", "age", "gender", "country", "device_brand", "device_price", "reg_timestamp", "fans_num"),
        *("follow_num", "first_watch_live_timestamp", "accu_watch_live_cnt", "accu_watch_live_duration"),
        *("is_live_streamer", "is_photo_author", *onehot),
    ]
    assert list(frames["streamer"]) == [
        *("streamer_id", "gender", "age", "country", "device_brand", "device_price", "live_operation_tag"),
        *("fans_user_num", "fans_group_fans_num", "follow_user_num", "first_live_timestamp", "accu_live_cnt"),
        *("accu_live_duration", "accu_play_cnt", "accu_play_duration", "reg_timestamp", *onehot),
    ]


def test_counts_follow_the_scale(frames) -> None:
    rows = {name: len(frame) for name, frame in frames.items()}
    exact = {"click": 4_909_515, "comment": 196_526, "like": 179_311, "gift": 72_646, "user": 23_772}
    assert {name: rows[name] for name in exact} == {name: round(n * SCALE) for name, n in exact.items()}
    assert rows["streamer"] == round(452_621 * SCALE)
    assert rows["room"] == pytest.approx(11_819_964 * SCALE, rel=0.005)
    assert frames["room"]["live_id"].nunique() == pytest.approx(11_613_708 * SCALE, rel=0.005)


def test_keys_fit_together(frames) -> None:
    assert frames["user"]["user_id"].is_unique
    assert frames["streamer"]["streamer_id"].is_unique
    owner = frames["room"].groupby("live_id")["streamer_id"].agg(["min", "max"])
    assert (owner["min"] == owner["max"]).all()
    for name in ("click", "comment", "like", "gift"):
        frame = frames[name]
        assert frame["user_id"].isin(frames["user"]["user_id"]).all()
        assert (owner["min"].loc[frame["live_id"]].to_numpy() == frame["streamer_id"].to_numpy()).all()
    room = frames["room"].drop_duplicates("live_id").set_index("live_id").loc[frames["click"]["live_id"]]
    time = frames["click"]["timestamp"].to_numpy()
    assert (room["start_timestamp"].to_numpy() <= time).all()
    assert (time <= room["end_timestamp"].to_numpy()).all()


def test_time_window_and_ties(frames) -> None:
    for name in ("click", "comment", "like", "gift"):
        time = frames[name]["timestamp"]
        assert 1_746_374_400_022 <= time.min() <= time.max() <= 1_748_185_198_515
        assert not time.is_monotonic_increasing
    time = frames["click"]["timestamp"]
    assert time.min() == 1_746_374_400_022
    assert time.max() == 1_748_185_198_515  # the last hour of 05-25 in Beijing is missing
    per_ms = time.value_counts()
    assert per_ms.mean() == pytest.approx(1.835, abs=0.1)
    assert (per_ms > 1).mean() == pytest.approx(1.06 / 2.68, abs=0.03)
    assert 7 <= per_ms.max() <= 13
    assert frames["gift"]["timestamp"].value_counts().mean() == pytest.approx(1.013, abs=0.04)


def test_rooms_repeat_and_end_at_the_cutoff(frames) -> None:
    room = frames["room"]
    repeats = room["live_id"].duplicated(keep=False)
    assert room["live_id"].duplicated().mean() == pytest.approx(206_256 / 11_819_964, rel=0.02)
    assert (room[repeats].groupby("live_id")["live_name_id"].nunique() > 1).mean() > 0.2
    assert (room[repeats].groupby("live_id")["p_date"].nunique() > 1).mean() > 0.5
    assert set(room["p_date"]) == set(range(20250505, 20250526))
    assert set(room["live_type"]) == {1, 2, 3, -124}
    assert room["live_content_category"].nunique() == 3
    assert room["end_timestamp"].max() == 1_748_275_200_000
    assert (room["end_timestamp"] == 1_748_275_200_000).sum() > 100
    assert (room["start_timestamp"] < room["end_timestamp"]).all()
    assert (room["live_name_id"] == -1).mean() == pytest.approx(0.2, abs=0.02)


def test_profiles_have_range_strings_and_sentinels(frames) -> None:
    user, streamer = frames["user"], frames["streamer"]
    assert user["gender"].value_counts(normalize=True)["M"] == pytest.approx(0.6185, abs=0.03)
    assert streamer["gender"].value_counts(normalize=True)["F"] == pytest.approx(0.6283, abs=0.01)
    assert {"18-23", "24-30"} <= set(user["age"])
    assert (user["age"].nunique(), streamer["age"].nunique()) == (7, 7)
    assert {"0-10", "10-100"} <= set(user["fans_num"])
    assert "10000-100000" in set(streamer["fans_user_num"])
    assert "100-500" in set(streamer["accu_live_cnt"])
    assert streamer["live_operation_tag"].nunique() == 13
    assert set(streamer["onehot_feat0"]) == {0, 1, -124}
    assert set(user["onehot_feat0"]) == {0, 1}
    pd.to_datetime(user["reg_timestamp"], format="%Y-%m-%d")


# --- published statistics --------------------------------------------------------------------------------------


def test_gifts_per_user(frames) -> None:
    gifts = frames["gift"]["user_id"].value_counts()
    assert len(gifts) == len(frames["user"])  # every user gives at least once
    assert all(frames[name]["user_id"].nunique() == len(gifts) for name in ("click", "comment", "like"))
    assert gifts.mean() == pytest.approx(3.06, abs=0.01)
    assert gifts.median() in (1.5, 2.0)
    for k, share in {2: 0.50, 3: 0.31, 5: 0.15, 10: 0.05, 20: 0.0145}.items():
        assert (gifts >= k).mean() == pytest.approx(share, abs=0.01)
    assert gifts.max() >= 60


def test_prices(frames) -> None:
    price = frames["gift"]["gift_price"]
    assert price.min() == 1
    assert price.quantile([0.5, 0.9, 0.95]).tolist() == pytest.approx([2, 88, 298], rel=0.03)
    assert price.quantile(0.99) == pytest.approx(1488, rel=0.1)
    assert price.mean() == pytest.approx(82.7, rel=0.15)  # the published tail, cut at one in 7,265
    for p, count in enumerate(simulated_world.PRICE_ATOMS, start=1):
        assert (price == p).sum() == pytest.approx(count * SCALE, abs=1.01)


def test_watch_times(frames) -> None:
    seconds = frames["click"]["watch_live_time"] / 1000
    shares = np.histogram(seconds, [0, 5, 30, 300, np.inf])[0] / len(seconds)
    assert shares == pytest.approx([0.539, 0.243, 0.162, 0.056], abs=0.002)
    assert 80 < seconds.mean() < 92
    assert seconds.quantile(0.99) == pytest.approx(1900, rel=0.1)


def test_activity_and_concentration(frames) -> None:
    clicks = frames["click"]["user_id"].value_counts()
    assert clicks.mean() == pytest.approx(206.5, abs=0.1)
    assert (clicks < 50).mean() == pytest.approx(0.438, abs=0.02)
    assert 10_000 < clicks.max() <= 14_633
    interactions = pd.concat([frames[name]["streamer_id"] for name in ("click", "comment", "like", "gift")])
    per_streamer = interactions.value_counts()
    assert (per_streamer < 5).mean() == pytest.approx(0.70, abs=0.05)
    assert (per_streamer > 40).mean() == pytest.approx(0.046, abs=0.015)
    top = per_streamer.iloc[: round(10 * SCALE)].sum() / per_streamer.sum()  # the top 10 of the full scale
    assert 0.008 < top < 0.025
    receiving = frames["gift"]["streamer_id"].nunique() / len(frames["streamer"])
    assert receiving == pytest.approx(0.078, abs=0.015)
    rooms = len(frames["click"][["user_id", "live_id"]].drop_duplicates()) / len(frames["click"])
    assert rooms == pytest.approx(0.8746, abs=0.05)


def test_money(frames, raw) -> None:
    gift = frames["gift"]
    assert gini(gift.groupby("user_id")["gift_price"].sum()) == pytest.approx(0.942, abs=0.03)
    assert gini(gift.groupby("streamer_id")["gift_price"].sum()) == pytest.approx(0.930, abs=0.03)
    seconds, money = raw.labels["watch_time"] / 1000, raw.labels["gift_amount"]
    shares = np.histogram(seconds, [0, 5, 30, 300, np.inf], weights=money)[0] / money.sum()
    assert shares[:2].max() < 0.035  # .007 and .010 published
    assert shares[2:] == pytest.approx([0.16, 0.82], abs=0.06)
    median = np.median(seconds[raw.labels["has_gift"] > 0])
    assert 200 < median < 450  # 322 s published, of gifts at their click


def test_repeats_and_the_effect_of_a_pairs_history(frames, raw) -> None:
    gift, label = frames["gift"], raw.labels["has_gift"]
    assert gift[["user_id", "streamer_id"]].duplicated().mean() == pytest.approx(0.26, abs=0.035)
    # Published: 4.2 % of clicks at 11.05 %, with labels that count some gifts twice: .042 x .1105 / .0148 = .31 is
    # more than the 26 % of gifts that repeat a pair. Here: 3.4-3.7 % at 8.6-9.3 % (seeds 7, 11, 42, 123).
    given = feature(raw, "pair_gifts") > 0
    assert given.mean() == pytest.approx(0.04, abs=0.01)
    assert 0.07 < label[given].mean() < 0.13
    assert label[~given].mean() == pytest.approx(0.0111, abs=0.0012)


def test_volume_rate_and_hours_drift(frames, raw) -> None:
    time = frames["click"]["timestamp"].to_numpy()
    period = np.digitize(time // 86_400_000 - time.min() // 86_400_000, [8, 15])  # 8, 7 and 7 UTC days
    shares = np.bincount(period) / len(time)
    assert shares == pytest.approx([0.3814, 0.3466, 0.2720], abs=0.004)
    per_day = np.bincount(time // 86_400_000 - time.min() // 86_400_000)[1:-1]  # whole UTC days
    assert per_day[7:14].mean() == pytest.approx(243_000 * SCALE, rel=0.02)
    assert per_day[14:].mean() == pytest.approx(201_000 * SCALE, rel=0.03)
    label = raw.labels["has_gift"][np.argsort(raw.order, kind="stable")]
    early, late = np.split(label, [int(0.7 * len(label))])
    assert 1.03 < late.mean() / early.mean() < 1.25  # published 1.42 -> 1.72 and 1.64 %, 1.18 times; here 1.04-1.10
    hours = np.bincount(frames["gift"]["timestamp"] // 3_600_000 % 24, minlength=24)
    published = np.array(simulated_world.GIFTS_BY_UTC_HOUR)
    assert np.abs(hours / hours.sum() - published / published.sum()).sum() / 2 < 0.05
    assert np.corrcoef(hours, published)[0, 1] > 0.97


def test_attribution_leaves_orphans_and_most_gifts_at_their_click(frames) -> None:
    click, gift = frames["click"], frames["gift"]
    merged = pd.merge_asof(
        gift.sort_values("timestamp"),
        click[["user_id", "live_id", "timestamp", "watch_live_time"]]
        .sort_values("timestamp", kind="stable")
        .assign(clicked=lambda f: f["timestamp"]),
        on="timestamp",
        by=["user_id", "live_id"],
    )
    matched = merged["clicked"].notna()
    delay = (merged["timestamp"] - merged["clicked"])[matched]
    assert (~matched).mean() == pytest.approx(0.05, abs=0.015)
    assert (delay == 0).mean() == pytest.approx(0.86, abs=0.02)
    inside = (delay <= merged["watch_live_time"][matched]).sum() / len(gift)
    assert 1 - inside == pytest.approx(0.12, abs=0.02)  # audited on the real data: 12 % match no watch


# --- what can be learned ---------------------------------------------------------------------------------------


def scores_of(raw, columns: list[int], n_trees: int) -> tuple[np.ndarray, np.ndarray]:
    """Test labels and scores of gradient boosting on the first 70 % of the time; the test is the last 15 %."""
    order = np.argsort(raw.order, kind="stable")
    n = len(order)
    x, label = np.asarray(raw.numeric)[:, columns], raw.labels["has_gift"]
    train, test = order[: int(0.70 * n)], order[int(0.85 * n) :]
    model = HistGradientBoostingClassifier(
        max_iter=n_trees,
        learning_rate=0.08,
        max_leaf_nodes=15,
        min_samples_leaf=200,
        l2_regularization=10.0,
        early_stopping=False,
        random_state=0,
    )
    model.fit(x[train], label[train])
    return label[test], model.predict_proba(x[test])[:, 1]


def test_gradient_boosting_on_the_past_lands_where_it_does_on_the_real_data(raw) -> None:
    """Published: AP 0.057, ROC .609 to .70 at a base of 1.6 %. Above 0.15 the simulator would be wrong.

    Here AP .074-.090, ROC .75-.77 (seeds 7, 11, 42, 123): easier than published, mostly by the user's own counts.
    """
    columns = [i for i, name in enumerate(raw.numeric_names) if "onehot" not in name]
    label, score = scores_of(raw, columns, 60)
    assert 0.04 < average_precision_score(label, score) < 0.10
    assert 0.60 < roc_auc_score(label, score) < 0.80
    best = np.sort(score)[-int(0.01 * len(score))]
    assert 0.08 < label[score >= best].sum() / label.sum() < 0.20  # recall at 1 %: .117


def test_profiles_and_clock_carry_almost_nothing(raw) -> None:
    static = ("hour", "weekday", "registered", "first_watch", "first_live", "is_live", "is_photo", "onehot")
    columns = [i for i, name in enumerate(raw.numeric_names) if any(part in name for part in static)]
    assert len(columns) >= 10
    label, score = scores_of(raw, columns, 15)
    assert average_precision_score(label, score) < 1.25 * label.mean()


def test_dense_tasks_tell_of_gifts_through_a_shared_affinity(raw) -> None:
    """Where a pair has not given yet, its earlier comments and long watches foretell a gift, but weakly."""
    label = raw.labels["has_gift"]
    fresh = (feature(raw, "pair_gifts") == 0) & (feature(raw, "pair_clicks") > 0)
    commented = fresh & (feature(raw, "pair_comments") > 0)
    assert 1.05 < label[commented].mean() / label[fresh & ~commented].mean() < 3.0
    watch = feature(raw, "pair_watch")
    long = watch > np.median(watch[fresh])
    assert 1.05 < label[fresh & long].mean() / label[fresh & ~long].mean() < 3.0
    gave = label > 0
    for task in ("has_comment", "has_like", "watch_time"):
        assert raw.labels[task][gave].mean() > 1.5 * raw.labels[task][~gave].mean()
