"""Where raw rows come from: the files a person has, or simulated ones, and the hash that identifies them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import prepared
from models.gift import features, kuailive, simulate, table
from models.gift.data import GiftData, RawTable, Simulate
from models.gift.kuailive_files import find_files
from models.gift.preparation import PREPARATION_VERSION
from models.trainer import DataSpec, FileStamp, InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where raw rows come from. `path` is the folder or file, or where the simulation is to lie; the rest says
    the same on every machine (see `Manifest`)."""

    path: Path
    source: str
    files: Mapping[str, FileStamp]
    data_hash: str
    preparation: Mapping[str, int]
    simulation: Mapping[str, Any] | None = None

    @property
    def simulated(self) -> bool:
        return self.simulation is not None


def find_origin(data: DataSpec) -> Origin:
    """Identifies the data without reading more than the hashes of its files. Raises InputError."""
    options: GiftData = data.options
    if data.path is None or (not data.path_given and not data.path.exists()):
        if options.simulate is not None:
            return _simulated_origin(data, options, options.simulate)
        if data.path is None:
            raise InputError(
                "data: expected files or `simulate` in the specification, got neither; use --data PATH"
            )
    if options.source == "kuailive":
        path, files, source = data.path, find_files(data.path), "KuaiLive"
    else:
        path = table.table_file(data.path)
        files, source = {"table": path}, f"table {path.name}"
    hashes = prepared.file_hashes(files, data.cache / "file-hashes.json")
    stamps = {file.name: FileStamp(hashes[name], file.stat().st_size) for name, file in files.items()}
    return Origin(path, source, stamps, _data_hash({"files": hashes}, options), _versions(options))


def _simulated_origin(data: DataSpec, options: GiftData, asked: Simulate) -> Origin:
    version = simulate.SIMULATOR_VERSION
    path = data.cache / f"simulated-{asked.scale!r}-{asked.seed}-v{version}" / "KuaiLive"
    source = f"simulated KuaiLive, scale {asked.scale!r}, seed {asked.seed}, simulator version {version}"
    if data.path is not None:
        log.warning(
            "%s is absent: using %s; name real data with --data", data.path, source,
            extra={"action": "simulated_data", "path": str(data.path)},
        )  # fmt: skip
    identity = {"simulator": version, "scale": float(asked.scale), "seed": asked.seed}
    return Origin(path, source, {}, _data_hash(identity, options), _versions(options), identity)


def _versions(options: GiftData) -> dict[str, int]:
    """Versions of the rules that these options bring into play."""
    if options.source == "table":
        return {"preparation": PREPARATION_VERSION, "reader": table.READER_VERSION}
    return {
        "preparation": PREPARATION_VERSION,
        "labels": kuailive.LABEL_VERSION,
        "features": features.FEATURES_VERSION,
    }


def _data_hash(content: Mapping[str, Any], options: GiftData) -> str:
    """Covers the content, every version of the rules, and every option that changes a prepared number."""
    chosen = options.model_dump(mode="json", exclude={"path", "simulate", "tasks"})
    chosen["tasks"] = [[name, spec.model_dump(mode="json")] for name, spec in options.tasks.items()]  # in order
    return prepared.digest({"content": content, "versions": _versions(options), "options": chosen})


def read_raw(data: DataSpec, origin: Origin) -> RawTable:
    """The raw table of `origin`; simulated files are made here, once, where they are absent."""
    options: GiftData = data.options
    if options.source == "table":
        return table.read(origin.path, options)
    if origin.simulated and options.simulate is not None:
        asked = options.simulate

        def build(folder: Path) -> None:
            simulate.simulate(folder / origin.path.name, asked.scale, asked.seed)

        prepared.prepare(data.cache, origin.path.parent.name, build)
    return kuailive.read(origin.path, options.snapshot_features)


def task_labels(raw: RawTable, options: GiftData) -> dict[str, np.ndarray]:
    """Task -> [N] float64 raw label; what the KuaiLive reader calls by column is named by task here."""
    if options.source == "table":
        return raw.labels
    labels = {}
    for task in options.task_list():
        values = raw.labels[task.column]
        known = ~np.isnan(values)
        if task.above is not None or task.positive is not None:
            hit = values > task.above if task.above is not None else values == task.positive
            values = np.where(known, hit, np.nan)
        elif task.kind == "binary" and not np.isin(values[known], (0, 1)).all():
            raise InputError(f"tasks.{task.name}.column: expected a 0/1 column, got {task.column}; add `above: x`")
        labels[task.name] = values
    return labels
