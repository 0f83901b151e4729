"""The stock trainer: what a step is measured by, folds, early stopping, resuming and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from models import checkpoint as checkpoints
from models import get_trainer
from models.decision import decide
from models.metrics import Ranking, Truth
from models.stock import boosting, matrices
from models.stock.data import StockData, StockDataset
from models.stock.trainer import StockConfig, StockTrainer
from models.trainer import Decision, InputError, Measurement, Objective, Run
from tests.models.stock import planted

TRAINER = StockTrainer()


@pytest.fixture(scope="module")
def data() -> StockDataset:
    return planted.made()


def run_in(folder: Path, **changed: Any) -> Run:
    return Run(
        **{"directory": folder, "seed": 42, "device": "cpu", "attempt": 1, "decision": planted.DECISION} | changed
    )


def fitted(
    folder: Path, data: StockDataset, config: StockConfig | None = None, **changed: Any
) -> list[Measurement]:
    return list(TRAINER.fit(config or planted.config(), data, run_in(folder, **changed)))


def newest(folder: Path, attempt: int = 1) -> Path:
    return max((folder / f"attempt-{attempt}").glob("step-*"))


def numbers(measurements: list[Measurement]) -> list[tuple[int, dict[str, float], Any]]:
    return [(m.step, dict(m.metrics), m.curves) for m in measurements]


# ---------------------------------------------------------------------------------------------- before any training


def test_the_trainer_is_registered():
    assert isinstance(get_trainer("stock"), StockTrainer)


def test_a_specification_is_checked_without_torch_and_xgboost():
    script = (
        "import sys, models.stock.trainer as t; t.StockTrainer(); print({'torch', 'xgboost'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("config", "decision", "path", "words"),
    [
        ({}, {"task": "falls"}, "decision.task", "expected rise, got 'falls'"),
        ({}, {"unit": "month"}, "decision.unit", "expected row, day, stock, got 'month'"),
        (
            {"training": {"max_rounds": 40, "checkpoint_every": 50}},
            {},
            "config.training.checkpoint_every",
            "expected at most max_rounds (40), got 50",
        ),
    ],
)
def test_faults_between_the_sections(config, decision, path, words):
    wanted = Decision(**{"task": "rise", "target_precision": 0.6, "unit": "day"} | decision)
    (problem,) = TRAINER.check(StockConfig(**config), StockData(path="."), wanted)
    assert (problem.path, problem.message) == (path, words)


@pytest.mark.parametrize("unit", ["row", "day", "stock"])
def test_nothing_is_wrong_with_the_defaults(unit):
    decision = Decision(task="rise", target_precision=0.6, unit=unit)
    assert TRAINER.check(StockConfig(), StockData(path="."), decision) == []


def test_a_fit_for_another_task_is_refused(data, tmp_path):
    decision = planted.DECISION.model_copy(update={"task": "falls"})
    with pytest.raises(InputError, match=r"decision\.task: expected rise, got 'falls'"):
        fitted(tmp_path, data, decision=decision)


# ---------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("unit", ["row", "day", "stock"])
def test_metrics_are_those_of_the_scores(data, tmp_path, unit):
    """Against scikit-learn, the decision rule asked directly, and sets of days and stocks."""
    decision = planted.DECISION.model_copy(update={"unit": unit})
    last = fitted(tmp_path, data, decision=decision)[-1]
    found = checkpoints.load(newest(tmp_path))
    scores, part = found.tensors["margins/valid"].numpy(), data.part("valid")
    labels, metrics = np.array(part.labels), last.metrics
    expected = {
        "pr_auc": average_precision_score(labels, scores),
        "roc_auc": roc_auc_score(labels, scores),
        "log_loss": log_loss(labels, 1 / (1 + np.exp(-scores.astype(np.float64)))),
    }
    for name, value in expected.items():
        assert metrics[f"valid/rise/{name}"] == pytest.approx(value, rel=1e-6), name
    ranking = Ranking.of(found.tensors["margins/valid"], Truth.of(torch.from_numpy(labels), name="v"))
    decided = decide(ranking, decision, TRAINER.labels(data, "valid", decision).unit)
    by_unit = None if unit == "row" else torch.from_numpy(np.array(part.day if unit == "day" else part.stock))
    assert metrics["valid/rise/roc_auc_se"] == ranking.roc_auc_se(by_unit).item()
    assert metrics["valid/rise/pr_auc_se"] == ranking.average_precision_se(by_unit).item()
    assert decided.items() <= {name.removeprefix("valid/rise/"): value for name, value in metrics.items()}.items()
    selected = scores >= decided["threshold"]
    assert metrics["valid/rise/n_days_selected"] == len(set(part.day[selected]))
    assert metrics["valid/rise/n_stocks_selected"] == len(set(part.stock[selected]))
    precision, recall = labels[selected].mean(), labels[selected].sum() / labels.sum()
    assert metrics["valid/rise/f1"] == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-6)
    train = data.part("train")
    margins = found.tensors["margins/train/0"].numpy().astype(np.float64)
    assert metrics["train/rise/loss"] == pytest.approx(log_loss(train.labels, 1 / (1 + np.exp(-margins))), rel=1e-6)
    assert metrics["train/rounds"] == 25.0


def test_nothing_is_selected_where_no_threshold_is_allowed(data, tmp_path):
    decision = planted.DECISION.model_copy(update={"range": (0.998, 0.999)})
    metrics = fitted(tmp_path, data, decision=decision)[-1].metrics
    assert "valid/rise/threshold" not in metrics
    for name in ("f1", "n_days_selected", "n_stocks_selected", "recall"):
        assert metrics[f"valid/rise/{name}"] == 0.0


def test_the_intercept_is_the_base_rate_of_train(data):
    told = boosting.parameters(planted.config().booster, data.statistics["base_rate"], 0, "cpu")
    margin = boosting.first_margins(told, 3)
    assert margin.shape == (3,)
    odds = data.statistics["base_rate"] / (1 - data.statistics["base_rate"])
    np.testing.assert_allclose(np.exp(margin), odds, rtol=1e-5)


def test_weighed_positives_have_calibrated_logits(data, tmp_path):
    """Weighed eight times, the margins say far more than happens; what the inverse makes of them does not."""
    config = planted.config(booster={"scale_pos_weight": 8.0}, training={"max_rounds": 60, "checkpoint_every": 20})
    last = fitted(tmp_path, data, config)[-1]
    predictions = TRAINER.predict(newest(tmp_path), data, "valid")
    np.testing.assert_allclose(
        predictions.logits("rise"), predictions.scores["rise"].astype(np.float64) - np.log(8.0)
    )
    rate = data.part("valid").labels.mean()
    raw, calibrated = (1 / (1 + np.exp(-x)) for x in (predictions.scores["rise"], predictions.logits("rise")))
    assert raw.mean() > rate + 0.15
    assert calibrated.mean() == pytest.approx(rate, abs=0.06)
    assert last.metrics["valid/rise/ece_calibrated"] < last.metrics["valid/rise/ece"] - 0.1
    assert "rise" not in TRAINER.predict(fit_once(tmp_path / "plain", data), data, "valid").calibrated


def fit_once(folder: Path, data: StockDataset, config: StockConfig | None = None, **changed: Any) -> Path:
    fitted(folder, data, config, **changed)
    return newest(folder)


# ---------------------------------------------------------------------------------------------- when it ends


@pytest.mark.parametrize(("max_rounds", "n_steps"), [(20, 4), (21, 5), (5, 1)])
def test_the_budget_is_rounded_up_to_whole_blocks(data, tmp_path, max_rounds, n_steps):
    found = fitted(tmp_path, data, planted.config(training={"max_rounds": max_rounds}))
    assert [m.metrics["train/rounds"] for m in found] == [5.0 * (i + 1) for i in range(n_steps)]


@pytest.mark.parametrize(("patience", "n_waited"), [(1, 1), (5, 1), (6, 2), (10, 2)])
def test_it_ends_when_patience_does(data, tmp_path, patience, n_waited):
    """By the study's objective: the rounds, of which less is better, are best at once."""
    objective = Objective(metric="train/rounds", direction="minimize")
    config = planted.config(training={"max_rounds": 100, "patience": patience})
    found = fitted(tmp_path, data, config, objective=objective)
    assert len(found) == 1 + n_waited
    assert checkpoints.load(newest(tmp_path)).best_step == 0
    assert fitted(tmp_path, data, config, objective=objective)[0].step == n_waited  # it has ended, and stays so


