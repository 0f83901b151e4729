"""Which searched values mattered, by Optuna's PED-ANOVA, without scikit-learn, also of conditional values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from models.trainer import Objective
from tuner.space import Dimension

# Below this the best fifth is fewer than two trials, which compares nothing.
MIN_TRIALS = 10
TARGET_QUANTILE = 0.2


def parameter_importance(
    trials: Sequence[tuple[Mapping[str, Any], float]], dimensions: Sequence[Dimension], objective: Objective
) -> dict[str, float]:
    """Share of each searched value in being among the best fifth, largest first; they sum to 1.

    Args:
        trials: searched values by path, and the objective, of complete trials.

    Returns:
        Nothing where there are fewer than `MIN_TRIALS` trials, all have the same objective, or nothing varies.

    Source: Watanabe et al. 2023, PED-ANOVA, as `optuna.importance.PedAnovaImportanceEvaluator`.
    """
    if len(trials) < MIN_TRIALS or len({value for _, value in trials}) < 2:
        return {}
    known = {dimension.path: _distribution(dimension) for dimension in dimensions}
    study = optuna.create_study(direction=objective.direction)
    varied = {path for path in known if len({params[path] for params, _ in trials if path in params}) > 1}
    for params, value in trials:
        kept = {d.path: params[d.path] for d in dimensions if d.path in varied and d.path in params}
        distributions = {path: known[path] for path in kept}
        study.add_trial(optuna.trial.create_trial(params=kept, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that conditional values are looked at in their own regime
        found = PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE).evaluate(study, params=sorted(varied))
    total = sum(found.values())
    shares = {path: float(share / total) for path, share in found.items()} if total > 0 else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "categorical":
        return CategoricalDistribution(dimension.choices)
    low, high = dimension.low, dimension.high
    if dimension.kind == "int":
        step = 1 if dimension.step is None else int(dimension.step)
        return IntDistribution(int(low), int(high), log=dimension.log, step=step)
    return FloatDistribution(low, high, log=dimension.log, step=dimension.step)
