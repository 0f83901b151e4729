"""The figures of a search's history, made of its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.trainer import Objective
from tuner import report_search as findings
from tuner.figures import (
    ARM_COLOURS,
    INK,
    SOFT,
    Bars,
    Curve,
    Curves,
    Figure,
    Missing,
    Series,
)
from tuner.optuna_importance import MIN_TRIALS, parameter_importance
from tuner.report_findings import figure, setting
from tuner.space import Dimension
from tuner.summary import StudySummary, TrialSummary

N_IMPORTANCES, N_AXES, N_LINES = 20, 7, 200
_STATE_COLOURS = {"complete": "#7A8794", "pruned": "#E69F00", "failed": "#D55E00"}
_UNSET = -0.16  # where a value stands that was not searched in its trial


def search_figures(summary: StudySummary) -> list[Figure | Missing]:
    """How the search went, what mattered to it, and what pruning saved."""
    shares = importances(summary)
    return [history(summary), importance(summary, shares), parallel(summary, shares), pruning(summary)]


def importances(summary: StudySummary) -> dict[str, float]:
    trials = [(trial.params, trial.value) for trial in _complete(summary) if trial.value is not None]
    return parameter_importance(trials, summary.spec.space.dimensions, summary.spec.objective)


def _complete(summary: StudySummary) -> list[TrialSummary]:
    return [trial for trial in summary.trials if trial.state == "complete" and trial.value is not None]


def history(summary: StudySummary) -> Figure | Missing:
    """The objective of every trial, and the best so far."""
    key, title = "optimisation_history", f"Optimisation history ({summary.name})"
    ended = [t for t in summary.trials if t.state in ("complete", "pruned") and t.value is not None]
    if not ended:
        return Missing(key, title, "no trial has a value")
    objective, curves = summary.spec.objective, []
    for index, arm in enumerate(summary.spec.arms):
        colour = ARM_COLOURS[index % len(ARM_COLOURS)]
        of_arm = [t for t in ended if t.arm == arm and t.state == "complete"]
        if of_arm:
            curves.append(_dots(arm, of_arm, colour, "dot"))
    pruned = [t for t in ended if t.state == "pruned"]
    if pruned:
        curves.append(_dots("pruned (best step so far)", pruned, SOFT, "hollow"))
    complete = _complete(summary)
    if complete:
        best = _running_best([t.value or 0.0 for t in complete], objective)
        numbers = [t.number for t in complete]
        curves.append(Curve("best so far", *_steps(numbers, best, ended[-1].number), INK, "line"))
    panel = Curves("Objective by trial", "Trial", objective.metric, curves)
    caption = (
        f"{objective.metric} ({objective.direction}) of the best step of each of {len(ended)} trials; the line is "
        f"the best of all complete trials so far, feasible or not."
    )
    return Figure(key, title, caption, findings.on_history(summary), [panel])


def _dots(name: str, trials: Sequence[TrialSummary], colour: str, mark: Any) -> Curve:
    hints = [f"trial {t.number}, {t.arm}, step {t.step}" for t in trials]
    return Curve(name, [t.number for t in trials], [t.value for t in trials], colour, mark, hints=hints)


def _running_best(values: Sequence[float], objective: Objective) -> list[float]:
    better = max if objective.direction == "maximize" else min
    found: list[float] = []
    for value in values:
        found.append(value if not found else better(found[-1], value))
    return found


def _steps(numbers: Sequence[int], best: Sequence[float], last: int) -> tuple[list[float], list[float]]:
    """A line that stays until something better comes."""
    x: list[float] = [numbers[0]]
    y: list[float] = [best[0]]
    for number, value in zip(numbers[1:], best[1:], strict=True):
        if value != y[-1]:
            x += [number, number]
            y += [y[-1], value]
    return [*x, max(last, numbers[-1])], [*y, y[-1]]


def importance(summary: StudySummary, shares: Mapping[str, float]) -> Figure | Missing:
    key, title = "importance", f"Which settings mattered ({summary.name})"
    n_complete = len(_complete(summary))
    if not shares:
        reason = f"it takes {MIN_TRIALS} complete trials whose searched values and objectives differ"
        return Missing(key, title, f"{reason}; there are {n_complete} complete trials")
    names = list(shares)[:N_IMPORTANCES]
    more = f"; the {len(names)} largest of {len(shares)}" if len(shares) > len(names) else ""
    series = Series("share of importance", [shares[name] for name in names], ARM_COLOURS[0])
    panel = Bars("Importance", "Searched setting", "Importance (share)", names, [series], horizontal=True)
    caption = (
        f"How much each searched setting separates the best fifth of the trials from the rest (PED-ANOVA, shares "
        f"sum to 1), {n_complete} complete trials of all arms{more}. With few trials such shares are rough."
    )
    return Figure(key, title, caption, findings.on_parameters(shares, n_complete), [panel])


# --- parallel coordinates --------------------------------------------------------------------------------------


def parallel(summary: StudySummary, shares: Mapping[str, float]) -> Figure | Missing:
    """Every complete trial as a line over the settings that mattered most; the best tenth stands out."""
    key, title = "parallel_coordinates", f"Settings of the trials ({summary.name})"
    complete, dimensions = _complete(summary), summary.spec.space.dimensions
    if len(complete) < 2 or not dimensions:
        return Missing(
            key, title, f"it takes two complete trials and a searched setting; there are {len(complete)}"
        )
    order = {path: index for index, path in enumerate(shares)}
    axes = sorted(dimensions, key=lambda d: order.get(d.path, len(order)))[:N_AXES]
    sign = -1.0 if summary.spec.objective.direction == "maximize" else 1.0
    ranked = sorted(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    n_best = max(1, math.ceil(len(ranked) / 10))
    shown = ranked[:N_LINES]
    values = [trial.value or 0.0 for trial in shown]
    ends = min(values), max(values)
    curves = [
        _bundle("other trials", shown[n_best:], axes, ends, SOFT, faint=True),
        _bundle(f"best tenth ({n_best} of {len(ranked)})", shown[:n_best], axes, ends, ARM_COLOURS[1]),
    ]
    names = {float(i): axis.path for i, axis in enumerate(axes)} | {float(len(axes)): summary.spec.objective.metric}
    texts = [text for i, axis in enumerate(axes) for text in _axis_texts(i, axis, shown)]
    texts += [(len(axes), -0.07, figure(ends[0])), (len(axes), 1.07, figure(ends[1]))]
    order_told, most = (", from the most important", "the {} most important") if shares else ("", "{}")
    panel = Curves(
        "Settings", f"Setting{order_told}; last the objective", "Place between lowest and highest",
        [curve for curve in curves if curve.x], x_range=(-0.4, len(axes) + 0.4), y_range=(-0.28, 1.16),
        x_ticks=names, y_ticks={_UNSET: "not set", 0.0: "low", 1.0: "high"}, texts=texts,
    )  # fmt: skip
    more = f" (the best {len(shown)} of {len(ranked)})" if len(shown) < len(ranked) else ""
    caption = (
        f"One line for each complete trial{more} over {most.format(len(axes))} of {len(dimensions)} searched "
        "settings; logarithmic where the search was. “Not set”: the setting plays no part in that trial."
    )
    return Figure(key, title, caption, findings.on_parallel(shown[:n_best], axes), [panel])


def _bundle(
    name: str, trials: Sequence[TrialSummary], axes: Sequence[Dimension], ends: tuple[float, float], colour: str,
    faint: bool = False,
) -> Curve:  # fmt: skip
    """Lines of several trials as one curve: a gap after each."""
    x: list[float] = []
    y: list[float | None] = []
    hints: list[str] = []
    for trial in trials:
        places = [_place(axis, trial.params[axis.path]) if axis.path in trial.params else _UNSET for axis in axes]
        span = ends[1] - ends[0]
        places.append(((trial.value or 0.0) - ends[0]) / span if span > 0 else 0.5)
        said = [setting(trial.params.get(axis.path, "not set")) for axis in axes]
        x += [*map(float, range(len(places))), float(len(places) - 1)]
        y += [*places, None]
        hints += [f"trial {trial.number} ({trial.arm}): {text}" for text in (*said, figure(trial.value), "")]
    return Curve(name, x, y, colour, "line", faint=faint, hints=hints)


def _place(axis: Dimension, value: Any) -> float:
    """0 at the low end of a dimension, 1 at the high one."""
    if axis.kind == "categorical":
        return axis.choices.index(value) / max(1, len(axis.choices) - 1)
    low, high, value = (float(axis.low), float(axis.high), float(value))  # type: ignore[arg-type]
    if axis.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _axis_texts(i: int, axis: Dimension, _: Sequence[TrialSummary]) -> list[tuple[float, float, str]]:
    if axis.kind != "categorical":
        ends = ((-0.07, axis.low), (1.07, axis.high))
        return [(i, place, setting(value)) for place, value in ends]
    last = max(1, len(axis.choices) - 1)
    texts = []
    for n, choice in enumerate(axis.choices):
        place = n / last
        outside = -0.07 if n == 0 else 1.07 if n == last else place
        texts.append((float(i), outside, setting(choice)))
    return texts


# --- pruning ---------------------------------------------------------------------------------------------------


def pruning(summary: StudySummary) -> Figure | Missing:
    """How trials ended in each arm, and how many steps each was given."""
    key, title = "pruning", f"What pruning saved ({summary.name})"
    ran = [t for t in summary.trials if t.state in ("complete", "pruned", "failed")]
    if not ran:
        return Missing(key, title, "no trial has ended")
    arms = list(summary.spec.arms)
    states = [s for s in ("complete", "pruned", "failed") if any(t.state == s for t in ran)]
    series = [
        Series(state, [sum(t.arm == arm and t.state == state for t in ran) for arm in arms], _STATE_COLOURS[state])
        for state in states
    ]
    ends = Bars("How the trials ended", "Arm", "Trials", arms, series, stacked=True)
    curves = [
        Curve(
            state,
            [t.number for t in ran if t.state == state],
            [None if t.last_step is None else t.last_step + 1 for t in ran if t.state == state],
            _STATE_COLOURS[state], "dot",
            hints=[f"trial {t.number}, {t.arm}" for t in ran if t.state == state],
        )
        for state in states
    ]  # fmt: skip
    steps = Curves("Steps trained", "Trial", "Steps", curves)
    caption = f"{len(ran)} ended trials by arm, and the steps that each was trained (its newest checkpoint)."
    return Figure(key, title, caption, findings.on_pruning(summary), [ends, steps])
