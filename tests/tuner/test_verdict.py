"""From ended fits to the document: every number derived again, and a conclusion that may be killed anywhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from models.baselines import BASELINES
from models.calibration import Calibrator
from models.trainer import Decision, InputError, Labels, Predictions
from storage.rows import MeasurementRow
from storage.runs import Store
from tests.tuner import judged_study
from tests.tuner.judged_study import Evaluated, JudgedTrainer, concluded, scores_of, world
from tuner import verdict
from tuner.document import mean_cosines, training_curves
from tuner.fits import Rows, importance, on_valid
from tuner.fits import scores_of as scores_of_fit
from tuner.report_text import former_answers, verdict_lines
from tuner.scoring import find_checkpoint

ROLES = ("valid", "test")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search and the ended fits of its evaluation, to be copied."""
    folder = tmp_path_factory.mktemp("judged")
    judged_study.make(folder)
    return folder


@pytest.fixture
def evaluated(template: Path, tmp_path: Path) -> Iterator[Evaluated]:
    with judged_study.opened(template, tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def whole(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Evaluated, dict[str, Any]]]:
    """One uninterrupted conclusion."""
    with judged_study.opened(template, tmp_path_factory.mktemp("whole")) as found:
        yield found, concluded(found)


@pytest.fixture(scope="module")
def infeasible(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Evaluated, Any]]:
    """A conclusion whose target is out of reach."""
    with judged_study.opened(template, tmp_path_factory.mktemp("infeasible")) as found:
        found.change_decision(target_precision=0.999)
        yield found, concluded(found)


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "finished_at"}


# --- the document ----------------------------------------------------------------------------------------------


def test_the_document_has_the_parts_of_its_format_and_is_what_is_stored(whole):
    evaluated, document = whole
    assert list(document) == [
        "format", "study", "evaluation", "number", "finished_at", "package_version", "versions", "data", "task",
        "metric", "decision", "confidence", "n_replicates", "seeds", "sample", "looks", "arms", "left_out",
        "comparisons", "verdict", "former", "tuning_gain", "reliability", "nominees", "leak", "gradient_cosine",
        "training", "importance", "cost", "reproduce", "model",
    ]  # fmt: skip
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert evaluated.refresh().document == document
    assert document["study"] == "judged"
    assert document["evaluation"] == "judged.evaluation-1"
    assert document["versions"].keys() >= {"python", "torch", "numpy", "xgboost", "optuna"}
    assert "/" not in json.dumps([document["reproduce"], document["data"], document["arms"]["joint"]["config"]])


def test_every_arm_and_baseline_is_there_with_its_fits(whole):
    evaluated, document = whole
    kinds = {name: arm["kind"] for name, arm in document["arms"].items()}
    assert kinds == {
        "single": "searched", "joint": "searched", "other": "searched", "joint/default": "default",
        "base_rate": "baseline", "logistic_regression": "baseline", "xgboost": "baseline",
    }  # fmt: skip
    n_arms = len(evaluated.plan.arms)
    for place, arm in enumerate(evaluated.plan.arms):
        found = document["arms"][arm.name]
        assert found["config"] == arm.config
        assert found["trial"] == arm.trial
        assert [fit["number"] for fit in found["fits"]] == [place + n_arms * seed for seed in range(3)]
        assert [fit["seed"] for fit in found["fits"]] == [
            evaluated.fits.spec.seed_of(fit["number"]) for fit in found["fits"]
        ]
        assert all(fit["state"] == "complete" and fit["n_steps"] == 3 for fit in found["fits"])
    assert len({fit["seed"] for fit in document["arms"]["joint"]["fits"]}) == 3


def test_pr_auc_and_roc_auc_are_those_of_scikit_learn_on_the_score_files(whole):
    evaluated, document = whole
    n_checked = 0
    for name, arm in document["arms"].items():
        per_seed: dict[str, list[float]] = {"pr_auc": [], "roc_auc": []}
        for fit in arm["fits"]:
            model = f"baseline-{name}" if fit["number"] is None else f"{fit['number']:05d}"
            on_valid = world("valid")["labels"], scores_of(evaluated, model, "valid")
            assert fit["valid_pr_auc"] == pytest.approx(average_precision_score(*on_valid), rel=1e-12)
            assert fit["valid_roc_auc"] == pytest.approx(roc_auc_score(*on_valid), rel=1e-12)
            scores = scores_of(evaluated, model, "test")
            per_seed["pr_auc"].append(average_precision_score(world("test")["labels"], scores))
            per_seed["roc_auc"].append(roc_auc_score(world("test")["labels"], scores))
            n_checked += 1
        for metric, values in per_seed.items():
            found = arm["metrics"][metric]
            assert found["per_seed"] == pytest.approx(values, rel=1e-12)
            assert found["value"] == pytest.approx(np.mean(values), rel=1e-12)
            assert found["low"] <= found["value"] <= found["high"]
    assert n_checked == 15


