"""What our pages show, read from the database alone and kept in step with it as cheaply as it goes.

What has ended does not change. So a study's trials are kept here, each with the version at which it last changed,
and who has seen version v is sent only what came later.
"""

from __future__ import annotations

import json
import re
import secrets
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.database import Database, StorageError, Unavailable
from storage.runs import AttemptRow, MeasurementRow, RunRow, Store, StudyProgress, StudyRow
from tuner import status
from tuner.notify import database_time
from tuner.spec import Spec
from tuner.study import best_row, violation_metric
from tuner.summary import STATES, UNCERTIFIED
from tuner.tree import leaves

DECISION = ("threshold", "precision", "precision_bound", "recall")
# How long a study's trials are shown without looking at the database again, per trial and at most.
FRESH_S_PER_TRIAL, FRESH_S = 0.001, 5.0
# More runs than this are read all at once.
MANY = 200


@dataclass(frozen=True)
class TrialLine:
    """A trial in a list. Value and decision are those of its best step so far."""

    number: int
    arm: str
    state: str
    value: float | None
    feasible: bool | None
    violation: float | None
    step: int | None
    last_step: int | None
    threshold: float | None
    precision: float | None
    precision_bound: float | None
    recall: float | None
    attempts: int
    elapsed_s: float | None
    failure: str | None


COLUMNS = tuple(TrialLine.__dataclass_fields__)


