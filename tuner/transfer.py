"""`tuner export` and `tuner import`: a study as one file that is a database, ours and Optuna's.

The file holds the study with its evaluations, what was seen of its data, and its models' rows, so every command
that reads takes it as its `--storage`, and Optuna loads it. It does not hold checkpoints and model folders, which
lie in the folder of runs and in the artifact store, nor what belongs to the database: workers, leases, the queue,
notifications.

Both directions are the same copy, out of one transaction that sees one moment, into one that shows all or nothing.
So a study may be exported while workers are at it; what was in hand at that moment waits in the copy, and begins
anew where its checkpoint is not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from models.trainer import InputError
from storage.database import Database
from storage.runs import Store
from storage.tables import create_schema, has_schema
from storage.transfer import Side, Transfer
from tuner.catalog import check_database
from tuner.coordinator import EVALUATION_NAME, check_name
from tuner.optuna_storage import RetryingStorage
from tuner.optuna_study import create_optuna_schema
from tuner.optuna_transfer import copy_trials
from tuner.output import Progress, check_out, draft_of
from tuner.study import Study


@dataclass(frozen=True)
class Copied:
    """What was copied. `n_begun` trials have measurements and have not ended; of `certificates` each has the number
    it had and the one it got. Looks and certificates count where they were not known yet."""

    name: str
    n_trials: int
    n_ended: int
    n_begun: int
    n_measurements: int
    n_evaluations: int
    n_models: int
    n_looks: int
    certificates: Sequence[tuple[int, int]]


def export_study(
    source: Database, name: str, out: Path, force: bool = False, progress: Progress = lambda _done, _total: None
) -> Copied:
    """Write a stored study into a file of its own.

    Args:
        source: opened read-only; workers may be at the study.
        out: a file that is not there; one that is gets replaced with `force` alone, the source never.

    Guarantees:
        `out` is there whole or not at all, whatever is killed; the source is not changed.

    Raises:
        InputError: `out` is there or cannot be made, or the study is the fits of an evaluation. StorageError,
            DiskError.
    """
    store = Store(source)
    if (evaluated := EVALUATION_NAME.fullmatch(name)) and store.find_evaluation(name):
        raise InputError(
            f"study {name!r}: expected a search, got the fits of an evaluation; they go along with `tuner export "
            f"--study {evaluated[1]}`"
        )
    check_out(out, force)
    _refuse_open(source, out)
    _check_readable(source, name)
    with draft_of(out, force) as draft:
        target = Database(URL.create("sqlite", database=str(draft)))
        try:
            copied = _copy(source, target, name, name, progress)
        finally:
            target.close()
        _as_one_file(draft)
    return copied


def import_study(
    file: Path, database: Database, new: str | None = None, progress: Progress = lambda _done, _total: None
) -> Copied:
    """Bring the study of an exported file into a database.

    Args:
        database: its tables are made where there are none.
        new: the study's name there; None: its own.

    Guarantees:
        All or nothing, whatever is killed; the file is not changed.

    Raises:
        InputError: the file is none of `export_study`, or damaged, or of another version; or the name is not one.
        StorageError: the name is taken, or a database is of another version or refused.
    """
    _check_file(file)
    source = Database(URL.create("sqlite", database=str(file)), read_only=True)
    try:
        name = _only_study(source, file)
        if new is not None:
            check_name("--study", new)
        check_database(database)
        create_schema(database)
        create_optuna_schema(database)
        return _copy(source, database, name, new or name, progress)
    finally:
        source.close()


def _copy(source: Database, target: Database, name: str, new: str, progress: Progress) -> Copied:
    create_schema(target)
    create_optuna_schema(target)
    with source.transaction(one_moment=True) as reading, target.transaction() as writing:
        sides = Side(source, reading), Side(target, writing)
        transfer = Transfer(*sides, name, new)
        transfer.check()
        done, total = 0, transfer.count()

        def count(n_rows: int) -> None:
            nonlocal done
            done += n_rows
            progress(min(done, total), total)

        found = []
        for each in transfer.names:
            states = copy_trials(*sides, each, transfer.renamed(each), count)
            waiting = {number for number, state in enumerate(states) if not state.is_finished()}
            found.append((len(states), len(waiting), transfer.copy_study(each, waiting, count)))
        return Copied(
            name=new,
            n_trials=found[0][0],
            n_ended=found[0][0] - found[0][1],
            n_begun=sum(study.n_begun for _, _, study in found),
            n_measurements=sum(study.n_measurements for _, _, study in found),
            n_evaluations=transfer.copy_evaluations(lambda document: _renamed(document, transfer)),
            n_models=transfer.copy_models(),
            n_looks=transfer.copy_looks(),
            certificates=transfer.copy_certificates(),
        )


def _renamed(document: dict[str, Any], transfer: Transfer) -> dict[str, Any]:
    """An evaluation's document, which names the study, the evaluation and the model."""
    for names in (document, document.get("model")):
        for key in ("study", "evaluation", "name"):
            if names is not None and key in names:
                names[key] = transfer.renamed(names[key])
    return document


# --- the file ------------------------------------------------------------------------------------------------


def _refuse_open(source: Database, out: Path) -> None:
    """A database must not be replaced under those who have it open."""
    if source.is_sqlite and out.exists() and out.samefile(source.path):
        raise InputError(f"{out}: expected another file than the database that is exported; name another --out")
    beside = [path for end in ("-wal", "-journal") if (path := out.with_name(out.name + end)).exists()]
    if beside:
        raise InputError(
            f"{out}: expected a file that nobody has open, got {beside[0].name} beside it; close it, or name "
            "another --out"
        )


def _as_one_file(path: Path) -> None:
    """Without a log beside it: a file that can be carried around."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


def _check_file(file: Path) -> None:
    """Raises InputError where the file is not a whole SQLite database."""
    if not file.is_file():
        got = "a folder" if file.is_dir() else "nothing"
        raise InputError(f"{file}: expected a file of `tuner export`, got {got}; name the one it wrote")
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA query_only=ON")
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        reason = " ".join(found.split())
        raise InputError(
            f"{file}: expected a file of `tuner export`, got a damaged one or something else ({reason}); fetch it "
            "again, or export again"
        )


def _only_study(source: Database, file: Path) -> str:
    """The one study that a file holds, read once to see that it can be."""
    ours, theirs = has_schema(source), RetryingStorage(source, patience_s=0.0).has_schema()
    if not ours:
        got = "Optuna's alone, which say nothing of configs, runs and data" if theirs else "none"
        raise InputError(
            f"{file}: expected the tuner's tables, got {got}; import what `tuner export` wrote"
            + (", and open this one with Optuna" if theirs else "")
        )
    if not check_database(source):
        raise InputError(f"{file}: expected Optuna's tables too, got none; export again")
    names = [row.name for row in Store(source).studies()]
    searches = [name for name in names if Store(source).find_evaluation(name) is None]
    if len(searches) != 1:
        raise InputError(
            f"{file}: expected one study, got {', '.join(searches) or 'none'}; `tuner export --study NAME "
            "--storage sqlite:///FILE` writes a file of one"
        )
    check_name(str(file), searches[0])
    for name in names:
        evaluated = EVALUATION_NAME.fullmatch(name)  # names become folders
        if name != searches[0] and not (evaluated and evaluated[1] == searches[0]):
            raise InputError(f"{file}: expected evaluations of {searches[0]}, got {name!r}; export again")
        _check_readable(source, name)
    return searches[0]


def _check_readable(database: Database, name: str) -> None:
    """Raises InputError where another version of tuner wrote the study, or it was deleted in part."""
    Study.open(database, name)