def test_probabilities_are_calibrated_on_valid_and_their_errors_can_be_derived_again(whole):
    evaluated, document = whole
    for name, arm in document["arms"].items():
        errors: dict[str, list[float]] = {"brier_raw": [], "brier_calibrated": [], "log_loss_calibrated": []}
        for fit in arm["fits"]:
            model = f"baseline-{name}" if fit["number"] is None else f"{fit['number']:05d}"
            folder = Path(evaluated.options.runs) / evaluated.evaluation.name / "scores"
            arrays, labels = load_file(folder / f"{model}-test.safetensors"), world("test")["labels"]
            raw = np.float64(arrays["scores/toy"])
            calibrated = Calibrator.from_json(fit["calibrator"])(arrays.get("calibrated/toy", raw))
            errors["brier_raw"].append(np.mean((expit(raw) - labels) ** 2))
            errors["brier_calibrated"].append(np.mean((calibrated - labels) ** 2))
            errors["log_loss_calibrated"].append(
                -np.mean(np.where(labels == 1, np.log(calibrated), np.log1p(-calibrated)))
            )
        for metric, values in errors.items():
            assert arm["metrics"][metric]["per_seed"] == pytest.approx(values, rel=1e-9), (name, metric)
    assert document["arms"]["joint"]["calibration"]["chosen"] in ("identity", "platt", "isotonic")
    joint = document["arms"]["joint"]["metrics"]
    assert joint["ece_calibrated"]["value"] < joint["ece_raw"]["value"]


def test_amounts_are_smeared_by_a_factor_from_valid(whole):
    _, document = whole
    fit = document["arms"]["joint"]["fits"][0]
    how = fit["smearing"]["amount"]
    truth = world("valid")
    paid = np.float64(np.float32(truth["amount"][truth["labels"] == 1]))
    predicted = np.float64(np.expm1(np.float32(0.8)))
    assert how["transform"] == "log1p"
    assert how["factor"] == pytest.approx(np.mean((1 + paid) / (1 + predicted)), rel=1e-6)
    test = world("test")
    error = np.mean(np.abs((1 + predicted) * how["factor"] - 1 - test["amount"][test["labels"] == 1]))
    assert document["arms"]["joint"]["metrics"]["amount_mae"]["per_seed"][0] == pytest.approx(error, rel=1e-5)


def test_the_sample_is_described(whole):
    _, document = whole
    labels = world("test")["labels"]
    assert document["sample"] == {
        "role": "test", "n_rows": 2000, "n_positive": int(labels.sum()), "n_units": 500, "unit": "user",
        "base_rate": pytest.approx(labels.mean()),
    }  # fmt: skip


def test_the_nominee_is_the_best_by_valid_alone(whole):
    _, document = whole
    means = {
        name: np.mean([fit["valid_pr_auc"] for fit in arm["fits"]])
        for name, arm in document["arms"].items()
        if arm["kind"] == "searched"
    }
    (nominee,) = document["nominees"]
    assert nominee["arm"] == max(means, key=lambda name: means[name]) == "joint"
    best = max(document["arms"]["joint"]["fits"], key=lambda fit: fit["valid_pr_auc"])
    assert (nominee["number"], nominee["seed"]) == (best["number"], best["seed"])
    assert nominee["checkpoint"] == best["checkpoint"]


