from __future__ import annotations

import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import expit, logit

from models import checkpoint as checkpoints
from models.calibration import FocalInverse
from models.gift import fit as fitting
from models.gift.data import GiftData, GiftDataset, Part
from models.gift.fit import batch_sizes, initial_bias
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig, GiftTrainer, TaskConfig
from models.trainer import Decision, InputError, Measurement, Run
from tests.models.gift.planted import CONFIG, DATA, DECISION, config, planted, planted_spec
from tests.trainer_contract import assert_same_checkpoint, folder_of, numbers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def data(folder) -> GiftDataset:
    return planted(folder)


def run_in(folder: Path, **changed) -> Run:
    return replace(Run(folder, 42, "cpu", 1, DECISION), **changed)


def fit(data: GiftDataset, folder: Path, given: GiftConfig | None = None, **changed) -> list[Measurement]:
    return list(GiftTrainer().fit(given or config(training={"max_epochs": 2}), data, run_in(folder, **changed)))


def with_part(data: GiftDataset, role: str, **arrays: np.ndarray) -> GiftDataset:
    """The dataset with arrays of one role replaced."""
    parts = {name: replace(part) for name, part in data.parts.items()}
    parts[role] = replace(parts[role], **arrays)
    return replace(data, parts=parts)


# ---- configuration and checks


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "lr", 0.0),
        ("optimizer", "lr", float("inf")),
        ("optimizer", "batch_size", 1),
        ("network", "dropout", 1.0),
        ("network", "taper", 0.0),
        ("network", "numeric_embedding", "fourier"),
        ("training", "patience", 0),
        ("training", "lr_factor", 1.0),
        ("balancing", "method", "gradvac"),
        ("network", "widht", 64),
    ],
)
def test_impossible_values_and_unknown_keys_are_refused(section, key, value):
    with pytest.raises(ValidationError):
        config(**{section: {key: value}})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(ValidationError):
        TaskConfig(loss="mse", weight=weight)


def problems(tasks: dict, data: dict | None = None, decision: Decision = DECISION) -> dict[str, str]:
    given = GiftData(**{**DATA, "path": "x.parquet", **(data or {})})
    return {p.path: p.message for p in GiftTrainer().check(config(tasks=tasks), given, decision)}


def test_check_names_unknown_tasks_and_losses_of_the_wrong_kind():
    found = problems(
        {
            "gives": {"loss": "mse"},
            "amount": {"loss": "focal"},
            "watches": {"loss": "huber", "alpha": 0.5, "gamma": 1.0},  # accepted: without effect outside focal
            "likes": {"loss": "bce"},
        }
    )
    assert set(found) == {"config.tasks.gives.loss", "config.tasks.amount.loss", "config.tasks.likes"}
    assert "bce or focal" in found["config.tasks.gives.loss"]
    assert "mse or huber" in found["config.tasks.amount.loss"]
    assert "watches, comments, gives, amount" in found["config.tasks.likes"]


@pytest.mark.parametrize(
    ("task", "fragment"),
    [("likes", "got 'likes'"), ("amount", "got regression task 'amount'"), ("comments", "not trained")],
)
def test_check_wants_a_trained_binary_task_to_decide_on(task, fragment):
    found = problems({"gives": {"loss": "bce"}}, decision=Decision(task=task, target_precision=0.3))
    assert set(found) == {"decision.task"}
    assert fragment in found["decision.task"]
    assert "\n" not in found["decision.task"]


def test_a_specification_is_checked_without_torch():
    code = "import sys; from models import get_trainer; get_trainer('gift'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# ---- what goes into the network


