"""The artifact store: files that machines hand to each other, behind one URL.

An object is there whole or not at all, and durable when `put` returns. A key is a relative path with slashes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from storage.database import StorageError, Unavailable

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60

_EXPECTED = "file:///FOLDER or s3://BUCKET/PREFIX?endpoint_url=URL&region=NAME"
_CHUNK = 1 << 20
_DRAFT = ".tmp-"  # objects that are being written, or were when their writer was killed
_DELETED_AT_ONCE = 1000  # S3's limit


class ArtifactError(StorageError):
    """The artifact store refused, and will refuse again: read-only, full, forbidden, no such bucket."""


class ArtifactUnavailable(ArtifactError, Unavailable):
    """The artifact store cannot be reached now; asking again can help."""


class ArtifactMissing(ArtifactError):
    """There is no object of this key."""


class ArtifactStore(Protocol):
    """Every method raises ArtifactUnavailable where asking again can help, else ArtifactError."""

    url: str

    def put(self, key: str, source: Path | bytes) -> None:
        """Store a file or bytes; one of the same key is replaced. A source that cannot be opened raises OSError."""

    def get(self, key: str) -> bytes:
        """Raises ArtifactMissing."""

    def fetch(self, key: str, target: Path) -> None:
        """Write an object to a file, durably; its folder must exist. Raises ArtifactMissing, and OSError where the
        file cannot be written."""

    def names(self, prefix: str = "") -> list[str]:
        """The keys of all objects below a folder, sorted; of none where there is no such folder."""

    def delete(self, prefix: str) -> None:
        """Delete the object of this key, and everything below the folder of this name; nothing may be there."""


def open_artifacts(url: str) -> ArtifactStore:
    """The store behind a URL: file:///FOLDER, or s3://BUCKET/PREFIX with `endpoint_url` and `region` as options.

    A folder has to be there: one that was made by the way would lie on this machine's own disk wherever the shared
    one is not mounted. S3's credentials come from boto3's own places (environment, files, the machine's role).

    Raises:
        ArtifactError: malformed, with credentials in it, or no such folder. S3 is not asked yet.
    """
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ArtifactError(f"artifacts: expected {_EXPECTED}, got a malformed URL") from None
    hosts = [parts.netloc, *(urlsplit(value).netloc for name, value in options if name == "endpoint_url")]
    if any("@" in host for host in hosts):
        raise ArtifactError(
            "artifacts: expected a URL without credentials, got some before the @; "
            "give them to boto3 (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or ~/.aws/credentials)"
        )
    path = unquote(parts.path)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and path.startswith("/") and not parts.query:
        return FolderStore(Path(path))
    known = {"endpoint_url", "region"}
    if parts.scheme == "s3" and parts.netloc and {name for name, _ in options} <= known and not parts.fragment:
        prefix = path.strip("/")
        return S3Store(parts.netloc, _checked(prefix) if prefix else "", **dict(options))
    raise ArtifactError(f"artifacts: expected {_EXPECTED}, got {url!r}")


class FolderStore:
    """A folder, on a disk that all machines share. The first writer makes the folders in it.

    Raises:
        ArtifactError: it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.url = f"file://{root}"
        self._root = root
        if not root.is_dir():
            raise ArtifactError(f"artifacts: {root}: expected a folder, got none; mount it, or make it once")

    def put(self, key: str, source: Path | bytes) -> None:
        path = self._path(key)
        with _opened(source) as data, self._errors(key):
            self._make_folder(path.parent)
            draft = path.parent / f"{_DRAFT}{secrets.token_hex(8)}"
            try:
                with draft.open("xb") as file:
                    shutil.copyfileobj(data, file, _CHUNK)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    draft.unlink()
                raise
            flush_folder(path.parent)

    def get(self, key: str) -> bytes:
        return b"".join(self._chunks(key))

    def fetch(self, key: str, target: Path) -> None:
        _write(target, self._chunks(key))

    def names(self, prefix: str = "") -> list[str]:
        found = []
        with self._errors(prefix):
            self._check_root()
            for folder, _, files in os.walk(self._path(prefix) if prefix else self._root, onerror=_raise):
                below = Path(folder).relative_to(self._root)
                found += [(below / name).as_posix() for name in files if not name.startswith(_DRAFT)]
        return sorted(found)

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        with self._errors(prefix):
            self._check_root()
            if path.is_dir():
                shutil.rmtree(path, onerror=_raise_unless_gone)
            else:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    def _chunks(self, key: str) -> Iterator[bytes]:
        path = self._path(key)
        with self._errors(key):
            self._check_root()
            try:
                file = path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise self._missing(key) from None
        with file:
            while chunk := self._read(file, key):
                yield chunk

    def _read(self, file: BinaryIO, key: str) -> bytes:
        with self._errors(key):
            return file.read(_CHUNK)

    def _missing(self, key: str) -> ArtifactMissing:
        return ArtifactMissing(
            f"artifacts: {self.url}: expected {key}, got nothing; it was deleted or never stored"
        )

    def _check_root(self) -> None:
        if not self._root.is_dir():
            # A share that was unmounted comes back; nothing may be written where it was.
            raise FileNotFoundError(errno.ENOENT, "the folder is gone")

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder == self._root:
            self._check_root()
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"artifacts: {self.url}"
            if error.errno in _REFUSALS:
                reason = f"{where}: cannot use {key or 'it'} ({error.strerror}); {_REFUSALS[error.errno]}"
                raise ArtifactError(reason) from error
            # What is left are disks that stutter, shares that are away, folders deleted under the writer.
            raise ArtifactUnavailable(f"{where}: cannot reach {key or 'it'} ({error.strerror})") from error


_MAKE_ROOM, _MEND = "make room and go on", "mend its permissions and go on"
_REFUSALS = {
    errno.ENOSPC: _MAKE_ROOM, errno.EDQUOT: _MAKE_ROOM, errno.EFBIG: _MAKE_ROOM, errno.EACCES: _MEND,
    errno.EPERM: _MEND, errno.EROFS: "mount it writable and go on", errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "a file lies where a folder belongs", errno.EISDIR: "a folder lies where a file belongs",
}  # fmt: skip


class S3Store:
    """A bucket, or a part of one, on S3 or what speaks like it."""

    def __init__(
        self, bucket: str, prefix: str, endpoint_url: str | None = None, region: str | None = None
    ) -> None:
        import boto3  # takes a third of a second, and only this store needs it
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            # Who calls tries again, and says so in the log.
            retries={"total_max_attempts": 1},
            # Stores that only speak like S3 know neither newer checksums nor buckets as host names.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if endpoint_url else None,
        )
        try:
            session = boto3.session.Session()
            self._client = session.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise ArtifactError(f"artifacts: {self.url}: {_first_line(error)}; mend the URL") from error

    def put(self, key: str, source: Path | bytes) -> None:
        from boto3.s3.transfer import TransferConfig

        with _opened(source) as data, self._errors(key):
            # Large files go in parts; not in threads of its own, which would outlive their caller's.
            self._client.upload_fileobj(
                data, self._bucket, self._key(key), Config=TransferConfig(use_threads=False)
            )

    def get(self, key: str) -> bytes:
        return b"".join(self._chunks(key))

    def fetch(self, key: str, target: Path) -> None:
        _write(target, self._chunks(key))

    def names(self, prefix: str = "") -> list[str]:
        below = self._key(prefix) + "/" if prefix else self._prefix
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=below)
            found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(name.removeprefix(self._prefix) for name in found)

    def delete(self, prefix: str) -> None:
        doomed = [self._key(name) for name in (prefix, *self.names(prefix))]
        for start in range(0, len(doomed), _DELETED_AT_ONCE):
            keys = [{"Key": key} for key in doomed[start : start + _DELETED_AT_ONCE]]
            with self._errors(prefix):
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors", ()):
                raise self._error(prefix, refused.get("Code", ""), 0, refused.get("Message", ""))

    def _key(self, key: str) -> str:
        return self._prefix + _checked(key)

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self._errors(key):
            body = self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"]
        with contextlib.closing(body):
            while chunk := self._read(body, key):
                yield chunk

    def _read(self, body: Any, key: str) -> bytes:
        with self._errors(key):
            return body.read(_CHUNK)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        import botocore.exceptions as boto
        from botocore.parsers import ResponseParserError

        broken = (
            boto.ConnectionError, boto.HTTPClientError, boto.ResponseStreamingError, boto.IncompleteReadError,
            boto.CredentialRetrievalError, boto.MetadataRetrievalError, ResponseParserError, OSError,
        )  # fmt: skip
        try:
            yield
        except boto.ClientError as error:
            answer, status = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
            raise self._error(
                key, answer.get("Code", ""), status.get("HTTPStatusCode", 0), answer.get("Message", "")
            ) from error
        except broken as error:
            raise ArtifactUnavailable(f"artifacts: {self.url}: cannot reach it ({_first_line(error)})") from error
        except boto.BotoCoreError as error:  # no credentials, no such profile, a key that S3 does not take
            raise ArtifactError(f"artifacts: {self.url}: {_first_line(error)}; mend boto3's settings") from error

    def _error(self, key: str, code: str, status: int, message: str) -> ArtifactError:
        where = f"artifacts: {self.url}"
        reason = " ".join(f"{code}: {message}".split()).removesuffix(".")
        if code == "NoSuchKey":
            return ArtifactMissing(f"{where}: expected {key}, got nothing; it was deleted or never stored")
        if code == "NoSuchBucket":
            return ArtifactError(f"{where}: expected a bucket, got none; make it, or use another --artifacts")
        if status == 507:
            return ArtifactError(f"{where}: cannot use {key or 'it'} ({reason}); {_MAKE_ROOM}")
        if status >= 500 or status == 429 or code in _S3_TRANSIENT:
            return ArtifactUnavailable(f"{where}: cannot reach {key or 'it'} ({reason})")
        return ArtifactError(f"{where}: cannot use {key or 'it'} ({reason}); mend its permissions or credentials")


_S3_TRANSIENT = frozenset(
    {
        "InternalError", "OperationAborted", "RequestLimitExceeded", "RequestTimeout", "RequestTimeoutException",
        "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequestsException",
    }
)  # fmt: skip


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network shares that know no flush of folders
            raise
    finally:
        os.close(descriptor)


def _checked(key: str) -> str:
    """Raises ValueError: a key that leads out of the store is a bug of the caller."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise ValueError(f"artifacts: expected a relative key, got {key!r}")
    return key


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        yield file


def _write(target: Path, chunks: Iterable[bytes]) -> None:
    draft = target.with_name(f"{_DRAFT}{target.name}")
    try:
        with draft.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
        flush_folder(target.parent)
    finally:
        draft.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    """For os.walk: a folder that is gone, or was never there, has nothing in it."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _raise_unless_gone(_call: Any, _path: str, info: Any) -> None:
    """For shutil.rmtree: somebody else deleted it too."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
