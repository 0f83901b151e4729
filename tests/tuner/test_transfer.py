"""A study as one file: nothing of it is lost on the way, and nothing is there by halves."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from models.trainer import SEARCH_ROLES, DiskError, InputError
from storage.artifacts import open_artifacts
from storage.database import Database, StorageError
from storage.runs import Store
from storage.tables import attempts, metadata, runs, studies
from storage.transfer import NOBODY, Transfer
from tests import searches
from tests.searches import make_database, make_spec, new_worker
from tests.toy import ToyTrainer
from tests.tuner.moved_study import (
    DATA_HASH,
    as_copied,
    claimed,
    dump,
    files_of,
    fill,
    optuna_trials,
    row_of,
    start,
)
from tests.tuner.toy_study import ROOT, make_study, write_spec
from tests.tuner.verdict_document import census_document
from tuner import coordinator, transfer
from tuner.cli import main
from tuner.optuna_storage import RetryingStorage
from tuner.output import draft_of
from tuner.study import Study
from tuner.summary import summarize
from tuner.uploads import Uploads
from tuner.worker import Worker, WorkerOptions
from tuner.worker_process import own_folder


@contextmanager
def opened(url: str, read_only: bool = True) -> Iterator[Database]:
    database = Database(url, read_only)
    try:
        yield database
    finally:
        database.close()


def exported(database: Database, file: Path, name: str = "toy", **options: Any) -> transfer.Copied:
    """By a connection of its own, as the command has it."""
    with opened(database.url.render_as_string(hide_password=False)) as source:
        return transfer.export_study(source, name, file, **options)


def imported(file: Path, url: str, new: str | None = None) -> transfer.Copied:
    with opened(url, read_only=False) as target:
        return transfer.import_study(file, target, new)


def dump_of(file: Path, *names: str) -> dict[str, Any]:
    with opened(f"sqlite:///{file}") as found:
        return dump(found, *names)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file of the study with everything. Nobody may change it."""
    folder = tmp_path_factory.mktemp("filled")
    database = make_database(f"sqlite:///{folder}/tuner.db")
    try:
        fill(database)
        exported(database, folder / "toy.db")
    finally:
        database.close()
    return folder / "toy.db"


# --- there and back ------------------------------------------------------------------------------------------


def test_the_file_has_all_that_the_database_knows(database: Database, tmp_path: Path) -> None:
    fill(database)
    before = dump(database)
    exported(database, tmp_path / "toy.db")
    assert dump(database) == before
    copied = dump_of(tmp_path / "toy.db")
    assert copied == as_copied(before)
    assert [trial["state"] for trial in copied["trials"]["toy"]] == [1, 1, 2, 3, 4, 4, 4]
    assert {len(copied[table.name]) > 0 for table in metadata.sorted_tables if table.name in copied} == {True}


def test_there_and_back_again_is_the_same(database: Database, filled: Path, tmp_path: Path) -> None:
    with database.transaction() as connection:  # ids there are others
        connection.execute(studies.insert().values(name="x", spec="{}", data="{}", package_version="", n_trials=1,
                                                   created_at=0.0, started_at=0.0))  # fmt: skip
    with opened(database.url.render_as_string(hide_password=False), read_only=False) as target:
        told = transfer.import_study(filled, target)
    assert told == transfer.Copied("toy", 7, 4, 3, 15, 2, 3, 4, [(1, 1), (2, 2)])
    exported(database, tmp_path / "again.db")
    assert dump_of(tmp_path / "again.db") == dump_of(filled)


def test_under_another_name_it_is_the_same_but_for_the_name(
    database: Database, filled: Path, tmp_path: Path
) -> None:
    url = database.url.render_as_string(hide_password=False)
    imported(filled, url, "new")
    exported(database, tmp_path / "new.db", "new")
    expected = dump_of(filled, "toy", "new")
    for run in expected[runs.name]:  # uploads lie under the former name
        run["uploaded_attempt"] = run["uploaded_step"] = None
    assert dump_of(tmp_path / "new.db", "new", "new") == expected
    (document,) = (row.document for row in Store(database).evaluations(1) if row.document)
    assert document == {
        "study": "new", "evaluation": "new.evaluation-1", "seeds": 2, "model": {"name": "new", "version": 1},
        "arms": {"one": {"config": {"x": 0.1}}},
    }  # fmt: skip


