"""A worker: one process on one device that takes trials of a study until none is left.

Started by the coordinator as `python -m tuner.worker`. It stops in order, at the next measurement, on SIGTERM,
SIGINT or the end of its standard input (its coordinator died); its trial goes back in the queue. Its last line on
standard output is JSON: how it ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import models
from models.trainer import SEARCH_ROLES, DataSpec, DiskError, InputError, Measurement, Run
from storage.database import Database, DatabaseUnavailable, StorageError, retry
from storage.leases import GRACE_S, RENEW_EVERY_S, LeaseThread, ProcessIdentity
from storage.runs import Fenced, MeasurementRow
from tuner.study import Claim, Study, TooManyFailures, violation_metric

log = logging.getLogger("tuner")
T = TypeVar("T")

# How long a claim, a stop or an end waits for a database that is away.
OUTAGE_S = 900.0
IDLE_POLL_S = 0.5
FAILED_EXIT = 1
REFUSED_EXIT = 2


@dataclass(frozen=True)
class WorkerOptions:
    """What the coordinator tells a worker, as JSON in its arguments; the database URL comes by TUNER_STORAGE."""

    study: str
    device: str
    runs: str
    data_path: str
    data_path_given: bool
    cache: str
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S


class Journal:
    """The measurements of a run in append-only files, one per attempt, beside its checkpoints.

    A measurement is on the disk before it is in the database. A torn last line (killed while writing) is skipped.
    """

    NAME = "measurements.jsonl"

    def __init__(self, directory: Path, attempt: int) -> None:
        self._directory = directory
        self._attempt = attempt
        self._path = directory / f"attempt-{attempt}" / self.NAME

    def append(self, measurement: MeasurementRow) -> None:
        """Raises DiskError when the disk refuses."""
        line = json.dumps(
            {"step": measurement.step, "elapsed_s": measurement.elapsed_s, "metrics": dict(measurement.metrics)}
        )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(
                error.errno, f"{self._path}: cannot write ({error.strerror}); free space, run again"
            ) from error

    def read_all(self) -> list[MeasurementRow]:
        """Every measurement of every attempt up to this one, one a step (the newest attempt's), by step."""
        found: dict[int, MeasurementRow] = {}
        files = {int(path.parent.name[8:]): path for path in self._directory.glob(f"attempt-*/{self.NAME}")}
        for attempt in sorted(files):
            if attempt > self._attempt:
                break
            for line in files[attempt].read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[row["step"]] = MeasurementRow(row["step"], row["metrics"], row["elapsed_s"], attempt)
        return [found[step] for step in sorted(found)]


class Worker:
    """Serves one study on one device.

    Args:
        data: what the trainer's `load` returned; train and valid alone.
        stop: set from outside to stop at the next measurement.
        steady: whether leases of other hosts may be judged (LeaseThread.steady).
    """

    def __init__(
        self, study: Study, trainer: Any, data: Any, worker_id: int, options: WorkerOptions, stop: threading.Event,
        steady: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.study = study
        self.trainer = trainer
        self.data = data
        self.worker_id = worker_id
        self.options = options
        self.stop = stop
        self.steady = steady
        self.fit_s = 0.0  # time spent inside the trainer, for the share of everything else

    def serve(self) -> None:
        """Take trials until every trial of the study's total has ended, or `stop` is set.

        Raises:
            TooManyFailures, DiskError, StorageError.
        """
        while not self.stop.is_set():
            claim = self._patiently(
                lambda: self.study.claim(self.worker_id, self.steady(), self.options.grace_s), "claim"
            )
            if claim is not None:
                self._run(claim)
            elif self._patiently(self.study.is_done, "count"):
                return
            else:
                # Somebody else's trial may yet come back to the queue.
                self.stop.wait(IDLE_POLL_S)

    def _run(self, claim: Claim) -> None:
        log.info(
            "trial claimed: action=claim study=%s trial=%d attempt=%d arm=%s worker=%d",
            self.study.name, claim.number, claim.attempt, claim.arm, self.worker_id,
        )  # fmt: skip
        try:
            outcome = self._train(claim)
        except Fenced as fenced:
            log.warning("trial lost to another worker: action=fenced %s", fenced)
            return
        except DiskError:
            self._finish(lambda: self.study.stop(claim))
            raise
        if outcome == "stopped":
            self._finish(lambda: self.study.stop(claim))
        else:
            state, failure = outcome if isinstance(outcome, tuple) else (outcome, None)
            self._finish(lambda: self.study.end(claim, state, failure))
        log.info("trial left: action=release study=%s trial=%d outcome=%s", self.study.name, claim.number, outcome)

    def _finish(self, call: Callable[[], Any]) -> None:
        try:
            self._patiently(call, "end")
        except Fenced as fenced:
            log.warning("trial lost to another worker: action=fenced %s", fenced)

    def _train(self, claim: Claim) -> str | tuple[str, str]:
        """Train until the trial is complete, pruned, stopped or (failed, reason)."""
        spec = self.study.spec
        directory = Path(self.options.runs) / self.study.name / "trials" / f"{claim.number:05d}"
        reporter = _Reporter(self.study, claim, Journal(directory, claim.attempt))
        try:
            config = self.trainer.Config.model_validate(self._config(claim))
            run = Run(directory, spec.seed, self.options.device, claim.attempt, spec.decision)
            self._patiently(reporter.resume, "resume")
            measurements = self.trainer.fit(config, self.data, run)
            try:
                for measurement in self._timed(measurements):
                    if self._reported(reporter, claim, measurement):
                        return "pruned"
                    if self.stop.is_set():
                        return "stopped"
            finally:
                measurements.close()
            self._patiently(reporter.flush, "measurements")
            if reporter.last_step is None:
                return "failed", "the trainer ended without a measurement"
            return "complete"
        except (Fenced, DiskError, StorageError):
            raise
        except Exception as error:
            log.error("trial failed: action=fail trial=%d\n%s", claim.number, traceback.format_exc())
            self._patiently(reporter.flush, "measurements")
            return "failed", reason_of(error)

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

    def _reported(self, reporter: _Reporter, claim: Claim, measurement: Measurement) -> bool:
        """Record one measurement; True when the pruner gives the trial up."""
        spec = self.study.spec
        for name in (spec.objective.metric, violation_metric(spec)):
            if name not in measurement.metrics:
                raise FloatingPointError(f"step {measurement.step}: metric {name} is missing")
        for name, value in measurement.metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {measurement.step}: metric {name} is {value}")
        reporter.add(measurement)
        try:
            n_ended = reporter.flush()
            return self.study.search.should_prune(claim.trial, n_ended)
        except DatabaseUnavailable as error:
            log.warning("database away, training goes on: action=outage trial=%d %s", claim.number, error)
            return False

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
        return retry(call, OUTAGE_S, what)


class _Reporter:
    """Carries measurements from a run to its file, our table and Optuna's, in order and once."""

    def __init__(self, study: Study, claim: Claim, journal: Journal) -> None:
        self._study = study
        self._claim = claim
        self._journal = journal
        self._known: set[int] = set()
        self._unstored: list[MeasurementRow] = []
        self._unreported: list[tuple[int, float]] = []
        self.last_step: int | None = None

    def resume(self) -> None:
        """Take up what earlier attempts had measured; the next flush brings the tables up to it."""
        stored = self._study.store.measurements(self._study.id, [self._claim.number])[self._claim.number]
        metric = self._study.spec.objective.metric
        self._known = {row.step for row in stored}
        self._unreported = [(row.step, row.metrics[metric]) for row in stored]
        for row in self._journal.read_all():
            if row.step not in self._known:
                self._enqueue(row)
        self.last_step = max(self._known, default=None)

    def add(self, measurement: Measurement) -> None:
        row = MeasurementRow(measurement.step, measurement.metrics, measurement.elapsed_s)
        self.last_step = row.step
        # A resumed trainer yields the measurement of its checkpoint once more.
        if row.step not in self._known:
            self._journal.append(row)
            self._enqueue(row)

    def _enqueue(self, row: MeasurementRow) -> None:
        self._known.add(row.step)
        self._unstored.append(row)
        self._unreported.append((row.step, row.metrics[self._study.spec.objective.metric]))

    def flush(self) -> int:
        """Write what is not written yet; returns the number of ended runs.

        Raises:
            Fenced: another worker owns the trial.
            DatabaseUnavailable: everything stays queued for the next call.
        """
        study, claim = self._study, self._claim
        n_ended = study.store.record(study.id, claim.number, claim.attempt, self._unstored)
        self._unstored.clear()
        while self._unreported:
            study.search.report(claim.trial, *self._unreported[0])
            self._unreported.pop(0)
        return n_ended


def reason_of(error: BaseException) -> str:
    """One line for the table: the kind of error and its first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def load_data(trainer: Any, spec_data: Mapping[str, Any], options: WorkerOptions) -> Any:
    data = DataSpec(
        trainer.Data.model_validate(spec_data),
        Path(options.data_path),
        Path(options.cache),
        options.data_path_given,
    )
    return trainer.load(data, SEARCH_ROLES)


def _stop_on_signals(stop: threading.Event) -> None:
    def handler(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)

    def watch_parent() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()


def serve(options: WorkerOptions, url: str, stop: threading.Event) -> dict[str, float]:
    """Open study, data and lease, then work.

    Returns:
        `serve_s`, the time from the first claim to the end, and `fit_s`, the part of it inside the trainer.

    Raises:
        InputError, and what Worker.serve raises.
    """
    database = Database(url)
    try:
        study = Study.open(database, options.study)
        row = study.store.get_study(study.id)
        trainer = models.get_trainer(study.spec.trainer)
        data = load_data(trainer, study.spec.data, options)
        expected = json.loads(row.data)["data_hash"]
        if data.manifest.data_hash != expected:
            raise InputError(
                f"{options.data_path}: expected data {expected[:12]}, got {data.manifest.data_hash[:12]}; "
                "the files changed since the study began: use --name NEW"
            )
        worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), options.device)
        try:
            with LeaseThread(lambda: study.store.renew(worker_id), options.renew_every_s) as lease:
                worker = Worker(study, trainer, data, worker_id, options, stop, lambda: lease.steady)
                started = time.monotonic()
                worker.serve()
                return {"serve_s": time.monotonic() - started, "fit_s": worker.fit_s}
        finally:
            # Also where it gives up: other hosts need not wait for its lease to run out.
            study.store.end_worker(worker_id)
    finally:
        database.close()


def main() -> int:
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s pid=%(process)d %(message)s",
    )
    stop = threading.Event()
    _stop_on_signals(stop)
    # What a trainer prints belongs to the log; it would fill a pipe that nobody reads before the end.
    coordinator = os.dup(1)
    os.dup2(2, 1)
    options = WorkerOptions(**json.loads(sys.argv[1]))
    ending: dict[str, Any] = {"reason": None}
    code = 0
    try:
        ending |= serve(options, os.environ["TUNER_STORAGE"], stop)
    except (TooManyFailures, DatabaseUnavailable) as error:  # neither is anybody's bad input
        ending["reason"], code = str(error), FAILED_EXIT
        log.error("worker stops: action=failed %s", error)
    except (InputError, StorageError, DiskError) as error:
        ending["reason"], code = str(error), REFUSED_EXIT
        log.error("worker stops: action=refused %s", error)
    with suppress(BrokenPipeError):  # the coordinator died
        os.write(coordinator, json.dumps(ending).encode() + b"\n")
    return code


def arguments(options: WorkerOptions) -> list[str]:
    """The command line of a worker process."""
    return [sys.executable, "-m", "tuner.worker", json.dumps(asdict(options))]


if __name__ == "__main__":
    sys.exit(main())
