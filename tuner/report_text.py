"""The conclusion of a report, its verdict and what follows for the design, from an evaluation's document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.judged_metric import label_of
from tuner.report_findings import (
    UNRELATED,
    compared,
    counted,
    ends,
    excludes_zero,
    figure,
    idle,
    judged,
    listed,
    metric,
    names_of,
    pairs,
    percent,
    promise_on_test,
    registered,
    spread,
)

# A single feature that reaches this share of the nominee's PR-AUC may know the answer.
SUSPICIOUS_SHARE = 0.9


def asked(verdict: Mapping[str, Any]) -> str:
    """`at least +3 % relative` or `at least +0.03 in points`."""
    gain = verdict["min_gain"]
    return (
        f"at least +{percent(gain)} relative"
        if verdict["reading"] == "relative"
        else f"at least +{gain:g} in points"
    )


def deciding_gain(verdict: Mapping[str, Any]) -> tuple[str, str]:
    """The gain and the ends of its interval, in the reading that decides."""
    relative = verdict["reading"] == "relative"
    return ends(verdict["relative" if relative else "difference"], signed=True, share=relative)


def conclusion(document: Mapping[str, Any]) -> str:
    """One sentence with the key numbers."""
    where = "On simulated data, " if document["data"].get("simulated") else ""
    verdict = document["verdict"]
    said = _without_verdict(document) if verdict is None else _answer(document, verdict)
    sentence = where + (said if where else said[0].upper() + said[1:])
    return f"{sentence}; {_promise(document)}."


def _answer(document: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    arm, against, task = verdict["arm"], verdict["against"], document["task"]
    start = {
        "helps": f"training as {arm} helps to predict {task}",
        "does not": f"training as {arm} does not help to predict {task} enough",
        "undecided": f"it is undecided whether training as {arm} helps to predict {task}",
    }[verdict["outcome"]]
    ours, theirs = judged(document, arm), judged(document, against)
    values = f"{label_of(document)} {ends(ours)[0]} against {ends(theirs)[0]} of {against}"
    gain, between = deciding_gain(verdict)
    return (
        f"{start}: {values}, {gain} ({percent(document['confidence'])} interval {between}), where {asked(verdict)} "
        "was asked for"
    )


def _without_verdict(document: Mapping[str, Any]) -> str:
    arm = document["nominees"][0]["arm"] if document["nominees"] else next(iter(document["arms"]))
    return f"the arm {arm} reaches a {label_of(document)} of {spread(judged(document, arm))} on {document['task']}"


def _promise(document: Mapping[str, Any]) -> str:
    if not document["nominees"]:
        return "no model was nominated"
    nominee = registered(document)
    issued, check = nominee["certificate"], nominee["check"]
    target, confidence = figure(issued["target"]), percent(issued["confidence"])
    if issued["status"] != "certified":
        could = issued["certifiable_precision"]
        reach = "" if could is None else f" ({figure(could)} could be)"
        return (
            f"no threshold of {nominee['arm']} can be certified at a precision of {target} with confidence "
            f"{confidence}{reach}, so no decisions are issued"
        )
    kept = "" if check is None else f", a promise {promise_on_test(check)} on test"
    recall = percent(issued["recall"])
    whose = f" of {nominee['arm']}" if len(document["nominees"]) > 1 else ""
    return f"precision {target}{whose} is certified with confidence {confidence} at a recall of {recall}{kept}"


def former_answers(document: Mapping[str, Any]) -> list[str]:
    """What the same evaluation had answered before; one line, or none."""
    former = document.get("former", [])
    if not former:
        return []
    told = listed([f"{one['outcome'] or 'none'} with {one['seeds']} seeds" for one in former])
    return [
        f"This evaluation had answered before: {told}. It went on after test had been seen, which makes a decided "
        "answer likelier than its interval says."
    ]


def verdict_lines(document: Mapping[str, Any]) -> list[str]:
    """What stands behind the conclusion's answer, and what the search itself has brought."""
    verdict, lines = document["verdict"], []
    if verdict is None:
        lines.append("No verdict: the study names no two arms to compare, or one of them was left out.")
    else:
        lines.append(
            f"Both readings: relative {spread(verdict['relative'], signed=True, share=True)}, in points "
            f"{spread(verdict['difference'], signed=True)}; asked for was {asked(verdict)}, fixed before the "
            "evaluation."
        )
        if verdict["positives_needed"] is not None:
            lines.append(
                f"About {verdict['positives_needed']:,} positives more than the {verdict['n_positive']:,} of test "
                "would decide it, if the estimate stays where it is."
            )
        elif verdict["outcome"] == "undecided":
            lines.append(
                "More positives alone would not decide it: the gain is too close to what was asked for, or the "
                "seeds lie too far apart."
            )
        once = [arm for arm in (verdict["arm"], verdict["against"]) if _n_complete(document, arm) == 1]
        if once:
            lines.append(f"Trained with one seed, so that other seeds are not in the interval: {listed(once)}.")
    lines += former_answers(document)
    gain = document["tuning_gain"]
    if gain is not None:
        lines.append(
            f"Search: {gain['arm']} against its default configuration {spread(gain['difference'], signed=True)} "
            f"{label_of(document)}, relative {spread(gain['relative'], signed=True, share=True)}; on fresh data of "
            f"this size it beats the default with probability {figure(gain['fresh_probability'])}."
        )
    return lines


def _n_complete(document: Mapping[str, Any], arm: str) -> int:
    return sum(fit["state"] == "complete" for fit in document["arms"][arm]["fits"])


