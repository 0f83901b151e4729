"""What a verdict rests on: the fits of an evaluation with their calibration, the baselines, and what a model's
parts are worth. Everything here is derived from scores and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.baselines import Baseline
from models.bootstrap import Sample, Scores
from models.calibration import Calibrator, fit_calibrator, smeared, smearing
from models.decision import decide
from models.metrics import Ranking, Truth
from models.trainer import Decision, InputError, Labels, Predictions, Role
from storage.rows import RunRow
from tuner.judged_metric import LABELS, Metric
from tuner.scoring import Model


@dataclass(frozen=True)
class Fit:
    """One model that is judged: a trained fit (`run`, `checkpoint`), or a baseline, which has neither.

    `number` is the trial of the evaluation's study, None for a baseline.
    """

    arm: str
    number: int | None
    seed: int
    model: Model
    run: RunRow | None = None
    checkpoint: Path | None = None

    @property
    def title(self) -> str:
        return self.arm if self.number is None else f"fit {self.number} ({self.arm}, seed {self.seed})"


@dataclass(frozen=True)
class Rows:
    """The rows of one role that have the decision's label.

    Shape: `kept` indexes them among all rows of the role; `labels` [N] 0 or 1, `unit` [N], `amount` [N] or None,
    `targets[task]` [N] for each regression task, NaN where it does not count, `groups[name]` [N] what a row is of.
    """

    role: Role
    kept: np.ndarray | slice
    labels: np.ndarray
    unit: np.ndarray
    amount: np.ndarray | None
    targets: Mapping[str, np.ndarray]
    transforms: Mapping[str, str]
    conditions: Mapping[str, str]
    groups: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, labels: Labels, role: Role, task: str) -> Rows:
        """Raises InputError where the role has no positive."""
        known = np.isfinite(labels.tasks[task])
        kept: np.ndarray | slice = slice(None) if known.all() else np.flatnonzero(known)
        of_task = np.array(labels.tasks[task][kept], np.float32)
        if not (of_task == 1).any():
            raise InputError(
                f"{role}/{task}: expected a positive among {len(of_task)} rows, got none; change the split"
            )
        amount = None if labels.amount is None else np.asarray(labels.amount[kept], np.float64)
        targets = {name: np.asarray(labels.tasks[name][kept], np.float64) for name in labels.transforms}
        return cls(
            role, kept, of_task, np.asarray(labels.unit[kept]), amount, targets, dict(labels.transforms),
            dict(labels.conditions), {name: np.asarray(ids)[kept] for name, ids in labels.groups.items()},
        )  # fmt: skip

    def sample(self) -> Sample:
        return Sample(self.labels, self.unit, self.amount, self.targets)

    @property
    def n_positive(self) -> int:
        return int(self.labels.sum())

    def spread(self, selected: np.ndarray) -> dict[str, dict[str, int]]:
        """Over how many of each kind of group the `selected` [N] bool rows are spread, and of how many."""
        return {
            name: {"n_selected": len(np.unique(ids[selected])), "n": len(np.unique(ids))}
            for name, ids in self.groups.items()
        }


@dataclass(frozen=True)
class OnValid:
    """What valid says of one fit: its rank metrics, the threshold of the search, and how its outputs become
    probabilities and amounts."""

    values: Mapping[Metric, float]  # without roc_auc where there is no negative
    search: Mapping[str, float]  # as `models.decision.decide` gives it
    calibrator: Calibrator
    calibration: Mapping[str, Any]  # chosen, log_loss
    smearing: Mapping[str, Mapping[str, Any]]  # task -> factor, transform, given

    @property
    def feasible(self) -> bool:
        return self.search["violation"] <= 0

    def as_entry(self) -> dict[str, float | None]:
        """As a document has it (`tuner.judged_metric.value_on_valid` reads it)."""
        return {f"valid_{metric}": self.values.get(metric) for metric in LABELS}


def rank_metrics(labels: np.ndarray, logits: np.ndarray, name: str = "valid") -> dict[Metric, float]:
    """PR-AUC, and ROC-AUC where there is a negative; they equal those that the trainer measures."""
    return _rank_metrics(_ranking(labels, logits, name))


def _rank_metrics(ranking: Ranking) -> dict[Metric, float]:
    found: dict[Metric, float] = {"pr_auc": float(ranking.average_precision())}
    if ranking.truth.n_positive < ranking.truth.n_rows:
        found["roc_auc"] = float(ranking.roc_auc())
    return found


def on_valid(predictions: Predictions, rows: Rows, decision: Decision, seed: int) -> OnValid:
    """Judge a fit on valid, and fit there what turns its outputs into probabilities and amounts."""
    task = decision.task
    logits = predictions.scores[task][rows.kept]
    ranking = _ranking(rows.labels, logits, f"{rows.role}/{task}")
    calibrator, calibration = fit_calibrator(predictions.logits(task)[rows.kept], rows.labels, rows.unit, seed=seed)
    factors = {}
    for name in _amount_tasks(predictions, rows):
        counts = np.isfinite(rows.targets[name])
        predicted = np.asarray(predictions.scores[name], np.float64)[rows.kept][counts]
        transform = rows.transforms[name]
        factors[name] = {
            "factor": float(smearing(predicted, rows.targets[name][counts], transform)),
            "transform": transform,
            "given": rows.conditions.get(name),
        }
    return OnValid(
        values=_rank_metrics(ranking),
        search=decide(ranking, decision, rows.unit),
        calibrator=calibrator,
        calibration=calibration,
        smearing=factors,
    )


def scores_of(predictions: Predictions, rows: Rows, task: str, valid: OnValid) -> Scores:
    """A fit's scores on a role, before and after what was fitted on valid."""
    logits = np.asarray(predictions.scores[task][rows.kept], np.float32)
    amounts = {}
    for name, how in valid.smearing.items():
        before = np.asarray(predictions.scores[name], np.float64)[rows.kept]
        amounts[name] = (before, smeared(before, how["factor"], how["transform"]))
    return Scores(
        logits=logits,
        raw=_sigmoid(logits.astype(np.float64)),
        calibrated=valid.calibrator(predictions.logits(task)[rows.kept]),
        amounts=amounts,
    )


