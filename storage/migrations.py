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


def _from_2_to_3(op: Operations) -> None:
    """The verdict: evaluations, looks at calibrate and test, certificates, the registry of models."""
    op.create_table(
        "tuner_evaluations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("name", sa.String(255), nullable=False, unique=True),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("nominee", sa.Text),
        sa.Column("document", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.UniqueConstraint("study_id", "number", name="uq_tuner_evaluations_study_id_number"),
    )
    _add_looks_and_certificates(op)
    _add_registry(op)


def _add_looks_and_certificates(op: Operations) -> None:
    op.create_table(
        "tuner_looks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("data_hash", sa.String(255), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("study", sa.String(255), nullable=False),
        sa.Column("evaluation", sa.String(255), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("opened_at", sa.Double, nullable=False),
        sa.Column("scored_at", sa.Double),
        sa.UniqueConstraint("evaluation", "role", "model", name="uq_tuner_looks_evaluation_role_model"),
    )
    op.create_index("ix_tuner_looks_data_hash", "tuner_looks", ["data_hash"])
    op.create_table(
        "tuner_certificates",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("data_hash", sa.String(255), nullable=False),
        sa.Column("study", sa.String(255), nullable=False),
        sa.Column("evaluation", sa.String(255), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("delta", sa.Double, nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("opened_at", sa.Double, nullable=False),
        sa.Column("issued_at", sa.Double),
        sa.UniqueConstraint("data_hash", "number", name="uq_tuner_certificates_data_hash_number"),
        sa.UniqueConstraint("evaluation", "model", name="uq_tuner_certificates_evaluation_model"),
    )


def _add_registry(op: Operations) -> None:
    op.create_table(
        "tuner_models",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("evaluation", sa.String(255), nullable=False),
        sa.Column("artifact", sa.Text, nullable=False),
        sa.Column("checksum", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("certificate", sa.Text),
        sa.Column("data_hash", sa.String(255), nullable=False),
        sa.Column("package_version", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
        sa.UniqueConstraint("name", "version", name="uq_tuner_models_name_version"),
    )
    champions = sa.text("state = 'champion'")
    op.create_index(
        "ix_tuner_models_champion", "tuner_models", ["name"], unique=True,
        sqlite_where=champions, postgresql_where=champions,
    )  # fmt: skip
    op.create_table(
        "tuner_promotions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("former", sa.Integer),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("gate", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_tuner_promotions_name", "tuner_promotions", ["name"])


STEPS: dict[int, Callable[[Operations], None]] = {1: _from_1_to_2, 2: _from_2_to_3}
