"""The figures of an evaluation, made of its document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner import report_findings as findings
from tuner.figures import (
    AFTER,
    ARM_COLOURS,
    BEFORE,
    INK,
    SOFT,
    Bars,
    Curve,
    Curves,
    Figure,
    Heat,
    Missing,
    Panel,
    Reference,
    Series,
    arm_colours,
)
from tuner.judged_metric import chance, label_of, metric_of, value_on_valid

# At most so many groups of features, and shared units, have a bar of their own.
N_GROUPS, N_UNITS = 20, 20
PERCENTS = (1, 5, 10)


def verdict_figures(document: Mapping[str, Any]) -> list[Figure | Missing]:
    """In the order of the report: how the arms compare, why, and how far the chosen model may be trusted."""
    return [
        comparison(document),
        differences(document),
        top_k(document),
        training(document),
        gradients(document),
        importance(document),
        reliability(document),
        certificate(document),
    ]


def sample_text(document: Mapping[str, Any]) -> str:
    """`1,335,406 rows of test with 22,034 positives in 20,809 units (user_id)`."""
    sample = document["sample"]
    text = f"{sample['n_rows']:,} rows of {sample['role']} with {sample['n_positive']:,} positives"
    return text if sample["unit"] == "row" else f"{text} in {sample['n_units']:,} units ({sample['unit']})"


def interval_text(document: Mapping[str, Any]) -> str:
    return (
        f"{findings.percent(document['confidence'])} intervals from {document['n_replicates']:,} paired bootstrap "
        "replicates over units and seeds"
    )


def _interval_name(document: Mapping[str, Any]) -> str:
    return f"{findings.percent(document['confidence'])} interval"


def _metric_series(document: Mapping[str, Any], name: str, arms: Sequence[str], metric: str) -> dict[str, Any]:
    found = [document["arms"][arm]["metrics"].get(metric) or {} for arm in arms]
    return {
        "name": name,
        "values": [m.get("value") for m in found],
        "low": [m.get("low") for m in found],
        "high": [m.get("high") for m in found],
        "interval": _interval_name(document),
    }


def comparison(document: Mapping[str, Any]) -> Figure:
    """The judged metric of every model with its interval and its single seeds."""
    by, label = metric_of(document), label_of(document)
    arms, colours = list(document["arms"]), arm_colours(document["arms"])
    seeds = [(document["arms"][arm]["metrics"].get(by) or {}).get("per_seed") or [] for arm in arms]
    series = Series(
        **_metric_series(document, "", arms, by),
        colours=[colours[arm] for arm in arms],
        points=[values if len(values) > 1 else [] for values in seeds],
    )
    nothing = chance(document)
    called = "chance" if by == "roc_auc" else "base rate"
    panel = Bars(
        f"{label} on test", "Model", f"{label} ({document['task']})", arms, [series],
        reference=Reference(f"{called} {findings.figure(nothing)}", nothing),
    )  # fmt: skip
    caption = (
        f"{label} of {document['task']} on {sample_text(document)}. Bars are means over {document['seeds']} seeds "
        f"(baselines: one); {interval_text(document)}."
    )
    title = f"{label} of every model ({document['study']})"
    return Figure(f"{by}_comparison", title, caption, findings.on_comparison(document), [panel])


def differences(document: Mapping[str, Any]) -> Figure | Missing:
    """The gain of every arm over the verdict's baseline with its interval, beside what was asked for."""
    key, label = f"{metric_of(document)}_difference", label_of(document)
    title = f"Gain in {label} over the baseline arm ({document['study']})"
    verdict = document["verdict"]
    if verdict is None:
        return Missing(key, title, "the study names no two arms to compare, or one of them was left out")
    found = [c for c in document["comparisons"] if c["against"] == verdict["against"]]
    relative = verdict["reading"] == "relative"
    scale, reading = (100.0, "relative") if relative else (1.0, "difference")
    gains = {end: [scale * c[reading][end] for c in found] for end in ("value", "low", "high")}
    edges, places = (-0.6, len(found) - 0.4), [float(i) for i in range(len(found))]
    curves = [
        Curve("no difference", edges, (0.0, 0.0), INK, "line"),
        Curve(
            f"gain, {_interval_name(document)}", places, gains["value"], AFTER, "dot", gains["low"], gains["high"]
        ),
    ]
    gain = findings.percent(verdict["min_gain"]) if relative else findings.figure(verdict["min_gain"])
    panel = Curves(
        "Gain", "Model", f"Gain in {label} over {verdict['against']} ({'%' if relative else 'points'})", curves,
        x_range=edges, x_ticks={float(i): c["arm"] for i, c in enumerate(found)},
        reference=Reference(f"asked for: +{gain}", scale * verdict["min_gain"]),
    )  # fmt: skip
    caption = (
        f"Gain of each arm over {verdict['against']}, {'relative' if relative else 'in points'}; "
        f"{interval_text(document)}, the same units in every replicate; {sample_text(document)}."
    )
    return Figure(key, title, caption, findings.on_differences(document), [panel])


