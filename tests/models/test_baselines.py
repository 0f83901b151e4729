"""models/baselines.py against scikit-learn, and what every baseline promises."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, roc_auc_score

from models import baselines
from models.baselines import (
    BASELINES,
    PENALTIES,
    Baseline,
    average_precision,
    fit_baseline,
    roc_auc,
    single_feature_pr_auc,
)
from models.trainer import Features, InputError, Labels

CARDINALITIES = (4, 9)


def make(n: int, seed: int, n_numeric: int = 3) -> tuple[Features, Labels]:
    """A population whose positives depend on a number, a code and their product; an amount that positives alone
    have."""
    generator = np.random.default_rng(seed)
    numeric = generator.normal(size=(n, n_numeric)).astype(np.float32)
    codes = np.stack([generator.integers(0, c, n) for c in CARDINALITIES], axis=1).astype(np.int32)
    effect = np.array([0.0, -1.0, 1.0, 2.0])[codes[:, 0]]
    score = -2.5 + numeric[:, 0] + effect + 3.0 * (codes[:, 1] % 2 - 0.5) * numeric[:, 1]
    positive = (generator.random(n) < expit(score)).astype(np.float32)
    amount = np.expm1(np.abs(2.0 + 0.7 * numeric[:, 0] + effect / 2 + generator.normal(0, 0.3, n)))
    tasks = {
        "other": 1 - positive,
        "gift": positive,
        "watch": (10 + 3 * numeric[:, 1] - effect + generator.normal(0, 0.5, n)).astype(np.float32),
        "amount": np.where(positive == 1, amount, np.nan).astype(np.float32),
    }
    names = tuple(f"n{i}" for i in range(n_numeric))
    features = Features(numeric, names, codes, ("kind", "place"), CARDINALITIES)
    unit = np.arange(n, dtype=np.int64)
    return features, Labels(tasks, unit, None, {"watch": "none", "amount": "log1p"})


TRAIN, VALID, TEST = make(3000, 0), make(1500, 1), make(1500, 2)


def dense(features: Features) -> np.ndarray:
    hot = [np.eye(c)[features.codes[:, i]] for i, c in enumerate(features.cardinalities)]
    return np.concatenate([features.numeric.astype(np.float64), *hot], axis=1)


def fit(name: str, seed: int = 0) -> Baseline:
    return fit_baseline(name, *TRAIN, *VALID, "gift", seed)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Baseline]:
    return {name: fit(name) for name in BASELINES}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_scores_the_decision_and_every_regression(name: str, fitted: dict[str, Baseline]) -> None:
    assert fitted[name].name == name
    predictions = fitted[name].predict(TEST[0])
    assert set(predictions.scores) == {"gift", "watch", "amount"}
    assert not predictions.calibrated, "their losses give probabilities"
    for values in predictions.scores.values():
        assert values.shape == (1500,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_they_rank_as_they_should(fitted: dict[str, Baseline]) -> None:
    label = TEST[1].tasks["gift"]
    found = [average_precision_score(label, fitted[name].predict(TEST[0]).scores["gift"]) for name in BASELINES]
    assert found[0] == pytest.approx(label.mean())
    assert found[0] + 0.1 < found[1] < found[2] - 0.02, "boosting alone sees the product"
    for name in BASELINES[1:]:
        probability = expit(fitted[name].predict(TEST[0]).scores["gift"].astype(np.float64))
        assert probability.mean() == pytest.approx(label.mean(), rel=0.15)
    for task in ("watch", "amount"):
        actual = TEST[1].tasks[task]
        errors = [np.nanmean(np.abs(fitted[n].predict(TEST[0]).scores[task] - actual)) for n in BASELINES]
        assert max(errors[1:]) < 0.7 * errors[0]


def test_the_base_rate_is_that_of_train(fitted: dict[str, Baseline]) -> None:
    scores = fitted["base_rate"].predict(TEST[0]).scores
    assert scores["gift"] == pytest.approx(np.full(1500, logit(TRAIN[1].tasks["gift"].mean(dtype=np.float64))))
    assert scores["watch"] == pytest.approx(np.full(1500, TRAIN[1].tasks["watch"].mean(dtype=np.float64)))
    assert scores["amount"] == pytest.approx(np.full(1500, np.nanmean(TRAIN[1].tasks["amount"], dtype=np.float64)))


def test_logistic_regression_equals_scikit_learn_at_the_penalty_that_valid_prefers(
    fitted: dict[str, Baseline],
) -> None:
    best = (-1.0, np.empty(0))
    for variance in PENALTIES:
        model = LogisticRegression(C=variance, tol=1e-8, max_iter=10_000)
        model.fit(dense(TRAIN[0]), TRAIN[1].tasks["gift"])
        figure = average_precision_score(VALID[1].tasks["gift"], model.decision_function(dense(VALID[0])))
        best = max(best, (figure, model.decision_function(dense(TEST[0]))), key=lambda entry: entry[0])
    assert fitted["logistic_regression"].predict(TEST[0]).scores["gift"] == pytest.approx(best[1], abs=2e-3)


@pytest.mark.parametrize("variance", PENALTIES)
def test_every_penalty_is_solved(variance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PENALTIES", (variance,))
    model = LogisticRegression(C=variance, tol=1e-8, max_iter=10_000)
    model.fit(dense(TRAIN[0]), TRAIN[1].tasks["gift"])
    expected = model.decision_function(dense(TEST[0]))
    scores = fit("logistic_regression").predict(TEST[0]).scores
    assert scores["gift"] == pytest.approx(expected, abs=2e-3)
    target = np.log1p(TRAIN[1].tasks["amount"].astype(np.float64))
    known = ~np.isnan(target)
    mean, spread = target[known].mean(), target[known].std()
    ridge = Ridge(alpha=1 / variance, tol=1e-10).fit(dense(TRAIN[0])[known], (target[known] - mean) / spread)
    expected = ridge.predict(dense(TEST[0])) * spread + mean
    expected = np.expm1(np.clip(expected, target[known].min(), target[known].max()))
    assert scores["amount"] == pytest.approx(expected, rel=2e-3)


def test_ridge_takes_the_penalty_with_the_least_error_on_valid(fitted: dict[str, Baseline]) -> None:
    target = TRAIN[1].tasks["watch"].astype(np.float64)
    mean, spread = target.mean(), target.std()
    best = (np.inf, np.empty(0))
    for variance in PENALTIES:
        model = Ridge(alpha=1 / variance, tol=1e-10).fit(dense(TRAIN[0]), (target - mean) / spread)
        error = np.mean((model.predict(dense(VALID[0])) * spread + mean - VALID[1].tasks["watch"]) ** 2)
        best = min(best, (error, model.predict(dense(TEST[0])) * spread + mean), key=lambda entry: entry[0])
    expected = np.clip(best[1], target.min(), target.max())
    assert fitted["logistic_regression"].predict(TEST[0]).scores["watch"] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_gives_the_same_baseline(name: str, fitted: dict[str, Baseline]) -> None:
    again, before = fit(name).predict(TEST[0]).scores, fitted[name].predict(TEST[0]).scores
    assert all(np.array_equal(again[task], before[task]) for task in before)


def test_the_seed_decides_the_rows_that_boosting_draws(fitted: dict[str, Baseline]) -> None:
    other, before = fit("xgboost", 1).predict(TEST[0]).scores, fitted["xgboost"].predict(TEST[0]).scores
    assert not np.array_equal(other["gift"], before["gift"])


@pytest.mark.parametrize("name", BASELINES)
def test_blocks_of_rows_change_nothing(
    name: str, fitted: dict[str, Baseline], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fitted[name].predict(TEST[0]).scores
    few = replace(TEST[0], numeric=TEST[0].numeric[:7], codes=TEST[0].codes[:7])
    assert fitted[name].predict(few).scores["gift"] == pytest.approx(before["gift"][:7], rel=1e-6)
    monkeypatch.setattr(baselines, "_BLOCK", 701)
    after = fit(name).predict(TEST[0]).scores
    for task, values in before.items():
        # the order of a sum changes its last bits
        assert after[task] == pytest.approx(values, rel=1e-4, abs=1e-3), task


def test_rows_that_do_not_count_change_nothing() -> None:
    features, labels = TRAIN
    twice = replace(
        features,
        numeric=np.concatenate([features.numeric, features.numeric + 9]),
        codes=np.concatenate([features.codes, features.codes]),
    )
    unknown = np.full(3000, np.nan, np.float32)
    tasks = {name: np.concatenate([values, unknown]) for name, values in labels.tasks.items()}
    for name in BASELINES:
        padded = fit_baseline(name, twice, replace(labels, tasks=tasks), *VALID, "gift", 0).predict(TEST[0]).scores
        plain = fit(name).predict(TEST[0]).scores
        assert all(np.array_equal(padded[task], plain[task]) for task in plain), name


def test_training_stops_by_valid() -> None:
    """Valid without any relation to the features: no round is better than the first ones."""
    features, labels = VALID
    generator = np.random.default_rng(0)
    noise = {name: generator.permutation(values) for name, values in labels.tasks.items()}
    stopped = fit_baseline("xgboost", *TRAIN, features, replace(labels, tasks=noise), "gift", 0)
    learned = fit("xgboost")
    spread = [model.predict(TEST[0]).scores["watch"].std() for model in (stopped, learned)]
    assert spread[0] < 0.3 * spread[1]


def test_regressions_stay_inside_the_range_of_train(fitted: dict[str, Baseline]) -> None:
    far = replace(TEST[0], numeric=TEST[0].numeric * 1000)
    for name in BASELINES:
        scores = fitted[name].predict(far).scores
        for task in ("watch", "amount"):
            known = TRAIN[1].tasks[task][~np.isnan(TRAIN[1].tasks[task])]
            assert known.min() - 1e-3 <= scores[task].min() <= scores[task].max() <= known.max() + 1e-2
        assert np.isfinite(scores["gift"]).all()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("kept", ["numeric", "codes"])
def test_one_kind_of_feature_is_enough(name: str, kept: str) -> None:
    def cut(features: Features) -> Features:
        if kept == "numeric":
            codes = np.empty((len(features.codes), 0), np.int32)
            return replace(features, codes=codes, categorical_names=(), cardinalities=())
        return replace(features, numeric=np.empty((len(features.codes), 0), np.float32), numeric_names=())

    found = fit_baseline(name, cut(TRAIN[0]), TRAIN[1], cut(VALID[0]), VALID[1], "gift", 0)
    scores = found.predict(cut(TEST[0])).scores["gift"]
    reached = average_precision_score(TEST[1].tasks["gift"], scores)
    assert reached > TEST[1].tasks["gift"].mean() + (0.05 if name != "base_rate" else -1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_a_code_that_train_does_not_have_can_be_scored(name: str) -> None:
    features, labels = TRAIN
    seen = (features.codes[:, 1] > 0) & (features.codes[:, 1] < 8)
    part = replace(features, numeric=features.numeric[seen], codes=features.codes[seen])
    known = replace(labels, tasks={task: values[seen] for task, values in labels.tasks.items()})
    found = fit_baseline(name, part, known, *VALID, "gift", 0).predict(TEST[0]).scores["gift"]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", BASELINES)
def test_memory_mapped_rows_give_the_same(name: str, tmp_path: Path, fitted: dict[str, Baseline]) -> None:
    mapped = {}
    for field in ("numeric", "codes"):
        np.save(tmp_path / f"{field}.npy", getattr(TRAIN[0], field))
        mapped[field] = np.load(tmp_path / f"{field}.npy", mmap_mode="r")
    found = fit_baseline(name, replace(TRAIN[0], **mapped), TRAIN[1], *VALID, "gift", 0)
    expected = fitted[name].predict(TEST[0]).scores
    assert all(np.array_equal(found.predict(TEST[0]).scores[task], expected[task]) for task in expected)


def test_one_hot_codes_are_never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows of 5 columns with 2,000 codes each: 1.6 GB as float64."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 2000, (20_000, 5)).astype(np.int32)
    names = tuple("abcde")
    features = Features(np.zeros((20_000, 1), np.float32), ("n",), codes, names, (2000,) * 5)
    label = (generator.random(20_000) < np.where(codes[:, 0] % 2, 0.6, 0.2)).astype(np.float32)
    labels = Labels({"gift": label}, np.arange(20_000), None, {})
    monkeypatch.setattr(baselines, "PENALTIES", (0.1,))
    tracemalloc.start()
    fit_baseline("logistic_regression", features, labels, features, labels, "gift", 0).predict(features)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lightgbm"}, "expected one of base_rate, logistic_regression, xgboost, got 'lightgbm'"),
        ({"task": "gfit"}, r"expected a binary task \(other, gift\), got 'gfit'"),
        ({"task": "watch"}, r"expected a binary task \(other, gift\), got 'watch'"),
    ],
)
def test_what_does_not_exist_is_refused(change: dict[str, str], message: str) -> None:
    wanted = {"name": "base_rate", "task": "gift"} | change
    with pytest.raises(InputError, match=message):
        fit_baseline(wanted["name"], *TRAIN, *VALID, wanted["task"], 0)


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        ("gift", 0.0, "expected positives and negatives of gift"),
        ("gift", np.nan, "expected positives and negatives of gift"),
        ("amount", np.nan, "expected rows that count of amount"),
    ],
)
@pytest.mark.parametrize("role", ["train", "valid"])
def test_rows_that_teach_nothing_are_refused(task: str, value: float, message: str, role: str) -> None:
    given_rows = {"train": TRAIN, "valid": VALID}
    features, labels = given_rows[role]
    tasks = {**labels.tasks, task: np.full(len(labels.unit), value, np.float32)}
    given_rows[role] = (features, replace(labels, tasks=tasks))
    with pytest.raises(InputError, match=message):
        fit_baseline("base_rate", *given_rows["train"], *given_rows["valid"], "gift", 0)


# ---------------------------------------------------------------------------------------------- each feature alone


def test_single_features_equal_scikit_learn() -> None:
    label, seen = VALID[1].tasks["gift"].copy(), TRAIN[1].tasks["gift"].copy()
    label[::7] = np.nan
    seen[::5] = np.nan
    found = dict(single_feature_pr_auc(TRAIN[0], seen, VALID[0], label))
    known = ~np.isnan(label)
    for i, name in enumerate(VALID[0].numeric_names):
        values = VALID[0].numeric[known, i]
        both = [average_precision_score(label[known], sign * values) for sign in (1, -1)]
        assert found[name] == pytest.approx(max(both))
    for i, name in enumerate(VALID[0].categorical_names):
        taught = ~np.isnan(seen)
        rate = [seen[taught & (TRAIN[0].codes[:, i] == code)].mean() for code in range(CARDINALITIES[i])]
        expected = average_precision_score(label[known], np.array(rate)[VALID[0].codes[known, i]])
        assert found[name] == pytest.approx(expected)


def test_single_features_come_best_first_and_a_leak_stands_out() -> None:
    numeric = VALID[0].numeric.copy()
    numeric[:, 2] = -VALID[1].tasks["gift"] + 0.1 * numeric[:, 2]
    found = single_feature_pr_auc(
        TRAIN[0], TRAIN[1].tasks["gift"], replace(VALID[0], numeric=numeric), VALID[1].tasks["gift"]
    )
    assert found[0] == ("n2", pytest.approx(1.0))
    assert [figure for _, figure in found] == sorted((figure for _, figure in found), reverse=True)
    assert len(found) == 5


def test_single_features_need_positives() -> None:
    with pytest.raises(InputError, match="expected positives on valid, got none"):
        single_feature_pr_auc(TRAIN[0], TRAIN[1].tasks["gift"], VALID[0], np.zeros(1500))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=50))
def test_average_precision_equals_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    values, positive = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    positive[0] = 1
    falling, rising = average_precision(values, positive)
    assert falling == pytest.approx(average_precision_score(positive, values))
    assert rising == pytest.approx(average_precision_score(positive, -values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=50))
def test_roc_auc_equals_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    values, positive = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    positive[:2] = 1, 0
    assert roc_auc(values, positive) == pytest.approx(roc_auc_score(positive, values))


@pytest.mark.parametrize(("metric", "figure"), [("pr_auc", average_precision_score), ("roc_auc", roc_auc_score)])
def test_the_penalty_is_the_best_by_the_metric_that_is_asked_for(
    metric: str, figure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = make(120, 7)
    scores = []
    for variance in PENALTIES:
        with monkeypatch.context() as patch:
            patch.setattr(baselines, "PENALTIES", (variance,))
            model = fit_baseline("logistic_regression", features, labels, *VALID, "gift", 0, metric=metric)
        scores.append(model.predict(VALID[0]).scores["gift"])
    best = max(scores, key=lambda values: figure(VALID[1].tasks["gift"], values))
    chosen = fit_baseline("logistic_regression", features, labels, *VALID, "gift", 0, metric=metric)
    assert np.abs(chosen.predict(VALID[0]).scores["gift"] - best).max() < 0.01


@pytest.mark.parametrize(("metric", "name"), [("pr_auc", "aucpr"), ("roc_auc", "auc")])
def test_boosting_stops_by_the_metric_that_is_asked_for(
    metric: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xgboost

    asked, train = [], xgboost.train
    monkeypatch.setattr(xgboost, "train", lambda params, *a, **k: asked.append(params) or train(params, *a, **k))
    fit_baseline("xgboost", *make(300, 7), *make(300, 8), "gift", 0, metric=metric)
    assert [params["eval_metric"] for params in asked] == [name, "rmse", "rmse"]


def test_importing_baselines_imports_neither_torch_nor_xgboost() -> None:
    code = "import sys, models.baselines\nassert not {'torch', 'xgboost', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
