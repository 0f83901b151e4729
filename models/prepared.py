"""A content-addressed cache of memory-mapped arrays, built once per machine and shared by its workers.

A prepared folder `<cache>/<key>/` appears complete or not at all: it is built beside its place under an
inter-process lock and moved there in one step. `contents.json` lists every file with its size (small files
with a checksum too), so that a damaged or incomplete folder is seen when it is opened, and built again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from models.trainer import DiskError, InputError

log = logging.getLogger(__name__)

CONTENTS = "contents.json"
CHECKSUM_BELOW = 1 << 20  # larger files are verified by size alone: a start must not read gigabytes
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a full, read-only or forbidden disk raises into DiskError or InputError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            reason = os.strerror(error.errno)
            raise DiskError(
                error.errno, f"{path}: {reason}; make room or name another cache folder, then start again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM) and _inside(error.filename, path):
            raise InputError(f"{path}: expected a folder this user can write, got: {error.strerror}") from error
        raise


def _inside(name: Any, folder: Path) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(folder)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value; equal values give equal digests whatever their key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(files: Mapping[str, Path], memo: Path) -> dict[str, str]:
    """SHA-256 of each file by its logical name; `memo` remembers them by (path, size, mtime_ns).

    Raises InputError where a file is missing or changes while it is read.
    """
    known = _read_json(memo)
    known = known if isinstance(known, dict) else {}
    found, fresh = {}, {}
    for name, path in files.items():
        path = path.resolve()
        size, mtime_ns = _stamp(path)
        entry = known.get(str(path))
        if isinstance(entry, list) and entry[:2] == [size, mtime_ns] and len(entry) == 3:
            found[name] = entry[2]
            continue
        found[name] = _sha256(path)
        if _stamp(path) != (size, mtime_ns):
            raise InputError(f"{path}: expected a file at rest, but it changed while it was read; start again")
        # A file written this very moment may change again within the clock's grain: read it again next time.
        if abs(time.time_ns() - mtime_ns) > 2_000_000_000:
            fresh[str(path)] = [size, mtime_ns, found[name]]
    if fresh:
        with disk_errors(memo.parent):
            memo.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(memo, json.dumps({**known, **fresh}).encode())
    return found


def refuse_changed(path: Path, before: str, after: str) -> None:
    """Raises InputError where the hash of the files at `path` is another than before they were read."""
    if before != after:
        raise InputError(f"{path}: expected files at rest, but they changed while they were read; start again")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the data path") from error
    return stat.st_size, stat.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write_atomically(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def prepare(cache: Path, key: str, build: Callable[[Path], None], parts: Collection[str] | None = None) -> Path:
    """The folder `<cache>/<key>`, built by `build(empty folder)` where it is absent or damaged.

    Args:
        parts: the sub-folders that must be complete, beside the files at the top; None means all of them. So
            a missing part that nobody opens does no harm.

    Guarantees: one builder at a time, over all processes (others wait and say so in the log); a builder that
    is killed or fails leaves nothing visible; arrays opened from a replaced folder stay readable.

    Raises:
        DiskError: the disk is full or read-only. InputError: the cache folder cannot be written.
    """
    folder = cache / key
    if damage(folder, parts) is None:
        return folder
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{key}.lock", key):
            reason = damage(folder, parts)  # again: the process waited for may have built it
            if reason is None:
                return folder
            if folder.exists():
                log.warning(
                    "%s: %s; building it again", folder, reason,
                    extra={"action": "prepare_again", "key": key, "path": str(folder)},
                )  # fmt: skip
            _build(cache, key, build)
    return folder


def _build(cache: Path, key: str, build: Callable[[Path], None]) -> None:
    for left in [*cache.glob(f".building-{key}-*"), *cache.glob(f".replaced-{key}-*")]:
        shutil.rmtree(left, ignore_errors=True)  # of killed builders: we hold the lock, so none is at work
    folder = cache / key
    work = Path(tempfile.mkdtemp(dir=cache, prefix=f".building-{key}-"))
    try:
        work.chmod(0o755)
        build(work)
        _seal(work)
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(dir=cache, prefix=f".replaced-{key}-"))
            os.replace(folder, replaced)
            os.replace(work, folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(work, folder)
        _sync_folder(cache)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _seal(folder: Path) -> None:
    """Lists every file in contents.json and makes all of them durable."""
    contents = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        size = path.stat().st_size
        checksum = _sha256(path) if size < CHECKSUM_BELOW else None
        contents[path.relative_to(folder).as_posix()] = [size, checksum]
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        _sync_folder(path)
    _write_atomically(folder / CONTENTS, json.dumps(contents, indent=1).encode())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path, parts: Collection[str] | None = None) -> str | None:
    """Why `folder` cannot be used for `parts`, or None where it is complete."""
    contents = _read_json(folder / CONTENTS)
    if not isinstance(contents, dict):
        return "not there" if not folder.exists() else f"{CONTENTS} is missing or not readable"
    for name, (size, checksum) in contents.items():
        top, _, rest = name.partition("/")
        if rest and parts is not None and top not in parts:
            continue
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if checksum is not None and _sha256(path) != checksum:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


@contextmanager
def _lock(path: Path, key: str) -> Iterator[None]:
    # The kernel lets go of a dead process's lock, so a killed builder never blocks the next one.
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            log.info(
                "waiting for %s, which prepares the same data", holder,
                extra={"action": "prepare_wait", "key": key},
            )  # fmt: skip
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()}")
        stream.flush()
        yield


class ArrayWriter:
    """Writes a `.npy` file of known shape chunk by chunk.

    Plain writes, not a writable memory map: on a full disk these raise, where a map kills the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        self._shape, self._dtype, self._rows = shape, np.dtype(dtype), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._stream = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def append(self, rows: np.ndarray) -> None:
        """Adds rows [n, ...]; they are cast to the file's dtype."""
        if rows.shape[1:] != self._shape[1:]:
            raise ValueError(f"{self._path}: expected rows of shape {self._shape[1:]}, got {rows.shape[1:]}")
        self._stream.write(np.ascontiguousarray(rows, self._dtype).data)
        self._rows += len(rows)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: Any, _trace: TracebackType | None) -> None:
        self._stream.close()
        if kind is None and self._rows != self._shape[0]:
            raise ValueError(f"{self._path}: expected {self._shape[0]} rows, got {self._rows}")


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a whole array as `.npy`."""
    with ArrayWriter(path, array.shape, array.dtype) as writer:
        writer.append(array)


def open_array(path: Path) -> np.ndarray:
    """A read-only memory map of a `.npy` file."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
