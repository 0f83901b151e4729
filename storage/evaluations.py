"""Evaluations, and what must never be forgotten of them: each look at a role that is kept back, each certificate.

Looks and certificates name their study and survive its deletion: what was seen of test cannot be unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.rows import CertificateRow, EvaluationRow, LookRow
from storage.tables import certificates, evaluations, looks, one_writer


class EvaluationStore:
    """The part of `storage.runs.Store` that is about evaluations. Each method is one transaction.

    JSON is refused with a ValueError where it holds what is no finite number.
    """

    database: Database

    def create_evaluation(self, study_id: int, number: int, name: str, plan: Mapping[str, Any]) -> EvaluationRow:
        """A new evaluation of a study. Raises StorageError where its number or name is taken."""
        new = (
            self.database.insert(evaluations)
            .values(
                study_id=study_id, number=number, name=name, plan=to_json(plan), created_at=self.database.now,
            )
            .on_conflict_do_nothing()
            .returning(evaluations)
        )  # fmt: skip
        with self.database.transaction() as connection:
            row = connection.execute(new).first()
        if row is None:
            raise StorageError(
                f"storage: expected evaluation {number} to be new, got one that is there ({name}); "
                "somebody else began it, go on with that one"
            )
        return _evaluation(row)

    def evaluations(self, study_id: int) -> list[EvaluationRow]:
        """Those of a study, by number."""
        return self._evaluations(evaluations.c.study_id == study_id)

    def find_evaluation(self, name: str) -> EvaluationRow | None:
        """The evaluation whose fits are in the study of this name."""
        return next(iter(self._evaluations(evaluations.c.name == name)), None)

    def set_nominee(self, evaluation_id: int, nominee: Mapping[str, Any]) -> dict[str, Any]:
        """Fix who is certified, once: what is returned is stored, whoever came first."""
        this = evaluations.c.id == evaluation_id
        with self.database.transaction() as connection:
            connection.execute(
                evaluations.update()
                .where(this, evaluations.c.nominee.is_(None))
                .values(nominee=to_json(nominee))
            )  # fmt: skip
            stored = connection.scalar(sa.select(evaluations.c.nominee).where(this))
        if stored is None:
            raise _gone(evaluation_id)
        return json.loads(stored)

    def finish_evaluation(self, evaluation_id: int, document: Mapping[str, Any]) -> None:
        """Store what an evaluation came to; a newer document takes the place of an older one."""
        values = {"document": to_json(document), "finished_at": self.database.now}
        with self.database.transaction() as connection:
            found = connection.execute(
                evaluations.update().where(evaluations.c.id == evaluation_id).values(values)
            ).rowcount
        if not found:
            raise _gone(evaluation_id)

    # --- looks -----------------------------------------------------------------------------------------------

    def open_look(self, data_hash: str, role: str, study: str, evaluation: str, model: str) -> LookRow:
        """Record, before it happens, that a model is scored on a role; the look that is there, where it is."""
        values = {"data_hash": data_hash, "role": role, "study": study, "evaluation": evaluation, "model": model}
        same = (looks.c.evaluation == evaluation) & (looks.c.role == role) & (looks.c.model == model)
        with self.database.transaction() as connection:
            connection.execute(
                self.database.insert(looks)
                .values(**values, opened_at=self.database.now)
                .on_conflict_do_nothing(index_elements=["evaluation", "role", "model"])
            )
            return LookRow(**connection.execute(sa.select(looks).where(same)).mappings().one())

    def close_look(self, look_id: int) -> None:
        """Its scores are durable. When it was closed first stays."""
        with self.database.transaction() as connection:
            connection.execute(
                looks.update()
                .where(looks.c.id == look_id, looks.c.scored_at.is_(None))
                .values(scored_at=self.database.now)
            )

    def looks(self, data_hash: str, role: str | None = None) -> list[LookRow]:
        """Every look at these data, of all studies there are and were, in the order they were opened."""
        query = sa.select(looks).where(looks.c.data_hash == data_hash).order_by(looks.c.id)
        if role is not None:
            query = query.where(looks.c.role == role)
        with self.database.transaction() as connection:
            return [LookRow(**row) for row in connection.execute(query).mappings()]

    def looked_by(self, study: str) -> set[str]:
        """Under which evaluations' names studies of this name have looked at anything, also those deleted since."""
        query = sa.select(looks.c.evaluation).where(looks.c.study == study).distinct()
        with self.database.transaction() as connection:
            return set(connection.scalars(query))

    # --- certificates ----------------------------------------------------------------------------------------

    def open_certificate(
        self, data_hash: str, study: str, evaluation: str, model: str, delta_of: Callable[[int], float]
    ) -> CertificateRow:
        """The next certificate on these data, before anything of calibrate is seen; the one of this evaluation and
        model where it is there.

        Args:
            delta_of: what the certificate of a number spends.

        Guarantees:
            Numbers have no gap and none is given twice, whoever asks at the same time.
        """
        this = (certificates.c.evaluation == evaluation) & (certificates.c.model == model)
        highest = sa.select(sa.func.max(certificates.c.number)).where(certificates.c.data_hash == data_hash)
        with self.database.transaction() as connection:
            one_writer(connection, certificates)
            row = connection.execute(sa.select(certificates).where(this)).first()
            if row is None:
                number = int(connection.scalar(highest) or 0) + 1
                new = certificates.insert().values(
                    data_hash=data_hash, study=study, evaluation=evaluation, model=model, number=number,
                    delta=delta_of(number), opened_at=self.database.now,
                )  # fmt: skip
                row = connection.execute(new.returning(certificates)).one()
        return _certificate(row)

    def issue_certificate(self, certificate_id: int, content: Mapping[str, Any]) -> None:
        """Write what a certificate says, once: a second call changes nothing."""
        with self.database.transaction() as connection:
            connection.execute(
                certificates.update()
                .where(certificates.c.id == certificate_id, certificates.c.content.is_(None))
                .values(content=to_json(content), issued_at=self.database.now)
            )

    def certificates(self, data_hash: str) -> list[CertificateRow]:
        """Every certificate on these data, by number."""
        query = sa.select(certificates).where(certificates.c.data_hash == data_hash)
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(certificates.c.number)).all()
        return [_certificate(row) for row in rows]

    # --- inside ----------------------------------------------------------------------------------------------

    def _evaluations(self, where: sa.ColumnElement[bool]) -> list[EvaluationRow]:
        query = sa.select(evaluations).where(where).order_by(evaluations.c.number)
        with self.database.transaction() as connection:
            return [_evaluation(row) for row in connection.execute(query)]


def to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), allow_nan=False)


def from_json(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)


def _evaluation(row: sa.Row[Any]) -> EvaluationRow:
    texts = {name: from_json(row._mapping[name]) for name in ("plan", "nominee", "document")}
    return EvaluationRow(**{**row._mapping, **texts})


def _certificate(row: sa.Row[Any]) -> CertificateRow:
    return CertificateRow(**{**row._mapping, "content": from_json(row.content)})


def _gone(evaluation_id: int) -> StorageError:
    return StorageError(f"storage: evaluation {evaluation_id} is gone; its study was deleted while in use")
