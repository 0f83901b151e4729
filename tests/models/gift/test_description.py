"""models/gift/description.py: the checks notice what they exist for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.gift import kuailive, split
from models.gift.data import RawTable, describe, load
from models.trainer import DataSpec
from tests.models.gift.tables import (
    ALL,
    SHARES,
    make_frame,
    options,
    spec,
)


def check_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in found["checks"] if name in check["name"])


def rows_of(found: dict[str, Any], title: str) -> list[dict[str, Any]]:
    table = found["tables"][title]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_describe_kuailive(simulated: DataSpec) -> None:
    found = describe(simulated)
    # So few rows have features that stand out by chance; the figures themselves are the simulator's to test.
    failed = [check for check in found["checks"] if not check["ok"] and "feature alone" not in check["name"]]
    assert failed == []
    assert "PASS: 20 random rows agree" in check_of(found, "second implementation")["detail"]
    roles = {row["role"]: row for row in rows_of(found, "roles")}
    assert roles["train"]["range"].endswith("2025-05-20T00:00:00+08:00")
    assert sum(row["share"] for row in roles.values()) == pytest.approx(1)
    events = {row["kind"]: row for row in rows_of(found, "events")}
    for row in events.values():
        assert row["attributed"] + row["orphans"] == row["rows"]
    files = {row["file"]: row["rows"] for row in rows_of(found, "files")}
    assert files["gift.csv"] == events["gift"]["rows"]
    gifts = [row for row in rows_of(found, "tasks") if row["task"] == "has_gift"]
    dataset = load(simulated, ALL)
    for row in gifts:
        label = dataset.part(row["role"]).labels[:, 2]
        assert row["positives"] == label.sum()
        assert row["base rate or mean"] == pytest.approx(label.mean())


def test_describe_notices_a_feature_that_knows_the_future(
    simulated: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = kuailive.read

    def leaky(folder: Path, snapshot_features: bool) -> RawTable:
        raw = read(folder, snapshot_features)
        place = raw.numeric_names.index("pair_gifts")
        raw.numeric[:, place] += raw.labels["has_gift"] * 9
        return raw

    monkeypatch.setattr(kuailive, "read", leaky)
    found = describe(DataSpec(simulated.options, simulated.path, tmp_path))
    assert not check_of(found, "predicts has_gift")["ok"]
    assert "ALARM" in check_of(found, "predicts has_gift")["detail"]
    assert "pair_gifts" in check_of(found, "predicts has_gift")["detail"]
    recomputed = check_of(found, "second implementation")
    assert not recomputed["ok"]
    assert "pair_gifts: fast" in recomputed["detail"]


def test_describe_notices_lost_events(simulated: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    read = kuailive.read

    def lossy(folder: Path, snapshot_features: bool) -> RawTable:
        raw = read(folder, snapshot_features)
        raw.labels["gift_amount"][np.argmax(raw.labels["gift_amount"])] = 0
        raw.facts["events"]["like"]["orphans"] += 1
        return raw

    monkeypatch.setattr(kuailive, "read", lossy)
    check = check_of(describe(simulated), "attributed + orphans")
    assert not check["ok"]
    assert "like: " in check["detail"]
    assert "gift_amount: labels hold" in check["detail"]


def test_describe_a_table(tmp_path: Path) -> None:
    frame = make_frame()
    given = options(split={"by": "hash", **SHARES})
    found = describe(spec(tmp_path, pd.concat([frame, frame[:300]]), given))
    assert all(check["ok"] for check in found["checks"]), found["checks"]
    assert check_of(found, "equal rows")["detail"].startswith("0 row contents")
    assert rows_of(found, "files") == [{"file": "t.csv", "rows": 2300, "repeated ids": ""}]
    kinds = {row["feature"]: row["kind"] for row in rows_of(found, "features")}
    assert kinds == {
        "age": "numeric", "gains": "signed log1p", "gaps": "numeric", "fixed": "numeric",
        "gaps__missing": "indicator", "city": "categorical",
    }  # fmt: skip


def test_describe_notices_a_target_under_another_name(tmp_path: Path) -> None:
    frame = make_frame()
    frame["taxed"] = np.where(frame["income"] == "50000+.", "yes", "no")
    frame["weeks_again"] = frame["weeks"]
    frame["bracket"] = np.where(frame["income"] == "50000+.", "z", np.where(frame["age"] < 40, "a", "b"))
    frame["cents"] = frame["paid"] * 100
    given = options(numeric_columns=["age", "weeks_again", "cents"], categorical_columns=["taxed", "bracket"])
    check = check_of(describe(spec(tmp_path, frame, given)), "no target among")
    assert not check["ok"]
    assert "weeks_again is the target weeks" in check["detail"]
    assert "taxed is the target rich" in check["detail"]
    assert "bracket is the target rich" in check["detail"], "its last level of three"
    assert "cents is the target pays" in check["detail"], "0 just where pays is 0"
    assert "age is" not in check["detail"]


def test_describe_reports_a_role_without_positives_as_a_failed_check(tmp_path: Path) -> None:
    frame = make_frame()
    frame.loc[1700:, "income"] = "- 50000."
    check = check_of(describe(spec(tmp_path, frame, options())), "every role has rows")
    assert not check["ok"]
    assert "role test has no positive rich" in check["detail"]


def test_describe_notices_equal_rows_in_two_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = make_frame()
    given = spec(tmp_path, pd.concat([frame, frame]), options(split={"by": "hash", **SHARES}))
    monkeypatch.setattr(split, "content_hash", lambda raw: split.mix(raw.unit.astype(np.uint64)))
    assert not check_of(describe(given), "equal rows are on one side")["ok"]