def test_a_step_that_is_as_good_is_not_better(data, tmp_path):
    """No split is worth its gamma, so every step predicts the same."""
    config = planted.config(booster={"gamma": 1e9}, training={"max_rounds": 100, "patience": 10})
    assert len(fitted(tmp_path, data, config)) == 3
    assert checkpoints.load(newest(tmp_path)).best_step == 0


def test_prediction_is_of_the_best_step(data, tmp_path):
    objective = Objective(metric="train/rounds", direction="minimize")
    config = planted.config(training={"patience": 10})
    best = fit_once(tmp_path / "a", data, config, objective=objective)
    one = fit_once(tmp_path / "b", data, planted.config(training={"max_rounds": 5}))
    assert scores(best, data).tobytes() == scores(one, data).tobytes()
    assert scores(best, data).tobytes() != checkpoints.load(best).tensors["margins/valid"].numpy().tobytes()


def scores(checkpoint: Path, data: StockDataset, role: Any = "valid") -> np.ndarray:
    return TRAINER.predict(checkpoint, data, role).scores["rise"]


# ---------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("embargo", [0, 3])
def test_a_fold_is_a_booster_on_what_was_over_before_its_part(tmp_path, embargo):
    """Each fold's scores, to the bit, from rows chosen one by one."""
    data = planted.made(folds=3, embargo=embargo)
    last = fitted(tmp_path, data)[-1]
    found, config = checkpoints.load(newest(tmp_path)), planted.config()
    train, valid = data.part("train"), data.part("valid")
    days = sorted(set(valid.day.tolist()))
    parts = [days[:9], days[9:17], days[17:]]  # 25 days
    for i, part in enumerate(parts):
        before = [
            row
            for row in range(len(valid))
            if valid.day[row] < part[0] and valid.label_end[row] + embargo < part[0]
        ]
        rows = [row for row in range(len(valid)) if valid.day[row] in part]
        assert (len(before) > 0) == (i > 0)
        numeric = np.concatenate([train.features, valid.features[before]])
        labels = np.concatenate([train.labels, valid.labels[before]])
        expected = by_hand(config, numeric, labels, data.feature_names, fold=i, n_blocks=5)
        margins = boosting.chain(expected, np.array(valid.features[rows]))
        assert found.tensors["margins/valid"].numpy()[rows].tobytes() == margins.tobytes()
        for name, naive in (("roc_auc", roc_auc_score), ("pr_auc", average_precision_score)):
            assert last.metrics[f"valid/rise/{name}@fold{i}"] == pytest.approx(naive(valid.labels[rows], margins))
        if i == 2:
            test = boosting.chain(expected, np.array(data.part("test").features))
            objective = Objective(metric="train/rounds")  # the last step is the best
            again = fit_once(tmp_path / "last", data, objective=objective)
            assert scores(again, data, "test").tobytes() == test.tobytes()


