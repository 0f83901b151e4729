"""What every registered trainer guarantees (`models.trainer.Trainer`), as one suite for all of them."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from models import checkpoint as checkpoints
from models.trainer import SEARCH_ROLES, DataSpec, Decision, Measurement, Run, Trainer


@dataclass(frozen=True)
class Case:
    """A trainer with a small problem: at most some seconds for the 3 to 6 epochs of `config`.

    `floor` is a PR-AUC of `decision.task` on valid that only a model which has learned something reaches.
    `labels` gives the 0/1 labels of that task on valid.
    """

    trainer: Trainer
    config: Any
    spec: DataSpec
    decision: Decision
    floor: float
    labels: Any

    def run(self, directory: Path, seed: int = 42, attempt: int = 1) -> Run:
        return Run(directory, seed, "cpu", attempt, self.decision)

    def objective(self, measurement: Measurement) -> float:
        return measurement.metrics[f"valid/{self.decision.task}/pr_auc"]


def numbers(measurements: list[Measurement]) -> list[tuple[int, dict[str, float], Any]]:
    """Everything but the time it took."""
    return [(m.step, dict(m.metrics), m.curves) for m in measurements]


def folder_of(run: Run, step: int) -> Path:
    return run.directory / f"attempt-{run.attempt}" / f"step-{step:05d}"


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, optimiser, state and best weights of two checkpoints are equal to the bit."""
    a, b = checkpoints.load(first), checkpoints.load(second)
    assert a.state == b.state
    assert a.best_step == b.best_step
    for left, right in ((a.tensors, b.tensors), (a.load_best(), b.load_best())):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name


