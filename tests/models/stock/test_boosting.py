"""Blocks of boosting rounds: a chain of them is one model, to the bit, however it is trained and asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from models.stock import boosting
from models.stock.trainer import BoosterConfig

N_TRAIN, N_NEW = 1500, 400
NAMES = tuple(f"x{i}" for i in range(6))
SAMPLED = BoosterConfig(subsample=0.8, colsample_bytree=0.8, max_depth=4, learning_rate=0.2, min_child_weight=1.0)


def table(seed: int, n_rows: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, 6] with gaps, in the last column telling ones, and labels [N]."""
    rng = np.random.default_rng(seed)
    numeric = rng.standard_normal((n_rows, 6)).astype(np.float32) * np.float32(spread)
    numeric[rng.random(numeric.shape) < 0.1] = np.nan
    signal = (
        np.nan_to_num(numeric[:, 0]) - np.nan_to_num(numeric[:, 1] * numeric[:, 2]) + 2 * np.isnan(numeric[:, 5])
    )
    return numeric, (signal + rng.standard_normal(n_rows) > 1.0).astype(np.float32)


class Chain:
    """Blocks trained one after the other, with what every row's margin was after each."""

    def __init__(
        self, config: BoosterConfig, numeric: np.ndarray, labels: np.ndarray, rounds: list[int], seed: int
    ):
        self.config, self.numeric, self.labels, self.seed = config, numeric, labels, seed
        self.matrix = boosting.binned(numeric, labels, NAMES, config.max_bin)
        self.blocks: list[bytes] = []
        self.margins = [boosting.first_margins(self.told(0), len(labels))]
        for n_rounds in rounds:
            block, margins = self.train(len(self.blocks), self.margins[-1], n_rounds)
            self.blocks.append(block)
            self.margins.append(margins)

    def told(self, block: int) -> dict[str, Any]:
        seed = boosting.block_seed(self.seed, 0, block)
        return boosting.parameters(self.config, float(self.labels.mean()), seed, "cpu")

    def train(self, block: int, margins: np.ndarray, n_rounds: int) -> tuple[bytes, np.ndarray]:
        return boosting.train_block(self.told(block), self.matrix, margins, n_rounds)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain(SAMPLED, *table(0, N_TRAIN), [7, 7, 7, 7], seed=3)


@pytest.fixture(scope="module")
def new_rows() -> np.ndarray:
    """Rows with values far beyond those of train."""
    return table(1, N_NEW, spread=5.0)[0]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    rounds=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    max_depth=st.integers(1, 6),
    gamma=st.sampled_from([0.0, 1.0, 50.0]),
    weight=st.sampled_from([1.0, 3.0]),
)
def test_chain_equals_merged_equals_what_training_kept(seed, rounds, max_depth, gamma, weight):
    config = SAMPLED.model_copy(update={"max_depth": max_depth, "gamma": gamma, "scale_pos_weight": weight})
    numeric, labels = table(seed % 100, 300)
    made = Chain(config, numeric, labels, rounds, seed)
    merged = boosting.merge(made.blocks)
    for rows in (numeric, table(7, 200, spread=9.0)[0]):
        assert boosting.chain(made.blocks, rows).tobytes() == boosting.advance(merged, rows).tobytes()
    assert boosting.chain(made.blocks, numeric).tobytes() == made.margins[-1].tobytes()
    assert boosting.load(merged).num_boosted_rounds() == sum(rounds)


def test_a_block_trained_again_from_stored_blocks_is_the_same(chain: Chain):
    """What a resumed run does: new matrix, margins from the stored blocks."""
    numeric, labels = table(0, N_TRAIN)
    for done in range(1, 4):
        again = Chain(SAMPLED, numeric, labels, [], seed=3)
        block, margins = again.train(done, boosting.chain(chain.blocks[:done], numeric), 7)
        assert block == chain.blocks[done]
        assert margins.tobytes() == chain.margins[done + 1].tobytes()