def by_hand(
    config: StockConfig, numeric: np.ndarray, labels: np.ndarray, names: tuple[str, ...], fold: int, n_blocks: int
) -> list[bytes]:
    matrix, blocks, margins = boosting.binned(numeric, labels, names, config.booster.max_bin), [], None
    for number in range(n_blocks):
        seed = boosting.block_seed(42, fold, number)
        told = boosting.parameters(config.booster, float(labels.mean(dtype=np.float64)), seed, "cpu")
        margins = boosting.first_margins(told, len(labels)) if margins is None else margins
        block, margins = boosting.train_block(told, matrix, margins, config.training.checkpoint_every)
        blocks.append(block)
    return blocks


def test_a_part_of_a_single_day_has_no_error_of_its_roc(tmp_path):
    data = planted.made(folds=20)  # of 25 days: the first parts have two, the others one
    metrics = fitted(tmp_path, data)[-1].metrics
    assert {"valid/rise/roc_auc_se@fold0", "valid/rise/roc_auc@fold19", "valid/rise/roc_auc"} <= metrics.keys()
    assert {"valid/rise/roc_auc_se@fold19", "valid/rise/roc_auc_se"}.isdisjoint(metrics)


def test_with_folds_a_metric_is_their_mean_and_the_decision_is_on_all_of_valid(tmp_path):
    data = planted.made(folds=3)
    metrics = fitted(tmp_path, data)[-1].metrics
    ranked = {name.split("@")[0] for name in metrics if "@" in name}
    assert {"valid/rise/pr_auc", "valid/rise/roc_auc", "valid/rise/log_loss", "valid/rise/ece"} <= ranked
    for name in ranked:
        values = [metrics[f"{name}@fold{i}"] for i in range(3)]
        mean = np.sqrt(np.sum(np.square(values))) / 3 if name.endswith("_se") else np.mean(values)
        assert metrics[name] == pytest.approx(mean, rel=1e-12), name
    labels, logits = data.part("valid").labels, checkpoints.load(newest(tmp_path)).tensors["margins/valid"].numpy()
    selected = logits >= metrics["valid/rise/threshold"]
    assert metrics["valid/rise/n_selected"] == selected.sum()
    assert metrics["valid/rise/recall"] == pytest.approx(labels[selected].sum() / labels.sum())
    assert not [name for name in metrics if "@" in name and name.split("/")[2].startswith(("recall@", "violation"))]


