"""Raw files found by what is in them: a study names them by SHA-256 and size, every machine has its own paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.prepared import file_hashes
from models.trainer import DiskError, FileStamp, InputError

MAX_DEPTH = 6  # folders below a root; deeper is somebody's file system, not a folder of data
_SHOWN = 3


@dataclass(frozen=True)
class _Candidate:
    """A place where some of the names are: the files that are the right ones, and what is wrong with the rest."""

    right: Mapping[str, Path]
    wrong: Mapping[str, str]  # name -> what is there instead


def locate(files: Mapping[str, FileStamp], roots: Sequence[Path], memo: Path) -> Path:
    """The folder that holds every file of `files`, or the path of the file where it is a single one.

    Args:
        files: at least one, by name inside the folder. A name without a suffix stands for a file of any suffix.
        roots: searched in their order, nearer folders first, then by name; hidden folders are skipped, links are
            followed. A root may be the folder itself; it may also be a file, which is then a single wanted one
            whatever its name.
        memo: remembers hashes by (path, size, mtime_ns), so that a file is read once.

    Raises:
        InputError: not there, or there with another content; names what was expected and what was found.
        DiskError: the memo's disk is full or read-only.
    """
    wrong: list[_Candidate] = []
    for place in _places(roots):
        if place.is_file():
            found = dict.fromkeys(files, [place] if len(files) == 1 else [])
        else:
            found = {name: _named(place, name) for name in files}
        if any(found.values()):
            candidate = _judge(found, files, memo)
            if not candidate.wrong:
                return next(iter(candidate.right.values())) if len(files) == 1 else place
            wrong.append(candidate)
    raise InputError(_message(files, roots, wrong))


def _judge(found: Mapping[str, Sequence[Path]], files: Mapping[str, FileStamp], memo: Path) -> _Candidate:
    right: dict[str, Path] = {}
    wrong: dict[str, str] = {}
    for name, stamp in files.items():
        for path in found[name]:
            got = _got(path, stamp, memo)
            if got is None:
                right[name] = path
                break
            wrong[name] = f"{path} ({got})"
        else:
            wrong.setdefault(name, "no such file beside them")
    return _Candidate(right, {name: what for name, what in wrong.items() if name not in right})


def _got(path: Path, stamp: FileStamp, memo: Path) -> str | None:
    """What `path` is instead of the file of `stamp`; None where it is that file. Read only where sizes agree."""
    try:
        size = path.stat().st_size
        if stamp.size_bytes is not None and size != stamp.size_bytes:
            return f"{size} bytes"
        sha256 = file_hashes({path.name: path}, memo)[path.name]
    except DiskError:  # of the memo's disk
        raise
    except InputError as error:  # it changed while it was read
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if sha256 == stamp.sha256 else f"{sha256[:12]}, {size} bytes"


def _named(folder: Path, name: str) -> list[Path]:
    """Files of `folder` that `name` stands for."""
    try:
        exact = [folder / name] if (folder / name).is_file() else []
        if exact or "." in name:
            return exact
        return sorted(p for p in folder.glob(f"{name}.*") if p.name.partition(".")[0] == name and p.is_file())
    except OSError:  # a folder that may be listed but not entered
        return []


def _places(roots: Sequence[Path]) -> Iterator[Path]:
    """The roots and the folders below them, every one once."""
    seen: set[tuple[int, int]] = set()
    for root in roots:
        level = [root]
        for depth in range(MAX_DEPTH + 1):
            new = [place for place in level if _is_new(place, seen)]
            yield from new
            level = [below for place in new for below in _folders(place)] if depth < MAX_DEPTH else []


def _is_new(place: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        stat = place.stat()
    except OSError:
        return False
    key = stat.st_dev, stat.st_ino
    if key in seen:
        return False
    seen.add(key)
    return True


def _folders(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:  # a file, or a folder closed to us
        return []
    return [place / name for name in names]


def _message(files: Mapping[str, FileStamp], roots: Sequence[Path], wrong: Sequence[_Candidate]) -> str:
    closest = sorted(wrong, key=lambda candidate: -len(candidate.right))[:_SHOWN]
    named = [name for candidate in closest for name in candidate.wrong] or list(files)
    expected = _some([_described(name, files[name]) for name in dict.fromkeys(named)])
    searched = ", ".join(f"{root}{'' if root.exists() else ' (not there)'}" for root in roots) or "no folder at all"
    if closest:
        got = _some([f"{name}: {what}" for candidate in closest for name, what in candidate.wrong.items()])
    else:
        got = "no file of that name" if len(files) == 1 else "no file of these names"
    return f"data: expected {expected}, got {got} (searched: {searched}); name the folder that holds it with --data"


def _described(name: str, stamp: FileStamp) -> str:
    size = "" if stamp.size_bytes is None else f", {stamp.size_bytes} bytes"
    return f"{name} ({stamp.sha256[:12]}{size})"


def _some(phrases: Sequence[str]) -> str:
    return ", ".join(phrases[:_SHOWN]) + (f" and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else "")
