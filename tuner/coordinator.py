"""`tuner run`: makes or continues a study, starts one worker per device, and sees them through.

The coordinator trains nothing and owns no trial. Whatever dies, everything it needs to go on is in the database.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import models
from models.trainer import SEARCH_ROLES, DataSpec, InputError, Manifest
from storage.artifacts import open_artifacts
from storage.database import Database, DatabaseUnavailable
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.runs import Store, StudyRow
from storage.tables import create_schema
from tuner.background import running_alone
from tuner.catalog import check_database
from tuner.crew import Crew, RunFailed, choose_devices
from tuner.formats import duration
from tuner.notify import Notifier
from tuner.optuna_study import IGNORES_CONSTRAINTS, Search, create_optuna_schema
from tuner.spec import MAX_NAME, STUDY_NAME, Spec, differences
from tuner.spec_checks import check_spec, load_spec
from tuner.study import Study
from tuner.summary import StudySummary, as_json, summarize
from tuner.uploads import Uploads
from tuner.worker import AUTO, OUTAGE_S, STOP_GRACE_S, UPLOAD_EVERY_S, WorkerOptions
from tuner.worker_process import peak_bytes

if TYPE_CHECKING:
    from tuner.ray_launcher import RayCrew

log = logging.getLogger("tuner")

# The study that holds the fits of a study's evaluation k.
EVALUATION_NAME = re.compile(r"(.+)\.evaluation-(\d+)")
# What lies beside the studies in the folder of runs and in the artifact store: to be deleted with no study.
RESERVED_NAMES = ("cache", "models", "worker-logs")


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
    slots: int | Literal["auto"] = AUTO
    artifacts: str | None = None
    upload_every_s: float = UPLOAD_EVERY_S
    stop_grace_s: float = STOP_GRACE_S
    launcher: str = "local"
    outage_s: float = OUTAGE_S
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


def read_spec(options: RunOptions) -> tuple[Spec, Any]:
    """The checked specification and its trainer. Raises SpecError with every fault."""
    if options.name is not None:
        check_name("--name", options.name)
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    spec = load_spec(options.study, overrides)
    if options.name is None:
        check_name("study", spec.study)
    trainer = models.get_trainer(spec.trainer)
    check_spec(spec, trainer)
    return spec, trainer


def check_name(where: str, name: str) -> None:
    """Raises InputError where a study cannot be called so; `where` says who wants to."""
    if not (re.fullmatch(STUDY_NAME, name) and len(name) <= MAX_NAME):
        raise InputError(
            f"{where}: expected letters, digits, '.', '_' and '-', a letter or digit first, at most {MAX_NAME}, "
            f"got {name!r}"
        )
    if evaluated := EVALUATION_NAME.fullmatch(name):
        raise InputError(
            f"{where}: expected another name, got {name!r}, which is that of an evaluation; "
            f"`tuner evaluate --study {evaluated[1]}` makes it and goes on with it"
        )
    if name in RESERVED_NAMES:
        flag = "--name" if where == "study" else where
        raise InputError(
            f"{where}: expected another name, got {name!r}, under which runs keep something else; use {flag} NEW"
        )


def data_spec(spec: Spec, trainer: Any, options: RunOptions) -> DataSpec:
    given = options.data is not None
    return DataSpec(trainer.Data.model_validate(spec.data), options.data_path(spec), options.cache, given)


def prepare(options: RunOptions) -> tuple[Spec, Manifest, Database]:
    """Specification and data of a run, and the database; nothing is written but prepared data.

    Raises:
        InputError, StorageError.
    """
    spec, trainer = read_spec(options)
    if options.artifacts:
        open_artifacts(options.artifacts)  # refused here, also before credentials in it get into a command line
    database = Database(options.storage)
    try:
        check_database(database)  # before data are prepared, which may take long
        # with the roles of the search, so that a role of no use is refused before there is a study
        return spec, trainer.load(data_spec(spec, trainer, options), SEARCH_ROLES).manifest, database
    except BaseException:
        database.close()
        raise


def _is_stored(database: Database, name: str) -> bool:
    return check_database(database) and Store(database).find_study(name) is not None


def open_study(spec: Spec, manifest: Manifest, options: RunOptions, database: Database) -> Study:
    """Create the study, or continue it if what was asked for is what it is.

    Raises:
        InputError: the study exists and differs in what makes its trials comparable; names every difference.
    """
    name = options.name or spec.study
    store = Store(database)
    if not _is_stored(database, name):
        refuse_leftovers(Path(options.runs) / name, options.artifacts)
    create_schema(database)
    create_optuna_schema(database)
    data = json.dumps(asdict(manifest))
    with database.exclusive("studies"):
        row = store.find_study(name)
        if row is None:
            return create_study(database, name, spec, data, options.n_trials or spec.n_trials)
    refused = refusals(row, spec, manifest)
    if refused:
        raise InputError(
            f"study {name!r} exists and differs: {'; '.join(refused)}. "
            f"Use --name NEW for a new study, or `tuner delete --study {name} --yes`"
        )
    if row.package_version != version("tuner"):
        log.warning(
            "study %s was begun with tuner %s, this is %s", name, row.package_version, version("tuner"),
            extra={"action": "other_version"},
        )  # fmt: skip
    # What was free to change is taken over: workers read the stored specification.
    store.update_study(row.id, spec.to_json(), version("tuner"), data)
    return Study(database, row, spec, Search(database, spec, name))


def create_study(database: Database, name: str, spec: Spec, data: str, n_trials: int) -> Study:
    """A new study, Optuna's side first. The caller holds the lock of studies."""
    search = Search(database, spec, name, create=True)
    row = Store(database).create_study(name, spec.to_json(), data, version("tuner"), n_trials)
    return Study(database, row, spec, search)


