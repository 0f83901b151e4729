"""The certificate: a threshold whose precision holds at a stated confidence, shown on rows nothing else has seen.

A threshold that was chosen because it looked good on some rows looks better there than it is. So three roles share
the work. `plan_sequence` reads valid and fixes a short sequence of cuts, strict to loose; `certify` reads calibrate
and tests them in that order; `models.check` reads test and says what became of the promise. Cuts are raw float32
logits, compared as they are (select where score >= threshold; equal scores stay on one side), so that no calibrator
and no rounding stands between what was tested and what will be decided.

**Why it holds.** Model and cuts are fixed before a label of calibrate is read. Cut j has the null hypothesis "its
precision is below the target". Given that it selects n rows, the true ones among independent rows are binomial,
and p = P(Binomial(n, target) >= n_true) is at most delta with probability at most delta under the null, whatever
n is. The cuts are tested in their order, each at the full delta, until one fails; the loosest that passed is the
threshold. It can be a false one only if the first false cut of the sequence has passed, and that one was fixed
beforehand: probability at most delta. Nothing is asked of the model, of the shape of the precision over the cuts,
or of how the tests hang together, and delta is not divided by their number. Choosing freely among all cuts by a
pointwise bound has no such argument. (Bauer 1991; Angelopoulos, Bates, Candès, Jordan and Lei 2021, "Learn then
test", sections 3.2 and 4; the same sequence in MAPIE gives the same answer.)

**What is promised** is "precision >= target", at `confidence`. The `bound` at the certified threshold is the
evidence and no promise of its own: that cut was picked by the data. `certifiable_precision`, the lower bound at
the first cut, is one: that cut was picked by valid. Where nothing is certified it is what could have been
promised, and the two answers hold together (Hsu and Berger 1999); beside a certificate each holds at the
confidence by itself.

**Power.** As a cut that fails ends everything, the plan orders cuts by how surely they will pass. It starts at
the strictest one that is all but sure to (p <= 1e-8 on valid), else at the one with the smallest p, and where
none of them is convincing at that with the highest lower bound, so that `certifiable_precision` says as much as
it can. A cut that looks less sure than a looser one is left out. It ends where valid is clearly below the target.
All of that may be as optimistic as it likes: it costs power, never validity.

**Units.** Where rows hang together in users or days, the binomial is replaced by an approximation for many units
that treats the unit as the unit: see `models.precision`, with the rates at which it was seen to fail.

**Measured** (target 0.60, delta 0.10, populations whose truth is known, best of five models by valid): the
threshold of highest recall that reaches the target on valid is a false one in 57 to 62 % of populations, the one of
highest recall with a pointwise Clopper-Pearson bound on calibrate in 9 %, the certificate in 5 to 6 %. With strong
clusters (correlation 0.3 of labels, half of the score's noise) a certificate that takes 20 days of 150 rows, or 150
users of 30, for rows is a false one in 20 %; one that does not in 3 and 7 %.

Source: Bauer 1991, "Multiple testing in clinical trials"; Angelopoulos et al. 2021, arXiv:2110.01052; Hsu and
Berger 1999, "Stepwise confidence intervals without multiplicity adjustment for dose-response and toxicity studies".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.decision import range_of_logits
from models.precision import Evidence, JudgedRows, Tally
from models.trainer import Decision, InputError

_RATIO = 1.05  # between the counts of neighbouring cuts
_SURE = 1e-8  # a p-value on valid that leaves no doubt about calibrate
_PLAN_DELTA = 0.01  # level of the plan's own bounds: stricter than a test, as it looks at many cuts
_FEW_UNITS = 8  # units below which the bound is marked as rough (NCHS)


@dataclass(frozen=True)
class Sequence:
    """The cuts that will be tested, in their order; fixed before calibrate's labels are read.

    `thresholds` are raw float32 logits, strictly falling; `n_selected` the rows of valid that each selects. Both
    may be empty: then no cut is allowed at all, and nothing can be certified.
    """

    thresholds: tuple[float, ...]
    n_selected: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.n_selected):
            raise InputError(
                f"sequence: expected one count for each threshold, got {len(self.thresholds)} thresholds and "
                f"{len(self.n_selected)} counts"
            )
        values = np.array(self.thresholds, np.float64)
        if not np.isfinite(values).all() or (values.astype(np.float32) != values).any():
            raise InputError("sequence: expected thresholds that are finite float32 logits")
        if (np.diff(values) >= 0.0).any():
            raise InputError("sequence: expected strictly falling thresholds, strict to loose")

    def as_json(self) -> dict[str, Any]:
        return {"thresholds": list(self.thresholds), "n_selected": list(self.n_selected)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sequence:
        return cls(tuple(float(x) for x in content["thresholds"]), tuple(int(n) for n in content["n_selected"]))


@dataclass(frozen=True)
class Test:
    """One cut on calibrate. `n_effective` rows is what its selected rows are worth, `n_units` the units they are
    of; `bound` the lower bound of its precision, `p_value` what is compared with delta. A cut with fewer than
    `min_selected` rows does not pass whatever its p-value. `bound_rows`, for comparison only, is the bound if every
    row were a unit of its own; None where it is."""

    threshold: float
    n_selected: int
    n_true: int
    n_units: int
    n_effective: float
    bound: float
    p_value: float
    passed: bool
    bound_rows: float | None = None


@dataclass(frozen=True)
class Certificate:
    """What was shown on calibrate: with probability `confidence` over the draw of its rows (units), either
    nothing is certified or the precision at `threshold` is at least `target`.

    Status `infeasible`: no decisions may be issued; threshold, precision, bound, recall and n_effective are None
    and nothing is selected. `n_rows` and `n_units` count the whole of calibrate. `recall` is None also without
    positives. `certifiable_precision` is 0 where there was no cut to test. `bound_rows` stands beside `bound` for
    comparison only: what it were if every row were a unit of its own; None where it is, or nothing is certified.
    """

    status: Literal["certified", "infeasible"]
    target: float
    confidence: float
    threshold: float | None
    n_rows: int
    n_selected: int
    n_true: int
    precision: float | None
    bound: float | None
    recall: float | None
    unit: str
    n_units: int
    n_effective: float | None
    certifiable_precision: float
    tested: tuple[Test, ...]
    assumptions: tuple[str, ...]
    bound_rows: float | None = None

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        return content | {"tested": list(content["tested"]), "assumptions": list(self.assumptions)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Certificate:
        """Also from a larger mapping: keys that are not of a certificate are passed over."""
        own = own_fields(cls, content)
        own["tested"] = tuple(Test(**test) for test in content["tested"])
        return cls(**own | {"assumptions": tuple(content["assumptions"])})


def own_fields(cls: type, content: dict[str, Any]) -> dict[str, Any]:
    """What a stored mapping has of a class's fields; an older one may lack the last."""
    return {field.name: content[field.name] for field in fields(cls) if field.name in content}


