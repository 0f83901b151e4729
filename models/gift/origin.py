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
from models.trainer import DataSpec, InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where raw rows come from. `path` is the folder or file, or where the simulation is to lie."""

    path: Path
    source: str
    simulated: bool
    files: Mapping[str, str]
    data_hash: str


def find_origin(data: DataSpec) -> Origin:
    """Identifies the data without reading more than the hashes of its files. Raises InputError."""
    options: GiftData = data.options
    if options.simulate is not None and not data.path_given and not data.path.exists():
        return _simulated_origin(data, options, options.simulate)
    if options.source == "kuailive":
        path, files = data.path, find_files(data.path)
    else:
        path = table.table_file(data.path)
        files = {"table": path}
    hashes = prepared.file_hashes(files, data.cache / "file-hashes.json")
    name = "KuaiLive" if options.source == "kuailive" else "table"
    return Origin(path, f"{name} at {path}", False, hashes, _data_hash({"files": hashes}, options))


def _simulated_origin(data: DataSpec, options: GiftData, asked: Simulate) -> Origin:
    version = simulate.SIMULATOR_VERSION
    path = data.cache / f"simulated-{asked.scale!r}-{asked.seed}-v{version}" / "KuaiLive"
    source = f"simulated KuaiLive, scale {asked.scale!r}, seed {asked.seed}, simulator version {version}"
    log.warning("action=simulated_data %s is absent: using %s; name real data with --data", data.path, source)
    identity = {"simulator": version, "scale": float(asked.scale), "seed": asked.seed}
    return Origin(path, source, True, {}, _data_hash(identity, options))


def _data_hash(content: Mapping[str, Any], options: GiftData) -> str:
    """Covers the content, every version of the rules, and every option that changes a prepared number."""
    versions = {"preparation": PREPARATION_VERSION}
    if options.source == "kuailive":
        versions |= {"labels": kuailive.LABEL_VERSION, "features": features.FEATURES_VERSION}
    else:
        versions["reader"] = table.READER_VERSION
    chosen = options.model_dump(mode="json", exclude={"path", "simulate", "tasks"})
    chosen["tasks"] = [[name, spec.model_dump(mode="json")] for name, spec in options.tasks.items()]  # in order
    return prepared.digest({"content": content, "versions": versions, "options": chosen})


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
