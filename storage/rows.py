"""What the tables hold, as values: one class a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.leases import ProcessIdentity


@dataclass(frozen=True)
class StudyRow:
    """One study as stored. `data` and `spec` are JSON texts."""

    id: int
    name: str
    spec: str
    data: str
    package_version: str
    n_trials: int
    n_replacements: int
    created_at: float
    started_at: float

    @property
    def total(self) -> int:
        """How many ended trials the study is to have."""
        return self.n_trials + self.n_replacements


@dataclass(frozen=True)
class WorkerRow:
    """One worker process; `age_s` is the time since its lease was renewed, by the database's clock."""

    id: int
    identity: ProcessIdentity
    device: str
    started_at: float
    age_s: float
    ended_at: float | None


@dataclass(frozen=True)
class RunRow:
    """One run; (checkpoint_attempt, checkpoint_step) names its newest accepted checkpoint."""

    number: int
    arm: str
    config: dict[str, Any] | None
    attempt: int
    checkpoint_attempt: int | None
    checkpoint_step: int | None
    best_step: int | None
    ended_at: float | None
    failure: str | None


@dataclass(frozen=True)
class AttemptRow:
    number: int
    attempt: int
    worker_id: int
    claimed_at: float
    released_at: float | None
    outcome: str | None


@dataclass(frozen=True)
class MeasurementRow:
    """One step's metrics. `attempt` is the one that measured it and has its checkpoint (0: the current one)."""

    step: int
    metrics: Mapping[str, float]
    elapsed_s: float
    attempt: int = 0
