"""For tests of uploads: a run's directory as a trainer fills it, and an artifact store that can be made to fail."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from storage.artifacts import ArtifactStore, FolderStore


def write_step(directory: Path, attempt: int, step: int, content: str | None = None) -> None:
    """One step as the gift trainer leaves it: a folder, the best step's file, two steps kept, the journal."""
    folder = directory / f"attempt-{attempt}"
    (folder / f"step-{step:05d}").mkdir(parents=True)
    text = content or f"attempt {attempt}, step {step}"
    (folder / f"step-{step:05d}" / "tensors").write_text(text * 100)
    (folder / f"step-{step:05d}" / "state.json").write_text(text)
    if step % 3 == 0:
        for path in folder.glob("best-*"):
            path.unlink()
        (folder / f"best-{step:05d}.bin").write_text(f"best of {text}")
    with (folder / "measurements.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    for path in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(path)


def write_file_step(directory: Path, attempt: int, step: int) -> None:
    """One step as a trainer leaves it that needs but a file."""
    folder = directory / f"attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{step:05d}").write_text(f"attempt {attempt}, step {step}")


def files_of(directory: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its content."""
    return {
        path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()
    }


def needed_of(directory: Path, attempt: int, step: int) -> dict[str, str]:
    """What a snapshot of a step has to bring, taken from the run it comes from."""
    own = f"attempt-{attempt}/"
    return {
        name: text
        for name, text in files_of(directory).items()
        if re.match(rf"attempt-\d+/measurements|{own}step-{step:05d}|{own}best-", name)
    }


class WatchedStore:
    """A folder of an artifact store that tells what it is asked, and calls `before(what, key)` first."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda _what, _key: None
        self._store: ArtifactStore = FolderStore(root)
        self.url = self._store.url

    def _ask(self, what: str, key: str) -> None:
        self.calls.append((what, key))
        self.before(what, key)

    def put(self, key: str, source: Path | bytes) -> None:
        self._ask("put", key)
        self._store.put(key, source)

    def get(self, key: str) -> bytes:
        self._ask("get", key)
        return self._store.get(key)

    def fetch(self, key: str, target: Path) -> None:
        self._ask("fetch", key)
        self._store.fetch(key, target)

    def names(self, prefix: str = "") -> list[str]:
        self._ask("names", prefix)
        return self._store.names(prefix)

    def delete(self, prefix: str) -> None:
        self._ask("delete", prefix)
        self._store.delete(prefix)

    def snapshots(self) -> list[str]:
        """`1/00004` for step 4 of attempt 1."""
        found = sorted(self.root.glob("*/trials/*/attempt-*/step-*.json"))
        return [f"{path.parent.name[8:]}/{path.stem[5:]}" for path in found]

    def blob(self, content: str) -> Path:
        """The stored file of this content; there is one."""
        (path,) = self.root.rglob(hashlib.sha256(content.encode()).hexdigest())
        return path


class Gate:
    """Stops the first call that `applies` until it is opened."""

    def __init__(self, applies: Callable[[str, str], bool]) -> None:
        self._applies = applies
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, what: str, key: str) -> None:
        if self._applies(what, key) and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(30)
