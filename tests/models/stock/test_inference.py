"""The stock model outside its study: the exported folder, new bars scored from it, ablation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

from models.stock import bars as stock_bars
from models.stock import features, inference, labels
from models.stock.data import StockDataset
from models.stock.trainer import StockTrainer
from models.trainer import ROLES, DataSpec, InputError, Run
from tests.models.stock import market, planted

TRAINER = StockTrainer()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return planted.planted_spec(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(spec: DataSpec) -> StockDataset:
    return TRAINER.load(spec, frozenset(ROLES))


def fitted(folder: Path, data: StockDataset, **changed: Any) -> Path:
    run = Run(folder, 42, "cpu", 1, planted.DECISION)
    *_, last = TRAINER.fit(planted.config(**changed), data, run)
    return folder / "attempt-1" / f"step-{last.step:05d}"


@pytest.fixture(scope="module")
def checkpoint(data: StockDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("run"), data)


@pytest.fixture
def model(checkpoint: Path, data: StockDataset, tmp_path: Path) -> Path:
    return exported(checkpoint, data, tmp_path / "model")


def exported(checkpoint: Path, data: StockDataset, folder: Path) -> Path:
    folder.mkdir()
    TRAINER.export(checkpoint, data, folder)
    return folder


def scored(model: Path, source: Path, **changed: Any) -> pd.DataFrame:
    """All scored bars as one table."""
    batches = list(TRAINER.score(model, source, model.parent / "cache", **changed))
    assert not (model.parent / "cache").exists()
    tables = [pd.DataFrame({**b.keys, "score": b.predictions.scores["rise"]}) for b in batches]
    return pd.concat(tables, ignore_index=True)


def edit(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((model / "model.json").read_text())
    change(content)
    (model / "model.json").write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------- the folder


def test_the_folder_says_all_that_the_model_is(model, checkpoint, data):
    content = json.loads((model / "model.json").read_text())
    assert {path.name for path in model.iterdir()} == {"model.json", "model.ubj"}
    assert content["trainer"] == "stock"
    assert content["data_hash"] == data.manifest.data_hash
    assert content["features"] == list(features.names())
    assert content["config"] == planted.config().model_dump(mode="json")
    assert content["data"]["label"] == data.options.label.model_dump(mode="json")
    assert content["data"]["universe"] == data.options.universe.model_dump(mode="json")
    assert content["data"]["columns"]["volume"] == "vol"
    assert "path" not in content["data"]
    assert content["rounds"] == 5 * (content["step"] + 1)
    assert {"valid/rise/roc_auc", "valid/rise/threshold", "valid/rise/violation"} <= set(content["metrics"])


def test_xgboost_alone_gives_the_scores_of_the_study(model, checkpoint, data):
    booster, part = xgb.Booster(model_file=model / "model.ubj"), data.part("test")
    assert booster.feature_names == list(data.feature_names)
    assert booster.num_boosted_rounds() == json.loads((model / "model.json").read_text())["rounds"]
    matrix = xgb.DMatrix(np.array(part.features), feature_names=list(data.feature_names))
    margins = booster.predict(matrix, output_margin=True)
    assert margins.tobytes() == TRAINER.predict(checkpoint, data, "test").scores["rise"].tobytes()


def test_only_an_empty_folder_is_exported_to(checkpoint, data, model, tmp_path):
    for folder in (model, tmp_path / "missing"):
        with pytest.raises(InputError, match="expected an empty folder to export to"):
            TRAINER.export(checkpoint, data, folder)


def test_a_checkpoint_of_other_data_is_refused(checkpoint, data, tmp_path):
    other = replace(data, manifest=replace(data.manifest, data_hash="other"))
    for ask in (
        lambda: TRAINER.predict(checkpoint, other, "valid"),
        lambda: list(TRAINER.ablate(checkpoint, other, "valid", planted.DECISION)),
        lambda: TRAINER.export(checkpoint, other, tmp_path),
    ):
        with pytest.raises(InputError, match="expected a checkpoint of these data, got one of others"):
            ask()


def _truncate(model: Path) -> None:
    path = model / "model.ubj"
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: (m / "model.json").unlink(), r"model\.json: expected an exported model, got none"),
        (lambda m: (m / "model.json").write_text("{"), r"model\.json: expected JSON, got a damaged file"),
        (lambda m: (m / "model.json").write_text("[]"), r"model\.json: expected a model of the trainer stock"),
        (lambda m: edit(m, lambda c: c.update(trainer="gift")), "expected a model of the trainer stock"),
        (lambda m: edit(m, lambda c: c.update(format=2)), "expected model format 1, got 2"),
        (lambda m: edit(m, lambda c: c["versions"].update(features=999)), r"got reader .*, features 999, labels"),
        (lambda m: edit(m, lambda c: c.update(versions=3)), "expected a model of the rules .*, got 3"),
        (lambda m: edit(m, lambda c: c.pop("config")), r"expected a whole exported model.*\('config'\)"),
        (lambda m: edit(m, lambda c: c.update(data=None)), "expected a whole exported model, got a damaged one"),
        (lambda m: edit(m, lambda c: c["features"].append("no")), "expected a whole exported model"),
        (lambda m: (m / "model.ubj").unlink(), r"model\.ubj: expected the trees of the model, got none"),
        (lambda m: (m / "model.ubj").write_bytes(b""), r"model\.ubj: expected the trees of model\.json"),
        (_truncate, r"model\.ubj: expected the trees of model\.json, got others"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_whole_model_is_refused_before_the_source_is_read(model, damage, words):
    damage(model)
    with pytest.raises(InputError, match=words) as caught:
        TRAINER.score(model, Path("not read"), Path("cache"))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- new bars


def test_all_bars_are_scored_by_day_and_stock_also_the_last_ones(model, spec):
    found = scored(model, spec.path)
    bars = stock_bars.read(spec.path, spec.options)
    assert len(found) == len(bars)
    assert found[["date", "symbol"]].equals(found[["date", "symbol"]].sort_values(["date", "symbol"]))
    expected = pd.DataFrame(
        {
            "date": bars.dates[bars.day].astype(np.int64),
            "symbol": np.array(bars.stocks)[bars.stock],
            "tradable": labels.outcomes(bars, spec.options.label, spec.options.universe).tradable,
        }
    )
    merged = found.merge(expected, on=["date", "symbol"], suffixes=("", "_expected"), validate="one_to_one")
    assert len(merged) == len(found)
    assert (merged["tradable"] == merged["tradable_expected"]).all()
    assert found["date"].dtype == np.int64
    assert found["date"].max() == bars.dates[-1]
    assert np.isfinite(found["score"]).all()
    assert 0 < found["tradable"].mean() < 1


def test_what_is_newest_and_what_could_be_bought_is_told(model, spec):
    batch = next(iter(TRAINER.score(model, spec.path, Path("cache"))))
    assert (batch.time, batch.eligible) == ("date", "tradable")


def test_scores_know_nothing_of_what_comes_after(model, spec, tmp_path):
    """A source that ends earlier gives the same scores, to the bit, for the days that it has."""
    whole = scored(model, spec.path)
    cut = int(np.unique(whole["date"])[150])
    shutil.copytree(spec.path, tmp_path / "cut")
    table = pd.read_parquet(spec.path / "daily.parquet")
    table[table["trade_date"] <= cut].to_parquet(tmp_path / "cut" / "daily.parquet", index=False)
    found = scored(model, tmp_path / "cut")
    expected = whole[whole["date"] <= cut].reset_index(drop=True)
    assert len(found) == len(expected)
    assert found["score"].to_numpy().tobytes() == expected["score"].to_numpy().tobytes()


def test_bars_after_the_end_of_the_study_are_scored_and_those_before_its_start_are_not(tmp_path):
    spec = planted.planted_spec(tmp_path, universe={"min_history": 20, "start": "2019-01-14", "end": "2019-12-20"})
    data = TRAINER.load(spec, frozenset(ROLES))
    model = exported(fitted(tmp_path / "run", data), data, tmp_path / "model")
    found = scored(model, spec.path)
    assert found["date"].min() == 20190114
    assert found["date"].max() == market.calendar(260)[-1] > 20191220
    part = data.part("test")
    expected = TRAINER.predict(tmp_path / "run" / "attempt-1" / "step-00004", data, "test").scores["rise"]
    assert found["score"].to_numpy()[part.row].tobytes() == expected.tobytes()
    assert (found["symbol"].to_numpy()[part.row] == np.array(data.stocks)[part.stock]).all()
    assert (found["date"].to_numpy()[part.row] == data.dates[part.day]).all()


def test_a_batch_changes_no_score(model, spec):
    whole, parts = (scored(model, spec.path, batch_rows=n) for n in (10**6, 401))
    assert whole.equals(parts)


def test_the_features_of_the_sketch_are_found_among_all(data, spec, tmp_path):
    checkpoint = fitted(tmp_path / "run", data, features="seed")
    model = exported(checkpoint, data, tmp_path / "model")
    assert json.loads((model / "model.json").read_text())["features"] == list(features.SEED)
    found = scored(model, spec.path)["score"].to_numpy()[data.part("test").row]
    assert found.tobytes() == TRAINER.predict(checkpoint, data, "test").scores["rise"].tobytes()


def test_weighed_positives_are_calibrated_in_the_folder_too(data, spec, tmp_path):
    checkpoint = fitted(tmp_path / "run", data, booster={"scale_pos_weight": 3.0})
    model = exported(checkpoint, data, tmp_path / "model")
    batch = next(iter(TRAINER.score(model, spec.path, Path("cache"))))
    np.testing.assert_array_equal(
        batch.predictions.calibrated["rise"], batch.predictions.scores["rise"].astype(np.float64) - math.log(3.0)
    )


def test_a_source_without_a_column_is_refused(model, spec, tmp_path):
    shutil.copytree(spec.path, tmp_path / "source")
    table = pd.read_parquet(spec.path / "daily.parquet").drop(columns="vol")
    table.to_parquet(tmp_path / "source" / "daily.parquet", index=False)
    with pytest.raises(InputError, match="vol"):
        scored(model, tmp_path / "source")


def test_batches_have_at_least_one_row(model, spec):
    with pytest.raises(InputError, match="batch_rows: expected at least 1, got 0"):
        TRAINER.score(model, spec.path, Path("cache"), batch_rows=0)


# ---------------------------------------------------------------------------------------------- ablation


@pytest.mark.parametrize("which", ["seed", "within_day", "full"])
def test_a_group_is_set_to_the_means_of_train(data, spec, tmp_path, which):
    checkpoint = fitted(tmp_path / "run", data, features=which)
    everywhere = features.GROUPS["market"] + features.GROUPS["breadth"]
    names = {
        "seed": features.SEED,
        "within_day": tuple(name for name in features.names() if name not in everywhere),
        "full": features.names(),
    }[which]
    booster = xgb.Booster(model_file=exported(checkpoint, data, tmp_path / "model") / "model.ubj")
    train, test = data.part("train").features, np.array(data.part("test").features)
    found = {a.name: a for a in TRAINER.ablate(checkpoint, data, "test", planted.DECISION)}
    assert set(found) == {group for group, members in features.GROUPS.items() if set(members) & set(names)}
    for group, ablation in found.items():
        columns = [data.feature_names.index(name) for name in names]
        numeric = test[:, columns].copy()
        for place, column in enumerate(columns):
            if data.feature_names[column] in features.GROUPS[group]:
                numeric[:, place] = np.nanmean(train[:, column].astype(np.float64))
        expected = booster.predict(xgb.DMatrix(numeric, feature_names=list(names)), output_margin=True)
        np.testing.assert_allclose(ablation.scores, expected, atol=0.02)
        assert np.mean(ablation.scores == expected) > 0.99  # a mean rounded otherwise may cross a split
    assert np.array_equal(np.array(data.part("test").features), test, equal_nan=True)


def test_ablation_with_folds_asks_each_fold(tmp_path):
    data = planted.made(folds=3)
    checkpoint = fitted(tmp_path, data)
    whole = TRAINER.predict(checkpoint, data, "valid").scores["rise"]
    found = list(TRAINER.ablate(checkpoint, data, "valid", planted.DECISION))
    assert all(a.scores.shape == whole.shape for a in found)
    last = inference.Stored.of(inference.checkpoints.load(checkpoint), data).blocks[-1]
    numeric = np.array(data.part("valid").features)
    assert not np.array_equal(inference.boosting.chain(last, numeric), whole)
