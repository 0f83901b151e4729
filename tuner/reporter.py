"""The way of a measurement: the run's append-only file, our table, Optuna's table; in order, and once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.trainer import DiskError, Measurement
from storage.runs import Fenced, MeasurementRow, Recorded
from tuner.study import Claim, Study


class Journal:
    """The measurements of a run in append-only files, one per attempt, beside its checkpoints.

    A measurement is on the disk before it is in the database. A torn last line (killed while writing) is skipped.
    """

    NAME = "measurements.jsonl"

    def __init__(self, directory: Path, attempt: int) -> None:
        self._directory = directory
        self._attempt = attempt
        self._path = directory / f"attempt-{attempt}" / self.NAME

    def append(self, measurement: MeasurementRow, curves: Mapping[str, Any] | None = None) -> None:
        """Raises DiskError when the disk refuses."""
        content = {
            "step": measurement.step,
            "elapsed_s": measurement.elapsed_s,
            "metrics": dict(measurement.metrics),
        }
        line = json.dumps(content if curves is None else {**content, "curves": curves})
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
        found = {row.step: row for row, _ in self._lines()}
        return [found[step] for step in sorted(found)]

    def curves_at(self, steps: set[int]) -> Mapping[str, Any] | None:
        """The curves of the newest of these steps that has some."""
        found = {row.step: curves for row, curves in self._lines() if row.step in steps and curves}
        return found[max(found)] if found else None

    def _lines(self) -> Iterator[tuple[MeasurementRow, Mapping[str, Any] | None]]:
        files = {int(path.parent.name[8:]): path for path in self._directory.glob(f"attempt-*/{self.NAME}")}
        for attempt in sorted(files):
            if attempt > self._attempt:
                break
            for line in files[attempt].read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                yield MeasurementRow(row["step"], row["metrics"], row["elapsed_s"], attempt), row.get("curves")


class Reporter:
    """Carries one attempt's measurements to their three places.

    An attempt goes on where its newest checkpoint is. Steps that an earlier attempt measured beyond it, on another
    machine or with a checkpoint that was found damaged, are measured again, and the new ones take their place.
    """

    def __init__(self, study: Study, claim: Claim, directory: Path) -> None:
        self._study = study
        self._claim = claim
        self._directory = directory
        self._journal = Journal(directory, claim.attempt)
        self._known: set[int] = set()
        self._unstored: list[MeasurementRow] = []
        self._unreported: list[tuple[int, float]] = []
        self._curves: Mapping[str, Any] | None = None
        self._superseded_after: int | None = None  # a step; what lies beyond it is still to be removed
        self._begun = False
        self.last_step: int | None = None

    def resume(self) -> None:
        """Take up what earlier attempts had measured; the next flush brings the tables up to it."""
        stored = self._study.store.measurements(self._study.id, [self._claim.number])[self._claim.number]
        metric = self._study.spec.objective.metric
        self._known = {row.step for row in stored}
        self._unstored.clear()
        self._unreported = [(row.step, row.metrics[metric]) for row in stored]
        for row in self._journal.read_all():
            if row.step not in self._known:
                self._enqueue(row)
        self._curves = self._journal.curves_at({row.step for row in self._unstored})
        self.last_step = max(self._known, default=None)

    def add(self, measurement: Measurement) -> bool:
        """Take up a measurement; False where it is that of the checkpoint from which the attempt goes on, which is
        known."""
        attempt = self._measured_by(measurement.step)
        if not self._begun:
            self._begun = True
            # A first step that this attempt trained itself supersedes the older measurement of that step too.
            first_kept = measurement.step - (attempt == self._claim.attempt)
            if any(step > first_kept for step in self._known):
                self._supersede(first_kept)
        self.last_step = measurement.step
        if measurement.curves is not None:
            self._curves = {"step": measurement.step, **measurement.curves}
        # A resumed trainer yields the measurement of its checkpoint once more.
        if measurement.step in self._known:
            return False
        row = MeasurementRow(measurement.step, measurement.metrics, measurement.elapsed_s, attempt)
        self._journal.append(row, self._curves if measurement.curves is not None else None)
        self._enqueue(row)
        return True

    def _measured_by(self, step: int) -> int:
        """The attempt whose folder has the step's checkpoint, which is there before the step is yielded."""
        for attempt in range(self._claim.attempt, 0, -1):
            if (self._directory / f"attempt-{attempt}" / f"step-{step:05d}").exists():
                return attempt
        return self._claim.attempt

    def _supersede(self, after_step: int) -> None:
        self._superseded_after = after_step
        self._known = {step for step in self._known if step <= after_step}
        self._unstored = [row for row in self._unstored if row.step <= after_step]
        self._unreported = [(step, value) for step, value in self._unreported if step <= after_step]
        if self._curves is not None and self._curves["step"] > after_step:
            self._curves = None

    def _enqueue(self, row: MeasurementRow) -> None:
        self._known.add(row.step)
        self._unstored.append(row)
        self._unreported.append((row.step, row.metrics[self._study.spec.objective.metric]))

    def flush(self) -> Recorded:
        """Write what is not written yet.

        Raises:
            Fenced: another worker owns the trial.
            DatabaseUnavailable: everything stays queued for the next call.
        """
        study, claim = self._study, self._claim
        if self._superseded_after is not None:
            with study.lock():  # nobody claims the trial between the look and what follows
                if not study.store.is_current(study.id, claim.number, claim.attempt):
                    raise Fenced(f"trial {claim.number}: attempt {claim.attempt} is no longer the current one")
                # Optuna's first: killed in between, what is left of ours tells the next attempt what to do.
                study.search.forget(claim.trial, self._superseded_after)
                study.store.supersede(study.id, claim.number, claim.attempt, self._superseded_after)
            self._superseded_after = None
        recorded = study.store.record(study.id, claim.number, claim.attempt, self._unstored, self._curves)
        self._unstored.clear()
        self._curves = None
        while self._unreported:
            study.search.report(claim.trial, *self._unreported[0])
            self._unreported.pop(0)
        return recorded