def test_the_certificate_can_be_derived_again_by_scipy(whole):
    evaluated, document = whole
    (nominee,) = document["nominees"]
    certificate = nominee["certificate"]
    assert certificate["status"] == "certified"
    truth = world("calibrate")
    scores = scores_of(evaluated, f"{nominee['number']:05d}", "calibrate")
    thresholds = nominee["sequence"]["thresholds"]
    assert thresholds == sorted(thresholds, reverse=True)
    valid = scores_of(evaluated, f"{nominee['number']:05d}", "valid")
    assert nominee["sequence"]["n_selected"] == [int((valid >= t).sum()) for t in thresholds]
    selected = scores >= np.float32(certificate["threshold"])
    n, tp = int(selected.sum()), int(truth["labels"][selected].sum())
    assert (certificate["n_selected"], certificate["n_true"]) == (n, tp)
    assert certificate["precision"] == pytest.approx(tp / n)
    assert certificate["recall"] == pytest.approx(tp / truth["labels"].sum())
    assert certificate["threshold"] in thresholds
    assert certificate["confidence"] == pytest.approx(0.9)
    effective = certificate["n_effective"] or n
    bound = stats.beta.ppf(0.1, tp / n * effective, effective - tp / n * effective + 1)
    assert certificate["bound"] == pytest.approx(bound, rel=1e-6)
    assert certificate["bound"] >= certificate["target"] == 0.5
    assert (certificate["number_on_set"], certificate["delta_spent"]) == (1, pytest.approx(0.1))
    assert certificate["joint_confidence"] == pytest.approx(0.9)
    test = scores_of(evaluated, f"{nominee['number']:05d}", "test") >= np.float32(certificate["threshold"])
    assert nominee["check"]["n_selected"] == int(test.sum())
    assert nominee["check"]["precision"] == pytest.approx(world("test")["labels"][test].mean())


