"""`tuner check`: whether a study could run here, without training and without writing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.trainer import SEARCH_ROLES, DataSpec, InputError, Manifest
from storage.database import Database, StorageError
from storage.runs import Store
from tuner.catalog import check_database
from tuner.coordinator import RunOptions, choose_devices, data_spec, read_spec, refusals
from tuner.spec import Spec


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `faults` is empty where it is fine, each fault one line."""

    what: str
    detail: str
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.faults


def check(options: RunOptions) -> Iterator[Finding]:
    """Look at specification, device, data and database, in this order; every fault of each is told.

    Data are prepared as a run would, in the cache of `options` where there is one already, else in a temporary
    folder: nothing is created.
    """
    spec: Spec | None = None
    trainer: Any = None
    manifest: Manifest | None = None

    def specification() -> str:
        nonlocal spec, trainer
        spec, trainer = read_spec(options)
        n = len(spec.space.dimensions)
        return f"study {spec.study}, trainer {spec.trainer}, {len(spec.arms)} arms, {n} dimensions"

    def data() -> str:
        nonlocal manifest
        assert spec is not None
        manifest = _manifest(trainer, data_spec(spec, trainer, options))
        rows = ", ".join(f"{role} {count}" for role, count in manifest.rows.items())
        return f"{manifest.source}{' (simulated, not real)' if manifest.simulated else ''}: {rows} rows"

    yield _finding("specification", specification)
    yield _finding("device", lambda: ", ".join(choose_devices(options.devices, options.workers)))
    if spec is not None:
        yield _finding("data", data)
    yield _finding("database", lambda: _database(options, spec, manifest))


def _finding(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except (InputError, StorageError) as error:
        return Finding(what, "", tuple(str(error).splitlines()))


def _manifest(trainer: Any, data: DataSpec) -> Manifest:
    if data.cache.is_dir():
        return trainer.load(data, SEARCH_ROLES).manifest
    with tempfile.TemporaryDirectory(prefix="tuner-check-") as folder:
        return trainer.load(replace(data, cache=Path(folder)), SEARCH_ROLES).manifest


def _database(options: RunOptions, spec: Spec | None, manifest: Manifest | None) -> str:
    database = Database(options.storage, read_only=True)
    try:
        if not database.exists():
            return _new_file(database)
        if not check_database(database):
            return f"{database!r} is reached and has no tables yet; `tuner run` makes them"
        name = options.name or (spec.study if spec else options.study)
        row = Store(database).find_study(name)
        if row is None:
            return f"{database!r} is reached; study {name!r} is new"
        refused = refusals(row, spec, manifest) if spec and manifest else []
        if refused:
            raise InputError(
                "\n".join(f"study {name!r} exists and differs: {line}" for line in refused)
                + f"\nuse --name NEW for a new study, or `tuner delete --study {name} --yes`"
            )
        return f"{database!r} is reached; study {name!r} goes on"
    finally:
        database.close()


def _new_file(database: Database) -> str:
    folder = database.path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"storage: {database!r}: cannot be made, {folder} is not writable; use another --storage"
        )
    return f"{database!r} is absent; `tuner run` makes it"
