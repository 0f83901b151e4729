"""Model folders and the registry: what a model in service consists of, where it lies, what it may do.

    <runs>/models/<name>/<checksum[:16]>/      as in the artifact store, below the same key
        model.json, ...                        what the trainer exported
        verdict.json                           from its scores to probabilities and decisions
        SHA256SUMS                             of every file, as `sha256sum` writes it; its own is the checksum

A folder says by itself whether it is whole, wherever it was carried; the database says whether it is the right one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.trainer import InputError
from storage.artifacts import ArtifactError, ArtifactMissing, ArtifactStore, flush_folder, open_artifacts
from storage.database import retry
from storage.rows import ModelRow
from storage.runs import Store
from tuner.judged_metric import metric_of
from tuner.snapshots import disk_errors

if TYPE_CHECKING:
    from models.calibration import Calibrator

log = logging.getLogger("tuner")

MODEL_FORMAT = 1  # of verdict.json
MODEL, VERDICT, SUMS = "model.json", "verdict.json", "SHA256SUMS"
# How long storing or fetching a model waits for an artifact store that is away.
PATIENCE_S = 120.0

_KEY = "models"
_DRAFT = ".tmp-"
_WAY_OUT = "make room or mend its permissions"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that is whole. `smearing` has `factor` and `transform` of every amount; `threshold` is a raw
    logit, None where nothing is certified: then it decides nothing."""

    path: Path
    checksum: str
    size_bytes: int
    trainer: str
    task: str
    calibrator: Calibrator
    smearing: Mapping[str, Mapping[str, Any]]
    threshold: float | None
    verdict: Mapping[str, Any]


# --- candidates ----------------------------------------------------------------------------------------------


def add_candidate(
    store: Store, name: str, folder: Path, document: Mapping[str, Any], runs: Path, artifacts: str | None
) -> ModelRow:
    """Bring an exported model to where models lie and register it as the next version of `name`.

    Args:
        folder: the trainer's export with its verdict.json; it is copied.
        document: of the evaluation whose nominee it is.
        artifacts: the artifact store that gets it too, None without one.

    Returns:
        Its row; the one that is there where the same model of the same evaluation was added before.

    Guarantees:
        What is registered is durable, here and in the artifact store. Killed in between, it can be repeated.

    Raises:
        InputError: no whole export, or not of a nominee of the document. DiskError, ArtifactError, StorageError.
    """
    sums, size_bytes = _sums(folder)
    checksum = _digest(sums)
    verdict = _json(folder / VERDICT)
    nominee = _nominee_of(document, verdict, folder)
    arm = document["arms"][nominee["arm"]]
    artifact = f"{_KEY}/{name}/{checksum[:16]}"
    target = runs / artifact
    _install(folder, target, sums, checksum)
    if artifacts is not None:
        remote = open_artifacts(artifacts)
        for file in (*_names(sums), SUMS):
            _patiently(remote, f"{artifact}/{file}", target / file)
    metrics = {
        "metric": metric_of(document),
        "arm": nominee["arm"],
        "fit": nominee["number"],
        "own": verdict["metrics"],
        "intervals": {metric: _interval(found) for metric, found in arm["metrics"].items()},
        "check": nominee["check"],
        "leak": (document.get("leak") or {"features": [], "best": None}),
    }
    row = store.add_model(
        name, document["evaluation"], artifact, checksum, size_bytes, arm["config"], metrics,
        nominee["certificate"], document["data"]["data_hash"], version("tuner"),
    )  # fmt: skip
    log.info("model %s:%d added", name, row.version, extra={"action": "model_added", "checksum": checksum})
    return row


