"""Exact ranking, calibration and money metrics of one binary task, on the device the logits live on.

One sort of the float32 logits, values only, serves everything. The rows that matter one by one are the
positives and the rows with money, known before training; where the sorted logits put each of them, and
where its tie group starts and ends, follows from binary search. So no permutation of all rows is ever
built, and the cost of all metrics stays close to that of the sort.

Ranks are taken on logits, never on probabilities: float32 probabilities saturate above a logit of about
17 and would tie the very rows that matter most. Rows with equal logits share one rank: every figure is
the expected value over a random order of tied rows, so it never depends on the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.trainer import InputError

PERCENTS = (1, 5, 10)  # the k of recall, capture and revenue at k, in per cent of the rows
CALIBRATION_BINS = 20

_LABEL, _MONEY, _TOP = 0, 1, 2  # rows of Truth.weights; _TOP + i belongs to PERCENTS[i]


@dataclass(frozen=True)
class Truth:
    """What is true of the N rows of one role for one task: built once, used by every epoch's ranking.

    Shape: `rows` [U] int64, the rows that are positive or carry money; `weights` [1 or 5, U] float64 with
    their label, money and membership in the true top k of each of `PERCENTS`; `signs` [N] float32, -1 for
    positives and +1 for negatives; `edges` [bins + 1] int64, the ranks that cut N rows into bins of equal mass;
    `depths` [3] int64, k = ceil(per cent of N).
    """

    name: str
    n_rows: int
    n_positive: int
    rows: Tensor
    weights: Tensor
    signs: Tensor
    edges: Tensor
    depths: Tensor
    top_sizes: tuple[int, ...]  # size of the true top k for each of PERCENTS; empty without money

    @classmethod
    def of(
        cls, labels: Tensor, amounts: Tensor | None = None, *, name: str, n_bins: int = CALIBRATION_BINS
    ) -> Truth:
        """Take in the labels of a role.

        Args:
            labels: [N] of any dtype, each 0 or 1; the device it lives on is the device of all metrics.
            amounts: [N] money behind each row (raw, >= 0), or None where the task has none.
            name: where the labels come from, for messages, e.g. `valid/has_gift`.
            n_bins: number of equal-mass bins of the calibration error.

        Raises:
            InputError: a label that is not 0 or 1, an amount that is negative or not finite, no positives.
        """
        n_rows, labels = labels.shape[0], labels.detach()
        positive = labels == 1
        if not bool((positive | (labels == 0)).all()):
            odd = labels[~(positive | (labels == 0))][0].item()
            raise InputError(f"{name}: expected labels 0 or 1, got {odd}; leave out rows without a label")
        n_positive = int(positive.sum())
        if n_positive == 0:
            raise InputError(f"{name}: no positives among {n_rows} rows; expected at least one, change the split")
        marked, paid = positive, None
        if amounts is not None:
            paid = amounts.detach().to(torch.float64)
            if not bool((torch.isfinite(paid) & (paid >= 0)).all()):
                odd = paid[~(torch.isfinite(paid) & (paid >= 0))][0].item()
                raise InputError(f"{name}: expected amounts >= 0, got {odd}; 0 stands for no money")
            marked = positive | (paid > 0)
        rows = marked.nonzero().flatten()
        depths = [-(-n_rows * percent // 100) for percent in PERCENTS]  # integers: 0.01 * 700 is above 7
        weights, top_sizes = [positive[rows].to(torch.float64)], []
        if paid is not None and bool((paid > 0).any()):
            money = paid[rows]
            tops = [_top(money, depth) for depth in depths]
            weights += [money, *(weight for weight, _ in tops)]
            top_sizes = [size for _, size in tops]
        bins = [n_rows * b // n_bins for b in range(n_bins + 1)]
        return cls(
            name=name,
            n_rows=n_rows,
            n_positive=n_positive,
            rows=rows,
            weights=torch.stack(weights),
            signs=1.0 - 2.0 * positive.to(torch.float32),
            edges=torch.tensor(bins, device=labels.device),
            depths=torch.tensor(depths, device=labels.device),
            top_sizes=tuple(top_sizes),
        )


def _top(money: Tensor, depth: int) -> tuple[Tensor, int]:
    """Probability of each row [U] to be among the `depth` highest amounts above 0, ties drawn at random, and
    how many such places there are."""
    size = min(depth, int((money > 0).sum()))
    cutoff = torch.topk(money, size).values[-1]
    above, tied = money > cutoff, money == cutoff
    return above + tied * ((size - above.sum()) / tied.sum()), size


@dataclass(frozen=True)
class Ranking:
    """The logits of one epoch, ranked. Built by `Ranking.of`; holds no reference to the model's graph.

    Shape: `logits` [N] as given, `ascending` [N] sorted, both float32. The other fields describe the U
    marked rows of `truth` in order of descending logit: `scores` [U] float32, `start` and `end` [U] int64 (how
    many of the N rows score higher, and how many at least as high), `first` and `last` [U] int64 (the same
    among the marked rows), `cumulative` [W, U + 1] float64 (weights of the marked rows before each).
    """

    truth: Truth
    logits: Tensor
    ascending: Tensor
    scores: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    cumulative: Tensor

    @classmethod
    def of(cls, logits: Tensor, truth: Truth) -> Ranking:
        """Rank `logits` [N] (on the device of `truth`). Nothing is read back by the host."""
        if logits.shape != (truth.n_rows,):
            raise ValueError(f"{truth.name}: expected logits [{truth.n_rows}], got {list(logits.shape)}")
        logits = logits.detach().to(torch.float32)
        ascending = _sorted(logits)
        scores, order = torch.sort(logits[truth.rows], descending=True, stable=True)
        marked = scores.flip(0)
        cumulative = functional.pad(torch.cumsum(truth.weights[:, order], dim=1), (1, 0))
        return cls(
            truth=truth,
            logits=logits,
            ascending=ascending,
            scores=scores,
            start=truth.n_rows - torch.searchsorted(ascending, scores, right=True),
            end=truth.n_rows - torch.searchsorted(ascending, scores),
            first=len(marked) - torch.searchsorted(marked, scores, right=True),
            last=len(marked) - torch.searchsorted(marked, scores),
            cumulative=cumulative,
        )

    @property
    def true_positives(self) -> Tensor:
        """Positives among the `end` rows down to each marked row's tie group. Shape [U] float64, exact."""
        return self.cumulative[_LABEL][self.last]

    def selected(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows score at least each of `thresholds` [M] float32, and how many positives among them.

        Shape: both [M], int64 and float64.
        """
        n_marked = len(self.scores)
        marked = n_marked - torch.searchsorted(self.scores.flip(0), thresholds)
        return self.truth.n_rows - torch.searchsorted(self.ascending, thresholds), self.cumulative[_LABEL][marked]

    def average_precision(self) -> Tensor:
        """Step-wise average precision, sum of (R_n - R_(n-1)) P_n over distinct logits.

        Equals scikit-learn's `average_precision_score`; a constant score gets the base rate.
        """
        labels = torch.diff(self.cumulative[_LABEL])
        return (labels * self.true_positives / self.end).sum() / self.truth.n_positive

    def roc_auc(self) -> Tensor:
        """Area under the ROC curve, ties counted half. Needs a negative row."""
        labels = torch.diff(self.cumulative[_LABEL])
        above = self.start - self.cumulative[_LABEL][self.first]  # negatives ranked above each marked row
        upto = self.end - self.true_positives
        n_negative = self.truth.n_rows - self.truth.n_positive
        return 1.0 - (labels * (above + upto)).sum() / (2.0 * self.truth.n_positive * n_negative)

    def roc_auc_se(self, unit: Tensor | None = None) -> Tensor:
        """Standard error of `roc_auc`, 0-d: by rows, or by the units that they hang together in.

        Every row moves the area by how it ranks among the rows of the other label; what the rows of one unit move
        together is one observation. Needs a negative row and two units.

        Shape: unit [N] int64, any numbers.

        Source: Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"; with a unit a row it is that
        of DeLong, DeLong and Clarke-Pearson 1988, but for the factors m / (m - 1).
        """
        positive = self.truth.signs < 0
        area, moved = self.roc_auc(), torch.zeros(self.truth.n_rows, dtype=torch.float64, device=self.logits.device)
        for own, sign in ((positive, 1.0), (~positive, -1.0)):
            scores, others = self.logits[own], _sorted(self.logits[~own])
            below = torch.searchsorted(others, scores) + torch.searchsorted(others, scores, right=True)
            share = below.double() / (2 * len(others))
            moved[own] = sign * (share - (area if sign > 0 else 1.0 - area)) / len(scores)
        return _error(moved, unit)

    def average_precision_se(self, unit: Tensor | None = None) -> Tensor:
        """Standard error of `average_precision`, 0-d: by rows, or by the units that they hang together in.

        The infinitesimal jackknife: a row moves the average by its derivative with respect to the row's weight, and
        what the rows of one unit move together is one observation. Needs two units. Shape: unit [N], any numbers.
        """
        labels, precision = torch.diff(self.cumulative[_LABEL]), self.true_positives / self.end
        whole = (labels * precision).sum() / self.truth.n_positive
        # a row counts among the rows at and above every positive that scores no higher
        upward = torch.stack([labels / self.end, labels * precision / self.end]).flip(1)
        reached = functional.pad(torch.cumsum(upward, dim=1), (1, 0))
        marked = torch.searchsorted(self.scores.flip(0), self.logits, right=True)
        as_positive, as_any = reached[:, marked]
        first = len(self.scores) - marked  # the highest marked row that scores no higher; a positive finds its own
        own = functional.pad(precision, (0, 1))[first] - whole
        positive = (self.truth.signs < 0).double()
        return _error((positive * (own + as_positive) - as_any) / self.truth.n_positive, unit)

    def log_loss(self) -> Tensor:
        """Mean negative log likelihood of the logits; terms in float32, summed in float64."""
        losses = functional.softplus(self.truth.signs * self.logits)
        return losses.sum(dtype=torch.float64) / self.truth.n_rows

    def expected(self, depths: Tensor) -> Tensor:
        """Expected weight among the `depths` [M] int64 highest logits. Shape [W, M] float64.

        A tie group that the cut runs through counts with the share of it that is inside.
        """
        inside = torch.searchsorted(self.end, depths, right=True)  # marked rows with their whole tie group inside
        cut = inside.clamp(max=len(self.end) - 1)  # a row of the group that may be cut
        share = ((depths - self.start[cut]) / (self.end[cut] - self.start[cut])).clamp(0.0, 1.0)
        whole = self.cumulative[:, inside]
        return whole + share * (self.cumulative[:, self.last[cut]] - whole)

    def calibration_error(self, probability: Callable[[Tensor], Tensor] = torch.sigmoid) -> Tensor:
        """Expected calibration error over bins of equal mass.

        The rows are cut by rank at floor(b N / bins); tied rows carry their group's mean label. At a low
        base rate bins of equal width would put nearly all rows into one.

        Args:
            probability: increasing map from logits to probabilities, applied to the sorted logits [N].
        """
        n_rows, edges = self.truth.n_rows, self.truth.edges
        total = functional.pad(torch.cumsum(probability(self.ascending), 0, dtype=torch.float64), (1, 0))
        predicted = total[n_rows] - total[n_rows - edges]
        observed = self.expected(edges)[_LABEL]
        return torch.diff(observed - predicted).abs().sum() / n_rows

    def metrics(self, calibrated: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """All metrics by name, as 0-d float64 tensors on the device; `read` fetches them at once.

        Args:
            calibrated: increasing map from logits to calibrated probabilities; adds `ece_calibrated`.

        Returns:
            `pr_auc`, `pr_auc_se` (sqrt(AP (1 - AP) / positives), as if rows were independent), `roc_auc`
            (left out without negatives), `log_loss`, `ece`, `recall_at_{1,5,10}pct`, and, where some row
            has money, `capture_at_{1,5,10}pct` (the share of the true top k by amount that is in the
            predicted top k, k = ceil(per cent of N), the true top holding only amounts above 0) and
            `revenue_at_{1,5,10}pct` (share of all money in the predicted top k).
        """
        truth, precision = self.truth, self.average_precision()
        found = {
            "pr_auc": precision,
            "pr_auc_se": (precision * (1.0 - precision)).clamp(min=0.0).div(truth.n_positive).sqrt(),
            "log_loss": self.log_loss(),
            "ece": self.calibration_error(),
        }
        if truth.n_positive < truth.n_rows:
            found["roc_auc"] = self.roc_auc()
        if calibrated is not None:
            found["ece_calibrated"] = self.calibration_error(calibrated)
        inside, total = self.expected(truth.depths), self.cumulative[:, -1]
        for i, percent in enumerate(PERCENTS):
            found[f"recall_at_{percent}pct"] = inside[_LABEL, i] / truth.n_positive
            if truth.top_sizes:
                found[f"capture_at_{percent}pct"] = inside[_TOP + i, i] / truth.top_sizes[i]
                found[f"revenue_at_{percent}pct"] = inside[_MONEY, i] / total[_MONEY]
        return found


def _error(moved: Tensor, unit: Tensor | None) -> Tensor:
    """Standard error of what rows [N] move, or the units that they are of."""
    if unit is not None:
        codes = torch.unique(unit, return_inverse=True)[1]
        moved = torch.zeros(int(codes.max()) + 1, dtype=moved.dtype, device=moved.device).index_add_(
            0, codes, moved
        )
    return (moved.square().sum() * len(moved) / (len(moved) - 1)).sqrt()


def _sorted(values: Tensor) -> Tensor:
    """Values ascending, NaN last. On the CPU numpy's vectorised sort is several times faster than torch's,
    which always computes the permutation as well."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return torch.sort(values).values


def read(metrics: Mapping[str, Tensor], name: str = "metrics") -> dict[str, float]:
    """Fetch 0-d tensors with one transfer from the device.

    Raises:
        FloatingPointError: a value is not finite, as when a diverged model gives NaN logits.
    """
    if not metrics:
        return {}
    stacked = torch.stack([value.detach().to(torch.float64) for value in metrics.values()])
    values = dict(zip(metrics, stacked.tolist(), strict=True))
    for key, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"{name}/{key}: expected a finite number, got {value}; the model diverged")
    return values
