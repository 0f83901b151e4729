"""What each figure of a report shows, in sentences computed from the numbers of an evaluation's document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.judged_metric import chance, label_of, metric_of, value_on_valid

# Two gradients whose cosine is nearer to 0 than this have little to do with each other.
UNRELATED = 0.05
_KINDS = {"recall": "of the positives", "capture": "of the largest amounts", "revenue": "of the money"}

# --- how numbers are written -----------------------------------------------------------------------------------


def figure(value: float | None, signed: bool = False) -> str:
    """Four significant digits, a true minus sign."""
    if value is None:
        return "–"
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text.replace("-", "−") if "e" not in text else text


def percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.4g}"
    return text.replace("-", "−") + "\u00a0%"


def spread(interval: Mapping[str, Any] | None, signed: bool = False, share: bool = False) -> str:
    """`0.0601 (0.0580 to 0.0622)`: a value and the ends of its interval, with two digits of the interval's half."""
    if interval is None or interval.get("value") is None:
        return "–"
    value, low, high = (interval.get(end) for end in ("value", "low", "high"))
    if low is None or high is None:
        return percent(value, signed) if share else figure(value, signed)
    scale, unit = (100.0, "\u00a0%") if share else (1.0, "")
    half = scale * (high - low) / 2
    digits = 1 if share else 4
    if half > 1e-6 * scale * max(abs(value), 1e-6):  # less is rounding, no interval
        digits = min(8, max(0, 1 - math.floor(math.log10(half))))
    write = [f"{scale * x:{'+' if signed else ''}.{digits}f}".replace("-", "−") + unit for x in (value, low, high)]
    return f"{write[0]} ({write[1]} to {write[2]})"


def ends(interval: Mapping[str, Any] | None, signed: bool = False, share: bool = False) -> tuple[str, str]:
    """`spread` in two parts: the value, and `0.0580 to 0.0622`."""
    value, _, rest = spread(interval, signed, share).partition(" (")
    return value, rest.removesuffix(")")


def setting(value: Any) -> str:
    """A value of a configuration."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false"}.get(value, "null")
    return figure(value) if isinstance(value, float) else str(value)


def counted(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def metric(document: Mapping[str, Any], arm: str, name: str) -> Mapping[str, Any] | None:
    """A metric of an arm; None where the arm has none, or no value of it."""
    found = document["arms"][arm]["metrics"].get(name)
    return found if found and found.get("value") is not None else None


def judged(document: Mapping[str, Any], arm: str) -> Mapping[str, Any] | None:
    """The metric of an arm that models are judged by."""
    return metric(document, arm, metric_of(document))


def excludes_zero(interval: Mapping[str, Any]) -> bool:
    return interval["low"] > 0 or interval["high"] < 0


def names_of(document: Mapping[str, Any], *kinds: str) -> list[str]:
    return [name for name, arm in document["arms"].items() if arm["kind"] in kinds]


def registered(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nominee that becomes the model: the first that is certified, else the first."""
    certified = (n for n in document["nominees"] if n["certificate"]["status"] == "certified")
    return next(certified, document["nominees"][0])


# --- figures of the evaluation ---------------------------------------------------------------------------------


def on_comparison(document: Mapping[str, Any]) -> list[str]:
    arms = [(name, found) for name in document["arms"] if (found := judged(document, name))]
    if not arms:
        return [f"No model has a {label_of(document)}."]
    best, found = max(arms, key=lambda item: item[1]["value"])
    nothing = chance(document)
    against = f", {found['value'] / nothing:.1f} times the base rate" if nothing else ""
    if metric_of(document) == "roc_auc":
        against = f", {figure(found['value'] - nothing)} above chance"
    sentences = [f"Highest is {best} with {spread(found)}{against}."]
    baselines = names_of(document, "baseline")
    told = (c for c in document["comparisons"] if c["against"] in baselines and c["against"] != "base_rate")
    return [*sentences, *map(compared, told)]


def on_differences(document: Mapping[str, Any]) -> list[str]:
    against = document["verdict"]["against"]
    return [compared(c) for c in document["comparisons"] if c["against"] == against]


def compared(comparison: Mapping[str, Any]) -> str:
    """Which of two models is ahead, by how much, and whether chance alone could do it."""
    difference, relative = comparison["difference"], comparison["relative"]
    place = "ahead of" if difference["value"] > 0 else "level with" if difference["value"] == 0 else "behind"
    verb = "excludes" if excludes_zero(difference) else "includes"
    return (
        f"{comparison['arm']} is {place} {comparison['against']} by {spread(difference, signed=True)}, relative "
        f"{spread(relative, signed=True, share=True)}: the interval {verb} 0."
    )