def _nominee_of(document: Mapping[str, Any], verdict: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The nominee that a folder holds: certificates are numbered, so that no two of them are equal."""
    for nominee in document["nominees"]:
        # As JSON on both sides, where a tuple is a list.
        if json.loads(json.dumps(nominee["certificate"])) == verdict.get("certificate"):
            return nominee
    raise InputError(
        f"{folder / VERDICT}: expected the certificate of a nominee of {document['evaluation']}, got another"
    )


def _interval(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("value", "low", "high")}


# --- folders -------------------------------------------------------------------------------------------------


def open_folder(path: Path, checksum: str | None = None) -> ModelFolder:
    """Verify every file of a model folder, then read what it is.

    Args:
        checksum: the one it has to have; None: the folder is held to its own SHA256SUMS.

    Raises:
        InputError: no such folder, a file is missing, damaged or more than was stored, another model, or one of
            another format.
    """
    from models.calibration import Calibrator  # brings torch, which a list of models does without

    if not path.is_dir():
        raise InputError(f"{path}: expected a model folder, got none; `tuner models` lists what there is")
    stored = _read(path / SUMS)
    found, size_bytes = _sums(path)
    if found != stored:
        raise InputError(f"{path}: {_difference(stored, found)}; the model is damaged, restore the folder")
    if checksum is not None and _digest(stored) != checksum:
        raise InputError(
            f"{path}: expected checksum {checksum[:16]}, got {_digest(stored)[:16]}: it is another model; "
            "restore the folder"
        )
    verdict = _json(path / VERDICT)
    if verdict.get("format") != MODEL_FORMAT:
        raise InputError(
            f"{path / VERDICT}: expected format {MODEL_FORMAT}, got {verdict.get('format')!r}; "
            "use the tuner version that wrote it, or evaluate again"
        )
    try:
        return ModelFolder(
            path, _digest(stored), size_bytes, _json(path / MODEL)["trainer"], verdict["task"],
            Calibrator.from_json(verdict["calibrator"]), verdict["smearing"], verdict["threshold"], verdict,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a model with its verdict, got one without {error}") from error


def find_folder(row: ModelRow, runs: Path, artifacts: str | None) -> ModelFolder:
    """The folder of a registered model, verified against the registry; brought from the artifact store where it is
    not here, or damaged.

    Raises:
        InputError: it is nowhere, or damaged everywhere. DiskError, ArtifactError.
    """
    path = runs / row.artifact
    try:
        return open_folder(path, row.checksum)
    except InputError as error:
        if artifacts is None:
            raise InputError(f"{error}, or name the artifact store with --artifacts") from error
        log.info("model %s:%d is fetched: %s", row.name, row.version, error, extra={"action": "model_fetched"})
    with disk_errors(path, "the model", _WAY_OUT):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            _fetch(open_artifacts(artifacts), row, draft)
            open_folder(draft, row.checksum)
            _publish(draft, path, row.checksum)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return open_folder(path, row.checksum)


def _fetch(remote: ArtifactStore, row: ModelRow, draft: Path) -> None:
    def get(key: str) -> bytes:
        return retry(lambda: remote.get(key), PATIENCE_S, f"fetch {key}")

    try:
        sums = get(f"{row.artifact}/{SUMS}")
        draft.mkdir()
        for name in (*_names(sums), SUMS):
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            key = f"{row.artifact}/{name}"
            retry(lambda key=key, target=target: remote.fetch(key, target), PATIENCE_S, f"fetch {key}")
    except ArtifactMissing as error:
        raise InputError(
            f"model {row.name}:{row.version}: expected its files here or in {remote.url}, got neither ({error}); "
            "run where it was evaluated, or evaluate again"
        ) from error


def _install(folder: Path, target: Path, sums: bytes, checksum: str) -> None:
    """Copy an export to its place, whole or not at all; one that is there and whole stays."""
    if _is_whole(target, checksum):
        return
    with disk_errors(target, "the model", _WAY_OUT):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            draft.mkdir()
            for name in _names(sums):
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, draft / name)
            (draft / SUMS).write_bytes(sums)
            _flush(draft)
            open_folder(draft, checksum)  # what is copied from a failing disk may be another model
            _publish(draft, target, checksum)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, target: Path, checksum: str) -> None:
    """Rename a whole folder into place. One that is there stays where it is whole: somebody was faster."""
    if target.exists():
        if _is_whole(target, checksum):
            return
        damaged = target.parent / f"{_DRAFT}{secrets.token_hex(8)}"
        target.replace(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        draft.replace(target)
    except OSError:
        if not _is_whole(target, checksum):
            raise
    flush_folder(target.parent)


def _is_whole(path: Path, checksum: str) -> bool:
    try:
        open_folder(path, checksum)
    except InputError:
        return False
    return True


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _patiently(remote: ArtifactStore, key: str, source: Path) -> None:
    try:
        retry(lambda: remote.put(key, source), PATIENCE_S, f"store {key}")
    except OSError as error:
        raise ArtifactError(f"artifacts: {source}: cannot be read ({error.strerror}); run again") from error


# --- checksums -----------------------------------------------------------------------------------------------


def _sums(folder: Path) -> tuple[bytes, int]:
    """What SHA256SUMS of a folder holds, and the size of its files together."""
    lines, size_bytes = [], 0
    try:
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or name == SUMS:
                continue
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
            size_bytes += path.stat().st_size
    except OSError as error:
        raise InputError(f"{folder}: expected readable files, got {error.strerror}: {error.filename}") from error
    return "".join(lines).encode(), size_bytes


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entries(sums: bytes) -> dict[str, str]:
    lines = (line.partition("  ") for line in sums.decode(errors="replace").splitlines())
    return {name: digest for digest, _, name in lines}


def _names(sums: bytes) -> list[str]:
    """The files named in SHA256SUMS. Raises InputError where one of them leads out of the folder."""
    names = list(_entries(sums))
    for name in names:
        if not name or any(part in ("", ".", "..") for part in name.split("/")):
            raise InputError(f"{SUMS}: expected names of files of the folder, got {name!r}; the model is damaged")
    return names


def _difference(stored: bytes, found: bytes) -> str:
    """The first file that is not as it was stored, in words."""
    expected, got = _entries(stored), _entries(found)
    for name in sorted({*expected, *got}):
        if name not in got:
            return f"expected the file {name}, got none"
        if name not in expected:
            return f"expected {len(expected)} files, got one more: {name}"
        if expected[name] != got[name]:
            return f"{name}: checksum does not match"
    return f"{SUMS}: expected one line a file in order, got another text"


# --- names ---------------------------------------------------------------------------------------------------


def parse_reference(reference: str) -> tuple[str, int | None]:
    """NAME or NAME:VERSION. Raises InputError."""
    match = re.fullmatch(r"([^:/]+)(?::([1-9]\d{0,8}))?", reference)
    if match is None:
        raise InputError(f"--model: expected NAME or NAME:VERSION, got {reference!r}")
    return match[1], None if match[2] is None else int(match[2])


def get_model(store: Store, reference: str) -> ModelRow:
    """A registered model; without a version its champion. Raises InputError that says what there is."""
    name, number = parse_reference(reference)
    row = store.find_model(name, number)
    if row is None:
        wanted = "a champion" if number is None else f"version {number}"
        wanted = wanted if store.models(name) else "a registered model"
        raise InputError(f"model {name}: expected {wanted}, got none; {there_is(store, name)}")
    return row


def there_is(store: Store, name: str) -> str:
    """What the registry has of a name, or which names it has, to end an error with."""
    versions = store.models(name)
    if versions:
        told = ", ".join(f"{name}:{row.version} ({row.state})" for row in versions)
        return f"there is {told}; `tuner promote` makes a champion"
    names = sorted({row.name for row in store.models()})
    return f"there is {', '.join(names)}" if names else "there is no model yet; `tuner evaluate` makes one"


# --- inside --------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: expected a file of a model folder, got none ({error.strerror}); name a folder of the registry"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got another text; the model is damaged") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; the model is damaged")
    return content