_AT_TOP = {
    "recall": ("Recall", "Share of positives found"),
    "capture": ("Capture of the largest", "Share of the true top found"),
    "revenue": ("Revenue", "Share of all money found"),
}


def top_k(document: Mapping[str, Any]) -> Figure:
    """What the highest 1, 5 and 10 % of the scores hold, for every model."""
    arms, colours, panels = list(document["arms"]), arm_colours(document["arms"]), []
    for kind, (title, measure) in _AT_TOP.items():
        names = [f"{kind}_at_{percent}pct" for percent in PERCENTS]
        if not any(document["arms"][arm]["metrics"].get(name) for arm in arms for name in names):
            continue
        series = []
        for arm in arms:
            found = [document["arms"][arm]["metrics"].get(name) or {} for name in names]
            ends = {end: [m.get(end) for m in found] for end in ("value", "low", "high")}
            series.append(
                Series(arm, ends["value"], colours[arm], ends["low"], ends["high"], _interval_name(document))
            )
        categories = [f"Top {percent} %" for percent in PERCENTS]
        panels.append(Bars(title, "Rows with the highest scores", measure, categories, series))
    caption = (
        f"Shares found among the 1, 5 and 10 % highest scores, {sample_text(document)}; {interval_text(document)}."
    )
    if len(panels) > 1:
        caption += (
            " Recall counts positives; capture compares the predicted with the true top k by amount; revenue is "
            "the share of all money."
        )
    title = f"What the highest scores capture ({document['study']})"
    return Figure("topk_capture", title, caption, findings.on_top_k(document), panels)


def training(document: Mapping[str, Any]) -> Figure | Missing:
    """Losses task by task and the judged metric on valid, over the steps of each arm's best seed."""
    key, title = "training_curves", f"Training of the best seed of every arm ({document['study']})"
    curves, colours = document["training"], arm_colours(document["arms"])
    if not any(curve["steps"] for curve in curves.values()):
        return Missing(key, title, "no measurements of the fits are stored")
    tasks = list(dict.fromkeys(task for curve in curves.values() for task in curve["loss"]))

    def lines(values_of: Any) -> list[Curve]:
        return [
            Curve(arm, curve["steps"], values, colours.get(arm, SOFT), "line" if len(curve["steps"]) > 1 else "dot")
            for arm, curve in curves.items()
            if (values := values_of(curve)) and any(value is not None for value in values)
        ]

    panels: list[Panel] = [
        Curves(f"Training loss: {task}", "Step", "Loss", lines(lambda curve, task=task: curve["loss"].get(task)))
        for task in tasks
    ]
    valid, label = lines(lambda curve: value_on_valid(document, curve)), label_of(document)
    if valid:
        panels.append(Curves(f"{document['task']} on valid", "Step", f"{label} (valid)", valid))
    whose = f"of the seed of each arm with the highest {label} on valid (n = {len(curves)} fits)"
    caption = f"{label} on valid after every step, {whose}."
    if tasks:
        caption = (
            f"Mean training loss per task and step, unweighted, {whose}. Fits of one task have the same unit of "
            "loss only where their loss function is the same."
        )
    return Figure(key, title, caption, findings.on_training(document), panels)


