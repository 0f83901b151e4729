"""models/stock/data.py, origin.py and preparation.py: the options, the identity of the data, the prepared roles."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.location import locate
from models.stock import features, labels, origin, preparation
from models.stock.bars import read
from models.stock.data import StockData, StockDataset, load
from models.trainer import ROLES, DataSpec, FileStamp, InputError, Role
from tests.models.stock.market import ALL, LIMIT, SEARCH, frame, random_bars, spec, write_files

BARS = random_bars(n_stocks=8, n_days=220, seed=7, late=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = tmp_path_factory.mktemp("data") / "market"
    return spec(folder, write_files(folder, BARS))


@pytest.fixture(scope="module")
def dataset(data: DataSpec) -> StockDataset:
    return load(data, ALL)


def changed(data: DataSpec, **sections: Any) -> DataSpec:
    """The same files under other options."""
    return replace(data, options=StockData(**{**data.options.model_dump(), **sections}))


# ------------------------------------------------------------------------------------------------ prepared roles


def test_parts_hold_what_features_and_labels_say(data: DataSpec, dataset: StockDataset) -> None:
    bars = read(data.path, data.options)
    matrix, outcome = features.build(bars), labels.outcomes(bars, data.options.label, data.options.universe)
    order = np.lexsort((bars.stock, bars.day))  # as `score` has the rows
    assert dataset.feature_names == features.names()
    np.testing.assert_array_equal(dataset.dates, bars.dates)
    assert dataset.stocks == bars.stocks
    for role in ROLES:
        part = dataset.part(role)
        rows = order[part.row]
        assert len(part) > 50
        assert (np.diff(part.row) > 0).all()
        assert (np.diff(part.day.astype(np.int64) * 1000 + part.stock) > 0).all()
        np.testing.assert_array_equal(part.features, matrix[rows])
        np.testing.assert_array_equal(part.labels, outcome.label[rows])
        np.testing.assert_array_equal(part.label_end, bars.day[rows] + 5)
        np.testing.assert_array_equal(part.day, bars.day[rows])
        np.testing.assert_array_equal(part.stock, bars.stock[rows])
        dtypes = [array.dtype for array in vars(part).values()]
        assert dtypes == [np.float32, np.float32, np.int32, np.int32, np.int32, np.int64]
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in vars(part).values())
    assert dataset.manifest.rows == {role: len(dataset.part(role)) for role in ROLES}


def test_every_bar_has_a_role_or_a_reason(dataset: StockDataset) -> None:
    counted = dataset.statistics["fates"]
    assert sum(counted.values()) == len(BARS) == dataset.statistics["facts"]["bars"]
    assert {role: counted[role] for role in ROLES} == dict(dataset.manifest.rows)
    assert counted["limit_up"] > 0
    assert counted["short_history"] > 0
    assert counted["purged"] > 0
    assert counted["label_unknown"] >= 5 * 7
    assert counted["outside_universe"] == 0


def test_statistics_are_those_of_train_alone(dataset: StockDataset) -> None:
    train = dataset.part("train")
    values = np.asarray(train.features, np.float64)
    np.testing.assert_allclose(
        dataset.statistics["feature_mean"], np.nanmean(values, axis=0), rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(dataset.statistics["feature_std"], np.nanstd(values, axis=0), rtol=1e-5)
    np.testing.assert_allclose(dataset.statistics["feature_missing"], np.isnan(values).mean(axis=0))
    assert dataset.statistics["base_rate"] == pytest.approx(train.labels.mean())


def test_counts_of_roles_and_the_swing_of_their_days(dataset: StockDataset) -> None:
    for role in ROLES:
        part, counted = dataset.part(role), dataset.statistics["roles"][role]
        daily = pd.Series(part.labels).groupby(np.asarray(part.day)).mean()
        assert counted["rows"] == len(part)
        assert counted["positives"] == part.labels.sum()
        assert counted["days"] == len(daily)
        assert counted["stocks"] == len(np.unique(part.stock))
        assert counted["range"] == [dataset.dates[part.day[0]], dataset.dates[part.day[-1]]]
        swing = counted["daily_base_rate"]
        assert swing["min"] == pytest.approx(daily.min())
        assert swing["median"] == pytest.approx(daily.median())
        assert swing["max"] == pytest.approx(daily.max())


def test_a_feature_that_says_nothing_has_mean_0_or_deviation_1(data: DataSpec, monkeypatch: Any) -> None:
    def build(bars: Any) -> np.ndarray:
        return np.full((len(bars), 2), (1.0, np.nan), np.float32)

    monkeypatch.setattr(preparation.features, "build", build)
    monkeypatch.setattr(preparation.features, "names", lambda: ("same", "unknown"))
    found = load(replace(data, cache=data.cache / "constant"), SEARCH)
    assert found.statistics["feature_mean"] == [1.0, 0.0]
    assert found.statistics["feature_std"] == [1.0, 1.0]
    assert found.statistics["feature_missing"] == [0.0, 1.0]


def test_an_infinite_feature_is_refused_by_name(data: DataSpec, monkeypatch: Any) -> None:
    def build(bars: Any) -> np.ndarray:
        matrix = np.zeros((len(bars), 2), np.float32)
        matrix[bars.day == 60, 1] = np.inf
        return matrix

    monkeypatch.setattr(preparation.features, "build", build)
    monkeypatch.setattr(preparation.features, "names", lambda: ("fine", "broken"))
    with pytest.raises(
        InputError, match=r"^feature broken: expected finite values, got an infinite one in role train"
    ):
        load(replace(data, cache=data.cache / "infinite"), SEARCH)


def test_search_needs_no_file_of_the_roles_that_are_kept_back(data: DataSpec, dataset: StockDataset) -> None:
    (folder,) = (path.parent for path in data.cache.glob("*/statistics.json"))
    copy = data.cache.parent / "searched"
    shutil.copytree(data.cache, copy)
    for role in ("calibrate", "test"):
        shutil.rmtree(copy / folder.name / role)
    marked = (copy / folder.name / "train" / "features.npy").stat().st_mtime_ns
    found = load(replace(data, cache=copy), SEARCH)
    assert set(found.parts) == SEARCH
    for role in SEARCH:
        np.testing.assert_array_equal(found.part(role).features, dataset.part(role).features)
    assert (copy / folder.name / "train" / "features.npy").stat().st_mtime_ns == marked  # nothing was built again
    with pytest.raises(KeyError, match="role test was not opened"):
        found.part("test")
    assert len(load(replace(data, cache=copy), ALL).part("test")) == len(dataset.part("test"))


def test_data_are_prepared_once_and_told_of(data: DataSpec, tmp_path: Path, caplog: Any) -> None:
    given = replace(data, cache=tmp_path / "cache")
    with caplog.at_level(logging.INFO, "models.stock"):
        load(given, SEARCH)
        actions = [record.action for record in caplog.records]
        load(given, ALL)
    assert actions == ["bars_read", "labels", "features", "prepared"]
    assert len(caplog.records) == 4
    assert f"{len(BARS)} bars of 8 stocks over 220 days" in caplog.text


def test_writing_copies_no_matrix_as_a_whole(tmp_path: Path, monkeypatch: Any) -> None:
    bars = random_bars(n_stocks=100, n_days=600, suspended=0.0, late=0.0)
    matrix = np.ones((len(bars), 60), np.float32)
    monkeypatch.setattr(preparation.features, "build", lambda _bars: matrix)
    monkeypatch.setattr(preparation.features, "names", lambda: tuple(f"f{i}" for i in range(60)))
    monkeypatch.setattr(preparation, "_CHUNK_ROWS", 4096)
    options = StockData(path=tmp_path)
    tracemalloc.start()
    try:
        preparation.write(tmp_path, bars, options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < matrix.nbytes / 2  # labels and windows of the bars are in it too
    assert np.load(tmp_path / "train" / "features.npy", mmap_mode="r").nbytes > matrix.nbytes / 3


def test_data_are_prepared_without_torch_and_xgboost() -> None:
    modules = ("origin", "preparation", "description")
    imports = ", ".join(f"models.stock.{name}" for name in modules)
    code = f"import sys, {imports}; print({{'torch', 'xgboost'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------ refused


def refused(data: DataSpec, roles: frozenset[Role] = ALL) -> str:
    with pytest.raises(InputError) as caught:
        load(data, roles)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WAY_OUT = "change data.split, data.label.min_return or data.universe, or give more data"


def test_a_role_without_rows(data: DataSpec) -> None:
    split = {"valid": "2019-07-01", "calibrate": "2019-09-02", "test": "2031-01-01"}
    given = changed(data, split=split)
    assert refused(given) == f"data.split: expected rows of both labels in role test, got no row; {WAY_OUT}"
    assert len(load(given, SEARCH).part("valid")) > 0  # nobody asked for test
    late = {"valid": "2019-01-07", "calibrate": "2019-09-02", "test": "2019-10-01"}
    assert "in role train, got no row;" in refused(changed(data, split=late))


@pytest.mark.parametrize(("min_return", "side"), [(5.0, "0"), (1e-9, "N")])
def test_a_role_of_one_class(tmp_path: Path, min_return: float, side: str) -> None:
    bars = random_bars(n_stocks=4, n_days=120, limit_up=0.0)
    rising = np.exp(0.01 * bars.day).astype(np.float32)
    prices = {
        name: rising * np.float32(x) for name, x in (("open", 1), ("high", 1.01), ("low", 0.99), ("close", 1))
    }
    bars = replace(bars, **prices, pre_close=rising)
    message = refused(
        spec(tmp_path / "m", write_files(tmp_path / "m", bars, label={"min_return": min_return})), SEARCH
    )
    n = message.split(" of ")[-1].split()[0]
    got = f"{'0' if side == '0' else n} of {n} rows positive"
    assert message == f"data.split: expected rows of both labels in role train, got {got}; {WAY_OUT}"


def test_nothing_is_kept_of_what_is_refused(data: DataSpec, tmp_path: Path) -> None:
    given = replace(changed(data, label={"min_return": 5.0}), cache=tmp_path / "cache")
    assert "got 0 of " in refused(given, SEARCH)
    assert not list((tmp_path / "cache").glob("*/statistics.json"))


def test_folds_of_one_class_are_refused_when_valid_is_opened(data: DataSpec) -> None:
    few = changed(data, split={"folds": 20})
    message = refused(few, SEARCH)
    assert message.startswith("data.split.folds: expected ")
    assert load(few, frozenset({"train"})).manifest.rows["valid"] > 0
    assert load(few, frozenset()).parts == {}


def test_fewer_than_60_days_and_no_path(tmp_path: Path) -> None:
    given = spec(tmp_path / "m", write_files(tmp_path / "m", random_bars(4, 59)))
    assert "expected at least 60 market days, got 59" in refused(given)
    assert (
        refused(replace(given, path=None)) == "data: expected a folder with daily bars, got none; use --data PATH"
    )


def test_files_that_change_while_they_are_read(data: DataSpec, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "m"
    given = spec(folder, write_files(folder, BARS))
    build = features.build

    def changing(bars: Any) -> np.ndarray:
        frame(BARS).assign(vol=1.0).to_parquet(folder / "daily.parquet")
        return build(bars)

    monkeypatch.setattr(preparation.features, "build", changing)
    assert refused(given) == f"{folder}: expected files at rest, but they changed while they were read; start again"


# ------------------------------------------------------------------------------------------------ identity


def hash_of(data: DataSpec) -> str:
    return origin.find_origin(data).data_hash


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_files_are_known_by_their_content_and_found_again(tmp_path: Path, form: Any) -> None:
    here, there = tmp_path / "here", tmp_path / "roots" / "somewhere" / "there"
    given = spec(here, write_files(here, BARS, form))
    manifest = load(given, frozenset()).manifest
    bars = {f"daily/{symbol}.csv" for symbol in BARS.stocks} if form == "folder" else {"daily.parquet"}
    assert set(manifest.files) == bars | {"index.csv", "listing.csv"}
    assert all(isinstance(stamp, FileStamp) and len(stamp.sha256) == 64 for stamp in manifest.files.values())
    assert not manifest.simulated
    assert manifest.source == f"daily bars {'daily' if form == 'folder' else 'daily.parquet'}"
    assert manifest.preparation == origin.VERSIONS
    there.parent.mkdir(parents=True)
    here.rename(there)
    found = locate(manifest.files, [tmp_path / "roots"], tmp_path / "memo.json")
    assert found == there
    elsewhere = DataSpec(given.options, found, tmp_path / "other-cache")
    assert load(elsewhere, frozenset()).manifest == manifest


def test_a_single_file_is_located_as_itself(tmp_path: Path) -> None:
    given = spec(tmp_path / "m", write_files(tmp_path / "m", random_bars(5, 130, index=False, n_industries=0)))
    manifest = load(given, frozenset()).manifest
    found = locate(manifest.files, [tmp_path / "m"], tmp_path / "memo.json")
    assert found == tmp_path / "m" / "daily.parquet"
    assert load(replace(given, path=found), frozenset()).manifest == manifest


def test_names_of_files_and_folds_change_no_number(data: DataSpec, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    (copy / "daily.parquet").rename(copy / "bars.parquet")
    (copy / "index.csv").rename(copy / "market.csv")
    renamed = changed(replace(data, path=copy), bars="bars.parquet", index={"file": "market.csv"})
    assert hash_of(renamed) == hash_of(data)
    assert hash_of(changed(data, split={"folds": 4})) == hash_of(data)


@pytest.mark.parametrize(
    "sections",
    [
        {"label": {"min_return": 0.05}},
        {"label": {"entry": "next_open"}},
        {"split": {"embargo": 3}},
        {"split": {"train": 0.5, "valid": 0.2}},
        {"universe": {"min_history": 30}},
        {"universe": {"n_stocks": 5}},
        {"universe": {"start": "2019-02-01"}},
        {"universe": {"limit_up": {"default": 0.2}}},
        {"universe": {"limit_up": {"default": {"2019-02-01": 0.1}}}},
        {"columns": {"amount": None}},
        {"listing": None},
        {"listing": {"file": "listing.csv", "prefix": "6"}},
        {"index": None},
    ],
)
def test_every_other_option_makes_another_dataset(data: DataSpec, sections: dict[str, Any]) -> None:
    assert hash_of(changed(data, **sections)) != hash_of(data)


@pytest.mark.parametrize("name", sorted(origin.VERSIONS))
def test_every_version_makes_another_dataset(data: DataSpec, name: str, monkeypatch: Any) -> None:
    before = hash_of(data)
    monkeypatch.setitem(origin.VERSIONS, name, 99)
    assert hash_of(data) != before


def test_another_list_of_features_makes_another_dataset(data: DataSpec, monkeypatch: Any) -> None:
    before = hash_of(data)
    monkeypatch.setattr(origin, "names", lambda: features.names()[:-1])
    assert hash_of(data) != before


def test_versions_are_those_of_their_modules() -> None:
    assert origin.VERSIONS["features"] == features.FEATURES_VERSION
    assert origin.VERSIONS["labels"] == labels.LABEL_VERSION
    assert origin.VERSIONS["preparation"] == preparation.PREPARATION_VERSION


@pytest.mark.parametrize("name", ["daily.parquet", "index.csv", "listing.csv"])
def test_another_content_makes_another_dataset(tmp_path: Path, name: str) -> None:
    given = spec(tmp_path / "m", write_files(tmp_path / "m", BARS))
    before = hash_of(given)
    with (tmp_path / "m" / name).open("ab") as stream:
        stream.write(b"\n")
    assert hash_of(given) != before


# ------------------------------------------------------------------------------------------------ what options do


def test_a_universe_of_some_stocks_changes_rows_and_no_feature(data: DataSpec, dataset: StockDataset) -> None:
    few = load(changed(data, universe={"n_stocks": 4, "min_history": 20, "limit_up": {"default": LIMIT}}), ALL)
    assert few.statistics["stocks_in_universe"] == 4
    assert few.statistics["fates"]["outside_universe"] > 0
    drawn = np.unique(few.part("train").stock)
    assert len(drawn) <= 4
    for role in ROLES:
        mine, all_of_them = few.part(role), dataset.part(role)
        kept = np.isin(all_of_them.row, mine.row)
        np.testing.assert_array_equal(mine.features, all_of_them.features[kept])
        np.testing.assert_array_equal(mine.labels, all_of_them.labels[kept])


def test_a_day_more_changes_no_row_before(data: DataSpec, tmp_path: Path) -> None:
    split = {"valid": "2019-06-03", "calibrate": "2019-07-01", "test": "2019-08-01"}
    shorter = {**data.options.universe.model_dump(), "end": "2019-10-01"}
    one = load(changed(data, split=split, universe=shorter), ALL)
    other = load(changed(data, split=split), ALL)
    for role in ("train", "valid", "calibrate"):
        for name, array in vars(one.part(role)).items():
            np.testing.assert_array_equal(array, getattr(other.part(role), name), err_msg=name)
    n = len(one.part("test"))
    assert n < len(other.part("test"))
    np.testing.assert_array_equal(one.part("test").features, other.part("test").features[:n])


def test_what_is_stored_is_json_without_nan(data: DataSpec, dataset: StockDataset) -> None:
    (path,) = data.cache.glob(f"{dataset.manifest.data_hash[:16]}/statistics.json")

    def never(text: str) -> Any:
        raise AssertionError(text)

    json.loads(path.read_text(), parse_constant=never)
    assert not any(str(data.path) in text for text in (path.read_text(), repr(dataset.manifest)))