def refusals(row: StudyRow, spec: Spec, manifest: Manifest) -> list[str]:
    """What keeps a stored study from going on with this specification and these data."""
    refused = differences(Spec.from_json(row.spec), spec)
    was = json.loads(row.data)
    if was["data_hash"] != manifest.data_hash:
        refused.append(
            f"data: {was['source']} ({was['data_hash'][:12]}) -> {manifest.source} ({manifest.data_hash[:12]})"
        )
    return refused


def _refuse_others(folder: Path, database: Database) -> None:
    """The database may lie beside the studies; deleting a study of its name would take it along."""
    database_files = (
        [f"{database.path}{end}" for end in ("", "-wal", "-shm", ".lock")] if database.is_sqlite else []
    )
    if str(folder.absolute()) in database_files or folder.is_file():
        raise InputError(
            f"{folder}: expected a folder for the study, got the place of something else; use --name NEW"
        )


def refuse_leftovers(folder: Path, artifacts: str | None = None) -> None:
    """A new study must not take up the checkpoints of another one, whose database was removed or is not this.

    Raises:
        InputError: there are some in its folder, or in its part of the artifact store.
    """
    if any((folder / "trials").glob("*")):
        raise InputError(
            f"{folder}: expected no trials of a new study, got those of another database; move the folder away, "
            "or use --name NEW or another --runs"
        )
    if artifacts and Uploads(open_artifacts(artifacts), folder.name).has_study():
        raise InputError(
            f"{artifacts}: expected nothing of a new study {folder.name!r}, got that of another database; "
            "use --name NEW or another --artifacts"
        )


def run(options: RunOptions, observer: Observer) -> tuple[StudySummary, int]:
    """Run a study to its total of ended trials.

    Returns:
        The study at the end, and the exit code: 0 the total is reached, the time is up or the study was stopped
        (`tuner stop`), 130 interrupted.

    Raises:
        InputError, StorageError: refused, nothing was written.
        RunFailed: the run cannot go on; what was done is kept.
    """
    if options.launcher == "ray":
        from tuner import ray_launcher

        devices = ray_launcher.choose_devices(options.storage, options.workers)
    else:
        devices = choose_devices(options.devices, options.workers)
    spec, manifest, database = prepare(options)
    try:
        name = options.name or spec.study
        folder = Path(options.runs) / name
        if not _is_stored(database, name):
            _refuse_others(folder, database)
            refuse_leftovers(folder)
        with running_alone(folder):
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
    tell_of_lower_total(study, options, observer)
    wanted = options.n_trials or study.spec.n_trials
    study.store.start_study(study.id, wanted, n_failed if options.retry_failed else 0)
    total = study.store.get_study(study.id).total
    n_ended = sum(trial.ended for trial in trials)
    worked = _Worked()
    if n_ended >= total:
        observer.say(f"study {study.name}: all {total} trials have ended, nothing is to do")
    else:
        crew = _crew(study, devices, options, observer)
        observer.say(f"study {study.name}: {n_ended} of {total} trials ended; workers: {', '.join(crew.devices)}")
        worked = _see_through(crew, study, options, observer)
    try:
        study.recover()
        stopped = study.store.get_study(study.id).stop is not None
        summary = summarize(study)
    except DatabaseUnavailable:
        if worked.fault is None:
            raise
        raise worked.fault from None  # which is what the outage has led to
    if stopped:
        observer.say(f"study {study.name}: stopped by `tuner stop`")
    write_results(summary, options, worked.time_s)
    if worked.time_s:
        _tell_of_cost(worked, summary.n_ended - n_ended, observer)
    if worked.fault is not None:
        raise worked.fault
    return summary, worked.code


