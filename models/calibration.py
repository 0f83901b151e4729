"""From the output of a model to probabilities and amounts that can be taken at their word.

Focal loss is classification-calibrated but not proper: the score that minimises its risk is a known,
strictly increasing function of the true probability. `FocalInverse` undoes it in closed form and leaves every
ranking as it is. What is still off after that is measured: a `Calibrator` is fitted on validation rows, and its
kind is chosen on rows that it was not fitted on. A regression trained on log1p of a target predicts less than
the mean of the target; `smearing` is what it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit
from torch import Tensor

from models.precision import Evidence, Tally
from models.trainer import InputError

Kind = Literal["identity", "platt", "isotonic"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # from the simplest to the most flexible
RELIABILITY_BINS = 20

_EDGE = 1e-12  # no probability is closer to 0 or 1 than this: a log loss stays finite
_NEWTON_STEPS = 100
_CONFIDENCE = 0.95  # of the interval of a reliability bin


@dataclass(frozen=True)
class FocalInverse:
    """Maps logits of a binary focal loss to calibrated probabilities; callable, for `Ranking.metrics`.

    The loss is -alpha (1 - p)^gamma ln p for positives and -(1 - alpha) p^gamma ln(1 - p) for negatives, p the
    sigmoid of the logit. gamma = 0 leaves the shift of a prior weighted by alpha; alpha = 0.5 weighs both
    alike.

    Raises:
        InputError: alpha outside (0, 1), gamma negative or not finite.

    Source: stationarity of the pointwise risk, odds = -((1 - alpha) / alpha) d0 / d1 with d1 and d0 the
    derivatives of the two terms in p; Charoenphakdee et al., CVPR 2021, section 4 has it without alpha.

    Example:
        >>> round(FocalInverse(alpha=0.25, gamma=2.0)(torch.tensor([-1.9627])).item(), 4)
        0.0148
    """

    alpha: float
    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise InputError(f"focal alpha: expected a number inside (0, 1), got {self.alpha}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0.0):
            raise InputError(f"focal gamma: expected a finite number >= 0, got {self.gamma}")

    def logits(self, scores: Tensor) -> Tensor:
        """Calibrated logits (float64) of raw logits, any shape. Strictly increasing in exact arithmetic, at
        slope between 1 and 1 + gamma, and finite for every finite float32 score.

        With s the raw logit the odds above come to
            ln odds = ln((1 - alpha) / alpha) + (1 + gamma) s + ln(1 + gamma u(s)) - ln(1 + gamma u(-s)),
            u(s) = exp(-s) ln(1 + exp(s)),
        which is odd in s but for the constant; with x = exp(-|s|) no term overflows.
        """
        scores = scores.detach().to(torch.float64)
        size = scores.abs()
        x = size.neg().exp_().clamp_(min=1e-300)  # below, u(-|s|) is 1 to the last bit; avoids 0 / 0
        log1p = torch.log1p(x)
        lower = (log1p / x).mul_(self.gamma).add_(1.0)
        ratio = size.add_(log1p).mul_(x).mul_(self.gamma).add_(1.0).div_(lower)  # in place: memory is the cost
        shift = math.log1p(-self.alpha) - math.log(self.alpha)
        return (scores * (1.0 + self.gamma)).addcmul_(torch.sign(scores), ratio.log_()).add_(shift)

    def __call__(self, scores: Tensor) -> Tensor:
        """Calibrated probabilities (float64) of raw logits, any shape."""
        return self.logits(scores).sigmoid_()


@dataclass(frozen=True)
class Calibrator:
    """Maps logits to calibrated probabilities; fitted by `fit_calibrator`, kept as JSON.

    `identity`: the sigmoid. `platt`: the sigmoid of slope * logit + intercept, slope >= 0. `isotonic`: linear
    between the knots (`logits`, ascending, to `probabilities`), constant beyond them. Every kind is non-decreasing
    and stays inside (0, 1). It may tie rows whose logits differ: rankings and thresholds use the logits.

    Raises:
        InputError: an unknown kind; parameters that are not finite or not increasing.
    """

    kind: Kind
    slope: float = 1.0
    intercept: float = 0.0
    logits: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"calibrator: expected a kind ({', '.join(KINDS)}), got {self.kind!r}")
        if not (math.isfinite(self.slope) and self.slope >= 0.0 and math.isfinite(self.intercept)):
            raise InputError(f"calibrator: expected a finite slope >= 0, got {self.slope}, {self.intercept}")
        if self.kind != "isotonic":
            return
        knots, values = np.array(self.logits), np.array(self.probabilities)
        if not (len(knots) == len(values) > 0 and np.isfinite(knots).all() and (np.diff(knots) > 0).all()):
            raise InputError("calibrator: expected knots at finite logits that increase, one probability each")
        if not ((values > 0.0).all() and (values < 1.0).all() and (np.diff(values) >= 0).all()):
            raise InputError("calibrator: expected probabilities inside (0, 1) that never fall")

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of logits. Shape: [N] -> [N] float64.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        logits = np.asarray(logits, np.float64)
        if not np.isfinite(logits).all():
            raise FloatingPointError("calibrator: expected finite logits; the model diverged")
        if self.kind == "isotonic":
            return self._between_knots(logits)
        score = logits if self.kind == "identity" else self.slope * logits + self.intercept
        return np.clip(expit(score), _EDGE, 1.0 - _EDGE)

    def _between_knots(self, logits: np.ndarray) -> np.ndarray:
        # Written out because np.interp may pass the upper knot by the last bit, and then fall at it.
        knots, values = np.array(self.logits), np.array(self.probabilities)
        above = np.searchsorted(knots, logits, side="right")
        low, high = np.maximum(above - 1, 0), np.minimum(above, len(knots) - 1)
        run = knots[high] - knots[low]
        share = np.divide(logits - knots[low], run, out=np.zeros_like(run), where=run > 0)
        return np.minimum(values[low] + share * (values[high] - values[low]), values[high])

    def as_json(self) -> dict[str, Any]:
        """The kind and its own parameters; `from_json` gives the same calibrator to the bit."""
        if self.kind == "identity":
            return {"kind": self.kind}
        if self.kind == "platt":
            return {"kind": self.kind, "slope": self.slope, "intercept": self.intercept}
        return {"kind": self.kind, "logits": list(self.logits), "probabilities": list(self.probabilities)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Calibrator:
        """What `as_json` wrote. Raises InputError."""
        try:
            return cls(
                kind=content["kind"],
                slope=float(content.get("slope", 1.0)),
                intercept=float(content.get("intercept", 0.0)),
                logits=tuple(map(float, content.get("logits", ()))),
                probabilities=tuple(map(float, content.get("probabilities", ()))),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"calibrator: expected what as_json writes, got {error!r}") from error


def fit_calibrator(
    logits: np.ndarray, labels: np.ndarray, unit: np.ndarray, n_folds: int = 5, seed: int = 0
) -> tuple[Calibrator, dict[str, Any]]:
    """Choose a kind of calibrator by its log loss on rows it was not fitted on, then fit it on all rows.

    The rows are dealt into folds by unit, so that a unit is never on both sides; units with positives are dealt
    first, so that every fold has its share of them. Of equal losses the simplest kind wins. With a single unit no
    kind can be judged on another one: the logits are then taken as they are (`identity`, `n_folds` 0).

    Args:
        logits: after the closed-form inverse of the loss where there is one, else raw.
        labels: 0 or 1.
        unit: what is exchangeable.
        seed: decides the folds.

    Shape: each [N].

    Returns:
        The calibrator, and `chosen` (its kind), `log_loss` (per kind, cross-fitted; of identity alone with a
        single unit), `n_folds`.

    Raises:
        InputError: lengths that differ, a label that is not 0 or 1, no positives or no negatives, fewer than two
            folds.
        FloatingPointError: a logit is not finite.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    _refuse_unusable(logits, labels, np.asarray(unit), n_folds)
    fold = _folds(labels, np.asarray(unit), n_folds, seed)
    n_dealt = int(fold.max()) + 1
    kinds: dict[Kind, Callable[[np.ndarray, np.ndarray], Calibrator]] = {
        "identity": lambda *_: Calibrator("identity")
    }
    if n_dealt > 1:
        kinds |= {"platt": _fit_platt, "isotonic": _fit_isotonic}
    losses: dict[str, float] = {}
    for kind, fit in kinds.items():
        probabilities = np.empty_like(logits)
        for held_out in range(n_dealt):
            inside = fold == held_out
            probabilities[inside] = fit(logits[~inside], labels[~inside])(logits[inside])
        losses[kind] = _log_loss(probabilities, labels)
    chosen = min(kinds, key=lambda kind: losses[kind])  # the first of equals
    facts = {"chosen": chosen, "log_loss": losses, "n_folds": n_dealt if n_dealt > 1 else 0}
    return kinds[chosen](logits, labels), facts


