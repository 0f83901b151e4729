"""A worker in this process: measurements in order and once, failures with their reason, stops and resumes."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.trainer import SEARCH_ROLES, DataSpec, DiskError, Measurement, Run
from storage.artifacts import ArtifactError, open_artifacts
from storage.database import Database, DatabaseUnavailable
from storage.runs import MeasurementRow, Store
from tests.searches import METRIC, VIOLATION, dead, elsewhere, make_spec, make_study, new_worker
from tests.toy import ToyConfig, ToyDataset, ToyTrainer
from tuner.course import Course, reason_of
from tuner.reporter import Journal, Reporter
from tuner.study import Study, TooManyFailures
from tuner.uploads import Uploads
from tuner.worker import DeviceFault, Worker, WorkerOptions

ONE_ARM = {"arms": {"only": {}}, "space": {"x": {"low": 0.0, "high": 1.0}}, "pruner": {"name": "none"}}


@pytest.fixture
def database(sqlite_with_tables_url: str) -> Iterator[Database]:
    database = Database(sqlite_with_tables_url)
    yield database
    database.close()


class Watched(ToyTrainer):
    """The toy, with the steps that were really trained and something to do at each measurement."""

    def __init__(self, at: Callable[[int, dict[str, float]], None] = lambda _step, _metrics: None) -> None:
        self.trained: list[tuple[int, int]] = []
        self.at = at

    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        number = int(run.directory.name)
        first = True
        for measurement in super().fit(config, data, run):
            resumed = first and run.attempt > 1 and (number, measurement.step) in self.trained
            first = False
            if not resumed:
                self.trained.append((number, measurement.step))
            metrics = dict(measurement.metrics)
            self.at(measurement.step, metrics)
            yield Measurement(measurement.step, metrics, measurement.elapsed_s)


def make_worker(study: Study, tmp_path: Path, trainer: Any, identity: Any = None) -> Worker:
    options = WorkerOptions("cpu", str(tmp_path / "runs"), str(tmp_path / "cache"), (study.name,))
    data = trainer.load(DataSpec(trainer.Data(), None, tmp_path / "cache"), SEARCH_ROLES)
    return Worker(study, trainer, data, new_worker(study, identity), options, threading.Event())


def steps(study: Study, number: int = 0) -> list[int]:
    return [row.step for row in study.store.measurements(study.id, [number])[number]]


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.search.trials()]


def failure(study: Study, number: int = 0) -> str | None:
    return study.store.runs(study.id)[number].failure


class TestServe:
    def test_until_every_trial_has_ended(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=5))
        trainer = Watched()
        make_worker(study, tmp_path, trainer).serve()
        assert states(study) == ["complete"] * 5
        assert trainer.trained == [(number, step) for number in range(5) for step in range(4)]
        assert [steps(study, number) for number in range(5)] == [[0, 1, 2, 3]] * 5
        assert {tuple(t.intermediate_values) for t in study.search.study.trials} == {(0, 1, 2, 3)}

    def test_the_whole_config_is_recorded(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=3))
        make_worker(study, tmp_path, Watched()).serve()
        for run in study.store.runs(study.id):
            params = study.search.trials()[run.number].params
            assert run.config is not None
            assert run.config["n_steps"] == 4
            assert run.config["speed"] == (0.2 if run.arm == "two" else params["speed"])
            assert {key: run.config[key] for key in params} == dict(params)

    def test_a_pruned_trial(self, database: Database, tmp_path: Path) -> None:
        spec = make_spec(
            n_trials=12, **{**ONE_ARM, "pruner": {"name": "median", "min_completed": 1, "warmup_steps": 1}}
        )
        study = make_study(database, spec)
        trainer = Watched()
        make_worker(study, tmp_path, trainer).serve()
        pruned = [trial.number for trial in study.search.trials() if trial.state == "pruned"]
        assert pruned
        assert all(len(steps(study, number)) == 2 for number in pruned)
        assert not any((number, 2) in trainer.trained for number in pruned)
        assert all(t.constraints for t in study.search.study.trials)

    def test_it_waits_for_trials_that_may_come_back(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=1))
        held = study.claim(new_worker(study, elsewhere()))
        assert held is not None
        worker = make_worker(study, tmp_path, Watched())
        other = Study.open(database, "toy")
        looked: list[int] = []
        trials = study.search.trials
        study.search.trials = lambda: looked.append(1) or trials()  # type: ignore[method-assign]
        threading.Timer(3.2, lambda: other.stop(held)).start()
        worker.serve()
        assert states(study) == ["complete"]
        # It waited for six polls, and looked at all trials only before and after.
        assert len(looked) <= 7
        assert study.store.runs(study.id)[0].attempt == 2


class TestStop:
    def test_at_the_next_measurement_and_the_next_attempt_goes_on(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=2))
        trainer = Watched()
        worker = make_worker(study, tmp_path, trainer)
        trainer.at = lambda step, _m: worker.stop.set() if step == 1 else None
        worker.serve()
        assert states(study) == ["waiting"]
        assert steps(study) == [0, 1]
        trainer.at = lambda _step, _m: None
        make_worker(Study.open(database, "toy"), tmp_path, trainer).serve()
        assert states(study) == ["complete"] * 2
        assert trainer.trained == [(number, step) for number in range(2) for step in range(4)]
        rows = study.store.measurements(study.id, [0])[0]
        assert [(row.step, row.attempt) for row in rows] == [(0, 1), (1, 1), (2, 2), (3, 2)]
        run = study.store.runs(study.id)[0]
        assert (run.checkpoint_attempt, run.checkpoint_step) == (2, 3)

    def test_no_trial_is_taken_after_the_stop(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec())
        worker = make_worker(study, tmp_path, Watched())
        worker.stop.set()
        worker.serve()
        assert states(study) == []


class TestAbandon:
    """No measurement within the grace time: another thread gives the trial back, then the process ends."""

    @pytest.mark.parametrize("during", ["restore", "fit"])
    def test_the_trial_is_back_in_the_queue_wherever_the_worker_hangs(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
    ) -> None:
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        hanging, go_on = threading.Event(), threading.Event()

        def hang(*_: Any) -> None:
            hanging.set()
            go_on.wait(30)

        worker = make_worker(study, tmp_path, Watched(hang if during == "fit" else lambda *_: None))
        if during == "restore":
            monkeypatch.setattr(Reporter, "resume", hang)
        thread = threading.Thread(target=worker.work)
        thread.start()
        assert hanging.wait(30)
        worker.abandon()
        assert states(study) == ["waiting"]
        assert [attempt.outcome for attempt in study.store.attempts(study.id)] == ["stopped"]
        go_on.set()
        thread.join(30)
        # What the woken thread had to say came too late.
        assert (states(study), steps(study)) == (["waiting"], [])

    @pytest.mark.parametrize("error", [ArtifactError("read-only"), OSError("stale"), RuntimeError("a bug")])
    def test_an_upload_that_fails_is_in_nobodys_way(
        self, database: Database, tmp_path: Path, error: Exception
    ) -> None:
        class Broken:
            def hurry(self) -> None:
                raise error

            def finish(self, patience_s: float) -> None:
                raise error

        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        worker = make_worker(study, tmp_path, Watched())
        claim = study.claim(worker.worker_id)
        assert claim is not None
        course = worker._courses[0] = Course(worker, 0, claim)
        course.uploads = Broken()  # type: ignore[assignment]
        worker.abandon()
        assert states(study) == ["waiting"]


class TestResume:
    def died_after(self, study: Study, tmp_path: Path, trainer: Watched, step: int, number: int = 0) -> None:
        """A worker that dies when it has yielded `step`: nothing after that is written."""

        class Killed(BaseException):
            pass

        def at(_step: int, _metrics: dict[str, float]) -> None:
            if trainer.trained[-1] == (number, step):
                raise Killed

        trainer.at = at
        with pytest.raises(Killed):
            make_worker(study, tmp_path, trainer, dead()).serve()
        trainer.at = lambda _step, _m: None

    def test_no_step_is_trained_twice_and_none_is_missing(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=1))
        trainer = Watched()
        self.died_after(study, tmp_path, trainer, 2)
        assert steps(study) == [0, 1]
        make_worker(Study.open(database, "toy"), tmp_path, trainer).serve()
        assert steps(study) == [0, 1, 2, 3]
        assert [step for _, step in trainer.trained] == [0, 1, 2, 3]
        assert study.store.runs(study.id)[0].attempt == 2

    def test_what_only_the_file_knows_is_stored_under_its_own_attempt(
        self, database: Database, tmp_path: Path
    ) -> None:
        study = make_study(database, make_spec(n_trials=1))
        trainer = Watched()
        self.died_after(study, tmp_path, trainer, 3)
        # The database lost the last step, which the file and the checkpoints of attempt 1 still have.
        with database.transaction() as connection:
            connection.exec_driver_sql("delete from tuner_measurements where step = 2")
        make_worker(Study.open(database, "toy"), tmp_path, trainer).serve()
        rows = study.store.measurements(study.id, [0])[0]
        # Of step 3 there is but its checkpoint, which tells whose it is.
        assert [(row.step, row.attempt) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 1)]
        assert list(study.search.study.trials[0].intermediate_values) == [0, 1, 2, 3]

    def test_steps_that_optuna_misses_are_reported(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=1))
        trainer = Watched()
        report = study.search.report
        study.search.report = lambda trial, step, value: None  # type: ignore[method-assign]
        self.died_after(study, tmp_path, trainer, 2)  # each time between our table and Optuna's
        study.search.report = report  # type: ignore[method-assign]
        assert study.search.study.trials[0].intermediate_values == {}
        make_worker(Study.open(database, "toy"), tmp_path, trainer).serve()
        assert list(study.search.study.trials[0].intermediate_values) == [0, 1, 2, 3]

    def test_the_same_config_again(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=4))
        trainer = Watched()
        self.died_after(study, tmp_path, trainer, step=1, number=2)
        before = study.store.runs(study.id)[2].config
        make_worker(Study.open(database, "toy"), tmp_path, trainer).serve()
        run = study.store.runs(study.id)[2]
        assert (run.config, run.attempt) == (before, 2)
        assert states(study) == ["complete"] * 4


class TestFailures:
    def serve(self, database: Database, tmp_path: Path, at: Any = None, **changes: Any) -> Study:
        study = make_study(database, make_spec(n_trials=1, **{**ONE_ARM, **changes}))
        make_worker(study, tmp_path, Watched(at) if at else Watched()).serve()
        assert states(study) == ["failed"]
        return study

    def test_an_exception(self, database: Database, tmp_path: Path) -> None:
        config = {"x": 0.5, "n_steps": 4, "fault": "raise", "fault_step": 2}
        study = self.serve(database, tmp_path, config=config)
        assert failure(study) == "RuntimeError: the toy was told to fail"
        assert steps(study) == [0, 1]  # what it had measured is kept
        assert study.search.study.trials[0].constraints == {}

    @pytest.mark.parametrize("name", [METRIC, VIOLATION, "train/anything"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_number(self, database: Database, tmp_path: Path, name: str, value: float) -> None:
        def at(step: int, metrics: dict[str, float]) -> None:
            if step == 2:
                metrics[name] = value

        study = self.serve(database, tmp_path, at)
        assert failure(study) == f"FloatingPointError: step 2: metric {name} is {value}"
        assert steps(study) == [0, 1]

    @pytest.mark.parametrize("name", [METRIC, VIOLATION])
    def test_a_missing_metric(self, database: Database, tmp_path: Path, name: str) -> None:
        study = self.serve(database, tmp_path, lambda _step, metrics: metrics.pop(name))
        assert failure(study) == f"FloatingPointError: step 0: metric {name} is missing"

    @pytest.mark.parametrize("value", [float("nan"), np.float32(0.5)])
    def test_curves_that_are_no_plain_numbers(self, database: Database, tmp_path: Path, value: Any) -> None:
        class Curved(ToyTrainer):
            def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
                for measurement in super().fit(config, data, run):
                    bad = {"pr": {"recall": [value]}} if measurement.step == 2 else measurement.curves
                    yield replace(measurement, curves=bad)

        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        make_worker(study, tmp_path, Curved()).serve()
        assert states(study) == ["failed"]
        assert str(failure(study)).startswith("FloatingPointError: step 2: curves: ")
        assert steps(study) == [0, 1]

    def test_nothing_measured(self, database: Database, tmp_path: Path) -> None:
        study = self.serve(database, tmp_path, config={"x": 0.5, "n_steps": 0})
        assert failure(study) == "the trainer ended without a measurement"

    def test_a_config_that_the_trainer_refuses(self, database: Database, tmp_path: Path) -> None:
        study = self.serve(database, tmp_path, config={"x": 0.5, "unknown": 1})
        assert str(failure(study)).startswith("ValidationError: 1 validation error for ToyConfig")

    def test_three_in_a_row_stop_the_study_with_the_reason(self, database: Database, tmp_path: Path) -> None:
        config = {"x": 0.5, "n_steps": 4, "fault": "raise"}
        study = make_study(database, make_spec(n_trials=9, **{**ONE_ARM, "config": config}))
        with pytest.raises(TooManyFailures, match=r"3 trials failed in a row.*the toy was told to fail"):
            make_worker(study, tmp_path, Watched()).serve()
        assert states(study) == ["failed"] * 3

    @pytest.mark.parametrize(
        ("message", "is_fault"),
        [
            ("CUDA error: device-side assert triggered", True),
            ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
            ("CUDA out of memory. Tried to allocate 20.00 GiB", False),
            ("shapes cannot be multiplied", False),
        ],
    )
    def test_a_device_that_failed_ends_the_trial_and_the_process(
        self, database: Database, tmp_path: Path, message: str, is_fault: bool
    ) -> None:
        def at(step: int, _metrics: dict[str, float]) -> None:
            if len(trainer.trained) == 2:
                raise RuntimeError(message)

        study = make_study(database, make_spec(n_trials=2, **ONE_ARM))
        trainer = Watched(at)
        worker = make_worker(study, tmp_path, trainer)
        if is_fault:
            with pytest.raises(DeviceFault, match=message[:10]):
                worker.serve()
            assert states(study) == ["failed"]
            make_worker(study, tmp_path, trainer).serve()
        else:
            worker.serve()
        assert states(study) == ["failed", "complete"]
        assert failure(study) == f"RuntimeError: {message}"

    def test_a_full_disk_is_no_fault_of_the_trial(self, database: Database, tmp_path: Path) -> None:
        def at(step: int, _metrics: dict[str, float]) -> None:
            if step == 2:
                raise DiskError(errno.ENOSPC, "runs: cannot write")

        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        trainer = Watched(at)
        with pytest.raises(DiskError, match="cannot write"):
            make_worker(study, tmp_path, trainer).serve()
        assert states(study) == ["waiting"]
        assert study.store.attempts(study.id)[0].outcome == "stopped"
        trainer.at = lambda _step, _m: None
        make_worker(study, tmp_path, trainer).serve()
        assert states(study) == ["complete"]
        assert steps(study) == [0, 1, 2, 3]

    def test_a_journal_that_cannot_be_written_is_a_disk_error(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        trainer = Watched(lambda _s, _m: (tmp_path / "runs/toy/trials/00000/attempt-1/measurements.jsonl").mkdir())
        with pytest.raises(DiskError, match=r"measurements\.jsonl: cannot write"):
            make_worker(study, tmp_path, trainer).serve()
        assert states(study) == ["waiting"]

    @pytest.mark.parametrize(
        ("error", "expected"),
        [(ValueError("a\nb"), "ValueError: a"), (MemoryError(), "MemoryError"), (KeyError("k"), "KeyError: 'k'")],
    )
    def test_a_reason_is_one_line(self, error: Exception, expected: str) -> None:
        assert reason_of(error) == expected


class TestOutage:
    """The database is away while a trial trains."""

    def away(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, during: Callable[[], bool]) -> list[Any]:
        original, calls = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if during():
                raise DatabaseUnavailable("away")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
        return calls

    @pytest.mark.parametrize("what", ["record", "report", "should_prune"])
    def test_training_goes_on_and_everything_arrives_in_order(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        study = make_study(database, make_spec(n_trials=1, config={"x": 0.5, "n_steps": 7}, **{
            key: value for key, value in ONE_ARM.items() if key != "config"
        }))  # fmt: skip
        trainer = Watched()
        now = [0]

        def at(step: int, _metrics: dict[str, float]) -> None:
            now[0] = step

        trainer.at = at
        owner = Store if what == "record" else type(study.search)
        self.away(monkeypatch, owner, what, lambda: 2 <= now[0] <= 4)
        make_worker(study, tmp_path, trainer).serve()
        assert [step for _, step in trainer.trained] == list(range(7))
        assert steps(study) == list(range(7))
        assert list(study.search.study.trials[0].intermediate_values) == list(range(7))
        assert states(study) == ["complete"]

    def test_what_only_a_lost_machine_had_measured_is_measured_again(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The database comes back for the uploads before training asks for it again, and then the machine is gone:
        no other one may go on from a step whose measurements went with it."""

        class Killed(BaseException):
            pass

        (tmp_path / "store").mkdir()
        uploads = Uploads(open_artifacts(f"file://{tmp_path}/store"), "toy", 0.0)
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        trainer, refused = Watched(), threading.Event()
        name_upload = Store.name_upload

        def name(*arguments: Any) -> bool:
            named = name_upload(*arguments)
            refused.set()
            return named

        def at(step: int, _metrics: dict[str, float]) -> None:
            if step == 2:
                assert refused.wait(30)
                raise Killed

        with monkeypatch.context() as patch:
            self.away(patch, Store, "record", lambda: True)
            patch.setattr(Store, "name_upload", name)
            trainer.at = at
            first = make_worker(study, tmp_path / "first", trainer, dead())
            first.uploads = uploads
            with pytest.raises(Killed):
                first.serve()
        trainer.at = lambda _step, _metrics: None
        second = make_worker(Study.open(database, "toy"), tmp_path / "second", trainer)
        second.uploads = uploads
        second.serve()
        assert steps(study) == list(range(len(steps(study))))
        assert states(study) == ["complete"]

    def test_what_is_away_is_asked_less_and_less_often(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = make_study(database, make_spec(n_trials=1, **{**ONE_ARM, "config": {"x": 0.5, "n_steps": 60}}))
        clock = [0.0]
        monkeypatch.setattr("tuner.course.time.monotonic", lambda: clock[0])
        monkeypatch.setattr("tuner.course.random.uniform", lambda _low, high: high)

        def at(_step: int, _metrics: dict[str, float]) -> None:
            clock[0] += 1.0  # a step takes a second, a try that fails three

        def record(*_: Any) -> Any:
            tried.append(clock[0])
            if clock[0] < 40:
                clock[0] += 3.0
                raise DatabaseUnavailable("away")
            return original(*_)

        original, tried = Store.record, []
        monkeypatch.setattr(Store, "record", record)
        trainer = Watched(at)
        make_worker(study, tmp_path, trainer).serve()
        assert [step for _, step in trainer.trained] == list(range(60))
        assert steps(study) == list(range(60))
        assert sum(moment < 40 for moment in tried) == 3
        assert sum(moment > 40 for moment in tried) > 10  # and again at every step when it is back

    def test_training_does_not_wait_for_optunas_storage(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        patience: list[float] = []
        report = study.search.report

        def watched(*args: Any) -> None:
            patience.append(study.search.storage.patience_s)
            report(*args)

        monkeypatch.setattr(study.search, "report", watched)
        make_worker(study, tmp_path, Watched()).serve()
        assert set(patience) == {0.0}
        assert study.search.storage.patience_s > 0

    def test_away_for_too_long_stops_the_worker_in_the_midst_of_a_trial(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"x": 0.5, "n_steps": 400, "step_s": 0.02}
        study = make_study(database, make_spec(n_trials=1, **{**ONE_ARM, "config": config}))
        away = [True]
        self.away(monkeypatch, Store, "record", lambda: away[0])
        trainer = Watched()
        worker = make_worker(study, tmp_path, trainer)
        worker.options = replace(worker.options, outage_s=0.1)
        with pytest.raises(DatabaseUnavailable):
            worker.serve()
        n_trained = len(trainer.trained)
        assert 2 < n_trained < 400
        study.store.end_worker(worker.worker_id)
        away[0] = False
        trainer.at = lambda step, _m: other.stop.set() if step > n_trained else None
        other = make_worker(Study.open(database, "toy"), tmp_path, trainer)
        other.serve()
        assert steps(study) == list(range(n_trained + 2))  # and nothing was trained twice
        assert [step for _, step in trainer.trained] == list(range(n_trained + 2))

    def test_away_at_the_end_too(self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storage.database.time.sleep", lambda _s: None)
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        left = iter([True] * 12)
        calls = self.away(monkeypatch, Store, "record", lambda: next(left, False))
        make_worker(study, tmp_path, Watched()).serve()
        assert len(calls) > 12
        assert steps(study) == [0, 1, 2, 3]
        assert states(study) == ["complete"]

    @pytest.mark.parametrize("what", ["claim", "measurements", "set_config", "is_current", "end_run"])
    def test_claims_resumes_and_ends_are_patient(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        monkeypatch.setattr("storage.database.time.sleep", lambda _s: None)
        study = make_study(database, make_spec(n_trials=2, **ONE_ARM))
        turns = iter([True, True, False] * 99)
        self.away(monkeypatch, Store, what, lambda: next(turns))
        make_worker(study, tmp_path, Watched()).serve()
        assert states(study) == ["complete"] * 2

    def test_a_zombie_leaves_its_trial_and_goes_on(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=2, **ONE_ARM))
        other = Study.open(database, "toy")
        trainer = Watched()

        def at(step: int, _metrics: dict[str, float]) -> None:
            if (0, 2) in trainer.trained and len(trainer.trained) == 3:
                # It froze; its trial was given to another worker, which finished it.
                other.recover(judge_others=True, grace_s=-1.0)
                taken = other.claim(new_worker(other), judge_others=False)
                assert taken is not None
                other.store.record(other.id, 0, taken.attempt, [
                    MeasurementRow(step, {METRIC: 0.5, VIOLATION: -1.0}, 1.0)
                    for step in (2, 3)
                ])  # fmt: skip
                other.end(taken, "complete")

        trainer.at = at
        make_worker(study, tmp_path, trainer, elsewhere()).serve()
        assert states(study) == ["complete"] * 2
        assert [t for t in trainer.trained if t[0] == 0] == [(0, 0), (0, 1), (0, 2)]
        rows = study.store.measurements(study.id, [0])[0]
        assert [(row.step, row.attempt) for row in rows] == [(0, 1), (1, 1), (2, 2), (3, 2)]
        assert [a.outcome for a in study.store.attempts(study.id)] == ["lost", "complete", "complete"]


class TestJournal:
    rows = [MeasurementRow(step, {"m": step / 7}, float(step)) for step in range(3)]  # noqa: RUF012

    def write(self, folder: Path, attempt: int, rows: list[MeasurementRow]) -> None:
        journal = Journal(folder, attempt)
        for row in rows:
            journal.append(row)

    def test_it_gives_back_what_it_was_given(self, tmp_path: Path) -> None:
        self.write(tmp_path, 1, self.rows)
        read = Journal(tmp_path, 1).read_all()
        assert [(r.step, r.metrics, r.elapsed_s, r.attempt) for r in read] == [
            (r.step, r.metrics, r.elapsed_s, 1) for r in self.rows
        ]

    def test_none_is_empty(self, tmp_path: Path) -> None:
        assert Journal(tmp_path / "nothing", 1).read_all() == []

    @pytest.mark.parametrize("keep", [1, 20, -2, -1])
    def test_a_torn_last_line_is_skipped(self, tmp_path: Path, keep: int) -> None:
        self.write(tmp_path, 1, self.rows)
        path = tmp_path / "attempt-1" / Journal.NAME
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:keep])
        whole = keep == -1  # only the end of the line is missing
        assert [row.step for row in Journal(tmp_path, 2).read_all()] == ([0, 1, 2] if whole else [0, 1])

    def test_a_tail_of_zeros_after_a_power_cut_is_skipped(self, tmp_path: Path) -> None:
        self.write(tmp_path, 1, self.rows)
        with (tmp_path / "attempt-1" / Journal.NAME).open("ab") as file:
            file.write(b"\0" * 100 + b"\xff\xfe")
        assert [row.step for row in Journal(tmp_path, 2).read_all()] == [0, 1, 2]

    def test_the_newest_attempt_goes_before_older_ones_and_later_ones_are_not_read(self, tmp_path: Path) -> None:
        self.write(tmp_path, 2, [MeasurementRow(1, {"m": 2.0}, 1.0)])
        self.write(tmp_path, 1, self.rows)
        self.write(tmp_path, 10, [MeasurementRow(2, {"m": 10.0}, 1.0)])
        read = {row.step: (row.attempt, row.metrics["m"]) for row in Journal(tmp_path, 3).read_all()}
        assert read == {0: (1, 0.0), 1: (2, 2.0), 2: (1, 2 / 7)}
        assert Journal(tmp_path, 10).read_all()[2].attempt == 10

    def test_it_is_on_the_disk_before_the_database(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = make_study(database, make_spec(n_trials=1, **ONE_ARM))
        record, seen = Store.record, []

        def watched(self: Store, study_id: int, number: int, attempt: int, rows: Any, curves: Any) -> Any:
            path = tmp_path / f"runs/toy/trials/{number:05d}/attempt-{attempt}/measurements.jsonl"
            lines = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            seen.append([row.step in lines for row in rows])
            return record(self, study_id, number, attempt, rows, curves)

        monkeypatch.setattr(Store, "record", watched)
        make_worker(study, tmp_path, Watched()).serve()
        assert seen[:4] == [[True]] * 4