def plan_sequence(
    scores: np.ndarray,
    labels: np.ndarray,
    unit: np.ndarray,
    decision: Decision,
    n_rows: int | None = None,
) -> Sequence:
    """Fix the cuts to be tested, from valid alone.

    Every cut selects at least `min_selected` rows of valid and has its threshold inside `range`; the first ones are
    left out where calibrate might select fewer.

    Args:
        scores, labels, unit: [N] raw float32 logits, 0 or 1, and what is exchangeable, of valid.
        n_rows: rows of calibrate, where it is not about as large as valid.

    Raises:
        InputError: lengths that differ, logits that are not finite float32, labels other than 0 and 1.
    """
    rows = JudgedRows.of("valid", scores, labels, unit, decision.unit)
    thresholds = _candidates(rows, decision, n_rows)
    cuts = [Evidence.of(tally, _PLAN_DELTA) for tally in rows.tallies(thresholds)]
    if not cuts:
        return Sequence((), ())
    target = decision.target_precision
    p_values = np.array([cut.p_value(target) for cut in cuts])
    first = int(p_values.argmin())
    if p_values[first] <= _SURE:
        first = int((p_values <= _SURE).argmax())
    elif p_values[first] > _PLAN_DELTA:
        first = int(np.argmax([cut.bound for cut in cuts]))
    end = first + 1
    while end < len(cuts) and cuts[end].upper_bound >= target:
        end += 1
    doubt = np.maximum(p_values[first:end], _SURE)
    least = np.minimum.accumulate(doubt[::-1])[::-1]  # of each cut and all looser ones
    kept = [first, *(first + 1 + np.flatnonzero(doubt[1:] <= least[1:])).tolist()]
    return Sequence(tuple(float(thresholds[i]) for i in kept), tuple(cuts[i].n for i in kept))


def certify(
    scores: np.ndarray,
    labels: np.ndarray,
    unit: np.ndarray,
    sequence: Sequence,
    decision: Decision,
    delta: float,
) -> Certificate:
    """Test the cuts of `sequence` on calibrate, strict to loose, each at level `delta`, until one fails.

    Args:
        scores, labels, unit: [N] raw float32 logits, 0 or 1, and what is exchangeable, of calibrate.
        delta: the probability of a false certificate that this one may spend (`share_of_delta`).

    Raises:
        InputError: as `plan_sequence`, or a delta that is not between 0 and 1.
    """
    if not 0.0 < delta < 1.0:
        raise InputError(f"certificate: delta: expected a number between 0 and 1, got {delta}")
    rows = JudgedRows.of("calibrate", scores, labels, unit, decision.unit)
    tested: list[Test] = []
    tallies = rows.tallies(np.array(sequence.thresholds, np.float32))
    for threshold, tally in zip(sequence.thresholds, tallies, strict=True):
        tested.append(_test(threshold, tally, delta, decision))
        if not tested[-1].passed:
            break
    certified = [test for test in tested if test.passed]
    loosest = certified[-1] if certified else None
    n_positive = int(rows.labels.sum())
    return Certificate(
        status="certified" if loosest else "infeasible",
        target=decision.target_precision,
        confidence=1.0 - delta,
        threshold=loosest.threshold if loosest else None,
        n_rows=len(rows.scores),
        n_selected=loosest.n_selected if loosest else 0,
        n_true=loosest.n_true if loosest else 0,
        precision=loosest.n_true / loosest.n_selected if loosest else None,
        bound=loosest.bound if loosest else None,
        recall=loosest.n_true / n_positive if loosest and n_positive else None,
        unit=decision.unit,
        n_units=rows.n_units,
        n_effective=loosest.n_effective if loosest else None,
        certifiable_precision=tested[0].bound if tested else 0.0,
        tested=tuple(tested),
        assumptions=_assumptions(decision.unit, rows, loosest or (tested[0] if tested else None)),
        bound_rows=loosest.bound_rows if loosest else None,
    )