def gradients(document: Mapping[str, Any]) -> Figure | Missing:
    key, title = "gradient_conflict", f"Do the tasks' gradients agree? ({document['study']})"
    cosine = document["gradient_cosine"]
    if cosine is None:
        return Missing(key, title, "no evaluated arm trains several tasks, so no two gradients can be compared")
    panel = Heat(
        "Cosine of task gradients", "Task", "Task", cosine["tasks"], cosine["matrix"],
        "Cosine (–1 opposed, 0 unrelated, 1 aligned)",
    )  # fmt: skip
    caption = (
        f"Mean cosine between the tasks' gradients with respect to the last shared layer, before weighting, over "
        f"all steps of the fits of {cosine['arm']}."
    )
    return Figure(key, title, caption, findings.on_gradients(document), [panel])


def importance(document: Mapping[str, Any]) -> Figure | Missing:
    key, title = "shared_repr_analysis", f"What the representation rests on ({document['study']})"
    found = document["importance"]
    if found is None or not (found["groups"] or found["units"]):
        return Missing(key, title, "nothing was ablated")
    n_seeds = max(len(part["per_seed"]) for part in (*found["groups"], *found["units"]))
    panels = []
    for parts, most, name, label in (
        (found["groups"], N_GROUPS, "Without a group of features", "Group of features"),
        (found["units"], N_UNITS, "Without a shared unit", "Unit of the last shared layer"),
    ):
        if parts:
            shown = sorted(parts, key=lambda part: -part["drop"])[:most]
            more = f" (the {len(shown)} largest of {len(parts)})" if len(parts) > len(shown) else ""
            colour = AFTER if label.startswith("Group") else ARM_COLOURS[2]
            panels.append(_drops(shown, name + more, label, label_of(document), colour))
    left_out = [
        *(["when a group of features is replaced by its mean, or unknown"] if found["groups"] else []),
        *(["when one shared unit is set to its mean"] if found["units"] else []),
    ]
    caption = (
        f"Drop of the {label_of(document)} on {found['role']} {', and '.join(left_out)}; {found['arm']}, mean and "
        f"standard deviation over {findings.counted(n_seeds, 'seed')}."
    )
    return Figure(key, title, caption, findings.on_importance(document), panels)


def _drops(parts: Sequence[Mapping[str, Any]], title: str, label: str, measure: str, colour: str) -> Bars:
    drops = [part["drop"] for part in parts]
    spread = [part["sd"] for part in parts]
    ends: dict[str, Any] = {}
    if any(sd is not None for sd in spread):
        ends = {
            "low": [None if sd is None else drop - sd for drop, sd in zip(drops, spread, strict=True)],
            "high": [None if sd is None else drop + sd for drop, sd in zip(drops, spread, strict=True)],
            "interval": "± 1 standard deviation over seeds",
        }
    names = [str(part["name"]) for part in parts]
    series = Series(label, drops, colour, **ends)
    return Bars(title, label, f"Drop of {measure}", names, [series], horizontal=True)


def reliability(document: Mapping[str, Any]) -> Figure | Missing:
    key, title = "reliability", f"Do the probabilities keep their word? ({document['study']})"
    found = document["reliability"]
    if not found or not (found["raw"] or found["calibrated"]):
        return Missing(key, title, "no scores were calibrated")
    bins = [*found["raw"], *found["calibrated"]]
    ends = [b["predicted"] for b in bins if b["predicted"] > 0] + [b["high"] for b in bins]
    log = min(ends) * 20 < max(ends)  # most bins would crowd in a corner
    low = min([*ends, *(b["observed"] for b in bins if b["observed"] > 0)]) / 1.6 if log else 0.0
    limits = (low, min(1.0, max(ends) * 1.25) if log else max(ends) * 1.05)
    panels = [
        _reliability_panel(found[kind], name, colour, limits, log)
        for kind, name, colour in (
            ("raw", "Before calibration", BEFORE),
            ("calibrated", "After calibration", AFTER),
        )
        if found[kind]
    ]
    n = sum(b["count"] for b in (found["calibrated"] or found["raw"]))
    zeros = any(b["observed"] <= 0 for b in bins)
    caption = (
        f"Observed against predicted rate in {len(found['calibrated'] or found['raw'])} bins of equal mass, {n:,} "
        f"rows of {found['role']}; fit {found['number']} of {found['arm']}; 95 % intervals over the unit "
        f"{document['sample']['unit']}."
        + (" A bin without a positive is drawn at the lower edge." if log and zeros else "")
        + (" Both axes are logarithmic." if log else "")
    )
    return Figure(key, title, caption, findings.on_reliability(document), panels)