def test_too_many_folds_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"data\.split\.folds: expected at most the 25 days of valid, got 26"):
        fitted(tmp_path, in_folds(data, 26))


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("folds", [1, 3])
def test_fits_that_take_turns_on_one_dataset_do_not_know_of_each_other(tmp_path, folds):
    """Bins are shared by all trials, margins are set anew for every block."""
    data, other = planted.made(folds=folds), planted.config(booster={"max_depth": 2, "learning_rate": 0.3})
    alone = numbers(fitted(tmp_path / "alone", planted.made(folds=folds)))
    one = TRAINER.fit(planted.config(), data, run_in(tmp_path / "one"))
    two = TRAINER.fit(other, data, run_in(tmp_path / "two", seed=1))
    together = []
    for first, _ in zip(one, two, strict=True):
        together.append(first)
    assert numbers(together) == alone


def test_it_resumes_from_the_step_before_a_damaged_one(data, tmp_path):
    whole = fitted(tmp_path, data)
    shutil.copytree(tmp_path, tmp_path.parent / "again")
    path = newest(tmp_path.parent / "again")
    (path / "tensors.safetensors").write_bytes(b"damaged")
    again = fitted(tmp_path.parent / "again", data)
    assert numbers(again) == numbers(whole[-2:])


def test_a_checkpoint_of_something_else_is_refused(data, tmp_path):
    generator = TRAINER.fit(planted.config(), data, run_in(tmp_path))
    next(generator)
    generator.close()
    for name, changed in {
        "config": lambda: fitted(tmp_path, data, planted.config(booster={"max_depth": 2})),
        "seed": lambda: fitted(tmp_path, data, seed=1),
        "data_hash": lambda: fitted(tmp_path, planted.made(seed=1)),
        "n_folds": lambda: fitted(tmp_path, in_folds(data, 3)),
    }.items():
        with pytest.raises(
            InputError, match=f"expected a checkpoint of this {name}, got one of another; remove it"
        ):
            changed()


