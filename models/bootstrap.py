"""Paired bootstrap of all metrics over units and seeds: how far a figure would move with other rows and seeds.

Two things are drawn at random when an arm is evaluated, and an interval has to hold both:

- **Rows.** A replicate draws as many units as there are, with replacement, the same for all models, so that
  what models have in common cancels from their difference. Rows of one unit stay together. A replicate in which
  a metric would be undefined (no positives, no negatives, no money, no row that counts for an amount) is drawn
  again: all figures are conditional on a sample that can be judged at all, and no interval ever holds a NaN.
  Drawing n of n units has (n - 1) / n of the true variance, and few units with positives judge their own variance
  badly: deviations are widened by sqrt(n / (n - 1)) and mixed to Student's t with the degrees of freedom of the
  units that hold the positives, (sum p)^2 / sum p^2 - 1 with p the positives of each. With hundreds of such
  units nothing changes.
- **Seeds.** Drawing S of S seeds would be too sure by (S - 1) / S in variance, and its tails stop at the seeds
  seen: with 2 or 3 seeds that matter, 95 % intervals of a difference were seen to hold in 88 to 90 % of samples.
  Every replicate is instead the mean over all seeds, moved by Student's t times the standard error over seeds,
  with S - 1 degrees of freedom for one model and those of Welch for two. Two seeds give very wide intervals:
  that is what two seeds tell. **One seed has no spread**: its interval is that of this one fit.

Each seed's own share of the rows' noise shows twice, between replicates and between seeds (as in every bootstrap
of crossed factors: Owen 2007, "The pigeonhole bootstrap"); it is taken out of the former by shrinking the
deviations of the replicates.

Replicates are centred on the value. Some figures rise under resampling by themselves, above all calibration
errors, as repeated rows add noise to every bin; an interval reaches down by that bias as well, and always holds
the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from models.metrics import Truth
from models.trainer import InputError
from models.weighted import Floats, Rows, Scores, Weighted

Reading = Literal["relative", "points"]

_BLOCK_ENTRIES, _LEAST_BLOCK, _MOST_BLOCK = 2**20, 16, 128  # weights that one product takes: they stay in the cache
_CHUNK_BYTES = 2**29  # weights, one byte each, that are drawn before the fits are gone through
_MAX_DRAWS = 10_000  # of one replicate

# metrics between 0 and 1
_SHARES = re.compile(r"(pr|roc)_auc|(recall|revenue|capture)_at_\d+pct|(ece|brier)_(raw|calibrated)")
_SIGNED = ("_bias", "_bias_raw")


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; low <= value <= high, all finite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """What is true of the rows that are evaluated.

    Shape: each [N]. `labels` 0 or 1 of the decision's task, `unit` int64: what is drawn, `amount` the money behind
    each row or None, `targets[task]` true amounts in the label's own unit, NaN where a row does not count.
    """

    labels: np.ndarray
    unit: np.ndarray
    amount: np.ndarray | None = None
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Spread:
    """The approximate sampling distribution of one figure. `replicates` [R] are centred on `value`."""

    value: float
    replicates: Floats
    bias: float
    rows_variance: float  # what more units would reduce
    seeds_variance: float  # what they would not

    def interval(self, confidence: float, low: float, high: float) -> Interval:
        tail = (1.0 - confidence) / 2.0
        ends = np.quantile(self.replicates, [tail, 1.0 - tail])
        lower, upper = ends[0] - max(self.bias, 0.0), ends[1] - min(self.bias, 0.0)
        return Interval(
            self.value, max(min(float(lower), self.value), low), min(max(float(upper), self.value), high)
        )


@dataclass(frozen=True)
class Draws:
    """The replicates of every metric of every model. Built by `resample`.

    `metrics` are the names that at least one model has; `metrics_of` those of one model (a model that predicts no
    amounts has no errors in amounts). `n_redrawn` replicates had to be drawn again.
    """

    n_replicates: int
    n_redrawn: int
    n_units: int
    metrics: tuple[str, ...]
    _values: Mapping[str, Mapping[str, Floats]]  # [S]
    _replicates: Mapping[str, Mapping[str, Floats]]  # [R, S]
    _stretch: Floats  # [R]
    _seed: int

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._values)

    def metrics_of(self, model: str) -> tuple[str, ...]:
        return tuple(name for name in self.metrics if name in self._of(model))

    def n_seeds(self, model: str) -> int:
        return len(next(iter(self._of(model).values())))

    def per_seed(self, model: str, metric: str) -> Floats:
        """The metric of each fit on the sample itself. Shape: [S]."""
        return self._metric(model, metric).copy()

    def value(self, model: str, metric: str) -> float:
        """Mean over the seeds, on the sample itself."""
        return float(self._metric(model, metric).mean())

    def draws(self, model: str, metric: str) -> Floats:
        """Replicates of the mean over seeds, centred on `value`: what `interval` is read from. Shape: [R]."""
        return self._spread([(model, 1.0)], metric).replicates

    def interval(self, model: str, metric: str, confidence: float = 0.95) -> Interval:
        """Two-sided interval of one model's metric."""
        return self._spread([(model, 1.0)], metric).interval(confidence, *_bounds(metric))

    def difference(self, model: str, against: str, metric: str, confidence: float = 0.95) -> Interval:
        """Two-sided interval of the metric of `model` less that of `against`, paired in every replicate."""
        low, high = _bounds(metric)
        return self.contrast(model, against, metric, "points").interval(confidence, low - high, high - low)

    def relative(self, model: str, against: str, metric: str, confidence: float = 0.95) -> Interval:
        """The same as a share of the metric of `against`.

        Raises:
            InputError: that metric is 0, or is in a replicate.
        """
        floor = -np.inf if metric.endswith(_SIGNED) else -1.0
        return self.contrast(model, against, metric, "relative").interval(confidence, floor, np.inf)

    def contrast(self, model: str, against: str, metric: str, reading: Reading) -> _Spread:
        """The whole distribution of a difference, as points or as a share of `against`."""
        if model == against:
            raise InputError(f"{metric} of {model}: expected another model to compare with, got itself")
        if reading == "points":
            return self._spread([(model, 1.0), (against, -1.0)], metric)
        value, base = self.value(model, metric), self.value(against, metric)
        lowest = np.abs(self._replicates[against][metric].mean(axis=1)).min()
        if min(abs(base), lowest) == 0.0:
            raise InputError(f"{metric} of {against}: expected other than 0 to take shares of; use the difference")
        return self._spread([(model, 1.0 / base), (against, -value / base**2)], metric, ratio=True)

    def _spread(self, parts: Sequence[tuple[str, float]], metric: str, ratio: bool = False) -> _Spread:
        """Distribution of a figure of some models' means, given its gradient in them."""
        sample = [self._metric(model, metric) for model, _ in parts]
        drawn = [self._replicates[model][metric] for model, _ in parts]
        means, moved = [float(part.mean()) for part in sample], [part.mean(axis=1) for part in drawn]
        if ratio:
            value, replicates = means[0] / means[1] - 1.0, moved[0] / moved[1] - 1.0
        else:
            value = sum(weight * mean for (_, weight), mean in zip(parts, means, strict=True))
            replicates = sum(weight * mean for (_, weight), mean in zip(parts, moved, strict=True))
        rows = float(np.var(replicates, ddof=1))
        own, errors, freedoms = 0.0, [], []
        for (_, weight), values, part, mean in zip(parts, sample, drawn, moved, strict=True):
            n = len(values)
            if n > 1:
                errors.append(weight**2 * float(values.var(ddof=1)) / n)
                freedoms.append(n - 1)
                # variance over rows that belongs to single seeds: it shows in `errors` too
                own += weight**2 * float(np.var(part - mean[:, None], axis=0, ddof=1).sum()) / (n - 1) / n
        shrink = np.sqrt(max(1.0 - own / rows, 0.0)) if rows > 0.0 else 0.0
        spread = (replicates - replicates.mean()) * (shrink * self._stretch)
        spread += self._moves([model for model, _ in parts], np.array(errors), np.array(freedoms))
        bias = float(replicates.mean() - value)
        return _Spread(float(value), value + spread, bias, rows, max(sum(errors) - own, 0.0))

    def _moves(self, models: list[str], errors: Floats, freedoms: Floats) -> Floats:
        """What other seeds would move a figure by [R]: the quantiles of Student's t, shuffled. Zeros for one seed.

        Swapping two models only turns its sign.
        """
        total = errors.sum()
        if total == 0.0:
            return np.zeros(self.n_replicates)
        freedom = total**2 / (errors**2 / freedoms).sum()  # Welch and Satterthwaite
        grid = stats.t.ppf((np.arange(self.n_replicates) + 0.5) / self.n_replicates, freedom)
        moves = np.random.default_rng([self._seed, 2]).permutation(grid) * np.sqrt(total)
        return moves if models == sorted(models) else -moves

    def _of(self, model: str) -> Mapping[str, Floats]:
        if model not in self._values:
            raise InputError(f"model {model}: expected one of {', '.join(self._values)}")
        return self._values[model]

    def _metric(self, model: str, metric: str) -> Floats:
        if metric not in self._of(model):
            raise InputError(f"metric {metric} of {model}: expected one of {', '.join(self.metrics_of(model))}")
        return self._values[model][metric]