def test_targets_are_standardised_and_conditional_rows_alone_count(data):
    part, rows = data.part("train"), on_device(data, "train", CPU)
    watches, _, gives, amount = (np.asarray(part.labels[:, k], np.float64) for k in range(4))
    targets = rows.targets.numpy()
    assert abs(targets[:, 0].mean()) < 1e-4
    assert targets[:, 0].std() == pytest.approx(1, abs=1e-3)
    expected = (np.log1p(watches) - data.target_mean["watches"]) / data.target_std["watches"]
    np.testing.assert_allclose(targets[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(targets[:, 2], gives)
    assert np.array_equal(np.isnan(targets[:, 3]), gives == 0)
    assert abs(np.nanmean(targets[:, 3])) < 1e-4
    assert (amount[gives == 1] > 0).all()


def test_tensors_are_made_once_and_features_are_not_copied(data):
    first = on_device(data, "train", CPU)
    assert on_device(data, "train", CPU) is first
    assert np.shares_memory(first.numeric.numpy(), data.part("train").numeric)


@given(st.integers(2, 500), st.integers(2, 64))
def test_batches_hold_every_row_and_never_a_single_one(n_rows, batch_size):
    sizes = batch_sizes(n_rows, batch_size)
    assert sum(sizes) == n_rows
    assert min(sizes) >= 2
    assert max(sizes) <= batch_size + 1
    assert len(sizes) <= -(-n_rows // batch_size)


@pytest.mark.parametrize("epoch_of", [1, 2])
def test_an_epoch_uses_every_row_once_in_an_order_of_its_own(data, tmp_path, monkeypatch, epoch_of):
    seen, step = [], fitting.Training._step
    monkeypatch.setattr(
        fitting.Training, "_step", lambda self, rows, *a: (seen.append(rows.clone()), step(self, rows, *a))[1]
    )
    fit(data, tmp_path, config(training={"max_epochs": epoch_of}))
    n = len(data.part("train").labels)
    order = torch.cat(seen).view(epoch_of, n)
    assert torch.equal(order.sort(dim=1).values, torch.arange(n).expand(epoch_of, n))
    assert not torch.equal(order[0], torch.arange(n))
    assert epoch_of == 1 or not torch.equal(order[0], order[1])


@given(st.floats(0.001, 0.6), st.floats(0.05, 0.99), st.floats(0, 5))
def test_first_output_of_a_focal_head_is_calibrated_to_the_base_rate(rate, alpha, gamma):
    bias = initial_bias(TaskConfig(loss="focal", alpha=alpha, gamma=gamma), rate)
    assert FocalInverse(alpha, gamma)(torch.tensor(bias)).item() == pytest.approx(rate, rel=1e-4)


def test_initial_bias_known_values():
    assert initial_bias(TaskConfig(loss="bce"), 0.0148) == pytest.approx(logit(0.0148))
    assert expit(initial_bias(TaskConfig(loss="focal"), 0.0148)) == pytest.approx(0.123, abs=1e-3)  # FACTS: .123


# ---- an epoch and its measurement

RANKED = ["pr_auc", "pr_auc_se", "roc_auc", "log_loss", "ece", *(f"recall_at_{k}pct" for k in (1, 5, 10))]
MONEY = [f"{name}_at_{k}pct" for name in ("capture", "revenue") for k in (1, 5, 10)]
CHOSEN = ["threshold", "precision", "recall", "precision_bound", "violation", "n_selected"]


def test_names_of_the_metrics(data, tmp_path):
    metrics = fit(data, tmp_path)[-1].metrics
    expected = {"train/lr"}
    for task in CONFIG["tasks"]:
        expected |= {f"train/{task}/{name}" for name in ("loss", "loss_share", "gradient_share", "weight")}
        expected.add(f"valid/{task}/loss")
    expected |= {f"valid/{task}/rmse" for task in ("watches", "amount")}
    expected |= {f"valid/{task}/{name}" for task in ("comments", "gives") for name in RANKED}
    expected |= {f"valid/gives/{name}" for name in [*MONEY, *CHOSEN, "ece_calibrated"]}
    names = list(CONFIG["tasks"])
    expected |= {f"train/cosine/{a}/{b}" for i, a in enumerate(names) for b in names[i + 1 :]}
    assert set(metrics) == expected


def test_shares_add_up_and_cosines_are_cosines(data, tmp_path):
    for m in fit(data, tmp_path):
        for kind in ("loss_share", "gradient_share"):
            assert sum(v for n, v in m.metrics.items() if n.endswith(kind)) == pytest.approx(1, abs=1e-5)
        cosines = [v for n, v in m.metrics.items() if n.startswith("train/cosine")]
        assert all(-1.0001 <= v <= 1.0001 for v in cosines)
        assert len({round(v, 6) for v in cosines}) == 6
        assert m.metrics["train/gives/weight"] == pytest.approx(0.3)


def test_weights_steer_the_shares(data, tmp_path):
    heavy = {**CONFIG["tasks"], "gives": {**CONFIG["tasks"]["gives"], "weight": 100.0}}
    one = config(training={"max_epochs": 1})
    light = fit(data, tmp_path / "a", one)[0].metrics
    heavy = fit(data, tmp_path / "b", config(training={"max_epochs": 1}, tasks=heavy))[0].metrics
    for kind in ("loss_share", "gradient_share"):
        assert light[f"train/gives/{kind}"] < 0.2 < 0.6 < heavy[f"train/gives/{kind}"]


def test_losses_and_rmse_agree_with_numpy(data, tmp_path):
    run = run_in(tmp_path)
    (m,) = fit(data, tmp_path, config(training={"max_epochs": 1}))
    scores = GiftTrainer().predict(folder_of(run, 0), data, "valid").scores
    labels = np.asarray(data.part("valid").labels, np.float64)
    watches, gives = labels[:, 0], labels[:, 2] == 1
    error = np.log1p(scores["watches"].astype(np.float64)) - np.log1p(watches)
    assert m.metrics["valid/watches/rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-2)
    amount = np.log1p(scores["amount"].astype(np.float64)) - np.log1p(labels[:, 3])
    assert m.metrics["valid/amount/rmse"] == pytest.approx(np.sqrt((amount[gives] ** 2).mean()), rel=1e-2)
    s = scores["comments"].astype(np.float64) * (2 * labels[:, 1] - 1)
    assert m.metrics["valid/comments/loss"] == pytest.approx(np.log1p(np.exp(-s)).mean(), rel=1e-5)
    p_t = expit(scores["gives"].astype(np.float64) * np.where(gives, 1, -1))
    focal = -np.where(gives, 0.25, 0.75) * (1 - p_t) ** 2 * np.log(p_t)
    assert m.metrics["valid/gives/loss"] == pytest.approx(focal.mean(), rel=1e-5)


def test_best_keeps_weights_and_logits_of_the_best_epoch_not_of_the_last(data, tmp_path):
    given = config(optimizer={"lr": 0.05}, training={"max_epochs": 8, "patience": 8, "lr_patience": 8})
    measurements = fit(data, tmp_path, given)
    values = [m.metrics["valid/gives/pr_auc"] for m in measurements]
    assert int(np.argmax(values)) < 7, "the test needs a run whose last epoch is not its best"
    last = checkpoints.load(folder_of(run_in(tmp_path), 7))
    assert last.best_step == int(np.argmax(values))
    scores = GiftTrainer().predict(last.path, data, "valid").scores["gives"]
    best = last.load_best()
    assert best["valid_logits"].dtype == torch.float32
    assert np.array_equal(best["valid_logits"].numpy(), scores)
    name = "network/head_weight"
    assert not torch.equal(best[name], last.tensors[name])


def test_curves_show_calibrated_probabilities_of_the_rows_that_have_a_label(data, tmp_path):
    labels = np.array(data.part("valid").labels)
    labels[::3, 2:] = np.nan
    partly = with_part(data, "valid", labels=labels)
    (m,) = fit(partly, tmp_path, config(training={"max_epochs": 1}))
    logits = checkpoints.load(folder_of(run_in(tmp_path), 0)).load_best()["valid_logits"]
    known = ~np.isnan(labels[:, 2])
    count, predicted, observed = (np.array(m.curves["calibration"][n]) for n in ("count", "predicted", "observed"))
    assert count.sum() == known.sum() < len(labels)
    expected = FocalInverse(0.25, 2.0)(logits[torch.as_tensor(known)]).sum().item()
    assert (count * predicted).sum() == pytest.approx(expected, rel=1e-6)
    assert (count * observed).sum() == pytest.approx(labels[known, 2].sum())
    assert m.curves["pr"]["precision"][-1] == pytest.approx(labels[known, 2].mean())


def test_a_checkpoint_holds_no_curves_and_a_resumed_run_draws_them_of_its_best_step_alone(data, tmp_path):
    given = config(optimizer={"lr": 0.05}, training={"max_epochs": 8, "patience": 8, "lr_patience": 8})
    whole = fit(data, tmp_path / "whole", given)
    worse = next(m.step for m in whole if m.curves is None)
    for step in (0, worse):
        run = run_in(tmp_path / str(step))
        generator = GiftTrainer().fit(given, data, run)
        for m in generator:
            if m.step == step:
                break
        generator.close()
        assert checkpoints.latest(run).measurement.curves is None
        again = next(GiftTrainer().fit(given, data, replace(run, attempt=2)))
        assert again.curves == whole[step].curves
        assert (again.curves is None) == (step == worse)


def test_patience_ends_the_run_and_the_plateau_lowers_the_rate(data, tmp_path):
    slow = config(optimizer={"lr": 1e-7}, training={"max_epochs": 30, "patience": 4, "lr_patience": 1})
    measurements = fit(data, tmp_path, slow)
    values = [m.metrics["valid/gives/pr_auc"] for m in measurements]
    assert len(values) - 1 - int(np.argmax(values)) == 4
    rates = [m.metrics["train/lr"] for m in measurements]
    assert rates[0] == 1e-7
    assert rates[-1] < rates[0]
    assert [m.step for m in fit(data, tmp_path, slow)] == [measurements[-1].step]  # ended stays ended


# ---- arms, balancing, embeddings


def test_an_arm_that_drops_tasks(data, tmp_path):
    single = config(tasks={"gives": {"loss": "focal"}}, training={"max_epochs": 2})
    (*_, m) = fit(data, tmp_path, single)
    assert m.metrics["train/gives/loss_share"] == m.metrics["train/gives/gradient_share"] == 1.0
    assert not any("amount" in n or "cosine" in n for n in m.metrics)
    assert {f"valid/gives/{name}" for name in MONEY} <= set(m.metrics)  # money needs labels, not a head
    scores = GiftTrainer().predict(folder_of(run_in(tmp_path), 1), data, "valid").scores
    assert list(scores) == ["gives"]


@pytest.mark.parametrize("method", ["gradnorm", "pcgrad", "aligned_mtl"])
def test_balancing_learns_and_resumes_to_the_bit(data, tmp_path, method):
    given = config(balancing={"method": method}, training={"max_epochs": 3})
    whole = fit(data, tmp_path / "whole", given)
    assert max(m.metrics["valid/gives/pr_auc"] for m in whole) > 0.3
    trainer, stopped = GiftTrainer(), []
    for attempt in (1, 2, 3):
        generator = trainer.fit(given, data, run_in(tmp_path / "parts", attempt=attempt))
        stopped += [next(generator)] if attempt == 1 else [next(generator), next(generator)][1:]
        generator.close()
    assert numbers(stopped) == numbers(whole)
    ends = (folder_of(run_in(tmp_path / "whole"), 2), folder_of(run_in(tmp_path / "parts", attempt=3), 2))
    assert_same_checkpoint(*ends)
    weights = [whole[-1].metrics[f"train/{task}/weight"] for task in CONFIG["tasks"]]
    assert not np.allclose(weights, [0.3, 0.2, 0.3, 0.2], atol=0.01)
    if method == "gradnorm":
        assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_piecewise_linear_embeddings_and_no_batch_norm_train(data, tmp_path):
    network = {"numeric_embedding": "piecewise_linear", "n_bins": 8, "bin_embedding_dim": 4, "batch_norm": False}
    measurements = fit(data, tmp_path, config(network=network, training={"max_epochs": 3}))
    assert max(m.metrics["valid/gives/pr_auc"] for m in measurements) > 0.3
    scores = GiftTrainer().predict(folder_of(run_in(tmp_path), 2), data, "valid").scores["gives"]
    assert np.isfinite(scores).all()


def test_weight_decay_and_dropout_have_an_effect(data, tmp_path):
    plain = fit(data, tmp_path / "a")[-1].metrics
    for name, changed in {"b": {"optimizer": {"weight_decay": 0.1}}, "c": {"network": {"dropout": 0.6}}}.items():
        other = fit(data, tmp_path / name, config(training={"max_epochs": 2}, **changed))[-1].metrics
        assert other["train/watches/loss"] != plain["train/watches/loss"]


# ---- labels that are missing


def test_missing_labels_are_left_out(data, tmp_path):
    labels = {role: np.array(data.part(role).labels) for role in ("train", "valid")}
    rng = np.random.default_rng(0)
    for role, values in labels.items():
        values[rng.random(values.shape) < 0.2] = np.nan
        values[np.isnan(values[:, 2]), 3] = np.nan
        assert np.isnan(values).any(axis=0).all(), role
    partly = with_part(with_part(data, "train", labels=labels["train"]), "valid", labels=labels["valid"])
    measurements = fit(partly, tmp_path, config())
    assert max(m.metrics["valid/gives/pr_auc"] for m in measurements) > 0.3
    assert GiftTrainer().predict(folder_of(run_in(tmp_path), 3), partly, "valid").scores["gives"].shape == (
        len(labels["valid"]),
    )


def test_batches_without_positives_are_harmless(data, tmp_path):
    tiny = config(optimizer={"batch_size": 4, "lr": 1e-3}, training={"max_epochs": 1})
    few = data.part("train")
    rows = slice(0, 301)  # the last batch of one row joins the one before
    cut = Part(few.numeric[rows], few.categorical[rows], few.labels[rows], few.unit[rows])
    small = replace(data, parts={**data.parts, "train": cut})
    for method in ("fixed", "gradnorm", "pcgrad", "aligned_mtl"):
        (m,) = fit(small, tmp_path / method, tiny.model_copy(update={"balancing": config(
            balancing={"method": method}).balancing}))  # fmt: skip
        assert all(math.isfinite(v) for v in m.metrics.values())


# ---- what ends a run


@pytest.mark.parametrize("method", ["fixed", "gradnorm", "pcgrad", "aligned_mtl"])
def test_a_loss_that_is_not_finite_fails_before_anything_is_written(data, tmp_path, method):
    wild = config(optimizer={"lr": 1e30}, balancing={"method": method}, training={"max_epochs": 3})
    with pytest.raises(FloatingPointError) as caught:
        fit(data, tmp_path, wild)
    assert "\n" not in str(caught.value)
    assert "lower optimizer.lr" in str(caught.value)
    for path in tmp_path.glob("attempt-*/step-*"):
        tensors = checkpoints.load(path).tensors
        assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("network/"))


def test_valid_outputs_that_are_not_finite_fail(data, tmp_path):
    numeric = np.array(data.part("valid").numeric)
    numeric[7, 0] = np.inf
    with pytest.raises(FloatingPointError, match="not finite on valid"):
        fit(with_part(data, "valid", numeric=numeric), tmp_path)
    assert list(tmp_path.glob("attempt-*/step-*")) == []


def test_no_positive_in_valid_is_an_error(data, tmp_path):
    labels = np.array(data.part("valid").labels)
    labels[:, 2] = 0
    with pytest.raises(InputError, match="no positives"):
        fit(with_part(data, "valid", labels=labels), tmp_path)


@pytest.mark.parametrize("change", ["seed", "config"])
def test_checkpoints_of_another_run_are_refused(data, tmp_path, change):
    fit(data, tmp_path)
    given = config(training={"max_epochs": 3}) if change == "config" else None
    with pytest.raises(InputError, match=change):
        fit(data, tmp_path, given, **({"seed": 7} if change == "seed" else {}))


def test_an_unknown_task_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="likes"):
        fit(data, tmp_path, config(tasks={**CONFIG["tasks"], "likes": {"loss": "bce"}}))


# ---- the device's other users


def test_concurrent_fits_do_not_disturb_each_other(data, tmp_path):
    given = config(balancing={"method": "pcgrad"}, training={"max_epochs": 2})
    alone = [numbers(fit(data, tmp_path / f"alone-{seed}", given, seed=seed)) for seed in (1, 2)]
    together: dict[int, list] = {}

    def work(seed: int) -> None:
        together[seed] = numbers(fit(data, tmp_path / f"together-{seed}", given, seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[1], together[2]] == alone


def test_predictions_are_in_the_labels_own_unit(data, tmp_path, folder):
    fit(data, tmp_path, config())
    every = GiftTrainer().load(planted_spec(folder), frozenset({"train", "valid", "test"}))
    predictions = GiftTrainer().predict(folder_of(run_in(tmp_path), 3), every, "test")
    labels = np.asarray(every.part("test").labels)
    assert list(predictions.scores) == list(CONFIG["tasks"])
    assert all(s.shape == (len(labels),) and s.dtype == np.float32 for s in predictions.scores.values())
    predicted, true = np.log1p(predictions.scores["watches"]), np.log1p(labels[:, 0])
    assert abs(np.median(predicted - true)) < 0.2
    assert np.corrcoef(predicted, true)[0, 1] > 0.75
