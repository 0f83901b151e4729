"""Owners and measurements for tests of the tables."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from storage.leases import ProcessIdentity
from storage.runs import MeasurementRow


def me() -> ProcessIdentity:
    return ProcessIdentity.current()


def elsewhere() -> ProcessIdentity:
    return dataclasses.replace(me(), host="elsewhere", boot="another boot")


def gone() -> ProcessIdentity:
    """A process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return dataclasses.replace(me(), pid=process.pid)


def measured(*steps: int, n_metrics: int = 1, attempt: int = 0) -> list[MeasurementRow]:
    metrics = {f"m{i}": i / 7 for i in range(n_metrics)}
    return [MeasurementRow(step, metrics, step + 0.5, attempt) for step in steps]
