"""Runs in the background: one at a time for each study and folder, with a log file and its pid."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from models.trainer import InputError

LOCK, LOG = "run.lock", "run.log"
EVALUATE_LOCK = "evaluate.lock"
STARTED_WITHIN_S = 600.0  # data may have to be prepared first


@contextmanager
def running_alone(folder: Path, lock: str = LOCK) -> Iterator[None]:
    """Hold the study's folder for this process; it is free again when the process ends, however it ends.

    Args:
        lock: LOCK for a run of the study, EVALUATE_LOCK for its evaluation; one does not exclude the other.

    Raises:
        InputError: another process holds it; names its pid.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(
            f"--runs {folder.parent}: expected a folder to write to, got {error.strerror}; name another"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode().strip() or "?"
            what = "run" if lock == LOCK else "evaluation"
            ends = f"`tuner stop --study {folder.name}` or `kill {pid}`" if lock == LOCK else f"`kill {pid}`"
            raise InputError(
                f"{folder}: expected no other {what} of this study, got process {pid} at it; {ends} ends it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def detach(arguments: Sequence[str], folder: Path) -> int:
    """Start `tuner ARGUMENTS` in the background, its output in the folder's log file.

    Returns:
        The pid, once it holds the study, or lives after STARTED_WITHIN_S.

    Raises:
        InputError: another one runs, or it ended before that; then the message is its own.
    """
    with running_alone(folder):
        pass  # else its own refusal would stand among what the other one says
    log = folder / "logs" / LOG
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "tuner", *arguments], stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise InputError(f"{log}: cannot be written ({error.strerror}); name another --runs") from error
    deadline = time.monotonic() + STARTED_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        if _holder(folder) == process.pid:
            return process.pid
        time.sleep(0.05)
    if not process.poll():  # nothing was to do; or it still prepares its data
        return process.pid
    told = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    raise InputError(told[-1] if told else f"{log}: the run ended at once (exit {process.returncode})")


def _holder(folder: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((folder / LOCK).read_text())
    return None