def on_top_k(document: Mapping[str, Any]) -> list[str]:
    sentences = []
    for kind, of_what in _KINDS.items():
        name = f"{kind}_at_1pct"
        found = [(arm, value) for arm in document["arms"] if (value := metric(document, arm, name))]
        if not found:
            continue
        found.sort(key=lambda item: -item[1]["value"])
        best, top = found[0]
        text = f"In its top 1 % {best} finds {spread(top, share=True)} {of_what}"
        if len(found) > 1:
            second, value = found[1]
            apart = value["high"] < top["low"]
            text += f", next {second} with {percent(value['value'])}"
            text += "; their intervals do not meet" if apart else "; their intervals overlap"
        deep = metric(document, best, f"{kind}_at_10pct")
        text += f". In the top 10 % {best} has {percent(deep['value'])}." if deep else "."
        sentences.append(text)
    return sentences or ["No model has shares at the top."]


def on_training(document: Mapping[str, Any]) -> list[str]:
    sentences = []
    for arm, curve in document["training"].items():
        values = value_on_valid(document, curve) or ()
        valid = [(step, v) for step, v in zip(curve["steps"], values, strict=False) if v is not None]
        if not valid:
            continue
        step, best = max(valid, key=lambda point: point[1])
        lost = best - valid[-1][1]
        after = f" and has lost {figure(lost)} by its last" if lost > 0 else ", its last"
        sentences.append(f"{arm} is best at step {step} of 0 to {curve['steps'][-1]} ({figure(best)}){after}.")
    rising = sorted(
        f"{task} in {arm}"
        for arm, curve in document["training"].items()
        for task, loss in curve["loss"].items()
        if (known := [v for v in loss if v is not None]) and len(known) > 1 and known[-1] > known[0]
    )
    if rising:
        sentences.append(f"The training loss ends higher than it began for {listed(rising)}.")
    elif any(curve["loss"] for curve in document["training"].values()):
        sentences.append("Every training loss ends below where it began.")
    return sentences or ["Nothing was measured on valid."]


