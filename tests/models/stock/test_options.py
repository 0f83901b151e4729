"""models/stock/data.py: what a specification may say of the data, and what is refused."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from pydantic import ValidationError

from models.stock.data import BarColumns, Split, StockData, Universe


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("split", {"train": 0.7}, "train + valid + calibrate + test: expected 1, got 1.1"),
        ("split", {"valid": 1.5}, "valid: expected a share between 0 and 1 or a day such as 2021-01-04, got 1.5"),
        ("split", {"valid": 20210104}, "valid: expected a share between 0 and 1 or a day such as 2021-01-04, got"),
        ("split", {"train": 0.0, "valid": 0.7}, "train: expected a share between 0 and 1 or a day"),
        ("split", {"train": None}, "train + valid + calibrate + test: expected 1, got 0.4"),
        ("split", {"valid": "2021-01-04"}, "expected shares of all four roles, or the first days of valid, "
         "calibrate and test and no share, got first days of valid and shares of calibrate, test"),
        ("split", {"train": 0.6, "valid": "2021-01-04", "calibrate": "2021-06-01", "test": "2022-01-04"},
         "got first days of valid, calibrate, test and shares of train"),
        ("split", {"valid": "2021-01-04", "calibrate": "2020-06-01", "test": "2022-01-04"},
         "expected first days of valid, calibrate and test in their order, got 2021-01-04, 2020-06-01, 2022-01-04"),
        ("split", {"valid": "soon"}, "split.valid"),
        ("split", {"embargo": -1}, "split.embargo"),
        ("split", {"folds": 0}, "split.folds"),
        ("label", {"first": 6}, "first: expected at most last (5), got 6"),
        ("label", {"last": 61}, "label.last"),
        ("label", {"exit": "low"}, "label.exit"),
        ("universe", {"limit_up": {"688": 0.2}}, "limit_up: expected an entry `default` (null: no"),
        ("universe", {"limit_up": {"default": 10}}, "limit_up.default: expected a share between 0 and 1"),
        ("universe", {"limit_up": {"default": None, "3": 0.0}}, "limit_up.3: expected a share between 0 and 1"),
        ("universe", {"limit_up": {"default": {"2020-08-24": 2}}}, "limit_up.default: expected a share between"),
        ("universe", {"start": "2020-01-02", "end": "2020-01-01"},
         "start: expected a day up to end (2020-01-01), got 2020-01-02"),
        ("universe", {"n_stocks": 1}, "universe.n_stocks"),
        ("universe", {"min_history": 3}, "universe.min_history"),
        ("columns", {"close": "open"}, "expected a column of its own for each, got open twice"),
        ("columns", {"volumes": "v"}, "columns.volumes"),
        ("index", {"file": "../index.csv"}, "index.file: expected a name inside data.path, got '../index.csv'"),
        ("listing", {"file": "/etc/passwd"}, "listing.file: expected a name inside data.path, got '/etc/passwd'"),
        ("bars", "a/../../b.csv", "bars: expected a name inside data.path, got 'a/../../b.csv'"),
        ("horizon", 5, "horizon"),
    ],
)  # fmt: skip
def test_faults_of_the_options(section: str, given: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StockData(path="data", **{section: given})
    where = ".".join(str(part) for part in caught.value.errors()[0]["loc"])
    assert expected in f"{where}: {caught.value}"


def test_the_defaults_are_sixty_twenty_twenty_of_tusharelike_bars() -> None:
    options = StockData(path="data")
    assert options.columns.given()["symbol"] == "ts_code"
    assert (options.split.train, options.split.valid, options.split.calibrate, options.split.test) == (
        0.6,
        0.1,
        0.1,
        0.2,
    )
    assert (options.label.first, options.label.last, options.label.min_return) == (3, 5, 0.04)


def test_first_days_need_no_share_of_train_and_survive_json() -> None:
    split = Split(valid="2021-01-04", calibrate=date(2021, 7, 1), test="2022-01-04")
    assert (split.train, split.valid) == (None, date(2021, 1, 4))
    assert Split.model_validate_json(split.model_dump_json()) == split
    assert Split.model_validate(Split().model_dump(mode="json")) == Split()


def test_columns_that_the_files_have_not() -> None:
    given = BarColumns(symbol=None, pre_close=None, amount=None).given()
    assert set(given) == {"date", "open", "high", "low", "close", "volume"}


def test_universe_defaults_know_of_no_limit() -> None:
    assert Universe().limit_up == {"default": None}
