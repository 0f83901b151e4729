"""What the tables hold, as values: one class a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.leases import ProcessIdentity


@dataclass(frozen=True)
class StudyRow:
    """One study as stored. `data` and `spec` are JSON texts; `queued_at` None: it is not in the queue; `stop`:
    None, `drain` (running trials finish, none is begun) or `now` (they stop at their next measurement)."""

    id: int
    name: str
    spec: str
    data: str
    package_version: str
    n_trials: int
    n_replacements: int
    created_at: float
    started_at: float
    queued_at: float | None
    stop: str | None

    @property
    def total(self) -> int:
        """How many ended trials the study is to have."""
        return self.n_trials + self.n_replacements


@dataclass(frozen=True)
class WorkerRow:
    """One worker process; `age_s` is the time since its lease was renewed, by the database's clock.

    `study_id` is the one study it serves, None for a worker of the service.
    """

    id: int
    identity: ProcessIdentity
    device: str
    started_at: float
    age_s: float
    ended_at: float | None
    study_id: int | None = None


@dataclass(frozen=True)
class RunRow:
    """One run; (checkpoint_attempt, checkpoint_step) names its newest accepted checkpoint, (uploaded_attempt,
    uploaded_step) the newest one in the artifact store. `measured_at`: when the newest measurement came."""

    number: int
    arm: str
    config: dict[str, Any] | None
    attempt: int
    checkpoint_attempt: int | None
    checkpoint_step: int | None
    best_step: int | None
    ended_at: float | None
    failure: str | None
    measured_at: float | None
    uploaded_attempt: int | None
    uploaded_step: int | None


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


@dataclass(frozen=True)
class Recorded:
    """What a worker is told when it records: how many runs of its study have ended, and StudyRow.stop."""

    n_ended: int
    stop: str | None


@dataclass(frozen=True)
class Holding:
    """The run a worker has in hand; `step` is the newest measured one, None before the first."""

    study_name: str
    number: int
    attempt: int
    arm: str
    step: int | None
    claimed_at: float
    measured_at: float | None


@dataclass(frozen=True)
class StudyProgress:
    """A study and what became of its runs so far.

    `running` runs are held by a worker, `waiting` ones were begun and are nobody's now. Times are None where
    nothing of the kind has happened yet.
    """

    row: StudyRow
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    ended_last_hour: int
    first_started_at: float | None
    last_measured_at: float | None
    last_ended_at: float | None

    @property
    def n_ended(self) -> int:
        return self.complete + self.pruned + self.failed


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of a study; `name` is that of the study which holds its fits. `nominee` is None until it is
    fixed, `document` until the evaluation has come to its end."""

    id: int
    study_id: int
    number: int
    name: str
    plan: dict[str, Any]
    nominee: dict[str, Any] | None
    document: dict[str, Any] | None
    created_at: float
    finished_at: float | None


@dataclass(frozen=True)
class LookRow:
    """One model's look at a role that is kept back; `scored_at` None: it was opened, and maybe never seen."""

    id: int
    data_hash: str
    role: str
    study: str
    evaluation: str
    model: str
    opened_at: float
    scored_at: float | None


@dataclass(frozen=True)
class CertificateRow:
    """One certificate, the `number`-th on these data; it spends `delta`, issued (`content`) or not."""

    id: int
    data_hash: str
    study: str
    evaluation: str
    model: str
    number: int
    delta: float
    content: dict[str, Any] | None
    opened_at: float
    issued_at: float | None


ModelState = Literal["candidate", "champion", "retired"]


@dataclass(frozen=True)
class ModelRow:
    """One version of a model. `artifact` is the key of its folder, below the runs and in the artifact store;
    `changed_at` tells since when it has its state."""

    id: int
    name: str
    version: int
    state: ModelState
    evaluation: str
    artifact: str
    checksum: str
    size_bytes: int
    config: dict[str, Any]
    metrics: dict[str, Any]
    certificate: dict[str, Any] | None
    data_hash: str
    package_version: str
    created_at: float
    changed_at: float


@dataclass(frozen=True)
class PromotionRow:
    """`version` became champion in the place of `former` (None: there was none); `gate` says what it had passed."""

    id: int
    name: str
    version: int
    former: int | None
    action: Literal["promote", "rollback"]
    gate: dict[str, Any]
    at: float
