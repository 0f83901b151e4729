"""The certificate: a threshold whose precision holds at a stated confidence, shown on rows nothing else has seen.

A threshold that was chosen because it looked good on some rows looks better there than it is. So three roles share
the work. `plan_sequence` reads valid and fixes a short sequence of cuts, strict to loose; `certify` reads calibrate
and tests them in that order; `check` reads test and says what became of the promise. Cuts are raw float32 logits,
compared as they are (select where score >= threshold; equal scores stay on one side), so that no calibrator and no
rounding stands between what was tested and what will be decided.

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

**Units.** Rows of one user or day are no independent draws. Where the unit is not the row and units repeat among
the selected rows, n is replaced by the effective sample size of Korn and Graubard (1998): p(1 - p) / var(p),
times (t[n-1] / t[df])^2 at the level of the test, at most n, and Clopper-Pearson with real-valued counts. Ours
differs where the original fails with few or very unequal units (its violation rate was seen at 0.31 for a delta
of 0.10): var(p) is the jackknife's over units (delete one; larger where single units weigh much); df is one less
than the effective number of units (sum w)^2 / sum w^2, of all selected rows, of the true or of the false ones,
whichever is least, as two units with all the false rows tell little of how false rows vary; and the sample is
never worth less than its effective number of units, which is also what it is worth where all units agree exactly.
A single unit proves nothing: its bound is 0. Unlike the row's binomial this is an approximation for many units.
In simulations with delta 0.10 (2,000 samples a case; 5 to 2,000 units; within-unit correlations 0.05, 0.3, 1) the
bound was too high in at most 0.10 of samples at precisions 0.10 and 0.60, while the rows' own was in up to 0.47;
at 0.90 in at most 0.10 with units of like sizes, and in up to 0.17 where a few units hold most rows.

Source: Clopper and Pearson 1934; Korn and Graubard 1998, "Confidence intervals for proportions with small
expected number of positive counts estimated from survey data"; Parker et al. 2017 (NCHS presentation standards)
on few degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, stdtrit

from models.decision import range_of_logits
from models.trainer import Decision, InputError

_RATIO = 1.05  # between the counts of neighbouring cuts
_SURE = 1e-8  # a p-value on valid that leaves no doubt about calibrate
_PLAN_DELTA = 0.01  # level of the plan's own bounds: stricter than a test, as it looks at many cuts
_FEW_UNITS = 8.0  # effective units below which the bound is marked as rough (NCHS)

Floats = NDArray[np.float64]


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
    `min_selected` rows does not pass whatever its p-value."""

    threshold: float
    n_selected: int
    n_true: int
    n_units: int
    n_effective: float
    bound: float
    p_value: float
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """What was shown on calibrate: with probability `confidence` over the draw of its rows (units), either
    nothing is certified or the precision at `threshold` is at least `target`.

    Status `infeasible`: no decisions may be issued; threshold, precision, bound, recall and n_effective are None
    and nothing is selected. `n_rows` and `n_units` count the whole of calibrate. `recall` is None also without
    positives. `certifiable_precision` is 0 where there was no cut to test.
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

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        return content | {"tested": list(content["tested"]), "assumptions": list(self.assumptions)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Certificate:
        """Also from a larger mapping: keys that are not of a certificate are passed over."""
        own = {name: content[name] for name in cls.__dataclass_fields__}
        own["tested"] = tuple(Test(**test) for test in content["tested"])
        return cls(**own | {"assumptions": tuple(content["assumptions"])})


@dataclass(frozen=True)
class Check:
    """What a certified threshold does on rows that came later: test.

    `kept` compares the observed precision with the target, as anyone would; None where no row is selected. It may
    be missed by chance, so there is the two-sided interval [low, high] at `confidence` as well: `refuted` says
    that all of it is below the target, and chance alone is no explanation.
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Check:
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


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
    rows = _Rows.of("valid", scores, labels, unit, decision.unit)
    thresholds = _candidates(rows, decision, n_rows)
    cuts = [_Evidence.of(tally, _PLAN_DELTA) for tally in rows.tallies(thresholds)]
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
    surest = np.minimum.accumulate(p_values[first:end][::-1])[::-1]  # of each cut and all looser ones
    kept = [first, *(first + 1 + np.flatnonzero(p_values[first + 1 : end] <= surest[1:])).tolist()]
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
    rows = _Rows.of("calibrate", scores, labels, unit, decision.unit)
    tested: list[Test] = []
    tallies = rows.tallies(np.array(sequence.thresholds, np.float32))
    for threshold, tally in zip(sequence.thresholds, tallies, strict=True):
        tested.append(_test(threshold, _Evidence.of(tally, delta), decision))
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
    )


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
    rows = _Rows.of("test", scores, labels, unit, certificate.unit)
    (tally,) = rows.tallies(np.array([certificate.threshold], np.float32))
    cut = _Evidence.of(tally, (1.0 - confidence) / 2.0)
    n_positive = int(rows.labels.sum())
    precision = cut.n_true / cut.n if cut.n else None
    low, high = cut.bound, cut.upper_bound
    kept = None if precision is None else precision >= certificate.target
    refuted = high < certificate.target
    return Check(
        target=certificate.target,
        threshold=certificate.threshold,
        confidence=confidence,
        n_rows=len(rows.scores),
        n_selected=cut.n,
        n_true=cut.n_true,
        n_units=cut.n_units,
        n_effective=cut.n_effective,
        precision=precision,
        low=low,
        high=high,
        recall=cut.n_true / n_positive if n_positive else None,
        kept=kept,
        refuted=refuted,
        sentence=_sentence(cut, certificate.target, confidence, kept, refuted),
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


class _Tally(NamedTuple):
    """Selected and true rows of one cut; by unit [U] where units repeat among the selected rows, else None."""

    n: int
    n_true: int
    n_units: int
    by_unit: tuple[Floats, Floats] | None


@dataclass(frozen=True)
class _Rows:
    """The rows of one role. Shape: each [N]; `unit` codes in 0..n_units - 1, None where the unit is the row."""

    scores: NDArray[np.float32]
    labels: NDArray[np.bool_]
    unit: NDArray[np.int64] | None
    n_units: int

    @classmethod
    def of(cls, role: str, scores: np.ndarray, labels: np.ndarray, unit: np.ndarray, kind: str) -> _Rows:
        scores, labels, unit = np.asarray(scores), np.asarray(labels), np.asarray(unit)
        if scores.ndim != 1 or not scores.shape == labels.shape == unit.shape:
            raise InputError(
                f"{role}: expected scores, labels and units of one length, got shapes {scores.shape}, "
                f"{labels.shape} and {unit.shape}"
            )
        if scores.dtype != np.float32 or not np.isfinite(scores).all():
            found = scores.dtype if scores.dtype != np.float32 else "nan or infinity"
            raise InputError(f"{role}: expected raw scores, finite float32 logits, got {found}")
        odd = (labels != 0) & (labels != 1)
        if odd.any():
            raise InputError(
                f"{role}: expected labels 0 or 1, got {labels[odd][0]}; leave out rows without a label"
            )
        if kind == "row":
            return cls(scores, labels == 1, None, len(scores))
        units, codes = np.unique(unit, return_inverse=True)
        return cls(scores, labels == 1, codes, len(units))

    def tallies(self, thresholds: NDArray[np.float32]) -> Iterator[_Tally]:
        """One tally for each of `thresholds`, which fall; what a looser cut adds is all that is counted again."""
        if len(thresholds) == 0:
            return
        chosen = np.flatnonzero(self.scores >= thresholds[-1])
        chosen = chosen[np.argsort(-self.scores[chosen], kind="stable")]
        ends = np.searchsorted(-self.scores[chosen], -thresholds, side="right").tolist()
        labels = self.labels[chosen]
        n_true = np.concatenate([[0], np.cumsum(labels)])
        if self.unit is None:
            yield from (_Tally(end, int(n_true[end]), end, None) for end in ends)
            return
        unit, before = self.unit[chosen], 0
        selected, true = np.zeros(self.n_units), np.zeros(self.n_units)
        for end in ends:
            selected += np.bincount(unit[before:end], minlength=self.n_units)
            true += np.bincount(unit[before:end], labels[before:end], minlength=self.n_units)
            before, seen = end, selected > 0
            n_units = int(seen.sum())
            by_unit = None if n_units == end else (selected[seen], true[seen])
            yield _Tally(end, int(n_true[end]), n_units, by_unit)


@dataclass(frozen=True)
class _Evidence:
    """What one cut's rows say of its precision, at one level. `share` is the precision observed, 0 without rows."""

    n: int
    n_true: int
    n_units: int
    n_effective: float
    share: float
    delta: float

    @classmethod
    def of(cls, tally: _Tally, delta: float) -> _Evidence:
        n_effective = float(tally.n) if tally.by_unit is None else _effective(*tally.by_unit, delta)
        share = tally.n_true / tally.n if tally.n else 0.0
        return cls(tally.n, tally.n_true, tally.n_units, n_effective, share, delta)

    @property
    def _counts(self) -> tuple[float, float]:
        """True and false rows that the sample is worth; whole numbers where it is worth all its rows."""
        if self.n_effective == self.n:
            return float(self.n_true), float(self.n - self.n_true)
        return self.share * self.n_effective, (1.0 - self.share) * self.n_effective

    @property
    def bound(self) -> float:
        """Lower Clopper-Pearson bound of the precision at 1 - delta; 0 without evidence."""
        true, false = self._counts
        return float(betaincinv(true, false + 1.0, self.delta)) if true > 0.0 else 0.0

    @property
    def upper_bound(self) -> float:
        """Upper Clopper-Pearson bound of the precision at 1 - delta; 1 without evidence."""
        true, false = self._counts
        return 1.0 - float(betaincinv(false, true + 1.0, self.delta)) if false > 0.0 else 1.0

    def p_value(self, target: float) -> float:
        """Probability of at least as many true rows if the precision were the target; at most delta iff the bound
        reaches it."""
        true, false = self._counts
        return float(betainc(true, false + 1.0, target)) if true > 0.0 else 1.0


def _test(threshold: float, cut: _Evidence, decision: Decision) -> Test:
    target, p_value = decision.target_precision, cut.p_value(decision.target_precision)
    # The binomial tail has judged; the quantile's last bit may not contradict it.
    below = math.nextafter(target, 0.0)
    bound = max(cut.bound, target) if p_value <= cut.delta else min(cut.bound, below)
    passed = p_value <= cut.delta and cut.n >= decision.min_selected
    return Test(threshold, cut.n, cut.n_true, cut.n_units, cut.n_effective, bound, p_value, passed)


def _effective(selected: Floats, true: Floats, delta: float) -> float:
    """Independent rows that these rows of units are worth. Shape: [U] rows by unit, each at least 1."""
    n, n_true = selected.sum(), true.sum()
    precision = n_true / n
    units = _evenness(selected)
    if len(selected) == 1:
        return 0.0
    # what leaving a unit out moves the precision by; of whole numbers, so that units that agree give 0
    residuals = (true * n - n_true * selected) / (n * (n - selected))
    variance = float((residuals**2).sum() * (len(selected) - 1) / len(selected))
    if variance <= 0.0:
        return min(units, n)
    freedom = min(units, _evenness(true), _evenness(selected - true)) - 1.0
    by_variance = precision * (1.0 - precision) / variance * _fewer(n - 1.0, freedom, delta)
    return float(min(max(by_variance, units * _fewer(n - 1.0, units - 1.0, delta)), n))


def _evenness(weights: Floats) -> float:
    """Kish's effective number of units: how many of equal weight would be as uneven as these; 0 of nothing."""
    total = weights.sum()
    return float(total**2 / (weights**2).sum()) if total > 0.0 else 0.0


def _fewer(rows: float, freedom: float, delta: float) -> float:
    """(t[rows] / t[freedom])^2 at level delta: what a variance of few degrees of freedom costs; 0 of none."""
    if freedom < 0.05:  # the quantile is beyond all measure
        return 0.0
    level = 1.0 - min(delta, 0.4)  # near the median there is no quantile to compare
    return float((stdtrit(rows, level) / stdtrit(freedom, level)) ** 2)


def _candidates(rows: _Rows, decision: Decision, n_rows: int | None) -> NDArray[np.float32]:
    """Thresholds of valid that may be tested, strict to loose: one about every 5 % of rows more."""
    n, least = len(rows.scores), decision.min_selected
    if n < least:
        return np.empty(0, np.float32)
    share = 1.0 if n_rows is None else n_rows / n
    safe = math.ceil((least + 2.0 * math.sqrt(least)) / share) if share > 0.0 else n
    low, high = range_of_logits(decision.range)
    descending = np.sort(rows.scores)[::-1]
    above, last = int((rows.scores > high).sum()), int((rows.scores >= low).sum())
    first = max(min(max(safe, least), n), above + 1)
    counts = []
    while first <= last:
        counts.append(first)
        first = max(first + 1, math.ceil(first * _RATIO))
    return np.unique(descending[np.array(counts, np.int64) - 1])[::-1]


def _assumptions(unit: str, rows: _Rows, test: Test | None) -> tuple[str, ...]:
    what = "rows" if unit == "row" else f"units ({unit})"
    found = [
        f"The {what} of calibrate are independent draws from the population that will be decided on, and that "
        "population stays as it is: drift after calibrate is not covered.",
        "Model and sequence of cuts were fixed before a label of calibrate was read, and nobody chose the model by "
        "an earlier certificate on the same rows.",
        "The precision promised is that of all selected rows together, not of every group, day or user.",
    ]
    if unit == "row":
        found.append("Rows do not hang together; given that, the tests are exact (binomial).")
    elif test is not None and test.n_units == test.n_selected:
        found.append(f"No {unit} is selected twice, so the tests are exact (binomial).")
    else:
        found.append(
            f"Rows of one {unit} may hang together in any way; the test of an effective sample size is an "
            "approximation for many units, rougher where a few of them hold most rows and the precision is near 1."
        )
        if test is not None and test.n_units < _FEW_UNITS:
            found.append(f"Only {test.n_units} units are behind the figures: the approximation is rough.")
    return tuple(found)


def _sentence(cut: _Evidence, target: float, confidence: float, kept: bool | None, refuted: bool) -> str:
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
