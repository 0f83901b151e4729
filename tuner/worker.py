"""A worker: takes trials of a study, trains each on one device, brings every measurement to where it is safe."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.trainer import DiskError, Measurement, Run
from storage.artifacts import ArtifactError, ArtifactUnavailable
from storage.database import DatabaseUnavailable, StorageError, retry
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.runs import Fenced
from tuner import logs
from tuner.reporter import Reporter
from tuner.study import Claim, Study, violation_metric
from tuner.uploads import RunUploads, Uploads

log = logging.getLogger("tuner")
T = TypeVar("T")

# How long a claim, a stop or an end waits for a database or an artifact store that is away.
OUTAGE_S = 900.0
# How long a worker that is told to stop waits for its next measurement.
STOP_GRACE_S = 100.0
UPLOAD_EVERY_S = 30.0
IDLE_POLL_S = 0.5
# Between two tries to reach the database while a trial trains.
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 60.0


class DeviceFault(Exception):
    """The device failed under a trial: nothing works on it any more in this process, but in a new one it may."""


@dataclass(frozen=True)
class WorkerOptions:
    """What a supervisor tells a worker process, as JSON in its arguments; the database URL comes by TUNER_STORAGE.

    Args:
        studies: serve these alone; none: whatever is queued.
        data_path: the data of `tuner run`; None: they are found below `roots`, by their hashes.
        stay: wait for more when nothing is left to do.
    """

    device: str
    runs: str
    cache: str
    studies: tuple[str, ...] = ()
    data_path: str | None = None
    data_path_given: bool = False
    roots: tuple[str, ...] = ()
    artifacts: str | None = None
    upload_every_s: float = UPLOAD_EVERY_S
    stay: bool = False
    stop_grace_s: float = STOP_GRACE_S
    outage_s: float = OUTAGE_S
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S

    @classmethod
    def from_json(cls, text: str) -> WorkerOptions:
        tree = json.loads(text)
        return cls(**{**tree, "studies": tuple(tree["studies"]), "roots": tuple(tree["roots"])})

    @property
    def torch_device(self) -> str:
        """The device as the process sees it, to which its supervisor has shown no other one."""
        return "cuda:0" if self.device.startswith("cuda") else self.device


class Worker:
    """Serves one study on one device.

    Args:
        data: what the trainer's `load` returned; train and valid alone.
        stop: set from outside to stop at the next measurement.
        steady: whether leases of other hosts may be judged (LeaseThread.steady).
        uploads: the study's part of the artifact store; None: checkpoints stay in the folder of runs.
    """

    def __init__(
        self, study: Study, trainer: Any, data: Any, worker_id: int, options: WorkerOptions, stop: threading.Event,
        steady: Callable[[], bool] = lambda: False, uploads: Uploads | None = None,
    ) -> None:  # fmt: skip
        self.study = study
        self.trainer = trainer
        self.data = data
        self.worker_id = worker_id
        self.options = options
        self.stop = stop
        self.steady = steady
        self.uploads = uploads
        self.fit_s = 0.0  # time spent inside the trainer, for the share of everything else
        self._outage = _Outage()
        self._held: tuple[Claim, RunUploads | None] | None = None
        self._fault: str | None = None  # of the device

    def serve(self) -> None:
        """Take trials until every trial of the study's total has ended, the study or this worker is stopped.

        Raises:
            TooManyFailures, DiskError, DeviceFault, StorageError.
        """
        while not self.stop.is_set():
            if self.work():
                continue
            if self._patiently(self.study.is_over, "count"):
                return
            # Somebody else's trial may yet come back to the queue.
            held = True
            while held and not self.stop.wait(IDLE_POLL_S):
                held = self._patiently(lambda: self.study.is_held(self.steady(), self.options.grace_s), "wait")

    def work(self) -> bool:
        """Take one trial, if there is one, and see it to its end; False when there was none. Raises as `serve`."""
        claim = self._patiently(
            lambda: self.study.claim(self.worker_id, self.steady(), self.options.grace_s), "claim"
        )
        if claim is None:
            return False
        with logs.context(study=self.study.name, trial=claim.number, attempt=claim.attempt):
            log.info("trial claimed", extra={"action": "claim", "arm": claim.arm})
            self._held = (claim, None)
            try:
                self._run(claim)
            except Fenced as fenced:
                log.warning("trial lost to another worker: %s", fenced, extra={"action": "fenced"})
            finally:
                self._held = None
            if self._fault is not None:
                raise DeviceFault(self._fault)
        return True

    def abandon(self) -> None:
        """Put the trial in hand back in the queue at its newest checkpoint, from another thread; the process ends
        right after."""
        if (held := self._held) is None:
            return
        claim, uploads = held
        try:
            if uploads is not None:
                uploads.finish(5.0)
        except Exception as error:
            log.warning("newest checkpoint not uploaded: %s", error, extra={"action": "upload_late"})
        with suppress(StorageError, Fenced):
            self.study.stop(claim)

    def _run(self, claim: Claim) -> None:
        try:
            outcome, failure = self._train(claim)
        except (DiskError, ArtifactError):
            # No fault of the trial: whoever takes it next goes on from its checkpoint.
            self._patiently(lambda: self.study.stop(claim), "stop")
            raise
        if outcome == "stopped":
            self._patiently(lambda: self.study.stop(claim), "stop")
        else:
            self._patiently(lambda: self.study.end(claim, outcome, failure), "end")
        log.info("trial left", extra={"action": "release", "outcome": outcome})

    def _train(self, claim: Claim) -> tuple[str, str | None]:
        """Train until the trial is complete, pruned, stopped, or failed with a reason."""
        directory = Path(self.options.runs) / self.study.name / "trials" / f"{claim.number:05d}"
        reporter = Reporter(self.study, claim, directory)
        try:
            config = self.trainer.Config.model_validate(self._config(claim))
            spec = self.study.spec
            seed, device = spec.seed_of(claim.number), self.options.torch_device
            run = Run(directory, seed, device, claim.attempt, spec.decision, spec.objective)
            self._patiently(reporter.resume, "resume")
            with self._uploading(claim, directory) as uploads:
                self._held = (claim, uploads)
                outcome = self._measure(claim, self.trainer.fit(config, self.data, run), reporter, uploads)
                if uploads is not None and reporter.last_step is not None:
                    self._bring_up(uploads, outcome)
            if reporter.last_step is None:
                return "failed", "the trainer ended without a measurement"
            return outcome, None
        except (Fenced, DiskError, StorageError):
            raise
        except Exception as error:
            log.error("trial failed", exc_info=error, extra={"action": "fail"})
            self._patiently(reporter.flush, "measurements")
            self._fault = reason_of(error) if _is_device_fault(error) else None
            return "failed", reason_of(error)

    def _uploading(self, claim: Claim, directory: Path) -> Any:
        """The run's way to the artifact store, once what is there has been brought here."""
        if self.uploads is None:
            return nullcontext()
        study, uploads = self.study, self.uploads
        row = self._patiently(lambda: study.store.get_run(study.id, claim.number), "resume")
        if row.uploaded_attempt is not None:
            named = (row.uploaded_attempt, row.uploaded_step)
            self._patiently(lambda: uploads.restore(claim.number, directory, named), "restore")

        def name(step: int) -> None:
            if not study.store.name_upload(study.id, claim.number, claim.attempt, step):
                # The database came back for this thread before training asked for it again.
                raise DatabaseUnavailable(f"storage: the measurement of step {step} is not stored yet")

        return uploads.open(claim.number, claim.attempt, directory, name)

    def _bring_up(self, uploads: RunUploads, outcome: str) -> None:
        """See the newest checkpoint into the artifact store before the trial is let go."""
        patience_s = self.options.stop_grace_s / 4 if outcome == "stopped" else self.options.outage_s
        try:
            uploads.finish(patience_s)
        except (ArtifactUnavailable, DatabaseUnavailable) as error:
            if outcome != "stopped":
                raise
            # The checkpoint is safe in the folder of runs; elsewhere the trial goes on from an earlier upload.
            log.warning("newest checkpoint not uploaded: %s", error, extra={"action": "upload_late"})

    def _measure(
        self, claim: Claim, measurements: Iterator[Measurement], reporter: Reporter, uploads: RunUploads | None
    ) -> str:
        self._outage.end()
        try:
            for measurement in self._timed(measurements):
                verdict = self._reported(reporter, claim, measurement)
                if uploads is not None:
                    uploads.offer(measurement.step)
                if verdict is not None:
                    return verdict
                if self.stop.is_set():
                    return "stopped"
        finally:
            measurements.close()  # type: ignore[attr-defined]
        self._patiently(reporter.flush, "measurements")
        return "complete"

    def _timed(self, measurements: Iterator[Measurement]) -> Iterator[Measurement]:
        while True:
            started = time.monotonic()
            try:
                measurement = next(measurements, None)
            finally:
                self.fit_s += time.monotonic() - started
            if measurement is None:
                return
            yield measurement

    def _reported(self, reporter: Reporter, claim: Claim, measurement: Measurement) -> str | None:
        """Record one measurement; `pruned` or `stopped` when the trial is to be left."""
        spec = self.study.spec
        for name in (spec.objective.metric, violation_metric(spec)):
            if name not in measurement.metrics:
                raise FloatingPointError(f"step {measurement.step}: metric {name} is missing")
        for name, value in measurement.metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {measurement.step}: metric {name} is {value}")
        try:  # what the database refuses must not be in the file, nor in the way of the reason
            json.dumps(measurement.curves, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise FloatingPointError(f"step {measurement.step}: curves: {error}") from error
        reporter.add(measurement)
        if self._outage.is_waiting:
            return None
        began = time.monotonic()
        try:
            with self.study.search.without_patience():  # training waits for nobody
                recorded = reporter.flush()
                prune = self.study.search.should_prune(claim.trial, recorded.n_ended)
        except DatabaseUnavailable as error:
            if self._outage.lasted_s(began) > self.options.outage_s:
                raise  # its checkpoint and its file have everything
            log.warning("database away, training goes on: %s", error, extra={"action": "outage"})
            return None
        self._outage.end()
        return "pruned" if prune else "stopped" if recorded.stop == "now" else None

    def _config(self, claim: Claim) -> dict[str, Any]:
        """The run's config: sampled once, recorded whole, the same at every later attempt."""
        spec, study = self.study.spec, self.study

        def sample() -> dict[str, Any]:
            config = spec.space.sample(
                spec.config,
                spec.arms[claim.arm],
                lambda dimension, default: study.search.suggest(claim.trial, dimension, default),
            )
            study.store.set_config(study.id, claim.number, claim.attempt, config)
            return config

        return self._patiently(sample, "config")

    def _patiently(self, call: Callable[[], T], what: str) -> T:
        return retry(call, self.options.outage_s, what)


class _Outage:
    """Since when the database has been away, and when it is worth asking again: with back-off and jitter, and never
    for more than a third of the time, as a network that was cut answers late or not at all."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        self._since: float | None = None
        self._delay_s = 0.0
        self._next_try = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether it is too early to ask again."""
        return time.monotonic() < self._next_try

    def lasted_s(self, began: float) -> float:
        """Note a failed try that began at this monotonic time; how long it has been away by now."""
        now = time.monotonic()
        self._since = self._since or began
        self._delay_s = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, 2 * self._delay_s, 2 * (now - began)))
        self._next_try = now + self._delay_s * random.uniform(0.5, 1.0)
        return now - self._since


def reason_of(error: BaseException) -> str:
    """One line for the table: the kind of error and its first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_device_fault(error: BaseException) -> bool:
    """Whether CUDA has failed for the rest of the process, as after a failed assertion in a kernel; memory that ran
    out is not meant."""
    sticky = re.search(r"CUDA error|cuDNN error|CUBLAS_STATUS", str(error))
    return type(error).__name__ == "AcceleratorError" or sticky is not None


def arguments(options: WorkerOptions) -> list[str]:
    """The command line of a worker process."""
    return [sys.executable, "-m", "tuner.worker_process", json.dumps(asdict(options))]
