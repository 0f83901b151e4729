"""The registry: versions of models, which of them is in service, and how that came about.

A name has at most one champion, which the database itself sees to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.evaluations import from_json, to_json
from storage.rows import ModelRow, PromotionRow
from storage.tables import models, one_writer, promotions


class RegistryConflict(StorageError):
    """Another promotion or rollback came first; nothing was changed."""


class ModelStore:
    """The part of `storage.runs.Store` that is about models in service. Each method is one transaction."""

    database: Database

    def add_model(
        self, name: str, evaluation: str, artifact: str, checksum: str, size_bytes: int, config: Mapping[str, Any],
        metrics: Mapping[str, Any], certificate: Mapping[str, Any] | None, data_hash: str, package_version: str,
    ) -> ModelRow:  # fmt: skip
        """The next version of a model, as a candidate.

        What is there of the same evaluation and checksum keeps its version and state and gets these metrics: an
        evaluation that went on with more seeds knows the same model better. So it may be asked for again.
        """
        same = (models.c.name == name) & (models.c.evaluation == evaluation) & (models.c.checksum == checksum)
        highest = sa.select(sa.func.max(models.c.version)).where(models.c.name == name)
        now = self.database.now
        values = {
            "name": name, "state": "candidate", "evaluation": evaluation, "artifact": artifact,
            "checksum": checksum, "size_bytes": size_bytes, "config": to_json(config), "metrics": to_json(metrics),
            "certificate": None if certificate is None else to_json(certificate), "data_hash": data_hash,
            "package_version": package_version, "created_at": now, "changed_at": now,
        }  # fmt: skip
        with self.database.transaction() as connection:
            one_writer(connection, models)
            row = connection.execute(sa.select(models).where(same)).first()
            if row is None:
                version = int(connection.scalar(highest) or 0) + 1
                new = models.insert().values(**values, version=version).returning(models)
                row = connection.execute(new).one()
            elif row.metrics != values["metrics"]:
                better = models.update().where(same).values(metrics=values["metrics"]).returning(models)
                row = connection.execute(better).one()
        return _model(row)

    def models(self, name: str | None = None) -> list[ModelRow]:
        """Of one name or of all, by name and version."""
        return self._models(*([] if name is None else [models.c.name == name]))

    def find_model(self, name: str, version: int | None = None) -> ModelRow | None:
        """One version of a model; None: its champion."""
        wanted = models.c.state == "champion" if version is None else models.c.version == version
        return next(iter(self._models(models.c.name == name, wanted)), None)

    def promote(self, name: str, version: int, expected_champion: int | None, gate: Mapping[str, Any]) -> ModelRow:
        """Make a version the champion; the one until now is retired. A version that is champion already stays it.

        Args:
            expected_champion: the champion that `gate` was judged against; None: there was none.

        Raises:
            RegistryConflict: the champion is another one by now.
            StorageError: no such version.
        """
        with self.database.transaction() as connection:
            one_writer(connection, models)
            self._one(connection, name, version)
            if _champion(connection, name) != version:
                self._replace(connection, name, version, expected_champion, "promote", gate)
            return self._one(connection, name, version)

    def rollback(self, name: str, expected_champion: int | None) -> ModelRow:
        """Take back the newest promotion that still counts: the champion before it is champion again.

        Rolling back twice takes back two promotions; it never goes forth to what was rolled back.

        Raises:
            RegistryConflict: the champion is no longer the expected one.
            StorageError: there is no champion, or none before it.
        """
        with self.database.transaction() as connection:
            one_writer(connection, models)
            _expect_champion(connection, name, expected_champion)
            former = _former(connection, name)
            if former is None:
                raise StorageError(
                    f"registry: {name}: expected a champion before this one, got none; promote another version"
                )
            self._replace(connection, name, former, expected_champion, "rollback", {})
            return self._one(connection, name, former)

    def promotions(self, name: str) -> list[PromotionRow]:
        """Everything that became of a name's champions, in order."""
        query = sa.select(promotions).where(promotions.c.name == name).order_by(promotions.c.id)
        with self.database.transaction() as connection:
            rows = connection.execute(query).all()
        return [PromotionRow(**{**row._mapping, "gate": from_json(row.gate)}) for row in rows]

    # --- inside ----------------------------------------------------------------------------------------------

    def _replace(
        self, connection: sa.Connection, name: str, version: int, expected: int | None,
        action: Literal["promote", "rollback"], gate: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """The one way a champion comes about."""
        _expect_champion(connection, name, expected)
        now = self.database.now
        # In this order: at no moment has a name two champions.
        for state, changed in (("retired", expected), ("champion", version)):
            connection.execute(
                models.update()
                .where(models.c.name == name, models.c.version == changed)
                .values(state=state, changed_at=now)
            )
        connection.execute(
            promotions.insert().values(
                name=name, version=version, former=expected, action=action, gate=to_json(gate), at=now
            )
        )

    def _one(self, connection: sa.Connection, name: str, version: int) -> ModelRow:
        query = sa.select(models).where(models.c.name == name, models.c.version == version)
        row = connection.execute(query).first()
        if row is None:
            raise StorageError(f"registry: {name}: expected version {version}, got none of this number")
        return _model(row)

    def _models(self, *where: sa.ColumnElement[bool]) -> list[ModelRow]:
        query = sa.select(models).where(*where).order_by(models.c.name, models.c.version)
        with self.database.transaction() as connection:
            return [_model(row) for row in connection.execute(query)]


def _champion(connection: sa.Connection, name: str) -> int | None:
    return connection.scalar(sa.select(models.c.version).where(models.c.name == name, models.c.state == "champion"))


def _expect_champion(connection: sa.Connection, name: str, expected: int | None) -> None:
    found = _champion(connection, name)
    if found != expected:
        raise RegistryConflict(
            f"registry: {name}: expected {_named(expected)} in service, got {_named(found)}: somebody else "
            "changed it meanwhile; look at `tuner models` and ask again"
        )


def _former(connection: sa.Connection, name: str) -> int | None:
    """The champion before the present one, when what was rolled back is left out."""
    query = sa.select(promotions.c.action, promotions.c.version).where(promotions.c.name == name)
    line: list[int] = []
    for row in connection.execute(query.order_by(promotions.c.id)):
        if row.action == "promote":
            line.append(row.version)
        else:
            line.pop()
    return line[-2] if len(line) > 1 else None


def _named(version: int | None) -> str:
    return "no champion" if version is None else f"version {version}"


def _model(row: sa.Row[Any]) -> ModelRow:
    texts = {name: from_json(row._mapping[name]) for name in ("config", "metrics", "certificate")}
    return ModelRow(**{**row._mapping, **texts})
