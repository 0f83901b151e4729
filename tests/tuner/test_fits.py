"""tuner/fits.py: what valid says of a fit is what its trainer measured, by the unit of the decision."""

from __future__ import annotations

import numpy as np

from models.trainer import Decision, Labels, Predictions
from tuner.fits import Rows, on_valid


def judged(unit: str) -> dict[str, float]:
    """Four days of 40 rows each: on two of them every row rises, on the others every other one."""
    rng = np.random.default_rng(0)
    days = np.repeat(np.arange(4), 40)
    labels = np.where(days < 2, 1.0, rng.random(160) < 0.5).astype(np.float32)
    scores = (2.0 * labels + rng.normal(size=160)).astype(np.float32)
    labels[::10] = np.nan
    ids = days if unit == "day" else np.arange(160)
    rows = Rows.of(Labels({"rise": labels}, ids, None, {}), "valid", "rise")
    rule = Decision(task="rise", target_precision=0.6, min_selected=30, unit=unit)
    return dict(on_valid(Predictions({"rise": scores}), rows, rule, seed=1).search)


def test_the_threshold_of_the_search_counts_the_unit_of_the_decision() -> None:
    rows, days = judged("row"), judged("day")
    assert rows["violation"] < 0.0 < days["violation"]
    assert days["n_units"] == 4.0
    assert days["precision_bound"] < 0.6 < days["precision_bound_rows"]
