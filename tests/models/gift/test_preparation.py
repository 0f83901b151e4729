"""models/gift/preparation.py: every statistic comes from train alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models.gift import preparation, split
from models.gift.data import load
from models.trainer import ROLES, InputError
from tests.models.gift.tables import (
    ALL,
    SEARCH,
    make_frame,
    options,
    raw_of,
    spec,
    train_statistics,
)


def test_every_statistic_comes_from_train_alone(tmp_path: Path) -> None:
    frame = make_frame()
    changed = frame.copy()
    later = changed.index >= 1400
    rng = np.random.default_rng(5)
    changed.loc[later, "age"] = rng.normal(4000, 1e6, 600)
    changed.loc[later, "gains"] = 0.5
    changed.loc[later, "fixed"] = np.where(rng.random(600) < 0.5, np.nan, 1e6)
    changed.loc[later, "city"] = rng.choice(["Aarau", "Zug", "Bern"], 600)
    changed.loc[later, "weeks"] = 1000
    changed.loc[later, "paid"] = np.where(rng.random(600) < 0.8, 1e5, 0)
    changed.loc[later, "income"] = np.where(rng.random(600) < 0.9, "50000+.", "- 50000.")
    first = load(spec(tmp_path, frame, options()), ALL)
    (tmp_path / "b").mkdir()
    second = load(spec(tmp_path / "b", changed, options()), ALL)
    assert len(first.part("train").unit) == 1400
    for one, other in zip(train_statistics(first).values(), train_statistics(second).values(), strict=True):
        np.testing.assert_equal(one, other)
    assert not np.array_equal(first.part("valid").numeric, second.part("valid").numeric)


def test_numbers_are_standardised_compressed_and_filled(tmp_path: Path) -> None:
    frame = make_frame()
    dataset = load(spec(tmp_path, frame, options()), ALL)
    assert dataset.numeric_names == ("age", "gains", "gaps", "fixed", "gaps__missing")
    train = frame[:1400]
    assert stats.skew(train["gains"]) > preparation.SKEWED > abs(stats.skew(train["age"]))
    values = frame.assign(gains=np.log1p(frame["gains"]))[["age", "gains", "gaps"]].to_numpy()
    expected = (values - np.nanmean(values[:1400], axis=0)) / np.nanstd(values[:1400], axis=0)
    start = 0
    for role in ROLES:
        numeric = dataset.part(role).numeric
        rows = slice(start, start + len(numeric))
        np.testing.assert_allclose(numeric[:, :3], np.nan_to_num(expected[rows]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(numeric[:, 3], 0)  # constant in train
        np.testing.assert_array_equal(numeric[:, 4], frame["gaps"].isna()[rows])
        assert numeric.dtype == np.float32
        start += len(numeric)


def test_a_column_constant_in_train_stays_silent_elsewhere(tmp_path: Path) -> None:
    frame = make_frame()
    frame.loc[1500:, "fixed"] = 1e30
    frame.loc[1600:, "fixed"] = np.nan
    dataset = load(spec(tmp_path, frame, options()), ALL)
    assert dataset.numeric_names[-1] == "gaps__missing"  # fixed is never missing in train: no indicator
    assert all((dataset.part(role).numeric[:, 3] == 0).all() for role in ROLES)


def test_quantiles_are_those_of_the_prepared_train_rows(tmp_path: Path) -> None:
    dataset = load(spec(tmp_path, make_frame(), options()), SEARCH)
    expected = np.quantile(dataset.part("train").numeric.astype(np.float64), np.linspace(0, 1, 257), axis=0)
    assert dataset.quantiles.shape == (257, 5)
    np.testing.assert_allclose(dataset.quantiles, expected, rtol=1e-5, atol=1e-6)


def test_rare_unknown_and_missing_levels_share_code_zero(tmp_path: Path) -> None:
    frame = make_frame()
    frame["city"] = "Bern"
    frame.loc[:9, "city"] = "Chur"  # ten train rows: known
    frame.loc[10:18, "city"] = "Aarau"  # nine: rare
    frame.loc[19:40, "city"] = None
    frame.loc[1900:, "city"] = "Zug"  # test alone
    dataset = load(spec(tmp_path, frame, options()), ALL)
    assert dataset.cardinalities == (3,)
    codes = np.concatenate([dataset.part(role).categorical[:, 0] for role in ROLES])
    expected = frame["city"].map({"Bern": 1, "Chur": 2}).fillna(0)
    np.testing.assert_array_equal(codes, expected)


def test_targets(tmp_path: Path) -> None:
    frame = make_frame()
    frame["weeks"] = frame["weeks"].astype(object)
    frame.loc[3, "weeks"] = None
    dataset = load(spec(tmp_path, frame, options()), SEARCH)
    train = frame[:1400]
    paid = np.log1p(train["paid"][train["paid"] > 0])
    weeks = train["weeks"].dropna().astype(float)
    assert dataset.base_rate == pytest.approx(
        {"pays": (train["paid"] > 0).mean(), "rich": (train["income"] == "50000+.").mean()}
    )
    assert dataset.target_mean == pytest.approx({"weeks": weeks.mean(), "paid": paid.mean()})
    assert dataset.target_std == pytest.approx({"weeks": weeks.std(ddof=0), "paid": paid.std(ddof=0)})
    labels = dataset.part("train").labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels[:, 3], train["paid"].astype(np.float32))  # raw: transformed by the trainer
    assert np.isnan(labels[3, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300))
def test_encoding_by_blocks_and_chunks_equals_encoding_at_once(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    numeric = rng.normal(5, 3, (n, 19)).astype(np.float32)
    numeric[rng.random(numeric.shape) < 0.05] = np.nan
    rows = np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False))
    encoder, quantiles = preparation.fit_numeric(numeric, [""] * 19, rows, compress=False)
    whole = encoder(numeric)
    assert np.isfinite(whole).all()
    assert whole.shape[1] == quantiles.shape[1] == 19 + np.isnan(numeric[rows]).any(axis=0).sum()
    train = whole[rows][:, :19]
    known = ~np.isnan(numeric[rows])
    for column in range(19):
        values = train[known[:, column], column].astype(np.float64)
        if len(values) > 1:
            assert abs(values.mean()) < 1e-4
            assert values.std() == pytest.approx(1, abs=1e-4)
    parts = [encoder(numeric[piece]) for piece in split.chunks(rows, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[rows])


def test_an_infinite_feature_is_refused_by_name(tmp_path: Path) -> None:
    numeric = np.ones((40, 2), np.float32)
    numeric[:, 0] = np.arange(40)
    raw = raw_of(
        np.arange(40), numeric=numeric, numeric_names=("fine", "broken"), labels={"y": np.arange(40) % 2.0}
    )
    task = options(tasks={"y": {"kind": "binary", "column": "y"}}).task_list()
    for changed in (39, 0):
        raw.numeric[:, 1] = np.arange(40)
        raw.numeric[changed, 1] = np.inf
        with pytest.raises(InputError, match="feature broken: expected finite values"):
            preparation.write(tmp_path, raw, raw.labels, task, options().split, compress=False)
