"""A study's rows from one database into another: our tables' part of `tuner export` and `tuner import`.

What belongs to a database alone stays behind: workers and their leases, the queue, notifications. Ids are new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database, StorageError
from storage.tables import (
    attempts,
    certificates,
    evaluations,
    looks,
    measurements,
    models,
    one_writer,
    promotions,
    runs,
    studies,
)

# The worker of a copied attempt: workers are those of another database, and none has this id.
NOBODY = 0

_BATCH = 1000
_AGAIN = "/again-"  # as behind the name of an evaluation that looks at a model once more
# What makes a look or a certificate the same one in every database that knows of it, whatever its study is called.
_EVENT = {looks: ("data_hash", "role", "model", "opened_at"), certificates: ("data_hash", "model", "opened_at")}
_KEY = {looks: ("evaluation", "role", "model"), certificates: ("evaluation", "model")}


@dataclass(frozen=True)
class Side:
    """One end of a copy: a database, and the transaction in it that sees or writes everything."""

    database: Database
    connection: sa.Connection


@dataclass(frozen=True)
class CopiedStudy:
    """What was copied of one study; `n_begun` runs have measurements, and have not ended."""

    n_runs: int
    n_begun: int
    n_measurements: int


class Transfer:
    """Copies one study, with what hangs on its name, from `source` to `target`, where it is called `new`.

    Nothing is there before the target's transaction ends, and everything after.
    """

    def __init__(self, source: Side, target: Side, name: str, new: str) -> None:
        self.source, self.target = source.connection, target.connection
        self.database = target.database
        self.name, self.new = name, new
        row = self.source.execute(sa.select(studies).where(studies.c.name == name)).first()
        if row is None:
            raise StorageError(f"storage: study {name!r} is not in {source.database!r}")
        self._row = row
        self._ids: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The study's own name, then those of its evaluations' studies."""
        of_fits = sa.select(studies.c.name).join(evaluations, evaluations.c.name == studies.c.name)
        query = of_fits.where(evaluations.c.study_id == self._row.id).order_by(evaluations.c.number)
        return [self.name, *self.source.scalars(query)]

    def renamed(self, name: str) -> str:
        """A name as it is at the target, where it is the study's or one of its evaluations'."""
        ours = name == self.name or name.startswith(f"{self.name}.evaluation-")
        return self.new + name[len(self.name) :] if ours else name

    def check(self) -> None:
        """Raises StorageError where something at the target has one of the names that are needed."""
        wanted = [self.renamed(name) for name in self.names]
        taken = self.target.scalars(sa.select(studies.c.name).where(studies.c.name.in_(wanted))).all()
        taken += self.target.scalars(sa.select(evaluations.c.name).where(evaluations.c.name.in_(wanted))).all()
        if taken:
            raise StorageError(
                f"storage: {self.database!r}: expected no study {min(taken)!r}, got one; take another name with "
                f"--study NEW, or `tuner delete --study {self.new}` first"
            )

    def count(self) -> int:
        """How many runs and measurements there are to copy."""
        ids = sa.select(studies.c.id).where(studies.c.name.in_(self.names))
        counted = [
            sa.select(sa.func.count()).where(table.c.study_id.in_(ids)).scalar_subquery()
            for table in (runs, measurements)
        ]
        return int(self.source.scalar(sa.select(counted[0] + counted[1])) or 0)

    # --- a study -----------------------------------------------------------------------------------------------

    def copy_study(
        self, name: str, waiting: Collection[int], progress: Callable[[int], None] = lambda n: None
    ) -> CopiedStudy:
        """The study's row, its runs, attempts and measurements.

        It is a new study of its database: `created_at` tells it apart from the one that it was copied from, whose
        files must not be taken for its own.

        Args:
            waiting: the trials that wait for a worker at the target: whoever had one in hand has it no more.
            progress: called with how many further measurements are written.
        """
        row = self.source.execute(sa.select(studies).where(studies.c.name == name)).one()
        values = {column: value for column, value in row._mapping.items() if column != "id"}
        values |= {"name": self.renamed(name), "created_at": self.database.now, "queued_at": None, "stop": None}
        new_id = self.target.scalar(studies.insert().values(values).returning(studies.c.id))
        assert new_id is not None
        self._ids[name] = new_id
        here = {"study_id": new_id}
        # Uploads lie below the study's name.
        unknown = {} if self.new == self.name else {"uploaded_attempt": None, "uploaded_step": None}
        n_runs = self._copy(
            sa.select(runs).where(runs.c.study_id == row.id), runs, lambda run: run | here | unknown
        )
        self._copy(
            sa.select(attempts, runs.c.measured_at)
            .join(runs, (runs.c.study_id == attempts.c.study_id) & (runs.c.number == attempts.c.number))
            .where(attempts.c.study_id == row.id),
            attempts,
            lambda attempt: _left(attempt, waiting) | here | {"worker_id": NOBODY},
        )
        n_measurements = self._copy(
            sa.select(measurements).where(measurements.c.study_id == row.id), measurements, lambda m: m | here,
            progress,
        )  # fmt: skip
        begun = sa.select(sa.func.count()).where(
            runs.c.study_id == new_id, runs.c.ended_at.is_(None),
            sa.exists().where(measurements.c.study_id == runs.c.study_id, measurements.c.number == runs.c.number),
        )  # fmt: skip
        return CopiedStudy(n_runs, int(self.target.scalar(begun) or 0), n_measurements)

    def copy_evaluations(self, document: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
        """The study's evaluations, after their fits' studies; returns how many.

        Args:
            document: an evaluation's document as it is to be at the target.
        """

        def change(row: dict[str, Any]) -> dict[str, Any]:
            if row["document"] is not None:
                row["document"] = json.dumps(document(json.loads(row["document"])), allow_nan=False)
            return row | {"study_id": self._ids[self.name], "name": self.renamed(row["name"])}

        return self._copy(sa.select(evaluations).where(evaluations.c.study_id == self._row.id), evaluations, change)

    # --- what hangs on its name, and on its data -----------------------------------------------------------------

    def copy_models(self) -> int:
        """The models of the study's name and how they became champions; returns how many are new.

        Raises:
            StorageError: others have that name.
        """
        own = sa.select(models).where(models.c.name == self.name).order_by(models.c.version)
        found = self.source.execute(own).all()
        if not found:
            return 0
        one_writer(self.target, models)
        there = self.target.execute(sa.select(models).where(models.c.name == self.new)).all()
        if {(row.version, row.checksum) for row in found} <= {(row.version, row.checksum) for row in there}:
            return 0  # the study was deleted here, and what it left knows all of this already
        if there:
            versions = ", ".join(str(row.version) for row in there)
            raise StorageError(
                f"registry: {self.new}: expected no model of this name, got version {versions} of another study; "
                "take another name with --study NEW"
            )
        here = {"name": self.new}
        self._copy(own, models, lambda row: row | here | {"evaluation": self.renamed(row["evaluation"])})
        history = sa.select(promotions).where(promotions.c.name == self.name)
        self._copy(history, promotions, lambda row: row | here)
        return len(found)

    def copy_looks(self) -> int:
        """Every look at the study's data, whosever it was, that the target does not know yet; returns how many.

        Raises:
            StorageError: another study of this name has looked at data under the names of these evaluations.
        """
        return len(self._merge(looks))

    def copy_certificates(self) -> list[tuple[int, int]]:
        """Every certificate on the study's data that the target does not know yet.

        Each keeps what it has spent. Where the target has certificates on these data, it is numbered after them.

        Returns:
            (its number at the source, at the target) of each.
        """
        return [(was["number"], row["number"]) for was, row in self._merge(certificates)]

    def _merge(self, table: sa.Table) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What happened is known once, under whichever name; what is known better by now is completed."""
        one_writer(self.target, table)
        on_data = table.c.data_hash == json.loads(self._row.data)["data_hash"]
        query = sa.select(table).order_by(table.c.id)
        told = [dict(row) for row in self.source.execute(query.where(on_data)).mappings()]
        there = {_of(row, _EVENT[table]): row for row in self.target.execute(query.where(on_data)).mappings()}
        self._refuse_namesakes(table, {_of(row, _EVENT[table]) for row in told})
        new = []
        for was in told:
            known = there.get(_of(was, _EVENT[table]))
            row = {column: value for column, value in was.items() if column != "id"}
            if known is not None:
                missing = {name: row[name] for name in row if known[name] is None and row[name] is not None}
                if missing:
                    self.target.execute(table.update().where(table.c.id == known["id"]).values(missing))
                continue
            row |= {"study": self.renamed(row["study"]), "evaluation": self.renamed(row["evaluation"])}
            row["evaluation"] = self._free_name(table, row)
            if table is certificates:
                highest = self.target.scalar(sa.select(sa.func.max(table.c.number)).where(on_data))
                row["number"] = 1 + (highest or 0)
            self.target.execute(table.insert().values(row))
            new.append((was, row))
        return new

    def _refuse_namesakes(self, table: sa.Table, events: Collection[tuple[Any, ...]]) -> None:
        """Of a study that was deleted here, what it saw stands under its evaluations' names."""
        names = {self.renamed(name) for name in self.names[1:]}
        if not names:
            return
        ours = [table.c.evaluation.in_(names), *(table.c.evaluation.startswith(n + _AGAIN) for n in names)]
        for row in self.target.execute(sa.select(table).where(sa.or_(*ours))).mappings():
            if _of(row, _EVENT[table]) not in events:
                raise StorageError(
                    f"storage: {self.database!r}: expected nothing of {row['evaluation']}, got what a deleted "
                    "study of this name saw; take another name with --study NEW"
                )

    def _free_name(self, table: sa.Table, row: Mapping[str, Any]) -> str:
        """The evaluation's name in a look or certificate; with a number where another one stands under the same."""
        name, again = row["evaluation"], 0
        while True:
            wanted = {**row, "evaluation": f"{name}{_AGAIN}{again}" if again else name}
            same = sa.and_(*(table.c[column] == wanted[column] for column in _KEY[table]))
            if self.target.execute(sa.select(table.c.id).where(same)).first() is None:
                return wanted["evaluation"]
            again += 1

    def _copy(
        self, query: sa.Select, table: sa.Table, change: Callable[[dict[str, Any]], dict[str, Any]],
        progress: Callable[[int], None] = lambda n: None,
    ) -> int:  # fmt: skip
        """Insert what `query` finds, in the order of the table's key, without its id; returns how many rows."""
        own_id = {"id"} & {column.name for column in table.primary_key}
        ordered = query.order_by(*table.primary_key)
        n_rows = 0
        for part in self.source.execute(ordered, execution_options={"yield_per": _BATCH}).mappings().partitions():
            rows = [change({name: row[name] for name in row if name not in own_id}) for row in part]
            self.target.execute(table.insert(), rows)
            n_rows += len(rows)
            progress(len(rows))
        return n_rows


def _left(attempt: dict[str, Any], waiting: Collection[int]) -> dict[str, Any]:
    """An attempt as it is where nobody works on it: lost with its worker, after its last sign of life."""
    measured_at = attempt.pop("measured_at")
    if attempt["released_at"] is None and attempt["number"] in waiting:
        attempt["released_at"] = max(attempt["claimed_at"], measured_at or 0.0)
        attempt["outcome"] = "lost"
    return attempt


def _of(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)
