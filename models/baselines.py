"""What a trained model is held against: the base rate, a linear model, gradient boosting, and each feature alone.

They see the same rows and features as the trainers' models. One-hot codes are sparse and rows are taken in
blocks: beside the features, which may be memory-mapped, a linear model keeps one int32 per code, boosting its bins
of a byte or two per value. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit, logit

from models import BASELINES, Metric
from models.trainer import Features, InputError, Labels, Predictions

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # prior variances of a linear model's weights, from strong to weak penalty

_BLOCK = 65536
_LINEAR_STEPS = 200
_ROUNDS = 1000
_PATIENCE = 50  # boosting rounds without a better figure on valid
_BOOSTING = {"tree_method": "hist", "learning_rate": 0.1, "max_depth": 6, "subsample": 0.8, "nthread": 1}

_log = logging.getLogger(__name__)

Kind = Literal["binary", "regression"]
Score = Callable[[Features], np.ndarray]  # [N] float64: a logit, or a standardised target
_Fit = Callable[["_Rows", "_Rows", Kind], Score]


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline; made by `fit_baseline`."""

    name: str
    models: Mapping[str, Score]

    def predict(self, features: Features) -> Predictions:
        """Scores of the decision's task (logits of probabilities, no inverse needed) and of every regression task
        (own unit)."""
        return Predictions({task: model(features).astype(np.float32) for task, model in self.models.items()})


def fit_baseline(
    name: str,
    train: Features,
    train_labels: Labels,
    valid: Features,
    valid_labels: Labels,
    task: str,
    seed: int,
    device: str = "cpu",
    metric: Metric = "pr_auc",
) -> Baseline:
    """Fit one of `BASELINES` on train, with valid to choose how much of it.

    `base_rate`: train's share of positives, and its mean of every regression target. `logistic_regression`: L2
    penalty from `PENALTIES` by `metric` on valid; for regression ridge, by squared error. `xgboost`: histograms,
    with early stopping by the same figures on valid. The last two learn a regression's transformed target and stay
    inside the range that train has; under log1p they are closer to a median than to a mean. The same input
    and seed give the same baseline, bit for bit on the CPU.

    Args:
        task: the decision's binary task; the other binary tasks are left out.
        seed: decides the rows that boosting draws.
        device: where boosting runs, `cpu` or a CUDA device; the linear models stay on the CPU.
        metric: what the models are judged by later, so that no baseline is held back by another aim.

    Raises:
        InputError: no such baseline or binary task; a task without rows that count, or without both values, on
            train or valid.
    """
    if name not in BASELINES:
        raise InputError(f"baseline: expected one of {', '.join(BASELINES)}, got {name!r}")
    binary = [other for other in train_labels.tasks if other not in train_labels.transforms]
    if task not in binary:
        raise InputError(f"baseline: expected a binary task ({', '.join(binary)}), got {task!r}")
    started = time.perf_counter()
    models: dict[str, Score] = {}
    for each in (task, *train_labels.transforms):
        kind: Kind = "binary" if each == task else "regression"
        rows = [
            _rows(features, labels, each, kind)
            for features, labels in ((train, train_labels), (valid, valid_labels))
        ]
        if name == "base_rate":
            models[each] = _constant(rows[0].target, kind)
            continue
        fit: _Fit = partial(_fit_linear, metric=metric)
        if name == "xgboost":
            fit = partial(_fit_trees, seed=seed, device=device, metric=metric)
        models[each] = _fit_transformed(fit, *rows, kind, train_labels.transforms.get(each, "none"))
    elapsed = time.perf_counter() - started
    _log.info("baseline %s fitted in %.1f s", name, elapsed, extra={"action": "baseline", "elapsed_s": elapsed})
    return Baseline(name, models)


# ---------------------------------------------------------------------------------------------- rows and targets