def _refuse_unusable(logits: np.ndarray, labels: np.ndarray, unit: np.ndarray, n_folds: int) -> None:
    if not (logits.shape == labels.shape == unit.shape and logits.ndim == 1):
        shapes = f"{logits.shape}, {labels.shape}, {unit.shape}"
        raise InputError(f"calibration: expected logits, labels and units of one length, got {shapes}")
    if not np.isfinite(logits).all():
        raise FloatingPointError("calibration: expected finite logits; the model diverged")
    if not ((labels == 0) | (labels == 1)).all():
        raise InputError("calibration: expected labels 0 or 1; leave out rows without a label")
    if not 0 < labels.sum() < len(labels):
        counts = f"{int(labels.sum())} positives among {len(labels)} rows"
        raise InputError(f"calibration: expected positives and negatives, got {counts}; change the split")
    if n_folds < 2:
        raise InputError(f"calibration: expected at least 2 folds, got {n_folds}")


def _folds(labels: np.ndarray, unit: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """[N] the fold of each row: units in order of falling positives, equals at random, dealt to and fro."""
    _, code = np.unique(unit, return_inverse=True)
    positives = np.bincount(code, weights=labels)
    shuffled = np.random.default_rng(seed).permutation(len(positives))
    order = shuffled[np.argsort(-positives[shuffled], kind="stable")]
    turn, place = np.divmod(np.arange(len(order)), n_folds)
    fold = np.empty(len(order), np.int64)
    fold[order] = np.where(turn % 2 == 0, place, n_folds - 1 - place)
    # With fewer units than folds the first turn has dealt them all, one each.
    return fold[code]


def _log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(np.where(labels == 1, np.log(probabilities), np.log1p(-probabilities))))