def _reliability_panel(
    bins: Sequence[Mapping[str, Any]], title: str, colour: str, limits: tuple[float, float], log: bool
) -> Curves:
    floor = limits[0]
    curves = [
        Curve("perfect calibration", list(limits), list(limits), SOFT, "dash"),
        Curve(
            title.lower() + ", 95 % interval",
            [max(b["predicted"], floor) for b in bins],
            [max(b["observed"], floor) for b in bins],
            colour,
            "dot",
            [max(b["low"], floor) for b in bins],
            [b["high"] for b in bins],
            hints=[f"{b['count']:,} rows" for b in bins],
        ),
    ]
    return Curves(title, "Predicted rate", "Observed rate", curves, log, log, limits, limits)


def certificate(document: Mapping[str, Any]) -> Figure | Missing:
    """The cuts that were tested, strict to loose, and what was promised."""
    key, title = "certificate", f"The threshold's certificate ({document['study']})"
    panels = [_certificate_panel(nominee) for nominee in document["nominees"] if nominee["certificate"]["tested"]]
    if not panels:
        return Missing(key, title, "no cut was tested")
    first = document["nominees"][0]["certificate"]
    caption = (
        f"Precision of each cut on calibrate ({first['n_rows']:,} rows, unit {first['unit']}), with its lower "
        f"bound at confidence {findings.percent(first['confidence'])}. Cuts were fixed on valid and tested "
        "from strict to loose; the first that fails ends the sequence."
    )
    return Figure(key, title, caption, findings.on_certificate(document), panels)


def _certificate_panel(nominee: Mapping[str, Any]) -> Curves:
    issued, check = nominee["certificate"], nominee["check"]
    curves = []
    for passed, colour, word in ((True, AFTER, "passed"), (False, BEFORE, "failed")):
        tests = [test for test in issued["tested"] if test["passed"] is passed]
        if tests:
            observed = [test["n_true"] / test["n_selected"] if test["n_selected"] else None for test in tests]
            curves.append(
                Curve(
                    f"precision down to its lower bound, {word}",
                    [test["n_selected"] for test in tests],
                    observed,
                    colour,
                    "dot",
                    [test["bound"] for test in tests],
                    observed,
                    hints=[f"{test['n_true']:,} of {test['n_selected']:,} true" for test in tests],
                )
            )
    chosen = next((t for t in issued["tested"] if t["passed"] and t["threshold"] == issued["threshold"]), None)
    if chosen is not None:
        curves.append(Curve("certified cut (bound)", [chosen["n_selected"]], [chosen["bound"]], INK, "hollow"))
    if check is not None and check["precision"] is not None:
        place = issued["n_selected"]
        curves.append(Curve("the same threshold on test", [place], [check["precision"]], ARM_COLOURS[3], "dot"))
    counts = [test["n_selected"] for test in issued["tested"] if test["n_selected"]]
    return Curves(
        str(nominee["arm"]), "Rows selected on calibrate", "Precision", curves,
        x_log=max(counts) > 200 * min(counts), x_range=(0.0, 2.0 * counts[0]) if len(set(counts)) == 1 else None,
        reference=Reference(f"target {findings.figure(issued['target'])}", issued["target"]),
    )  # fmt: skip
