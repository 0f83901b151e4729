"""What the figures of a search's history show, in sentences computed from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner.report_findings import counted, figure, listed, setting
from tuner.space import Dimension
from tuner.summary import StudySummary, TrialSummary


def on_history(summary: StudySummary) -> list[str]:
    objective = summary.spec.objective
    complete = [t for t in summary.trials if t.state == "complete" and t.value is not None]
    if not complete:
        return ["No trial is complete."]
    sign = 1.0 if objective.direction == "maximize" else -1.0
    best = max(complete, key=lambda t: (sign * (t.value or 0.0), -t.number))
    sentences = [
        f"The best is trial {best.number} of {len(summary.trials)} ({best.arm}) with {figure(best.value)}."
    ]
    default = summary.defaults.get(best.arm)
    if (
        default is not None
        and default.value is not None
        and best.value is not None
        and default.number != best.number
    ):
        gain = figure(best.value - default.value, signed=True)
        sentences.append(
            f"That is {gain} against the default configuration of its arm, on the data it was chosen by."
        )
    after = sum(t.number > best.number for t in complete)
    sentences.append(f"{counted(after, 'complete trial')} after it brought nothing better.")
    sentences.append(
        f"{summary.n_feasible} of {counted(len(complete), 'complete trial')} met the constraint on valid."
    )
    return sentences


def on_parameters(shares: Mapping[str, float], n_trials: int) -> list[str]:
    ranked = list(shares.items())
    top = [f"{name} ({100 * share:.0f} %)" for name, share in ranked[:3]]
    total, n_most = 0.0, 0
    for _, share in ranked:
        total, n_most = total + share, n_most + 1
        if total >= 0.8:
            break
    return [
        f"Most of the difference goes with {listed(top)}; {n_most} of {counted(len(ranked), 'setting')} make up "
        f"four fifths of it, by {counted(n_trials, 'complete trial')}."
    ]


def on_parallel(best: Sequence[TrialSummary], axes: Sequence[Dimension]) -> list[str]:
    """Where the best trials agree."""
    narrow = []
    for axis in axes:
        values = [trial.params[axis.path] for trial in best if axis.path in trial.params]
        if not values:
            continue
        if axis.kind == "categorical":
            if len(set(map(str, values))) == 1 and len(values) > 1:
                narrow.append(f"{axis.path} = {setting(values[0])} in all {len(values)}")
        else:
            low, high = min(values), max(values)
            ends = setting(low) if low == high else f"{setting(low)} to {setting(high)}"
            narrow.append(f"{axis.path} {ends}")
    place = "best trial" if len(best) == 1 else f"{len(best)} best trials"
    return [f"In the {place}: {listed(narrow)}." if narrow else f"The {place} set none of these."]


def on_pruning(summary: StudySummary) -> list[str]:
    complete = [t.last_step + 1 for t in summary.trials if t.state == "complete" and t.last_step is not None]
    pruned = [t.last_step + 1 for t in summary.trials if t.state == "pruned" and t.last_step is not None]
    counts = summary.counts
    ended = f"{counts['complete']} trials are complete, {counts['pruned']} were pruned, {counts['failed']} failed."
    if not pruned or not complete:
        return [ended]
    mean, mean_pruned = sum(complete) / len(complete), sum(pruned) / len(pruned)
    saved = len(pruned) * (mean - mean_pruned)
    whole = sum(complete) + sum(pruned) + max(0.0, saved)
    return [
        ended,
        f"A pruned trial was trained for {mean_pruned:.1f} steps, a complete one for {mean:.1f}: had the pruned "
        f"ones gone on as long, the search would have cost {max(0.0, saved):.0f} steps more "
        f"({100 * max(0.0, saved) / whole:.0f} % "
        "of that).",
    ]