def share_of_delta(delta: float, n_nominees: int, number: int) -> float:
    """What the `number`-th certificate (from 1) on one calibrate set may spend of `delta`.

    Those that were declared beforehand share it evenly: delta / n_nominees each, together delta (Bonferroni). One
    beyond them is tested at delta / number; what all of them spend is then more than delta, and `joint_confidence`
    says how much is left. Never rises with `number`.

    Raises:
        InputError: a delta that is not between 0 and 1, a count below 1.
    """
    if not 0.0 < delta < 1.0:
        raise InputError(f"certificate: delta: expected a number between 0 and 1, got {delta}")
    if n_nominees < 1 or number < 1:
        raise InputError(f"certificate: expected counts from 1, got {n_nominees} nominees and certificate {number}")
    return delta / max(n_nominees, number)


def joint_confidence(spent: Iterable[float]) -> float:
    """The confidence at which all certificates that spent these deltas hold together: 1 - their sum, at least 0."""
    return max(0.0, 1.0 - math.fsum(spent))


def _test(threshold: float, tally: Tally, delta: float, decision: Decision) -> Test:
    cut, target = Evidence.of(tally, delta), decision.target_precision
    p_value = cut.p_value(target)
    # The binomial tail has judged; the quantile's last bit may not contradict it.
    below = math.nextafter(target, 0.0)
    bound = max(cut.bound, target) if p_value <= cut.delta else min(cut.bound, below)
    passed = p_value <= cut.delta and cut.n >= decision.min_selected
    alone = None if decision.unit == "row" else Evidence.of(tally._replace(by_unit=None), delta).bound
    return Test(threshold, cut.n, cut.n_true, cut.n_units, cut.n_effective, bound, p_value, passed, alone)


def _candidates(rows: JudgedRows, decision: Decision, n_rows: int | None) -> NDArray[np.float32]:
    """Thresholds of valid that may be tested, strict to loose: one about every 5 % of rows more."""
    n, least = len(rows.scores), decision.min_selected
    if n < least:
        return np.empty(0, np.float32)
    share = 1.0 if n_rows is None else n_rows / n
    safe = math.ceil((least + 2.0 * math.sqrt(least)) / share) if share > 0.0 else n
    low, high = range_of_logits(decision.range)
    descending = np.sort(rows.scores)[::-1]
    above, last = int((rows.scores > high).sum()), int((rows.scores >= low).sum())
    first = max(least, above + 1, min(safe, last))
    counts = []
    while first <= last:
        counts.append(first)
        first = max(first + 1, math.ceil(first * _RATIO))
    return np.unique(descending[np.array(counts, np.int64) - 1])[::-1]


def _assumptions(unit: str, rows: JudgedRows, test: Test | None) -> tuple[str, ...]:
    what = "rows" if unit == "row" else f"units ({unit})"
    found = [
        f"The {what} of calibrate are independent draws from the population that will be decided on, and that "
        "population stays as it is: drift after calibrate is not covered.",
        "Model and sequence of cuts were fixed before a label of calibrate was read, and nobody chose the model by "
        "an earlier certificate on the same rows.",
        "The precision promised is that of all selected rows together, not of every group, day or user.",
    ]
    if unit == "row":
        return (*found, "Rows do not hang together; given that, the tests are exact (binomial).")
    found.append(
        f"Each {unit} of calibrate is as good as new to the model; where train or valid hold the same ones, the "
        "figures say how the model does on those it knows."
    )
    if test is not None and test.n_units == test.n_selected:
        return (*found, f"No {unit} is selected twice, so the tests are exact (binomial).")
    found.append(
        f"Rows of one {unit} may hang together in any way; the test of an effective sample size is an "
        "approximation for many units, rougher where a few of them hold most rows and the precision is near 1."
    )
    if test is not None and test.n_units < _FEW_UNITS:
        found.append(f"Only {test.n_units} units are behind the figures: the approximation is rough.")
    return tuple(found)
