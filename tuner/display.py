"""What a person sees: the progress of a run, a study's summary, tables.

Progress and log lines go to stderr, results to stdout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from storage.database import Database
from storage.runs import Store
from tuner.catalog import is_alive
from tuner.formats import clock, duration, number, table, to_json
from tuner.source import show
from tuner.study import Study
from tuner.summary import UNCERTIFIED, StudySummary, TrialSummary, as_json, summarize, trial_json
from tuner.tree import leaves, merge

# Without a terminal a line is printed when trials have ended, else this often.
LINE_EVERY_S = 10.0

_TRIAL_COLUMNS = (
    *("number", "arm", "state", "value", "value_se", "step", "last_step", "feasible", "violation", "threshold"),
    *("precision", "precision_bound", "recall", "attempts", "devices", "elapsed_s", "failure"),
)


class Progress:
    """Shows a run while it goes on: a live panel on a terminal, plain lines elsewhere (a coordinator's Observer).

    Example:
        with Progress(Console(stderr=True)) as progress: coordinator.run(options, progress)
    """

    def __init__(self, console: Console, line_every_s: float = LINE_EVERY_S) -> None:
        self._console = console
        self._line_every_s = line_every_s
        self._live = Live(console=console, transient=True, refresh_per_second=2)
        self._n_ended_at_start: int | None = None
        self._n_ended_shown = -1
        self._shown_at = -math.inf

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()  # takes over sys.stderr: log lines appear above the panel
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        _print_plain(self._console, line)

    def show(self, summary: StudySummary, started: float) -> None:
        now = time.monotonic()
        if self._n_ended_at_start is None:
            self._n_ended_at_start = summary.n_ended
        eta = remaining_s(summary, summary.n_ended - self._n_ended_at_start, now - started)
        if self._console.is_terminal:
            self._live.update(progress_panel(summary, eta))
        elif summary.n_ended != self._n_ended_shown or now - self._shown_at >= self._line_every_s:
            self._n_ended_shown, self._shown_at = summary.n_ended, now
            _print_plain(self._console, progress_line(summary, eta))


def _print_plain(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def remaining_s(summary: StudySummary, n_ended_here: int, elapsed_s: float) -> float | None:
    """Time to the total at this run's pace so far; None before its first trial has ended."""
    left = summary.row.total - summary.n_ended
    return max(0, left) * elapsed_s / n_ended_here if n_ended_here > 0 else None


def progress_line(summary: StudySummary, eta_s: float | None) -> str:
    """The state of a study in one line."""
    parts = [f"{summary.n_ended}/{summary.row.total} trials ({counts_text(summary)})", best_text(summary)]
    parts += [f"{device}: {doing}" for device, doing in _workers_at_work(summary)]
    parts.append(f"ETA {duration(eta_s)}")
    return "; ".join(parts)


def progress_panel(summary: StudySummary, eta_s: float | None) -> Group:
    """The state of a study as a few lines of a terminal."""
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(summary.name, style="bold"),
        ProgressBar(total=max(1, summary.row.total), completed=summary.n_ended, width=30),
        f"{summary.n_ended}/{summary.row.total}",
        Text(counts_text(summary)),
        f"ETA {duration(eta_s)}",
    )
    workers = Table.grid(padding=(0, 2))
    for device, doing in _workers_at_work(summary):
        workers.add_row(Text(f"  {device}"), Text(doing))
    return Group(head, Text(f"  {best_text(summary)}"), workers)


def _workers_at_work(summary: StudySummary) -> Iterator[tuple[str, str]]:
    devices = {worker.id: worker.device for worker in summary.workers}
    for worker_id, trials in summary.held.items():
        for trial in trials:
            step = "starting" if trial.last_step is None else f"step {trial.last_step}"
            yield devices.get(worker_id, "?"), f"trial {trial.number} {trial.arm} {step}"


def counts_text(summary: StudySummary) -> str:
    counts = summary.counts
    return f"{counts['complete']} complete, {counts['pruned']} pruned, {counts['failed']} failed"


def best_text(summary: StudySummary) -> str:
    """The feasible best, or what stands in for it."""
    chosen = summary.chosen
    if chosen is None:
        return "no trial is complete yet"
    value = f"{_value(chosen)} (trial {chosen.number}, {chosen.arm})"
    if summary.best is None:
        return f"nothing feasible yet, nearest {value} violates by {number(chosen.violation)}"
    return f"best {summary.spec.objective.metric} {value}"


def feasibility_text(summary: StudySummary) -> str:
    """One sentence: whether the constraint was met, and by how many trials."""
    decision, n_complete = summary.spec.decision, summary.counts["complete"]
    unit = "" if decision.unit == "row" else f", unit {decision.unit}"
    target = f"a precision of {decision.target_precision:g} (lower bound, confidence {decision.confidence:g}{unit})"
    if summary.best is not None:
        return f"feasible: {summary.n_feasible} of {n_complete} complete trials reach {target}"
    if summary.nearest is None:
        return "not feasible: no trial is complete"
    bound = summary.nearest.precision_bound
    reached = "" if bound is None else f", the nearest has {bound:.4g}"
    return f"not feasible: none of {n_complete} complete trials reaches {target}{reached}"


