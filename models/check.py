"""What a threshold does on rows that came later: whether its precision is kept, and what it finds of the positives.

Every interval is that of `models.precision`, over units. Recall is the share of the positive rows that are
selected. F1 is a share as well: of all selected and all positive rows together those that are both, counted twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.certificate import Certificate, own_fields
from models.precision import Evidence, JudgedRows, Tally
from models.trainer import InputError


@dataclass(frozen=True)
class Check:
    """What a threshold does on rows that came later: test.

    `kept` compares the observed precision with the target, as anyone would; None where no row is selected. It may
    be missed by chance, so there is the two-sided interval [low, high] at `confidence` as well: `refuted` says
    that all of it is below the target, and chance alone is no explanation. `low_rows` and `high_rows`, for
    comparison only, are its ends if every row were a unit of its own; None where it is. Recall and F1 (the harmonic
    mean of precision and recall) have intervals of the same kind; all None without positives.
    """

    target: float
    threshold: float
    confidence: float
    n_rows: int
    n_selected: int
    n_true: int
    n_units: int
    n_effective: float
    precision: float | None
    low: float
    high: float
    recall: float | None
    kept: bool | None
    refuted: bool
    sentence: str
    low_rows: float | None = None
    high_rows: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    f1: float | None = None
    f1_low: float | None = None
    f1_high: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Check:
        return cls(**own_fields(cls, content))


def check(
    certificate: Certificate,
    scores: np.ndarray,
    labels: np.ndarray,
    unit: np.ndarray,
    confidence: float = 0.95,
) -> Check:
    """Hold a certified threshold against test.

    Args:
        scores, labels, unit: [N] as for `certify`, of test.
        confidence: of the two-sided interval of the precision.

    Raises:
        InputError: as `plan_sequence`, or a certificate that certifies nothing.
    """
    if certificate.threshold is None:
        raise InputError("certificate: expected a certified threshold to check, got an infeasible certificate")
    rows = JudgedRows.of("test", scores, labels, unit, certificate.unit)
    return hold(certificate.threshold, certificate.target, rows, confidence)


def hold(threshold: float, target: float, rows: JudgedRows, confidence: float = 0.95) -> Check:
    """Hold any threshold, certified or not, against rows that it was not chosen on."""
    (tally,) = rows.tallies(np.array([threshold], np.float32))
    delta = (1.0 - confidence) / 2.0
    cut = Evidence.of(tally, delta)
    alone = None if rows.unit is None else Evidence.of(tally._replace(by_unit=None), delta)
    precision = cut.n_true / cut.n if cut.n else None
    low, high = cut.bound, cut.upper_bound
    kept = None if precision is None else precision >= target
    refuted = high < target
    recall, f1 = _found(rows, threshold, delta)
    some = recall.n > 0
    return Check(
        target=target,
        threshold=threshold,
        confidence=confidence,
        n_rows=len(rows.scores),
        n_selected=cut.n,
        n_true=cut.n_true,
        n_units=cut.n_units,
        n_effective=cut.n_effective,
        precision=precision,
        low=low,
        high=high,
        recall=recall.share if some else None,
        kept=kept,
        refuted=refuted,
        sentence=_sentence(cut, target, confidence, kept, refuted),
        low_rows=alone.bound if alone else None,
        high_rows=alone.upper_bound if alone else None,
        recall_low=recall.bound if some else None,
        recall_high=recall.upper_bound if some else None,
        f1=f1.share if some else None,
        f1_low=f1.bound if some else None,
        f1_high=f1.upper_bound if some else None,
    )


def _found(rows: JudgedRows, threshold: float, delta: float) -> tuple[Evidence, Evidence]:
    """Of recall and of F1."""
    unit = np.arange(rows.n_units) if rows.unit is None else rows.unit
    chosen = rows.scores >= np.float32(threshold)

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(unit[which], minlength=rows.n_units)

    selected, positive, both = count(chosen), count(rows.labels), count(chosen & rows.labels)
    shares = Tally.of_units(positive, both), Tally.of_units(selected + positive, 2 * both)
    return Evidence.of(shares[0], delta), Evidence.of(shares[1], delta)


def _sentence(cut: Evidence, target: float, confidence: float, kept: bool | None, refuted: bool) -> str:
    if kept is None:
        return f"Nothing to judge: no row of test reaches the threshold (precision >= {target:g} was promised)."
    says = "kept" if kept else "broken"
    text = (
        f"The promise of precision >= {target:g} is {says} on test: {cut.share:.4f}, {cut.n_true:,} of {cut.n:,} "
        f"selected rows ({100.0 * confidence:g} % interval {cut.bound:.4f} to {cut.upper_bound:.4f})"
    )
    if kept:
        return text + "."
    if refuted:
        return text + ", and not by chance alone: the whole interval is below."
    return text + ", which may be chance: the interval holds the target."