def test_it_is_told_over_how_many_groups_the_selected_rows_spread(whole):
    evaluated, document = whole
    (nominee,) = document["nominees"]
    for role, found in (("calibrate", nominee["certificate"]), ("test", nominee["check"])):
        scores = scores_of(evaluated, f"{nominee['number']:05d}", role)
        users = np.flatnonzero(scores >= np.float32(nominee["certificate"]["threshold"])) // 4
        assert found["groups"] == {
            "user": {"n_selected": len(set(users)), "n": len(scores) // 4},
            "day": {"n_selected": len(set(users % 50)), "n": 50},
        }
        assert 0 < found["groups"]["user"]["n_selected"] < found["groups"]["user"]["n"]


def test_what_rows_alone_would_say_stands_beside_the_bound_of_users(whole):
    _, document = whole
    (nominee,) = document["nominees"]
    issued, kept = nominee["certificate"], nominee["check"]
    alone = stats.binomtest(issued["n_true"], issued["n_selected"]).proportion_ci(0.8, method="exact")
    assert issued["bound_rows"] == pytest.approx(alone.low)
    assert issued["bound_rows"] != issued["bound"]
    alone = stats.binomtest(kept["n_true"], kept["n_selected"]).proportion_ci(0.95, method="exact")
    assert (kept["low_rows"], kept["high_rows"]) == pytest.approx((alone.low, alone.high))


def test_recall_and_f1_of_the_nominee_are_told_on_test_with_their_intervals(whole):
    evaluated, document = whole
    (nominee,) = document["nominees"]
    kept, labels = nominee["check"], world("test")["labels"]
    scores = scores_of(evaluated, f"{nominee['number']:05d}", "test")
    selected = scores >= np.float32(nominee["certificate"]["threshold"])
    assert kept["recall"] == pytest.approx(recall_score(labels, selected))
    assert kept["f1"] == pytest.approx(f1_score(labels, selected))
    for name in ("recall", "f1"):
        assert kept[f"{name}_low"] < kept[name] < kept[f"{name}_high"]
    assert nominee["not_issued"] is None


def test_the_planted_gain_is_found_and_the_question_answered(whole):
    _, document = whole
    pairs = [(c["arm"], c["against"]) for c in document["comparisons"]]
    assert pairs == [
        ("joint", "single"), ("other", "single"), ("joint", "base_rate"), ("joint", "logistic_regression"),
        ("joint", "xgboost"),
    ]  # fmt: skip
    verdict = document["verdict"]
    assert (verdict["arm"], verdict["against"], verdict["outcome"]) == ("joint", "single", "helps")
    metrics = {name: arm["metrics"]["pr_auc"]["value"] for name, arm in document["arms"].items()}
    difference = metrics["joint"] - metrics["single"]
    assert verdict["difference"]["value"] == pytest.approx(difference)
    assert verdict["relative"]["value"] == pytest.approx(difference / metrics["single"])
    assert verdict["min_gain"] == 0.03
    assert verdict["reading"] == "relative"
    gain = document["tuning_gain"]
    assert (gain["arm"], gain["default"]) == ("joint", "joint/default")
    assert gain["difference"]["value"] == pytest.approx(metrics["joint"] - metrics["joint/default"])
    assert 0.0 <= gain["fresh_probability"] <= 1.0


def test_importance_is_the_drop_of_pr_auc_on_valid_over_all_seeds(whole):
    _, document = whole
    importance = document["importance"]
    assert importance["arm"] == "joint"
    assert importance["role"] == "valid"
    assert [group["name"] for group in importance["groups"]] == ["signal", "nothing"]
    assert [unit["name"] for unit in importance["units"]] == ["shared.0"]
    signal, nothing = importance["groups"]
    assert nothing["per_seed"] == [0.0, 0.0, 0.0]
    assert signal["drop"] == pytest.approx(np.mean(signal["per_seed"]))
    assert signal["sd"] == pytest.approx(np.std(signal["per_seed"], ddof=1))
    fits = document["arms"]["joint"]["fits"]
    base_rate = world("valid")["labels"].mean()
    for drop, fit in zip(signal["per_seed"], fits, strict=True):
        assert drop == pytest.approx(fit["valid_pr_auc"] - base_rate, abs=0.03)


def test_leak_training_and_cost_come_from_features_and_stored_rows(whole):
    evaluated, document = whole
    names = [name for name, _ in document["leak"]["features"]]
    assert sorted(names) == ["hint", "noise", "side"]
    assert document["leak"]["best"] == document["leak"]["features"][0][1]
    assert names[-1] == "noise"
    store, fits = evaluated.study.store, evaluated.fits
    best = max(document["arms"]["single"]["fits"], key=lambda fit: fit["valid_pr_auc"])["number"]
    rows = store.measurements(fits.id, [best])[best]
    assert document["training"]["single"] == {
        "steps": [0, 1, 2], "loss": {}, "valid_pr_auc": [row.metrics["valid/toy/pr_auc"] for row in rows],
        "valid_roc_auc": [row.metrics["valid/toy/roc_auc"] for row in rows],
    }  # fmt: skip
    assert "xgboost" not in document["training"]
    for name, study in (("search_device_s", evaluated.study), ("evaluation_device_s", fits)):
        attempts = store.attempts(study.id)
        assert document["cost"][name] == pytest.approx(sum(a.released_at - a.claimed_at for a in attempts))
    assert document["gradient_cosine"] is None
    counts = "--seeds 3 --top 1 --nominees 1 --replicates 200"
    assert document["reproduce"][0].startswith("tuner run --study specification.yaml ")
    assert document["reproduce"][1] == f"tuner evaluate --study judged {counts} --data PATH"


def test_an_evaluation_that_goes_on_tells_what_it_had_answered(evaluated: Evaluated, monkeypatch):
    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    evaluated.change_plan(n_replicates=20)
    first = concluded(evaluated)
    assert concluded(evaluated)["former"] == first["former"] == []
    for n_replicates in (30, 40):
        evaluated.change_plan(n_replicates=n_replicates)
        document = concluded(evaluated)
    assert [(one["seeds"], one["n_replicates"]) for one in document["former"]] == [(3, 20), (3, 30)]
    assert document["former"][0]["outcome"] == first["verdict"]["outcome"]
    (line,) = former_answers(document)
    assert f"{first['verdict']['outcome']} with 3 seeds and" in line
    assert line in verdict_lines(document)


def test_looks_are_counted(whole):
    evaluated, document = whole
    assert document["looks"] == {
        "test": {"n_models": 15, "n_looks": 15, "repeated": 0, "all_on_this_set": 15},
        "calibrate": {"n_models": 1, "n_looks": 1, "repeated": 0, "all_on_this_set": 1},
    }
    looks = evaluated.study.store.looks(evaluated.plan.data_hash)
    assert all(look.scored_at is not None for look in looks)


def test_the_model_is_a_candidate_with_all_it_needs_for_decisions(whole):
    evaluated, document = whole
    (row,) = evaluated.study.store.models("judged")
    assert (row.state, row.metrics["metric"]) == ("candidate", "pr_auc")
    assert document["model"] == {
        "name": "judged", "version": 1, "checksum": row.checksum, "size_bytes": row.size_bytes,
    }  # fmt: skip
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name / "model"
    content = json.loads((folder / "verdict.json").read_text())
    (nominee,) = document["nominees"]
    assert content["threshold"] == nominee["certificate"]["threshold"]
    assert content["certificate"] == nominee["certificate"]
    fit = next(f for f in document["arms"]["joint"]["fits"] if f["number"] == nominee["number"])
    assert content["calibrator"] == fit["calibrator"]
    assert content["smearing"] == fit["smearing"]
    place = document["arms"]["joint"]["fits"].index(fit)
    pr_auc = document["arms"]["joint"]["metrics"]["pr_auc"]
    assert content["metrics"]["pr_auc"] == pr_auc["per_seed"][place]


# --- the order, and kills --------------------------------------------------------------------------------------


def test_guarded_roles_are_opened_late(evaluated: Evaluated, monkeypatch):
    order = []
    for name in ("set_nominee", "open_look", "open_certificate"):
        original = getattr(Store, name)

        def noted(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            order.append(_name)
            return _original(*args, **more)

        monkeypatch.setattr(Store, name, noted)
    opened = evaluated.data_of

    def data_of(roles: frozenset) -> Any:
        order.extend(sorted(roles & {"test", "calibrate"}))
        assert roles <= {"train", "valid"} or len(roles) == 1
        return opened(roles)

    evaluated.data_of = data_of  # type: ignore[method-assign]
    concluded(evaluated)
    assert order[0] == "set_nominee"
    assert order.count("test") == order.count("calibrate") == 1
    assert order.index("calibrate") > order.index("open_certificate") > order.index("set_nominee")


@pytest.fixture(scope="module")
def lean(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of an uninterrupted conclusion that costs little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "BASELINES", ("base_rate",))
        with judged_study.opened(template, tmp_path_factory.mktemp("lean")) as found:
            found.change_plan(n_replicates=20)
            return concluded(found)


STAGES: dict[str, tuple[Any, str]] = {
    "valid": (verdict, "on_valid"),
    "sequence": (verdict, "plan_sequence"),
    "nominee": (Store, "set_nominee"),
    "leak": (verdict, "single_feature_pr_auc"),
    "ablation": (JudgedTrainer, "ablate"),
    "look": (Store, "open_look"),
    "looked": (Store, "close_look"),
    "spend": (Store, "open_certificate"),
    "certify": (verdict, "certify"),
    "issue": (Store, "issue_certificate"),
    "check": (verdict, "check"),
    "bootstrap": (verdict, "resample"),
    "document": (verdict, "write_document"),
    "export": (JudgedTrainer, "export"),
    "register": (verdict.registry, "add_candidate"),
    "finish": (Store, "finish_evaluation"),
}


@pytest.mark.parametrize(
    ("stage", "when"),
    [
        ("valid", "after"), ("sequence", "before"), ("nominee", "before"), ("nominee", "after"), ("leak", "before"),
        ("ablation", "before"), ("look", "before"), ("look", "after"), ("looked", "before"), ("spend", "after"),
        ("certify", "before"), ("issue", "after"), ("check", "before"), ("bootstrap", "before"),
        ("document", "after"), ("export", "after"), ("register", "after"), ("finish", "before"),
        ("finish", "after"),
    ],
)  # fmt: skip
def test_killed_anywhere_and_run_again_gives_the_same_document(
    evaluated: Evaluated, lean: dict[str, Any], monkeypatch, stage: str, when: str
):
    """Killed before or after a stage did its work: at its second call, where every model has one."""
    owner, name = STAGES[stage]
    original, calls = getattr(owner, name), []
    last = 2 if stage in ("valid", "ablation", "look", "looked") else 1

    def killed(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == last and when == "before":
            raise KeyboardInterrupt
        result = original(*args, **more)
        if len(calls) == last:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    evaluated.change_plan(n_replicates=20)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            concluded(evaluated)
    assert evaluated.refresh().document is None or (stage, when) == ("finish", "after")
    before = judged_study.score_files(evaluated)
    asked = JudgedTrainer.asked["predict"]
    asked.clear()
    document = concluded(evaluated)
    assert timeless(document) == timeless(lean)
    assert judged_study.kept(evaluated, before), "a score file that was durable was written again"
    again = {f"{Path(path).parents[1].name}-{role}.safetensors" for path, role in asked}
    assert not again & set(before)
    assert len(evaluated.study.store.models("judged")) == 1
    assert len(evaluated.study.store.certificates(evaluated.plan.data_hash)) == 1


def test_run_again_nothing_is_asked_and_nothing_is_looked_at(evaluated: Evaluated):
    first = concluded(evaluated)
    for calls in JudgedTrainer.asked.values():
        calls.clear()
    second = concluded(evaluated)
    assert timeless(second) == timeless(first)
    assert not JudgedTrainer.asked["predict"]
    assert not JudgedTrainer.asked["ablate"]
    assert not any("scoring" in line for line in evaluated.said)
    assert second["looks"]["test"]["n_looks"] == 15
    assert len(evaluated.study.store.models("judged")) == 1


def test_a_damaged_score_file_is_scored_again_and_the_look_stands_in_the_document(evaluated: Evaluated):
    first = concluded(evaluated)
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name / "scores"
    (folder / "00002-test.safetensors").write_bytes(b"torn")
    second = concluded(evaluated)
    assert second["looks"]["test"] == {"n_models": 15, "n_looks": 16, "repeated": 1, "all_on_this_set": 16}
    assert second["arms"] == first["arms"]


def test_fits_with_equal_checkpoints_are_one_model_that_is_looked_at_once(evaluated: Evaluated, monkeypatch):
    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    evaluated.change_plan(n_replicates=20)
    runs = {run.number: run for run in evaluated.study.store.runs(evaluated.fits.id)}
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name
    one, other = (find_checkpoint(runs[evaluated.place(arm)], folder, None) for arm in ("single", "other"))
    shutil.copyfile(one, other)
    document = concluded(evaluated)
    assert document["looks"]["test"] == {"n_models": 12, "n_looks": 12, "repeated": 0, "all_on_this_set": 12}
    single, other_arm = (document["arms"][arm] for arm in ("single", "other"))
    assert single["metrics"]["pr_auc"]["per_seed"][0] == other_arm["metrics"]["pr_auc"]["per_seed"][0]


# --- nominees and certificates ---------------------------------------------------------------------------------


def test_several_nominees_share_delta(evaluated: Evaluated):
    evaluated.change_plan(nominees=2)
    document = concluded(evaluated)
    first, second = document["nominees"]
    assert (first["arm"], second["arm"]) == ("joint", "other")
    assert [n["certificate"]["delta_spent"] for n in (first, second)] == pytest.approx([0.05, 0.05])
    assert [n["certificate"]["number_on_set"] for n in (first, second)] == [1, 2]
    assert [n["certificate"]["joint_confidence"] for n in (first, second)] == pytest.approx([0.95, 0.9])
    assert document["looks"]["calibrate"]["n_looks"] == 2


def test_the_nominee_stays_what_was_written_down_first(evaluated: Evaluated):
    place = next(i for i, arm in enumerate(evaluated.plan.arms) if arm.name == "single")
    first = concluded(evaluated)
    stored = evaluated.refresh().nominee
    assert stored["nominees"][0]["arm"] == "joint"
    assert evaluated.study.store.set_nominee(evaluated.evaluation.id, {"nominees": [place]}) == stored
    assert concluded(evaluated)["nominees"] == first["nominees"]


def test_an_infeasible_target_gives_no_decisions(infeasible):
    _, document = infeasible
    (nominee,) = document["nominees"]
    assert nominee["certificate"]["status"] == "infeasible"
    assert nominee["certificate"]["threshold"] is None
    assert nominee["check"] is None
    assert 0.0 < nominee["certificate"]["certifiable_precision"] < 0.999
    assert not any(fit["valid_feasible"] for fit in document["arms"]["joint"]["fits"])
    assert nominee["certificate"]["groups"]["day"] == {"n_selected": 0, "n": 50}
    assert document["model"]["version"] == 1


def test_of_an_infeasible_target_it_is_told_what_the_threshold_of_the_search_does_on_test(infeasible):
    evaluated, document = infeasible
    (nominee,) = document["nominees"]
    found, model = nominee["not_issued"], f"{nominee['number']:05d}"
    threshold = np.float32(found["valid"]["threshold"])
    assert found["test"]["threshold"] == found["valid"]["threshold"]
    for role, told in found.items():
        selected, labels = scores_of(evaluated, model, role) >= threshold, world(role)["labels"]
        assert told["n_selected"] == selected.sum() > 0
        assert told["precision"] == pytest.approx(labels[selected].mean())
    assert found["valid"]["violation"] == pytest.approx(0.999 - found["valid"]["precision_bound"])
    assert found["test"]["kept"] is (found["test"]["precision"] >= 0.999)
    assert 0 < found["test"]["groups"]["day"]["n_selected"] <= 50
    assert "sentence" not in found["test"]
    assert "threshold" not in nominee["certificate"]["groups"]
    assert document["looks"]["test"]["repeated"] == 0


def test_a_search_without_a_threshold_has_none_to_tell_of(evaluated: Evaluated, monkeypatch):
    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    evaluated.change_plan(n_replicates=20)
    evaluated.change_decision(min_selected=3001)
    (nominee,) = concluded(evaluated)["nominees"]
    assert nominee["certificate"]["status"] == "infeasible"
    assert nominee["not_issued"] is None


# --- what is left out, and refusals ----------------------------------------------------------------------------


def test_an_arm_without_a_complete_fit_is_left_out_and_named(evaluated: Evaluated):
    evaluated.fail([n for n in range(12) if n % 4 == evaluated.place("other")])
    document = concluded(evaluated)
    assert "other" not in document["arms"]
    (entry,) = document["left_out"]
    assert entry["arm"] == "other"
    assert "RuntimeError: planted" in entry["reason"]
    assert document["verdict"]["outcome"] == "helps"


def test_a_failed_fit_is_listed_and_not_judged(evaluated: Evaluated):
    number = evaluated.place("joint") + 4
    evaluated.fail([number])
    document = concluded(evaluated)
    fits = document["arms"]["joint"]["fits"]
    assert [fit["state"] for fit in fits] == ["complete", "failed", "complete"]
    assert fits[1]["failure"] == "RuntimeError: planted"
    assert len(document["arms"]["joint"]["metrics"]["pr_auc"]["per_seed"]) == 2


def test_without_an_arm_of_the_question_there_is_no_verdict(evaluated: Evaluated):
    evaluated.fail([n for n in range(12) if n % 4 == evaluated.place("single")])
    document = concluded(evaluated)
    assert document["verdict"] is None
    assert document["left_out"][0]["arm"] == "single"
    assert {c["arm"] for c in document["comparisons"]} == {"joint"}
    assert [c["against"] for c in document["comparisons"]] == list(BASELINES)


def test_without_any_complete_fit_it_is_an_error(evaluated: Evaluated):
    evaluated.fail(range(12))
    with pytest.raises(InputError, match=r"judged.evaluation-1: expected a complete fit, got none.*planted"):
        concluded(evaluated)


def test_other_data_are_refused(evaluated: Evaluated):
    evaluated.change_plan(data_hash="f" * 64)
    with pytest.raises(InputError, match=r"expected the data of its plan \(ffffffffffff\), got others"):
        concluded(evaluated)


def test_a_checkpoint_that_is_gone_is_an_error(evaluated: Evaluated):
    for path in (Path(evaluated.options.runs) / evaluated.evaluation.name).glob("trials/00001/attempt-1/step-*"):
        path.unlink()
    with pytest.raises(InputError, match=r"00001/attempt-1/step-00002: expected the checkpoint of a fit"):
        concluded(evaluated)


def test_a_nominee_whose_checkpoint_was_replaced_is_refused(evaluated: Evaluated):
    number = concluded(evaluated)["nominees"][0]["number"]
    run = evaluated.study.store.get_run(evaluated.fits.id, number)
    folder = Path(evaluated.options.runs) / evaluated.evaluation.name / f"trials/{number:05d}/attempt-{run.attempt}"
    (folder / "step-00002").write_bytes((folder / "step-00001").read_bytes())
    with pytest.raises(InputError, match=r"expected the checkpoint of its nominee"):
        concluded(evaluated)


def test_numbers_that_are_none_become_null():
    found = verdict.finite(
        {"a": math.nan, "b": [np.float32(0.5), math.inf], "c": (1, np.int64(2)), "d": np.arange(2)}
    )
    assert found == {"a": None, "b": [0.5, None], "c": [1, 2], "d": [0, 1]}


def measurement(step: int, **metrics: float) -> MeasurementRow:
    return MeasurementRow(step, {name.replace("__", "/"): value for name, value in metrics.items()}, 1.0)


def test_cosines_are_the_mean_over_all_steps_and_symmetric():
    rows = [
        measurement(0, train__cosine__a__b=0.5, train__cosine__a__c=-0.2, train__cosine__b__c=0.1),
        measurement(1, train__cosine__a__b=0.1, train__cosine__b__c=0.3, train__lr=0.1),
    ]
    found = mean_cosines(rows)
    assert found is not None
    assert found["tasks"] == ["a", "b", "c"]
    np.testing.assert_allclose(found["matrix"], [[1.0, 0.3, -0.2], [0.3, 1.0, 0.2], [-0.2, 0.2, 1.0]])
    assert mean_cosines([measurement(0, train__lr=0.1)]) is None


def test_training_curves_keep_their_steps_where_a_value_is_missing():
    rows = [measurement(0, train__a__loss=0.5, valid__t__pr_auc=0.1), measurement(3, train__b__loss=0.2)]
    assert training_curves(rows, "t") == {
        "steps": [0, 3], "loss": {"a": [0.5, None], "b": [None, 0.2]}, "valid_pr_auc": [0.1, None],
        "valid_roc_auc": [None, None],
    }  # fmt: skip


def test_importance_of_one_seed_has_no_spread_and_of_no_part_is_none():
    found = importance("a", "valid", {"group/x/y": [0.1], "group/z": [0.3], "unit/0": [-0.1]})
    assert found is not None
    assert [(group["name"], group["drop"], group["sd"]) for group in found["groups"]] == [
        ("z", 0.3, None), ("x/y", 0.1, None),
    ]  # fmt: skip
    assert found["units"][0]["per_seed"] == [-0.1]
    assert importance("a", "valid", {}) is None


def test_rows_without_the_decisions_label_are_left_out_everywhere():
    labels = Labels(
        {"t": np.array([1, np.nan, 0, 1], np.float32), "money": np.array([2.0, 3.0, np.nan, 4.0], np.float32)},
        np.array([7, 7, 8, 9]), np.array([2.0, 3.0, 0.0, 4.0]), {"money": "log1p"},
    )  # fmt: skip
    rows = Rows.of(labels, "test", "t")
    assert rows.labels.tolist() == [1, 0, 1]
    assert rows.unit.tolist() == [7, 8, 9]
    assert rows.amount.tolist() == [2.0, 0.0, 4.0]
    np.testing.assert_array_equal(rows.targets["money"], [2.0, np.nan, 4.0])
    logits = np.array([0.5, 99.0, -1.0, 2.0], np.float32)
    money = np.array([1.0, 99.0, 1.0, 5.0], np.float32)
    predictions = Predictions({"t": logits, "money": money})
    decision = Decision(task="t", target_precision=0.5, min_selected=1)
    valid = on_valid(predictions, rows, decision, 0)
    assert valid.values == pytest.approx({"pr_auc": 1.0, "roc_auc": 1.0})
    scores = scores_of_fit(predictions, rows, "t", valid)
    assert scores.logits.tolist() == [0.5, -1.0, 2.0]
    assert scores.amounts["money"][0].tolist() == [1.0, 1.0, 5.0]
    with pytest.raises(InputError, match="test/t: expected a positive among 1 rows"):
        Rows.of(Labels({"t": np.zeros(1, np.float32)}, np.zeros(1), None, {}), "test", "t")


def test_with_half_of_the_labels_missing_the_other_half_is_judged(evaluated: Evaluated, monkeypatch):
    monkeypatch.setattr(verdict, "BASELINES", ("base_rate",))
    evaluated.change_plan(n_replicates=20)
    whole, planned, given = JudgedTrainer.labels, verdict.plan_sequence, []

    def labels(self: JudgedTrainer, data: Any, role: Any, decision: Decision) -> Labels:
        found = whole(self, data, role, decision)
        toy = np.where(np.arange(len(found.unit)) % 2 == 0, found.tasks["toy"], np.nan).astype(np.float32)
        return replace(found, tasks={**found.tasks, "toy": toy})

    def plan(logits: np.ndarray, known: np.ndarray, unit: np.ndarray, decision: Decision, n_rows: int) -> Any:
        given.append((len(known), n_rows))
        return planned(logits, known, unit, decision, n_rows)

    monkeypatch.setattr(JudgedTrainer, "labels", labels)
    monkeypatch.setattr(verdict, "plan_sequence", plan)
    document = concluded(evaluated)
    assert given == [(1500, 1500)]  # of calibrate's 3000 rows as many have a label as of valid's
    certificate = document["nominees"][0]["certificate"]
    assert (document["sample"]["n_rows"], certificate["n_rows"]) == (1000, 1500)
    assert certificate["status"] == "certified"