def threshold_text(trial: TrialSummary) -> str:
    """The threshold with what it reached on valid, and that it is no promise."""
    if trial.threshold is None:
        return "none"
    probability = 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, trial.threshold))))
    reached = [
        f"{name} {number(value)}"
        for name, value in (
            ("precision", trial.precision), ("lower bound", trial.precision_bound), ("recall", trial.recall)
        )
        if value is not None
    ]  # fmt: skip
    where = f" on valid: {', '.join(reached)}" if reached else ""
    return f"logit {number(trial.threshold)}, probability {number(probability)} ({UNCERTIFIED}){where}"


def config_changes(summary: StudySummary, trial: TrialSummary) -> list[str]:
    """How the trial's config differs from the default of its arm: `optimizer.lr: 0.001 -> 0.0032`."""
    default = leaves(merge(summary.spec.config, summary.spec.arms[trial.arm]))
    config = leaves(trial.config or {})
    return [
        f"{path}: {show(default[path]) if path in default else 'absent'} -> "
        f"{_short(config[path]) if path in config else 'absent'}"
        for path in dict.fromkeys((*default, *config))
        if default.get(path) != config.get(path)
    ]


def data_text(summary: StudySummary) -> str:
    kind = "simulated, not real" if summary.data.get("simulated") else "real"
    return f"{summary.data['source']} ({kind})"


def summary_text(summary: StudySummary, runs: Path) -> str:
    """The end of a run, for stdout."""
    lines = [
        f"study {summary.name}: {summary.n_ended} of {summary.row.total} trials ended ({counts_text(summary)})",
        f"data: {data_text(summary)}",
        feasibility_text(summary),
        *_chosen_lines(summary),
        f"results: {runs / summary.name / 'results.json'}",
        f"next: tuner best --study {summary.name}; tuner dashboard (both with this run's --storage and --runs)",
    ]
    return "\n".join(lines)


def _chosen_lines(summary: StudySummary) -> list[str]:
    chosen = summary.chosen
    if chosen is None:
        return []
    word = "best" if summary.best is not None else "nearest (infeasible)"
    lines = [
        f"{word}: trial {chosen.number} (arm {chosen.arm}, step {chosen.step}): "
        f"{summary.spec.objective.metric} {_value(chosen)}"
    ]
    if summary.gain_over_default is not None:
        default = summary.defaults[chosen.arm]
        lines.append(f"gain over its arm's default (trial {default.number}): {summary.gain_over_default:+.4g}")
    if not summary.spec.replicate:
        changes = config_changes(summary, chosen)
        lines.append(f"config against the default of {chosen.arm}:" + ("" if changes else " no difference"))
        lines += [f"  {change}" for change in changes]
    return [*lines, f"threshold: {threshold_text(chosen)}"]


def best_lines(summary: StudySummary, runs: Path) -> str:
    """What `tuner best` prints: the best trial (or the nearest), whole."""
    chosen = summary.chosen
    lines = [
        f"study {summary.name}, data: {data_text(summary)}",
        feasibility_text(summary),
        *_chosen_lines(summary),
    ]
    if chosen is None:
        return "\n".join(lines)
    lines.append(f"model: {_model_text(summary, chosen, runs)}")
    lines.append("config:")
    lines += [f"  {path}: {_short(value)}" for path, value in leaves(chosen.config or {}).items()]
    lines.append(f"metrics at step {chosen.step}:")
    lines += [f"  {name}: {number(value)}" for name, value in sorted(chosen.metrics.items())]
    return "\n".join(lines)


def _model_text(summary: StudySummary, trial: TrialSummary, runs: Path) -> str:
    if trial.checkpoint is None:
        return "no checkpoint"
    path = runs / summary.name / trial.checkpoint
    where = "" if path.exists() else " (on the worker's machine, or in the artifact store)"
    return f"{path}{where}, best weights: those of step {trial.step}"


def best_json(summary: StudySummary, runs: Path) -> dict[str, Any]:
    """`tuner best --format json`."""
    chosen = summary.chosen
    place = None if chosen is None or chosen.checkpoint is None else runs / summary.name / chosen.checkpoint
    return {
        "study": summary.name,
        "data": dict(summary.data),
        "feasible": summary.best is not None,
        "threshold_status": UNCERTIFIED if chosen else None,
        "gain_over_default": summary.gain_over_default,
        "model": None if place is None else str(place),
        "trial": trial_json(chosen) if chosen else None,
    }


