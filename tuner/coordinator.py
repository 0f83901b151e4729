"""`tuner run`: makes or continues a study, starts one worker per device, and sees them through.

The coordinator trains nothing and owns no trial. Whatever dies, everything it needs to go on is in the database.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import models
from models.trainer import DataSpec, InputError, Manifest
from storage.database import Database, DatabaseUnavailable
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.runs import Store, StudyRow
from storage.tables import create_schema
from tuner.catalog import check_database
from tuner.optuna_study import IGNORES_CONSTRAINTS, Search, create_optuna_schema
from tuner.spec import MAX_NAME, STUDY_NAME, Spec, check_spec, differences, load_spec
from tuner.study import Study
from tuner.summary import StudySummary, as_json, summarize
from tuner.worker import REFUSED_EXIT, WorkerOptions, arguments

log = logging.getLogger("tuner")

POLL_S = 0.5
# Workers that die this often in a row without one new measurement anywhere stop the study.
MAX_BARREN_DEATHS = 6


@dataclass(frozen=True)
class RunOptions:
    """What `tuner run` was asked for; None leaves it to the specification or to the machine."""

    study: str
    n_trials: int | None = None
    name: str | None = None
    data: str | None = None
    storage: str = "sqlite:///runs/tuner.db"
    devices: str = "auto"
    workers: int | None = None
    timeout_s: float | None = None
    seed: int | None = None
    retry_failed: bool = False
    overrides: tuple[str, ...] = ()
    runs: str = "runs"
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S

    @property
    def cache(self) -> Path:
        return Path(self.runs) / "cache"

    def data_path(self, spec: Spec) -> Path:
        """Where the data are: as asked for, else as the specification says."""
        return Path(spec.data.get("path", "data") if self.data is None else self.data)


class Observer(Protocol):
    """Who is shown the progress of a run."""

    def say(self, line: str) -> None:
        """One line worth keeping."""
        ...

    def show(self, summary: StudySummary, started: float) -> None:
        """The study as it is now; `started` is the monotonic time at which this run began."""
        ...


class RunFailed(Exception):
    """The run stopped before its total was reached; the message says why."""


def read_spec(options: RunOptions) -> tuple[Spec, Any]:
    """The checked specification and its trainer. Raises SpecError with every fault."""
    if options.name is not None and not (re.fullmatch(STUDY_NAME, options.name) and len(options.name) <= MAX_NAME):
        raise InputError(
            f"--name: expected letters, digits, '.', '_' and '-', a letter or digit first, at most {MAX_NAME}, "
            f"got {options.name!r}"
        )
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    spec = load_spec(options.study, overrides)
    trainer = models.get_trainer(spec.trainer)
    check_spec(spec, trainer)
    return spec, trainer


def data_spec(spec: Spec, trainer: Any, options: RunOptions) -> DataSpec:
    given = options.data is not None
    return DataSpec(trainer.Data.model_validate(spec.data), options.data_path(spec), options.cache, given)


def choose_devices(devices: str, workers: int | None) -> list[str]:
    """One device a worker process.

    `auto`: every CUDA device, else one CPU worker per core (each gets one thread: two threads that share a busy
    core were ten times slower). With `workers` the devices are dealt in turn to that many processes.
    """
    cuda = models.cuda_devices() if devices != "cpu" else []
    if devices == "auto":
        chosen = cuda or ["cpu"] * len(os.sched_getaffinity(0))
    elif devices == "cpu":
        chosen = ["cpu"] * (workers or len(os.sched_getaffinity(0)))
    else:
        chosen = [name.strip() for name in devices.split(",")]
        for name in chosen:
            if name not in ["cpu", *cuda]:
                raise InputError(
                    f"--devices: expected auto, cpu or some of {', '.join(['cpu', *cuda])}, got {name!r}"
                )
    if workers is not None:
        if workers < 1:
            raise InputError(f"--workers: expected at least 1, got {workers}")
        chosen = [chosen[i % len(chosen)] for i in range(workers)]
    return chosen


def open_study(spec: Spec, manifest: Manifest, options: RunOptions, database: Database) -> Study:
    """Create the study, or continue it if what was asked for is what it is.

    Raises:
        InputError: the study exists and differs in what makes its trials comparable; names every difference.
    """
    name = options.name or spec.study
    store = Store(database)
    if not check_database(database) or store.find_study(name) is None:
        _refuse_others(Path(options.runs) / name, options, database)
        _refuse_leftovers(Path(options.runs) / name)
    create_schema(database)
    create_optuna_schema(database)
    data = {
        "data_hash": manifest.data_hash, "source": manifest.source, "simulated": manifest.simulated,
        "rows": dict(manifest.rows), "files": dict(manifest.files),
    }  # fmt: skip
    n_trials = options.n_trials or spec.n_trials
    with database.exclusive("studies"):
        row = store.find_study(name)
        if row is None:
            search = Search(database, spec, name, create=True)
            row = store.create_study(name, spec.to_json(), json.dumps(data), version("tuner"), n_trials)
            return Study(database, row, spec, search)
    refused = refusals(row, spec, manifest)
    if refused:
        raise InputError(
            f"study {name!r} exists and differs: {'; '.join(refused)}. "
            f"Use --name NEW for a new study, or `tuner delete --study {name} --yes`"
        )
    if row.package_version != version("tuner"):
        log.warning("study %s was begun with tuner %s, this is %s", name, row.package_version, version("tuner"))
    # What was free to change is taken over: workers read the stored specification.
    store.update_study(row.id, spec.to_json(), version("tuner"))
    return Study(database, row, spec, Search(database, spec, name))


def refusals(row: StudyRow, spec: Spec, manifest: Manifest) -> list[str]:
    """What keeps a stored study from going on with this specification and these data."""
    refused = differences(Spec.from_json(row.spec), spec)
    was = json.loads(row.data)
    if was["data_hash"] != manifest.data_hash:
        refused.append(
            f"data: {was['source']} ({was['data_hash'][:12]}) -> {manifest.source} ({manifest.data_hash[:12]})"
        )
    return refused


def _refuse_others(folder: Path, options: RunOptions, database: Database) -> None:
    """The cache and the database lie beside the studies; deleting a study of their name would take them along."""
    database_files = (
        [f"{database.path}{end}" for end in ("", "-wal", "-shm", ".lock")] if database.is_sqlite else []
    )
    if folder == options.cache or str(folder.absolute()) in database_files or folder.is_file():
        raise InputError(
            f"{folder}: expected a folder for the study, got the place of something else; use --name NEW"
        )


def _refuse_leftovers(folder: Path) -> None:
    """A new study must not take up the checkpoints of another one, whose database was removed or is not this."""
    if any((folder / "trials").glob("*")):
        raise InputError(
            f"{folder}: expected no trials of a new study, got those of another database; move the folder away, "
            "or use --name NEW or another --runs"
        )


def run(options: RunOptions, observer: Observer) -> tuple[StudySummary, int]:
    """Run a study to its total of ended trials.

    Returns:
        The study at the end, and the exit code: 0 the total is reached or the time is up, 130 interrupted.

    Raises:
        InputError, StorageError: refused, nothing was written.
        RunFailed: the run cannot go on; what was done is kept.
    """
    devices = choose_devices(options.devices, options.workers)
    spec, trainer = read_spec(options)
    database = Database(options.storage)
    try:
        check_database(database)  # before data are prepared, which may take long
        manifest = trainer.load(data_spec(spec, trainer, options), frozenset()).manifest
        study = open_study(spec, manifest, options, database)
        return _run(study, manifest, devices, options, observer)
    finally:
        database.close()


def _run(
    study: Study, manifest: Manifest, devices: Sequence[str], options: RunOptions, observer: Observer
) -> tuple[StudySummary, int]:
    observer.say(f"data: {manifest.source}")
    if study.spec.sampler.name in IGNORES_CONSTRAINTS:
        observer.say(
            f"sampler {study.spec.sampler.name}: ignores the constraint while searching; the best is still feasible"
        )
    trials = study.recover()
    n_failed = sum(trial.state == "failed" for trial in trials)
    row = study.store.get_study(study.id)
    wanted = options.n_trials or study.spec.n_trials
    if options.n_trials is not None and wanted < row.n_trials:
        observer.say(
            f"n-trials: the study's total is {row.n_trials} already and is never lowered (asked for {wanted})"
        )
    study.store.start_study(study.id, wanted, n_failed if options.retry_failed else 0)
    total = study.store.get_study(study.id).total
    n_ended = sum(trial.ended for trial in trials)
    started = time.monotonic()
    code = 0
    spent: Mapping[str, float] = {}
    fault: InputError | RunFailed | None = None
    if n_ended >= total:
        observer.say(f"study {study.name}: all {total} trials have ended, nothing is to do")
    else:
        observer.say(f"study {study.name}: {n_ended} of {total} trials ended; workers: {', '.join(devices)}")
        crew = _Crew(study, devices, options, observer, started)
        try:
            code = crew.see_through()
        except (InputError, RunFailed) as error:
            fault = error
        spent = {**crew.time_s, "wall_s": time.monotonic() - started}
    study.recover()
    summary = summarize(study)
    write_results(summary, options, spent)
    if fault is not None:
        raise fault
    return summary, code


def write_results(summary: StudySummary, options: RunOptions, spent: Mapping[str, float]) -> Path:
    """results.json of the study, replaced whole; `spent` is the time of this run of it."""
    folder = Path(options.runs) / summary.name
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"results.json.{os.getpid()}"
    temporary.write_text(json.dumps({**as_json(summary), "this_run": dict(spent)}, indent=2) + "\n")
    os.replace(temporary, folder / "results.json")
    return folder / "results.json"


class _Crew:
    """The worker processes of one run."""

    def __init__(
        self, study: Study, devices: Sequence[str], options: RunOptions, observer: Observer, started: float
    ) -> None:
        self._study = study
        self._options = options
        self._observer = observer
        self._started = started
        self._devices = dict(enumerate(devices))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._interrupts = 0
        self._barren_deaths = 0
        self._n_measured = -1
        self._next_show = 0.0
        self.time_s = {"serve_s": 0.0, "fit_s": 0.0}  # over all workers that ended in order
        self._logs = Path(options.runs) / study.name / "logs"
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--runs {options.runs}: expected a folder to write to, got {error.strerror}; name another"
            ) from error

    def see_through(self) -> int:
        """Start the workers and wait for the total, the timeout, an interrupt or a fault."""
        previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for slot in self._devices:
                self._start(slot)
            self._watch()
        finally:
            for process in self._processes.values():
                with process:  # waits, and closes its pipes
                    process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 130 if self._interrupts else 0

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupts += 1

    def _start(self, slot: int) -> None:
        options, device = self._options, self._devices[slot]
        worker = WorkerOptions(
            study=self._study.name, device=device, runs=str(Path(options.runs).absolute()),
            data_path=str(options.data_path(self._study.spec)), data_path_given=options.data is not None,
            cache=str(options.cache.absolute()), renew_every_s=options.renew_every_s, grace_s=options.grace_s,
        )  # fmt: skip
        environment = {
            **os.environ,
            "TUNER_STORAGE": self._study.database.url.render_as_string(hide_password=False),
            **(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") if device == "cpu" else {}),
        }
        with (self._logs / f"worker-{slot}.log").open("ab") as log_file:
            # Its own session: Ctrl-C reaches the coordinator alone, which then asks the workers to stop.
            self._processes[slot] = subprocess.Popen(
                arguments(worker), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def _watch(self) -> None:
        stopping = False
        patience = 1  # interrupts that are asked for in order; after a stop of another kind the first is at once
        fault: InputError | RunFailed | None = None
        while self._processes:
            for slot, process in self._reap():
                told = _ending(process)
                if process.returncode == 0 and told:
                    self.time_s = {key: self.time_s[key] + told[key] for key in self.time_s}
                    continue
                if told and told["reason"]:
                    kind = InputError if process.returncode == REFUSED_EXIT else RunFailed
                    fault = fault or kind(told["reason"])
                elif not self._died(slot, process):
                    fault = fault or RunFailed(
                        f"worker processes keep dying (exit {process.returncode}); see {self._logs}"
                    )
                elif not stopping and fault is None:
                    self._start(slot)
            timed_out = (
                self._options.timeout_s is not None and time.monotonic() - self._started > self._options.timeout_s
            )
            if (self._interrupts or timed_out or fault) and not stopping:
                stopping = True
                word = "interrupted" if self._interrupts else "time is up" if timed_out else "stopping"
                again = "again" if self._interrupts else "Ctrl-C"
                patience = 1 if self._interrupts else 0
                self._observer.say(f"{word}: workers stop at their next measurement ({again} to stop at once)")
                for process in self._processes.values():
                    process.stdin.close()  # type: ignore[union-attr]
            if self._interrupts > patience:
                return
            self._show()
            time.sleep(POLL_S)
        if fault is not None:
            raise fault

    def _reap(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        ended = [(slot, process) for slot, process in self._processes.items() if process.poll() is not None]
        for slot, _ in ended:
            del self._processes[slot]
        return ended

    def _died(self, slot: int, process: subprocess.Popen[bytes]) -> bool:
        """Note a death without a word; True when a new worker may take its place."""
        log.warning("worker died: action=worker_died slot=%d exit=%d", slot, process.returncode)
        try:
            self._study.recover(crashed=True)
            n_measured = self._study.store.count_measurements(self._study.id)
        except DatabaseUnavailable as error:
            log.warning("its trial is left to the next claim: action=outage %s", error)
            return True
        self._barren_deaths = self._barren_deaths + 1 if n_measured == self._n_measured else 1
        self._n_measured = n_measured
        return self._barren_deaths < MAX_BARREN_DEATHS

    def _show(self) -> None:
        begun = time.monotonic()
        if begun < self._next_show:
            return
        try:
            self._observer.show(summarize(self._study), self._started)
        except DatabaseUnavailable as error:
            log.warning("progress not read: %s", error)
        # A large study takes long to read: never spend more than a twentieth of a core on looking.
        self._next_show = begun + max(1.0, 20 * (time.monotonic() - begun))


def _ending(process: subprocess.Popen[bytes]) -> Mapping[str, Any] | None:
    """The last line a worker printed; None when it died without one."""
    with process:  # closes its pipes
        output = process.stdout.read() if process.stdout else b""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