@dataclass(frozen=True)
class _Worked:
    """What the workers of a run came to: exit code, time, memory of the largest, and why they could not go on."""

    code: int = 0
    time_s: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    fault: InputError | RunFailed | None = None


def _see_through(crew: Crew | RayCrew, study: Study, options: RunOptions, observer: Observer) -> _Worked:
    started = time.monotonic()
    watch = Watch(study, observer, started)
    code, fault = 0, None
    try:
        code = 130 if crew.see_through(watch.tick, options.timeout_s) else 0
    except (InputError, RunFailed) as error:
        fault = error
    watch.close()
    return _Worked(code, {**crew.time_s, "wall_s": time.monotonic() - started}, crew.peak_bytes, fault)


def _tell_of_cost(worked: _Worked, n_trials: int, observer: Observer) -> None:
    """Of a worker that was killed nobody knows the memory."""
    wall_s, peak = worked.time_s["wall_s"], peak_bytes()
    largest = f", {worked.peak_bytes / 1e6:.0f} MB in the largest worker" if worked.peak_bytes else ""
    trials = "1 trial" if n_trials == 1 else f"{n_trials} trials"
    observer.say(f"{trials} in {duration(wall_s)}; peak memory: {peak / 1e6:.0f} MB in this process{largest}")
    told = {"n_trials": n_trials, "wall_s": wall_s, "peak_bytes": peak, "worker_peak_bytes": worked.peak_bytes}
    log.info("run ended", extra={"action": "run_ended", **told})


def tell_of_lower_total(study: Study, options: RunOptions, observer: Observer) -> None:
    total = study.store.get_study(study.id).n_trials
    if options.n_trials is not None and options.n_trials < total:
        observer.say(
            f"n-trials: the study's total is {total} already and is never lowered (asked for {options.n_trials})"
        )


def _crew(study: Study, devices: Sequence[str], options: RunOptions, observer: Observer) -> Crew | RayCrew:
    worker = WorkerOptions(
        device="", runs=str(Path(options.runs).absolute()), cache=str(options.cache.absolute()),
        studies=(study.name,), artifacts=options.artifacts, upload_every_s=options.upload_every_s,
        slots=options.slots, stop_grace_s=options.stop_grace_s, outage_s=options.outage_s,
        renew_every_s=options.renew_every_s, grace_s=options.grace_s,
    )  # fmt: skip
    data_path = options.data_path(study.spec)
    if options.launcher == "ray":
        from tuner.ray_launcher import RayCrew

        # A node has its own disks: there data are found by their content.
        worker = replace(worker, roots=(str(data_path.absolute()),))
        return RayCrew(options.workers, worker, _url(study), _logs(study, worker), observer.say)
    worker = replace(worker, data_path=str(data_path), data_path_given=options.data is not None)
    return local_crew(study, devices, worker, observer)


def local_crew(study: Study, devices: Sequence[str], worker: WorkerOptions, observer: Observer) -> Crew:
    """Worker processes of this machine that serve one study, not started yet."""

    def on_death(crashed: bool) -> int:
        study.recover(crashed=crashed)
        return study.store.count_measurements(study.id)

    return Crew(devices, worker, _url(study), _logs(study, worker), observer.say, on_death)


def _url(study: Study) -> str:
    return study.database.url.render_as_string(hide_password=False)


def _logs(study: Study, worker: WorkerOptions) -> Path:
    return Path(worker.runs) / study.name / "logs"


class Watch:
    """What a run does beside its workers: show progress, notify. `started` is the monotonic time of its begin."""

    def __init__(self, study: Study, observer: Observer, started: float) -> None:
        self._study = study
        self._observer = observer
        self._started = started
        self._notifier = Notifier(study.database, (study.name,))
        self._next_show = 0.0

    def tick(self) -> None:
        begun = time.monotonic()
        if begun < self._next_show:
            return
        try:
            self._observer.show(summarize(self._study), self._started)
            self._notifier.check()
        except DatabaseUnavailable as error:
            log.warning("progress not read: %s", error, extra={"action": "outage"})
        # A large study takes long to read: never spend more than a twentieth of a core on looking.
        self._next_show = begun + max(1.0, 20 * (time.monotonic() - begun))

    def close(self) -> None:
        try:
            self._notifier.close()
        except DatabaseUnavailable as error:
            log.warning("database away: %s", error, extra={"action": "outage"})


def write_results(summary: StudySummary, options: RunOptions, spent: Mapping[str, float]) -> Path:
    """results.json of the study, replaced whole; `spent` is the time of this run of it."""
    folder = Path(options.runs) / summary.name
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"results.json.{os.getpid()}"
    temporary.write_text(json.dumps({**as_json(summary), "this_run": dict(spent)}, indent=2) + "\n")
    os.replace(temporary, folder / "results.json")
    return folder / "results.json"
