"""Our tables, beside Optuna's and never mixed with them: prefix `tuner_`, own version.

A run is identified by (study_id, number), number being Optuna's trial number. Times are seconds since 1970 by the
database's clock.
"""

from __future__ import annotations

import sqlalchemy as sa

from storage.database import Database, StorageError

SCHEMA_VERSION = 3
metadata = sa.MetaData()

schema = sa.Table(
    "tuner_schema",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
)

studies = sa.Table(
    "tuner_studies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("spec", sa.Text, nullable=False),  # JSON, as resolved from the YAML
    sa.Column("data", sa.Text, nullable=False),  # JSON: data hash, source, rows per role, file hashes
    sa.Column("package_version", sa.String(64), nullable=False),
    sa.Column("n_trials", sa.Integer, nullable=False),  # total of ended trials that was asked for
    sa.Column("n_replacements", sa.Integer, nullable=False, server_default="0"),  # added by --retry-failed
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),  # the newest `tuner run` or `tuner submit`
    sa.Column("queued_at", sa.Double),  # since when it waits for `tuner worker`; null: it does not
    sa.Column("stop", sa.String(16)),  # drain | now: asked for by `tuner stop`
)

workers = sa.Table(
    "tuner_workers",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    # The one study it serves; null: a worker of the service.
    sa.Column("study_id", sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), index=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("boot", sa.String(255), nullable=False),  # boot id and process namespace: where a pid means something
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_start", sa.BigInteger, nullable=False),  # tells a reused pid apart
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("renewed_at", sa.Double, nullable=False),  # the lease on whatever the worker holds
    sa.Column("ended_at", sa.Double),
)

