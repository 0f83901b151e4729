"""Who is alive, and the thread that says so."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest

from storage.database import DatabaseUnavailable
from storage.leases import LeaseThread, ProcessIdentity, is_dead


def identity_of(pid: int) -> ProcessIdentity:
    """As the process itself would give it."""
    code = "from storage.leases import _process_start; import sys; print(_process_start(int(sys.argv[1])))"
    output = subprocess.run([sys.executable, "-c", code, str(pid)], capture_output=True, text=True, check=True)
    return dataclasses.replace(ProcessIdentity.current(), pid=pid, process_start=int(output.stdout))


def test_this_process_lives() -> None:
    assert is_dead(ProcessIdentity.current()) is False


def test_a_process_is_dead_from_its_end_on_even_as_a_zombie() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identity_of(process.pid)
    assert is_dead(identity) is False
    assert process.stdin is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet collected
    assert is_dead(identity) is True
    process.communicate()
    assert is_dead(identity) is True


def test_a_reused_pid_is_another_process() -> None:
    current = ProcessIdentity.current()
    assert is_dead(dataclasses.replace(current, process_start=current.process_start + 1)) is True


def test_another_boot_or_namespace_cannot_be_seen() -> None:
    assert is_dead(dataclasses.replace(ProcessIdentity.current(), boot="other", pid=2**22 - 1)) is None


class Renewals:
    """A database that fails at the calls it is told to."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.n = 0
        self.changed = threading.Condition()

    def __call__(self) -> None:
        with self.changed:
            self.n += 1
            self.changed.notify_all()
            if self.n in self.failing:
                raise DatabaseUnavailable("away")

    def wait_for(self, n: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.n >= n, timeout=20.0)


def settled(lease: LeaseThread, steady: bool) -> bool:
    deadline = time.monotonic() + 20.0
    while lease.steady is not steady and time.monotonic() < deadline:
        time.sleep(0.001)
    return lease.steady is steady


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), RuntimeError("anything")])
def test_the_thread_survives_every_error(error: Exception) -> None:
    def renew() -> None:
        renewals()
        if renewals.n <= 5:
            raise error

    renewals = Renewals()
    with LeaseThread(renew, every_s=0.002) as lease:
        renewals.wait_for(10)
        assert lease.alive
        assert settled(lease, True)
    assert not lease.alive


def test_two_renewals_in_a_row_are_steady_and_one_failure_ends_it() -> None:
    renewals = Renewals(2, 6)
    seen = []

    def renew() -> None:
        seen.append(lease.steady)  # what the renewals before this one have led to
        renewals()

    lease = LeaseThread(renew, every_s=0.001)
    with lease:
        renewals.wait_for(9)
    # 1 good, 2 failed, 3 to 5 good, 6 failed, 7 and 8 good
    assert seen[1:9] == [False, False, False, True, True, False, False, True]


def test_it_stops_at_once() -> None:
    with LeaseThread(lambda: None, every_s=1000.0) as lease:
        started = time.monotonic()
    assert time.monotonic() - started < 5.0
    assert not lease.alive
