"""What a database holds: opened without leaving a trace, and relieved of one study at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from storage.artifacts import open_artifacts
from storage.database import Database, StorageError
from storage.leases import GRACE_S, is_dead
from storage.runs import Store, StudyRow, WorkerRow
from storage.tables import check_schema, has_schema
from tuner.optuna_storage import RetryingStorage
from tuner.optuna_study import delete_study
from tuner.spec_checks import SpecError, load_spec
from tuner.study import Study
from tuner.uploads import Uploads


def check_database(database: Database) -> bool:
    """Whether the database holds our tables and Optuna's, both of this version; makes nothing.

    Raises:
        StorageError: it cannot be reached, or its tables are of another version.
    """
    optuna_side = RetryingStorage(database, patience_s=0.0)
    ours, theirs = has_schema(database), optuna_side.has_schema()
    if theirs:
        optuna_side.check_schema()
    if ours:
        check_schema(database)
    return ours and theirs


def open_database(url: str, read_only: bool = True) -> Database:
    """A database with our tables.

    Raises:
        StorageError: there is none at `url`, or it is not ours; nothing is created.
    """
    database = Database(url, read_only)
    try:
        if not database.exists():
            raise StorageError(
                f"storage: {database!r}: expected a database, got no such file; "
                "`tuner run` or `tuner db upgrade` makes it, or name another with --storage"
            )
        if not check_database(database):
            raise StorageError(
                f"storage: {database!r}: expected our tables, got none; `tuner db upgrade` or the first "
                "`tuner run` makes them, or name another database with --storage"
            )
    except BaseException:
        database.close()
        raise
    return database


def find_name(database: Database, reference: str, name: str | None = None) -> str:
    """The name under which a study is stored.

    Args:
        reference: the stored name itself, `NAME` for `configs/NAME.yaml`, or the path of a YAML file.
        name: what `--name` said; goes before everything.

    Raises:
        StorageError: no such study; the message names those there are.
        SpecError: `reference` is a path and no specification can be read there.
    """
    stored = [row.name for row in Store(database).studies()]
    wanted = name or reference
    if name is None and reference not in stored:
        try:
            wanted = load_spec(reference).study
        except SpecError:
            if os.sep in reference or reference.endswith((".yaml", ".yml")):
                raise
    if wanted in stored:
        return wanted
    there = f"there is {', '.join(stored)}" if stored else "there is none yet; `tuner run` makes one"
    raise StorageError(f"storage: study {wanted!r} is not in {database!r}: {there}")


def open_study(database: Database, reference: str, name: str | None = None) -> Study:
    """A stored study. Raises StorageError and SpecError as `find_name` does."""
    return Study.open(database, find_name(database, reference, name))


def is_alive(worker: WorkerRow) -> bool:
    """Whether a worker still works, as far as this machine can tell: its process here, its lease elsewhere."""
    if worker.ended_at is not None:
        return False
    dead = is_dead(worker.identity)
    return not dead if dead is not None else worker.age_s <= GRACE_S


def delete(database: Database, name: str, runs: Path, artifacts: str | None = None) -> bool:
    """Remove a study: its evaluations' studies, its folder under `runs`, its part of the artifact store, Optuna's
    rows, ours. What was seen of its data, its certificates and its models stay known. Killed in between, it can be
    repeated.

    Returns:
        Whether there was a folder.

    Raises:
        StorageError: a living worker serves one of the studies, or a folder or the artifacts cannot be removed.
    """
    store = Store(database)
    row = store.find_study(name)
    if row is None:
        raise StorageError(f"storage: study {name!r} is not in {database!r}")
    of_evaluations = [store.find_study(evaluation.name) for evaluation in store.evaluations(row.id)]
    doomed = [*(found for found in of_evaluations if found is not None), row]
    for one in doomed:  # before anything of any of them is gone
        _refuse_served(store, one)
    return [_delete_one(database, one, runs, artifacts) for one in doomed][-1]


def _refuse_served(store: Store, row: StudyRow) -> None:
    held = {id for id, of in store.holdings().items() if any(one.study_name == row.name for one in of)}
    alive = [w for w in store.workers(row.id) if is_alive(w) and (w.study_id == row.id or w.id in held)]
    if alive:
        where = ", ".join(f"{worker.identity.host} pid {worker.identity.pid}" for worker in alive)
        stop = "`tuner evaluate`" if store.find_evaluation(row.name) else "`tuner run`"
        raise StorageError(f"study {row.name!r}: expected no worker, got {where} at work; stop {stop} first")


def _delete_one(database: Database, row: StudyRow, runs: Path, artifacts: str | None) -> bool:
    store, name = Store(database), row.name
    with database.exclusive(f"study:{row.id}"):
        _refuse_served(store, row)
        # Files first: a folder without its rows would lend its checkpoints to the next study of that name.
        removed = _remove_folder(runs / name)
        if artifacts is not None:
            Uploads(open_artifacts(artifacts), name).delete_study()
        with contextlib.suppress(KeyError):  # an earlier deletion was killed right after this
            delete_study(database, name)
        store.delete_study(row.id)
    return removed


def _remove_folder(folder: Path) -> bool:
    doomed = folder.with_name(f".{folder.name}.deleted")
    existed = folder.exists()
    try:
        if doomed.exists():  # an earlier deletion was killed in the middle of it
            shutil.rmtree(doomed)
        if existed:
            os.replace(folder, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be removed ({error.strerror}); mend its permissions") from error
    return existed