runs = sa.Table(
    "tuner_runs",
    metadata,
    sa.Column("study_id", sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("arm", sa.String(255), nullable=False),
    sa.Column("config", sa.Text),  # JSON, complete; null until sampled
    sa.Column("attempt", sa.Integer, nullable=False),  # the fencing token
    sa.Column("checkpoint_attempt", sa.Integer),
    sa.Column("checkpoint_step", sa.Integer),
    sa.Column("best_step", sa.Integer),  # of an ended run: the step its objective value was measured at
    sa.Column("ended_at", sa.Double),
    sa.Column("failure", sa.Text),
    sa.Column("measured_at", sa.Double),  # when the newest measurement came
    sa.Column("uploaded_attempt", sa.Integer),  # with uploaded_step: the newest checkpoint in the artifact store
    sa.Column("uploaded_step", sa.Integer),
    sa.Column("curves", sa.Text),  # JSON of the best step so far, which `step` in it names
    sa.Index("ix_tuner_runs_study_id_ended_at", "study_id", "ended_at"),
)

attempts = sa.Table(
    "tuner_attempts",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("worker_id", sa.Integer, nullable=False),  # 0: one of the database that the study was copied from
    sa.Column("claimed_at", sa.Double, nullable=False),
    sa.Column("released_at", sa.Double),
    sa.Column("outcome", sa.String(32)),  # complete | pruned | failed | stopped | lost | crashed
    sa.ForeignKeyConstraint(
        ["study_id", "number"], ["tuner_runs.study_id", "tuner_runs.number"], ondelete="CASCADE"
    ),
)

measurements = sa.Table(
    "tuner_measurements",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("elapsed_s", sa.Double, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON {name: float}
    sa.ForeignKeyConstraint(
        ["study_id", "number"], ["tuner_runs.study_id", "tuner_runs.number"], ondelete="CASCADE"
    ),
)

notifications = sa.Table(
    "tuner_notifications",
    metadata,
    sa.Column("study_id", sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("event", sa.String(32), primary_key=True),  # finished | stalled | failed
    sa.Column("key", sa.String(64), primary_key=True),  # tells one occasion of the event from the next
    sa.Column("claimed_at", sa.Double, nullable=False),
    sa.Column("sent_at", sa.Double),
)

evaluations = sa.Table(
    "tuner_evaluations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("tuner_studies.id", ondelete="CASCADE"), nullable=False),  # searched
    sa.Column("number", sa.Integer, nullable=False),  # of the study's evaluations, from 1
    sa.Column("name", sa.String(255), nullable=False, unique=True),  # the study that holds its fits
    sa.Column("plan", sa.Text, nullable=False),  # JSON
    sa.Column("nominee", sa.Text),  # JSON, written once: fixed before anything of calibrate is seen
    sa.Column("document", sa.Text),  # JSON: what it came to
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("finished_at", sa.Double),
    sa.UniqueConstraint("study_id", "number", name="uq_tuner_evaluations_study_id_number"),
)

# What follows names studies, but hangs on none: deleting a study takes back neither a look at its data nor a
# certificate, and no model that is in service.

looks = sa.Table(
    "tuner_looks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("data_hash", sa.String(255), nullable=False, index=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("study", sa.String(255), nullable=False),
    sa.Column("evaluation", sa.String(255), nullable=False),
    sa.Column("model", sa.String(255), nullable=False),  # the checkpoint's SHA-256
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Column("scored_at", sa.Double),
    sa.UniqueConstraint("evaluation", "role", "model", name="uq_tuner_looks_evaluation_role_model"),
)

certificates = sa.Table(
    "tuner_certificates",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("data_hash", sa.String(255), nullable=False),
    sa.Column("study", sa.String(255), nullable=False),
    sa.Column("evaluation", sa.String(255), nullable=False),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),  # of the certificates on these data, from 1
    sa.Column("delta", sa.Double, nullable=False),  # what it spends
    sa.Column("content", sa.Text),  # JSON, written once
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Column("issued_at", sa.Double),
    sa.UniqueConstraint("data_hash", "number", name="uq_tuner_certificates_data_hash_number"),
    sa.UniqueConstraint("evaluation", "model", name="uq_tuner_certificates_evaluation_model"),
)

models = sa.Table(
    "tuner_models",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),  # from 1
    sa.Column("state", sa.String(16), nullable=False),  # candidate | champion | retired
    sa.Column("evaluation", sa.String(255), nullable=False),
    sa.Column("artifact", sa.Text, nullable=False),  # its folder's key, below runs and in the artifact store
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("config", sa.Text, nullable=False),  # JSON, as metrics and certificate
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("certificate", sa.Text),
    sa.Column("data_hash", sa.String(255), nullable=False),
    sa.Column("package_version", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("changed_at", sa.Double, nullable=False),  # the state
    sa.UniqueConstraint("name", "version", name="uq_tuner_models_name_version"),
    sa.Index(
        "ix_tuner_models_champion", "name", unique=True,
        sqlite_where=sa.text("state = 'champion'"), postgresql_where=sa.text("state = 'champion'"),
    ),
)  # fmt: skip

promotions = sa.Table(
    "tuner_promotions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),  # the champion from then on
    sa.Column("former", sa.Integer),  # the one until then
    sa.Column("action", sa.String(16), nullable=False),  # promote | rollback
    sa.Column("gate", sa.Text, nullable=False),  # JSON: what was asked of it, and what it had
    sa.Column("at", sa.Double, nullable=False),
)


def one_writer(connection: sa.Connection, table: sa.Table) -> None:
    """Until this transaction ends nobody else writes to the table, and what is read here is the newest.

    Readers are not held up. On SQLite a transaction is alone from its beginning.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE")


def same_attempt() -> sa.ColumnElement[bool]:
    """The join of a run with its newest attempt."""
    return (
        (attempts.c.study_id == runs.c.study_id)
        & (attempts.c.number == runs.c.number)
        & (attempts.c.attempt == runs.c.attempt)
    )


def create_schema(database: Database) -> None:
    """Make our tables once, or check that those there are of this version. Process-safe."""
    database.make_folder()
    with database.exclusive("schema"):
        if has_schema(database):
            check_schema(database)
            return
        with database.transaction() as connection:
            metadata.create_all(connection)
            connection.execute(schema.insert().values(version=SCHEMA_VERSION))


def has_schema(database: Database) -> bool:
    if not database.exists():
        return False
    with database.transaction() as connection:
        return sa.inspect(connection).has_table(schema.name)


def check_schema(database: Database) -> None:
    """Raises StorageError when our tables are of another version than this package."""
    found = schema_version(database)
    if found == SCHEMA_VERSION:
        return
    way_out = "use the tuner version that wrote it, or another --storage"
    if found < SCHEMA_VERSION:
        way_out = "stop every worker, then `tuner db upgrade`"
    raise StorageError(f"storage: {database!r}: expected tuner schema {SCHEMA_VERSION}, got {found}; {way_out}")


def schema_version(database: Database) -> int:
    """The version of our tables, which are there (`has_schema`)."""
    with database.transaction() as connection:
        return int(connection.scalar(sa.select(schema.c.version)) or 0)
