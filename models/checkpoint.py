"""Checkpoints: durable before they are visible, checked before they are used.

    <run>/attempt-<a>/step-<s>/tensors.safetensors      everything `fit` needs to go on
    <run>/attempt-<a>/step-<s>/checkpoint.json          state, measurement, SHA-256 of every file, its own too
    <run>/attempt-<a>/best-<s>.safetensors              the best step's tensors, shared by the steps after it

A checkpoint is written into a hidden folder, flushed, and renamed into place: it is there whole or not at
all. What a power cut may still do to it shows in the checksums. Each attempt writes into its own folder
only, so a process that was replaced and does not know it yet can damage nothing of its successor's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from models.trainer import DiskError, InputError, Measurement, Run

KEPT_STEPS = 2  # the newest may be found damaged

_FORMAT = 1
_TENSORS, _CONTENT = "tensors.safetensors", "checkpoint.json"
_ATTEMPT, _STEP, _BEST = r"attempt-(\d+)", r"step-(\d{5,})", r"best-(\d{5,})\.safetensors"
_REFUSED = frozenset({errno.ENOSPC, errno.EROFS, errno.EDQUOT})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One step's checkpoint, read and verified.

    `tensors` lie on the CPU. `state` and `measurement` come back as JSON gives them: floats to the bit
    (NaN and infinities too), tuples as lists. `best_step` is None where no step has been the best yet.
    """

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    measurement: Measurement
    best_step: int | None
    best: Mapping[str, Any] | None  # step, file, sha256, size_bytes

    def load_best(self) -> dict[str, Tensor]:
        """The tensors of the best step up to this one, as they were given to `save`.

        Raises:
            InputError: damaged or missing, or no step has been the best yet.
        """
        if self.best is None:
            raise InputError(f"{self.path}: expected the best step's tensors, got none: no step was the best yet")
        return _tensors(_verified(self.path.parent, self.best), self.path.parent / self.best["file"])


def save(
    run: Run,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    measurement: Measurement,
    best: Mapping[str, Tensor] | None,
) -> Path:
    """Store the checkpoint of one step of `run.attempt`; on return it is durable.

    Args:
        tensors: whatever has to be restored to the bit (weights, optimiser, RNG states as uint8); any device.
        state: JSON-able: string keys, lists, numbers, strings, None.
        measurement: kept without its curves, which can be drawn again from what `best` holds.
        best: tensors to keep of the best step, given iff this step is the best so far. Otherwise the best of
            the step before is carried over, from an older attempt by a hard link.

    Guarantees:
        Atomic: a crash or a refused write at any point leaves the earlier checkpoints valid and nothing
        half-written in sight. The newest `KEPT_STEPS` steps of the attempt are kept. One flush per file,
        one of the attempt's folder, one more of the run's when the attempt is new.

    Raises:
        DiskError: the disk is full, over quota or read-only.
    """
    if measurement.step != step:
        raise ValueError(f"checkpoint of step {step}: expected its own measurement, got step {measurement.step}")
    attempt = run.directory / f"attempt-{run.attempt}"
    target = attempt / _step_name(step)
    draft = attempt / f".tmp-{_step_name(step)}"
    with _refusals(target):
        if not attempt.is_dir():
            attempt.mkdir(parents=True)
            _flush_directory(run.directory)
        _clear(attempt)
        carried = _write_best(attempt, step, best) if best is not None else _carry_best(run, attempt, step)
        draft.mkdir()
        content = {
            "format": _FORMAT,
            "step": step,
            "attempt": run.attempt,
            "measurement": {
                "step": step,
                "metrics": dict(measurement.metrics),
                "elapsed_s": measurement.elapsed_s,
            },
            "state": state,
            "tensors": _write(draft / _TENSORS, _bytes(tensors)),
            "best": carried,
        }
        _write(draft / _CONTENT, _sealed(content))
        if target.exists():  # a damaged one, or the same step once more
            target.replace(attempt / f".tmp-replaced-{target.name}")
        draft.replace(target)
        _flush_directory(attempt)
        _prune(attempt, step)
    return target


def latest(run: Run) -> Checkpoint | None:
    """The checkpoint to go on from, None where there is none.

    Of the highest attempt up to `run.attempt` that has a valid one, the highest valid step. Damaged ones are
    logged by name and skipped.
    """
    return _latest(run, before=None)


def resumed(run: Run, restore: Callable[[Checkpoint], Measurement]) -> Iterator[Measurement]:
    """The measurement of the checkpoint to go on from, once more, as `restore` gives it; nothing without one."""
    found = latest(run)
    if found is not None:
        measurement, found = restore(found), None  # its tensors need not be held while it is looked at
        yield measurement


