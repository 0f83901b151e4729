"""Populations of scored rows whose true precision at every threshold is known in closed form.

A model's logit is `shift` higher for positives and normal with variance 1 within each label, so that precision at a
threshold follows from the normal tail alone. Rows of one unit share a part of the logit's noise and, the other way
about, of their chance to be positive; the formula holds for all rows together all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm


@dataclass(frozen=True)
class Rows:
    """Shape: `scores` [M, N] float32 of M models, `labels` [N], `unit` [N]."""

    scores: np.ndarray
    labels: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Population:
    """`shared` of the logit's variance belongs to the unit; `correlation` of labels within a unit."""

    base_rate: float
    shifts: tuple[float, ...]
    shared: float = 0.0
    correlation: float = 0.0

    def draw(self, rng: np.random.Generator, n_units: int, rows_of_unit: int = 1) -> Rows:
        unit = np.repeat(np.arange(n_units), rows_of_unit)
        n, rate = len(unit), np.full(n_units, self.base_rate)
        if self.correlation:
            total = 1.0 / self.correlation - 1.0
            rate = beta.rvs(self.base_rate * total, (1.0 - self.base_rate) * total, size=n_units, random_state=rng)
        labels = rng.random(n) < rate[unit]
        common = np.sqrt(self.shared) * rng.normal(size=n_units)[unit]
        left = np.sqrt(1.0 - self.shared)
        rows = rng.normal(size=n)  # models err on the same rows
        own = 0.8 * rows + 0.6 * rng.normal(size=(len(self.shifts), n))
        scores = np.asarray(self.shifts)[:, None] * labels + common + left * own
        return Rows(scores.astype(np.float32), labels.astype(np.float32), unit)

    def precision(self, model: int, threshold: float) -> float:
        true = self.base_rate * norm.sf(threshold - self.shifts[model])
        return float(true / (true + (1.0 - self.base_rate) * norm.sf(threshold)))