@dataclass(frozen=True)
class _Rows:
    """The rows of a role that count for a task; `at` [n] are their places, None where all rows count."""

    features: Features
    at: np.ndarray | None
    target: np.ndarray

    @classmethod
    def of(cls, features: Features) -> _Rows:
        """All rows, to be scored."""
        return cls(features, None, np.full(len(features.numeric), np.nan))

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Place among these rows, numeric [n, D], codes [n, C]."""
        for start in range(0, len(self.target), _BLOCK):
            place = slice(start, min(start + _BLOCK, len(self.target)))
            rows = place if self.at is None else self.at[place]
            yield place, self.features.numeric[rows], self.features.codes[rows]


def _rows(features: Features, labels: Labels, task: str, kind: Kind) -> _Rows:
    values = np.asarray(labels.tasks[task], np.float64)
    known = ~np.isnan(values)
    target = values[known]
    if not len(target) or (kind == "binary" and not 0.0 < target.mean() < 1.0):
        expected = "positives and negatives" if kind == "binary" else "rows that count"
        raise InputError(f"baseline: expected {expected} of {task}, got none; change the split or give more data")
    return _Rows(features, None if known.all() else np.flatnonzero(known), target)


def _constant(target: np.ndarray, kind: Kind) -> Score:
    value = float(logit(target.mean()) if kind == "binary" else target.mean())
    return lambda features: np.full(len(features.numeric), value)


def _fit_transformed(fit: _Fit, train: _Rows, valid: _Rows, kind: Kind, transform: str) -> Score:
    """`fit` on a target that is transformed and standardised, and back again. Binary targets stay as they are."""
    if kind == "binary":
        return fit(train, valid, kind)
    forth, back = (np.log1p, np.expm1) if transform == "log1p" else (np.asarray, np.asarray)
    targets = forth(train.target)
    low, high, mean, spread = targets.min(), targets.max(), targets.mean(), targets.std() or 1.0
    standardised = [_Rows(rows.features, rows.at, (forth(rows.target) - mean) / spread) for rows in (train, valid)]
    score = fit(*standardised, kind)
    return lambda features: back(np.clip(score(features) * spread + mean, low, high))


# ---------------------------------------------------------------------------------------------- linear


@dataclass(frozen=True)
class _Design:
    """Numeric features, one-hot codes and an intercept as blocks of rows.

    Shape: a block's numeric [n, D] float32, one-hot [n, T] sparse; weights [D + T + 1], the intercept last.
    """

    blocks: list[tuple[slice, np.ndarray, csr_array]]
    n_numeric: int
    n_weights: int

    @classmethod
    def of(cls, rows: _Rows) -> _Design:
        cardinalities = np.asarray(rows.features.cardinalities, np.int32)
        n_columns, n_codes = len(cardinalities), int(cardinalities.sum())
        offsets = np.cumsum(cardinalities, dtype=np.int32) - cardinalities
        ones, starts = np.ones(_BLOCK * n_columns), np.arange(_BLOCK + 1, dtype=np.int32) * n_columns  # shared
        blocks = []
        for place, numeric, codes in rows.blocks():
            n = len(numeric)
            indices = (codes + offsets).ravel()
            hot = csr_array((ones[: n * n_columns], indices, starts[: n + 1]), shape=(n, n_codes))
            blocks.append((place, numeric, hot))
        n_numeric = rows.features.numeric.shape[1]
        return cls(blocks, n_numeric, n_numeric + n_codes + 1)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        parts = [self._block_scores(numeric, hot, weights) for _, numeric, hot in self.blocks]
        return np.concatenate(parts) if parts else np.empty(0)

    def _block_scores(self, numeric: np.ndarray, hot: csr_array, weights: np.ndarray) -> np.ndarray:
        return numeric @ weights[: self.n_numeric] + hot @ weights[self.n_numeric : -1] + weights[-1]

    def risk(self, weights: np.ndarray, target: np.ndarray, kind: Kind) -> tuple[float, np.ndarray]:
        """Mean loss and its gradient."""
        total, gradient = 0.0, np.zeros(self.n_weights)
        for place, numeric, hot in self.blocks:
            wide = numeric.astype(np.float64)
            score, y = self._block_scores(wide, hot, weights), target[place]
            if kind == "binary":
                total += float(np.sum(np.logaddexp(0.0, score) - y * score))
                slope = expit(score) - y
            else:
                slope = score - y
                total += 0.5 * float(slope @ slope)
            gradient[: self.n_numeric] += slope @ wide
            gradient[self.n_numeric : -1] += hot.T @ slope
            gradient[-1] += slope.sum()
        return total / len(target), gradient / len(target)

    def mean_squares(self) -> np.ndarray:
        """[D + T + 1] of every column."""
        total = np.zeros(self.n_weights)
        for place, numeric, hot in self.blocks:
            total[: self.n_numeric] += np.square(numeric, dtype=np.float64).sum(axis=0)
            total[self.n_numeric : -1] += np.bincount(hot.indices, minlength=hot.shape[1])
            total[-1] += place.stop - place.start
        return total / total[-1]


def _fit_linear(train: _Rows, valid: _Rows, kind: Kind, metric: Metric) -> Score:
    """Least sum of losses + |weights|^2 / (2 variance), the intercept free; of `PENALTIES` the best on valid.

    L-BFGS, from each penalty's solution to the next weaker one's. Where columns are nearly collinear, as the codes
    of related columns are, it ends before the last digits of their weights, which no ranking depends on.
    """
    design, judged = _Design.of(train), _Design.of(valid)
    n_rows, weights = len(train.target), np.zeros(design.n_weights)
    mean = float(train.target.mean())
    weights[-1] = logit(mean) if kind == "binary" else mean
    curvature = design.mean_squares() * (mean * (1.0 - mean) if kind == "binary" else 1.0)
    best, best_figure = weights, -math.inf
    for variance in PENALTIES:
        penalty = np.full(design.n_weights, 1.0 / (variance * n_rows))
        penalty[-1] = 0.0
        scale = 1.0 / np.sqrt(curvature + penalty)  # each direction about equally curved: far fewer steps

        def penalised(scaled: np.ndarray, scale: np.ndarray = scale, penalty: np.ndarray = penalty) -> Any:
            at = scaled * scale
            loss, gradient = design.risk(at, train.target, kind)
            return loss + 0.5 * float(penalty @ (at * at)), (gradient + penalty * at) * scale

        limits = {"maxiter": _LINEAR_STEPS, "ftol": 1e-8, "gtol": 1e-6, "maxcor": 30}
        weights = minimize(penalised, weights / scale, jac=True, method="L-BFGS-B", options=limits).x * scale
        figure = _figure(judged.scores(weights), valid.target, kind, metric)
        if figure > best_figure:
            best, best_figure = weights, figure
    return lambda features: _Design.of(_Rows.of(features)).scores(best)


def _figure(scores: np.ndarray, target: np.ndarray, kind: Kind, metric: Metric) -> float:
    if kind == "regression":
        return -float(np.mean((scores - target) ** 2))
    return roc_auc(scores, target) if metric == "roc_auc" else average_precision(scores, target)[0]


# ---------------------------------------------------------------------------------------------- boosting


def _fit_trees(train: _Rows, valid: _Rows, kind: Kind, seed: int, device: str, metric: Metric) -> Score:
    import xgboost as xgb  # takes a while to import

    goal = {"objective": "binary:logistic", "eval_metric": "auc" if metric == "roc_auc" else "aucpr"}
    if kind == "regression":
        goal = {"objective": "reg:squarederror", "eval_metric": "rmse"}
    matrix = _binned(train, None)
    booster = xgb.train(
        {**_BOOSTING, **goal, "seed": seed, "device": device},
        matrix,
        num_boost_round=_ROUNDS,
        evals=[(_binned(valid, matrix), "valid")],
        early_stopping_rounds=_PATIENCE,
        verbose_eval=False,
    )
    rounds = (0, booster.best_iteration + 1)

    def score(features: Features) -> np.ndarray:
        parts = []
        for _, numeric, codes in _Rows.of(features).blocks():
            block = xgb.DMatrix(np.concatenate([numeric, codes], axis=1, dtype=np.float32), **_types(features))
            parts.append(booster.predict(block, output_margin=True, iteration_range=rounds))
        return np.concatenate(parts) if parts else np.empty(0)

    return score


def _types(features: Features) -> dict[str, Any]:
    kinds = ["float"] * features.numeric.shape[1] + ["c"] * features.codes.shape[1]
    return {"feature_types": kinds, "enable_categorical": True}


def _binned(rows: _Rows, reference: Any) -> Any:
    """The rows as bins, made block by block; those of valid are cut where `reference`, train's, is."""
    import xgboost as xgb

    types = _types(rows.features)

    class Blocks(xgb.DataIter):
        def __init__(self) -> None:
            self.left = rows.blocks()
            super().__init__()

        def next(self, input_data: Callable[..., Any]) -> bool:
            found = next(self.left, None)
            if found is None:
                return False
            place, numeric, codes = found
            data = np.concatenate([numeric, codes], axis=1, dtype=np.float32)
            input_data(data=data, label=rows.target[place], feature_types=types["feature_types"])
            return True

        def reset(self) -> None:
            self.left = rows.blocks()

    return xgb.QuantileDMatrix(Blocks(), ref=reference, enable_categorical=True)


