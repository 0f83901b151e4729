"""models/stock/description.py: the facts that people are shown, and checks that find what they look for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.stock import description, features, preparation
from models.stock.bars import Bars
from models.stock.data import StockData, describe, load
from models.stock.features import build
from models.trainer import ROLES, DataSpec
from tests.models.stock.market import ALL, frame, random_bars, spec, write_files

BARS = random_bars(n_stocks=8, n_days=220, seed=7, late=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = tmp_path_factory.mktemp("data") / "market"
    table = frame(BARS)
    table.loc[[30, 31], ["open", "high", "low", "close", "pre_close", "vol", "amount"]] = np.nan
    return spec(folder, write_files(folder, BARS, table=table[::-1]))


def changed(data: DataSpec, tmp_path: Path, **sections: Any) -> DataSpec:
    options = StockData(**{**data.options.model_dump(), **sections})
    return replace(data, options=options, cache=tmp_path / "cache")


def rows_of(described: dict[str, Any], title: str) -> list[dict[str, Any]]:
    table = described["tables"][title]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def check_of(described: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [check for check in described["checks"] if check["name"] == name]
    return found


LABELS = "labels equal a second look at the prices"
PAST = "features know nothing of the days after"
ORDER = "labels end before the next role begins"
USABLE = "every role has rows, positives and negatives"
ADJUSTED = "prices are adjusted"
ENDED = "delisted stocks are there"


def test_tables_hold_the_counts_of_the_prepared_data(data: DataSpec) -> None:
    described, dataset = describe(data), load(data, ALL)
    for row in rows_of(described, "roles"):
        part = dataset.part(row["role"])
        daily = [part.labels[part.day == day].mean() for day in np.unique(part.day)]
        assert (row["rows"], row["positives"]) == (len(part), part.labels.sum())
        assert row["base rate"] == pytest.approx(part.labels.mean())
        assert row["first day"] == dataset.dates[part.day.min()]
        assert row["last day"] == dataset.dates[part.day.max()]
        assert row["min of a day"] == pytest.approx(min(daily))
        assert row["median of a day"] == pytest.approx(np.median(daily))
        assert row["max of a day"] == pytest.approx(max(daily))
    dropped = {row["why"]: row["bars"] for row in rows_of(described, "rows without a role")}
    in_roles = sum(row["rows"] for row in rows_of(described, "roles"))
    assert sum(dropped.values()) + in_roles == len(BARS)
    assert dropped["suspended day: no volume, or neither it nor a price"] == 2
    told = {row["what"]: row["value"] for row in rows_of(described, "data")}
    assert told["bars"] == len(BARS) - 2
    assert (told["stocks"], told["stocks with rows"], told["industries"]) == (8, 8, 3)
    assert told["stocks of unknown industry"] == 1
    assert told["rows out of order, sorted"] == len(BARS) - 2 - 8
    assert told["market"] == "index"
    assert told["data hash"] == dataset.manifest.data_hash
    assert [row["feature"] for row in rows_of(described, "features")] == list(dataset.feature_names)
    assert {row["for"]: row["file"] for row in rows_of(described, "files")}["bars"] == "daily.parquet"


def test_good_data_pass_every_check(data: DataSpec) -> None:
    checks = describe(data)["checks"]
    assert {check["name"]: check["ok"] for check in checks} == dict.fromkeys(
        (USABLE, ORDER, LABELS, PAST, ADJUSTED, ENDED), True
    )
    details = {check["name"]: check["detail"] for check in checks}
    assert details[ORDER] == "market days between them: train .. valid 0, valid .. calibrate 0, calibrate .. test 0"
    assert details[LABELS].endswith(" rows agree")


@pytest.mark.parametrize(
    "label",
    [
        {"entry": "next_open"},
        {"exit": "high"},
        {"first": 1, "last": 1},
        {"entry": "next_open", "exit": "high", "last": 9},
    ],
)
def test_labels_of_every_definition_agree(data: DataSpec, tmp_path: Path, label: dict[str, Any]) -> None:
    assert check_of(describe(changed(data, tmp_path, label=label)), LABELS)["ok"]


def test_the_embargo_is_seen_between_the_roles(data: DataSpec, tmp_path: Path) -> None:
    split = {**data.options.split.model_dump(), "embargo": 4}
    detail = check_of(describe(changed(data, tmp_path, split=split)), ORDER)["detail"]
    assert detail == "market days between them: train .. valid 4, valid .. calibrate 4, calibrate .. test 4"


def test_a_role_without_rows_is_a_failed_check_and_no_error(data: DataSpec, tmp_path: Path) -> None:
    split = {"valid": "2019-07-01", "calibrate": "2019-09-02", "test": "2031-01-01"}
    described = describe(changed(data, tmp_path, split=split))
    failed = [check["name"] for check in described["checks"] if not check["ok"]]
    assert failed == [USABLE]
    assert "role test, got no row" in check_of(described, USABLE)["detail"]
    assert rows_of(described, "roles")[3]["rows"] == 0


def test_a_purge_that_was_forgotten_is_found(data: DataSpec, tmp_path: Path, monkeypatch: Any) -> None:
    fates = preparation.fates

    def unpurged(bars: Bars, outcome: Any, universe: Any, split: Any) -> np.ndarray:
        nothing_crosses = replace(outcome, label_end=bars.day)
        return fates(bars, nothing_crosses, universe, split)

    monkeypatch.setattr(preparation, "fates", unpurged)
    found = check_of(describe(changed(data, tmp_path)), ORDER)
    assert not found["ok"]
    assert found["detail"].startswith("labels of train reach ")


def test_a_wrong_label_is_found(data: DataSpec, tmp_path: Path, monkeypatch: Any) -> None:
    outcomes = preparation.labels.outcomes

    def shifted(*given: Any) -> Any:
        outcome = outcomes(*given)
        return replace(outcome, label=np.where(np.isnan(outcome.label), np.nan, np.roll(outcome.label, 1) == 1))

    monkeypatch.setattr(preparation.labels, "outcomes", shifted)
    found = check_of(describe(changed(data, tmp_path)), LABELS)
    assert not found["ok"]
    assert " rises by " in found["detail"]


def test_a_feature_that_knows_the_future_is_found(data: DataSpec, tmp_path: Path, monkeypatch: Any) -> None:
    def leaking(bars: Bars) -> np.ndarray:
        matrix = build(bars)
        column = features.names().index("momentum_5")
        following = np.append(bars.close[1:], np.nan) / bars.close
        matrix[:, column] = np.where(np.append(np.diff(bars.stock), 1) == 0, following, 1.0)
        return matrix

    monkeypatch.setattr(features, "build", leaking)
    found = check_of(describe(changed(data, tmp_path)), PAST)
    assert not found["ok"]
    assert found["detail"].startswith("train: momentum_5 on ")
    assert all("momentum_5" in fault for fault in found["detail"].split("; "))


def test_raw_prices_are_found(tmp_path: Path) -> None:
    """A dividend of 2 % a stock, which lowers the reference of its day."""
    table = frame(BARS)
    paid = BARS.dates[BARS.day] < 20190601
    table.loc[paid, ["open", "high", "low", "close", "pre_close"]] *= 1.02
    found = check_of(describe(spec(tmp_path / "raw", write_files(tmp_path / "raw", BARS, table=table))), ADJUSTED)
    assert not found["ok"]
    assert found["detail"].startswith(
        f"8 of {len(BARS) - 8} bars refer to another close than that of the bar before; "
    )


def test_survivors_alone_are_warned_of(data: DataSpec, tmp_path: Path) -> None:
    warning = "WARNING: only 0 of 8 stocks have no bar in the last 20 days: delisted ones seem to be missing"
    assert check_of(describe(data), ENDED)["detail"].startswith(warning)
    table = frame(BARS)
    ended = table[(table["ts_code"] != BARS.stocks[2]) | (table["trade_date"] <= BARS.dates[150])]
    folder = tmp_path / "ended"
    found = check_of(describe(spec(folder, write_files(folder, BARS, table=ended))), ENDED)
    assert found["detail"] == "1 of 8 stocks have no bar in the last 20 days"


def test_the_seed_chooses_what_is_looked_at(data: DataSpec) -> None:
    days = {check_of(description.describe(data, seed), PAST)["detail"] for seed in range(3)}
    assert len(days) == 3
    assert description.describe(data, 1) == description.describe(data, 1)


def test_all_of_it_is_plain(data: DataSpec) -> None:
    described = describe(data)
    cells = [cell for table in described["tables"].values() for row in table["rows"] for cell in row]
    assert {type(cell) for cell in cells} <= {str, int, float}
    assert [row["role"] for row in rows_of(described, "roles")] == list(ROLES)
