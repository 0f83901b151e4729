"""Which files a dataset comes from, and the hash that identifies it on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.prepared import digest, file_hashes
from models.stock.bars import READER_VERSION
from models.stock.data import StockData
from models.stock.features import FEATURES_VERSION, names
from models.stock.files import find_files
from models.stock.labels import LABEL_VERSION
from models.stock.preparation import PREPARATION_VERSION
from models.trainer import DataSpec, FileStamp, InputError

VERSIONS = {
    "preparation": PREPARATION_VERSION,
    "reader": READER_VERSION,
    "labels": LABEL_VERSION,
    "features": FEATURES_VERSION,
}
# Names of files change no number, and folds only who is trained on what.
_NO_NUMBER = {"path": True, "bars": True, "index": {"file"}, "listing": {"file"}, "split": {"folds"}}


@dataclass(frozen=True)
class Origin:
    """Where the data lie, and what is the same on every machine (see `Manifest`); `stamps` of the files are by name
    inside the folder."""

    path: Path
    source: str
    stamps: Mapping[str, FileStamp]
    data_hash: str


def find_origin(data: DataSpec) -> Origin:
    """Identifies the data without reading more than the hashes of their files. Raises InputError."""
    options: StockData = data.options
    if data.path is None:
        raise InputError("data: expected a folder with daily bars, got none; use --data PATH")
    files = find_files(data.path, options)
    named = files.named()
    hashes = file_hashes(named, data.cache / "file-hashes.json")
    stamps = {
        file.relative_to(files.folder).as_posix(): FileStamp(hashes[name], file.stat().st_size)
        for name, file in named.items()
    }
    chosen = options.model_dump(mode="json", exclude=_NO_NUMBER)
    data_hash = digest({"files": hashes, "versions": VERSIONS, "features": names(), "options": chosen})
    return Origin(data.path, f"daily bars {files.shown().name}", stamps, data_hash)
