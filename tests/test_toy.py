"""The toy trainer keeps the promises that the tests of the search and the service take for granted."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models.trainer import ROLES, SEARCH_ROLES, DataSpec, Decision, FileStamp, InputError, Run
from tests.toy import N_ROWS, ToyConfig, ToyData, ToyTrainer, stored_weights, uninterrupted_weights

TRAINER = ToyTrainer()
CONFIG = ToyConfig(n_steps=5)


def run_in(folder: Path, attempt: int = 1) -> Run:
    return Run(folder, 42, "cpu", attempt, Decision(task="toy", target_precision=0.5))


def load(path: Path | None, **options: str):
    return TRAINER.load(DataSpec(ToyData(**options), path, Path("unused")), SEARCH_ROLES)


def steps(config: ToyConfig, run: Run) -> list[int]:
    return [m.step for m in TRAINER.fit(config, load(None), run)]


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    generator = TRAINER.fit(CONFIG, load(None), run_in(tmp_path))
    seen = [next(generator), next(generator)]
    generator.close()
    resumed = list(TRAINER.fit(CONFIG, load(None), run_in(tmp_path, attempt=2)))
    assert resumed[0] == seen[-1]
    assert [m.step for m in resumed] == [1, 2, 3, 4]
    assert stored_weights(tmp_path / "attempt-2" / "step-00004") == uninterrupted_weights(CONFIG, 42)
    assert stored_weights(tmp_path / "attempt-1" / "step-00001") == uninterrupted_weights(CONFIG, 42, 2)


@pytest.mark.parametrize("changed", [{"seed": 43}, {"n_steps": 4}, {"config": ToyConfig(n_steps=5, x=0.4)}])
def test_weights_tell_runs_apart(changed):
    given = {"config": CONFIG, "seed": 42, "n_steps": 5}
    assert uninterrupted_weights(**given) != uninterrupted_weights(**{**given, **changed})


def test_a_fault_comes_in_the_attempts_that_it_was_asked_for(tmp_path):
    config = CONFIG.model_copy(update={"fault": "raise", "fault_step": 1, "fault_attempts": 2, "fault_stride": 1})
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="told to fail"):
            steps(config, run_in(tmp_path, attempt))
        assert (tmp_path / f"attempt-{attempt}" / f"step-{attempt - 1:05d}").exists()
    assert steps(config, run_in(tmp_path, attempt=3)) == [1, 2, 3, 4]


def test_a_fault_comes_in_every_attempt_where_none_is_named(tmp_path):
    config = CONFIG.model_copy(update={"fault": "raise"})
    for attempt in (1, 2, 3):
        with pytest.raises(RuntimeError, match="told to fail"):
            steps(config, run_in(tmp_path, attempt))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog):
    run = run_in(tmp_path)
    assert steps(CONFIG, run) == [0, 1, 2, 3, 4]
    damaged = tmp_path / "attempt-1" / "step-00004"
    damaged.write_bytes(damaged.read_bytes().replace(b"elapsed", b"elapsde"))
    with caplog.at_level(logging.WARNING):
        assert steps(CONFIG, replace(run, attempt=2)) == [3, 4]
    assert [(r.action, r.path) for r in caplog.records] == [("checkpoint_skipped", str(damaged))]


def test_an_older_attempt_sees_nothing_of_a_later_one(tmp_path):
    steps(CONFIG, run_in(tmp_path, attempt=2))
    assert steps(CONFIG, run_in(tmp_path, attempt=1)) == [0, 1, 2, 3, 4]


def test_a_file_identifies_the_data_wherever_it_lies(tmp_path):
    (tmp_path / "toy.csv").write_bytes(b"1,2")
    stamp = FileStamp(hashlib.sha256(b"1,2").hexdigest(), 3)
    for path in (tmp_path, tmp_path / "toy.csv"):
        manifest = load(path, file="toy.csv").manifest
        assert dict(manifest.files) == {"toy.csv": stamp}
        assert manifest.data_hash == stamp.sha256
    for path in (tmp_path / "nowhere", None):
        with pytest.raises(InputError, match=r"toy\.csv"):
            load(path, file="toy.csv")


# ------------------------------------------------------------------------------------------- of an evaluation

DATA = TRAINER.load(DataSpec(ToyData(), None, Path("unused")), frozenset(ROLES))
DECISION = Decision(task="toy", target_precision=0.5)


def fitted(folder: Path, seed: int = 42, **config: float) -> Path:
    run = replace(run_in(folder), seed=seed)
    last = [m.step for m in TRAINER.fit(ToyConfig(n_steps=3, **config), DATA, run)][-1]
    return folder / "attempt-1" / f"step-{last:05d}"


def pr_auc(checkpoint: Path, role="test") -> float:
    labels = TRAINER.labels(DATA, role, DECISION).tasks["toy"]
    return average_precision_score(labels, TRAINER.predict(checkpoint, DATA, role).scores["toy"])


def test_a_higher_curve_ranks_better_and_seeds_differ(tmp_path):
    means = []
    for ceiling in (0.1, 0.4, 0.9):
        checkpoints = [fitted(tmp_path / f"{ceiling}-{seed}", seed, ceiling=ceiling) for seed in range(5)]
        found = [pr_auc(path, role) for path in checkpoints for role in ROLES]
        assert len(set(found)) == len(found)
        means.append(np.mean(found))
    assert means == sorted(means)
    assert 0.45 < means[0] < means[2] - 0.1 < 0.99 - 0.1


def test_roles_have_rows_of_their_own_and_data_too(tmp_path):
    other = TRAINER.load(DataSpec(ToyData(content="other"), None, Path("unused")), frozenset(ROLES))
    seen = [TRAINER.features(data, role).numeric.tobytes() for data in (DATA, other) for role in ROLES]
    assert len(set(seen)) == 8
    labels = TRAINER.labels(DATA, "test", DECISION)
    assert labels.tasks["toy"].sum() == 40
    np.testing.assert_array_equal(labels.amount > 0, labels.tasks["toy"] == 1)
    np.testing.assert_array_equal(np.isnan(labels.tasks["money"]), labels.tasks["toy"] == 0)
    with pytest.raises(KeyError, match="test was not opened"):
        TRAINER.labels(load(None), "test", DECISION)


@pytest.mark.parametrize(("unit", "n_units"), [("row", N_ROWS), ("user", N_ROWS // 4)])
def test_the_unit_is_the_row_or_the_user(unit, n_units):
    labels = TRAINER.labels(DATA, "valid", DECISION.model_copy(update={"unit": unit}))
    assert len(np.unique(labels.unit)) == n_units


def test_without_its_signal_a_model_ranks_worse(tmp_path):
    checkpoint = fitted(tmp_path)
    labels = TRAINER.labels(DATA, "valid", DECISION).tasks["toy"]
    found = {
        (a.kind, a.name): average_precision_score(labels, a.scores)
        for a in TRAINER.ablate(checkpoint, DATA, "valid", DECISION)
    }
    whole = pr_auc(checkpoint, "valid")
    assert found["group", "signal"] < found["unit", "0"] < whole
    assert found["group", "weather"] == found["unit", "2"] == whole


def test_an_exported_toy_scores_a_file_in_batches(tmp_path):
    (tmp_path / "model").mkdir()
    TRAINER.export(fitted(tmp_path / "run"), DATA, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["trainer"] == "tests.toy:ToyTrainer"
    source = tmp_path / "rows.csv"
    source.write_text("hint\n" + "".join(f"{hint}\n" for hint in range(7)))
    batches = list(TRAINER.score(tmp_path / "model", source, tmp_path, batch_rows=3))
    assert [(b.first_row, len(b.predictions.scores["toy"])) for b in batches] == [(0, 3), (3, 3), (6, 1)]
    scores = np.concatenate([b.predictions.scores["toy"] for b in batches])
    assert (np.diff(scores) > 0).all()
    assert np.concatenate([b.keys["line"] for b in batches]).tolist() == list(range(2, 9))


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "got nothing"), ("x\n1\n", "rows.csv:1: "), ("hint\n1\nb\n", "rows.csv:3: ")]
)
def test_rows_that_the_toy_cannot_score(tmp_path, content, expected):
    (tmp_path / "model.json").write_text('{"trainer": "tests.toy:ToyTrainer", "value": 0.5, "weights": ""}')
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(InputError, match=expected):
        list(TRAINER.score(tmp_path, tmp_path / "rows.csv", tmp_path))
    (tmp_path / "model.json").unlink()
    with pytest.raises(InputError, match="expected an exported toy"):
        list(TRAINER.score(tmp_path, tmp_path / "rows.csv", tmp_path))