def in_folds(data: StockDataset, n_folds: int) -> StockDataset:
    split = data.options.split.model_copy(update={"folds": n_folds})
    return replace(data, options=data.options.model_copy(update={"split": split}))


def test_a_checkpoint_of_other_folds_cannot_predict(data, tmp_path):
    checkpoint = fit_once(tmp_path, data)
    with pytest.raises(InputError, match=r"data\.split\.folds: expected the 1 of .*step-00004, got others"):
        TRAINER.predict(checkpoint, in_folds(data, 3), "valid")


def test_margins_that_are_not_finite_end_the_fit_before_anything_is_written(data, tmp_path, monkeypatch):
    advance = boosting.advance

    def diverged(block: bytes, numeric: np.ndarray, margins: np.ndarray | None = None) -> np.ndarray:
        found = advance(block, numeric, margins)
        found[7] = np.inf
        return found

    generator = TRAINER.fit(planted.config(), data, run_in(tmp_path))
    next(generator)
    monkeypatch.setattr(boosting, "advance", diverged)
    with pytest.raises(FloatingPointError, match="step 1: expected finite margins"):
        next(generator)
    assert newest(tmp_path).name == "step-00000"


def test_the_whole_configuration_is_recorded_with_every_default(data, tmp_path):
    """What a fit was told is enough to fit again."""
    state = checkpoints.load(fit_once(tmp_path / "a", data)).state
    assert set(state["config"]["booster"]) == set(planted.config().booster.model_dump())
    recorded = StockConfig.model_validate(state["config"])
    assert recorded == planted.config()
    again = fit_once(tmp_path / "b", data, recorded)
    assert (
        scores(tmp_path / "a" / again.relative_to(tmp_path / "b"), data).tobytes() == scores(again, data).tobytes()
    )


# ---------------------------------------------------------------------------------------------- matrices


def test_bins_are_made_once_for_all_trials_and_few_are_kept(tmp_path, monkeypatch):
    made, binned = [], boosting.binned

    def counted(*given: Any) -> Any:
        made.append(given[2:])
        return binned(*given)

    monkeypatch.setattr(boosting, "binned", counted)
    data, once = planted.made(), {"max_rounds": 5}
    for i, depth in enumerate((2, 3, 4)):
        fitted(tmp_path / str(i), data, planted.config(booster={"max_depth": depth}, training=once))
    assert len(made) == 1
    seed = planted.config(features="seed", training=once)
    fitted(tmp_path / "seed", data, seed)
    fitted(tmp_path / "full", data, planted.config(training=once))
    assert len(made) == 2
    fitted(tmp_path / "bins", data, planted.config(booster={"max_bin": 16}, training=once))
    fitted(tmp_path / "full again", data, planted.config(training=once))
    assert len(made) == 3  # the set used longest ago is the one that is gone
    fitted(tmp_path / "seed again", data, seed)
    assert len(made) == 4
    assert len(vars(data)["_binned"]) == matrices.KEPT
    assert {len(names) for names, _ in made} == {9, 10}


def test_the_nine_features_of_the_sketch_alone(data, tmp_path):
    """Whatever the others are."""
    config = planted.config(features="seed")
    parts = {}
    for role, part in data.parts.items():
        changed = np.array(part.features)
        changed[:, 9] = 1.0
        parts[role] = replace(part, features=changed)
    other = replace(data, parts=parts)
    first, second = (fit_once(tmp_path / str(i), d, config) for i, d in enumerate((data, other)))
    assert scores(first, data).tobytes() == scores(second, other).tobytes()
    full = fit_once(tmp_path / "full", data), fit_once(tmp_path / "full other", other)
    assert scores(full[0], data).tobytes() != scores(full[1], other).tobytes()
