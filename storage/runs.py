"""Runs, attempts and measurements: what must survive any kill.

Every write that belongs to an attempt is fenced: it happens only while that attempt is the run's current one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from storage.database import StorageError
from storage.evaluations import EvaluationStore
from storage.registry import ModelStore
from storage.rows import (
    AttemptRow,
    Holding,
    MeasurementRow,
    Recorded,
    RunRow,
    StudyProgress,
    StudyRow,
    WorkerRow,
)
from storage.studies import StudyStore
from storage.tables import attempts, measurements, runs, same_attempt, studies
from storage.workers import WorkerStore

__all__ = [
    "AttemptRow", "Fenced", "Holding", "MeasurementRow", "Recorded", "RunRow", "Store", "StudyProgress", "StudyRow",
    "WorkerRow",
]  # fmt: skip


# What every measurement asks and writes, built once: SQLAlchemy takes longer to build such a statement, and to
# compile one with its values in it, than SQLite to execute it.
_THIS_RUN = (runs.c.study_id == sa.bindparam("of_study")) & (runs.c.number == sa.bindparam("of_number"))
_CURRENT_ATTEMPT = (
    sa.select(runs.c.attempt, runs.c.ended_at, attempts.c.released_at)
    .join(attempts, same_attempt())
    .where(_THIS_RUN)
    .with_for_update(of=runs)
)
_N_ENDED = (
    sa.select(sa.func.count())
    .where(runs.c.study_id == sa.bindparam("of_study"), runs.c.ended_at.is_not(None))
    .scalar_subquery()
)
_RECORDED = sa.select(_N_ENDED.label("n_ended"), studies.c.stop).where(studies.c.id == sa.bindparam("of_study"))


class Fenced(Exception):
    """This attempt is no longer the run's current one: another worker owns the trial. Write nothing more."""


