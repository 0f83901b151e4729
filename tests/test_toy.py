"""The toy trainer keeps the promises that the tests of the search and the service take for granted."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from models.trainer import SEARCH_ROLES, DataSpec, Decision, FileStamp, InputError, Run
from tests.toy import ToyConfig, ToyData, ToyTrainer, stored_weights, uninterrupted_weights

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