def implications(document: Mapping[str, Any]) -> list[str]:
    """What follows for the design; each from numbers of this evaluation."""
    return [
        *_on_arms(document), *_on_baselines(document), *_on_tuning(document), *_on_gradients(document),
        *_on_features(document), *_on_calibration(document), *_on_threshold(document), *_on_leak(document),
    ]  # fmt: skip


def _on_arms(document: Mapping[str, Any]) -> Iterator[str]:
    verdict = document["verdict"]
    if verdict is None:
        return
    low, _, high = deciding_gain(verdict)[1].partition(" to ")
    yield {
        "helps": f"Train as {verdict['arm']}: the gain over {verdict['against']} is at least {low}.",
        "does not": f"Stay with {verdict['against']}: {verdict['arm']} gains at most {high}, less than "
        "was asked for.",
        "undecided": f"Stay with {verdict['against']} until more data decide: the gain of {verdict['arm']} lies "
        f"between {low} and {high}.",
    }[verdict["outcome"]]  # fmt: skip
    for other in document["comparisons"]:
        if (
            other["against"] == verdict["against"]
            and other["arm"] != verdict["arm"]
            and other["difference"]["low"] > 0
        ):
            gain = spread(other["difference"], signed=True)
            yield f"{other['arm']} also beats {other['against']}, by {gain} {label_of(document)}."


def _on_baselines(document: Mapping[str, Any]) -> Iterator[str]:
    baselines = names_of(document, "baseline")
    for comparison in document["comparisons"]:
        if comparison["against"] not in baselines or comparison["against"] == "base_rate":
            continue
        if comparison["difference"]["high"] < 0:
            yield f"Consider {comparison['against']} instead: {compared(comparison)}"
        elif not excludes_zero(comparison["difference"]):
            ours, theirs = comparison["arm"], comparison["against"]
            yield f"Nothing speaks for {ours} over {theirs} here: {compared(comparison)}"


def _on_tuning(document: Mapping[str, Any]) -> Iterator[str]:
    gain = document["tuning_gain"]
    if gain is not None:
        worth = (
            "was worth its trials"
            if gain["difference"]["low"] > 0
            else "has not shown that it was worth its trials"
        )
        brought = spread(gain["difference"], signed=True)
        told = f"{brought} {label_of(document)}"
        yield f"The search {worth}: {told} over the default configuration of {gain['arm']}."


def _on_gradients(document: Mapping[str, Any]) -> Iterator[str]:
    cosine = document["gradient_cosine"]
    found = pairs(cosine) if cosine else []
    opposed = [f"{a} and {b}" for value, a, b in found if value < -UNRELATED]
    if opposed:
        yield f"Methods that mend conflicts of gradients have something to mend in {listed(opposed)}."
    elif found:
        least = figure(-UNRELATED)
        yield f"Methods that mend conflicts of gradients have nothing to mend: no cosine is below {least}."


def _on_features(document: Mapping[str, Any]) -> Iterator[str]:
    found = document["importance"]
    if found is None:
        return
    spare = [str(part["name"]) for part in found["groups"] if idle(part)]
    if spare:
        named = listed(spare[:8]) + (f" and {len(spare) - 8} more" if len(spare) > 8 else "")
        falls = f"Without it {label_of(document)} falls no more than seeds differ."
        yield f"Candidates for removal, each alone: {named}. {falls}"
    n_idle = sum(idle(part) for part in found["units"])
    if n_idle:
        units = counted(len(found["units"]), "shared unit")
        yield f"{n_idle} of {units} carry nothing for {document['task']} alone."


def _on_calibration(document: Mapping[str, Any]) -> Iterator[str]:
    if not document["reliability"]:
        return
    arm = document["reliability"]["arm"]
    raw, calibrated = (metric(document, arm, f"ece_{kind}") for kind in ("raw", "calibrated"))
    if raw and calibrated and calibrated["high"] < raw["low"]:
        yield (
            f"Use calibrated probabilities wherever they are multiplied with money; ranking needs raw logits alone "
            "(ECE "
            f"{figure(raw['value'])} before, {figure(calibrated['value'])} after)."
        )


def _on_threshold(document: Mapping[str, Any]) -> Iterator[str]:
    for nominee in document["nominees"]:
        issued, check = nominee["certificate"], nominee["check"]
        if issued["status"] != "certified":
            could = issued["certifiable_precision"]
            ask = "" if could is None else f" Ask for a precision of {figure(could)} or less, or bring more data."
            yield f"Do not act on {nominee['arm']} by threshold at a precision of {figure(issued['target'])}.{ask}"
        elif check is not None and check["kept"] is False:
            yield (
                f"Do not rely on the certificate of {nominee['arm']}: test fell short of it. Look for a drift "
                "between calibrate and test."
            )
        else:
            yield f"Select rows of {nominee['arm']} with a raw logit of at least {figure(issued['threshold'])}."


def _on_leak(document: Mapping[str, Any]) -> Iterator[str]:
    leak = document["leak"]
    if not leak or not leak["features"] or not document["nominees"]:
        return
    name, best = leak["features"][0]
    whole = document["nominees"][0]["valid_pr_auc"]
    if best is not None and whole and best >= SUSPICIOUS_SHARE * whole:
        yield (
            f"Look at {name} before anything else: alone it reaches a PR-AUC of {figure(best)} on valid, the whole "
            f"model {figure(whole)}; it may know the answer, or the others add little to it."
        )