class Store(StudyStore, WorkerStore, EvaluationStore, ModelStore):
    """Everything we keep in the database, for one database. Each method is one transaction."""

    # --- runs and attempts -----------------------------------------------------------------------------------

    def claim(self, study_id: int, number: int, arm: str, worker_id: int) -> int:
        """Raise the run's attempt for this worker and return it. The caller holds the study's lock."""
        with self.database.transaction() as connection:
            attempt = connection.execute(
                self.database.insert(runs)
                .values(study_id=study_id, number=number, arm=arm, attempt=1)
                .on_conflict_do_update(index_elements=["study_id", "number"], set_={"attempt": runs.c.attempt + 1})
                .returning(runs.c.attempt)
            ).scalar_one()
            # An attempt that was left between re-queueing and release is over too.
            connection.execute(
                attempts.update()
                .where(
                    attempts.c.study_id == study_id, attempts.c.number == number,
                    attempts.c.released_at.is_(None),
                )
                .values(released_at=self.database.now, outcome="lost")
            )  # fmt: skip
            connection.execute(
                attempts.insert().values(
                    study_id=study_id, number=number, attempt=attempt, worker_id=worker_id,
                    claimed_at=self.database.now,
                )
            )  # fmt: skip
        return int(attempt)

    def set_config(self, study_id: int, number: int, attempt: int, config: Mapping[str, Any]) -> None:
        """Record the complete config of a run. Raises Fenced."""
        with self.database.transaction() as connection:
            self._fence(connection, study_id, number, attempt)
            connection.execute(runs.update().where(_is_run(study_id, number)).values(config=json.dumps(config)))

    def record(
        self, study_id: int, number: int, attempt: int, steps: Sequence[MeasurementRow],
        curves: Mapping[str, Any] | None = None,
    ) -> Recorded:  # fmt: skip
        """Store measurements, idempotently, and name the newest one's checkpoint: one transaction.

        A step that an older attempt had measured is superseded; one of the same attempt stays as it was.

        Args:
            curves: of the best step so far, which `step` in it names; None: those there are stay.

        Raises:
            Fenced: the run has another attempt by now; nothing was written.
        """
        with self.database.transaction() as connection:
            self._fence(connection, study_id, number, attempt)
            changes: dict[str, Any] = {}
            if steps:
                newest = max(steps, key=lambda m: m.step)
                self._upsert(connection, study_id, number, attempt, steps)
                changes = {
                    "checkpoint_attempt": newest.attempt or attempt, "checkpoint_step": newest.step,
                    "measured_at": self.database.now,
                }  # fmt: skip
            if curves is not None:
                changes["curves"] = json.dumps(curves, allow_nan=False)
            if changes:
                connection.execute(runs.update().where(_is_run(study_id, number)).values(**changes))
            row = connection.execute(_RECORDED, {"of_study": study_id}).one()
        return Recorded(int(row.n_ended), row.stop)

    def supersede(self, study_id: int, number: int, attempt: int, after_step: int) -> list[int]:
        """Take back what older attempts measured beyond a step; `attempt` goes on from there and measures it again.

        With the measurements go the curves of such a step; and no checkpoint beyond it, here or in the artifact
        store, is named any longer.

        Args:
            after_step: the newest step that stays; -1: none does.

        Returns:
            The steps that were taken back, in order.

        Raises:
            Fenced: the run has another attempt by now; nothing was written.
        """
        mine = (measurements.c.study_id == study_id) & (measurements.c.number == number)
        with self.database.transaction() as connection:
            self._fence(connection, study_id, number, attempt)
            deleted = connection.scalars(
                measurements.delete()
                .where(mine, measurements.c.step > after_step, measurements.c.attempt < attempt)
                .returning(measurements.c.step)
            ).all()
            newest = connection.execute(
                sa.select(measurements.c.attempt, measurements.c.step)
                .where(mine)
                .order_by(measurements.c.step.desc())
                .limit(1)
            ).first()
            run = connection.execute(sa.select(runs).where(_is_run(study_id, number))).one()
            changes: dict[str, Any] = {
                "checkpoint_attempt": newest.attempt if newest else None,
                "checkpoint_step": newest.step if newest else None,
            }
            if run.curves and json.loads(run.curves)["step"] > after_step:
                changes["curves"] = None
            if run.uploaded_attempt is not None and run.uploaded_attempt < attempt:
                named = min(run.uploaded_step, after_step)
                changes["uploaded_attempt"] = run.uploaded_attempt if named >= 0 else None
                changes["uploaded_step"] = named if named >= 0 else None
            connection.execute(runs.update().where(_is_run(study_id, number)).values(**changes))
        return sorted(deleted)

    def name_upload(self, study_id: int, number: int, attempt: int, step: int) -> bool:
        """The checkpoint of a step of this attempt is in the artifact store.

        Returns:
            False, and nothing is named, while the step's measurement is not stored: who went on from there on
            another machine would never have what was measured before it.

        Raises:
            Fenced.
        """
        measured = _is_run(study_id, number) & (runs.c.checkpoint_step >= step)
        with self.database.transaction() as connection:
            self._fence(connection, study_id, number, attempt)
            named = {"uploaded_attempt": attempt, "uploaded_step": step}
            return connection.execute(runs.update().where(measured).values(**named)).rowcount == 1

    def curves(self, study_id: int, number: int) -> dict[str, Any] | None:
        """The curves of the run's best step so far, which `step` in them names."""
        with self.database.transaction() as connection:
            text = connection.scalar(sa.select(runs.c.curves).where(_is_run(study_id, number)))
        return json.loads(text) if text else None

    def is_current(self, study_id: int, number: int, attempt: int) -> bool:
        """Whether `attempt` holds the run, or has ended it."""
        query = (
            sa.select(runs.c.attempt, runs.c.ended_at, attempts.c.released_at)
            .join(attempts, same_attempt())
            .where(_is_run(study_id, number))
        )
        with self.database.transaction() as connection:
            row = connection.execute(query).first()
        return row is not None and row.attempt == attempt and (row.ended_at is not None or row.released_at is None)

    def end_run(
        self, study_id: int, number: int, attempt: int, outcome: str, failure: str | None = None,
        best_step: int | None = None,
    ) -> None:  # fmt: skip
        """The run's trial has ended as `outcome` (complete, pruned, failed); idempotent."""
        now = self.database.now
        with self.database.transaction() as connection:
            connection.execute(
                runs.update()
                .where(_is_run(study_id, number), runs.c.ended_at.is_(None))
                .values(ended_at=now, failure=failure, best_step=best_step)
            )
            self._release(connection, study_id, number, attempt, outcome)

    def release(self, study_id: int, number: int, attempt: int, outcome: str) -> None:
        """Give up an attempt without ending the run: `stopped` in order, `lost` with its worker, or `crashed`
        (its worker died while the one that started it lived on)."""
        with self.database.transaction() as connection:
            self._release(connection, study_id, number, attempt, outcome)

    def runs(self, study_id: int, open_only: bool = False) -> list[RunRow]:
        """Every run, by number, or those alone that have not ended."""
        return self._runs(runs.c.study_id == study_id, *([runs.c.ended_at.is_(None)] if open_only else []))

    def get_run(self, study_id: int, number: int) -> RunRow:
        """Raises StorageError when there is none."""
        found = self._runs(_is_run(study_id, number))
        if not found:
            raise StorageError(f"storage: trial {number} of study {study_id} is gone; it was deleted while in use")
        return found[0]

    def newest_ended(self, study_id: int, since: float, limit: int) -> list[tuple[int, str | None]]:
        """(number, failure) of the `limit` runs that ended last, newest first, and after `since`."""
        query = (
            sa.select(runs.c.number, runs.c.failure)
            .where(runs.c.study_id == study_id, runs.c.ended_at >= since)
            .order_by(runs.c.ended_at.desc())
            .limit(limit)
        )
        with self.database.transaction() as connection:
            return [(row.number, row.failure) for row in connection.execute(query)]

    def attempts(self, study_id: int) -> list[AttemptRow]:
        query = sa.select(attempts).where(attempts.c.study_id == study_id)
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(attempts.c.number, attempts.c.attempt)).all()
        return [AttemptRow(r.number, r.attempt, r.worker_id, r.claimed_at, r.released_at, r.outcome) for r in rows]

    def measurements(self, study_id: int, numbers: Iterable[int]) -> dict[int, list[MeasurementRow]]:
        """The stored measurements of some runs, each in the order of steps."""
        wanted = list(numbers)
        result: dict[int, list[MeasurementRow]] = {number: [] for number in wanted}
        query = (
            sa.select(measurements)
            .where(measurements.c.study_id == study_id, measurements.c.number.in_(wanted))
            .order_by(measurements.c.number, measurements.c.step)
        )
        with self.database.transaction() as connection:
            rows = connection.execute(query).all()
        for r in rows:
            result[r.number].append(MeasurementRow(r.step, json.loads(r.metrics), r.elapsed_s, r.attempt))
        return result

    def count_measurements(self, study_id: int | None = None) -> int:
        """Of one study, or of all."""
        query = sa.select(sa.func.count()).select_from(measurements)
        if study_id is not None:
            query = query.where(measurements.c.study_id == study_id)
        with self.database.transaction() as connection:
            return int(connection.scalar(query) or 0)

    def count_attempts(self) -> int:
        """Of all studies: how often a trial was claimed."""
        with self.database.transaction() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(attempts)) or 0)

    def best_measurements(self, study_id: int) -> dict[int, MeasurementRow]:
        """The measurement at the best step of every ended run that has one."""
        query = (
            sa.select(measurements)
            .join(
                runs,
                (runs.c.study_id == measurements.c.study_id)
                & (runs.c.number == measurements.c.number)
                & (runs.c.best_step == measurements.c.step),
            )
            .where(measurements.c.study_id == study_id)
        )
        with self.database.transaction() as connection:
            rows = connection.execute(query).all()
        return {r.number: MeasurementRow(r.step, json.loads(r.metrics), r.elapsed_s, r.attempt) for r in rows}

    def barren_crashes(self, study_id: int, number: int) -> int:
        """How many of the run's newest attempts in a row crashed without one new measurement."""
        advanced = sa.select(sa.func.max(measurements.c.attempt)).where(
            measurements.c.study_id == study_id, measurements.c.number == number
        )
        query = (
            sa.select(attempts.c.attempt, attempts.c.outcome)
            .where(attempts.c.study_id == study_id, attempts.c.number == number)
            .order_by(attempts.c.attempt.desc())
        )
        with self.database.transaction() as connection:
            newest = connection.scalar(advanced) or 0
            count = 0
            for row in connection.execute(query):
                # Orderly stops and lost machines say nothing about the trial: they neither count nor reset.
                if row.attempt <= newest:
                    break
                count += row.outcome == "crashed"
        return count

    # --- inside ----------------------------------------------------------------------------------------------

    def _fence(self, connection: sa.Connection, study_id: int, number: int, attempt: int) -> None:
        """Lock the run's row and check that `attempt` is its current, unreleased one."""
        row = connection.execute(_CURRENT_ATTEMPT, {"of_study": study_id, "of_number": number}).first()
        found = None
        if row is None:
            found = "no such run"
        elif row.ended_at is not None:
            found = "an ended run"
        elif row.attempt != attempt:
            found = f"attempt {row.attempt}"
        elif row.released_at is not None:
            found = "it given up"  # the trial waits in the queue for its next owner
        if found:
            raise Fenced(f"trial {number}: expected attempt {attempt} to be the current one, got {found}")

    def _upsert(
        self, connection: sa.Connection, study_id: int, number: int, attempt: int, steps: Sequence[MeasurementRow]
    ) -> None:
        connection.execute(
            self._upsert_measurement,
            [
                {
                    "study_id": study_id, "number": number, "step": m.step, "attempt": m.attempt or attempt,
                    "elapsed_s": m.elapsed_s, "metrics": json.dumps(dict(m.metrics), allow_nan=False),
                }
                for m in steps
            ],
        )  # fmt: skip

    @cached_property
    def _upsert_measurement(self) -> sa.Insert:
        insert = self.database.insert(measurements)
        new = insert.excluded
        return insert.on_conflict_do_update(
            index_elements=["study_id", "number", "step"],
            set_={"attempt": new.attempt, "elapsed_s": new.elapsed_s, "metrics": new.metrics},
            where=measurements.c.attempt < new.attempt,
        )

    def _runs(self, *where: sa.ColumnElement[bool]) -> list[RunRow]:
        names = [field.name for field in fields(RunRow)]
        query = sa.select(*(runs.c[name] for name in names)).where(*where).order_by(runs.c.number)
        with self.database.transaction() as connection:
            rows = connection.execute(query).all()
        return [
            RunRow(**{**row._mapping, "config": json.loads(row.config) if row.config else None}) for row in rows
        ]

    def _release(self, connection: sa.Connection, study_id: int, number: int, attempt: int, outcome: str) -> None:
        connection.execute(
            attempts.update()
            .where(
                attempts.c.study_id == study_id,
                attempts.c.number == number,
                attempts.c.attempt == attempt,
                attempts.c.released_at.is_(None),
            )
            .values(released_at=self.database.now, outcome=outcome)
        )


def _is_run(study_id: int, number: int) -> sa.ColumnElement[bool]:
    return (runs.c.study_id == study_id) & (runs.c.number == number)