@dataclass
class _Known:
    """A study as it was when last looked at."""

    identity: tuple[int, float, str]  # another study may get the name, and the number
    spec: Spec
    seen: StudyProgress | None = None
    looked_at: float = float("-inf")
    version: int = 0
    lines: dict[int, TrialLine] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)  # number -> version
    curves: dict[int, tuple[int | None, list[list[float]]]] = field(default_factory=dict)
    arms: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Feed:
    """The service, a study, a trial: as plain JSON values, for any number of browsers."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._store = Store(database)
        self._birth = secrets.token_hex(4)  # a version means something to the process that gave it
        self._known: dict[str, _Known] = {}

    def service(self) -> dict[str, Any]:
        """Workers with what they hold, studies with how far they are."""
        return status.as_json(status.read(self._database))

    # --- a study ---------------------------------------------------------------------------------------------

    def study(self, name: str, since: str = "") -> dict[str, Any] | None:
        """A study with those of its trials that have changed; None where there is no such study.

        Args:
            since: the `version` of an earlier answer; anything else brings every trial.
        """
        service = status.read(self._database)
        told = status.as_json(service)
        place = next((i for i, found in enumerate(service.studies) if found.name == name), None)
        if place is None:
            return None
        study = service.studies[place]
        known = self._refreshed(study.progress)
        birth, _, seen = since.partition(".")
        after = int(seen) if birth == self._birth and re.fullmatch("[0-9]{1,15}", seen) else -1
        with known.lock:
            trials = [
                list(vars(known.lines[n]).values()) for n, version in known.changed.items() if version > after
            ]
            version, arms = known.version, known.arms
        return {
            **_study(study.progress.row, known.spec),
            "now": service.now,
            "version": f"{self._birth}.{version}",
            "all": after < 0,
            "progress": told["studies"][place],
            "arms": arms,
            "columns": COLUMNS,
            "trials": trials,
            "workers": [w for w in told["workers"] if any(held["study"] == name for held in w["holdings"])],
        }

    def _refreshed(self, progress: StudyProgress) -> _Known:
        """What is known of a study, after a look at its trials where something happened and the last is too old."""
        row = progress.row
        known = self._known.get(row.name)
        if known is None or known.identity != (row.id, row.created_at, row.spec):
            known = self._known[row.name] = _Known((row.id, row.created_at, row.spec), Spec.from_json(row.spec))
        with known.lock:
            fresh_s = min(FRESH_S, FRESH_S_PER_TRIAL * len(known.lines))
            if progress != known.seen and time.monotonic() - known.looked_at >= fresh_s:
                self._look(known, progress)
                known.seen, known.looked_at = progress, time.monotonic()
        return known

    def _look(self, known: _Known, progress: StudyProgress) -> None:
        """Read the runs that have not ended; and every run where another one has."""
        study_id, ended_again = progress.row.id, known.seen is None or known.seen.n_ended != progress.n_ended
        runs = self._store.runs(study_id, open_only=not ended_again)
        outcomes = {a.number: a.outcome for a in self._store.attempts(study_id)} if ended_again else {}
        held = self._held(progress.row.name)
        known_ended = {number for number, line in known.lines.items() if line.state not in ("running", "waiting")}
        runs = [run for run in runs if run.number not in known_ended]
        best = self._best(study_id, runs, known.spec)
        known.version += 1
        for run in runs:
            state = _state(run, outcomes.get(run.number), run.number in held)
            line = _line(run, state, best.get(run.number), known.spec)
            if known.lines.get(run.number) != line:
                known.lines[run.number] = line
                known.changed[run.number] = known.version
        self._compare_arms(study_id, known)

    def _held(self, name: str) -> set[int]:
        holdings = self._store.holdings().values()
        return {held.number for of_one in holdings for held in of_one if held.study_name == name}

    def _best(self, study_id: int, runs: Sequence[RunRow], spec: Spec) -> dict[int, MeasurementRow]:
        """The measurement at the best step (so far) of each run that has one."""
        found, rest = {}, [run.number for run in runs]
        if len(rest) > MANY:
            found = self._store.best_measurements(study_id)
            rest = [run.number for run in runs if run.ended_at is None]
        measured = self._store.measurements(study_id, rest)
        return found | {n: best_row(rows, spec.objective) for n, rows in measured.items() if rows}

    def _compare_arms(self, study_id: int, known: _Known) -> None:
        spec, sign = known.spec, 1.0 if known.spec.objective.direction == "maximize" else -1.0
        by_arm: dict[str, list[TrialLine]] = {arm: [] for arm in spec.arms}
        for line in known.lines.values():
            by_arm.setdefault(line.arm, []).append(line)
        chosen = {arm: _arm(lines, list(spec.arms), sign) for arm, lines in by_arm.items()}
        wanted = [known.lines[a[k]] for a in chosen.values() for k in ("default", "best") if a[k] is not None]
        self._read_curves(study_id, known, {line.number: line.last_step for line in wanted})
        known.arms = [
            {
                "arm": arm, **found, "overlay": _flat(spec.arms.get(arm, {})),
                "curves": {k: known.curves[found[k]][1] for k in ("default", "best") if found[k] is not None},
            }
            for arm, found in chosen.items()
        ]  # fmt: skip

    def _read_curves(self, study_id: int, known: _Known, wanted: Mapping[int, int | None]) -> None:
        """Steps and objective of some runs; read again only where a run has gone on."""
        known.curves = {n: curve for n, curve in known.curves.items() if wanted.get(n, -1) == curve[0]}
        missing = [n for n in wanted if n not in known.curves]
        for number, rows in (self._store.measurements(study_id, missing) if missing else {}).items():
            values = [row.metrics[known.spec.objective.metric] for row in rows]
            known.curves[number] = (wanted[number], [[row.step for row in rows], values])

    # --- a trial ---------------------------------------------------------------------------------------------

    def trial(self, name: str, number: int, seen: str = "") -> tuple[str, dict[str, Any] | None] | None:
        """(version, trial): the trial is None where `seen` is its version. None where there is no such trial."""
        row = self._store.find_study(name)
        if row is None:
            return None
        try:
            run = self._store.get_run(row.id, number)
        except Unavailable:
            raise
        except StorageError:
            return None
        held = number in self._held(name)
        facts = (run.attempt, run.checkpoint_step, run.uploaded_step, run.measured_at, run.ended_at, held)
        version = f'"{self._birth}-{"-".join(map(str, facts))}"'
        if seen == version:
            return version, None
        spec = Spec.from_json(row.spec)
        attempts = [a for a in self._store.attempts(row.id) if a.number == number]
        rows = self._store.measurements(row.id, [number])[number]
        best = best_row(rows, spec.objective) if rows else None
        line = _line(run, _state(run, attempts[-1].outcome, held), best, spec)
        return version, {
            **_study(row, spec),
            **asdict(line),
            "now": database_time(self._database),
            "steps": [r.step for r in rows],
            "elapsed": [r.elapsed_s for r in rows],
            "series": _series(rows),
            "curves": self._store.curves(row.id, number),
            "config": _flat(run.config or {}),
            "searched": [dimension.path for dimension in spec.space.dimensions],
            "checkpoint": _named(run.checkpoint_attempt, run.checkpoint_step),
            "uploaded": _named(run.uploaded_attempt, run.uploaded_step),
            "tries": self._tries(row.id, attempts),
        }

    def _tries(self, study_id: int, attempts: Sequence[AttemptRow]) -> list[dict[str, Any]]:
        workers = {worker.id: worker for worker in self._store.workers(study_id)}
        return [
            {
                **vars(attempt),
                "host": workers[attempt.worker_id].identity.host if attempt.worker_id in workers else None,
                "device": workers[attempt.worker_id].device if attempt.worker_id in workers else None,
            }
            for attempt in attempts
        ]


def _state(run: RunRow, outcome: str | None, held: bool) -> str:
    """`outcome` is that of the run's newest attempt."""
    if run.ended_at is None:
        return "running" if held else "waiting"
    return "failed" if run.failure is not None else str(outcome)


