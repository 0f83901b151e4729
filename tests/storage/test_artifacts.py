"""The artifact store: one contract over a folder and S3, and how each of them refuses."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import artifacts
from storage.artifacts import (
    ArtifactError,
    ArtifactMissing,
    ArtifactStore,
    ArtifactUnavailable,
    open_artifacts,
)
from storage.database import StorageError, is_transient
from tests import s3


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.moto_server() as address:
        yield address


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        s3.use_credentials(patch)
        yield


def s3_url(endpoint: str, path: str) -> str:
    return f"s3://{path}?endpoint_url={endpoint}&region={s3.REGION}"


@pytest.fixture(params=["file", "s3", "s3-prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    if request.param == "file":
        (tmp_path / "store").mkdir()
        yield open_artifacts(f"file://{tmp_path}/store")
        return
    endpoint = request.getfixturevalue("endpoint")
    client = s3.client(endpoint)
    name = f"bucket-{tmp_path.name}".replace("_", "-").lower()[:60]
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": s3.REGION})
    if request.param == "s3-prefix":
        client.put_object(Bucket=name, Key="elsewhere/x", Body=b"not ours")
        client.put_object(Bucket=name, Key="in/herein", Body=b"not ours")
        yield open_artifacts(s3_url(endpoint, f"{name}/in/here/"))
        kept = [entry["Key"] for entry in client.list_objects_v2(Bucket=name)["Contents"]]
        assert {"elsewhere/x", "in/herein"} <= set(kept)
    else:
        yield open_artifacts(s3_url(endpoint, name))
    client.close()


class TestContract:
    def test_what_was_put_comes_back(self, store: ArtifactStore, tmp_path: Path) -> None:
        content = os.urandom(3 << 20)
        (tmp_path / "source").write_bytes(content)
        store.put("a/b/file", tmp_path / "source")
        store.put("a/empty", b"")
        assert store.get("a/b/file") == content
        assert store.get("a/empty") == b""
        store.fetch("a/b/file", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == content
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]

    def test_large_files_come_back(self, store: ArtifactStore, tmp_path: Path) -> None:
        content = os.urandom(20 << 20)  # S3 takes it in parts
        (tmp_path / "source").write_bytes(content)
        store.put("large", tmp_path / "source")
        assert store.get("large") == content

    def test_a_key_holds_what_was_put_last(self, store: ArtifactStore) -> None:
        store.put("k", b"first")
        store.put("k", b"second")
        assert store.get("k") == b"second"
        assert store.names() == ["k"]

    def test_names_are_those_below_a_folder(self, store: ArtifactStore) -> None:
        for key in ("s/1/b", "s/1/a", "s/10/a", "s/2", "t"):
            store.put(key, b"x")
        assert store.names("s/1") == ["s/1/a", "s/1/b"]
        assert store.names("s") == ["s/1/a", "s/1/b", "s/10/a", "s/2"]
        assert store.names() == ["s/1/a", "s/1/b", "s/10/a", "s/2", "t"]
        assert store.names("nothing") == []
        assert store.names("t") == []

    def test_there_may_be_many(self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artifacts, "_DELETED_AT_ONCE", 7)
        keys = [f"many/{number:04d}" for number in range(20)]
        for key in keys:
            store.put(key, b"x")
        assert store.names("many") == keys
        store.delete("many")
        assert store.names() == []

    def test_deletes_an_object_or_a_folder_and_no_more(self, store: ArtifactStore) -> None:
        for key in ("s/1/a", "s/1/b/c", "s/10/a", "s/2"):
            store.put(key, b"x")
        store.delete("s/1")
        assert store.names() == ["s/10/a", "s/2"]
        store.delete("s/2")
        store.delete("s/2")
        store.delete("never")
        assert store.names() == ["s/10/a"]
        store.put("s/2/again", b"x")
        assert store.names("s/2") == ["s/2/again"]

    def test_a_missing_object_is_named(self, store: ArtifactStore, tmp_path: Path) -> None:
        store.put("a/b", b"x")
        for key in ("a/none", "none/b", "a", "a/b/c"):
            with pytest.raises(
                ArtifactMissing, match=rf"^artifacts: {store.url}: expected {key}, got nothing; .*$"
            ):
                store.get(key)
            with pytest.raises(ArtifactMissing):
                store.fetch(key, tmp_path / "target")
        assert not list(tmp_path.glob("*target*"))

    @pytest.mark.parametrize("key", ["", "/abs", "a//b", "a/../b", "..", "./a", "a/", "a\\b", "a\0b"])
    def test_a_key_does_not_lead_out_of_the_store(self, store: ArtifactStore, key: str, tmp_path: Path) -> None:
        for call in (
            lambda: store.put(key, b"x"),
            lambda: store.get(key),
            lambda: store.fetch(key, tmp_path / "x"),
            lambda: store.delete(key),
        ):
            with pytest.raises(ValueError, match="expected a relative key"):
                call()

    def test_a_source_or_target_that_is_not_there_is_the_callers(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        with pytest.raises(FileNotFoundError):
            store.put("k", tmp_path / "none")
        store.put("k", b"x")
        with pytest.raises(FileNotFoundError):
            store.fetch("k", tmp_path / "no-folder" / "target")

    def test_several_threads_use_it(self, store: ArtifactStore) -> None:
        def work(number: int) -> None:
            for turn in range(5):
                store.put(f"t/{number}/{turn}", str(number).encode() * 1000)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.names("t")) == 20
        assert store.get("t/3/4") == b"3" * 1000


class TestUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "", "/abs", "file:rel", "file://host/abs", "file:///x?y=1", "s3://", "s3:///key", "http://x/y",
            "s3://bucket/p?endpoint=http://x", "s3://bucket/p?endpoint_url", "s3://bucket/p#f", "s3://[bucket/p",
        ],
    )  # fmt: skip
    def test_what_it_cannot_be(self, url: str) -> None:
        with pytest.raises(
            ArtifactError, match=r"^artifacts: expected file:///FOLDER or s3://.*, got .*$"
        ) as caught:
            open_artifacts(url)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["s3://AKIA:hush@bucket/p", "s3://bucket/p?endpoint_url=http://u:hush@host:9000", "file://u:hush@/x"]
    )
    def test_credentials_are_refused_and_not_repeated(self, url: str) -> None:
        with pytest.raises(ArtifactError, match=r"without credentials.*AWS_ACCESS_KEY_ID") as caught:
            open_artifacts(url)
        assert "hush" not in str(caught.value)

    def test_a_folder_has_to_be_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            ArtifactError, match=rf"^artifacts: {tmp_path}/x: expected a folder, got none; mount it"
        ):
            open_artifacts(f"file://{tmp_path}/x")
        assert not (tmp_path / "x").exists()

    def test_a_folder_may_have_any_name(self, tmp_path: Path) -> None:
        (tmp_path / "with space").mkdir()
        open_artifacts(f"file://localhost{tmp_path}/with%20space").put("k", b"x")
        assert (tmp_path / "with space" / "k").read_bytes() == b"x"

    def test_the_url_tells_no_options(self, tmp_path: Path) -> None:
        assert open_artifacts("s3://bucket/a/b/?region=eu-west-1").url == "s3://bucket/a/b"
        assert open_artifacts("s3://bucket?region=eu-west-1").url == "s3://bucket"
        assert open_artifacts(f"file://{tmp_path}").url == f"file://{tmp_path}"

    def test_an_endpoint_that_is_none_is_refused(self) -> None:
        with pytest.raises(ArtifactError, match="Invalid endpoint"):
            open_artifacts("s3://bucket/p?endpoint_url=nowhere")


class TestErrors:
    def test_their_kinds(self) -> None:
        assert issubclass(ArtifactError, StorageError)
        assert not is_transient(ArtifactError("x"))
        assert not is_transient(ArtifactMissing("x"))
        assert is_transient(ArtifactUnavailable("x"))


class TestFolder:
    @pytest.fixture
    def store(self, tmp_path: Path) -> ArtifactStore:
        (tmp_path / "store").mkdir()
        return open_artifacts(f"file://{tmp_path}/store")

    @pytest.mark.parametrize(
        ("code", "kind", "text"),
        [
            (errno.ENOSPC, ArtifactError, "No space left on device); make room"),
            (errno.EDQUOT, ArtifactError, "Disk quota exceeded); make room"),
            (errno.EROFS, ArtifactError, "Read-only file system); mount it writable"),
            (errno.EACCES, ArtifactError, "Permission denied); mend its permissions"),
            (errno.EIO, ArtifactUnavailable, "Input/output error)"),
            (errno.ESTALE, ArtifactUnavailable, "Stale file handle)"),
            (errno.ENOTCONN, ArtifactUnavailable, "not connected)"),
        ],
    )
    def test_what_the_disk_refuses(
        self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        code: int, kind: type[ArtifactError], text: str,
    ) -> None:  # fmt: skip
        store.put("a/k", b"before")

        def refuse(*_args: Any) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", refuse)
            with pytest.raises(ArtifactError) as caught:
                store.put("a/k", b"after")
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"artifacts: {store.url}: cannot ")
        assert text in str(caught.value)
        # What was there is there, and nothing half-written beside it.
        assert store.get("a/k") == b"before"
        assert os.listdir(tmp_path / "store" / "a") == ["k"]

    def test_an_object_is_flushed_before_it_is_visible(
        self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        flushed = []
        path = tmp_path / "store" / "a" / "b" / "k"

        def fsync(descriptor: int) -> None:
            flushed.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))[:5], path.exists()))

        monkeypatch.setattr(os, "fsync", fsync)
        store.put("a/b/k", b"x")
        # The folders in which folders were made, the object's content, and its name.
        assert flushed == [("store", False), ("a", False), (".tmp-", False), ("b", True)]

    def test_an_object_that_a_killed_writer_left_is_not_there(self, store: ArtifactStore, tmp_path: Path) -> None:
        store.put("a/k", b"x")
        (tmp_path / "store" / "a" / ".tmp-0123").write_bytes(b"half")
        assert store.names() == ["a/k"]
        store.delete("a")
        assert not (tmp_path / "store" / "a").exists()

    def test_a_share_that_is_unmounted_is_waited_for(self, store: ArtifactStore, tmp_path: Path) -> None:
        store.put("a/k", b"x")
        (tmp_path / "store").rename(tmp_path / "away")
        for call in (
            lambda: store.put("a/k", b"y"),
            lambda: store.put("k", b"y"),
            lambda: store.get("a/k"),
            lambda: store.names(),
            lambda: store.names("a"),
            lambda: store.delete("a"),
        ):
            with pytest.raises(ArtifactUnavailable, match="the folder is gone"):
                call()
        # Nothing was written where it belongs.
        assert not (tmp_path / "store").exists()
        (tmp_path / "away").rename(tmp_path / "store")
        assert store.get("a/k") == b"x"

    def test_a_folder_that_is_deleted_under_the_writer_is_made_again(
        self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        flush = artifacts.flush_folder

        def flush_and_delete(path: Path) -> None:
            flush(path)
            shutil.rmtree(tmp_path / "store" / "a", ignore_errors=True)

        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "flush_folder", flush_and_delete)
            with pytest.raises(ArtifactUnavailable):
                store.put("a/b/k", b"x")
        store.put("a/b/k", b"x")
        assert store.get("a/b/k") == b"x"

    def test_a_full_disk_of_the_callers_is_not_the_stores(
        self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        store.put("k", b"x")

        def refuse(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left") as caught:
            store.fetch("k", tmp_path / "target")
        assert not isinstance(caught.value, StorageError)
        assert not list(tmp_path.glob("*target*"))


class TestS3:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[s3.Answers]:
        with s3.Answers() as answers:
            yield answers

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls, server: s3.Answers) -> ArtifactStore:
        return open_artifacts(s3_url(server.endpoint, "bucket/p"))  # takes half a second

    @pytest.fixture
    def answers(self, server: s3.Answers) -> s3.Answers:
        server.queue.clear()
        server.asked.clear()
        server.default = (200, "")
        return server

    @pytest.mark.parametrize(
        ("status", "code", "kind", "text"),
        [
            (503, "SlowDown", ArtifactUnavailable, "cannot reach k (SlowDown: told so)"),
            (500, "InternalError", ArtifactUnavailable, "cannot reach k (InternalError: told so)"),
            (502, "", ArtifactUnavailable, "cannot reach k ("),
            (429, "TooManyRequests", ArtifactUnavailable, "cannot reach k ("),
            (400, "RequestTimeout", ArtifactUnavailable, "cannot reach k ("),
            (403, "AccessDenied", ArtifactError, "(AccessDenied: told so); mend its permissions or credentials"),
            (403, "InvalidAccessKeyId", ArtifactError, "mend its permissions or credentials"),
            (404, "NoSuchBucket", ArtifactError, "expected a bucket, got none; make it"),
            (507, "XMinioStorageFull", ArtifactError, "(XMinioStorageFull: told so); make room"),
        ],
    )
    def test_what_it_refuses(
        self, answers: s3.Answers, store: ArtifactStore, tmp_path: Path,
        status: int, code: str, kind: type[ArtifactError], text: str,
    ) -> None:  # fmt: skip
        answers.default = (status, code)
        for call in (
            lambda: store.put("k", b"x"),
            lambda: store.get("k"),
            lambda: store.fetch("k", tmp_path / "target"),
            lambda: store.names("k"),
            lambda: store.delete("k"),
        ):
            answers.asked.clear()
            with pytest.raises(ArtifactError) as caught:
                call()
            assert type(caught.value) is kind
            assert str(caught.value).startswith("artifacts: s3://bucket/p: ")
            assert text in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(answers.asked) == 1  # who calls waits and tries again

    def test_nobody_listens(self) -> None:
        with s3.Answers() as answers:
            store = open_artifacts(s3_url(answers.endpoint, "bucket/p"))
        with pytest.raises(
            ArtifactUnavailable, match=r"^artifacts: s3://bucket/p: cannot reach it \(Could not connect"
        ):
            store.names()

    @pytest.mark.parametrize("told", [b"", b"no HTTP", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this"])
    def test_it_hangs_up(self, answers: s3.Answers, store: ArtifactStore, tmp_path: Path, told: bytes) -> None:
        answers.default = told
        with pytest.raises(ArtifactUnavailable):
            store.get("k")
        with pytest.raises(ArtifactUnavailable):
            store.fetch("k", tmp_path / "target")
        assert not list(tmp_path.iterdir())

    def test_something_else_answers(self, answers: s3.Answers, store: ArtifactStore) -> None:
        answers.default = s3.raw(b"Log in")
        with pytest.raises(ArtifactUnavailable):
            store.names()

    def test_it_is_silent(self, answers: s3.Answers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artifacts, "READ_TIMEOUT_S", 0.2)
        store = open_artifacts(s3_url(answers.endpoint, "bucket/p"))
        answers.default = b"HTTP/1.1 100 Continue\r\n\r\n"
        with pytest.raises(ArtifactUnavailable):
            store.get("k")

    def test_without_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        store = open_artifacts("s3://bucket/p?endpoint_url=http://127.0.0.1:1&region=eu-west-1")
        with pytest.raises(ArtifactError, match="Unable to locate credentials; mend boto3's settings") as caught:
            store.put("k", b"x")
        assert not is_transient(caught.value)

    def test_a_deletion_that_is_refused_for_one_object(self, answers: s3.Answers, store: ArtifactStore) -> None:
        listing = b"<ListBucketResult><Contents><Key>p/k/x</Key></Contents></ListBucketResult>"
        refusal = b"<DeleteResult><Error><Key>p/k/x</Key><Code>AccessDenied</Code></Error></DeleteResult>"
        for body in (listing, refusal):
            answers.queue.append(s3.raw(body))
        with pytest.raises(ArtifactError, match="AccessDenied"):
            store.delete("k")

    def test_an_unknown_bucket(self, endpoint: str) -> None:
        store = open_artifacts(s3_url(endpoint, "no-such-bucket/p"))
        with pytest.raises(ArtifactError, match="expected a bucket, got none") as caught:
            store.put("k", b"x")
        assert type(caught.value) is ArtifactError
        with pytest.raises(ArtifactError, match="expected a bucket, got none"):
            store.get("k")
