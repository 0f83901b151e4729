"""One trial in a slot of a worker, from its claim to where it is left; while it waits the others train on."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from models.trainer import DiskError, Measurement, Run
from storage.artifacts import ArtifactError, ArtifactUnavailable
from storage.database import DatabaseUnavailable, StorageError, Unavailable, retry
from storage.runs import Fenced
from tuner import logs
from tuner.reporter import Reporter
from tuner.study import Claim, violation_metric
from tuner.uploads import RunUploads

if TYPE_CHECKING:
    from tuner.worker import Worker

log = logging.getLogger("tuner")
T = TypeVar("T")
# What is sent in is the measurement that was asked for (`Course.fit`); after a wait, nothing.
Steps = Generator[None, Measurement | None, T]

# Between two tries to reach the database while a trial trains.
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 60.0


class Leave(BaseException):
    """Thrown into a course: the trial goes back in the queue as it is. No `Exception`, as nothing has failed."""


class Course:
    """A worker's way with one trial.

    It pauses where it asks for a measurement, and, as long as others of the worker train, where it would have to
    wait for the database or the artifact store.

    Attributes:
        fit: what its next measurement is asked of; None: it waits for something else.
        alone: nothing may train beside it: a process died with it in hand, and it has measured nothing since. So
            who brings a process down is found out, and takes nobody along a second time.
        uploads: its way to the artifact store, once that is open.
        fault: how the device failed under it, which ends the trial and the process.
    """

    def __init__(self, worker: Worker, slot: int, claim: Claim) -> None:
        self.slot = slot
        self.claim = claim
        self.fit: Iterator[Measurement] | None = None
        self.alone = False
        self.uploads: RunUploads | None = None
        self.fault: str | None = None
        self._worker = worker
        self._study = worker.study
        self._steps = self._run()

    def go_on(self, result: Measurement | Exception | None = None) -> bool:
        """Up to the next pause.

        Args:
            result: of `fit`, as `Trainer.advance` tells it; None where it asked for nothing.

        Returns:
            False when the trial is left: ended, back in the queue, or in the hands of another worker.

        Raises:
            DiskError, ArtifactError: the trial is back in the queue. StorageError: it could not be put there.
        """
        self.fit = None
        if isinstance(result, Exception):
            return self._step(lambda: self._steps.throw(result))
        return self._step(lambda: self._steps.send(result))

    def leave(self) -> None:
        """Put the trial back in the queue at its newest checkpoint, seen into the store. Raises StorageError."""
        self.fit = None
        self._step(lambda: self._steps.throw(Leave()))

    def close(self) -> None:
        """Let go of everything here, and tell nobody."""
        self._steps.close()

    def context(self) -> Any:
        """Whose every event is that is logged inside."""
        which = {"slot": self.slot} if self._worker.n_slots > 1 else {}
        return logs.context(study=self._study.name, trial=self.claim.number, attempt=self.claim.attempt, **which)

    def _step(self, act: Callable[[], None]) -> bool:
        with self.context():
            try:
                act()
            except StopIteration:
                return False
            except Fenced as fenced:
                log.warning("trial lost to another worker: %s", fenced, extra={"action": "fenced"})
                return False
        return True

    # --- from its claim to where it is left --------------------------------------------------------------------

    def _run(self) -> Steps[None]:
        claim = self.claim
        log.info("trial claimed", extra={"action": "claim", "arm": claim.arm})
        outcome, failure, error = "stopped", None, None
        try:
            outcome, failure = yield from self._train()
            if outcome != "stopped":
                yield from self._patiently(lambda: self._study.end(claim, outcome, failure), "end")
        except Leave:
            outcome = "stopped"
        except (DiskError, ArtifactError) as met:
            # No fault of the trial: whoever takes it next goes on from its checkpoint.
            outcome, error = "stopped", met
        if outcome == "stopped":
            try:
                yield from self._patiently(lambda: self._study.stop(claim), "stop")
            except Leave:  # now then, as nobody trains any more; the worker has another reason to end
                error = None
                yield from self._patiently(lambda: self._study.stop(claim), "stop")
        if error is not None:
            raise error
        log.info("trial left", extra={"action": "release", "outcome": outcome})

    def _train(self) -> Steps[tuple[str, str | None]]:
        """Train until the trial is complete, pruned, stopped, or failed with a reason."""
        worker, study, claim = self._worker, self._study, self.claim
        directory = Path(worker.options.runs) / study.name / "trials" / f"{claim.number:05d}"
        reporter = Reporter(study, claim, directory)
        try:
            config = worker.trainer.Config.model_validate((yield from self._config()))
            spec = study.spec
            seed, device = spec.seed_of(claim.number), worker.options.torch_device
            run = Run(directory, seed, device, claim.attempt, spec.decision, spec.objective)
            yield from self._patiently(reporter.resume, "resume")
            self.alone = yield from self._brought_a_process_down()
            with (yield from self._uploading(directory)) as self.uploads:
                fit = worker.trainer.fit(config, worker.data, run)
                outcome = yield from self._measure(fit, reporter)
                if self.uploads is not None and reporter.last_step is not None:
                    yield from self._bring_up(self.uploads, outcome)
            if outcome == "complete" and reporter.last_step is None:
                return "failed", "the trainer ended without a measurement"
            return outcome, None
        except (Fenced, DiskError, StorageError):
            raise
        except Exception as error:
            log.error("trial failed", exc_info=error, extra={"action": "fail"})
            self.fault = reason_of(error) if is_device_fault(error) else None
            yield from self._patiently(reporter.flush, "measurements")
            return "failed", reason_of(error)

    def _brought_a_process_down(self) -> Steps[bool]:
        """Whether it may have: a process died while it was in hand, and it has not come on since."""
        study, claim = self._study, self.claim
        if self._worker.n_slots == 1 or claim.attempt == 1:
            return False
        count = study.store.barren_crashes
        return (yield from self._patiently(lambda: count(study.id, claim.number), "resume")) > 0

    def _uploading(self, directory: Path) -> Steps[Any]:
        """The run's way to the artifact store, once what is there has been brought here."""
        uploads, study, claim = self._worker.uploads, self._study, self.claim
        if uploads is None:
            return nullcontext()
        row = yield from self._patiently(lambda: study.store.get_run(study.id, claim.number), "resume")
        if row.uploaded_attempt is not None:
            named = (row.uploaded_attempt, row.uploaded_step)
            yield from self._patiently(
                lambda: uploads.restore(claim.number, directory, named), "restore", self._worker.store_outage
            )

        def name(step: int) -> None:
            if not study.store.name_upload(study.id, claim.number, claim.attempt, step):
                # The database came back for this thread before training asked for it again.
                raise DatabaseUnavailable(f"storage: the measurement of step {step} is not stored yet")

        return uploads.open(claim.number, claim.attempt, directory, name)

    def _bring_up(self, uploads: RunUploads, outcome: str) -> Steps[None]:
        """See the newest checkpoint into the artifact store before the trial is let go."""
        options, deadline = self._worker.options, self._worker.leave_by
        if deadline is None:
            deadline = time.monotonic() + (options.stop_grace_s / 4 if outcome == "stopped" else options.outage_s)
        uploads.hurry()
        while self._others_train and not uploads.is_up and time.monotonic() < deadline:
            yield
        try:
            uploads.finish(max(0.0, deadline - time.monotonic()))
        except (ArtifactUnavailable, DatabaseUnavailable) as error:
            if outcome != "stopped":
                raise
            # The checkpoint is safe in the folder of runs; elsewhere the trial goes on from an earlier upload.
            log.warning("newest checkpoint not uploaded: %s", error, extra={"action": "upload_late"})

    def _measure(self, fit: Iterator[Measurement], reporter: Reporter) -> Steps[str]:
        left = False
        try:
            while True:
                self.fit = fit
                try:
                    measurement = yield
                except Leave:
                    left = True
                    return "stopped"
                except GeneratorExit:
                    left = True
                    raise
                if measurement is None:
                    break
                verdict = self._reported(reporter, measurement)
                if self.uploads is not None:
                    self.uploads.offer(measurement.step)
                if verdict is not None:
                    return verdict
                if self._worker.stop.is_set():
                    return "stopped"
        finally:
            # On a device that failed under another trial nothing is let go in order, which is no fault of this one.
            with suppress(Exception) if left else nullcontext():
                fit.close()  # type: ignore[attr-defined]
        yield from self._patiently(reporter.flush, "measurements")
        return "complete"

    def _reported(self, reporter: Reporter, measurement: Measurement) -> str | None:
        """Record one measurement; `pruned` or `stopped` when the trial is to be left."""
        study, outage = self._study, self._worker.outage
        spec = study.spec
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
        if reporter.add(measurement):
            self.alone = False
        if outage.is_waiting:
            return None
        began = time.monotonic()
        try:
            with study.search.without_patience():  # training waits for nobody
                recorded = reporter.flush()
                prune = study.search.should_prune(self.claim.trial, recorded.n_ended)
        except DatabaseUnavailable as error:
            if outage.lasted_s(began) > self._worker.options.outage_s:
                raise  # its checkpoint and its file have everything
            log.warning("database away, training goes on: %s", error, extra={"action": "outage"})
            return None
        outage.end()
        return "pruned" if prune else "stopped" if recorded.stop == "now" else None

    def _config(self) -> Steps[dict[str, Any]]:
        """The run's config: sampled once, recorded whole, the same at every later attempt."""
        study, claim = self._study, self.claim
        spec = study.spec

        def sample() -> dict[str, Any]:
            config = spec.space.sample(
                spec.config,
                spec.arms[claim.arm],
                lambda dimension, default: study.search.suggest(claim.trial, dimension, default),
            )
            study.store.set_config(study.id, claim.number, claim.attempt, config)
            return config

        return self._patiently(sample, "config")

    # --- waiting -----------------------------------------------------------------------------------------------

    @property
    def _others_train(self) -> bool:
        """After a fault of the device nobody does."""
        return self.fault is None and self._worker.is_training

    def _patiently(self, call: Callable[[], T], what: str, outage: Outage | None = None) -> Steps[T]:
        """Until it succeeds; while others train they are not held up by it.

        Args:
            outage: of what is called, where that is not the database.
        """
        outage, patience_s = outage or self._worker.outage, self._worker.options.outage_s
        while self._others_train:
            if not outage.is_waiting:
                began = time.monotonic()
                try:
                    with self._study.search.without_patience():
                        answer = retry(call, 0.0, what)
                except Unavailable as error:
                    if outage.lasted_s(began) > patience_s:
                        raise
                    log.warning(
                        "away, others train meanwhile: %s", error, extra={"action": "outage", "what": what}
                    )  # fmt: skip
                else:
                    outage.end()
                    return answer
            yield
        answer = retry(call, patience_s, what)
        outage.end()
        return answer


class Outage:
    """Since when a server has been away, and when it is worth asking again: with back-off and jitter, and never
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


def is_device_fault(error: BaseException) -> bool:
    """Whether CUDA has failed for the rest of the process, as after a failed assertion in a kernel; memory that ran
    out is not meant."""
    sticky = re.search(r"CUDA error|cuDNN error|CUBLAS_STATUS", str(error))
    return type(error).__name__ == "AcceleratorError" or sticky is not None
