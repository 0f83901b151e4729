"""models/gift/measures.py: where users are the unit, a step's decision counts users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.decision import decide
from models.gift.data import GiftDataset, load
from models.gift.measures import Validation
from models.gift.trainer import GiftConfig
from models.metrics import Ranking, Truth
from models.trainer import DataSpec, Decision, InputError, Run
from tests.models.gift.tables import SEARCH

CONFIG = GiftConfig(tasks={"has_gift": {"loss": "bce"}, "watch_time": {"loss": "mse"}})


@pytest.fixture(scope="module")
def data(simulated: DataSpec) -> GiftDataset:
    return load(simulated, SEARCH)


def validation(data: GiftDataset, unit: str, tmp_path: Path) -> Validation:
    decision = Decision(task="has_gift", target_precision=0.2, min_selected=20, unit=unit)
    tasks = [task for task in data.tasks if task.name in CONFIG.tasks]
    return Validation(CONFIG, data, tasks, Run(tmp_path, 1, "cpu", 1, decision))


def signal(data: GiftDataset) -> torch.Tensor:
    """Outputs [N, 2] of which those of has_gift know something of it, the more the row's user does."""
    part = data.part("valid")
    labels = part.labels[:, [task.name for task in data.tasks].index("has_gift")]
    rng = np.random.default_rng(3)
    of_user = rng.normal(size=int(part.unit.max()) + 1)[part.unit]
    logits = 2.0 * labels + rng.normal(size=len(labels)) + of_user
    return torch.tensor(np.stack([logits, logits], 1), dtype=torch.float32)


def test_a_step_is_decided_by_users(data: GiftDataset, tmp_path: Path) -> None:
    outputs, part = signal(data), data.part("valid")
    counted = validation(data, "user_id", tmp_path)
    metrics = counted.measure(outputs)
    column = [task.name for task in counted.tasks].index("has_gift")
    labels = part.labels[:, [task.name for task in data.tasks].index("has_gift")]
    ranking = Ranking.of(outputs[:, column], Truth.of(torch.tensor(np.array(labels)), name="valid/has_gift"))
    expected = decide(ranking, counted.decision, np.array(part.unit))
    assert expected == {name: metrics[f"valid/has_gift/{name}"] for name in expected}
    assert metrics["valid/has_gift/n_units"] < metrics["valid/has_gift/n_selected"]
    drawn = counted.curves(outputs[:, column], metrics)["pr"]
    at = drawn["threshold"].index(metrics["valid/has_gift/threshold"])
    assert drawn["bound"][at] == pytest.approx(metrics["valid/has_gift/precision_bound"])


def test_the_unit_row_is_as_ever(data: GiftDataset, tmp_path: Path) -> None:
    metrics = validation(data, "row", tmp_path).measure(signal(data))
    assert not {"valid/has_gift/n_units", "valid/has_gift/precision_bound_rows"} & set(metrics)


def test_rows_without_a_label_are_left_out_of_the_units_too(data: GiftDataset, tmp_path: Path) -> None:
    part, column = data.part("valid"), [task.name for task in data.tasks].index("has_gift")
    labels = np.array(part.labels)
    labels[::3, column] = np.nan
    kept = np.flatnonzero(~np.isnan(labels[:, column]))
    some = replace(data, parts={**data.parts, "valid": replace(part, labels=labels)})
    metrics = validation(some, "user_id", tmp_path).measure(signal(data))
    only = replace(
        part, **{n: getattr(part, n)[kept] for n in ("numeric", "categorical", "unit")}, labels=labels[kept]
    )
    few = replace(data, parts={**data.parts, "valid": only})
    expected = validation(few, "user_id", tmp_path).measure(signal(data)[kept])
    for name in ("precision_bound", "n_units", "threshold"):
        assert metrics[f"valid/has_gift/{name}"] == expected[f"valid/has_gift/{name}"]


def test_a_unit_that_the_data_cannot_tell_apart_is_refused(data: GiftDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decision\.unit: expected row or user_id, got 'day'"):
        validation(data, "day", tmp_path)
