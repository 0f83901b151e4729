"""models/location.py: files are found by content, and what differs is refused by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from models import prepared
from models.location import MAX_DEPTH, locate
from models.trainer import DiskError, FileStamp, InputError

CONTENTS = {"click.csv": b"a,b\n1,2\n", "user.csv.gz": b"packed"}


def stamp(content: bytes) -> FileStamp:
    return FileStamp(hashlib.sha256(content).hexdigest(), len(content))


FILES = {name: stamp(content) for name, content in CONTENTS.items()}
ONE = {"click.csv": FILES["click.csv"]}


def write(folder: Path, **changed: bytes | None) -> Path:
    """The files in `folder`, with the contents of some (by the name before the dot) changed or left out (None)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        content = changed.get(name.partition(".")[0], content)
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def memo(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file-hashes.json"


@pytest.mark.parametrize("below", [".", "KuaiLive", "a/b/c/d/e/f"])
def test_finds_the_folder_at_and_below_a_root(tmp_path: Path, memo: Path, below: str) -> None:
    write(tmp_path / "root" / below)
    assert locate(FILES, [tmp_path / "root"], memo) == tmp_path / "root" / below


def test_a_single_file_is_found_by_its_path(tmp_path: Path, memo: Path) -> None:
    write(tmp_path / "root" / "x")
    assert locate(ONE, [tmp_path / "root"], memo) == tmp_path / "root" / "x" / "click.csv"


def test_a_root_may_be_the_file_under_any_name(tmp_path: Path, memo: Path) -> None:
    file = tmp_path / "renamed.csv"
    file.write_bytes(CONTENTS["click.csv"])
    assert locate(ONE, [file], memo) == file
    with pytest.raises(InputError, match="no file of these names"):
        locate(FILES, [file], memo)


def test_names_may_lie_in_folders_of_their_own(tmp_path: Path, memo: Path) -> None:
    files = {"daily/a.SH.csv": stamp(b"a"), "daily/b.SH.csv": stamp(b"b"), "index.csv": stamp(b"i")}
    for place in ("one", "two"):
        (tmp_path / "root" / place / "daily").mkdir(parents=True)
        for name in files:
            (tmp_path / "root" / place / name).write_bytes(name.rpartition("/")[2][:1].encode())
    (tmp_path / "root" / "one" / "daily" / "b.SH.csv").write_bytes(b"x")
    assert locate(files, [tmp_path / "root"], memo) == tmp_path / "root" / "two"
    (tmp_path / "root" / "two" / "daily" / "a.SH.csv").unlink()
    with pytest.raises(InputError, match=r"got daily/b.SH.csv: \S+/one/daily/b.SH.csv \("):
        locate(files, [tmp_path / "root"], memo)


def test_folders_deeper_than_the_limit_and_hidden_ones_are_not_searched(tmp_path: Path, memo: Path) -> None:
    write(tmp_path.joinpath("root", *["x"] * (MAX_DEPTH + 1)))
    write(tmp_path / "root" / ".hidden")
    with pytest.raises(InputError, match="no file of these names"):
        locate(FILES, [tmp_path / "root"], memo)


def test_roots_go_by_their_order_and_nearer_folders_first(tmp_path: Path, memo: Path) -> None:
    for place in ("one/b/deep", "one/c", "one/d", "two"):
        write(tmp_path / place)
    assert locate(FILES, [tmp_path / "one", tmp_path / "two"], memo) == tmp_path / "one" / "c"
    assert locate(FILES, [tmp_path / "two", tmp_path / "one"], memo) == tmp_path / "two"


def test_wrong_copies_are_passed_over(tmp_path: Path, memo: Path) -> None:
    write(tmp_path / "root" / "a", click=b"a,b\n1,3\n")  # of the same size
    write(tmp_path / "root" / "b", user=b"longer than it")
    write(tmp_path / "root" / "c", user=None)
    write(tmp_path / "root" / "d")
    assert locate(FILES, [tmp_path / "root"], memo) == tmp_path / "root" / "d"


def test_all_files_lie_in_one_folder(tmp_path: Path, memo: Path) -> None:
    write(tmp_path / "root" / "a", click=None)
    write(tmp_path / "root" / "b", user=None)
    with pytest.raises(InputError, match="no such file beside them"):
        locate(FILES, [tmp_path / "root"], memo)


def test_a_difference_names_what_was_expected_and_what_was_found(tmp_path: Path, memo: Path) -> None:
    other = b"a,b\n1,3\n"
    write(tmp_path / "root", click=other)
    with pytest.raises(InputError) as caught:
        locate(FILES, [tmp_path / "root"], memo)
    expected, got = stamp(CONTENTS["click.csv"]), stamp(other)
    assert str(caught.value) == (
        f"data: expected click.csv ({expected.sha256[:12]}, 8 bytes), got click.csv: {tmp_path / 'root/click.csv'} "
        f"({got.sha256[:12]}, 8 bytes) (searched: {tmp_path / 'root'}); name the folder that holds it with --data"
    )


def test_the_closest_folder_is_named_first(tmp_path: Path, memo: Path) -> None:
    for number in range(5):
        write(tmp_path / "root" / f"a{number}", click=b"", user=b"")
    write(tmp_path / "root" / "z", click=b"")
    with pytest.raises(InputError) as caught:
        locate(FILES, [tmp_path / "root"], memo)
    assert f"got click.csv: {tmp_path / 'root/z/click.csv'} (0 bytes)" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_roots_that_are_not_there_are_said(tmp_path: Path, memo: Path) -> None:
    with pytest.raises(InputError, match=r"searched: \S+nowhere \(not there\)"):
        locate(FILES, [tmp_path / "nowhere"], memo)
    with pytest.raises(InputError, match="no folder at all"):
        locate(FILES, [], memo)


def test_links_are_followed_and_circles_end(tmp_path: Path, memo: Path) -> None:
    write(tmp_path / "elsewhere" / "data")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert locate(FILES, [tmp_path / "root"], memo) == tmp_path / "root" / "link" / "data"


def test_a_name_without_suffix_and_size_stands_for_any_file_of_that_name(tmp_path: Path, memo: Path) -> None:
    write(tmp_path / "root")
    (tmp_path / "root" / "click.csv.old").write_bytes(b"another")
    old = {name.partition(".")[0]: FileStamp(s.sha256, None) for name, s in FILES.items()}
    assert locate(old, [tmp_path / "root"], memo) == tmp_path / "root"
    assert locate({"click": old["click"]}, [tmp_path / "root"], memo) == tmp_path / "root" / "click.csv"
    with pytest.raises(InputError, match="no file of that name"):
        locate({"cli": old["click"]}, [tmp_path / "root"], memo)


def test_hashes_are_remembered_and_read_again_after_a_change(
    tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "root")
    for name in CONTENTS:
        os.utime(root / name, (1e9, 1e9))
    read: list[str] = []
    sha256 = prepared._sha256
    monkeypatch.setattr(prepared, "_sha256", lambda path: read.append(path.name) or sha256(path))
    locate(FILES, [root], memo)
    locate(FILES, [root], memo)
    assert sorted(read) == sorted(CONTENTS)
    (root / "click.csv").write_bytes(b"a,b\n1,3\n")
    with pytest.raises(InputError, match="expected click"):
        locate(FILES, [root], memo)
    assert read[2:] == ["click.csv"]


def test_a_file_of_another_size_is_not_read(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "root", click=b"longer than the others")
    monkeypatch.setattr(prepared, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(InputError, match="22 bytes"):
        locate(ONE, [root], memo)


def test_what_cannot_be_read_is_named_and_passed_over(
    tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "root" / "a")
    sha256 = prepared._sha256

    def refuse(path: Path) -> str:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return sha256(path)

    monkeypatch.setattr(prepared, "_sha256", refuse)
    with pytest.raises(InputError, match=r"a/click\.csv \(cannot be read: Permission denied\)"):
        locate(FILES, [tmp_path / "root"], memo)
    write(tmp_path / "root" / "b")
    assert locate(FILES, [tmp_path / "root"], memo) == tmp_path / "root" / "b"


def test_a_full_disk_under_the_memo_is_no_fault_of_the_files(
    tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "root")
    for name in CONTENTS:
        os.utime(root / name, (1e9, 1e9))

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepared, "_write_atomically", refuse)
    with pytest.raises(DiskError, match="make room"):
        locate(FILES, [root], memo)