def test_a_block_depends_on_nothing_that_was_trained_in_between(chain: Chain):
    Chain(SAMPLED.model_copy(update={"max_depth": 2}), *table(5, 200), [3], seed=9)
    np.random.seed(5)
    other = Chain(SAMPLED, *table(0, N_TRAIN), [7, 7], seed=3)
    Chain(SAMPLED, *table(5, 200), [3], seed=9)
    block, _ = other.train(2, other.margins[-1], 7)
    assert [*other.blocks, block] == chain.blocks[:3]
    assert other.train(1, other.margins[1], 7)[0] == chain.blocks[1]  # margins set before leave nothing behind


def test_continuing_a_loaded_booster_is_what_blocks_are_there_to_avoid():
    """The hidden random state: were this ever equal, blocks would not be needed."""
    numeric, labels = table(0, N_TRAIN)
    matrix = boosting.binned(numeric, labels, NAMES, SAMPLED.max_bin)
    told = boosting.parameters(SAMPLED, float(labels.mean()), 1, "cpu")
    whole = xgb.Booster(told, cache=[matrix])
    for i in range(10):
        whole.update(matrix, i)
    half = xgb.Booster(told, cache=[matrix])
    for i in range(5):
        half.update(matrix, i)
    resumed = xgb.Booster(told, cache=[matrix])
    resumed.load_model(half.save_raw("ubj"))
    for i in range(5, 10):
        resumed.update(matrix, i)
    assert not np.allclose(*(b.predict(matrix, output_margin=True) for b in (whole, resumed)), atol=0.01)


def test_blocks_learn_what_one_booster_learns():
    """Without drawing rows or columns nothing is random, and a chain is the plain booster up to rounding."""
    config = SAMPLED.model_copy(update={"subsample": 1.0, "colsample_bytree": 1.0})
    numeric, labels = table(0, N_TRAIN)
    blocks = Chain(config, numeric, labels, [5, 5, 5], seed=0).blocks
    told = boosting.parameters(config, float(labels.mean()), 0, "cpu")
    plain = xgb.train(told, boosting.binned(numeric, labels, NAMES, config.max_bin), 15)
    rows = table(1, N_NEW)[0]
    expected = plain.inplace_predict(rows, predict_type="margin")
    np.testing.assert_allclose(boosting.chain(blocks, rows), expected, atol=2e-6)


def test_the_merged_model_is_one_that_xgboost_itself_reads(chain: Chain, new_rows, tmp_path):
    path = tmp_path / "model.ubj"
    path.write_bytes(boosting.merge(chain.blocks))
    booster = xgb.Booster(model_file=path)
    assert booster.feature_names == list(NAMES)
    matrix = xgb.DMatrix(new_rows, feature_names=list(NAMES))
    margins = booster.predict(matrix, output_margin=True)
    assert margins.tobytes() == boosting.chain(chain.blocks, new_rows).tobytes()
    probabilities = booster.predict(matrix)
    np.testing.assert_allclose(probabilities, 1.0 / (1.0 + np.exp(-margins)), rtol=1e-6)
    first = boosting.chain(chain.blocks[:2], new_rows)  # a step is found again as its rounds
    assert booster.predict(matrix, output_margin=True, iteration_range=(0, 14)).tobytes() == first.tobytes()


def test_merging_gives_the_same_bytes_each_time(chain: Chain):
    assert boosting.merge(chain.blocks) == boosting.merge(list(chain.blocks))