# ---------------------------------------------------------------------------------------------- each feature alone


def single_feature_pr_auc(
    train: Features, train_label: np.ndarray, valid: Features, valid_label: np.ndarray
) -> list[tuple[str, float]]:
    """PR-AUC on valid of every feature alone, best first: one that stands out may know the future.

    A numeric feature ranks by its value, in the better of both directions; a categorical one by the share of
    positives that its code has on train.

    Args:
        train_label, valid_label: [N] 0 or 1, NaN where a row does not count.

    Raises:
        InputError: valid has no positives.
    """
    known = ~np.isnan(valid_label)
    label = np.asarray(valid_label, np.float64)[known]
    if not label.any():
        raise InputError("single features: expected positives on valid, got none; change the split")
    found = []
    for place, name in enumerate(valid.numeric_names):
        found.append((name, max(average_precision(valid.numeric[known, place], label))))
    for place, name in enumerate(valid.categorical_names):
        rate = _rate_per_code(train.codes[:, place], train_label, train.cardinalities[place])
        found.append((name, average_precision(rate[valid.codes[known, place]], label)[0]))
    return sorted(found, key=lambda entry: (-entry[1], entry[0]))


def average_precision(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Step-wise average precision (ties grouped) of ranking by falling and by rising `values`."""
    levels, group = np.unique(values, return_inverse=True)
    hits = np.bincount(group, weights=positive, minlength=len(levels))
    rows = np.bincount(group, minlength=len(levels))

    def area(hits: np.ndarray, rows: np.ndarray) -> float:
        return float(np.sum(hits * np.cumsum(hits) / np.cumsum(rows)) / hits.sum())

    return area(hits[::-1], rows[::-1]), area(hits, rows)


def roc_auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of ranking by falling `values`, ties counted half."""
    levels, group = np.unique(values, return_inverse=True)
    hits = np.bincount(group, weights=positive, minlength=len(levels))
    misses = np.bincount(group, minlength=len(levels)) - hits
    below = np.cumsum(misses) - misses / 2.0
    return float(hits @ below / (hits.sum() * misses.sum()))


def _rate_per_code(codes: np.ndarray, label: np.ndarray, n_codes: int) -> np.ndarray:
    known = ~np.isnan(label)
    rows = np.bincount(codes[known], minlength=n_codes)
    return np.bincount(codes[known], weights=label[known], minlength=n_codes) / np.maximum(rows, 1)
