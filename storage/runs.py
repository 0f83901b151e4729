"""Studies, runs, attempts and measurements: what must survive any kill.

Every write that belongs to an attempt is fenced: it happens only while that attempt is the run's current one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from storage.database import Database, StorageError
from storage.leases import GRACE_S, ProcessIdentity, is_dead
from storage.rows import AttemptRow, MeasurementRow, RunRow, StudyRow, WorkerRow
from storage.tables import attempts, measurements, runs, studies, workers

__all__ = ["AttemptRow", "Fenced", "MeasurementRow", "RunRow", "Store", "StudyRow", "WorkerRow"]


class Fenced(Exception):
    """This attempt is no longer the run's current one: another worker owns the trial. Write nothing more."""


class Store:
    """Everything we keep in the database, for one database. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._insert = sqlite_insert if database.is_sqlite else postgresql_insert

    # --- studies -------------------------------------------------------------------------------------------

    def create_study(self, name: str, spec: str, data: str, package_version: str, n_trials: int) -> StudyRow:
        """Store a new study; an existing one of that name is returned as it is. Process-safe."""
        now = self.database.now
        with self.database.transaction() as connection:
            connection.execute(
                self._insert(studies)
                .values(
                    name=name, spec=spec, data=data, package_version=package_version,
                    n_trials=n_trials, created_at=now, started_at=now,
                )
                .on_conflict_do_nothing(index_elements=["name"])
            )  # fmt: skip
        study = self.find_study(name)
        assert study is not None
        return study

    def find_study(self, name: str) -> StudyRow | None:
        with self.database.transaction() as connection:
            row = connection.execute(sa.select(studies).where(studies.c.name == name)).mappings().first()
        return StudyRow(**row) if row else None

    def get_study(self, study_id: int) -> StudyRow:
        with self.database.transaction() as connection:
            row = connection.execute(sa.select(studies).where(studies.c.id == study_id)).mappings().first()
        if row is None:
            raise StorageError(f"storage: study {study_id} is gone; it was deleted while in use")
        return StudyRow(**row)

    def studies(self) -> list[StudyRow]:
        with self.database.transaction() as connection:
            rows = connection.execute(sa.select(studies).order_by(studies.c.id)).mappings().all()
        return [StudyRow(**row) for row in rows]

    def delete_study(self, study_id: int) -> None:
        with self.database.transaction() as connection:
            connection.execute(studies.delete().where(studies.c.id == study_id))

    def start_study(self, study_id: int, n_trials: int, n_replacements: int) -> None:
        """A new `tuner run`: raise the totals (never lower them) and note the time."""
        raised = studies.c.n_trials
        more = studies.c.n_replacements
        with self.database.transaction() as connection:
            connection.execute(
                studies.update()
                .where(studies.c.id == study_id)
                .values(
                    n_trials=sa.case((raised < n_trials, n_trials), else_=raised),
                    n_replacements=sa.case((more < n_replacements, n_replacements), else_=more),
                    started_at=self.database.now,
                )
            )

    def update_study(self, study_id: int, spec: str, package_version: str) -> None:
        """Store what may change of a study between two runs of it."""
        with self.database.transaction() as connection:
            connection.execute(
                studies.update().where(studies.c.id == study_id).values(spec=spec, package_version=package_version)
            )

    # --- workers and their leases ----------------------------------------------------------------------------

    def register_worker(self, study_id: int, identity: ProcessIdentity, device: str) -> int:
        now = self.database.now
        with self.database.transaction() as connection:
            result = connection.execute(
                workers.insert()
                .values(
                    study_id=study_id, host=identity.host, boot=identity.boot, pid=identity.pid,
                    process_start=identity.process_start, device=device, started_at=now, renewed_at=now,
                )
                .returning(workers.c.id)
            )  # fmt: skip
            return int(result.scalar_one())

    def renew(self, worker_id: int) -> None:
        with self.database.transaction() as connection:
            connection.execute(
                workers.update().where(workers.c.id == worker_id).values(renewed_at=self.database.now)
            )

    def end_worker(self, worker_id: int) -> None:
        with self.database.transaction() as connection:
            connection.execute(workers.update().where(workers.c.id == worker_id).values(ended_at=self.database.now))

    def workers(self, study_id: int) -> list[WorkerRow]:
        age = (self.database.now - workers.c.renewed_at).label("age_s")
        with self.database.transaction() as connection:
            rows = connection.execute(
                sa.select(workers, age).where(workers.c.study_id == study_id).order_by(workers.c.id)
            ).all()
        return [
            WorkerRow(
                r.id, ProcessIdentity(r.host, r.boot, r.pid, r.process_start), r.device, r.started_at, r.age_s,
                r.ended_at,
            )
            for r in rows
        ]  # fmt: skip

    def held_runs(
        self, study_id: int, judge_others: bool, grace_s: float = GRACE_S, claimant: int | None = None
    ) -> dict[int, str]:
        """What became of the owner of every claimed run: number -> `alive`, `died` or `expired`.

        `died`: its process on this host is gone, which is seen at once. Elsewhere only a lease older than
        `grace_s` is `expired`, and only when the caller may judge (`judge_others`: it has seen the database up for
        two renewals). A worker that signed off holds nothing any more. Nor does the `claimant`, which asks for
        its next run: what it seems to hold it never heard of, as the database went away before answering.
        """
        age = (self.database.now - workers.c.renewed_at).label("age_s")
        query = (
            sa.select(runs.c.number, workers, age)
            .join(attempts, _same_attempt())
            .join(workers, workers.c.id == attempts.c.worker_id)
            .where(
                runs.c.study_id == study_id, runs.c.ended_at.is_(None), attempts.c.released_at.is_(None),
                workers.c.ended_at.is_(None),
            )
        )  # fmt: skip
        with self.database.transaction() as connection:
            claims = connection.execute(query).all()

        def fate(owner: sa.Row[Any]) -> str:
            if owner.id == claimant:
                return "expired"
            dead = is_dead(ProcessIdentity(owner.host, owner.boot, owner.pid, owner.process_start))
            if dead is None:
                return "expired" if judge_others and owner.age_s > grace_s else "alive"
            return "died" if dead else "alive"

        return {claim.number: fate(claim) for claim in claims}

    # --- runs and attempts -----------------------------------------------------------------------------------

    def claim(self, study_id: int, number: int, arm: str, worker_id: int) -> int:
        """Raise the run's attempt for this worker and return it. The caller holds the study's lock."""
        with self.database.transaction() as connection:
            attempt = connection.execute(
                self._insert(runs)
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

    def record(self, study_id: int, number: int, attempt: int, steps: Sequence[MeasurementRow]) -> int:
        """Store measurements, idempotently, and name the newest one's checkpoint: one transaction.

        Returns:
            How many runs of the study have ended; it changes only when a pruner has something new to see.

        Raises:
            Fenced: the run has another attempt by now; nothing was written.
        """
        with self.database.transaction() as connection:
            self._fence(connection, study_id, number, attempt)
            if steps:
                rows = [
                    {
                        "study_id": study_id, "number": number, "step": m.step, "attempt": m.attempt or attempt,
                        "elapsed_s": m.elapsed_s, "metrics": json.dumps(dict(m.metrics), allow_nan=False),
                    }
                    for m in steps
                ]  # fmt: skip
                newest = max(rows, key=lambda row: row["step"])
                connection.execute(self._insert(measurements).values(rows).on_conflict_do_nothing())
                connection.execute(
                    runs.update()
                    .where(_is_run(study_id, number))
                    .values(checkpoint_attempt=newest["attempt"], checkpoint_step=newest["step"])
                )
            ended = connection.scalar(
                sa.select(sa.func.count()).where(runs.c.study_id == study_id, runs.c.ended_at.is_not(None))
            )
        return int(ended or 0)

    def is_current(self, study_id: int, number: int, attempt: int) -> bool:
        """Whether `attempt` holds the run, or has ended it."""
        query = (
            sa.select(runs.c.attempt, runs.c.ended_at, attempts.c.released_at)
            .join(attempts, _same_attempt())
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
        query = sa.select(runs).where(runs.c.study_id == study_id)
        if open_only:
            query = query.where(runs.c.ended_at.is_(None))
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(runs.c.number)).all()
        return [
            RunRow(
                r.number, r.arm, json.loads(r.config) if r.config else None, r.attempt, r.checkpoint_attempt,
                r.checkpoint_step, r.best_step, r.ended_at, r.failure,
            )
            for r in rows
        ]  # fmt: skip

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

    def count_measurements(self, study_id: int) -> int:
        query = sa.select(sa.func.count()).where(measurements.c.study_id == study_id)
        with self.database.transaction() as connection:
            return int(connection.scalar(query) or 0)

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
        query = (
            sa.select(runs.c.attempt, runs.c.ended_at, attempts.c.released_at)
            .join(attempts, _same_attempt())
            .where(_is_run(study_id, number))
            .with_for_update(of=runs)
        )
        row = connection.execute(query).first()
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


def _same_attempt() -> sa.ColumnElement[bool]:
    return (
        (attempts.c.study_id == runs.c.study_id)
        & (attempts.c.number == runs.c.number)
        & (attempts.c.attempt == runs.c.attempt)
    )


def _is_run(study_id: int, number: int) -> sa.ColumnElement[bool]:
    return (runs.c.study_id == study_id) & (runs.c.number == number)
