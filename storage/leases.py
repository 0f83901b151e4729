"""Who is alive: the identity of a process on a machine, and the thread that renews its lease."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger("storage")

RENEW_EVERY_S = 30.0
# Longer than any database outage or pause of a virtual machine that a study should survive.
GRACE_S = 600.0


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from every other one that ever had its pid.

    `boot` names the boot of the kernel and the pid namespace: only where it is equal does a pid mean anything.
    """

    host: str
    boot: str
    pid: int
    process_start: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        return cls(platform.node(), _boot(), os.getpid(), _process_start(os.getpid()) or 0)


def _boot() -> str:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()}:{int(psutil.boot_time())}"


def _process_start(pid: int) -> int | None:
    """A number that differs between two processes with the same pid; None when there is no live one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])  # state; clock ticks since boot
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError, ValueError):
        pass
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def is_dead(owner: ProcessIdentity) -> bool | None:
    """True or False where this host can see it, None where only the lease's age can tell."""
    if owner.boot != _boot():
        return None
    return _process_start(owner.pid) != owner.process_start


class LeaseThread:
    """Renews a lease every `every_s` until stopped, whatever the database does.

    A database error is logged and tried again: the thread never dies of it. `steady` says whether this process
    has seen the database up for two renewals in a row; only then may it judge another host's lease.
    """

    def __init__(self, renew: Callable[[], None], every_s: float = RENEW_EVERY_S) -> None:
        self._renew = renew
        self._every_s = every_s
        self._stop = threading.Event()
        self._renewals_in_a_row = 0
        self._thread = threading.Thread(target=self._loop, name="lease", daemon=True)

    def __enter__(self) -> LeaseThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)

    @property
    def steady(self) -> bool:
        return self._renewals_in_a_row >= 2

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _loop(self) -> None:
        wait_s = self._every_s
        while not self._stop.wait(wait_s):
            started = time.monotonic()
            try:
                self._renew()
                self._renewals_in_a_row += 1
                wait_s = self._every_s
            except Exception as error:
                self._renewals_in_a_row = 0
                wait_s = min(5.0, self._every_s)
                log.warning("lease not renewed: %s", error, extra={"action": "lease"})
            wait_s = max(0.0, wait_s - (time.monotonic() - started))
