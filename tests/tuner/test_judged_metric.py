"""An evaluation is judged by the study's own metric: ROC-AUC where the search improves it, else PR-AUC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models.trainer import Decision, InputError, Labels, Objective, Predictions
from tests.tuner import judged_study
from tests.tuner.judged_study import Evaluated, JudgedTrainer, concluded, world
from tuner import verdict
from tuner.judged_metric import chance, label_of, metric_of, metric_of_study, value_on_valid


@pytest.mark.parametrize(
    ("objective", "metric"),
    [
        ("valid/toy/roc_auc", "roc_auc"), ("valid/toy/pr_auc", "pr_auc"), ("valid/toy/log_loss", "pr_auc"),
        ("valid/other/roc_auc", "pr_auc"), ("valid/toy/recall_at_1pct", "pr_auc"),
    ],
)  # fmt: skip
def test_the_metric_is_that_of_the_objective_if_it_ranks_the_decisions_task(objective: str, metric: str) -> None:
    assert metric_of_study(Objective(metric=objective), "toy") == metric


def test_what_names_no_metric_is_older_and_read_as_pr_auc() -> None:
    older: dict[str, Any] = {"sample": {"base_rate": 0.1}}
    assert (metric_of(older), label_of(older), chance(older)) == ("pr_auc", "PR-AUC", 0.1)
    assert value_on_valid(older, {"valid_pr_auc": 0.3}) == 0.3
    newer = {**older, "metric": "roc_auc"}
    assert (metric_of(newer), label_of(newer), chance(newer)) == ("roc_auc", "ROC-AUC", 0.5)
    assert value_on_valid(newer, {"valid_pr_auc": 0.3, "valid_roc_auc": 0.7}) == 0.7
    assert value_on_valid(newer, {"valid_pr_auc": 0.3}) is None, "one metric is never told for the other"


@pytest.fixture(scope="module")
def roc_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged-roc")
    judged_study.make(folder, objective={"metric": "valid/toy/roc_auc"})
    return folder


@pytest.fixture(scope="module")
def by_roc_auc(roc_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Evaluated, Any]]:
    """Concluded where `joint` has the highest PR-AUC and, its lower half being noise, not the highest ROC-AUC."""
    whole = JudgedTrainer._predictions
    with judged_study.opened(roc_template, tmp_path_factory.mktemp("roc")) as found:
        place = found.place("joint")

        def noisy(self: JudgedTrainer, checkpoint: Path, role: str) -> Predictions:
            predictions, number = whole(self, checkpoint, role), int(Path(checkpoint).parents[1].name)
            if number % len(found.plan.arms) != place:
                return predictions
            logits, rng = predictions.scores["toy"].copy(), np.random.default_rng(number)
            low = logits < np.quantile(logits, 0.7)
            logits[low] = rng.permutation(logits[low])
            return replace(predictions, scores={**predictions.scores, "toy": logits})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JudgedTrainer, "_predictions", noisy)
            patch.setattr(verdict, "BASELINES", ("base_rate", "logistic_regression"))
            yield found, concluded(found)


def test_the_nominee_is_the_best_by_the_studys_own_metric(by_roc_auc):
    _, document = by_roc_auc
    assert document["metric"] == "roc_auc"
    arms = {name: arm["fits"] for name, arm in document["arms"].items() if arm["kind"] == "searched"}
    means = {
        metric: {name: np.mean([fit[f"valid_{metric}"] for fit in fits]) for name, fits in arms.items()}
        for metric in ("pr_auc", "roc_auc")
    }
    best = {metric: max(values, key=lambda name: values[name]) for metric, values in means.items()}
    assert (best["pr_auc"], best["roc_auc"]) == ("joint", "other")
    (nominee,) = document["nominees"]
    assert nominee["arm"] == "other"
    fit = max(arms["other"], key=lambda fit: fit["valid_roc_auc"])
    assert (nominee["number"], nominee["valid_roc_auc"]) == (fit["number"], fit["valid_roc_auc"])
    assert nominee["valid_pr_auc"] == fit["valid_pr_auc"]


def test_gains_and_importances_are_of_the_studys_own_metric(by_roc_auc):
    evaluated, document = by_roc_auc
    values = {name: arm["metrics"]["roc_auc"]["value"] for name, arm in document["arms"].items()}
    for found in document["comparisons"]:
        assert found["metric"] == "roc_auc"
        assert found["difference"]["value"] == pytest.approx(values[found["arm"]] - values[found["against"]])
    assert document["verdict"]["relative"]["value"] == pytest.approx(values["joint"] / values["single"] - 1)
    gain = document["tuning_gain"]
    assert gain["difference"]["value"] == pytest.approx(values["joint"] - values["joint/default"])
    (signal,) = (group for group in document["importance"]["groups"] if group["name"] == "signal")
    fits = document["arms"]["other"]["fits"]
    for drop, fit in zip(signal["per_seed"], fits, strict=True):
        assert drop == pytest.approx(fit["valid_roc_auc"] - 0.5, abs=0.03), "without the signal chance is left"
    assert any(
        f"ROC-AUC {document['nominees'][0]['valid_roc_auc']:.4f} on valid" in line for line in evaluated.said
    )


def test_a_leak_is_looked_for_by_pr_auc_whatever_the_metric(by_roc_auc):
    _, document = by_roc_auc
    truth = world("valid")
    hint = truth["signal"] + np.random.default_rng(9).normal(size=len(truth["signal"]))
    (value,) = (value for name, value in document["leak"]["features"] if name == "hint")
    assert value == pytest.approx(average_precision_score(truth["labels"], np.float32(hint)))


def test_the_registry_knows_what_a_model_was_judged_by(by_roc_auc):
    (row,) = by_roc_auc[0].study.store.models("judged")
    assert row.metrics["metric"] == "roc_auc"
    assert row.metrics["own"]["roc_auc"] > 0.5


@pytest.mark.parametrize("role", ["valid", "test"])
def test_roc_auc_needs_a_negative(roc_template: Path, tmp_path: Path, monkeypatch, role: str):
    whole = JudgedTrainer.labels

    def labels(self: JudgedTrainer, data: Any, of: Any, decision: Decision) -> Labels:
        found = whole(self, data, of, decision)
        toy = np.where(found.tasks["toy"] == 1, 1.0, np.nan if of == role else 0.0).astype(np.float32)
        return replace(found, tasks={**found.tasks, "toy": toy})

    monkeypatch.setattr(JudgedTrainer, "labels", labels)
    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    with (
        judged_study.opened(roc_template, tmp_path) as evaluated,
        pytest.raises(
            InputError, match=rf"{role}/toy: expected a negative among \d+ rows for the ROC-AUC, got none"
        ),
    ):
        concluded(evaluated)
