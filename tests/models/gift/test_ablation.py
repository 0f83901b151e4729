"""models/gift/ablation.py against the plain way: change rows or representation, and run the whole network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.gift import ablation, features
from models.gift import model as models_of
from models.gift.data import GiftDataset, load
from models.gift.trainer import GiftTrainer
from models.trainer import DataSpec, InputError, Run
from tests.models.gift import planted
from tests.models.gift.tables import SEARCH, make_frame, options, spec

TRAINER = GiftTrainer()
CONFIGS = {
    "plain": planted.config(),
    "bins": planted.config(network={"numeric_embedding": "piecewise_linear", "batch_norm": False}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> GiftDataset:
    return planted.planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, data: GiftDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("run"), 3, "cpu", 1, planted.DECISION)
    last = [m.step for m in TRAINER.fit(CONFIGS[request.param], data, run)][-1]
    return run.directory / "attempt-1" / f"step-{last:05d}"


def test_a_column_is_replaced_by_its_mean_or_by_unknown(data: GiftDataset, checkpoint: Path) -> None:
    found = {
        a.name: a.scores for a in TRAINER.ablate(checkpoint, data, "valid", planted.DECISION) if a.kind == "group"
    }
    assert list(found) == [*(f"x{i}" for i in range(6)), "city"]
    model, part = models_of.load(checkpoint, data, "cpu"), data.part("valid")
    for name, scores in found.items():
        numeric, codes = np.array(part.numeric), np.array(part.categorical)
        if name == "city":
            codes[:] = 0
        else:
            numeric[:, data.numeric_names.index(name)] = 0.0
        with torch.inference_mode():
            expected = model.network(torch.from_numpy(numeric), torch.from_numpy(codes))[:, model.head("gives")]
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_unit_is_set_to_its_mean(data: GiftDataset, checkpoint: Path) -> None:
    found = [a for a in TRAINER.ablate(checkpoint, data, "valid", planted.DECISION) if a.kind == "unit"]
    model, part = models_of.load(checkpoint, data, "cpu"), data.part("valid")
    with torch.inference_mode():
        shared = model.network.features(
            torch.from_numpy(np.array(part.numeric)), torch.from_numpy(np.array(part.categorical))
        )
        assert [a.name for a in found] == [str(unit) for unit in range(shared.shape[1])]
        for unit, ablated in enumerate(found):
            changed = shared.clone()
            changed[:, unit] = shared[:, unit].mean()
            expected = model.network.heads(changed)[:, model.head("gives")]
            np.testing.assert_allclose(ablated.scores, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_task_that_is_not_trained_is_refused(data: GiftDataset, checkpoint: Path) -> None:
    decision = planted.DECISION.model_copy(update={"task": "likes"})
    with pytest.raises(InputError, match=r"expected a trained task .*, got 'likes'"):
        next(TRAINER.ablate(checkpoint, data, "valid", decision))


def test_an_indicator_goes_with_its_column_at_the_mean_of_train(tmp_path: Path) -> None:
    data = load(spec(tmp_path, make_frame(), options()), SEARCH)
    found = ablation.groups(data)
    assert found == {
        "age": ([0], []), "gains": ([1], []), "gaps": ([2, 4], []), "fixed": ([3], []), "city": ([], [0])
    }  # fmt: skip
    means = ablation._means(data)
    assert means[:4].tolist() == [0, 0, 0, 0]
    assert means[4] == pytest.approx(data.part("train").numeric[:, 4].mean(), abs=1 / 256)


def test_kuailive_is_taken_apart_by_family(simulated: DataSpec) -> None:
    data = load(simulated, SEARCH)
    found = ablation.groups(data)
    assert set(found) == {
        "user history", "streamer history", "pair history", "room history", "room", "time", "user profile",
        "streamer profile",
    }  # fmt: skip
    for kind, names in ((0, data.numeric_names), (1, data.categorical_names)):
        assert sorted(column for group in found.values() for column in group[kind]) == list(range(len(names)))
    pair = [data.numeric_names[column] for column in found["pair history"][0]]
    assert "pair_gifts" in pair
    assert all(name.startswith("pair_") for name in pair)


def test_the_families_have_every_feature_once() -> None:
    every = [name for names in features.families().values() for name in names]
    assert len(set(every)) == len(every)
    assert set(every) == {*features.numeric_meanings(), *features.categorical_meanings(snapshot_features=True)}