def refuse_other(found: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises InputError where a state differs from what this run's would be."""
    for name, value in identity.items():
        if found.state[name] != value:
            raise InputError(f"{found.path}: expected a checkpoint of this {name}, got one of another; remove it")


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder and verify every checksum, also that of its best step's tensors.

    Raises:
        InputError: missing, damaged, half-written, or of another format.
    """
    content = _content(path)
    best = content["best"]
    if best is not None:
        _verified(path.parent, best)
    return Checkpoint(
        path=path,
        step=content["step"],
        tensors=_tensors(_verified(path, content["tensors"]), path / _TENSORS),
        state=content["state"],
        measurement=Measurement(**content["measurement"]),
        best_step=None if best is None else best["step"],
        best=best,
    )


def _latest(run: Run, before: int | None) -> Checkpoint | None:
    attempts = [(a, p) for a, p in _numbered(run.directory, _ATTEMPT) if a <= run.attempt]
    for _, attempt in sorted(attempts, reverse=True):
        for step, path in sorted(_numbered(attempt, _STEP), reverse=True):
            if before is not None and step >= before:
                continue
            try:
                return load(path)
            except InputError as error:
                _log.warning("%s", error, extra={"action": "checkpoint_skipped", "path": str(path)})
    return None


def _step_name(step: int) -> str:
    return f"step-{step:05d}"


def _numbered(folder: Path, pattern: str) -> Iterator[tuple[int, Path]]:
    """Entries of a folder whose whole name matches, with their number; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if match := re.fullmatch(pattern, name):
                yield int(match.group(1)), folder / name


# ---- reading


def _content(path: Path) -> dict[str, Any]:
    raw = _read(path / _CONTENT)
    try:
        document = json.loads(raw)
        content = document["content"]
        intact = document["sha256"] == _digest(json.dumps(content).encode())
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(f"{path / _CONTENT}: expected a whole checkpoint, got a damaged file; remove {path}")
    if content["format"] != _FORMAT:
        raise InputError(
            f"{path}: expected checkpoint format {_FORMAT}, got {content['format']}; start a new study"
        )
    return content


def _verified(folder: Path, entry: Mapping[str, Any]) -> bytes:
    path = folder / entry["file"]
    data = _read(path)
    if len(data) != entry["size_bytes"]:
        raise InputError(f"{path}: expected {entry['size_bytes']} bytes, got {len(data)}: damaged; remove {folder}")
    if _digest(data) != entry["sha256"]:
        raise InputError(f"{path}: checksum does not match, the file is damaged; remove {folder}")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"{path}: expected a file of a checkpoint, got none; name a whole checkpoint") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise InputError(f"{path}: the disk cannot read it; remove {path.parent}") from error


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise InputError(f"{path}: expected safetensors, got a damaged file ({error})") from error


# ---- writing


def _write_best(attempt: Path, step: int, best: Mapping[str, Tensor]) -> dict[str, Any]:
    path = attempt / f"best-{step:05d}.safetensors"
    draft = attempt / f".tmp-{path.name}"
    entry = _write(draft, _bytes(best))
    draft.replace(path)
    return {"step": step} | entry | {"file": path.name}


def _carry_best(run: Run, attempt: Path, step: int) -> dict[str, Any] | None:
    """The best entry of the step before; its file is brought into this attempt's folder if it is not there."""
    own = [(s, path) for s, path in _numbered(attempt, _STEP) if s < step]
    if own:
        return _content(max(own)[1])["best"]
    before = _latest(run, before=step)
    if before is None and step > 0:
        raise InputError(
            f"{attempt}: expected the checkpoint that step {step} goes on from, got none; it was removed"
        )
    if before is None or before.best is None:
        return None
    name = before.best["file"]
    source, draft = before.path.parent / name, attempt / f".tmp-{name}"
    try:
        os.link(source, draft)
    except OSError as error:  # a file system without links; the file is never written to again, so both are equal
        if error.errno in _REFUSED:
            raise
        _write(draft, source.read_bytes())
    draft.replace(attempt / name)
    return dict(before.best)


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # copied: safetensors refuses tensors that share memory, as tied weights do. From a GPU all are on their way at
    # once, into pinned memory, and are waited for once
    copies = {k: v.detach().to("cpu", copy=True, non_blocking=True) for k, v in tensors.items()}
    for device in {v.device for v in tensors.values() if v.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return safetensors.torch.save({k: v.contiguous() for k, v in copies.items()})


def _sealed(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content)
    return f'{{"sha256": "{_digest(text.encode())}", "content": {text}}}\n'.encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write and flush a new file; what identifies it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"file": path.name, "sha256": _digest(data), "size_bytes": len(data)}


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(attempt: Path, step: int) -> None:
    """Drop what the kept steps of this attempt do not need. Steps above `step` were left behind by a resume
    from an older one and are dropped too."""
    steps = sorted(_numbered(attempt, _STEP), reverse=True)
    older = [(s, path) for s, path in steps if s < step][: KEPT_STEPS - 1]
    kept = {step, *(s for s, _ in older)}
    needed = set()
    for s, path in steps:
        if s in kept:
            with contextlib.suppress(InputError):
                needed.add((_content(path)["best"] or {}).get("step"))
        else:
            # renamed first: removed file by file under its own name it would be seen half gone
            path.replace(attempt / f".tmp-dropped-{path.name}")
    for s, path in _numbered(attempt, _BEST):
        if s not in needed:
            path.unlink()
    _clear(attempt)


def _clear(attempt: Path) -> None:
    """Remove what an interrupted save of this attempt left behind."""
    for name in os.listdir(attempt):
        if name.startswith(".tmp-"):
            path = attempt / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Turn a refused write into a DiskError, and free the space that the attempt at it took."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            _clear(target.parent)
        if error.errno not in _REFUSED:
            raise
        message = f"{target}: the disk refused the checkpoint ({error.strerror}); make room and run again"
        raise DiskError(error.errno, message) from error
