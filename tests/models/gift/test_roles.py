"""models/gift/roles.py: what is true of the rows of a role, and what is exchangeable among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest

from models.gift import roles
from models.gift.data import GiftData, GiftDataset, load
from models.gift.split import local_days
from models.gift.trainer import GiftTrainer
from models.trainer import ROLES, DataSpec, Decision, InputError
from tests.models.gift import planted
from tests.models.gift.tables import ALL, KUAILIVE, SHARES, TASKS, make_frame, options, spec

DECISION = Decision(task="pays", target_precision=0.5)


def with_unit(unit: str) -> Decision:
    return DECISION.model_copy(update={"unit": unit})


def opened(folder: Path, frame: pd.DataFrame, split: dict[str, Any], **changed: Any) -> GiftDataset:
    return load(spec(folder, frame, options(split={**SHARES, **split}, **changed)), ALL)


# ------------------------------------------------------------------------------------------- labels


def test_labels_are_those_of_the_table_and_nan_where_the_condition_is_not_met(tmp_path: Path) -> None:
    frame = make_frame()
    frame.loc[::7, "weeks"] = np.nan
    data = opened(tmp_path, frame, {"by": "time", "column": "when"})
    found = roles.labels(data, "valid", DECISION)
    rows = frame[1400:1600]
    np.testing.assert_array_equal(found.tasks["weeks"], rows["weeks"].astype(np.float32))
    np.testing.assert_array_equal(found.tasks["pays"], rows["paid"] > 0)
    np.testing.assert_array_equal(found.tasks["rich"], rows["income"] == "50000+.")
    paid = rows["paid"].where(rows["paid"] > 0).astype(np.float32)
    np.testing.assert_array_equal(found.tasks["paid"], paid)
    assert dict(found.transforms) == {"weeks": "none", "paid": "log1p"}
    assert dict(found.conditions) == {"paid": "pays"}
    np.testing.assert_allclose(found.amount, rows["paid"].to_numpy(), rtol=1e-6)


def test_there_is_no_money_without_an_amount_that_hangs_on_the_decision(tmp_path: Path) -> None:
    data = opened(tmp_path, make_frame(), {"by": "time", "column": "when"})
    assert roles.labels(data, "test", Decision(task="rich", target_precision=0.5)).amount is None


def test_a_negative_amount_is_no_money_and_a_missing_one_is_none(tmp_path: Path) -> None:
    frame = make_frame().assign(extra=1.0)
    frame["extra"] = np.arange(len(frame), dtype=np.float64)
    frame.loc[1500, ["paid", "extra"]] = [3.0, np.nan]
    extra = {"kind": "regression", "column": "extra", "conditional_on": "pays"}
    tasks = {name: task for name, task in TASKS.items() if name != "paid"} | {"extra": extra}
    amount = roles.labels(
        opened(tmp_path, frame, {"by": "time", "column": "when"}, tasks=tasks), "valid", DECISION
    ).amount
    assert amount is not None
    assert amount[100] == 0.0
    np.testing.assert_array_equal(amount[101:], np.where(frame["paid"] > 0, frame["extra"], 0.0)[1501:1600])
    frame["extra"] -= 1550.0
    (tmp_path / "b").mkdir()
    data = opened(tmp_path / "b", frame, {"by": "time", "column": "when"}, tasks=tasks)
    assert roles.labels(data, "valid", DECISION).amount is None


# ------------------------------------------------------------------------------------------- the unit


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (GiftData(**KUAILIVE), ("row", "user_id")),
        (options(split={"by": "hash", **SHARES}), ("row",)),
        (options(split={"by": "group", "column": "city", **SHARES}), ("row", "city")),
        (options(split={"by": "time", "column": "when", **SHARES}), ("row", "day")),
        (options(split={"by": "day", "column": "when", **SHARES}), ("row", "day")),
    ],
    ids=["kuailive", "hash", "group", "time", "day"],
)
def test_a_unit_is_what_the_data_can_tell_apart(data: GiftData, expected: tuple[str, ...]) -> None:
    assert roles.units(data) == expected
    for unit in ("row", "user_id", "day", "city", "age"):
        problems = roles.unit_problems(data, with_unit(unit))
        assert [p.path for p in problems] == ([] if unit in expected else ["decision.unit"])
        assert all(" or ".join(expected) in p.message and repr(unit) in p.message for p in problems)


def test_check_asks_for_a_unit_of_the_data() -> None:
    data = GiftData(**{**planted.DATA, "path": "t.parquet"})
    decision = planted.DECISION.model_copy(update={"unit": "day"})
    assert [p.path for p in GiftTrainer().check(planted.config(), data, decision)] == ["decision.unit"]


def test_groups_are_units(tmp_path: Path) -> None:
    frame = make_frame()
    frame["who"] = np.arange(len(frame)) // 5
    data = opened(tmp_path, frame, {"by": "group", "column": "who"})
    numeric = {role: np.array(data.part(role).numeric[:, 0]) for role in ROLES}
    seen = 0
    for role in ROLES:
        unit = roles.labels(data, role, with_unit("who")).unit
        sizes = np.unique(unit, return_counts=True)[1]
        assert (sizes == 5).all()
        seen += len(sizes)
        np.testing.assert_array_equal(roles.labels(data, role, DECISION).unit, np.arange(len(numeric[role])))
    assert seen == 400


@pytest.mark.parametrize("by", ["day", "time"])
def test_days_are_the_local_days_of_the_rows(tmp_path: Path, by: str) -> None:
    frame = make_frame()
    start = pd.Timestamp("2024-03-25 22:30", tz="UTC")
    frame["when"] = start + pd.to_timedelta(np.arange(len(frame)) * 20, unit="min")  # summer time begins
    data = opened(tmp_path, frame, {"by": by, "column": "when", "timezone": "Europe/Zurich"})
    units = np.concatenate([roles.labels(data, role, with_unit("day")).unit for role in ROLES])
    days = frame["when"].dt.tz_convert("Europe/Zurich").dt.date
    assert pd.Series(units).groupby(days).nunique().eq(1).all()
    assert len(np.unique(units)) == days.nunique() == 29
    assert set(np.diff(units)) == {0, 1}


def test_local_days_count_from_the_first_one() -> None:
    zone = ZoneInfo("Asia/Shanghai")
    times = [pd.Timestamp(t, tz=zone).value // 10**6 for t in ("2025-05-05", "2025-05-05 23:59:59", "2025-05-07")]
    assert local_days(np.array(times, np.int64), "Asia/Shanghai").tolist() == [0, 0, 2]
    assert local_days(np.array(times, np.int64), "UTC").tolist() == [0, 1, 2]


@pytest.mark.parametrize("start", [0, 1_700_000_000 * 10**9])  # an index, and nanoseconds: neither is ms
def test_there_are_no_days_where_the_order_is_no_time(tmp_path: Path, start: int) -> None:
    frame = make_frame()
    frame["when"] += start
    data = opened(tmp_path, frame, {"by": "time", "column": "when"})
    with pytest.raises(InputError, match=r"decision\.unit: expected times in when for `day`, got whole numbers"):
        roles.labels(data, "test", with_unit("day"))
    assert len(np.unique(roles.labels(data, "test", DECISION).unit)) == 300


def test_the_unit_of_kuailive_is_the_user(simulated: DataSpec) -> None:
    data = load(simulated, ALL)
    decision = Decision(task="has_gift", target_precision=0.1, unit="user_id")
    unit = roles.labels(data, "test", decision).unit
    np.testing.assert_array_equal(unit, data.part("test").unit)
    assert 1 < len(np.unique(unit)) < len(unit)
    with pytest.raises(InputError, match=r"decision\.unit: expected row or user_id, got 'day'"):
        roles.labels(data, "test", with_unit("day"))


def test_a_folder_prepared_before_there_were_days_is_not_taken_for_one_with_days(tmp_path: Path) -> None:
    """Its hash, which stored studies name, is the same; its place in the cache is another."""
    data = opened(tmp_path, make_frame(), {"by": "time", "column": "when"})
    prepared = [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert prepared == [f"{data.manifest.data_hash[:16]}-days1"]
    opened(tmp_path, make_frame(), {"by": "hash"})
    assert any("-" not in p.name for p in (tmp_path / "cache").iterdir() if p.is_dir())
