"""What a study has come to, read from the database alone: for `show`, `best`, the dashboard and results.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.trainer import Objective
from storage.runs import AttemptRow, MeasurementRow, RunRow, StudyRow, WorkerRow
from tuner.spec import Spec
from tuner.study import Study

STATES = ("complete", "pruned", "failed", "running", "waiting")
UNCERTIFIED = "search threshold, not certified"


@dataclass(frozen=True)
class TrialSummary:
    """One trial. Value and decision are those of its best step; None where it has none (yet)."""

    number: int
    arm: str
    state: str
    value: float | None
    value_se: float | None
    step: int | None
    last_step: int | None
    feasible: bool | None
    violation: float | None
    threshold: float | None
    precision: float | None
    precision_bound: float | None
    recall: float | None
    attempts: int
    devices: tuple[str, ...]
    elapsed_s: float | None
    failure: str | None
    config: Mapping[str, Any] | None
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    checkpoint: str | None  # relative to the study's folder of runs


@dataclass(frozen=True)
class StudySummary:
    """One study as a person wants to know it. `best` is feasible; `nearest` stands in where nothing is."""

    name: str
    spec: Spec
    row: StudyRow
    data: Mapping[str, Any]
    counts: Mapping[str, int]
    n_feasible: int
    trials: Sequence[TrialSummary]
    attempts: Sequence[AttemptRow]
    workers: Sequence[WorkerRow]
    best: TrialSummary | None
    nearest: TrialSummary | None
    defaults: Mapping[str, TrialSummary]

    @property
    def n_ended(self) -> int:
        return self.counts["complete"] + self.counts["pruned"] + self.counts["failed"]

    @property
    def held(self) -> Mapping[int, list[TrialSummary]]:
        """Which trials each worker has in hand: worker id -> running trials, by number."""
        running = {trial.number: trial for trial in self.trials if trial.state == "running"}
        found: dict[int, list[TrialSummary]] = {}
        for attempt in self.attempts:
            if attempt.released_at is None and attempt.number in running:
                found.setdefault(attempt.worker_id, []).append(running[attempt.number])
        return found

    @property
    def chosen(self) -> TrialSummary | None:
        """The feasible best, else the nearest."""
        return self.best or self.nearest

    @property
    def gain_over_default(self) -> float | None:
        """Objective of the chosen trial minus that of the default config of its own arm; None where nothing is
        searched, and only seeds differ."""
        if self.spec.replicate:
            return None
        chosen = self.chosen
        default = self.defaults.get(chosen.arm) if chosen else None
        if chosen is None or default is None or chosen.value is None or default.value is None:
            return None
        return chosen.value - default.value


def summarize(study: Study) -> StudySummary:
    """Read the whole study: a handful of queries, whatever its size."""
    store, spec = study.store, study.spec
    row = store.get_study(study.id)
    runs = {run.number: run for run in store.runs(study.id)}
    attempts = store.attempts(study.id)
    workers = store.workers(study.id)
    best_rows = store.best_measurements(study.id)
    devices = {worker.id: worker.device for worker in workers}
    by_run: dict[int, list[AttemptRow]] = {}
    for attempt in attempts:
        by_run.setdefault(attempt.number, []).append(attempt)
    trials = []
    for trial in study.search.trials():
        tries = by_run.get(trial.number, [])
        run = runs.get(trial.number)
        used = tuple(dict.fromkeys(devices.get(a.worker_id, "?") for a in tries))
        arm = run.arm if run else study.search.arm_of(trial.number)
        trials.append(_trial(spec, trial, arm, run, best_rows.get(trial.number), len(tries), used))
    complete = [t for t in trials if t.state == "complete" and t.value is not None]
    feasible = [t for t in complete if t.feasible]
    counts = Counter(t.state for t in trials)
    return StudySummary(
        name=study.name,
        spec=spec,
        row=row,
        data=json.loads(row.data),
        counts={state: counts[state] for state in STATES},
        n_feasible=len(feasible),
        trials=trials,
        attempts=attempts,
        workers=workers,
        best=_best(feasible, spec.objective),
        nearest=_nearest(complete, spec.objective) if not feasible else None,
        defaults={t.arm: t for t in trials if study.search.is_default(t.number) and t.value is not None},
    )


def _best(trials: Sequence[TrialSummary], objective: Objective) -> TrialSummary | None:
    sign = 1.0 if objective.direction == "maximize" else -1.0
    return max(trials, key=lambda t: (sign * (t.value or 0.0), -t.number), default=None)


def _nearest(trials: Sequence[TrialSummary], objective: Objective) -> TrialSummary | None:
    """The least violation; among equals the best objective, then the oldest."""
    sign = 1.0 if objective.direction == "maximize" else -1.0
    return min(trials, key=lambda t: (t.violation or 0.0, -sign * (t.value or 0.0), t.number), default=None)


def _trial(
    spec: Spec, trial: Any, arm: str, run: RunRow | None, best: MeasurementRow | None, n_attempts: int,
    devices: tuple[str, ...],
) -> TrialSummary:  # fmt: skip
    metrics = dict(best.metrics) if best else {}

    def decision(name: str) -> float | None:
        return metrics.get(f"valid/{spec.decision.task}/{name}")

    violation = decision("violation")
    checkpoint = None
    if run and run.checkpoint_step is not None:
        checkpoint = f"trials/{trial.number:05d}/attempt-{run.checkpoint_attempt}/step-{run.checkpoint_step:05d}"
    return TrialSummary(
        number=trial.number,
        arm=arm,
        state=trial.state,
        value=metrics.get(spec.objective.metric),
        value_se=metrics.get(f"{spec.objective.metric}_se"),
        step=best.step if best else None,
        last_step=run.checkpoint_step if run else None,
        feasible=None if violation is None else violation <= 0,
        violation=violation,
        threshold=decision("threshold"),
        precision=decision("precision"),
        precision_bound=decision("precision_bound"),
        recall=decision("recall"),
        attempts=n_attempts,
        devices=devices,
        elapsed_s=best.elapsed_s if best else None,
        failure=run.failure if run else None,
        config=run.config if run else None,
        params=trial.params,
        metrics=metrics,
        checkpoint=checkpoint,
    )


def as_json(summary: StudySummary) -> dict[str, Any]:
    """The summary as plain JSON values: what `show --format json` prints and results.json holds."""
    chosen = summary.chosen
    return {
        "study": summary.name,
        "data": dict(summary.data),
        "decision": summary.spec.decision.model_dump(),
        "objective": summary.spec.objective.model_dump(),
        "seed": summary.spec.seed,
        "n_trials": summary.row.total,
        "n_ended": summary.n_ended,
        "counts": dict(summary.counts),
        "n_feasible": summary.n_feasible,
        "feasible": summary.best is not None,
        "best": trial_json(summary.best) if summary.best else None,
        "nearest": trial_json(summary.nearest) if summary.nearest else None,
        "threshold_status": UNCERTIFIED if chosen else None,
        "gain_over_default": summary.gain_over_default,
        "defaults": {arm: trial_json(trial) for arm, trial in summary.defaults.items()},
        "trials": [trial_json(trial) for trial in summary.trials],
        "attempts": [vars(attempt) for attempt in summary.attempts],
        "workers": [
            {"id": w.id, "host": w.identity.host, "pid": w.identity.pid, "device": w.device,
             "started_at": w.started_at, "lease_age_s": w.age_s, "ended_at": w.ended_at}
            for w in summary.workers
        ],
        "package_version": summary.row.package_version,
    }  # fmt: skip


def trial_json(trial: TrialSummary) -> dict[str, Any]:
    return {**vars(trial), "devices": list(trial.devices), "params": dict(trial.params)}