def pairs(cosine: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Every two tasks with their cosine, the most opposed first."""
    tasks, matrix = cosine["tasks"], cosine["matrix"]
    found = [
        (matrix[i][j], a, tasks[j])
        for i, a in enumerate(tasks)
        for j in range(i + 1, len(tasks))
        if matrix[i][j] is not None
    ]
    return sorted(found)


def on_gradients(document: Mapping[str, Any]) -> list[str]:
    found = pairs(document["gradient_cosine"])
    if not found:
        return ["No two tasks could be compared."]
    opposed = [f"{a} and {b} ({figure(c)})" for c, a, b in found if c < -UNRELATED]
    aligned = [f"{a} and {b} ({figure(c)})" for c, a, b in reversed(found) if c > UNRELATED]
    n_between = len(found) - len(opposed) - len(aligned)
    sentences = [
        f"{listed(opposed)} pull against each other." if opposed else
        f"No two tasks pull against each other: the lowest cosine is {figure(found[0][0])}, of {found[0][1]} and "
        f"{found[0][2]}."
    ]  # fmt: skip
    if aligned:
        sentences.append(f"{listed(aligned)} pull the same way.")
    if n_between:
        pairs_text = counted(n_between, "pair")
        sentences.append(f"{pairs_text} of {len(found)} {'is' if n_between == 1 else 'are'} nearly unrelated.")
    return sentences


def mean_valid(document: Mapping[str, Any], arm: str) -> float | None:
    """Mean of the judged metric on valid over an arm's complete fits."""
    values = [value_on_valid(document, fit) for fit in document["arms"][arm]["fits"]]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def idle(part: Mapping[str, Any]) -> bool:
    """Whether what is lost without a part is no more than its spread over seeds, or nothing."""
    return part["drop"] <= (part["sd"] or 0.0)


def on_importance(document: Mapping[str, Any]) -> list[str]:
    found, sentences = document["importance"], []
    whole, what = mean_valid(document, found["arm"]), "the whole"
    if whole and metric_of(document) == "roc_auc":
        whole, what = whole - chance(document), "what is above chance"
    for parts, one, many in ((found["groups"], "group", "groups"), (found["units"], "shared unit", "shared units")):
        if not parts:
            continue
        ranked = sorted(parts, key=lambda part: -part["drop"])
        first = ranked[0]
        share = f", {percent(first['drop'] / whole)} of {what}" if whole and whole > 0 else ""
        name = first["name"] if one == "group" else f"unit {first['name']}"
        lost = f"Without {name} {figure(first['drop'])} of {label_of(document)} is lost{share}"
        if len(ranked) > 1 and one == "group":
            lost += f", next {ranked[1]['name']} with {figure(ranked[1]['drop'])}"
        n_idle = sum(idle(part) for part in parts)
        sentences.append(
            f"{lost}; {n_idle} of {counted(len(parts), one, many)} cost no more than their spread over seeds."
        )
    return sentences


def on_reliability(document: Mapping[str, Any]) -> list[str]:
    arm, sentences = document["reliability"]["arm"], []
    for name, words in (("ece", "expected calibration error"), ("brier", "Brier score"), ("log_loss", "log loss")):
        raw, calibrated = metric(document, arm, f"{name}_raw"), metric(document, arm, f"{name}_calibrated")
        if raw and calibrated:
            better = "falls" if calibrated["value"] < raw["value"] else "does not fall"
            sentences.append(
                f"By calibration the {words} of {arm} {better}: {spread(raw)} before, {spread(calibrated)} after."
            )
    chosen = document["arms"][arm]["calibration"]["chosen"]
    sentences.append(f"Chosen on valid: {chosen}.")
    bins = document["reliability"]["calibrated"]
    outside = sum(not b["low"] <= b["predicted"] <= b["high"] for b in bins)
    if bins:
        sentences.append(
            f"After it {len(bins) - outside} of {len(bins)} bins hold their prediction in the interval."
        )
    return sentences


def on_certificate(document: Mapping[str, Any]) -> list[str]:
    sentences = []
    for nominee in document["nominees"]:
        issued = nominee["certificate"]
        tested, target = issued["tested"], issued["target"]
        passed = [test for test in tested if test["passed"]]
        text = f"{nominee['arm']}: {len(passed)} of {counted(len(tested), 'tested cut')} passed"
        if passed:
            text += f", from {passed[0]['n_selected']:,} to {passed[-1]['n_selected']:,} selected rows"
        if len(passed) < len(tested):
            failed = tested[len(passed)]
            short = figure(target - failed["bound"])
            bound = figure(failed["bound"])
            text += f"; at {failed['n_selected']:,} rows the bound {bound} is {short} short of the target"
        sentences.append(f"{text}.")
    return sentences


def certified(nominee: Mapping[str, Any]) -> str:
    """Whether the target was reachable for a nominee, and whether it was kept on unseen rows."""
    issued, check = nominee["certificate"], nominee["check"]
    target, confidence = figure(issued["target"]), percent(issued["confidence"])
    if issued["status"] != "certified":
        could = issued["certifiable_precision"]
        most = "" if could is None else f": the most that could be certified is {figure(could)}"
        alone = _by_rows([issued["tested"][0].get("bound_rows")] if issued["tested"] else [])
        return (
            f"A precision of {target} was not reachable for {nominee['arm']} on calibrate with confidence "
            f"{confidence}{most}{alone}. Nothing is selected.{_not_issued(nominee)}"
        )
    text = (
        f"{nominee['arm']} is certified at logit {figure(issued['threshold'])}: a precision of {target} was "
        f"reachable on calibrate with confidence {confidence} (lower bound {figure(issued['bound'])}"
        f"{_by_rows([issued.get('bound_rows')])}). There {issued['n_true']:,} of {issued['n_selected']:,} selected "
        f"rows{_over(issued)} are true, precision {figure(issued['precision'])}, recall {figure(issued['recall'])}."
    )
    if check is None:
        return f"{text} It was not checked on test."
    if check["kept"] is None:
        return f"{text} On test nothing is selected, so nothing is known there."
    found = f", recall {_share(check, 'recall')}"
    found += f", F1 {_share(check, 'f1')}" if check.get("f1") is not None else ""
    return (
        f"{text} On test the promise is {promise_on_test(check)}: {check['n_true']:,} of {check['n_selected']:,} "
        f"selected rows{_over(check)} are true, precision {_precision(check)}{found}."
    )


def _not_issued(nominee: Mapping[str, Any]) -> str:
    """What became of the threshold that the search had chosen, where none is certified."""
    if "not_issued" not in nominee:
        return ""
    found = nominee["not_issued"]
    if found is None:
        return " The search had no threshold either."
    valid, test = found["valid"], found["test"]
    text = (
        f" The threshold of the search, not issued, had a precision of {figure(valid['precision'])} on valid "
        f"({counted(round(valid['n_selected']), 'row')})"
    )
    if test["kept"] is None:
        return f"{text} and selects nothing on test."
    return (
        f"{text}; on test it has {_precision(test)}, {test['n_true']:,} of {counted(test['n_selected'], 'row')}"
        f"{_over(test)}: the target is {promise_on_test(test)} there."
    )


def _precision(check: Mapping[str, Any]) -> str:
    told = spread({"value": check["precision"], "low": check["low"], "high": check["high"]})
    return told + _by_rows([check.get("low_rows"), check.get("high_rows")])


def _share(check: Mapping[str, Any], name: str) -> str:
    """Recall or F1 with its interval, if it has one."""
    ends = {end: check.get(f"{name}_{end}") for end in ("low", "high")}
    return figure(check[name]) if ends["low"] is None else spread({"value": check[name], **ends})


def _over(found: Mapping[str, Any]) -> str:
    """` on 31 of 240 days and 80 of 400 stocks`; nothing where rows are of no groups."""
    groups = found.get("groups") or {}
    told = [f"{group['n_selected']:,} of {counted(group['n'], name)}" for name, group in groups.items()]
    return f" on {listed(told)}" if told else ""


def _by_rows(ends: Sequence[float | None]) -> str:
    """What a bound, or an interval, were if every row were a unit of its own."""
    known = [figure(end) for end in ends if end is not None]
    return f" [by rows alone {' to '.join(known)}, for comparison only]" if known else ""


def promise_on_test(check: Mapping[str, Any]) -> str:
    """`kept` or `broken`; a miss that chance alone could explain is called so."""
    if check["kept"] is None:
        return "not tried (nothing is selected)"
    if check["kept"]:
        return "kept"
    return "broken" if check["refuted"] else "broken (by no more than chance could explain)"
