"""`tuner evaluate`: the best configurations of a study trained again with several seeds, then judged.

An evaluation is number k of its study. Its fits are the trials of a study of their own in the same database,
`STUDY.evaluation-k`, so that they are queued, leased, resumed and shown like all others.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import models
from models.trainer import InputError, Role
from storage.artifacts import open_artifacts
from storage.database import Database, StorageError, retry
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.rows import EvaluationRow
from storage.runs import Store
from tuner.background import EVALUATE_LOCK, running_alone
from tuner.catalog import find_name, open_database
from tuner.coordinator import EVALUATION_NAME, Observer, Watch, create_study, local_crew, refuse_leftovers
from tuner.crew import POLL_S, RunFailed, choose_devices
from tuner.plan import Plan, make_plan, spec_of_fits
from tuner.spec_checks import load_spec
from tuner.study import Study
from tuner.summary import summarize
from tuner.worker import AUTO, OUTAGE_S, STOP_GRACE_S, UPLOAD_EVERY_S, WorkerOptions
from tuner.worker_process import load_data, own_folder

log = logging.getLogger("tuner")

INTERRUPTED = 130
# Who waits for workers elsewhere asks no more often than this.
WAIT_POLL_S = 2.0
DEFAULT_ROOT = "data"


@dataclass(frozen=True)
class EvaluateOptions:
    """What `tuner evaluate` was asked for.

    Args:
        study: the name of a stored study, or a reference to its specification.
        data: folder or file below which the data are found by their content; None: `data`, or the YAML's own.
        seeds: fits of every configuration; only ever raised.
        top: configurations of every arm.
        nominees: how many models are certified, each at its share of what the decision may be wrong.
        devices: as for `tuner run`; `none`: wait for the workers of the service.
    """

    study: str
    name: str | None = None
    data: str | None = None
    seeds: int = 5
    top: int = 1
    nominees: int = 1
    n_replicates: int = 2000
    devices: str = "auto"
    workers: int | None = None
    storage: str = "sqlite:///runs/tuner.db"
    runs: str = "runs"
    slots: int | Literal["auto"] = AUTO
    artifacts: str | None = None
    upload_every_s: float = UPLOAD_EVERY_S
    stop_grace_s: float = STOP_GRACE_S
    outage_s: float = OUTAGE_S
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S


def evaluate(options: EvaluateOptions, observer: Observer) -> tuple[dict[str, Any], int]:
    """Train a study's best configurations again with several seeds, then come to the verdict.

    Returns:
        The document, and the exit code: 0; 130 interrupted, with an empty document. The same call goes on from
        there; of an evaluation that has ended it returns the document.

    Raises:
        InputError, StorageError: refused before anything was trained.
        RunFailed: it cannot go on; what was done is kept.
    """
    devices = [] if options.devices == "none" else choose_devices(options.devices, options.workers)
    if options.artifacts:
        open_artifacts(options.artifacts)
    database = open_database(options.storage, read_only=False)
    try:
        name = _name_of(database, options)
        with running_alone(Path(options.runs) / name, EVALUATE_LOCK):
            return _Evaluation(Study.open(database, name), devices, options, observer).reach()
    finally:
        database.close()


def _name_of(database: Database, options: EvaluateOptions) -> str:
    name = find_name(database, options.study, options.name)
    _refuse_fits(Store(database), name)
    return name


def _refuse_fits(store: Store, name: str) -> None:
    if store.find_evaluation(name) is not None:
        of = EVALUATION_NAME.fullmatch(name)
        raise InputError(
            f"study {name!r}: expected a study that was searched, got the fits of an evaluation; "
            f"use --study {of[1] if of else 'of the search'}"
        )


class _Evaluation:
    """One call of `evaluate`."""

    def __init__(
        self, study: Study, devices: Sequence[str], options: EvaluateOptions, observer: Observer
    ) -> None:  # fmt: skip
        self.study, self.options, self.observer = study, options, observer
        self.database, self.store, self.devices = study.database, study.store, devices
        self.row = self.store.get_study(study.id)
        self.stored = json.loads(self.row.data)
        self.trainer = models.get_trainer(study.spec.trainer)
        self.worker = self._worker_options()

    def reach(self) -> tuple[dict[str, Any], int]:
        self.study.recover()
        summary = summarize(self.study)
        options = self.options
        plan = make_plan(summary, options.top, options.seeds, options.nominees, options.n_replicates)
        # Refused here, before anything is written: data that are gone, or others than the study's.
        self.observer.say(f"data: {self._data(frozenset()).manifest.source}")
        evaluation = self._find(plan)
        if evaluation is None and summary.n_ended < self.row.total and self.row.stop is None:
            self.observer.say(
                f"study {self.study.name}: {summary.n_ended} of {self.row.total} trials have ended; what is "
                "evaluated is the best so far"
            )
        evaluation = evaluation or self._begin(plan)
        plan = self._as_begun(evaluation, plan)
        if (document := self._finished(evaluation, plan)) is not None:
            self.observer.say(f"evaluation {evaluation.name}: it has ended before; this is its document")
            return document, 0
        fits = self._fits(evaluation, plan)
        for entry in plan.left_out:
            self.observer.say(f"arm {entry['arm']}: left out: {entry['reason']}")
        if not self._train(evaluation, fits, plan):
            return {}, INTERRUPTED
        self._tell_of_failures(fits)
        from tuner.verdict import conclude

        document = conclude(
            self.study, evaluation, fits, plan, self.trainer, self._data, self.options, self.observer.say
        )
        return document, 0

    # --- data ------------------------------------------------------------------------------------------------

    def _worker_options(self) -> WorkerOptions:
        """How data are found, here and by our workers: by their content, where they come from files."""
        options, data = self.options, self.options.data
        located = bool(self.stored["files"]) and not self.stored["simulated"]
        roots = [] if data is None else [data]
        if data is None:
            roots = [DEFAULT_ROOT]
            with suppress(InputError):  # a specification beside us knows where its data lie
                roots.append(str(load_spec(options.study).data.get("path", DEFAULT_ROOT)))
        runs = Path(options.runs).absolute()
        return WorkerOptions(
            device="", runs=str(runs), cache=str(runs / "cache"),
            data_path=None if located or data is None else data, data_path_given=data is not None,
            roots=tuple(str(Path(root).absolute()) for root in roots), artifacts=options.artifacts,
            upload_every_s=options.upload_every_s, slots=options.slots, stop_grace_s=options.stop_grace_s,
            outage_s=options.outage_s,
            renew_every_s=options.renew_every_s, grace_s=options.grace_s,
        )  # fmt: skip

    def _data(self, roles: frozenset[Role]) -> Any:
        return load_data(self.trainer, self.study.spec.data, self.stored, self.worker, roles)

    # --- which evaluation ------------------------------------------------------------------------------------

    def _find(self, plan: Plan) -> EvaluationRow | None:
        rows = self.store.evaluations(self.study.id)
        return next((row for row in rows if Plan.from_json(row.plan).same_fits(plan)), None)

    def _begin(self, plan: Plan) -> EvaluationRow:
        """The next evaluation. Of one with another plan nothing more is trained, to waste no worker's time.

        Its number is new even where a study of this name was deleted: what that one saw, certified and registered
        stands under its evaluations' names.
        """
        former = self.store.evaluations(self.study.id)
        for row in former:
            fits = self.store.find_study(row.name)
            if row.document is None and fits is not None and not Study.open(self.database, row.name).is_over():
                self.store.stop_study(fits.id, "drain")
                self.observer.say(f"evaluation {row.name}: has another plan and is stopped, as a new one begins")
        looked = (EVALUATION_NAME.match(name) for name in self.store.looked_by(self.study.name))
        number = max([0, *(row.number for row in former), *(int(of[2]) for of in looked if of)]) + 1
        name = f"{self.study.name}.evaluation-{number}"
        if self.store.find_study(name) is not None:
            raise InputError(f"study {name!r}: expected no study of an evaluation's name, got one; delete it")
        return self.store.create_evaluation(self.study.id, number, name, plan.as_json())

    def _as_begun(self, evaluation: EvaluationRow, asked: Plan) -> Plan:
        """The stored plan, with as many seeds as it has by now, or more if more are asked for."""
        plan = Plan.from_json(evaluation.plan)
        fits = self.store.find_study(evaluation.name)
        seeds = plan.seeds if fits is None else fits.n_trials // len(plan.arms)
        if asked.seeds < seeds:
            self.observer.say(f"seeds: the evaluation has {seeds} and goes on with them (asked for {asked.seeds})")
        return replace(plan, seeds=max(seeds, asked.seeds), n_replicates=asked.n_replicates)

    def _fits(self, evaluation: EvaluationRow, plan: Plan) -> Study:
        """The study of the fits, made where it is not there (yet)."""
        with self.database.exclusive("studies"):
            if self.store.find_study(evaluation.name) is not None:
                return Study.open(self.database, evaluation.name)
            refuse_leftovers(Path(self.options.runs) / evaluation.name, self.options.artifacts)
            spec = spec_of_fits(self.study.spec, plan)
            return create_study(self.database, evaluation.name, spec, self.row.data, plan.n_fits)

    def _finished(self, evaluation: EvaluationRow, plan: Plan) -> dict[str, Any] | None:
        """The document of an evaluation that was asked the same before."""
        document = evaluation.document
        if document is None or (document["seeds"], document["n_replicates"]) != (plan.seeds, plan.n_replicates):
            return None
        question, answer = self.study.spec.compared, document["verdict"]
        if question is not None and answer is not None:
            told = (answer["against"], answer["arm"], answer["min_gain"], answer["reading"])
            if told != (question.baseline, question.treatment, question.min_gain, question.reading):
                return None
        return document

    # --- the fits --------------------------------------------------------------------------------------------

    def _train(self, evaluation: EvaluationRow, fits: Study, plan: Plan) -> bool:
        """See every fit to its end; False when interrupted."""
        own_folder(Path(self.options.runs) / fits.name, self.store.get_study(fits.id))
        n_ended = sum(trial.ended for trial in fits.recover())
        if n_ended >= plan.n_fits:
            return True
        self.store.start_study(fits.id, plan.n_fits, 0)
        self.store.queue_study(fits.id)
        self.observer.say(
            f"evaluation {evaluation.name}: {len(plan.arms)} configurations with {plan.seeds} seeds each; "
            f"{n_ended} of {plan.n_fits} fits ended; "
            f"workers: {', '.join(self.devices) or 'those of the service (tuner worker)'}"
        )
        started = time.monotonic()
        watch = Watch(fits, self.observer, started)
        try:
            if self.devices:
                crew = local_crew(fits, self.devices, replace(self.worker, studies=(fits.name,)), self.observer)
                interrupted = crew.see_through(watch.tick) > 0
            else:
                interrupted = self._wait(fits, watch)
        finally:
            watch.close()
        if interrupted:
            return False
        ended = sum(trial.ended for trial in fits.recover())
        if ended < plan.n_fits:
            self._tell_of_failures(fits)
            raise RunFailed(
                f"evaluation {fits.name}: expected {plan.n_fits} ended fits, got {ended}: it was stopped, by "
                "`tuner stop` or after too many failures in a row; the same command goes on"
            )
        return True

    def _wait(self, fits: Study, watch: Watch) -> bool:
        """Until workers elsewhere have ended every fit; True when interrupted."""
        asked = -WAIT_POLL_S
        try:
            while True:
                if time.monotonic() - asked >= WAIT_POLL_S:
                    asked = time.monotonic()
                    if retry(fits.is_over, self.options.outage_s, "count"):
                        return False
                watch.tick()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            return True

    def _tell_of_failures(self, fits: Study) -> None:
        for run in self.store.runs(fits.id):
            if run.failure:
                self.observer.say(f"fit {run.number} ({run.arm}) failed: {run.failure}")


def newest_document(database: Database, study: str, number: int | None = None) -> dict[str, Any]:
    """The document of a study's newest finished evaluation, or of one of them.

    Raises:
        InputError: there is none, or the study is the fits of one. StorageError: no such study.
    """
    store = Store(database)
    row = store.find_study(study)
    if row is None:
        raise StorageError(f"storage: study {study!r} is not in {database!r}")
    _refuse_fits(store, study)
    rows = store.evaluations(row.id)
    ended = [row for row in rows if row.document is not None and number in (None, row.number)]
    if ended:
        return dict(ended[-1].document or {})
    there = ", ".join(f"{row.number} ({'ended' if row.document else 'not ended'})" for row in rows) or "none"
    which = "an evaluation that has ended" if number is None else f"evaluation {number}, ended"
    raise InputError(
        f"study {study!r}: expected {which}, got {there}; `tuner evaluate --study {study}` makes one or goes on"
    )
