"""What is drawn of one epoch's scores: the precision-recall curve with its bounds, and the calibration curve.

For people to look at, so a few hundred numbers whatever the number of rows; every point is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.decision import precision_bound
from models.metrics import Ranking
from models.precision import lower_bound
from models.trainer import Decision
from models.unit_cuts import UnitCuts

MAX_POINTS = 200
N_BINS = 15

Curve = dict[str, list[float]]


def curves(
    ranking: Ranking,
    decision: Decision,
    threshold: float | None,
    probability: Callable[[Tensor], Tensor] = torch.sigmoid,
    unit: Tensor | np.ndarray | None = None,
) -> dict[str, Curve]:
    """The curves of one task, JSON-able.

    Args:
        threshold: logit of the chosen cut, None where none was chosen.
        probability: increasing map from logits to the probabilities whose calibration is shown.
        unit: as for `decide`: the bounds count what those of the decision count.

    Returns:
        `pr`: `recall`, `precision`, `bound` (lower bound of the precision at the decision's confidence, by rows or
        by units as it decides) and `threshold` (logit; a cut selects scores >= threshold) of at most MAX_POINTS
        cuts, from the highest score down to all rows, spread evenly over the recall, the chosen cut among them.
        `calibration`: mean `predicted` probability, `observed` share of positives and `count` of rows in at most
        N_BINS bins, from low to high. Each bin expects as many positives as any other, as nearly as whole tie
        groups allow: with few positives, bins of equally many rows would be nearly all empty of them.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    if not bool(ranking.ascending[[0, -1]].isfinite().all()):  # NaN sorts last
        raise FloatingPointError(f"{ranking.truth.name}: expected finite logits; the model diverged")
    return {
        "pr": _precision_recall(ranking, decision, threshold, unit),
        "calibration": _calibration(ranking, probability),
    }


def _precision_recall(
    ranking: Ranking, decision: Decision, threshold: float | None, unit: Tensor | np.ndarray | None
) -> Curve:
    # The curve's corners are at positives, and the marked rows are little else: even steps among them are even
    # steps of recall.
    n_marked, ends = len(ranking.scores), ranking.ascending[[-1, 0]]
    steps = torch.linspace(0, n_marked - 1, min(n_marked, MAX_POINTS - 3), dtype=torch.float64).round().long()
    cuts = [ranking.scores[steps.to(ends.device)], ends]
    if threshold is not None:
        cuts.append(ends.new_tensor([threshold]))
    thresholds = torch.unique(torch.cat(cuts)).flip(0)
    selected, true = (count.cpu().numpy() for count in ranking.selected(thresholds))
    if unit is None or decision.unit == "row":
        bounds = precision_bound(selected, true, decision.confidence)
    else:
        units, delta = UnitCuts.of(ranking, unit), 1.0 - decision.confidence
        bounds = lower_bound(*units.worth(np.searchsorted(units.n, selected), delta), delta)
    return {
        "recall": (true / ranking.truth.n_positive).tolist(),
        "precision": (true / selected).tolist(),
        "bound": bounds.tolist(),
        "threshold": thresholds.double().tolist(),
    }


def _calibration(ranking: Ranking, probability: Callable[[Tensor], Tensor]) -> Curve:
    ascending, n_rows = ranking.ascending, ranking.truth.n_rows
    mass = torch.cumsum(probability(ascending), 0, dtype=torch.float64)  # positives expected up to each row
    shares = torch.arange(1, N_BINS, dtype=torch.float64, device=mass.device) / N_BINS
    crossing = torch.searchsorted(mass, mass[-1] * shares).clamp(max=n_rows - 1)
    lower = torch.unique(torch.searchsorted(ascending, ascending[crossing]))  # the first row of each bin but one
    lower = torch.cat([lower.new_zeros(1), lower[lower > 0]])
    count = torch.diff(lower, append=lower.new_tensor([n_rows]))
    expected = torch.cat([mass[lower[1:] - 1], mass[-1:]])
    true = ranking.selected(ascending[lower])[1]
    return {
        "predicted": (torch.diff(expected, prepend=expected.new_zeros(1)) / count).tolist(),
        "observed": (-torch.diff(true, append=true.new_zeros(1)) / count).tolist(),
        "count": count.tolist(),
    }