def study_tables(summary: StudySummary) -> Iterator[str | Table]:
    """What `tuner show` prints: text and tables in order."""
    yield "\n".join(
        [
            f"study {summary.name}: {summary.n_ended} of {summary.row.total} trials ended ({counts_text(summary)}, "
            f"{summary.counts['running']} running, {summary.counts['waiting']} waiting)",
            f"data: {data_text(summary)}",
            feasibility_text(summary),
            *_chosen_lines(summary),
        ]
    )
    yield trials_table(summary)
    again = [trial.number for trial in summary.trials if trial.attempts > 1]
    if again:
        rows = [
            [a.number, a.attempt, a.worker_id, clock(a.claimed_at), clock(a.released_at), a.outcome or "in hand"]
            for a in summary.attempts
            if a.number in again
        ]
        columns = ["trial", "attempt", "worker", "claimed", "released", "outcome"]
        yield table("attempts of trials that were interrupted", columns, rows)
    yield workers_table(summary)


def trials_table(summary: StudySummary) -> Table:
    columns = ["trial", "arm", "state", summary.spec.objective.metric, "±", "step", "violation", "precision ≥"]
    columns += ["recall", "attempts", "device", "time", "failure"]
    rows = []
    for t in summary.trials:
        step = t.step if t.step is not None else t.last_step
        mark = " *" if summary.chosen is not None and t.number == summary.chosen.number else ""
        rows.append(
            [f"{t.number}{mark}", t.arm, t.state, t.value, t.value_se, step, t.violation, t.precision_bound,
             t.recall, t.attempts, ",".join(t.devices), duration(t.elapsed_s), t.failure or ""]
        )  # fmt: skip
    return table(f"trials (* {'best' if summary.best else 'nearest'})", columns, rows)


def workers_table(summary: StudySummary) -> Table:
    rows = []
    for worker in summary.workers:
        held = summary.held.get(worker.id, [])
        if worker.ended_at is not None:
            doing = f"ended {clock(worker.ended_at)}"
        elif not is_alive(worker):
            numbers = ", ".join(str(trial.number) for trial in held)
            word, them = ("trial", "it") if len(held) == 1 else ("trials", "them")
            doing = "gone" + (f" (held {word} {numbers}; the next run goes on with {them})" if held else "")
        else:
            doing = "; ".join(f"trial {trial.number}, step {trial.last_step}" for trial in held) or "idle"
        host, pid = worker.identity.host, worker.identity.pid
        rows.append([worker.id, worker.device, host, pid, clock(worker.started_at), doing])
    return table("workers", ["worker", "device", "host", "pid", "started", "doing"], rows)


def trial_rows(summary: StudySummary) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the trials for CSV, one column a searched parameter."""
    params = sorted({name for trial in summary.trials for name in trial.params})
    columns = [*_TRIAL_COLUMNS, *(f"params.{name}" for name in params)]
    rows = []
    for trial in summary.trials:
        told = {**vars(trial), "devices": " ".join(trial.devices)}
        rows.append([told[name] for name in _TRIAL_COLUMNS] + [trial.params.get(name) for name in params])
    return columns, rows


def show_json(summary: StudySummary) -> str:
    return to_json(as_json(summary))


def describe_tables(described: Mapping[str, Any]) -> Iterator[str | Table]:
    """A trainer's facts and checks about its data."""
    for title, part in described["tables"].items():
        yield table(title, part["columns"], part["rows"])
    for check in described["checks"]:
        yield f"{'PASS' if check['ok'] else 'FAILED'}  {check['name']}: {check['detail']}"
    failed = sum(not check["ok"] for check in described["checks"])
    yield f"{failed} of {len(described['checks'])} checks failed" if failed else "PASS"


def describe_rows(described: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """All tables and checks as one: a row for every cell."""
    rows: list[list[Any]] = []
    for title, part in described["tables"].items():
        for index, values in enumerate(part["rows"]):
            rows += [[title, index, name, value] for name, value in zip(part["columns"], values, strict=True)]
    for index, check in enumerate(described["checks"]):
        rows += [["checks", index, name, check[name]] for name in ("name", "ok", "detail")]
    return ["table", "row", "column", "value"], rows


def _short(value: Any) -> str:
    return number(value) if isinstance(value, float) else show(value)


def _value(trial: TrialSummary) -> str:
    error = "" if trial.value_se is None else f" ± {trial.value_se:.2g}"
    return f"{number(trial.value)}{error}"


def study_rows(database: Database) -> tuple[list[str], list[list[Any]]]:
    """Every study of a database, a row each."""
    columns = ["study", "trials", "total", "feasible", "best", "objective", "simulated", "data", "begun"]
    rows = []
    for row in Store(database).studies():
        summary = summarize(Study.open(database, row.name))
        best = summary.best.value if summary.best else None
        simulated = "yes" if summary.data["simulated"] else "no"
        metric, source = summary.spec.objective.metric, summary.data["source"]
        rows.append(
            [row.name, summary.n_ended, row.total, summary.n_feasible, best, metric, simulated, source,
             clock(row.created_at)]
        )  # fmt: skip
    return columns, rows