def test_a_rows_margin_does_not_depend_on_the_rows_beside_it(chain: Chain, new_rows):
    merged = boosting.merge(chain.blocks)
    whole = boosting.advance(merged, new_rows)
    parts = [boosting.advance(merged, new_rows[start : start + 97]) for start in range(0, N_NEW, 97)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert boosting.advance(merged, new_rows[:0]).shape == (0,)


def test_new_rows_are_asked_by_their_values_not_by_bins_that_only_train_knows(chain: Chain, new_rows):
    """Bins end where train's values end, and put a value beyond them elsewhere than the model does."""
    naive = np.array([naive_margin(chain.blocks, row) for row in new_rows[:100]])
    np.testing.assert_allclose(boosting.chain(chain.blocks, new_rows[:100]), naive, atol=1e-5)


def naive_margin(blocks: list[bytes], row: np.ndarray) -> float:
    """One row through every tree of the JSON, node by node."""
    documents = [json.loads(boosting.load(block).save_raw("json"))["learner"] for block in blocks]
    base = float(documents[0]["learner_model_param"]["base_score"].strip("[]"))
    total = np.log(base / (1 - base))
    for document in documents:
        for tree in document["gradient_booster"]["model"]["trees"]:
            node = 0
            while tree["left_children"][node] != -1:
                value, condition = row[tree["split_indices"][node]], np.float32(tree["split_conditions"][node])
                goes_left = tree["default_left"][node] if np.isnan(value) else value < condition
                node = tree["left_children" if goes_left else "right_children"][node]
            total += tree["split_conditions"][node]
    return total


def test_chain_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        boosting.chain([], np.zeros((1, 6), np.float32))


def test_every_parameter_reaches_xgboost():
    """As its own configuration tells, and in the number of bins that train is cut into."""
    given = BoosterConfig(
        learning_rate=0.11, max_depth=7, min_child_weight=3.5, subsample=0.7, colsample_bytree=0.6, reg_lambda=2.5,
        reg_alpha=0.3, gamma=0.9, scale_pos_weight=1.7, max_bin=33,
    )  # fmt: skip
    numeric, labels = table(0, N_TRAIN)
    matrix = boosting.binned(numeric, labels, NAMES, given.max_bin)
    told = boosting.parameters(given, 0.25, 12345, "cpu")
    booster = xgb.Booster(told, cache=[matrix])
    booster.update(matrix, 0)
    found = dict(leaves(json.loads(booster.save_config())))
    for name, value in told.items():
        if name in ("tree_method", "objective", "device", "base_score", "disable_default_eval_metric"):
            continue
        assert float(found[name]) == pytest.approx(float(value)), name
    assert found["tree_method"] == "hist"
    assert found["device"] == "cpu"
    assert json.loads(booster.save_config())["learner"]["objective"]["name"] == "binary:logistic"
    odds = 1.7 * 0.25 / 0.75
    assert float(found["base_score"].strip("[]")) == pytest.approx(odds / (1 + odds))
    pointers, _ = matrix.get_quantile_cut()
    assert set(np.diff(pointers.astype(int))) == {33 + 1}  # edges
    assert set(given.model_dump()) <= set(told)


def leaves(document: Any) -> Any:
    """(name, value) of everything in nested JSON that is not nested itself."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from leaves(value)
        elif isinstance(value, list):
            for each in value:
                if isinstance(each, dict):
                    yield from leaves(each)
        else:
            yield name, value


def test_seeds_of_blocks_and_folds_differ():
    seeds = {
        boosting.block_seed(seed, fold, block) for seed in range(5) for fold in range(5) for block in range(20)
    }
    assert len(seeds) == 500
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, 1), ("", 1), ("3", 3), ("4,2", 4), ("0", 1), ("all", 1), (" 2 ", 2)]
)
def test_threads_are_those_of_openmp_else_one(monkeypatch, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert boosting.threads() == expected
    assert boosting.parameters(SAMPLED, 0.3, 0, "cpu")["nthread"] == expected


def test_chains_of_several_threads_are_equal_to_each_other(monkeypatch, new_rows):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    first, second = (Chain(SAMPLED, *table(0, N_TRAIN), [7, 7], seed=3) for _ in range(2))
    assert first.told(0)["nthread"] == 3
    assert first.blocks == second.blocks
    assert boosting.chain(first.blocks, first.numeric).tobytes() == first.margins[-1].tobytes()
    merged = boosting.advance(boosting.merge(first.blocks), new_rows)
    assert boosting.chain(first.blocks, new_rows).tobytes() == merged.tobytes()


def test_the_same_chain_in_another_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = (
        "import hashlib\n"
        "from tests.models.stock.test_boosting import *\n"
        "blocks = Chain(SAMPLED, *table(0, N_TRAIN), [7, 7], seed=3).blocks\n"
        "print(hashlib.sha256(b''.join(blocks)).hexdigest())\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    blocks = Chain(SAMPLED, *table(0, N_TRAIN), [7, 7], seed=3).blocks
    assert told.stdout.strip() == hashlib.sha256(b"".join(blocks)).hexdigest()
