"""One study in service: who may work on which trial, and what became of it.

Optuna's table and ours are kept in step under the study's lock; a crash between any two writes is repaired by the
next `recover`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from models.trainer import InputError, Objective
from storage.database import Database, StorageError
from storage.leases import GRACE_S
from storage.runs import Fenced, MeasurementRow, RunRow, Store, StudyRow
from tuner.optuna_study import Search, TrialRow
from tuner.spec import Spec

log = logging.getLogger("tuner")

# A trial that kills its worker this often without one new checkpoint ends as failed.
MAX_BARREN_CRASHES = 3


class TooManyFailures(Exception):
    """Several trials failed in a row; the message names the newest reason."""


@dataclass(frozen=True)
class Claim:
    """A worker's right to one trial: valid while `attempt` is the run's current one."""

    number: int
    attempt: int
    arm: str
    trial: Any  # Optuna's live trial, for Search alone


@dataclass(frozen=True)
class Outcome:
    """The best step of a run, from its stored measurements. `violation` <= 0 iff feasible."""

    step: int
    value: float
    violation: float

    @property
    def feasible(self) -> bool:
        return self.violation <= 0


def outcome_of(rows: Sequence[MeasurementRow], spec: Spec) -> Outcome | None:
    """The step with the best objective (the first of equals); None where nothing was measured."""
    if not rows:
        return None
    best = best_row(rows, spec.objective)
    return Outcome(best.step, best.metrics[spec.objective.metric], best.metrics[violation_metric(spec)])


def best_row(rows: Sequence[MeasurementRow], objective: Objective) -> MeasurementRow:
    sign = 1.0 if objective.direction == "maximize" else -1.0
    return max(rows, key=lambda row: (sign * row.metrics[objective.metric], -row.step))


def violation_metric(spec: Spec) -> str:
    return f"valid/{spec.decision.task}/violation"


class Study:
    """A study opened for work: its row, its specification, Optuna's side and ours."""

    def __init__(self, database: Database, row: StudyRow, spec: Spec, search: Search) -> None:
        self.database = database
        self.store = Store(database)
        self.id = row.id
        self.name = row.name
        self.spec = spec
        self.search = search

    @classmethod
    def open(cls, database: Database, name: str) -> Study:
        """Raises StorageError when there is no such study, InputError when another version of tuner wrote
        it or it was deleted in part."""
        row = Store(database).find_study(name)
        if row is None:
            raise StorageError(f"storage: study {name!r} is not in {database!r}; `tuner studies` lists what is")
        try:
            spec = Spec.from_json(row.spec)
        except ValidationError as error:
            reason = error.errors()[0]
            where = ".".join(map(str, reason["loc"]))
            raise InputError(
                f"study {name!r}: expected a specification of this tuner version, got one of {row.package_version} "
                f"({where}: {reason['msg']}); use that version"
            ) from error
        try:
            return cls(database, row, spec, Search(database, spec, name))
        except KeyError:
            raise InputError(
                f"study {name!r}: expected its trials, got none: its deletion was cut short; "
                f"repeat `tuner delete --study {name} --yes`"
            ) from None

    def lock(self) -> Any:
        return self.database.exclusive(f"study:{self.id}")

    # --- work ------------------------------------------------------------------------------------------------

    def claim(
        self, worker_id: int, judge_others: bool = False, grace_s: float = GRACE_S, in_hand: Collection[int] = ()
    ) -> Claim | None:
        """Take a trial: one that was interrupted, else a new one while the total is not reached.

        Args:
            in_hand: numbers of the trials that this worker has already, in other slots.

        Returns:
            None when every trial of the total has ended or is held by a living worker, or the study is stopped.

        Raises:
            TooManyFailures: the newest trials of this run of the study all failed.

        Guarantees:
            Over all workers and restarts, never more trials run and end than the total. May be called again
            after DatabaseUnavailable: what a failed claim left behind is then taken up.
        """
        with self.lock():
            row = self._open_row(worker_id, judge_others, grace_s, in_hand)
            if row is None:
                return None
            self._check_failures(row)
            trial = self.search.ask()
            # Had the lock been lost since the trials were counted, this one could be one too many.
            self.database.check_exclusive()
            arm = self.search.arm_of(trial.number)
            attempt = self.store.claim(self.id, trial.number, arm, worker_id)
        return Claim(trial.number, attempt, arm, trial)

    def has_work(self, worker_id: int, judge_others: bool = False, grace_s: float = GRACE_S) -> bool:
        """Whether `claim` would give out a trial now. What dead workers held is put back, as there."""
        with self.lock():
            return self._open_row(worker_id, judge_others, grace_s) is not None

    def _open_row(
        self, worker_id: int, judge_others: bool, grace_s: float, in_hand: Collection[int] = ()
    ) -> StudyRow | None:
        """The study's row, where a trial is left that nobody alive holds; else None."""
        row = self.store.get_study(self.id)  # first: raises where the study was deleted meanwhile
        trials = self.recover(judge_others, grace_s, crashed=True, claimant=worker_id, in_hand=in_hand)
        over = row.stop is not None or sum(trial.state != "waiting" for trial in trials) >= row.total
        return None if over else row

    def recover(
        self, judge_others: bool = False, grace_s: float = GRACE_S, crashed: bool = False,
        claimant: int | None = None, in_hand: Collection[int] = (),
    ) -> list[TrialRow]:  # fmt: skip
        """Bring both tables in step and put every trial without a living owner back in the queue.

        Args:
            judge_others: leases of other hosts may be judged by their age.
            crashed: owners that died on this host did so while we lived on: their attempts count as crashes.
            claimant: the worker that asks; it holds what is `in_hand`, and nothing else (Store.held_runs).

        Returns:
            All trials, as they are now.
        """
        with self.lock():
            trials = self.search.trials()
            runs = {run.number: run for run in self.store.runs(self.id, open_only=True)}
            for run in runs.values():
                if trials[run.number].ended:
                    self._end_row(run, trials[run.number].state)
            running = [trial.number for trial in trials if trial.state == "running"]
            if not running:
                return trials
            fates = self.store.held_runs(self.id, judge_others, grace_s, claimant, in_hand)
            orphans = [number for number in running if fates.get(number) != "alive"]
            for number in orphans:
                outcome = "crashed" if crashed and fates.get(number) == "died" else "lost"
                self._requeue(number, runs.get(number), outcome)
            return self.search.trials() if orphans else trials

    def _requeue(self, number: int, run: RunRow | None, outcome: str) -> None:
        log.warning(
            "trial re-queued", extra={"action": "requeue", "study": self.name, "trial": number, "reason": outcome}
        )
        if run is not None:
            self.store.release(self.id, number, run.attempt, outcome)
            crashes = self.store.barren_crashes(self.id, number)
            if crashes >= MAX_BARREN_CRASHES:
                failure = f"its worker process died {crashes} times in a row without a new checkpoint"
                if self.search.fail(number):
                    self.store.end_run(self.id, number, run.attempt, "failed", failure)
                return
        self.search.requeue(number)  # one that has ended meanwhile is brought in step by the next `recover`

    def _end_row(self, run: RunRow, state: str) -> None:
        rows = self.store.measurements(self.id, [run.number])[run.number]
        outcome = outcome_of(rows, self.spec)
        failed = state == "failed"
        failure = "it was ended from outside, or its worker died before it could say why" if failed else None
        best_step = outcome.step if outcome and not failed else None
        self.store.end_run(self.id, run.number, run.attempt, state, failure, best_step)

    def _check_failures(self, row: StudyRow) -> None:
        """Failures in a row, counted since the newest `tuner run` began."""
        limit = self.spec.max_failures_in_a_row
        newest = self.store.newest_ended(self.id, row.started_at, limit)
        if len(newest) == limit and all(failure for _, failure in newest):
            number, failure = newest[0]
            raise TooManyFailures(
                f"study {self.name}: {limit} trials failed in a row, the newest (trial {number}): {failure}"
            )

    def stop(self, claim: Claim) -> None:
        """Put the trial back in the queue, in order: any worker may go on from its checkpoint."""
        with self.lock():
            self._require(claim)
            self.search.requeue(claim.number)
            self.store.release(self.id, claim.number, claim.attempt, "stopped")

    def end(self, claim: Claim, state: str, failure: str | None = None) -> Outcome | None:
        """The trial has ended: complete, pruned or failed. Value and constraint come from the stored rows.

        Raises:
            Fenced: another worker owns the trial by now; nothing was told.
        """
        rows = self.store.measurements(self.id, [claim.number])[claim.number]
        outcome = outcome_of(rows, self.spec) if state != "failed" else None
        with self.lock():
            self._require(claim)
            value = outcome.value if outcome else None
            self.search.end(claim.trial, state, value, outcome.violation if outcome else None)
            self.store.end_run(
                self.id, claim.number, claim.attempt, state, failure, outcome.step if outcome else None
            )
        return outcome

    def _require(self, claim: Claim) -> None:
        if not self.store.is_current(self.id, claim.number, claim.attempt):
            raise Fenced(f"trial {claim.number}: attempt {claim.attempt} is no longer the current one")

    def is_over(self) -> bool:
        """Whether nothing is left to claim, now or later: every trial of the total has ended, or `tuner stop`."""
        row = self.store.get_study(self.id)
        return row.stop is not None or sum(trial.ended for trial in self.search.trials()) >= row.total

    def is_held(self, judge_others: bool = False, grace_s: float = GRACE_S) -> bool:
        """Whether living workers hold every trial that is left: nothing to claim now, perhaps later. By our tables
        alone, so that who waits may ask often, however many trials there are."""
        fates = self.store.held_runs(self.id, judge_others, grace_s)
        progress = next(iter(self.store.progress(self.id)), None)
        if progress is None or progress.row.stop is not None:
            return False
        left = progress.row.total - progress.n_ended
        return 0 < left <= sum(fate == "alive" for fate in fates.values())
