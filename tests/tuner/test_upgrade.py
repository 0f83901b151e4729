"""`tuner db`: what an earlier release wrote is brought to this one's tables, and goes on."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

from storage import migrations
from storage.database import Database, StorageError
from storage.leases import GRACE_S, ProcessIdentity
from storage.runs import Store
from storage.tables import SCHEMA_VERSION, create_schema, metadata, schema_version, workers
from tests.race import race
from tests.searches import (
    dead,
    elsewhere,
    make_database,
    make_spec,
    make_study,
    measure,
    new_worker,
    suggest_all,
)
from tests.storage.old_databases import OLD_VERSIONS, load_schema
from tuner.study import Study
from tuner.upgrade import check, upgrade


@pytest.fixture(params=OLD_VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    """An earlier version of our tables."""
    return request.param


@pytest.fixture
def old_url(storage_url: str, version: int) -> str:
    """The URL of a database of that version."""
    load_schema(storage_url, version)
    return storage_url


@pytest.fixture
def old_file(sqlite_url: str, version: int, tmp_path: Path) -> Path:
    load_schema(sqlite_url, version)
    return tmp_path / "tuner.db"


class TestUpgrade:
    def test_nothing_stored_is_changed(self, old_url: str, version: int) -> None:
        before = rows_of(old_url, version)
        lines = upgrade(old_url)
        assert rows_of(old_url, version) == before
        assert len(before["trials"]) == len(before["tuner_runs"]) == 10
        assert f"tuner schema {version}: upgraded to {SCHEMA_VERSION}" in lines
        assert any("backup" in line for line in lines)

    def test_it_is_done_once(self, old_url: str) -> None:
        upgrade(old_url)
        lines = upgrade(old_url)
        assert len(lines) == 2
        assert all(line.endswith("up to date") for line in lines)
        assert check(old_url) == [line.replace("up to date", "as expected") for line in lines]

    def test_two_at_once_are_one(self, old_url: str, version: int) -> None:
        found = race(2, upgraded, old_url)
        assert sorted(f"tuner schema {version}: upgraded to {SCHEMA_VERSION}" in lines for lines in found) == [
            False,
            True,
        ]
        check(old_url)

    def test_an_empty_database_gets_all_tables(self, storage_url: str) -> None:
        lines = upgrade(storage_url)
        assert lines[0] == f"tuner schema {SCHEMA_VERSION}: made"
        assert lines[1].startswith("Optuna schema v")
        assert lines[1].endswith(": made")
        assert len(check(storage_url)) == 2
        with opened(storage_url) as database:
            assert work_off_all(make_study(database, make_spec(n_trials=2))) == 2

    def test_what_is_newer_is_refused(self, storage_url: str) -> None:
        make_database(storage_url).close()
        execute(storage_url, f"UPDATE tuner_schema SET version = {SCHEMA_VERSION + 1}")
        for call in (upgrade, check):
            with pytest.raises(StorageError, match=f"got {SCHEMA_VERSION + 1}; use the tuner version that wrote"):
                call(storage_url)

    @pytest.mark.parametrize("step", range(1, SCHEMA_VERSION))
    def test_nothing_is_changed_when_a_step_fails(
        self, storage_url: str, step: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(operations: Operations) -> None:
            whole(operations)
            raise ZeroDivisionError

        load_schema(storage_url, 1)
        before = tables_of(storage_url)
        whole = migrations.STEPS[step]
        monkeypatch.setitem(migrations.STEPS, step, broken)
        with pytest.raises(ZeroDivisionError):
            upgrade(storage_url)
        assert tables_of(storage_url) == before
        monkeypatch.undo()
        upgrade(storage_url)
        check(storage_url)

    def test_who_holds_a_table_is_waited_for_and_then_named_as_the_reason(
        self, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load_schema(postgresql_url, 1)
        monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 0.1)
        with opened(postgresql_url) as reader, reader.transaction() as connection:
            connection.execute(sa.select(workers.c.id))
            with pytest.raises(StorageError, match="lock timeout"):
                upgrade(postgresql_url)
        upgrade(postgresql_url)
        check(postgresql_url)

    def test_a_study_goes_on_to_its_total(self, old_url: str) -> None:
        upgrade(old_url)
        with opened(old_url) as database:
            study = Study.open(database, "toy")
            before = study.store.measurements(study.id, range(10))
            assert states_of(study) == {"complete": 4, "pruned": 1, "failed": 4, "waiting": 1}
            assert work_off_all(study) == 3  # the interrupted one, and two new ones
            assert states_of(study) == {"complete": 7, "pruned": 1, "failed": 4}
            after = study.store.measurements(study.id, range(12))
            progress = study.store.progress(study.id)[0]
        assert [(row.step, row.attempt) for row in after[9]] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
        assert after[9][:3] == before[9]
        assert {number: after[number] for number in range(9)} == {number: before[number] for number in range(9)}
        assert (progress.complete, progress.pruned, progress.failed) == (7, 1, 4)
        assert (progress.running, progress.waiting) == (0, 0)


class TestTables:
    def test_upgraded_tables_are_those_made_today(self, old_url: str) -> None:
        upgrade(old_url)
        options = {"compare_type": True, "compare_server_default": True, "include_name": is_ours}
        with opened(old_url) as database, database.transaction() as connection:
            assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []

    def test_what_hangs_on_a_study_still_goes_with_it(self, old_url: str, version: int) -> None:
        upgrade(old_url)
        with opened(old_url) as database:
            Store(database).claim_notification(1, "finished", "12")
            Store(database).delete_study(1)
            with database.transaction() as connection:
                left = {
                    table.name: connection.scalar(sa.select(sa.func.count()).select_from(table))
                    for table in metadata.sorted_tables
                }
        of_the_service = int(version > 1)
        assert left == {**dict.fromkeys(left, 0), "tuner_schema": 1, "tuner_workers": of_the_service}


class TestWorkers:
    @pytest.mark.parametrize("owner", [ProcessIdentity.current, elsewhere])
    def test_living_ones_are_named_and_nothing_is_changed(
        self, old_url: str, owner: Callable[[], ProcessIdentity]
    ) -> None:
        with opened(old_url) as database:
            worker = Store(database).register_worker(1, owner(), "cpu")
        before = tables_of(old_url)
        with pytest.raises(StorageError, match=f"got {owner().host} pid {owner().pid} at work; stop them"):
            upgrade(old_url)
        assert tables_of(old_url) == before
        with opened(old_url) as database:
            Store(database).end_worker(worker)
        upgrade(old_url)

    def test_dead_and_expired_ones_are_not_waited_for(self, old_url: str) -> None:
        with opened(old_url) as database:
            Store(database).register_worker(1, dead(), "cpu")
            far = Store(database).register_worker(1, elsewhere(), "cpu")
            with database.transaction() as connection:
                expired = {"renewed_at": workers.c.renewed_at - GRACE_S - 1}
                connection.execute(workers.update().where(workers.c.id == far).values(expired))
        upgrade(old_url)

    def test_they_may_work_where_nothing_is_to_be_done(self, old_url: str) -> None:
        upgrade(old_url)
        with opened(old_url) as database:
            Store(database).register_worker(None, ProcessIdentity.current(), "cpu")
        assert all(line.endswith("up to date") for line in upgrade(old_url))


class TestBackup:
    def test_it_is_the_file_as_it_was(self, old_file: Path, version: int) -> None:
        url = f"sqlite:///{old_file}"
        before = rows_of(url, version)
        lines = upgrade(url)
        backup = old_file.with_name(f"tuner.db.schema-{version}.bak")
        assert f"backup: {backup}" in lines
        assert backups(old_file) == [backup.name]
        with opened(f"sqlite:///{backup}") as copied:
            assert schema_version(copied) == version
        assert rows_of(f"sqlite:///{backup}", version) == before

    def test_it_holds_what_is_only_in_the_journal_yet(self, old_file: Path, version: int) -> None:
        with contextlib.closing(sqlite3.connect(old_file)) as open_elsewhere:
            open_elsewhere.execute("PRAGMA journal_mode=WAL")
            open_elsewhere.execute("UPDATE tuner_studies SET n_trials = 99")
            open_elsewhere.commit()
            upgrade(f"sqlite:///{old_file}")
        with contextlib.closing(sqlite3.connect(f"{old_file}.schema-{version}.bak")) as copied:
            assert copied.execute("SELECT n_trials FROM tuner_studies").fetchall() == [(99,)]

    def test_restored_it_can_be_upgraded_again(self, old_file: Path, version: int) -> None:
        url = f"sqlite:///{old_file}"
        upgrade(url)
        os.replace(f"{old_file}.schema-{version}.bak", old_file)
        assert f"tuner schema {version}: upgraded to {SCHEMA_VERSION}" in upgrade(url)
        assert backups(old_file) == [f"tuner.db.schema-{version}.bak"]

    def test_without_it_nothing_is_changed(self, old_file: Path, version: int) -> None:
        url = f"sqlite:///{old_file}"
        before = tables_of(url)
        Path(f"{old_file}.schema-{version}.bak").mkdir()
        with pytest.raises(StorageError, match="cannot write the backup") as caught:
            upgrade(url)
        assert "\n" not in str(caught.value)
        assert tables_of(url) == before

    def test_nothing_is_copied_where_nothing_is_to_be_done(self, old_file: Path, version: int) -> None:
        upgrade(f"sqlite:///{old_file}")
        Path(f"{old_file}.schema-{version}.bak").unlink()
        upgrade(f"sqlite:///{old_file}")
        assert backups(old_file) == []

    def test_a_server_is_backed_up_by_its_own_means(self, postgresql_url: str) -> None:
        load_schema(postgresql_url, 1)
        assert "no backup was made: pg_dump makes one" in upgrade(postgresql_url)


class TestOptuna:
    @pytest.fixture
    def behind_url(self, storage_url: str) -> str:
        """Our tables of today, Optuna's of an earlier version of theirs."""
        make_database(storage_url).close()
        execute(
            storage_url,
            "DROP INDEX ix_trials_study_id",
            "UPDATE alembic_version SET version_num = 'v3.0.0.d'",
        )
        return storage_url

    def test_its_tables_are_upgraded_too(self, behind_url: str) -> None:
        with pytest.raises(StorageError, match=r"expected Optuna schema v\S+, got v3.0.0.d; .*`tuner db upgrade`"):
            check(behind_url)
        assert any(line.startswith("Optuna schema v3.0.0.d: upgraded to v") for line in upgrade(behind_url))
        check(behind_url)
        with opened(behind_url) as database:
            indexes = sa.inspect(database.engine).get_indexes("trials")
        assert ["study_id"] in [index["column_names"] for index in indexes]

    def test_two_at_once_are_one(self, behind_url: str) -> None:
        found = race(3, upgraded, behind_url)
        assert sorted(any("upgraded" in line for line in lines) for lines in found) == [False, False, True]
        check(behind_url)

    def test_the_log_stays_as_it_was(self, behind_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        upgrade(behind_url)
        assert logging.getLogger().handlers == []
        assert not logging.getLogger("storage").disabled

    def test_living_workers_are_named(self, behind_url: str) -> None:
        with opened(behind_url) as database:
            Store(database).register_worker(None, ProcessIdentity.current(), "cpu")
        with pytest.raises(StorageError, match="at work"):
            upgrade(behind_url)

    def test_newer_ones_are_refused(self, storage_url: str) -> None:
        make_database(storage_url).close()
        execute(storage_url, "UPDATE alembic_version SET version_num = 'v9.0.0.a'")
        with pytest.raises(StorageError, match=r"Optuna \S+ cannot upgrade its tables"):
            upgrade(storage_url)


class TestCheck:
    def test_an_empty_database_is_told_the_way_out(self, storage_url: str) -> None:
        with pytest.raises(StorageError, match=r"expected the tuner's tables, got none; `tuner db upgrade`"):
            check(storage_url)
        if storage_url.startswith("sqlite"):
            assert not Database(storage_url).exists()  # looking makes nothing

    def test_older_tables_are_told_the_way_out_and_left_alone(self, old_url: str, version: int) -> None:
        before = tables_of(old_url)
        expected = (
            f"expected tuner schema {SCHEMA_VERSION}, got {version}; stop every worker, then `tuner db upgrade`"
        )
        with pytest.raises(StorageError, match=expected):
            check(old_url)
        with opened(old_url) as database, pytest.raises(StorageError, match=expected):
            create_schema(database)
        assert tables_of(old_url) == before


@contextlib.contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def upgraded(_index: int, url: str) -> list[str]:
    return upgrade(url)


def execute(url: str, *statements: str) -> None:
    with opened(url) as database, database.transaction() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def tables_of(url: str) -> dict[str, list[str]]:
    """Every table with its columns."""
    with opened(url) as database, database.transaction() as connection:
        inspector = sa.inspect(connection)
        return {
            name: [f"{c['name']} {c['type']} {c['nullable']}" for c in inspector.get_columns(name)]
            for name in inspector.get_table_names()
        }


def rows_of(url: str, version: int) -> dict[str, list[tuple[object, ...]]]:
    """What the tables of a version hold in the columns they had."""
    columns = {
        "tuner_studies": "id, name, spec, data, package_version, n_trials, n_replacements, created_at, started_at",
        "tuner_runs": "study_id, number, arm, config, attempt, checkpoint_attempt, checkpoint_step, best_step, "
        "ended_at, failure",
        **dict.fromkeys(("tuner_workers", "tuner_attempts", "tuner_measurements"), "*"),
        **({} if version == 1 else dict.fromkeys(("tuner_studies", "tuner_runs", "tuner_notifications"), "*")),
        **dict.fromkeys(("trials", "trial_params", "trial_values", "trial_intermediate_values"), "*"),
    }
    with opened(url) as database, database.transaction() as connection:
        return {
            table: sorted(map(tuple, connection.exec_driver_sql(f"SELECT {names} FROM {table}")), key=repr)
            for table, names in columns.items()
        }


def backups(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if "bak" in path.name)


def is_ours(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or str(name).startswith("tuner_")


def states_of(study: Study) -> Counter[str]:
    return Counter(trial.state for trial in study.search.trials())


def work_off_all(study: Study, n_steps: int = 5) -> int:
    """Take trials until there are none, and measure what is missing of each; returns how many."""
    worker = new_worker(study)
    for count in itertools.count():
        claim = study.claim(worker)
        if claim is None:
            study.store.end_worker(worker)
            return count
        config = suggest_all(study, claim)
        study.store.set_config(study.id, claim.number, claim.attempt, config)
        for step in range(len(study.store.measurements(study.id, [claim.number])[claim.number]), n_steps):
            measure(study, claim, step, (step + 1) / 10)
        study.end(claim, "complete")
    raise AssertionError
