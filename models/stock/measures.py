"""What a step of the stock trainer is measured by: ranks on valid and the decision on its days."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.curves import curves
from models.decision import decide
from models.metrics import Ranking, Truth, read
from models.stock import roles
from models.stock.data import TASK, StockDataset
from models.stock.split import Fold
from models.trainer import Decision
from models.unit_cuts import unit_codes

PREFIX = f"valid/{TASK}"


class Validation:
    """The valid role: its truth is built once, its metrics every step.

    With folds a metric is the mean over them, with `<metric>@fold<i>` beside it; the decision and the curves are
    those of all rows of valid, each scored by its own fold's booster.
    """

    def __init__(
        self, data: StockDataset, folds: Sequence[Fold], decision: Decision, scale_pos_weight: float
    ) -> None:
        part = data.part("valid")
        self.decision, self.days, self.stocks = decision, np.array(part.day), np.array(part.stock)
        self.unit = None if decision.unit == "row" else unit_codes(roles.unit(part, decision))
        labels = torch.from_numpy(np.array(part.labels))
        self.truth = Truth.of(labels, name=PREFIX)
        self.parts = [fold.part for fold in folds]
        self.truths = [Truth.of(labels[rows], name=f"{PREFIX}@fold{i}") for i, rows in enumerate(self.parts)]
        self.probability = weighed(scale_pos_weight)

    def measure(self, logits: np.ndarray) -> dict[str, float]:
        """All metrics of one step from the margins [N] float32 of valid."""
        scores = torch.from_numpy(logits)
        ranking = Ranking.of(scores, self.truth)
        if len(self.parts) == 1:
            found = read({f"{PREFIX}/{name}": value for name, value in self._metrics(ranking, slice(None)).items()})
        else:
            found = self._over_folds(scores)
        decided = decide(ranking, self.decision, self.unit)
        decided |= self._spread(logits, decided)
        return found | {f"{PREFIX}/{name}": value for name, value in decided.items()}

    def curves(self, logits: np.ndarray, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What is drawn of a step, from its margins [N] and the metrics that `measure` made of them."""
        ranking = Ranking.of(torch.from_numpy(logits), self.truth)
        probability = self.probability or torch.sigmoid
        return curves(ranking, self.decision, metrics.get(f"{PREFIX}/threshold"), probability, self.unit)

    def _metrics(self, ranking: Ranking, rows: slice) -> dict[str, Tensor]:
        found, unit = ranking.metrics(self.probability), None if self.unit is None else self.unit[rows]
        if unit is None or int(unit.min()) < int(unit.max()):  # a single unit says nothing of its error
            found |= {"roc_auc_se": ranking.roc_auc_se(unit), "pr_auc_se": ranking.average_precision_se(unit)}
        return found

    def _over_folds(self, scores: Tensor) -> dict[str, float]:
        pending = {
            f"{PREFIX}/{name}@fold{i}": value
            for i, (rows, truth) in enumerate(zip(self.parts, self.truths, strict=True))
            for name, value in self._metrics(Ranking.of(scores[rows], truth), rows).items()
        }
        found, n_folds = read(pending), len(self.parts)
        measured = (
            {name.partition("@")[0] for name in found if name.endswith(f"@fold{i}")} for i in range(n_folds)
        )
        by_fold = {
            name: [found[f"{name}@fold{i}"] for i in range(n_folds)] for name in sorted(set.intersection(*measured))
        }
        return {name: _mean(name, values) for name, values in by_fold.items()} | found

    def _spread(self, logits: np.ndarray, decided: Mapping[str, float]) -> dict[str, float]:
        """F1 of the decision, and over how many days and stocks the selected rows spread."""
        precision, recall = decided.get("precision", 0.0), decided["recall"]
        selected = logits >= np.float32(decided.get("threshold", math.inf))
        return {
            "f1": 2.0 * precision * recall / (precision + recall) if precision + recall > 0.0 else 0.0,
            "n_days_selected": float(len(np.unique(self.days[selected]))),
            "n_stocks_selected": float(len(np.unique(self.stocks[selected]))),
        }


def _mean(name: str, values: Sequence[float]) -> float:
    """The mean of a metric, or the standard error of that mean."""
    return (math.hypot(*values) if name.endswith("_se") else math.fsum(values)) / len(values)


def weighed(scale_pos_weight: float) -> Callable[[Tensor], Tensor] | None:
    """Margins -> probabilities where positives were weighed, which makes odds as many times too high."""
    shift = math.log(scale_pos_weight)
    return (lambda margins: torch.sigmoid(margins - shift)) if shift else None
