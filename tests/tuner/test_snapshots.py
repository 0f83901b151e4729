"""What of a run is stored, and what of it comes back: whole, or the one before it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.trainer import DiskError
from storage.artifacts import ArtifactError, ArtifactUnavailable, FolderStore
from storage.runs import Fenced
from tests.tuner.stored_runs import WatchedStore, files_of, needed_of, write_file_step, write_step
from tuner import snapshots
from tuner.uploads import Uploads

TRIAL = "study/trials/00003"


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return WatchedStore(tmp_path / "store")


@pytest.fixture
def uploads(store: WatchedStore) -> Uploads:
    return Uploads(store, "study", 3600.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The run's directory on another machine."""
    return tmp_path / "other" / "run"


def train(
    uploads: Uploads, directory: Path, attempt: int, steps: range, write: Callable[..., None] = write_step
) -> None:
    """Every step is uploaded."""
    with uploads.open(3, attempt, directory, lambda _step: None) as up:
        for step in steps:
            write(directory, attempt, step)
            up.offer(step)
            up.finish(20.0)


class TestUp:
    def test_a_step_is_stored_with_what_it_needs(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(4, 5))
        manifest = json.loads(store.get(f"{TRIAL}/attempt-1/step-00004.json"))
        assert hashlib.sha256(manifest["content"].encode()).hexdigest() == manifest["sha256"]
        content = json.loads(manifest["content"])
        assert content["format"] == 1
        assert set(content["files"]) == {
            "attempt-1/measurements.jsonl", "attempt-1/step-00004/state.json", "attempt-1/step-00004/tensors",
        }  # fmt: skip
        for name, stamp in content["files"].items():
            blob = store.get(f"{TRIAL}/attempt-1/{stamp['sha256']}")
            assert blob == (run / name).read_bytes()
            assert len(blob) == stamp["size_bytes"]

    def test_the_manifest_is_written_last(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(1))
        assert [key.endswith(".json") for what, key in store.calls if what == "put"] == [False] * 4 + [True]

    def test_hidden_files_and_other_steps_stay(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        write_step(run, 1, 0)
        (run / "attempt-1" / ".tmp-step-00001").mkdir()
        (run / "attempt-1" / ".tmp-best").write_text("half")
        write_file_step(run, 1, 7)
        train(uploads, run, 1, range(1, 2))
        stored = json.loads(json.loads(store.get(f"{TRIAL}/attempt-1/step-00001.json"))["content"])["files"]
        assert set(stored) == set(needed_of(run, 1, 1))

    def test_what_is_there_is_not_stored_again(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(3))
        put = [key for what, key in store.calls if what == "put"]
        assert len(put) == len(set(put))
        assert store.blob("best of attempt 1, step 0").exists()

    def test_two_steps_are_kept_with_what_they_need(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(5))
        assert store.snapshots() == ["1/00003", "1/00004"]
        blobs = {path.read_text() for path in store.root.rglob("*") if path.is_file() and path.suffix != ".json"}
        journals = {"".join(f'{{"step": {s}}}\n' for s in range(n)) for n in (4, 5)}
        texts = {f"attempt 1, step {step}" for step in (3, 4)}
        assert blobs == journals | texts | {text * 100 for text in texts} | {"best of attempt 1, step 3"}

    def test_the_manifest_is_deleted_first(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(3))
        deleted = [key for what, key in store.calls if what == "delete"]
        assert deleted[0].endswith("step-00000.json")
        assert len(deleted) > 1

    def test_older_attempts_are_deleted_once_this_one_has_two(
        self, uploads: Uploads, store: WatchedStore, run: Path
    ) -> None:
        train(uploads, run, 1, range(3))
        train(uploads, run, 2, range(3, 4))
        assert store.snapshots() == ["1/00001", "1/00002", "2/00003"]
        train(uploads, run, 3, range(4, 7))
        assert store.snapshots() == ["3/00005", "3/00006"]
        assert {path.parent.name for path in store.root.rglob("*") if path.is_file()} == {"attempt-3"}

    def test_a_store_that_lets_nothing_be_deleted_costs_space_alone(
        self, uploads: Uploads, store: WatchedStore, run: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def forbid(what: str, key: str) -> None:
            if what == "delete":
                raise ArtifactError(f"forbidden: {key}")

        store.before = forbid
        train(uploads, run, 1, range(4))
        assert store.snapshots() == ["1/00000", "1/00001", "1/00002", "1/00003"]
        assert {r.action for r in caplog.records if r.levelno == logging.WARNING} == {"upload_tidy"}  # type: ignore[attr-defined]
        store.before = lambda _what, _key: None

    def test_a_zombie_damages_nothing(self, uploads: Uploads, store: WatchedStore, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(6))
        assert uploads.restore(3, other, (1, 5)) == (1, 5)

        def refuse(_step: int) -> None:
            raise Fenced("attempt 2 has it")

        with uploads.open(3, 1, run, refuse) as zombie:
            train(uploads, other, 2, range(6, 9))
            before = files_of(store.root / TRIAL / "attempt-2")
            write_step(run, 1, 6)
            zombie.offer(6)
            with pytest.raises(Fenced):
                zombie.finish(20.0)
            write_step(run, 1, 7)
            with pytest.raises(Fenced):
                zombie.offer(7)
        assert files_of(store.root / TRIAL / "attempt-2") == before
        fresh = other.with_name("third")
        assert uploads.restore(3, fresh, (2, 8)) == (2, 8)
        assert files_of(fresh)["attempt-2/step-00008/state.json"] == "attempt 2, step 8"

    def test_a_zombie_finds_what_it_staged_removed(self, run: Path, store: WatchedStore) -> None:
        write_step(run, 1, 0)
        staged = snapshots.stage(run, 1, 0)
        snapshots.prepare(run, 1)  # its own attempt's
        assert staged.files()
        snapshots.prepare(run, 2)
        assert not list(run.glob(".*"))
        with pytest.raises(Fenced):
            snapshots.Shelf(store, TRIAL, 1).add(staged)
        assert not store.snapshots()

    def test_a_disk_without_links_is_copied(
        self, uploads: Uploads, run: Path, other: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_args: Any) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
        train(uploads, run, 1, range(4))
        assert uploads.restore(3, other, (1, 3)) == (1, 3)
        assert files_of(other) == needed_of(run, 1, 3)

    def test_a_full_disk_of_the_runs_is_named(
        self, uploads: Uploads, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_step(run, 1, 0)
        with uploads.open(3, 1, run, lambda _step: None) as up, monkeypatch.context() as patch:
            refuse_writing(patch)
            with pytest.raises(DiskError, match=rf"{run}: the disk refused .*No space left.*; make room"):
                up.offer(0)
        assert not list(run.glob(".*"))


def refuse_writing(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(snapshots.shutil, "copyfile", refuse)
    patch.setattr(os, "fsync", refuse)


class TestDown:
    @pytest.mark.parametrize("write", [write_step, write_file_step])
    def test_a_run_goes_on_elsewhere(
        self, uploads: Uploads, run: Path, other: Path, write: Callable[..., None]
    ) -> None:
        train(uploads, run, 1, range(5), write)
        assert uploads.restore(3, other, (1, 4)) == (1, 4)
        assert files_of(other) == needed_of(run, 1, 4)
        # And from there on, with what the first attempt measured.
        train(uploads, other, 2, range(5, 7), write)
        third = other.with_name("third")
        assert uploads.restore(3, third, (2, 6)) == (2, 6)
        assert files_of(third) == needed_of(other, 2, 6)

    def test_the_start_of_a_resumed_attempt_is_its_own(self, uploads: Uploads, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(4))
        with uploads.open(3, 2, run, lambda _step: None) as up:
            up.offer(3)  # a resumed trainer yields the measurement of its checkpoint once more
            up.finish(20.0)
        assert uploads.restore(3, other, (2, 3)) == (2, 3)
        assert files_of(other) == {
            "attempt-1/measurements.jsonl": (run / "attempt-1/measurements.jsonl").read_text(),
            "attempt-2/best-00003.bin": "best of attempt 1, step 3",
            "attempt-2/step-00003/state.json": "attempt 1, step 3",
            "attempt-2/step-00003/tensors": "attempt 1, step 3" * 100,
        }

    def test_it_is_left_where_it_is_newer(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        train(uploads, run, 1, range(4))
        before = files_of(run)
        store.calls.clear()
        assert uploads.restore(3, run, (1, 3)) is None
        assert uploads.restore(3, run, (1, 2)) is None
        assert uploads.restore(3, run, None) is None
        write_step(run, 2, 0)
        assert uploads.restore(3, run, (1, 9)) is None
        assert not store.calls
        assert {name: text for name, text in files_of(run).items() if "attempt-1" in name} == before

    def test_it_is_brought_where_it_is_older(self, uploads: Uploads, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(4))
        assert uploads.restore(3, other, (1, 3)) == (1, 3)
        write_step(run, 1, 4)
        train(uploads, run, 1, range(5, 6))
        assert uploads.restore(3, other, (1, 5)) == (1, 5)
        assert needed_of(other, 1, 5) == needed_of(run, 1, 5)
        write_step(other, 1, 6)
        train(uploads, run, 2, range(5, 6))
        assert uploads.restore(3, other, (2, 5)) == (2, 5)  # its attempt is the newer one

    def test_nothing_beyond_the_named_one_is_brought(self, uploads: Uploads, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(4))
        assert uploads.restore(3, other, (1, 2)) == (1, 2)
        assert "attempt-1/step-00003" not in files_of(other)

    def test_what_was_superseded_is_not_brought(
        self, uploads: Uploads, store: WatchedStore, run: Path, other: Path
    ) -> None:
        train(uploads, run, 1, range(6))
        train(uploads, run, 2, range(6, 7))
        store.put(f"{TRIAL}/attempt-1/step-00009.json", store.get(f"{TRIAL}/attempt-1/step-00005.json"))
        store.delete(f"{TRIAL}/attempt-2/step-00006.json")
        assert uploads.restore(3, other, (2, 6)) == (1, 5)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.unlink(),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            lambda path: path.write_bytes(path.read_bytes()[:-7] + b"X" + path.read_bytes()[-6:]),
        ],
        ids=["gone", "empty", "truncated", "changed"],
    )
    @pytest.mark.parametrize("what", ["manifest", "tensors", "journal"])
    def test_a_damaged_one_is_named_and_the_one_before_it_used(
        self, uploads: Uploads, store: WatchedStore, run: Path, other: Path, caplog: pytest.LogCaptureFixture,
        damage: Callable[[Path], Any], what: str,
    ) -> None:  # fmt: skip
        train(uploads, run, 1, range(4))
        paths = {
            "manifest": store.root / TRIAL / "attempt-1" / "step-00003.json",
            "tensors": store.blob("attempt 1, step 3" * 100),
            "journal": store.blob((run / "attempt-1" / "measurements.jsonl").read_text()),
        }
        damage(paths[what])
        caplog.clear()
        assert uploads.restore(3, other, (1, 3)) == (1, 2)
        assert files_of(other)["attempt-1/step-00002/tensors"] == "attempt 1, step 2" * 100
        assert set(files_of(other)) == set(needed_of(run, 1, 2)) - {"attempt-1/best-00003.bin"} | {
            "attempt-1/best-00000.bin"
        }
        skipped = [r for r in caplog.records if r.levelno == logging.WARNING]
        if what != "manifest" or paths[what].exists():
            (record,) = skipped
            assert record.action == "snapshot_skipped"  # type: ignore[attr-defined]
            assert record.key == f"{TRIAL}/attempt-1/step-00003.json"  # type: ignore[attr-defined]

    def test_where_all_are_damaged_the_directory_stays(
        self, uploads: Uploads, store: WatchedStore, run: Path, other: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(uploads, run, 1, range(4))
        for step in (2, 3):
            store.blob(f"attempt 1, step {step}").write_text("?")
        write_step(other, 1, 0)
        before = files_of(other)
        assert uploads.restore(3, other, (1, 3)) is None
        assert files_of(other) == before
        assert [r.action for r in caplog.records if r.levelno == logging.WARNING] == [  # type: ignore[attr-defined]
            "snapshot_skipped", "snapshot_skipped", "snapshot_missing",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "name", ["../x", "attempt-1/../../x", "/etc/x", "attempt-1", "step-00001", "attempt-1//x"]
    )
    def test_no_manifest_leads_out_of_the_run(
        self, uploads: Uploads, store: WatchedStore, other: Path, name: str
    ) -> None:
        blob = hashlib.sha256(b"x").hexdigest()
        store.put(f"{TRIAL}/attempt-1/{blob}", b"x")
        content = {"format": 1, "files": {name: {"sha256": blob, "size_bytes": 1}}}
        store.put(f"{TRIAL}/attempt-1/step-00001.json", snapshots._sealed(content))
        assert uploads.restore(3, other, (1, 1)) is None
        assert files_of(other.parent) == {}

    def test_a_format_of_another_version_is_refused(
        self, uploads: Uploads, store: WatchedStore, other: Path
    ) -> None:
        store.put(f"{TRIAL}/attempt-1/step-00001.json", snapshots._sealed({"format": 2, "files": {}}))
        with pytest.raises(ArtifactError, match="expected snapshot format 1, got 2; update tuner"):
            uploads.restore(3, other, (1, 1))

    @pytest.mark.parametrize("n_calls", range(1, 7))
    def test_a_store_that_goes_away_leaves_the_directory_as_it_was(
        self, uploads: Uploads, store: WatchedStore, run: Path, other: Path, n_calls: int
    ) -> None:
        train(uploads, run, 1, range(4))
        store.calls.clear()

        def fail(_what: str, _key: str) -> None:
            if len(store.calls) == n_calls:
                raise ArtifactUnavailable("away")

        store.before = fail
        with pytest.raises(ArtifactUnavailable):
            uploads.restore(3, other, (1, 3))
        assert not other.exists() or files_of(other) == {}
        assert uploads.restore(3, other, (1, 3)) == (1, 3)
        assert files_of(other) == needed_of(run, 1, 3)

    @pytest.mark.parametrize("n_moves", range(1, 4))
    def test_killed_while_it_is_brought_there_is_no_step(
        self, uploads: Uploads, run: Path, other: Path, monkeypatch: pytest.MonkeyPatch, n_moves: int
    ) -> None:
        train(uploads, run, 1, range(4))
        moved = []
        replace = Path.replace

        def killed(path: Path, target: Path) -> Path:
            if ".restoring" not in str(path) or path.name.startswith(".tmp-"):
                return replace(path, target)
            moved.append(target)
            if len(moved) == n_moves:
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                uploads.restore(3, other, (1, 3))
        assert not list(other.glob("attempt-*/step-*"))
        assert uploads.restore(3, other, (1, 3)) == (1, 3)
        assert files_of(other) == needed_of(run, 1, 3)

    def test_the_longer_file_of_measurements_stays(self, uploads: Uploads, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(4))
        train(uploads, run, 2, range(4, 5))
        journal = other / "attempt-1" / "measurements.jsonl"
        for text, expected in ((f"{'x' * 1000}\n", f"{'x' * 1000}\n"), ("x\n", None)):
            journal.parent.mkdir(parents=True)
            journal.write_text(text)
            assert uploads.restore(3, other, (2, 4)) == (2, 4)
            assert journal.read_text() == (expected or (run / "attempt-1" / "measurements.jsonl").read_text())
            other = other.with_name("third")
            journal = other / "attempt-1" / "measurements.jsonl"

    def test_a_full_disk_of_the_runs_is_named(
        self, uploads: Uploads, run: Path, other: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(uploads, run, 1, range(4))
        with monkeypatch.context() as patch:
            refuse_writing(patch)
            with pytest.raises(DiskError, match="make room and run again"):
                uploads.restore(3, other, (1, 3))
        assert files_of(other) == {}
        assert uploads.restore(3, other, (1, 3)) == (1, 3)

    def test_what_a_killed_restore_left_goes_a_day_later(self, uploads: Uploads, run: Path, other: Path) -> None:
        train(uploads, run, 1, range(1))
        other.mkdir(parents=True)
        old, young = (Path(tempfile.mkdtemp(prefix=".restoring-", dir=other)) for _ in range(2))
        os.utime(old, (time.time() - 90_000, time.time() - 90_000))
        uploads.restore(3, other, (1, 0))
        assert not old.exists()
        assert young.exists()


class TestStudy:
    def test_it_is_deleted_and_no_other(self, uploads: Uploads, store: WatchedStore, run: Path) -> None:
        assert not uploads.has_study()
        uploads.delete_study()
        train(uploads, run, 1, range(1))
        train(Uploads(store, "study-2"), run, 2, range(1))
        assert uploads.has_study()
        uploads.delete_study()
        assert not uploads.has_study()
        assert Uploads(store, "study-2").has_study()
        assert FolderStore(store.root).names("study") == []