def _line(run: RunRow, state: str, best: MeasurementRow | None, spec: Spec) -> TrialLine:
    metrics = best.metrics if best else {}
    decided = {name: metrics.get(f"valid/{spec.decision.task}/{name}") for name in DECISION}
    violation = metrics.get(violation_metric(spec))
    return TrialLine(
        number=run.number, arm=run.arm, state=state,
        value=metrics.get(spec.objective.metric),
        feasible=None if violation is None else violation <= 0, violation=violation,
        step=best.step if best else None, last_step=run.checkpoint_step,
        **decided,
        attempts=run.attempt, elapsed_s=best.elapsed_s if best else None, failure=run.failure,
    )  # fmt: skip


def _arm(lines: Sequence[TrialLine], arms: Sequence[str], sign: float) -> dict[str, Any]:
    """How an arm stands. `best` is the feasible best; where nothing is feasible the one nearest to it."""
    complete = [line for line in lines if line.state == "complete" and line.value is not None]
    feasible = [line for line in complete if line.feasible]
    best = max(feasible, key=lambda t: (sign * (t.value or 0.0), -t.number), default=None)
    nearest = min(complete, key=lambda t: (t.violation or 0.0, -sign * (t.value or 0.0), t.number), default=None)
    default = next((line for line in lines if line.number < len(arms)), None)  # dealt first, one an arm
    values = [line.value for line in complete if line.value is not None]
    return {
        "counts": {state: sum(line.state == state for line in lines) for state in STATES},
        "n_feasible": len(feasible),
        "default": default.number if default and default.value is not None else None,
        "best": best.number if best else nearest.number if nearest else None,
        "feasible": best is not None,
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def _study(row: StudyRow, spec: Spec) -> dict[str, Any]:
    data = json.loads(row.data)
    return {
        "study": row.name,
        "description": spec.description,
        "data": data["source"],
        "simulated": bool(data.get("simulated")),
        "objective": spec.objective.model_dump(),
        "decision": spec.decision.model_dump(),
        "threshold_status": UNCERTIFIED,
    }


def _series(rows: Sequence[MeasurementRow]) -> dict[str, list[float | None]]:
    """Each metric over the steps of `rows`; None where a step has none."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return {name: [row.metrics.get(name) for row in rows] for name in names}


def _flat(tree: Mapping[str, Any]) -> list[list[Any]]:
    return [[path, value] for path, value in leaves(tree).items()]


def _named(attempt: int | None, step: int | None) -> dict[str, int] | None:
    return None if attempt is None or step is None else {"attempt": attempt, "step": step}
