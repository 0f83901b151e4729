"""Workers: who there is, whose lease is how old, who holds what."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.leases import GRACE_S, ProcessIdentity, is_dead
from storage.rows import Holding, WorkerRow
from storage.tables import attempts, runs, same_attempt, studies, workers

# How long a worker is still shown: after it signed off, and after its last renewal where it never did.
SHOWN_ENDED_S = 3600.0
SHOWN_SILENT_S = 86400.0


class WorkerStore:
    """The part of `storage.runs.Store` that is about workers and their leases."""

    database: Database

    def register_worker(self, study_id: int | None, identity: ProcessIdentity, device: str) -> int:
        """A new worker, of one study or (None) of the service; returns its id."""
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

    def workers(self, study_id: int | None = None) -> list[WorkerRow]:
        """By id: those of a study (registered for it, or with an attempt in it), however long ago. None: those of
        the whole database that have not ended, or did within the last hour; without the ones that were silent
        for a day."""
        now = self.database.now
        if study_id is None:
            ended_lately = workers.c.ended_at > now - SHOWN_ENDED_S
            silent = workers.c.renewed_at <= now - SHOWN_SILENT_S
            wanted = ended_lately | (workers.c.ended_at.is_(None) & ~silent)
        else:
            served = sa.select(attempts.c.worker_id).where(attempts.c.study_id == study_id)
            wanted = (workers.c.study_id == study_id) | workers.c.id.in_(served)
        query = sa.select(workers, (now - workers.c.renewed_at).label("age_s")).where(wanted)
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(workers.c.id)).all()
        return [
            WorkerRow(r.id, _identity(r), r.device, r.started_at, r.age_s, r.ended_at, r.study_id) for r in rows
        ]

    def holdings(self) -> dict[int, list[Holding]]:
        """What each worker has in hand, dead ones included: worker id -> its claims that are neither released nor
        of an ended run, by number."""
        query = (
            sa.select(attempts, runs.c.arm, runs.c.checkpoint_step, runs.c.measured_at, studies.c.name)
            .join(runs, same_attempt())
            .join(studies, studies.c.id == runs.c.study_id)
            .where(runs.c.ended_at.is_(None), attempts.c.released_at.is_(None))
            .order_by(attempts.c.number)
        )
        with self.database.transaction() as connection:
            rows = connection.execute(query).all()
        found: dict[int, list[Holding]] = {}
        for r in rows:
            holding = Holding(r.name, r.number, r.attempt, r.arm, r.checkpoint_step, r.claimed_at, r.measured_at)
            found.setdefault(r.worker_id, []).append(holding)
        return found

    def held_runs(
        self, study_id: int, judge_others: bool, grace_s: float = GRACE_S, claimant: int | None = None,
        in_hand: Collection[int] = (),
    ) -> dict[int, str]:  # fmt: skip
        """What became of the owner of every claimed run: number -> `alive`, `died` or `expired`.

        `died`: its process on this host is gone, which is seen at once. Elsewhere only a lease older than
        `grace_s` is `expired`, and only when the caller may judge (`judge_others`: it has seen the database up for
        two renewals). A worker that signed off holds nothing any more. Of the `claimant`, which asks for its next
        run, those `in_hand` are alive: what else it seems to hold it never heard of, as the database went away
        before answering.
        """
        age = (self.database.now - workers.c.renewed_at).label("age_s")
        query = (
            sa.select(runs.c.number, workers, age)
            .join(attempts, same_attempt())
            .join(workers, workers.c.id == attempts.c.worker_id)
            .where(
                runs.c.study_id == study_id, runs.c.ended_at.is_(None), attempts.c.released_at.is_(None),
                workers.c.ended_at.is_(None),
            )
        )  # fmt: skip
        with self.database.transaction() as connection:
            claims = connection.execute(query).all()

        def fate(number: int, owner: sa.Row[Any]) -> str:
            if owner.id == claimant:
                return "alive" if number in in_hand else "expired"
            dead = is_dead(_identity(owner))
            if dead is None:
                return "expired" if judge_others and owner.age_s > grace_s else "alive"
            return "died" if dead else "alive"

        return {claim.number: fate(claim.number, claim) for claim in claims}


def _identity(row: sa.Row[Any]) -> ProcessIdentity:
    return ProcessIdentity(row.host, row.boot, row.pid, row.process_start)
