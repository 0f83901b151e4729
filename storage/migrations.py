"""How our tables came to be what they are: one function a version, each written once and never changed.

Alembic does the altering (its operations alone: the version stands in `tuner_schema`).
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from storage.database import Database
from storage.tables import SCHEMA_VERSION, check_schema, schema, schema_version

# How long a migration waits for whoever reads or writes a table on PostgreSQL.
LOCK_TIMEOUT_S = 30


def migrate(database: Database, begin: Callable[[int], None] = lambda version: None) -> int:
    """Bring our tables to this package's version, in one transaction.

    Args:
        begin: called with the version found when it is older, before anything is changed; may refuse by raising.

    Returns:
        The version found.

    Raises:
        StorageError: the tables are newer than this package, or the database refused; nothing was changed.
    """
    with database.exclusive("schema"):
        found = schema_version(database)
        if found >= SCHEMA_VERSION:
            check_schema(database)
            return found
        begin(found)
        with database.transaction() as connection:
            if not database.is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
            operations = Operations(MigrationContext.configure(connection))
            for version in range(found, SCHEMA_VERSION):
                STEPS[version](operations)
            connection.execute(schema.update().values(version=SCHEMA_VERSION))
    return found


def _from_1_to_2(op: Operations) -> None:
    """The service: a queue, workers of no single study, checkpoints in an artifact store, notifications."""
    op.add_column("tuner_studies", sa.Column("queued_at", sa.Double))
    op.add_column("tuner_studies", sa.Column("stop", sa.String(16)))
    with op.batch_alter_table("tuner_workers") as workers:  # SQLite makes the table anew
        workers.alter_column("study_id", existing_type=sa.Integer, nullable=True)
    for column in (
        sa.Column("measured_at", sa.Double),
        sa.Column("uploaded_attempt", sa.Integer),
        sa.Column("uploaded_step", sa.Integer),
        sa.Column("curves", sa.Text),
    ):
        op.add_column("tuner_runs", column)
    op.create_index("ix_tuner_runs_study_id_ended_at", "tuner_runs", ["study_id", "ended_at"])
    op.create_table(
        "tuner_notifications",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("event", sa.String(32), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("claimed_at", sa.Double, nullable=False),
        sa.Column("sent_at", sa.Double),
    )


STEPS: dict[int, Callable[[Operations], None]] = {1: _from_1_to_2}
