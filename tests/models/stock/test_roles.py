"""What an evaluation is told of bars: units, groups, and features for baselines."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from models import BASELINES
from models.baselines import fit_baseline
from models.stock.data import StockDataset
from models.stock.trainer import StockTrainer
from tests.models.stock import planted

TRAINER = StockTrainer()


@pytest.fixture(scope="module")
def data() -> StockDataset:
    return planted.made()


def test_units_and_groups_are_days_and_stocks(data):
    part = data.part("test")
    for unit, expected in {"row": np.arange(len(part)), "day": part.day, "stock": part.stock}.items():
        found = TRAINER.labels(data, "test", planted.DECISION.model_copy(update={"unit": unit}))
        np.testing.assert_array_equal(found.unit, expected)
        np.testing.assert_array_equal(found.groups["day"], part.day)
        np.testing.assert_array_equal(found.groups["stock"], part.stock)
        np.testing.assert_array_equal(found.tasks["rise"], part.labels)


def test_features_for_baselines_are_standardised_and_without_gaps(data):
    found, raw = TRAINER.features(data, "train"), data.part("train").features
    assert found.numeric_names == data.feature_names
    assert np.isnan(raw).any()
    assert (found.numeric[np.isnan(raw)] == 0.0).all()
    known = np.where(np.isnan(raw), np.nan, found.numeric)
    np.testing.assert_allclose(np.nanmean(known, axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(np.nanstd(known, axis=0), 1.0, atol=1e-4)
    assert found.codes.shape == (len(raw), 0)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_features_without_codes(data, name):
    train, valid = (TRAINER.features(data, role) for role in ("train", "valid"))
    labels = [TRAINER.labels(data, role, planted.DECISION) for role in ("train", "valid")]
    fitted = fit_baseline(name, train, labels[0], valid, labels[1], "rise", seed=0)
    logits = fitted.predict(valid).scores["rise"]
    assert np.isfinite(logits).all()
    assert name == "base_rate" or roc_auc_score(labels[1].tasks["rise"], logits) > 0.7