def _softened(labels: np.ndarray) -> tuple[float, float]:
    """What stands for the labels 0 and 1: the posterior means under a uniform prior. Source: Platt 1999."""
    n_positive = float(labels.sum())
    return 1.0 / (len(labels) - n_positive + 2.0), (n_positive + 1.0) / (n_positive + 2.0)


def _fit_platt(logits: np.ndarray, labels: np.ndarray) -> Calibrator:
    """Logistic regression on the logit with softened labels, slope >= 0, by Newton's method.

    Source: Platt 1999; Lin, Lin and Weng 2007 (safeguarded Newton).
    """
    low, high = _softened(labels)
    target = np.where(labels == 1, high, low)
    start = float(logit(target.mean()))
    centre = float(logits.mean())
    spread = float(logits.std()) if np.ptp(logits) > 0 else 0.0
    if spread == 0.0 or ((expit(start) - target) * (logits - centre)).sum() >= 0.0:
        return Calibrator("platt", 0.0, start)  # the risk is convex: at slope 0 it rises, so it is least there
    z = (logits - centre) / spread

    def risk(at: np.ndarray) -> float:
        score = at[0] * z + at[1]
        return float(np.mean(np.logaddexp(0.0, score) - target * score))

    at, value = np.array([0.0, start]), math.inf
    for _ in range(_NEWTON_STEPS):
        p = expit(at[0] * z + at[1])
        gradient = np.array([np.mean((p - target) * z), np.mean(p - target)])
        w = p * (1.0 - p)
        mixed = np.mean(w * z)
        hessian = np.array([[np.mean(w * z * z), mixed], [mixed, np.mean(w)]]) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-12:  # so near, the full step squares the error, and the risk's last bits judge nothing
            at = at - step
            break
        value, rate = risk(at), 1.0
        while rate > 1e-9 and risk(at - rate * step) > value - 1e-4 * rate * decrement:
            rate /= 2.0
        at = at - rate * step
    slope = max(float(at[0]) / spread, 0.0)
    return Calibrator("platt", slope, float(at[1]) - slope * centre)


