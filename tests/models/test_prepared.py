"""models/prepared.py: built once, complete or invisible, rebuilt when damaged."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from models import prepared
from models.trainer import DiskError, InputError


def build_two_parts(folder: Path) -> None:
    prepared.write_array(folder / "train" / "x.npy", np.arange(300_000.0).reshape(-1, 2))
    prepared.write_array(folder / "test" / "x.npy", np.arange(10.0))
    (folder / "facts.json").write_text('{"n": 2}')


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} must not be built again")


def test_builds_once_then_opens_read_only(tmp_path: Path) -> None:
    folder = prepared.prepare(tmp_path, "key", build_two_parts)
    assert prepared.prepare(tmp_path, "key", never) == folder == tmp_path / "key"
    array = prepared.open_array(folder / "train" / "x.npy")
    np.testing.assert_array_equal(array, np.arange(300_000.0).reshape(-1, 2))
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (0,)])
def test_arrays_without_elements_survive(tmp_path: Path, shape: tuple[int, ...]) -> None:
    prepared.write_array(tmp_path / "a.npy", np.zeros(shape, np.int32))
    assert prepared.open_array(tmp_path / "a.npy").shape == shape


def test_a_failed_build_leaves_nothing_visible(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build_two_parts(folder)
        raise InputError("click.csv:7: malformed")

    with pytest.raises(InputError, match="malformed"):
        prepared.prepare(tmp_path, "key", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".key.lock"]


def _break_size(folder: Path) -> None:
    os.truncate(folder / "train" / "x.npy", 1000)


def _break_content(folder: Path) -> None:
    (folder / "facts.json").write_text('{"n": 3}')


def _remove_file(folder: Path) -> None:
    (folder / "train" / "x.npy").unlink()


def _remove_contents(folder: Path) -> None:
    (folder / prepared.CONTENTS).unlink()


def _tear_contents(folder: Path) -> None:
    os.truncate(folder / prepared.CONTENTS, 20)


@pytest.mark.parametrize(
    "harm", [_break_size, _break_content, _remove_file, _remove_contents, _tear_contents], ids=lambda f: f.__name__
)
def test_damage_is_seen_said_and_mended(tmp_path: Path, harm, caplog: pytest.LogCaptureFixture) -> None:
    folder = prepared.prepare(tmp_path, "key", build_two_parts)
    harm(folder)
    with caplog.at_level(logging.WARNING):
        prepared.prepare(tmp_path, "key", build_two_parts)
    assert any(r.action == "prepare_again" and "building it again" in r.getMessage() for r in caplog.records)
    assert prepared.damage(folder) is None
    assert (folder / "facts.json").read_text() == '{"n": 2}'
    assert not list(tmp_path.glob(".building-*"))
    assert not list(tmp_path.glob(".replaced-*"))


def test_a_missing_part_matters_only_to_those_who_open_it(tmp_path: Path) -> None:
    folder = prepared.prepare(tmp_path, "key", build_two_parts)
    (folder / "test" / "x.npy").unlink()
    (folder / "test").rmdir()
    prepared.prepare(tmp_path, "key", never, parts={"train"})
    prepared.prepare(tmp_path, "key", build_two_parts, parts={"train", "test"})
    assert len(prepared.open_array(folder / "test" / "x.npy")) == 10


def test_an_open_array_outlives_the_rebuilding_of_its_folder(tmp_path: Path) -> None:
    folder = prepared.prepare(tmp_path, "key", build_two_parts)
    array = prepared.open_array(folder / "train" / "x.npy")
    _remove_contents(folder)
    prepared.prepare(tmp_path, "key", build_two_parts)
    assert array[-1, 1] == 299_999.0


# ------------------------------------------------------------------------------------------- processes


def _build_slowly(folder: Path) -> None:
    with (folder.parent / "builds.txt").open("a") as stream:
        stream.write("one\n")
    build_two_parts(folder)
    (folder.parent / "inside").touch()
    _wait_for(folder.parent / "go")


def _prepare_slowly(cache: Path, log: Path) -> None:
    logging.basicConfig(filename=log, level=logging.INFO, format="%(action)s %(key)s %(message)s")
    prepared.prepare(cache, "key", _build_slowly)


def _build_forever(folder: Path) -> None:
    build_two_parts(folder)
    (folder.parent / "inside").touch()
    time.sleep(600)


def _prepare_forever(cache: Path) -> None:
    prepared.prepare(cache, "key", _build_forever)


def _wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_of_several_processes_one_builds_and_the_others_say_that_they_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    cache = tmp_path / "cache"
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    processes = [context.Process(target=_prepare_slowly, args=(cache, log)) for log in logs]
    processes[0].start()
    _wait_for(cache / "inside")
    for process in processes[1:]:
        process.start()
    for log in logs[1:]:
        _wait_for(log, f"prepare_wait key waiting for process {processes[0].pid}, which prepares")
    (cache / "go").touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (cache / "builds.txt").read_text() == "one\n"


def test_a_killed_builder_leaves_nothing_visible_and_blocks_nobody(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_prepare_forever, args=(tmp_path,))
    process.start()
    _wait_for(tmp_path / "inside")
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not (tmp_path / "key").exists()
    assert list(tmp_path.glob(".building-key-*")), "the test must have killed it while it built"
    prepared.prepare(tmp_path, "key", build_two_parts)
    assert prepared.damage(tmp_path / "key") is None
    assert not list(tmp_path.glob(".building-*")), "the next builder clears away what the dead one left"


# ------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_is_a_disk_error(tmp_path: Path, number: int) -> None:
    def full(folder: Path) -> None:
        (folder / "x").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(DiskError, match="make room") as caught:
        prepared.prepare(tmp_path, "key", full)
    assert caught.value.errno == number
    assert not (tmp_path / "key").exists()
    assert not list(tmp_path.glob(".building-*"))


def test_a_really_full_disk_while_an_array_is_written() -> None:
    """/dev/full refuses every byte, as a full disk does."""
    with pytest.raises(DiskError), prepared.disk_errors(Path("/dev")):
        prepared.write_array(Path("/dev/full"), np.zeros((1 << 20, 4)))


def test_a_cache_that_cannot_be_written_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_args: object, **_more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="expected a folder this user can write"):
        prepared.prepare(tmp_path / "cache", "key", build_two_parts)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), prepared.disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


# ------------------------------------------------------------------------------------------- writing, hashing


def test_writer_appends_chunks_and_counts_rows(tmp_path: Path) -> None:
    with prepared.ArrayWriter(tmp_path / "a.npy", (5, 2), np.float32) as writer:
        writer.append(np.ones((2, 2)))
        writer.append(np.zeros((3, 4))[:, ::2])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), [[1, 1], [1, 1], [0, 0], [0, 0], [0, 0]])
    with (
        pytest.raises(ValueError, match="expected 5 rows, got 1"),
        prepared.ArrayWriter(tmp_path / "b.npy", (5, 2), np.float32) as writer,
    ):
        writer.append(np.ones((1, 2)))
    with (
        pytest.raises(ValueError, match="expected rows of shape"),
        prepared.ArrayWriter(tmp_path / "c.npy", (5, 2), np.float32) as writer,
    ):
        writer.append(np.ones((1, 3)))


def test_digest_ignores_key_order_but_no_value() -> None:
    assert prepared.digest({"a": 1, "b": [2.5, None]}) == prepared.digest({"b": [2.5, None], "a": 1})
    assert prepared.digest({"a": 1}) != prepared.digest({"a": 2})
    assert prepared.digest([1, 2]) != prepared.digest([2, 1])


def _age(path: Path, seconds: float) -> None:
    stamp = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(stamp, stamp))


def test_file_hashes_are_remembered_by_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memo = tmp_path / "click.csv", tmp_path / "cache" / "hashes.json"
    file.write_bytes(b"abc")
    _age(file, 100)
    expected = {"click": hashlib.sha256(b"abc").hexdigest()}
    assert prepared.file_hashes({"click": file}, memo) == expected
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_sha256", never)
        assert prepared.file_hashes({"click": file}, memo) == expected
    file.write_bytes(b"xyz")
    _age(file, 50)  # the same size at another time
    assert prepared.file_hashes({"click": file}, memo) == {"click": hashlib.sha256(b"xyz").hexdigest()}
    memo.write_text("{torn")
    assert prepared.file_hashes({"click": file}, memo) == {"click": hashlib.sha256(b"xyz").hexdigest()}


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    file, memo = tmp_path / "a", tmp_path / "hashes.json"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, ns=(time.time_ns(),) * 2)
        stamp = file.stat().st_mtime_ns
        assert prepared.file_hashes({"a": file}, memo) == {"a": hashlib.sha256(content).hexdigest()}
        file.write_bytes(b"new")
        os.utime(file, ns=(stamp, stamp))  # changed within the clock's grain: same size, same time
        assert prepared.file_hashes({"a": file}, memo) == {"a": hashlib.sha256(b"new").hexdigest()}


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gift\.csv: no such file"):
        prepared.file_hashes({"gift": tmp_path / "gift.csv"}, tmp_path / "memo.json")
