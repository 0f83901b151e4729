"""Snapshots: what of a run has to move for its trial to go on from a step on another machine.

    <study>/trials/<number>/attempt-<a>/<sha256>            the files, by content
    <study>/trials/<number>/attempt-<a>/step-<s>.json       a snapshot: which files, with checksums; written last

A snapshot consists of the step's checkpoint, the files beside it that the steps of an attempt share, and every
attempt's measurements. As in the run's directory each attempt writes into its own folder only: a worker that was
replaced and does not know it yet can damage nothing of its successor's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.trainer import DiskError
from storage.artifacts import ArtifactError, ArtifactStore, flush_folder
from storage.runs import Fenced
from tuner.reporter import Journal

log = logging.getLogger("tuner")

KEPT_SNAPSHOTS = 2  # the newest may be found damaged
# A restore that was killed leaves its folder behind; one this old is nobody's.
STALE_S = 86_400.0

_FORMAT = 1
_UPLOADING, _RESTORING = ".uploading-", ".restoring-"


class Damaged(Exception):
    """A snapshot is not as it was stored."""


# --- the run's directory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged:
    """A step's snapshot, linked away: below `root` the files lie as in the run's directory."""

    step: int
    root: Path

    def files(self) -> dict[str, Path]:
        return {path.relative_to(self.root).as_posix(): path for path in self.root.rglob("*") if path.is_file()}

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def stage(directory: Path, attempt: int, step: int) -> Staged:
    """Link away the snapshot of a step, as the attempt's own; a trainer may drop the step as soon as it goes on.

    A resumed trainer yields the measurement of its checkpoint once more, which lies in an older attempt's folder:
    it becomes this attempt's starting point.

    Raises:
        RuntimeError: there is no such checkpoint.
        DiskError: the run's disk is full or read-only.
    """
    name = f"step-{step:05d}"
    folders = (directory / f"attempt-{a}" for a in range(attempt, 0, -1))
    source = next((folder for folder in folders if (folder / name).exists()), None)
    if source is None:
        raise RuntimeError(
            f"{directory}: expected the checkpoint of step {step} before its measurement, got none; "
            "mend the trainer"
        )
    with disk_errors(directory):
        staged = Staged(step, Path(tempfile.mkdtemp(prefix=f"{_UPLOADING}{attempt}-", dir=directory)))
        try:
            _link_step(source, name, staged.root / f"attempt-{attempt}")
            _copy_journals(directory, attempt, staged.root)
        except BaseException:
            staged.remove()
            raise
    return staged


def prepare(directory: Path, attempt: int) -> None:
    """Make the run's directory and remove what killed attempts had staged in it.

    An older attempt that lives still has been replaced; it may not name what it uploads. Raises DiskError.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"{_UPLOADING}*"):
            match = re.match(rf"{re.escape(_UPLOADING)}(\d+)-", path.name)
            if match and int(match[1]) < attempt:
                shutil.rmtree(path, ignore_errors=True)
        for path in directory.glob(f"{_RESTORING}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    shutil.rmtree(path, ignore_errors=True)


def newest_step(directory: Path) -> tuple[int, int] | None:
    """(attempt, step) of the checkpoint that a trainer would go on from; None: there is none."""
    found = (
        re.fullmatch(r"attempt-(\d+)/step-(\d{5,})", f"{path.parent.name}/{path.name}")
        for path in directory.glob("attempt-*/step-*")
    )
    return max(((int(match[1]), int(match[2])) for match in found if match), default=None)


@contextlib.contextmanager
def disk_errors(
    path: Path, what: str = "a checkpoint's copy", way_out: str = "make room and run again"
) -> Iterator[None]:
    """What the disk refuses at a path becomes a DiskError: no fault of the trial."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        reason = f"{path}: the disk refused {what} ({error.strerror or error}); {way_out}"
        raise DiskError(error.errno, reason) from error


def _link_step(source: Path, name: str, target: Path) -> None:
    """One step, and the files beside it; other steps have snapshots of their own."""
    target.mkdir()
    if (source / name).is_file():
        _link(source / name, target / name)
    else:
        shutil.copytree(source / name, target / name, copy_function=_link)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith((".", "step-")) and path.name != Journal.NAME:
            with contextlib.suppress(FileNotFoundError):  # no step needs it any more
                _link(path, target / path.name)


def _copy_journals(directory: Path, attempt: int, root: Path) -> None:
    for number in range(1, attempt + 1):
        journal = directory / f"attempt-{number}" / Journal.NAME
        if journal.exists():
            (root / f"attempt-{number}").mkdir(exist_ok=True)
            shutil.copyfile(journal, root / f"attempt-{number}" / Journal.NAME)  # a link would grow with it


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy on a file system without links; the files of a checkpoint are never written again."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


# --- up: one attempt's folder in the store -------------------------------------------------------------------


class Shelf:
    """What one attempt has in the artifact store; for one thread."""

    def __init__(self, store: ArtifactStore, trial: str, attempt: int) -> None:
        self._store = store
        self._trial = trial
        self._attempt = attempt
        self._folder = f"{trial}/attempt-{attempt}"
        self._stored: set[str] = set()  # names that are there
        self._tried: set[str] = set()  # names that may be there
        self._snapshots: dict[int, set[str]] = {}  # what each step that is there needs
        self._is_alone = attempt == 1

    def add(self, staged: Staged) -> int:
        """Store a snapshot; the bytes that this took. A file that is there already is not stored again.

        Raises:
            ArtifactError.
            Fenced: a later attempt has removed what this one had staged.
        """
        stamps, size_bytes = {}, 0
        for name, path in sorted(staged.files().items()):
            try:
                stamps[name] = stamp = _stamp(path)
                if stamp["sha256"] not in self._stored:
                    self._put(stamp["sha256"], path)
                    size_bytes += stamp["size_bytes"]
            except FileNotFoundError:
                raise Fenced(f"{self._folder}: expected {name} of step {staged.step}, got none: removed") from None
        if not any("/step-" in name for name in stamps):
            raise Fenced(f"{self._folder}: expected the staged step {staged.step}, got none: removed")
        manifest = f"step-{staged.step:05d}.json"
        self._put(manifest, _sealed({"format": _FORMAT, "files": stamps}))
        self._snapshots[staged.step] = {manifest, *(stamp["sha256"] for stamp in stamps.values())}
        return size_bytes

    def tidy(self) -> None:
        """Delete what the kept snapshots do not need: of this attempt, and once it has enough, older attempts."""
        for step in sorted(self._snapshots)[:-KEPT_SNAPSHOTS]:
            del self._snapshots[step]
        needed = set().union(*self._snapshots.values())
        try:
            # A snapshot goes before its files: one that is there is whole.
            for name in sorted(self._tried - needed, key=lambda name: not name.endswith(".json")):
                self._store.delete(f"{self._folder}/{name}")
                self._tried.discard(name)
                self._stored.discard(name)
            if not self._is_alone and len(self._snapshots) >= KEPT_SNAPSHOTS:
                for attempt in self._older_attempts():
                    self._store.delete(f"{self._trial}/attempt-{attempt}")
                self._is_alone = True
        except ArtifactError as error:
            # Nothing is lost by it but space, and the next upload tries again.
            log.warning("old uploads stay: %s", error, extra={"action": "upload_tidy"})

    def _put(self, name: str, source: Path | bytes) -> None:
        self._tried.add(name)
        self._store.put(f"{self._folder}/{name}", source)
        self._stored.add(name)

    def _older_attempts(self) -> list[int]:
        found = (re.search(r"/attempt-(\d+)/", key) for key in self._store.names(self._trial))
        return sorted({number for match in found if match and (number := int(match[1])) < self._attempt})


# --- down: from the store into a run's directory -------------------------------------------------------------


def stored_snapshots(store: ArtifactStore, trial: str, named: tuple[int, int]) -> list[tuple[int, int, str]]:
    """(attempt, step, key) up to the named one, newest first.

    What an older attempt stored beyond the named step was superseded.
    """
    found = []
    for key in store.names(trial):
        if match := re.search(r"/attempt-(\d+)/step-(\d{5,})\.json$", key):
            attempt, step = int(match[1]), int(match[2])
            if attempt <= named[0] and step <= named[1]:
                found.append((attempt, step, key))
    return sorted(found, reverse=True)


def bring(store: ArtifactStore, key: str, directory: Path) -> None:
    """Bring a snapshot's files into the run's directory, the step itself last, in one move.

    Raises:
        Damaged, ArtifactMissing: it is not whole; the directory is as it was.
    """
    staged = Path(tempfile.mkdtemp(prefix=_RESTORING, dir=directory))
    try:
        blobs = key.rpartition("/")[0]
        for name, stamp in _unsealed(key, store.get(key)).items():
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            store.fetch(f"{blobs}/{stamp['sha256']}", target)
            if _stamp(target) != stamp:
                raise Damaged(f"{key}: expected {name} with sha256 {stamp['sha256'][:12]}, got a damaged file")
        _move_in(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _move_in(staged: Path, directory: Path) -> None:
    moves = []
    for folder in staged.iterdir():
        (directory / folder.name).mkdir(exist_ok=True)
        for path in folder.iterdir():
            moves.append((path.name.startswith("step-"), path, directory / folder.name / path.name))
    flush_folder(directory)
    for _, path, target in sorted(moves):
        if target.name == Journal.NAME and target.exists() and target.stat().st_size >= path.stat().st_size:
            continue  # append-only: the longer one has it all
        path.replace(target)
        flush_folder(target.parent)


def _sealed(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}).encode()


def _unsealed(key: str, raw: bytes) -> dict[str, dict[str, Any]]:
    """The files of a snapshot with their stamps. Raises Damaged."""
    try:
        document = json.loads(raw)
        text = document["content"]
        intact = document["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise Damaged(f"{key}: expected a whole snapshot, got a damaged one")
    content = json.loads(text)
    if content["format"] != _FORMAT:
        raise ArtifactError(f"{key}: expected snapshot format {_FORMAT}, got {content['format']}; update tuner")
    for name in content["files"]:
        if not re.fullmatch(r"attempt-\d+(/[^/]+)+", name) or ".." in name.split("/"):
            raise Damaged(f"{key}: expected files of a run, got {name!r}")
    return content["files"]


def _stamp(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"sha256": digest.hexdigest(), "size_bytes": file.tell()}
