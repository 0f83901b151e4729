"""Studies: their specification and totals, the queue, how far they are, who was told."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.rows import StudyProgress, StudyRow
from storage.tables import attempts, notifications, runs, same_attempt, studies, workers


class StudyStore:
    """The part of `storage.runs.Store` that is about whole studies."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create_study(self, name: str, spec: str, data: str, package_version: str, n_trials: int) -> StudyRow:
        """Store a new study; an existing one of that name is returned as it is. Process-safe."""
        now = self.database.now
        with self.database.transaction() as connection:
            connection.execute(
                self.database.insert(studies)
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
        return next(iter(self._studies(studies.c.name == name)), None)

    def get_study(self, study_id: int) -> StudyRow:
        found = self._studies(studies.c.id == study_id)
        if not found:
            raise StorageError(f"storage: study {study_id} is gone; it was deleted while in use")
        return found[0]

    def studies(self) -> list[StudyRow]:
        return self._studies()

    def delete_study(self, study_id: int) -> None:
        with self.database.transaction() as connection:
            connection.execute(studies.delete().where(studies.c.id == study_id))

    def start_study(self, study_id: int, n_trials: int, n_replacements: int) -> None:
        """Begin, or begin again: raise the totals (never lower them), note the time, lift a stop."""
        raised = studies.c.n_trials
        more = studies.c.n_replacements
        self._update(
            study_id,
            n_trials=sa.case((raised < n_trials, n_trials), else_=raised),
            n_replacements=sa.case((more < n_replacements, n_replacements), else_=more),
            started_at=self.database.now,
            stop=None,
        )

    def update_study(self, study_id: int, spec: str, package_version: str, data: str) -> None:
        """Store what may change of a study between two runs of it; `data` tell of the same content, differently."""
        self._update(study_id, spec=spec, package_version=package_version, data=data)

    # --- the queue -------------------------------------------------------------------------------------------

    def queue_study(self, study_id: int) -> None:
        """Put a study in the queue, where it keeps the place it has, and lift a stop."""
        self._update(study_id, queued_at=sa.func.coalesce(studies.c.queued_at, self.database.now), stop=None)

    def stop_study(self, study_id: int, mode: Literal["drain", "now"]) -> None:
        """Take a study out of the queue; its workers are told at their next measurement (StudyRow.stop)."""
        self._update(study_id, queued_at=None, stop=mode)

    def queued_studies(self) -> list[StudyRow]:
        """What workers of the service may serve, oldest first: queued, not stopped, total not reached."""
        ended = (
            sa.select(sa.func.count())
            .where(runs.c.study_id == studies.c.id, runs.c.ended_at.is_not(None))
            .scalar_subquery()
        )
        wanted = (
            studies.c.queued_at.is_not(None)
            & studies.c.stop.is_(None)
            & (ended < studies.c.n_trials + studies.c.n_replacements)
        )
        return self._studies(wanted, order=studies.c.queued_at)

    # --- progress --------------------------------------------------------------------------------------------

    def progress(self, study_id: int | None = None) -> list[StudyProgress]:
        """What became of the runs of one study or of all, by id; one query."""
        counted = _run_counts(self.database.now).subquery()
        begun = (
            sa.select(attempts.c.study_id, sa.func.min(attempts.c.claimed_at).label("first_started_at"))
            .group_by(attempts.c.study_id)
            .subquery()
        )
        query = (
            sa.select(studies, *(c for c in counted.c if c.name != "study_id"), begun.c.first_started_at)
            .outerjoin(counted, counted.c.study_id == studies.c.id)
            .outerjoin(begun, begun.c.study_id == studies.c.id)
            .order_by(studies.c.id)
        )
        if study_id is not None:
            query = query.where(studies.c.id == study_id)
        with self.database.transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return [_progress(dict(row)) for row in rows]

    # --- notifications ---------------------------------------------------------------------------------------

    def claim_notification(self, study_id: int, event: str, key: str, again_after_s: float = 120.0) -> bool:
        """The right to tell somebody of an event: True for one caller on all machines.

        Who claimed it and has not told within `again_after_s` loses the right to the next caller.
        """
        now = self.database.now
        claim = self.database.insert(notifications).values(study_id=study_id, event=event, key=key, claimed_at=now)
        claim = claim.on_conflict_do_update(
            index_elements=["study_id", "event", "key"],
            set_={"claimed_at": now},
            where=notifications.c.sent_at.is_(None) & (notifications.c.claimed_at <= now - again_after_s),
        )
        with self.database.transaction() as connection:
            return connection.execute(claim.returning(notifications.c.event)).first() is not None

    def sent_notification(self, study_id: int, event: str, key: str) -> None:
        """It was told: nobody tells it again."""
        with self.database.transaction() as connection:
            connection.execute(
                notifications.update()
                .where(
                    notifications.c.study_id == study_id, notifications.c.event == event,
                    notifications.c.key == key,
                )
                .values(sent_at=self.database.now)
            )  # fmt: skip

    # --- inside ----------------------------------------------------------------------------------------------

    def _studies(
        self, where: sa.ColumnElement[bool] | None = None, order: sa.ColumnElement[float] | None = None
    ) -> list[StudyRow]:
        """By id, or by `order` first."""
        query = sa.select(studies).order_by(*([] if order is None else [order]), studies.c.id)
        if where is not None:
            query = query.where(where)
        with self.database.transaction() as connection:
            return [StudyRow(**row) for row in connection.execute(query).mappings()]

    def _update(self, study_id: int, **values: object) -> None:
        with self.database.transaction() as connection:
            connection.execute(studies.update().where(studies.c.id == study_id).values(**values))


def _run_counts(now: sa.ColumnElement[float]) -> sa.Select:
    """Per study: its runs by state, and when the newest were measured and ended."""
    ended = runs.c.ended_at.is_not(None)
    failed = ended & runs.c.failure.is_not(None)
    pruned = ended & runs.c.failure.is_(None) & (attempts.c.outcome == "pruned")
    # Of a study that was copied from another database there are attempts whose worker is not here.
    held = ~ended & attempts.c.released_at.is_(None) & workers.c.id.is_not(None) & workers.c.ended_at.is_(None)

    def count(condition: sa.ColumnElement[bool], name: str) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0)).label(name)

    return (
        sa.select(
            runs.c.study_id,
            count(ended, "n_ended"),
            count(pruned, "pruned"),
            count(failed, "failed"),
            count(~ended, "n_open"),
            count(held, "running"),
            count(ended & (runs.c.ended_at > now - 3600.0), "ended_last_hour"),
            sa.func.max(runs.c.measured_at).label("last_measured_at"),
            sa.func.max(runs.c.ended_at).label("last_ended_at"),
        )
        .join(attempts, same_attempt())
        .outerjoin(workers, workers.c.id == attempts.c.worker_id)
        .group_by(runs.c.study_id)
    )


def _progress(row: dict) -> StudyProgress:
    study = StudyRow(**{column.name: row.pop(column.name) for column in studies.c})
    times = {name: row.pop(name) for name in ("first_started_at", "last_measured_at", "last_ended_at")}
    counts = {name: int(value or 0) for name, value in row.items()}
    counts["complete"] = counts.pop("n_ended") - counts["pruned"] - counts["failed"]
    counts["waiting"] = counts.pop("n_open") - counts["running"]
    return StudyProgress(study, **counts, **times)
