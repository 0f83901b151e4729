"""What every registered trainer guarantees (`models.trainer.Trainer`), as one suite for all of them."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from models import checkpoint as checkpoints
from models import get_trainer
from models.trainer import (
    ROLES,
    SEARCH_ROLES,
    DataSpec,
    Decision,
    InputError,
    Measurement,
    Objective,
    Predictions,
    Role,
    Run,
    Trainer,
)


@dataclass(frozen=True)
class Case:
    """A trainer with a small problem: at most some seconds for the 3 to 6 epochs of `config`.

    `floor` is a PR-AUC of `decision.task` on valid that only a model which has learned something reaches.
    `labels` gives the 0/1 labels of that task on valid. `source` has the rows of all roles, and no column with a
    label; `rows_of` says which of its `n_source_rows`, from 0, those of a role are. `ablated` are the kinds of
    parts that a model can be asked without. `folds` are the rows of valid over which a metric is the mean, each
    scored by a model of its own; the last one's is the one that is exported.
    """

    trainer: Trainer
    config: Any
    spec: DataSpec
    decision: Decision
    floor: float
    labels: Any
    source: Path
    n_source_rows: int
    rows_of: Callable[[Role], np.ndarray]
    ablated: frozenset[str]
    folds: Callable[[], list[slice]] = lambda: [slice(None)]

    def run(self, directory: Path, seed: int = 42, attempt: int = 1) -> Run:
        return Run(directory, seed, "cpu", attempt, self.decision)

    def objective(self, measurement: Measurement) -> float:
        return self.run(Path()).value(measurement.metrics)

    def measured(self, scores: np.ndarray) -> float:
        """The objective of scores of valid, found independently."""
        labels = self.labels()
        return float(np.mean([average_precision_score(labels[rows], scores[rows]) for rows in self.folds()]))


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

    def test_the_best_step_is_the_best_by_the_objective(self, case: Case, data, tmp_path):
        """Here the worst by PR-AUC: a later one that is better is then none."""
        objective = Objective(metric=f"valid/{case.decision.task}/pr_auc", direction="minimize")
        run, best = replace(case.run(tmp_path), objective=objective), (math.inf, -1)
        for m in case.trainer.fit(case.config, data, run):
            assert (m.curves is not None) == (case.objective(m) < best[0])
            best = min(best, (case.objective(m), m.step))
            assert checkpoints.load(folder_of(run, m.step)).best_step == best[1]
        scores = case.trainer.predict(folder_of(run, m.step), data, "valid").scores[case.decision.task]
        assert case.measured(scores) == pytest.approx(best[0], rel=1e-12)

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
        assert case.measured(scores) == pytest.approx(case.objective(measurement), rel=1e-12)

    def test_predict_reproduces_the_best_measured_metric(self, case: Case, data, whole):
        run, measurements = whole
        scores = case.trainer.predict(folder_of(run, measurements[-1].step), data, "valid").scores
        best = scores[case.decision.task]
        assert best.dtype == np.float32
        assert case.measured(best) == pytest.approx(max(map(case.objective, measurements)), rel=1e-12)

    # ---- several at once

    def test_advancing_gives_what_next_would_until_each_has_ended(self, case: Case, data, whole, tmp_path):
        fits = [case.trainer.fit(case.config, data, case.run(tmp_path / name)) for name in ("a", "b")]
        seen: dict[int, list[Measurement]] = {0: [], 1: []}
        open_ = [0]  # the second begins when the first has one epoch behind it
        for turn in range(100):
            for i, found in zip(open_, case.trainer.advance([fits[i] for i in open_]), strict=True):
                assert found is None or isinstance(found, Measurement)
                if found is None:
                    open_ = [j for j in open_ if j != i]
                    assert next(fits[i], None) is None
                    continue
                seen[i].append(found)
                assert checkpoints.load(folder_of(case.run(tmp_path / "ab"[i]), found.step)).step == found.step
            if turn == 0:
                open_.append(1)
            if not open_:
                break
        for measurements in seen.values():
            assert [m.step for m in measurements] == list(range(len(measurements)))
            assert len(measurements) >= 3
            assert max(map(case.objective, measurements)) > case.floor
        assert case.trainer.advance([]) == []

    def test_advancing_one_is_next(self, case: Case, data, whole, tmp_path):
        fit, seen = case.trainer.fit(case.config, data, case.run(tmp_path)), []
        while (found := case.trainer.advance([fit])[0]) is not None:
            assert isinstance(found, Measurement)
            seen.append(found)
        assert numbers(seen) == numbers(whole[1])

    def test_one_that_fails_does_not_stop_the_others_and_has_ended(self, case: Case, data, whole, tmp_path):
        good = case.trainer.fit(case.config, data, case.run(tmp_path / "good"))
        shutil.copytree(whole[0].directory, tmp_path / "bad")  # checkpoints of another seed
        bad = case.trainer.fit(case.config, data, case.run(tmp_path / "bad", seed=43))
        found = case.trainer.advance([bad, good])
        assert isinstance(found[0], InputError)
        assert isinstance(found[1], Measurement)
        assert next(bad, None) is None
        assert case.trainer.advance([good])[0].step == 1

    def test_closed_between_rounds_it_resumes_alone(self, case: Case, data, whole, tmp_path):
        runs = [case.run(tmp_path / name) for name in "ab"]
        fits = [case.trainer.fit(case.config, data, run) for run in runs]
        first, second = (case.trainer.advance(fits) for _ in range(2))
        assert [m.step for m in (*first, *second)] == [0, 0, 1, 1]
        fits[0].close()
        again = list(case.trainer.fit(case.config, data, replace(runs[0], attempt=2)))
        assert numbers(again[:1]) == numbers(second[:1])
        assert [m.step for m in again] == list(range(1, again[-1].step + 1))
        assert case.trainer.advance(fits[1:])[0].step == 2

    def test_slots_are_from_one_to_most(self, case: Case, data):
        assert case.trainer.slots(case.config, data, "cpu", 1) == 1
        assert 1 <= case.trainer.slots(case.config, data, "cpu", 3) <= 3

    def test_search_needs_neither_calibrate_nor_test(self, case: Case, whole, tmp_path):
        """With their prepared files deleted the numbers are the same."""
        cache = tmp_path / "cache"
        shutil.copytree(case.spec.cache, cache)
        gone = [p for role in ("calibrate", "test") for p in cache.rglob(role) if p.is_dir()]
        assert {path.name for path in gone} == {"calibrate", "test"}
        for path in gone:
            shutil.rmtree(path)
        data = case.trainer.load(replace(case.spec, cache=cache), SEARCH_ROLES)
        assert all(not path.exists() for path in gone)
        again = list(case.trainer.fit(case.config, data, case.run(tmp_path / "run")))
        assert numbers(again) == numbers(whole[1])
        with pytest.raises(KeyError):
            case.trainer.predict(folder_of(whole[0], whole[1][-1].step), data, "test")
        with pytest.raises(KeyError):
            case.trainer.labels(data, "test", case.decision)
        with pytest.raises(KeyError):
            case.trainer.features(data, "calibrate")

    # ---- what an evaluation asks

    @pytest.fixture(scope="class")
    @classmethod
    def every(cls, case: Case) -> Any:
        """The data with all roles open."""
        return case.trainer.load(case.spec, frozenset(ROLES))

    @pytest.fixture(scope="class")
    @classmethod
    def fitted(cls, whole) -> Path:
        run, measurements = whole
        return folder_of(run, measurements[-1].step)

    @pytest.mark.parametrize("role", ROLES)
    def test_labels_say_what_is_true_of_each_row(self, case: Case, every, fitted, role: Role):
        labels, n_rows = case.trainer.labels(every, role, case.decision), every.manifest.rows[role]
        predicted = case.trainer.predict(fitted, every, role).scores
        assert set(predicted) <= set(labels.tasks)
        assert set(labels.transforms) <= set(labels.tasks)
        assert set(labels.conditions) <= set(labels.transforms)
        assert set(labels.conditions.values()) <= set(labels.tasks) - set(labels.transforms)
        for name, values in labels.tasks.items():
            assert (values.dtype, values.shape) == (np.float32, (n_rows,))
            known = values[~np.isnan(values)]
            assert len(known)
            if name in labels.transforms:
                assert labels.transforms[name] in ("log1p", "none")
                assert labels.transforms[name] == "none" or known.min() >= 0
            else:
                assert set(known) == {0.0, 1.0}
        assert case.decision.task in set(labels.tasks) - set(labels.transforms)
        for ids in (labels.unit, *labels.groups.values()):
            assert (ids.dtype, ids.shape) == (np.int64, (n_rows,))
        if labels.amount is not None:
            assert (labels.amount.dtype, labels.amount.shape) == (np.float64, (n_rows,))
            assert (labels.amount >= 0).all()
            assert not labels.amount[labels.tasks[case.decision.task] != 1].any()

    def test_labels_are_those_that_the_fit_was_measured_by(self, case: Case, every):
        found = case.trainer.labels(every, "valid", case.decision).tasks[case.decision.task]
        np.testing.assert_array_equal(found[~np.isnan(found)], case.labels())

    def test_each_row_is_its_own_unit_where_the_decision_says_row(self, case: Case, every):
        decision = case.decision.model_copy(update={"unit": "row"})
        unit = case.trainer.labels(every, "valid", decision).unit
        assert len(np.unique(unit)) == len(unit)

    def test_a_unit_that_the_data_lack_is_a_problem_that_names_what_they_have(self, case: Case, every):
        decision = case.decision.model_copy(update={"unit": "no_such_unit"})
        problems = case.trainer.check(case.config, case.spec.options, decision)
        assert [p.path for p in problems] == ["decision.unit"]
        assert "row" in problems[0].message
        assert "'no_such_unit'" in problems[0].message
        with pytest.raises(InputError, match=r"decision\.unit: expected .*row.*'no_such_unit'"):
            case.trainer.labels(every, "valid", decision)

    @pytest.mark.parametrize("role", ROLES)
    def test_features_are_finite_numbers_and_codes_in_range(self, case: Case, every, role: Role):
        found, n_rows = case.trainer.features(every, role), every.manifest.rows[role]
        assert (found.numeric.dtype, found.numeric.shape) == (np.float32, (n_rows, len(found.numeric_names)))
        assert (found.codes.dtype, found.codes.shape) == (np.int32, (n_rows, len(found.categorical_names)))
        assert np.isfinite(found.numeric).all()
        assert (found.codes >= 0).all()
        assert (found.codes < np.array(found.cardinalities, np.int32)).all()
        names = [*found.numeric_names, *found.categorical_names]
        assert len(set(names)) == len(names) > 0

    def test_calibrated_logits_rank_as_the_scores_do(self, case: Case, every, fitted):
        predictions = case.trainer.predict(fitted, every, "test")
        assert set(predictions.calibrated) <= set(predictions.scores)
        for scores in predictions.scores.values():
            assert (scores.dtype, scores.shape) == (np.float32, (every.manifest.rows["test"],))
            assert np.isfinite(scores).all()
        for name, logits in predictions.calibrated.items():
            assert (logits.dtype, logits.shape) == (np.float64, predictions.scores[name].shape)
            assert np.isfinite(logits).all()
            assert (np.diff(logits[np.argsort(predictions.scores[name], kind="stable")]) >= 0).all()

    def test_ablation_takes_away_one_part_at_a_time(self, case: Case, data, fitted):
        scores = case.trainer.predict(fitted, data, "valid").scores[case.decision.task]
        found = list(case.trainer.ablate(fitted, data, "valid", case.decision))
        assert {a.kind for a in found} == case.ablated
        assert len({(a.kind, a.name) for a in found}) == len(found)
        for part in found:
            assert (part.scores.dtype, part.scores.shape) == (np.float32, scores.shape)
            assert np.isfinite(part.scores).all()
        whole = case.measured(scores)
        for kind in case.ablated:
            assert min(case.measured(a.scores) for a in found if a.kind == kind) < whole - 0.01
        again = case.trainer.ablate(fitted, data, "valid", case.decision)
        assert all(a.scores.tobytes() == b.scores.tobytes() for a, b in zip(found, again, strict=True))

    def test_an_exported_model_is_the_same_each_time_and_names_no_place(self, case: Case, data, fitted, tmp_path):
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
            case.trainer.export(fitted, data, folder)
        contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
        assert contents[0] == contents[1]
        assert all(name.endswith((".json", ".safetensors", ".ubj")) for name in contents[0])
        places = [str(case.spec.path), str(case.spec.cache), str(fitted), str(tmp_path)]
        for content in contents[0].values():
            assert not [place for place in places if place.encode() in content]
        named = json.loads(contents[0]["model.json"])["trainer"]
        assert type(get_trainer(named)) is type(case.trainer)

    @pytest.mark.parametrize("batch_rows", [997, 65536])
    def test_scoring_the_rows_of_a_study_gives_its_predictions(
        self, case: Case, every, fitted, tmp_path, batch_rows: int
    ):
        """To the bit, although batches are cut elsewhere than roles; labels are not there."""
        (tmp_path / "model").mkdir()
        case.trainer.export(fitted, every, tmp_path / "model")
        moved = tmp_path / "elsewhere"
        (tmp_path / "model").rename(moved)
        batches = list(case.trainer.score(moved, case.source, tmp_path / "cache", batch_rows=batch_rows))
        n_rows = case.n_source_rows
        sizes = [len(b.predictions.scores[case.decision.task]) for b in batches]
        assert [b.first_row for b in batches] == np.cumsum([0, *sizes])[:-1].tolist()
        assert sum(sizes) == n_rows
        assert max(sizes) <= batch_rows
        for batch, size in zip(batches, sizes, strict=True):
            assert batch.n_rows in (None, n_rows)
            assert all(len(values) == size for values in batch.keys.values())
            assert {batch.time, batch.eligible} - {None} <= set(batch.keys)
            assert batch.eligible is None or batch.keys[batch.eligible].dtype == bool
        found = joined([b.predictions for b in batches])
        for role in ROLES:
            expected, rows = case.trainer.predict(fitted, every, role), case.rows_of(role)
            assert len(np.unique(rows)) == len(rows) == every.manifest.rows[role]
            final = case.folds()[-1] if role == "valid" else slice(None)  # the rest of it is scored by other folds
            for kind in ("scores", "calibrated"):
                assert getattr(found, kind).keys() == getattr(expected, kind).keys()
                for name, values in getattr(expected, kind).items():
                    again = getattr(found, kind)[name][rows]
                    assert again[final].tobytes() == values[final].tobytes(), (role, kind, name)

    def test_a_model_or_a_source_that_is_not_there_is_refused(self, case: Case, data, fitted, tmp_path):
        def score(model: Path, source: Path) -> None:
            list(case.trainer.score(model, source, tmp_path / "cache"))

        with pytest.raises(InputError, match="nowhere"):
            score(tmp_path / "nowhere", case.source)
        model = tmp_path / "model"
        model.mkdir()
        case.trainer.export(fitted, data, model)
        with pytest.raises(InputError, match="nowhere"):
            score(model, tmp_path / "nowhere")
        (model / "model.json").write_text('{"trainer": "another"}')
        with pytest.raises(InputError, match=r"model\.json"):
            score(model, case.source)


def joined(parts: list[Predictions]) -> Predictions:
    kinds = []
    for kind in ("scores", "calibrated"):
        names = getattr(parts[0], kind)
        kinds.append({name: np.concatenate([getattr(p, kind)[name] for p in parts]) for name in names})
    return Predictions(*kinds)