class TrainerContract:
    """Inherit and give a fixture `case`; `data` is loaded once per case."""

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, case: Case) -> Any:
        return case.trainer.load(case.spec, SEARCH_ROLES)

    @pytest.fixture(scope="class")
    @classmethod
    def whole(
        cls, case: Case, data: Any, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Run, list[Measurement]]:
        """One uninterrupted run."""
        run = case.run(tmp_path_factory.mktemp("whole"))
        return run, list(case.trainer.fit(case.config, data, run))

    def test_config_survives_json(self, case: Case):
        text = case.config.model_dump_json()
        assert case.trainer.Config.model_validate_json(text) == case.config

    def test_check_finds_nothing_wrong(self, case: Case):
        assert case.trainer.check(case.config, case.spec.options, case.decision) == []

    def test_steps_count_from_zero_and_metrics_are_finite(self, case: Case, whole):
        _, measurements = whole
        assert [m.step for m in measurements] == list(range(len(measurements)))
        assert len(measurements) >= 3
        for m in measurements:
            assert all(type(v) is float and math.isfinite(v) for v in m.metrics.values())
            assert all(name.startswith(("train/", "valid/")) for name in m.metrics)
            assert {"pr_auc", "violation", "recall", "precision_bound"} <= {
                name.split("/")[2] for name in m.metrics if name.startswith(f"valid/{case.decision.task}/")
            }
        times = [m.elapsed_s for m in measurements]
        assert times == sorted(times)
        assert times[0] > 0

    def test_curves_come_with_every_step_that_is_the_best_so_far(self, case: Case, whole):
        best = -math.inf
        for m in whole[1]:
            assert (m.curves is not None) == (case.objective(m) > best)
            best = max(best, case.objective(m))
            if m.curves is None:
                continue
            assert json.loads(json.dumps(m.curves, allow_nan=False)) == m.curves
            task = f"valid/{case.decision.task}"
            pr = m.curves["pr"]
            assert pr.keys() == {"recall", "precision", "bound", "threshold"}
            at = pr["threshold"].index(m.metrics[f"{task}/threshold"])
            assert pr["recall"][at] == pytest.approx(m.metrics[f"{task}/recall"])
            assert pr["bound"][at] == pytest.approx(m.metrics[f"{task}/precision_bound"])
            calibration = m.curves["calibration"]
            assert calibration.keys() == {"predicted", "observed", "count"}
            assert sum(calibration["count"]) == len(case.labels())

    def test_learns_the_planted_signal(self, case: Case, whole):
        assert max(case.objective(m) for m in whole[1]) > case.floor

    def test_same_seed_same_numbers_whatever_the_global_generators_do(self, case: Case, data, whole, tmp_path):
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.manual_seed(987)
        np.random.seed(987)
        before = torch.get_rng_state()
        again = list(case.trainer.fit(case.config, data, case.run(tmp_path)))
        assert torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
        assert numbers(again) == numbers(whole[1])

    def test_another_seed_gives_other_numbers(self, case: Case, data, whole, tmp_path):
        first = next(case.trainer.fit(case.config, data, case.run(tmp_path, seed=43)))
        assert dict(first.metrics) != dict(whole[1][0].metrics)

    def test_checkpoint_is_durable_before_its_measurement_is_seen(self, case: Case, data, tmp_path):
        run = case.run(tmp_path)
        for measurement in case.trainer.fit(case.config, data, run):
            found = checkpoints.load(folder_of(run, measurement.step))
            assert found.step == measurement.step
            assert dict(found.measurement.metrics) == dict(measurement.metrics)

    @pytest.mark.parametrize("is_new_attempt", [False, True], ids=["same-attempt", "new-attempt"])
    def test_stopping_and_resuming_equals_uninterrupted(self, case: Case, data, whole, tmp_path, is_new_attempt):
        """Stopped after every epoch in turn, each time by closing the generator."""
        reference, expected = whole
        run, seen = case.run(tmp_path), []
        while True:
            pulled = []
            generator = case.trainer.fit(case.config, data, run)
            for measurement in generator:
                pulled.append(measurement)
                if len(pulled) == (2 if seen else 1):
                    break
            generator.close()
            if seen:
                assert numbers(pulled[:1]) == numbers(seen[-1:])  # the checkpoint's measurement once more
                pulled = pulled[1:]
            if not pulled:
                break
            seen += pulled
            if is_new_attempt:
                run = replace(run, attempt=run.attempt + 1)
        assert numbers(seen) == numbers(expected)
        assert [m.elapsed_s for m in seen] == sorted(m.elapsed_s for m in seen)
        last = expected[-1].step
        end = checkpoints.latest(run)
        assert end is not None
        assert end.step == last
        assert_same_checkpoint(end.path, folder_of(reference, last))

    def test_closing_early_leaves_a_checkpoint_to_predict_from(self, case: Case, data, whole, tmp_path):
        run = case.run(tmp_path)
        generator = case.trainer.fit(case.config, data, run)
        measurement = next(generator)
        generator.close()
        scores = case.trainer.predict(folder_of(run, 0), data, "valid").scores[case.decision.task]
        assert measured(case, scores) == pytest.approx(case.objective(measurement), rel=1e-12)

    def test_predict_reproduces_the_best_measured_metric(self, case: Case, data, whole):
        run, measurements = whole
        scores = case.trainer.predict(folder_of(run, measurements[-1].step), data, "valid").scores
        best = scores[case.decision.task]
        assert best.dtype == np.float32
        assert measured(case, best) == pytest.approx(max(map(case.objective, measurements)), rel=1e-12)

    def test_search_needs_neither_calibrate_nor_test(self, case: Case, whole, tmp_path):
        """With their prepared files deleted the numbers are the same."""
        cache = tmp_path / "cache"
        shutil.copytree(case.spec.cache, cache)
        gone = [p for role in ("calibrate", "test") for p in cache.rglob(role) if p.is_dir()]
        for path in gone:
            shutil.rmtree(path)
        data = case.trainer.load(replace(case.spec, cache=cache), SEARCH_ROLES)
        assert all(not path.exists() for path in gone)
        again = list(case.trainer.fit(case.config, data, case.run(tmp_path / "run")))
        assert numbers(again) == numbers(whole[1])
        with pytest.raises(KeyError):
            case.trainer.predict(folder_of(whole[0], whole[1][-1].step), data, "test")


def measured(case: Case, scores: np.ndarray) -> float:
    return average_precision_score(case.labels(), scores)
