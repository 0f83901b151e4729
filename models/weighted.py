"""All metrics of one model on one sample under many weightings of its units at once.

Weights are whole numbers that count how often each unit was drawn, so every figure is exactly what
`models.metrics` gives for the sample with its rows repeated so often (but for calibration errors, whose bins stay
those of the sample). Nothing is sorted again and no row is touched one by one: what lies between two marked rows
(positives and rows with money) in the ranking is one row of a sparse matrix over units, whatever is linear in the
weights a row of a dense one, and a block of weightings costs one product with each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.metrics import CALIBRATION_BINS, PERCENTS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Matrix = Floats | sparse.csr_array  # both have `matrix @ weights`

AMOUNT_ERRORS = ("mae_raw", "mae", "rmse_raw", "rmse", "bias_raw", "bias")
_DENSE_FROM = 0.05  # share of entries from which a product with a dense matrix is faster than with a sparse one


@dataclass(frozen=True)
class Scores:
    """What one fitted model says of the rows of the sample.

    Shape: each [N]. `logits` float32 are raw and rank everything; `raw` float64 are the probabilities before
    calibration (the sigmoid of the raw logits), `calibrated` float64 those after it. `amounts[task]` are two
    predictions in the label's own unit, before and after smearing; there may be none.
    """

    logits: np.ndarray
    raw: np.ndarray
    calibrated: np.ndarray
    amounts: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """What is true of the rows, in the form the weightings need. Units are numbered 0..n_units - 1.

    Shape: `positive` [N] bool, `unit` [N] int32, `amount` [N] float64 or None where no row has money,
    `targets[task]` [N] float64, NaN where a row does not count. `sizes` [U] float64 rows of each unit. `paid` [P]
    int64 are the rows with money by falling amount, `level` [P] which distinct amount each has, `ends` [L] the last
    place of each.
    """

    positive: NDArray[np.bool_]
    unit: NDArray[np.int32]
    n_units: int
    sizes: Floats
    amount: Floats | None
    targets: Mapping[str, Floats]
    paid: Integers
    level: Integers
    ends: Integers

    @classmethod
    def of(
        cls, labels: np.ndarray, unit: np.ndarray, amount: np.ndarray | None, targets: Mapping[str, np.ndarray]
    ) -> Rows:
        units, codes = np.unique(unit, return_inverse=True)
        codes = codes.astype(np.int32)
        paid = level = ends = np.zeros(0, np.int64)
        if amount is not None and (amount > 0).any():
            amount = np.asarray(amount, np.float64)
            paid = np.flatnonzero(amount > 0)
            paid = paid[np.argsort(-amount[paid], kind="stable")]
            falls = np.diff(amount[paid]) < 0
            level = np.concatenate([[0], np.cumsum(falls)])
            ends = np.append(np.flatnonzero(falls), len(paid) - 1)
        else:
            amount = None
        return cls(
            positive=np.asarray(labels) == 1,
            unit=codes,
            n_units=len(units),
            sizes=np.bincount(codes, minlength=len(units)).astype(np.float64),
            amount=amount,
            targets={task: np.asarray(values, np.float64) for task, values in targets.items()},
            paid=paid,
            level=level,
            ends=ends,
        )

    def sums(self, values: Floats) -> Floats:
        """Sums of `values` [N] over the rows of each unit [U]."""
        return np.bincount(self.unit, weights=values, minlength=self.n_units)

    def needs(self) -> Floats:
        """What a weighting must not be without: each row of `needs() @ weights` is then above 0. Shape: [C, U].

        Positives, and where the sample has them negatives, money, and rows that count for each amount.
        """
        counts = [self.positive, ~self.positive]
        counts += [] if self.amount is None else [self.amount > 0]
        counts += [~np.isnan(values) for values in self.targets.values()]
        return np.stack([self.sums(count.astype(np.float64)) for count in counts if count.any()])


class Weighted:
    """One model's scores on the rows, ready to be weighted."""

    def __init__(self, rows: Rows, scores: Scores) -> None:
        self.rows = rows
        order = np.argsort(-scores.logits)
        ranked = scores.logits[order]
        group = np.concatenate([[0], np.cumsum(ranked[1:] != ranked[:-1])])  # tie group of each place
        self._rank(order, group)
        self._bins(order, group, scores)
        self.names, self.linear = _linear_sums(rows, scores)
        self.tasks = tuple(task for task in rows.targets if task in scores.amounts)

    def _rank(self, order: Integers, group: Integers) -> None:
        """Sparse sums over units [G, U]: rows since the marked tie group above; rows, positives, money in each."""
        rows, n = self.rows, len(order)
        marked = rows.positive if rows.amount is None else rows.positive | (rows.amount > 0)
        groups = np.unique(group[marked[order]])
        segment = np.searchsorted(groups, group)  # how many marked tie groups are above
        n_groups, unit = len(groups), rows.unit[order]
        inside = np.flatnonzero(segment < n_groups)
        inside = inside[groups[segment[inside]] == group[inside]]

        def matrix(places: Integers, values: Floats) -> sparse.csr_array:
            return _sparse(segment[places], unit[places], values, (n_groups, rows.n_units))

        ones, upto = np.ones(n), np.flatnonzero(segment < n_groups)
        positive = np.flatnonzero(rows.positive[order])
        self.segments = matrix(upto, ones[upto])
        self.positives = matrix(positive, ones[positive])
        self.ties = None if len(inside) == len(positive) else matrix(inside, ones[inside])
        self.money = None
        if rows.amount is not None:
            place = np.empty(n, np.int64)
            place[order] = np.arange(n)
            money = np.sort(place[rows.paid])
            self.money = matrix(money, rows.amount[order[money]])
            self.paid_group = segment[place[rows.paid]]

    def _bins(self, order: Integers, group: Integers, scores: Scores) -> None:
        """Residuals summed over the equal-mass bins of the sample; a tie group that an edge cuts is shared out.

        `residuals` [2 (bins + cut groups), U]: predicted minus observed, raw then calibrated; `shares`
        [bins, bins + cut groups]: what part of each belongs to which bin.
        """
        rows, n = self.rows, len(order)
        edges = np.array([n * b // CALIBRATION_BINS for b in range(CALIBRATION_BINS + 1)])
        starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
        ends = np.append(starts[1:], n)
        of = np.searchsorted(edges, np.arange(n), side="right") - 1
        cut = np.flatnonzero(of[starts] != of[ends - 1])
        kind = of[starts]
        kind[cut] = CALIBRATION_BINS + np.arange(len(cut))
        overlap = np.minimum(ends[cut], edges[1:, None]) - np.maximum(starts[cut], edges[:-1, None])
        self.shares = np.hstack([np.eye(CALIBRATION_BINS), overlap.clip(min=0) / (ends[cut] - starts[cut])])
        size, unit, observed = self.shares.shape[1], rows.unit[order], rows.positive[order]
        residuals = [
            _sparse(kind[group], unit, probability[order] - observed, (size, rows.n_units))
            for probability in (scores.raw, scores.calibrated)
        ]
        stacked = sparse.csr_array(sparse.vstack(residuals, format="csr"))
        dense = stacked.nnz > _DENSE_FROM * stacked.shape[0] * stacked.shape[1]
        self.residuals: Matrix = stacked.toarray() if dense else stacked

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        """Every metric under each of `weights` [U, B], each [B]; weightings must meet `Rows.needs`."""
        total = self.rows.sizes @ weights
        ends = np.cumsum(self.segments @ weights, axis=0)
        positives = self.positives @ weights
        ties = positives if self.ties is None else self.ties @ weights
        true = np.cumsum(positives, axis=0)
        n_positive = true[-1]
        found = {"pr_auc": np.einsum("ij,ij->j", positives, true / np.maximum(ends, 1.0)) / n_positive}
        if not self.rows.positive.all():
            # pairs lost to negatives above and, by half, to tied ones
            lost = 2.0 * (ends - true) + positives - ties
            area = np.einsum("ij,ij->j", positives, lost) / (2.0 * n_positive * (total - n_positive))
            found["roc_auc"] = 1.0 - area
        found |= self._captured(weights, total, ends, ties, positives, true)
        sums = dict(zip(self.names, self.linear @ weights, strict=True))
        parts = np.split(self.residuals @ weights, 2)
        for name, part in zip(("raw", "calibrated"), parts, strict=True):
            found[f"ece_{name}"] = np.abs(self.shares @ part).sum(axis=0) / total
            found[f"brier_{name}"] = sums[f"brier_{name}"] / total
            found[f"log_loss_{name}"] = sums[f"log_loss_{name}"] / total
        for task in self.tasks:
            for error in AMOUNT_ERRORS:
                mean = sums[f"{task}_{error}"] / sums[f"{task}_count"]
                found[f"{task}_{error}"] = np.sqrt(mean) if error.startswith("rmse") else mean
        return found

    def _captured(
        self, weights: Floats, total: Floats, ends: Floats, ties: Floats, positives: Floats, true: Floats
    ) -> dict[str, Floats]:
        """Recall, revenue and capture among the k highest logits; a tie group that is cut counts in part."""
        columns = np.arange(weights.shape[1])
        if self.money is not None:
            sums = self.money @ weights
            money = np.cumsum(sums, axis=0)
            taken = weights[self.rows.unit[self.rows.paid]]  # [P, B]
            counted = np.cumsum(taken, axis=0)[self.rows.ends]
            before = np.vstack([np.zeros_like(total), counted[:-1]])
        found = {}
        for percent in PERCENTS:
            depth = -(-total.astype(np.int64) * percent // 100)
            inside = _count_upto(ends, depth)
            cut = np.minimum(inside, len(ends) - 1)
            tied = ties[cut, columns]
            share = ((depth - ends[cut, columns] + tied) / np.maximum(tied, 1.0)).clip(0.0, 1.0)
            without = true[cut, columns] - positives[cut, columns]
            recalled = without + share * positives[cut, columns]
            found[f"recall_at_{percent}pct"] = recalled / true[-1]
            if self.money is None:
                continue
            revenue = money[cut, columns] - (1.0 - share) * sums[cut, columns]
            found[f"revenue_at_{percent}pct"] = revenue / money[-1]
            places = np.minimum(depth, counted[-1])
            member = ((places - before) / np.maximum(counted - before, 1.0)).clip(0.0, 1.0)  # of the true top
            group = self.paid_group[:, None]
            predicted = (group < cut) + (group == cut) * share
            captured = np.einsum("ij,ij,ij->j", taken, member[self.rows.level], predicted)
            found[f"capture_at_{percent}pct"] = captured / places
        return found


def _sparse(row: Integers, column: np.ndarray, values: Floats, shape: tuple[int, int]) -> sparse.csr_array:
    return sparse.coo_array((values, (row.astype(np.int32), column)), shape=shape).tocsr()


def _count_upto(ends: Floats, depth: Integers) -> Integers:
    """How many of each column's rising values `ends` [G, B] are at most `depth` [B]: one bisection for all."""
    low, high = np.zeros(ends.shape[1], np.int64), np.full(ends.shape[1], len(ends))
    columns = np.arange(ends.shape[1])
    for _ in range(len(ends).bit_length()):
        middle = (low + high) // 2
        below = (ends[np.minimum(middle, len(ends) - 1), columns] <= depth) & (middle < high)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low


def _linear_sums(rows: Rows, scores: Scores) -> tuple[list[str], Floats]:
    """What is a plain sum over rows, by unit: names and [M, U]."""
    observed = rows.positive.astype(np.float64)
    tiny = np.finfo(np.float64).eps
    probability = np.clip(scores.calibrated, tiny, 1.0 - tiny)
    signed = np.where(rows.positive, -1.0, 1.0) * scores.logits
    found = {
        "brier_raw": rows.sums((scores.raw - observed) ** 2),
        "brier_calibrated": rows.sums((scores.calibrated - observed) ** 2),
        "log_loss_raw": rows.sums(np.logaddexp(0.0, signed)),  # of the logits: sure and wrong stays finite
        "log_loss_calibrated": rows.sums(-np.log(np.where(rows.positive, probability, 1.0 - probability))),
    }
    for task, actual in rows.targets.items():
        if task not in scores.amounts:
            continue
        counts = ~np.isnan(actual)
        found[f"{task}_count"] = rows.sums(counts.astype(np.float64))
        for suffix, predicted in zip(("_raw", ""), scores.amounts[task], strict=True):
            error = np.where(counts, predicted - actual, 0.0)
            found[f"{task}_mae{suffix}"] = rows.sums(np.abs(error))
            found[f"{task}_rmse{suffix}"] = rows.sums(error**2)
            found[f"{task}_bias{suffix}"] = rows.sums(error)
    return list(found), np.stack(list(found.values()))
