"""The paired bootstrap of an evaluation, against scikit-learn with sample weights replicate by replicate.

    python -m benchmarks.bootstrap [--rows 1300000] [--units 23000] [--fits 25] [--replicates 1000] [--naive 2]

CPU time of one thread. Synthetic rows of mvp13's shape: users with many clicks, 1.3 % gifts with an amount, watch
time on every row. Ours gives all metrics of a replicate, scikit-learn those it has: PR-AUC, ROC-AUC, log loss and
Brier score before and after calibration, absolute and squared error of two amounts before and after smearing; no
captured shares or revenues, no calibration errors. Beside it what gathering every row's weight once takes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from sklearn import metrics
from threadpoolctl import threadpool_limits

from models.bootstrap import Sample, resample
from models.weighted import Scores


def synthetic(n_rows: int, n_units: int, n_fits: int, seed: int = 0) -> tuple[Sample, dict[str, list[Scores]]]:
    """A sample and fits in models of five."""
    rng = np.random.default_rng(seed)
    activity = rng.lognormal(0.0, 1.0, n_units)
    unit = rng.choice(n_units, n_rows, p=activity / activity.sum())
    signal = 0.8 * rng.standard_normal(n_rows) + 0.6 * rng.standard_normal(n_units)[unit]
    labels = (rng.random(n_rows) < 1.0 / (1.0 + np.exp(5.0 - 1.2 * signal))).astype(np.float32)
    amount = np.where(labels == 1, np.ceil(np.exp(1.5 * rng.standard_normal(n_rows) + 1.0)), 0.0)
    targets = {"watch_time": rng.lognormal(9.0, 1.9, n_rows), "gift_amount": np.where(labels == 1, amount, np.nan)}

    def fit() -> Scores:
        logits = (signal + 0.7 * rng.standard_normal(n_rows, dtype=np.float32)).astype(np.float32)
        raw = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
        amounts = {task: (np.exp(signal), 1.3 * np.exp(signal)) for task in targets}
        return Scores(logits, raw, raw / 50.0, amounts)

    models: dict[str, list[Scores]] = {}
    for number in range(n_fits):
        models.setdefault(f"model_{number // 5}", []).append(fit())
    return Sample(labels, unit, amount, targets), models


def naive(sample: Sample, fit: Scores, rng: np.random.Generator) -> None:
    """One replicate of one fit as most people write it."""
    n_units = int(sample.unit.max()) + 1
    weight = np.bincount(rng.integers(0, n_units, n_units), minlength=n_units)[sample.unit]
    metrics.average_precision_score(sample.labels, fit.logits, sample_weight=weight)
    metrics.roc_auc_score(sample.labels, fit.logits, sample_weight=weight)
    for probability in (fit.raw, fit.calibrated):
        metrics.log_loss(sample.labels, probability, sample_weight=weight)
        metrics.brier_score_loss(sample.labels, probability, sample_weight=weight)
    for task, actual in sample.targets.items():
        counts = ~np.isnan(actual)
        for predicted in fit.amounts[task]:
            for error in (metrics.mean_absolute_error, metrics.mean_squared_error):
                error(actual[counts], predicted[counts], sample_weight=weight[counts])


def cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--units", type=int, default=23_000)
    parser.add_argument("--fits", type=int, default=25)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--naive", type=int, default=2, help="replicates of one fit by scikit-learn")
    arguments = parser.parse_args()
    sample, models = synthetic(arguments.rows, arguments.units, arguments.fits)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weight = np.arange(arguments.units)

    def show(done: int, total: int) -> None:
        print(f"\r{done / total:4.0%}", end="", file=sys.stderr, flush=True)

    with threadpool_limits(1):
        wall = time.perf_counter()
        ours = cpu_s(lambda: resample(sample, models, arguments.replicates, progress=show))
        wall = time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fit, rng = models["model_0"][0], np.random.default_rng(0)
        theirs = cpu_s(lambda: [naive(sample, fit, rng) for _ in range(arguments.naive)]) / arguments.naive
        gather = cpu_s(lambda: [weight[sample.unit] for _ in range(10)]) / 10
    each = 1000 * ours / arguments.fits / arguments.replicates
    print(f"\n{arguments.rows:,} rows, {arguments.units:,} units, {arguments.fits} fits, ", end="")
    print(f"{arguments.replicates} replicates")
    print(f"all            {ours:9.1f} CPU s ({wall:.1f} s by the clock)")
    print(f"memory         {peak / 2**20:9.2f} GiB at the peak, {held / 2**20:.2f} of it before the start")
    print(f"one replicate  {each:9.3f} CPU ms of one fit, its preparation included")
    print(f"scikit-learn   {1000 * theirs:9.3f} CPU ms, {1000 * theirs / each:,.0f} times as long")
    print(f"gather         {1000 * gather:9.3f} CPU ms, {1000 * gather / each:.2f} times as long")


if __name__ == "__main__":
    main()