def _amount_tasks(predictions: Predictions, rows: Rows) -> list[str]:
    return [
        name for name, values in rows.targets.items() if name in predictions.scores and np.isfinite(values).any()
    ]


def _ranking(labels: np.ndarray, logits: np.ndarray, name: str) -> Ranking:
    # copied: torch warns of arrays that may not be written to, as mapped files
    truth = Truth.of(torch.from_numpy(np.array(labels)), name=name)
    return Ranking.of(torch.from_numpy(np.array(logits, np.float32)), truth)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).sigmoid().numpy()


class Baselines:
    """Baseline models, fitted when they are first asked: on train, early stopping and penalties on valid.

    Args:
        search_data: with train and valid open.
        metric: what they are judged by.
    """

    def __init__(
        self, trainer: Any, search_data: Any, decision: Decision, metric: Metric, seed: int, device: str
    ) -> None:
        self._trainer = trainer
        self._data = search_data
        self._decision = decision
        self._metric = metric
        self._seed = seed
        self._device = device
        self._fitted: dict[str, Baseline] = {}

    def predict(self, name: str, data: Any, role: Role) -> Predictions:
        """What a baseline says of a role, which `data` has open."""
        if name not in self._fitted:
            from models.baselines import fit_baseline  # xgboost takes seconds to import

            features = [self._trainer.features(self._data, role) for role in ("train", "valid")]
            labels = [self._trainer.labels(self._data, role, self._decision) for role in ("train", "valid")]
            self._fitted[name] = fit_baseline(
                name, features[0], labels[0], features[1], labels[1], self._decision.task, self._seed, self._device,
                self._metric,
            )  # fmt: skip
        return self._fitted[name].predict(self._trainer.features(data, role))


def best_fit(fits: Sequence[Fit], valid: Mapping[str, OnValid], metric: Metric) -> Fit:
    """The one with the highest metric on valid; the first of equals."""
    return max(fits, key=lambda fit: valid[fit.model.name].values[metric])


def importance(arm: str, role: Role, drops: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """What each part is worth: the drop of the judged metric without it, largest first, over the arm's seeds.

    Args:
        drops: `group/<name>` or `unit/<name>` -> a drop a seed.
    """
    found: dict[str, Any] = {"arm": arm, "role": role, "groups": [], "units": []}
    for part, values in sorted(drops.items(), key=lambda item: (-float(np.mean(item[1])), item[0])):
        kind, _, name = part.partition("/")
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        entry = {"name": name, "drop": float(np.mean(values)), "sd": spread, "per_seed": list(values)}
        found[f"{kind}s"].append(entry)
    return found if drops else None