def _fit_isotonic(logits: np.ndarray, labels: np.ndarray) -> Calibrator:
    """Isotonic regression, rows of one logit as one point, cut off at the softened labels."""
    points, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=labels) / counts
    fitted = np.clip(isotonic_regression(means, weights=counts).x, *_softened(labels))
    # Of a level stretch its two ends say all.
    same = fitted[1:] == fitted[:-1]
    kept = ~(np.append(False, same) & np.append(same, False))
    return Calibrator("isotonic", logits=tuple(points[kept].tolist()), probabilities=tuple(fitted[kept].tolist()))


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, unit: np.ndarray, n_bins: int = RELIABILITY_BINS
) -> list[dict[str, float]]:
    """What was predicted and what happened, in bins of equally many rows, as nearly as whole tie groups allow.

    Shape: each [N]; `unit` is what rows hang together in, any numbers.

    Returns:
        At most `n_bins` bins from low to high: mean `predicted` probability, `observed` share of positives, `low`
        and `high` (two-sided 95 % interval of `observed` by units, `models.precision`), `count` of rows.
    """
    order = np.argsort(probabilities, kind="stable")
    ascending, hit = np.asarray(probabilities, np.float64)[order], np.asarray(labels, np.float64)[order]
    unit = np.asarray(unit)[order]
    n_rows = len(ascending)
    ranks = np.arange(1, n_bins) * n_rows // n_bins
    inner = np.searchsorted(ascending, ascending[ranks], side="left") if n_rows else ranks
    edges = np.unique(np.concatenate(([0], inner, [n_rows])))
    bins = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        found = Evidence.of(Tally.of(hit[start:end], unit[start:end]), (1.0 - _CONFIDENCE) / 2.0)
        bins.append(
            {
                "predicted": float(ascending[start:end].mean()),
                "observed": found.share,
                "low": found.bound,
                "high": found.upper_bound,
                "count": found.n,
            }
        )
    return bins


def smearing(predicted: np.ndarray, actual: np.ndarray, transform: str) -> float:
    """The factor by which a regression on a transformed target falls short of the target's mean.

    With e = log1p(actual) - log1p(predicted) the mean of exp(e), whatever the distribution of e, as long as it is
    the same for all rows; 1 without a transform, whose predictions are means already.

    Args:
        predicted: in the target's own unit. Under log1p no target is negative, so a negative prediction counts
            as 0.
        actual: in the same unit; NaN where the row does not count.
        transform: `log1p` or `none`.

    Shape: each [N].

    Raises:
        InputError: another transform; no row counts.

    Source: Duan 1983.
    """
    _refuse_transform(transform)
    known = ~np.isnan(actual)
    if not known.any():
        raise InputError("smearing: expected rows with a known target, got none")
    if transform == "none":
        return 1.0
    base = 1.0 + np.maximum(np.asarray(predicted, np.float64)[known], 0.0)
    return float(np.mean((1.0 + np.asarray(actual, np.float64)[known]) / base))


def smeared(predicted: np.ndarray, factor: float, transform: str) -> np.ndarray:
    """Predictions corrected by a factor of `smearing`, in the target's own unit. Shape: [N] -> [N] float64."""
    _refuse_transform(transform)
    values = np.asarray(predicted, np.float64)
    if transform == "none":
        return values.copy()
    return np.maximum((1.0 + np.maximum(values, 0.0)) * factor - 1.0, 0.0)


def _refuse_transform(transform: str) -> None:
    if transform not in ("log1p", "none"):
        raise InputError(f"smearing: expected the transform log1p or none, got {transform!r}")