def _bounds(metric: str) -> tuple[float, float]:
    if _SHARES.fullmatch(metric):
        return 0.0, 1.0
    return (-np.inf if metric.endswith(_SIGNED) else 0.0), np.inf


def resample(
    sample: Sample,
    models: Mapping[str, Sequence[Scores]],
    n_replicates: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Draws:
    """Draw replicates of all metrics of all models.

    Deterministic in `seed`; a model's figures do not depend on which other models there are. Memory beside the
    arguments: 512 MB of weights at most, and one fit at a time.

    Args:
        models: the fits (seeds) of each, at least one.
        progress: called with how many replicates of fits are done, and of how many.

    Returns:
        The draws of `pr_auc`, `roc_auc` (with negatives), `recall_at_{1,5,10}pct`, with money `revenue_at_*` and
        `capture_at_*`, all as `models.metrics` defines them; `ece_`, `brier_`, `log_loss_`, each `raw` and
        `calibrated` (20 bins of equal mass, fixed on the sample); for each amount task `<task>_` with `mae`,
        `rmse`, `bias` (mean of predicted less actual) after smearing, and with `_raw` behind it before smearing.

    Raises:
        InputError: labels other than 0 or 1, no positives, amounts below 0, fewer than two units or replicates.
        FloatingPointError: a score that is not finite.
        ValueError: arrays of different lengths, fits of one model that predict different amounts, no fit.
    """
    if n_replicates < 2:
        raise InputError(f"bootstrap: expected at least 2 replicates, got {n_replicates}")
    rows = _check(sample, models)
    n_fits = sum(map(len, models.values()))
    found: dict[str, list[dict[str, Floats]]] = {name: [{} for _ in fits] for name, fits in models.items()}
    weights = _Weights(rows, seed)
    n_chunk = max(_LEAST_BLOCK, min(n_replicates, _CHUNK_BYTES // rows.n_units))
    n_block = min(max(_BLOCK_ENTRIES // rows.n_units, _LEAST_BLOCK), _MOST_BLOCK)
    done = 0
    for start in range(0, n_replicates, n_chunk):
        chunk = weights.draw(min(n_chunk, n_replicates - start))
        for name, fits in models.items():
            for kept, scores in zip(found[name], fits, strict=True):
                weighted = Weighted(rows, scores)
                if start == 0:
                    _keep(kept, weighted.metrics(np.ones((rows.n_units, 1))), 0, n_replicates + 1)
                for column in range(0, chunk.shape[1], n_block):
                    block = chunk[:, column : column + n_block].astype(np.float64)
                    _keep(kept, weighted.metrics(block), 1 + start + column, n_replicates + 1)
                    done += block.shape[1]
                    if progress is not None:
                        progress(done, n_fits * n_replicates)
    stacked = {
        name: {metric: np.stack([fit[metric] for fit in fits], axis=1) for metric in fits[0]}
        for name, fits in found.items()
    }
    return Draws(
        n_replicates=n_replicates,
        n_redrawn=weights.n_redrawn,
        n_units=rows.n_units,
        metrics=tuple(dict.fromkeys(metric for values in stacked.values() for metric in values)),
        _values={name: {metric: both[0] for metric, both in of.items()} for name, of in stacked.items()},
        _replicates={name: {metric: both[1:] for metric, both in of.items()} for name, of in stacked.items()},
        _stretch=_stretch(rows, n_replicates, seed),
        _seed=seed,
    )


def _keep(kept: dict[str, Floats], block: Mapping[str, Floats], start: int, size: int) -> None:
    for metric, values in block.items():
        kept.setdefault(metric, np.empty(size))[start : start + len(values)] = values


class _Weights:
    """How often each replicate draws each unit."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rng, self.needs, self.n_redrawn = np.random.default_rng([seed, 0]), rows.needs(), 0

    def draw(self, n: int) -> NDArray[np.uint8]:
        """Weights of the next `n` replicates. Shape: [U, n]; a byte holds them, 256 of one unit never happens."""
        drawn = np.empty((self.needs.shape[1], n), np.uint8)
        for column in range(n):
            drawn[:, column] = self._one()
        return drawn

    def _one(self) -> NDArray[np.int64]:
        n_units = self.needs.shape[1]
        for _ in range(_MAX_DRAWS):
            weights = np.bincount(self.rng.integers(0, n_units, n_units), minlength=n_units)
            if (self.needs @ weights > 0).all():
                return weights
            self.n_redrawn += 1
        raise InputError(
            f"bootstrap: expected samples of {n_units} units with positives, negatives and amounts, got "
            f"{_MAX_DRAWS} without; evaluate on more units"
        )


def _stretch(rows: Rows, n_replicates: int, seed: int) -> Floats:
    """What widens the deviations between replicates [R]: see the module's text on rows."""
    positives = rows.sums(rows.positive.astype(np.float64))
    freedom = max(positives.sum() ** 2 / (positives**2).sum() - 1.0, 1.0)
    grid = stats.chi2.ppf((np.arange(n_replicates) + 0.5) / n_replicates, freedom)
    mixed = np.random.default_rng([seed, 1]).permutation(np.sqrt(freedom / grid))
    return mixed * np.sqrt(rows.n_units / (rows.n_units - 1.0))


def _check(sample: Sample, models: Mapping[str, Sequence[Scores]]) -> Rows:
    labels = np.asarray(sample.labels)
    shape = labels.shape
    given = {"unit": sample.unit, **sample.targets} | ({} if sample.amount is None else {"amount": sample.amount})
    for name, values in given.items():
        if np.shape(values) != shape:
            raise ValueError(f"sample/{name}: expected shape {list(shape)}, got {list(np.shape(values))}")
    money = None if sample.amount is None else torch.tensor(np.asarray(sample.amount))
    Truth.of(torch.tensor(labels), money, name="sample")
    targets = {task: values for task, values in sample.targets.items() if not np.isnan(values).all()}
    for name, fits in models.items():
        if not fits:
            raise ValueError(f"{name}: expected at least one fit")
        if len({frozenset(fit.amounts) for fit in fits}) > 1:
            raise ValueError(f"{name}: expected the same amounts of every fit, got different ones")
        for number, fit in enumerate(fits):
            _check_scores(f"{name}/{number}", fit, shape, targets)
    rows = Rows.of(labels, np.asarray(sample.unit), sample.amount, targets)
    if rows.n_units < 2:
        raise InputError(f"bootstrap: expected at least 2 units to draw from, got {rows.n_units}; use a finer unit")
    return rows


def _check_scores(name: str, fit: Scores, shape: tuple[int, ...], targets: Mapping[str, np.ndarray]) -> None:
    columns = {"logits": fit.logits, "raw": fit.raw, "calibrated": fit.calibrated}
    for task, pair in fit.amounts.items():
        columns |= {f"{task}, before smearing": pair[0], f"{task}, after smearing": pair[1]}
    for column, values in columns.items():
        if np.shape(values) != shape:
            raise ValueError(f"{name}/{column}: expected shape {list(shape)}, got {list(np.shape(values))}")
        task = column.split(",")[0]
        counts = np.isfinite(values) | (np.isnan(targets[task]) if task in targets else task in fit.amounts)
        if not counts.all():
            odd = np.asarray(values)[~counts][0]
            raise FloatingPointError(f"{name}/{column}: expected a finite number, got {odd}; the model diverged")