def test_what_belongs_to_a_database_stays_there(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    for table in ("tuner_workers", "tuner_notifications"):
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert connection.execute("SELECT DISTINCT worker_id FROM tuner_attempts").fetchall() == [(NOBODY,)]
    assert connection.execute("SELECT queued_at, stop FROM tuner_studies WHERE name = 'toy'").fetchone() == (
        None, None,
    )  # fmt: skip
    assert connection.execute("SELECT DISTINCT data_hash FROM tuner_looks").fetchall() == [(DATA_HASH,)]
    assert connection.execute("SELECT DISTINCT name FROM tuner_models").fetchall() == [("toy",)]
    connection.close()


def test_nobody_holds_anything_in_a_copy(filled: Path) -> None:
    with opened(f"sqlite:///{filled}") as database:
        found = {progress.row.name: progress for progress in Store(database).progress()}
        assert Store(database).holdings() == {}
        summary = summarize(Study.open(database, "toy"))
    toy = found["toy"]
    # The trial that a person queued has no run yet.
    assert (toy.complete, toy.pruned, toy.failed, toy.running, toy.waiting) == (2, 1, 1, 0, 2)
    assert summary.counts == {"complete": 2, "pruned": 1, "failed": 1, "running": 0, "waiting": 3}
    assert summary.row.total == 8


# --- Optuna, and every command that reads ----------------------------------------------------------------------


def test_optuna_opens_the_file_as_it_is(tmp_path: Path) -> None:
    database = make_database(f"sqlite:///{tmp_path}/tuner.db")
    study = fill(database)
    exported(database, tmp_path / "toy.db")
    assert files_of(tmp_path) == ["toy.db", "tuner.db", "tuner.db-shm", "tuner.db-wal", "tuner.db.lock"]
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/toy.db")
    found = optuna.load_study(study_name="toy", storage=storage)
    expected = optuna_trials(study.search.study)
    assert expected[5]["state"] == 0
    expected[5]["state"] = 4  # which ran, and waits
    assert optuna_trials(found) == expected
    trial, there = found.trials[1], study.search.study.trials[1]
    assert trial.constraints == there.constraints != {}
    assert (trial.params, trial.distributions) == (there.params, there.distributions)
    assert (trial.datetime_start, trial.datetime_complete) == (there.datetime_start, there.datetime_complete)
    assert found.best_trial.number == study.search.study.best_trial.number == 0
    assert found.user_attrs == {"note": {"of": "a person", "number": 0.1 + 0.2}}
    assert storage.get_study_system_attrs(found._study_id) == {"dashboard:note_ver": 3}
    assert found.direction == study.search.study.direction
    assert found.ask().number == 4  # the first of those that wait
    storage.engine.dispose()
    database.close()


@pytest.mark.parametrize(
    "command", ["show --study toy", "best --study toy", "studies", "status", "models", "db check"]
)
def test_commands_that_read_take_the_file_as_their_storage(
    filled: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.db"
    shutil.copy(filled, file)
    before = file.read_bytes()
    assert main([*command.split(), "--storage", f"sqlite:///{file}"]) == 0
    assert "toy" in capsys.readouterr().out or command == "db check"
    assert file.read_bytes() == before


def test_the_dashboard_shows_the_file(filled: Path) -> None:
    from tests.tuner.wsgi import Browser
    from tuner.optuna_dashboard import dashboard_app

    with opened(f"sqlite:///{filled}") as database:
        browser = Browser(dashboard_app(database))
        (study,) = (s for s in browser.ask("/api/studies").json["study_summaries"] if s["study_name"] == "toy")
        assert len(browser.ask(f"/api/studies/{study['study_id']}?after=0").json["trials"]) == 7


def test_a_report_is_made_from_the_file(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "toy.db"
    shutil.copy(filled, file)
    with opened(f"sqlite:///{file}", read_only=False) as database:
        document = {**census_document(), "study": "toy", "evaluation": "toy.evaluation-1"}
        Store(database).finish_evaluation(1, document)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--study", "toy", "--storage", f"sqlite:///{file}", "--out", "report"]) == 0
    assert {"report.md", "report.html", "results.json"} <= set(files_of(tmp_path / "report"))


# --- going on --------------------------------------------------------------------------------------------------


TPE = {"name": "tpe", "n_startup_trials": 3}


def test_a_search_goes_on_as_it_would_have_where_it_came_from(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    options = make_study(here, sampler=TPE)
    with opened(options.storage) as source:
        transfer.export_study(source, "toy", tmp_path / "toy.db")
    imported(tmp_path / "toy.db", f"sqlite:///{there}/runs/tuner.db")
    found = []
    for folder in (here, there):
        make_study(folder, sampler=TPE, n_trials=9)
        with opened(f"sqlite:///{folder}/runs/tuner.db") as database:
            found.append(summarize(Study.open(database, "toy")))
    assert [trial.number for trial in found[1].trials] == list(range(9))
    for told in ("state", "params", "value", "violation"):
        assert [vars(trial)[told] for trial in found[1].trials] == [vars(trial)[told] for trial in found[0].trials]
    assert found[1].row.total == found[1].n_ended == 9
    assert found[1].best.number == found[0].best.number


def test_a_trial_that_was_under_way_begins_anew(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    options = make_study(here, n_trials=1)
    with opened(options.storage, read_only=False) as database:
        study = Study.open(database, "toy")
        study.store.start_study(study.id, 3, 0)
        start(study, claimed(study, new_worker(study)), 4)
        copied = exported(database, tmp_path / "toy.db")
    assert (copied.n_trials, copied.n_ended, copied.n_begun) == (2, 1, 1)
    url = f"sqlite:///{there}/runs/tuner.db"
    imported(tmp_path / "toy.db", url)
    make_study(there, n_trials=3)
    with opened(url) as database:
        store = Store(database)
        summary, rows = summarize(Study.open(database, "toy")), store.measurements(1, [1])[1]
        optunas = optuna.load_study(study_name="toy", storage=RetryingStorage(database)).trials[1]
        tries = [(a.attempt, a.outcome) for a in store.attempts(1) if a.number == 1]
    assert [trial.state for trial in summary.trials] == ["complete"] * 3
    assert tries == [(1, "lost"), (2, "complete")]
    assert [(row.step, row.attempt) for row in rows] == [(step, 2) for step in range(5)]
    assert list(optunas.intermediate_values) == [row.step for row in rows]


def test_with_the_same_artifact_store_a_trial_goes_on_from_its_upload(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    store, stop = open_artifacts(f"file://{tmp_path}/artifacts"), threading.Event()

    class StopsInBetween(ToyTrainer):
        def fit(self, config: Any, data: Any, run: Any) -> Iterator[Any]:
            for measurement in super().fit(config, data, run):
                if measurement.step == 2:
                    stop.set()
                yield measurement

    def serve(folder: str, trainer: ToyTrainer, stop: threading.Event) -> Study:
        options = coordinator.RunOptions(
            str(write_spec(tmp_path, n_trials=1)),
            runs=f"{tmp_path}/{folder}",
            storage=f"sqlite:///{tmp_path}/{folder}.db",
        )
        spec, _ = coordinator.read_spec(options)
        data = trainer.load(coordinator.data_spec(spec, trainer, options), SEARCH_ROLES)
        study = coordinator.open_study(spec, data.manifest, options, Database(options.storage))
        told = WorkerOptions("cpu", options.runs, str(options.cache), ("toy",))
        Worker(study, trainer, data, new_worker(study), told, stop, uploads=Uploads(store, "toy")).serve()
        return study

    here = serve("here", StopsInBetween(), stop)
    copied = exported(here.database, tmp_path / "toy.db")
    here.database.close()
    assert copied.n_begun == 1
    imported(tmp_path / "toy.db", f"sqlite:///{tmp_path}/there.db")
    there = serve("there", ToyTrainer(), threading.Event())
    rows = there.store.measurements(there.id, [0])[0]
    there.database.close()
    assert [(row.step, row.attempt) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_copy_never_takes_the_files_of_its_original_for_its_own(tmp_path: Path) -> None:
    database = make_database(f"sqlite:///{tmp_path}/tuner.db")
    study = fill(database)
    row = study.store.get_study(study.id)
    exported(database, tmp_path / "toy.db")
    imported(tmp_path / "toy.db", f"sqlite:///{tmp_path}/there.db")
    database.close()
    own_folder(tmp_path / "toy", row)
    (tmp_path / "toy" / "trials" / "00000").mkdir(parents=True)
    with opened(f"sqlite:///{tmp_path}/there.db") as there:
        copy = Store(there).find_study("toy")
    assert copy is not None
    assert copy.id == row.id
    with pytest.raises(InputError, match="got those of another of its name"):
        own_folder(tmp_path / "toy", copy)


# --- one moment ------------------------------------------------------------------------------------------------


def test_the_file_shows_one_moment_while_workers_go_on(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = fill(database)
    before = dump(database)
    copy_study = Transfer.copy_study
    claims = []

    def meanwhile(self: Transfer, name: str, *rest: Any) -> Any:
        if not claims:  # Optuna's rows of the study are read, ours not yet
            claims.append(claimed(study, new_worker(study)))
            start(study, claims[0], 2)
            study.store.record(study.id, claims[0].number, claims[0].attempt, [row_of(2), row_of(3)])
        return copy_study(self, name, *rest)

    monkeypatch.setattr(Transfer, "copy_study", meanwhile)
    exported(database, tmp_path / "toy.db")
    assert claims
    assert dump(database) != before
    assert dump_of(tmp_path / "toy.db") == as_copied(before)


def test_a_trial_that_ended_in_one_table_alone_is_mended_where_the_copy_goes_on(tmp_path: Path) -> None:
    """Exported between two writes of a worker, as after its death."""
    database = make_database(f"sqlite:///{tmp_path}/tuner.db")
    study = searches.make_study(database, make_spec())
    claim = claimed(study, new_worker(study))
    start(study, claim, 2)
    study.search.end(claim.trial, "pruned", 0.5, -0.1)
    exported(database, tmp_path / "toy.db")
    database.close()
    imported(tmp_path / "toy.db", f"sqlite:///{tmp_path}/there.db")
    with opened(f"sqlite:///{tmp_path}/there.db", read_only=False) as there:
        copy = Study.open(there, "toy")
        assert copy.store.progress(copy.id)[0].running == 0
        copy.recover()
        (progress,) = copy.store.progress(copy.id)
        assert (progress.pruned, progress.n_ended) == (1, 1)


# --- all or nothing --------------------------------------------------------------------------------------------


def counts(database: Database) -> dict[str, int]:
    """The rows of every table, Optuna's too."""
    with database.transaction() as connection:
        names = set(sa.inspect(connection).get_table_names()) - {"alembic_version", "version_info"}
        return {name: connection.scalar(sa.select(sa.func.count()).select_from(sa.table(name))) for name in names}


@pytest.mark.parametrize("where", ["copy_study", "copy_evaluations", "copy_models", "copy_certificates"])
def test_an_import_that_fails_leaves_nothing_and_can_be_repeated(
    database: Database, filled: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    url = database.url.render_as_string(hide_password=False)
    before = counts(database)
    method, calls = getattr(Transfer, where), []

    def failing(self: Transfer, *arguments: Any) -> Any:
        found = method(self, *arguments)
        calls.append(arguments)
        if len(calls) == 2 or where != "copy_study":  # in the middle: the fits' study comes second
            raise RuntimeError("planted")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Transfer, where, failing)
        with pytest.raises(RuntimeError, match="planted"):
            imported(filled, url)
    assert counts(database) == before
    imported(filled, url)
    assert as_copied(dump(database)) == dump_of(filled)


def test_an_import_that_is_killed_leaves_nothing_and_can_be_repeated(database: Database, filled: Path) -> None:
    url = database.url.render_as_string(hide_password=False)
    before = counts(database)
    code = (
        "import os\nfrom storage.transfer import Transfer\nfrom tuner.cli import main\n"
        "Transfer.copy_looks = lambda self: os._exit(77)\n"
        f"main(['import', {str(filled)!r}, '--storage', {url!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == 77, killed.stderr
    assert counts(database) == before
    imported(filled, url)
    assert as_copied(dump(database)) == dump_of(filled)


def test_an_export_that_fails_leaves_nothing(sqlite: Database, tmp_path: Path, monkeypatch: Any) -> None:
    fill(sqlite)
    out = tmp_path / "out"
    out.mkdir()
    (out / "toy.db").write_text("former")

    def failing(*_: object) -> None:
        assert files_of(out) != ["toy.db"]  # the draft
        raise RuntimeError("planted")

    monkeypatch.setattr(Transfer, "copy_looks", failing)
    with pytest.raises(RuntimeError, match="planted"):
        exported(sqlite, out / "toy.db", force=True)
    assert files_of(out) == ["toy.db"]
    assert (out / "toy.db").read_text() == "former"


def test_a_draft_of_a_killed_export_goes_with_the_next_one(sqlite: Database, tmp_path: Path) -> None:
    fill(sqlite)
    out = tmp_path / "out"
    for name, age_s in ((".toy.db.tmp-old", 100_000.0), (".toy.db.tmp-new", 10.0)):
        (out / name).mkdir(parents=True)
        os.utime(out / name, (time.time() - age_s,) * 2)
    exported(sqlite, out / "toy.db")
    assert files_of(out) == [".toy.db.tmp-new", "toy.db"]


def test_the_file_is_one_file_and_is_not_changed_by_an_import(filled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(filled, folder / "what? a #1.db")
    before = (folder / "what? a #1.db").read_bytes()
    assert before[18:20] == b"\x01\x01"  # no log beside it
    imported(folder / "what? a #1.db", f"sqlite:///{tmp_path}/there.db")
    assert files_of(folder) == ["what? a #1.db"]
    assert (folder / "what? a #1.db").read_bytes() == before


# --- what is refused -------------------------------------------------------------------------------------------


def test_an_existing_name_is_refused_with_the_way_out(database: Database, filled: Path) -> None:
    url = database.url.render_as_string(hide_password=False)
    imported(filled, url)
    before = counts(database)
    with pytest.raises(StorageError, match="expected no study 'toy', got one; take another name with --study NEW"):
        imported(filled, url)
    Store(database).create_study("new.evaluation-1", "{}", "{}", "0", 1)
    with pytest.raises(StorageError, match=r"expected no study 'new\.evaluation-1', got one"):
        imported(filled, url, "new")
    RetryingStorage(database).create_new_study([optuna.study.StudyDirection.MAXIMIZE], "theirs")
    with pytest.raises(StorageError, match="expected no study 'theirs', got one of Optuna's that is not ours"):
        imported(filled, url, "theirs")
    assert counts(database)["tuner_runs"] == before["tuner_runs"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../up", "expected letters, digits"),
        ("", "expected letters, digits"),
        ("cache", "expected another name, got 'cache', under which runs keep something else; use --study NEW"),
        ("a.evaluation-1", "expected another name, got 'a.evaluation-1', which is that of an evaluation"),
    ],
)
def test_a_name_that_is_none_is_refused(filled: Path, tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(InputError, match=f"--study: {told}"):
        imported(filled, f"sqlite:///{tmp_path}/there.db", name)
    assert not (tmp_path / "there.db").exists()


def _text(file: Path) -> None:
    file.write_text("no database")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _cut(file: Path, size_bytes: int = 100_000) -> None:
    file.write_bytes(file.read_bytes()[:size_bytes])


def _torn(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8192:40_960] = os.urandom(32_768)
    file.write_bytes(content)


def _plain_optuna(file: Path) -> None:
    file.unlink()
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    optuna.create_study(storage=storage, study_name="toy")
    storage.engine.dispose()


def _change(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (Path.unlink, "expected a file of `tuner export`, got nothing"),
    "a folder": (_folder, "got a folder"),
    "text": (_text, "got a damaged one or something else (file is not a database); fetch it again"),
    "empty": (lambda file: _cut(file, 0), "expected the tuner's tables, got none"),
    "cut": (_cut, "got a damaged one or something else"),
    "torn": (_torn, "got a damaged one or something else"),
    "plain Optuna": (_plain_optuna, "got Optuna's alone, which say nothing of configs, runs and data; import what"),
    "no Optuna": (lambda file: _change(file, "DROP TABLE version_info"), "expected Optuna's tables too, got none"),
    "newer": (lambda file: _change(file, "UPDATE tuner_schema SET version = 99"), "got 99; use the tuner version"),
    "older": (lambda file: _change(file, "UPDATE tuner_schema SET version = 2"), "got 2; stop every worker, then"),
    "newer Optuna": (
        lambda file: _change(file, "UPDATE alembic_version SET version_num = 'v9'")
        or _change(file, "CREATE TABLE IF NOT EXISTS alembic_version (version_num)"),
        "expected Optuna schema",
    ),
    "another specification": (
        lambda file: _change(file, """UPDATE tuner_studies SET spec = '{"no": 1}' WHERE name = 'toy'"""),
        "expected a specification of this tuner version",
    ),
    "its trials deleted": (
        lambda file: _change(file, "UPDATE studies SET study_name = 'gone' WHERE study_name = 'toy'"),
        "expected its trials, got none",
    ),
    "two studies": (
        lambda file: _change(file, "UPDATE tuner_evaluations SET name = 'x' WHERE number = 1"),
        "expected one study, got toy, toy.evaluation-1; `tuner export --study NAME",
    ),
    "no study": (lambda file: _change(file, "DELETE FROM tuner_studies"), "expected one study, got none"),
    "a name that leads elsewhere": (
        lambda file: _change(
            file, "UPDATE tuner_studies SET name = '../up' WHERE name = 'toy.evaluation-1'",
            "UPDATE tuner_evaluations SET name = '../up' WHERE number = 1",
        ),
        "expected evaluations of toy, got '../up'",
    ),
    "a study called so": (
        lambda file: _change(file, "UPDATE tuner_studies SET name = '../up' WHERE name = 'toy'"),
        "expected letters, digits, '.', '_' and '-', a letter or digit first, at most 100, got '../up'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_export_is_refused(
    filled: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, told = FAULTS[fault]
    file = tmp_path / "toy.db"
    shutil.copy(filled, file)
    damage(file)
    assert main(["import", str(file), "--storage", f"sqlite:///{tmp_path}/there.db"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert str(file) in error or "study 'toy'" in error
    assert not (tmp_path / "there.db").exists()


def test_an_export_never_replaces_what_it_should_not(sqlite: Database, tmp_path: Path) -> None:
    fill(sqlite)
    file = tmp_path / "toy.db"
    for out, told in (
        (tmp_path, "got a folder; name a file with --out"),
        (tmp_path / "no" / "toy.db", "expected a folder to write to, got none"),
    ):
        with pytest.raises(InputError, match=told):
            exported(sqlite, out, force=True)
    file.write_text("former")
    with pytest.raises(InputError, match="expected no such file, got one; --force replaces it"):
        exported(sqlite, file)
    assert file.read_text() == "former"
    with pytest.raises(InputError, match="expected another file than the database that is exported"):
        exported(sqlite, sqlite.path, force=True)
    assert exported(sqlite, file, force=True).n_trials == 7
    with opened(f"sqlite:///{file}", read_only=False) as in_use, in_use.transaction():
        told = r"expected a file that nobody has open, got toy\.db-"
        with pytest.raises(InputError, match=told):
            exported(sqlite, file, force=True)
    with pytest.raises(InputError, match="they go along with `tuner export --study toy`"):
        exported(sqlite, tmp_path / "fits.db", "toy.evaluation-1")
    with pytest.raises(StorageError, match="study 'none' is not in"):
        exported(sqlite, tmp_path / "none.db", "none")
    assert not (tmp_path / "fits.db").exists()


def test_a_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "toy.db"

    def write() -> None:
        with draft_of(out, force=False) as draft:
            draft.write_text("ours")
            out.write_text("theirs")

    with pytest.raises(InputError, match="somebody made meanwhile"):
        write()
    assert out.read_text() == "theirs"
    assert files_of(tmp_path) == ["toy.db"]


def test_a_disk_that_refuses_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    draft = draft_of(tmp_path / "toy.db", force=False)
    draft.__enter__().write_text("ours")
    with pytest.raises(DiskError, match=r"the disk refused it \(No space left on device\)"):
        draft.__exit__(None, None, None)
    assert files_of(tmp_path) == []


def test_no_password_is_told(postgresql_url: str, filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = sa.make_url(postgresql_url).set(password="geheim").render_as_string(hide_password=False)
    assert main(["import", str(filled), "--storage", url]) == 0
    assert main(["import", str(filled), "--storage", url]) == 2
    assert main(["export", "--study", "none", "--storage", url]) == 2
    told = capsys.readouterr()
    assert "***" in told.err
    assert "geheim" not in told.err + told.out


# --- the commands ----------------------------------------------------------------------------------------------


def test_the_commands_say_what_came_along_and_what_did_not(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path, "toy")
    monkeypatch.setenv("TUNER_RUNS", "elsewhere")
    assert main(["import", str(filled)]) == 0
    counted = "study toy: 7 trials (4 ended), 15 measurements, 2 evaluations, 3 models, 4 looks, 2 certificates"
    assert capsys.readouterr().out.splitlines() == [
        counted, "not in the file: checkpoints (3 trials under way would begin anew), and model folders",
    ]  # fmt: skip
    assert main(["export", "--study", "configs/toy.yaml"]) == 0
    size = f"{(tmp_path / 'toy.db').stat().st_size / 1e6:.1f} MB"
    assert capsys.readouterr().out.splitlines() == [
        f"toy.db: {counted}, {size}",
        "not in it: checkpoints (3 trials under way would begin anew), and model folders (RUNS/models/toy)",
    ]
    assert main(["export", "--study", "toy"]) == 2
    assert capsys.readouterr().err == "toy.db: expected no such file, got one; --force replaces it\n"
    assert main(["export", "--study", "toy", "--force", "--out", "toy.db"]) == 0
    assert main(["import", "toy.db", "--study", "again"]) == 0
    # The looks and certificates are those that the database knows.
    assert "study again: 7 trials (4 ended), 15 measurements, 2 evaluations, 3 models\n" in capsys.readouterr().out


def test_certificates_that_meet_others_are_told(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/there.db"
    database = make_database(url)
    Store(database).open_certificate(DATA_HASH, "third", "third.evaluation-1", "m", lambda _: 0.1)
    database.close()
    assert main(["import", str(filled), "--storage", url]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "of those that came along number 1 is 2 here, 2 is 3 here; each keeps what it has spent" in told


def test_a_long_copy_tells_how_far_it_is(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    with opened(f"sqlite:///{filled}") as source:
        transfer.export_study(source, "toy", tmp_path / "copy.db", progress=lambda *done: told.append(done))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (23, 23)  # 8 runs and 15 measurements
    monkeypatch.setattr("tuner.output.LINE_EVERY_S", 0.0)
    assert main(["import", str(filled), "--storage", f"sqlite:///{tmp_path}/there.db"]) == 0
    assert "\n23 of 23 rows read, " in capsys.readouterr().err


def test_a_coordinator_takes_up_what_came_along(filled: Path, tmp_path: Path) -> None:
    """Through the whole command: real workers end what waits, and the total counts what had ended elsewhere."""
    path = write_spec(tmp_path, "toy", n_trials=6)
    options = coordinator.RunOptions(str(path), runs=str(tmp_path / "runs"), storage=f"sqlite:///{tmp_path}/a.db")
    make_study(tmp_path, n_trials=2)
    with opened(f"sqlite:///{tmp_path}/runs/tuner.db") as source:
        transfer.export_study(source, "toy", tmp_path / "toy.db")
    imported(tmp_path / "toy.db", options.storage, "moved")
    command = ["run", "--study", str(path), "--name", "moved", "--n-trials", "3", "--workers", "1",
               "--runs", options.runs, "--storage", options.storage]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "tuner", *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with opened(options.storage) as database:
        summary = summarize(Study.open(database, "moved"))
    assert [(trial.number, trial.state) for trial in summary.trials] == [(n, "complete") for n in range(3)]
    assert json.loads((tmp_path / "runs" / "moved" / "results.json").read_text())["n_ended"] == 3
    with database.transaction() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(attempts)) == 3
    database.close()
