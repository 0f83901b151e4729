"""A worker with several slots: every trial as it would be alone, whatever happens to the others."""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.trainer import SEARCH_ROLES, DataSpec, DiskError, InputError, Measurement, Run, advance_in_turn
from storage.artifacts import ArtifactError, ArtifactUnavailable, open_artifacts
from storage.database import Database, DatabaseUnavailable
from storage.runs import MeasurementRow, Store
from tests.searches import (
    METRIC,
    VIOLATION,
    dead,
    elsewhere,
    make_database,
    make_spec,
    make_study,
    new_worker,
    suggest_all,
)
from tests.toy import ToyConfig, ToyDataset, ToyTrainer, stored_weights, uninterrupted_weights
from tuner import logs
from tuner.study import MAX_BARREN_CRASHES, Study, TooManyFailures
from tuner.uploads import RunUploads, Uploads
from tuner.worker import DeviceFault, Worker, WorkerOptions

PLAIN = {"arms": {"only": {}}, "space": {"x": {"low": 0.0, "high": 1.0}}, "pruner": {"name": "none"}}
RANDOM = {**PLAIN, "sampler": {"name": "random"}}
BROKEN = "CUDA error: device-side assert triggered"


class Killed(BaseException):
    """The process dies: nothing more is written."""


class Rounds(ToyTrainer):
    """The toy, with which trials were brought how far in each round, and something to do before each step.

    Attributes:
        rounds: for each call of `advance` its trials' numbers, in order.
        trained: (number, step) of every step that was really trained.
        before: called with number and step, before a step is trained.
    """

    def __init__(self, before: Callable[[int, int], None] = lambda _number, _step: None) -> None:
        self.rounds: list[list[int]] = []
        self.trained: list[tuple[int, int]] = []
        self.before = before
        self._numbers: dict[int, int] = {}

    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        number = int(run.directory.name)
        whole = super().fit(config, data, run)

        def fit() -> Iterator[Measurement]:
            done = [int(path.name[5:]) for path in run.directory.glob("attempt-*/step-*")]
            if done:
                yield next(whole)  # the measurement of the checkpoint once more
            for step in itertools.count(max(done, default=-1) + 1):
                self.before(number, step)
                measurement = next(whole, None)
                if measurement is None:
                    return
                self.trained.append((number, measurement.step))
                yield measurement

        made = fit()
        self._numbers[id(made)] = number
        return made

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        self.rounds.append([self._numbers[id(fit)] for fit in fits])
        return advance_in_turn(fits)


@pytest.fixture
def database(sqlite_with_tables_url: str) -> Iterator[Database]:
    database = Database(sqlite_with_tables_url)
    yield database
    database.close()


def make_worker(study: Study, tmp_path: Path, trainer: Any, slots: Any = 3, identity: Any = None) -> Worker:
    options = WorkerOptions(
        "cpu", str(tmp_path / "runs"), str(tmp_path / "cache"), (study.name,), slots=slots, stop_grace_s=20.0
    )
    data = trainer.load(DataSpec(trainer.Data(), None, tmp_path / "cache"), SEARCH_ROLES)
    return Worker(study, trainer, data, new_worker(study, identity), options, threading.Event())


def reopened(study: Study) -> Study:
    return Study.open(study.database, study.name)


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.search.trials()]


def steps(study: Study, number: int) -> list[int]:
    return [row.step for row in study.store.measurements(study.id, [number])[number]]


def attempts(study: Study) -> list[tuple[int, int, str | None]]:
    return [(a.number, a.attempt, a.outcome) for a in study.store.attempts(study.id)]


def told(study: Study) -> list[Any]:
    """All that came of a study but for times."""
    rows = study.store.measurements(study.id, [run.number for run in study.store.runs(study.id)])
    return [
        (t.number, t.state, dict(t.params), t.value, [(r.step, dict(r.metrics)) for r in rows[t.number]])
        for t in study.search.trials()
    ]


def check_weights(study: Study, tmp_path: Path) -> None:
    """Every complete trial's are those of a run that was alone and that nothing has interrupted."""
    for run in study.store.runs(study.id):
        if run.failure is None:
            config = ToyConfig.model_validate(run.config)
            folder = tmp_path / f"runs/{study.name}/trials/{run.number:05d}"
            path = folder / f"attempt-{run.checkpoint_attempt}" / f"step-{run.checkpoint_step:05d}"
            assert stored_weights(path) == uninterrupted_weights(config, study.spec.seed)
            assert steps(study, run.number) == list(range(config.n_steps))


class TestRounds:
    def test_each_trial_is_what_it_is_alone(self, tmp_path: Path) -> None:
        found = []
        for slots in (1, 3):
            folder = tmp_path / str(slots)
            folder.mkdir()
            database = make_database(f"sqlite:///{folder}/tuner.db")
            study = make_study(database, make_spec(n_trials=7, sampler={"name": "random"}))
            make_worker(study, folder, Rounds(), slots).serve()
            check_weights(study, folder)
            found.append(told(study))
            assert attempts(study) == [(number, 1, "complete") for number in range(7)]
            database.close()
        assert found[0] == found[1]

    def test_free_slots_are_filled_as_soon_as_there_is_a_trial(self, database: Database, tmp_path: Path) -> None:
        arms = {"long": {"n_steps": 3}, "short": {"n_steps": 1}}
        study = make_study(database, make_spec(n_trials=5, **{**RANDOM, "arms": arms}))
        trainer = Rounds()
        make_worker(study, tmp_path, trainer, 2).serve()
        # The last call finds a fit's end. Trial 4 follows in the slot that 0 leaves.
        assert trainer.rounds == [
            [0, 1], [0, 1], [0, 2], [0, 2], [3, 2], [3, 2], [4], [4], [4], [4],
        ]  # fmt: skip
        assert states(study) == ["complete"] * 5
        # In the order of slots, whichever began first.
        ended = sorted(study.store.runs(study.id), key=lambda run: run.ended_at or 0.0)
        assert [run.number for run in ended] == [1, 0, 3, 2, 4]

    def test_the_same_again_with_a_sampler_and_a_pruner_that_learn(self, tmp_path: Path) -> None:
        found = []
        for name in "ab":
            database = make_database(f"sqlite:///{tmp_path}/{name}.db")
            spec = make_spec(
                n_trials=14, sampler={"name": "tpe", "n_startup_trials": 4},
                pruner={"name": "median", "min_completed": 1, "warmup_steps": 1},
            )  # fmt: skip
            study = make_study(database, spec)
            make_worker(study, tmp_path / name, Rounds(), 4).serve()
            found.append(told(study))
            database.close()
        assert found[0] == found[1]
        assert "pruned" in {line[1] for line in found[0]}

    def test_one_is_pruned_in_the_midst_of_others(self, database: Database, tmp_path: Path) -> None:
        spec = make_spec(
            n_trials=9, **{**RANDOM, "pruner": {"name": "median", "min_completed": 1, "warmup_steps": 1}}
        )
        study = make_study(database, spec)
        trainer = Rounds()
        make_worker(study, tmp_path, trainer).serve()
        pruned = [trial.number for trial in study.search.trials() if trial.state == "pruned"]
        assert pruned
        assert all(steps(study, number) == [0, 1] for number in pruned)
        assert not any((number, 2) in trainer.trained for number in pruned)
        assert set(states(study)) == {"pruned", "complete"}
        assert Counter(trainer.trained).most_common(1)[0][1] == 1

    def test_one_fails_and_the_others_go_on(self, database: Database, tmp_path: Path) -> None:
        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2):
                raise RuntimeError("the toy was told to fail")

        study = make_study(database, make_spec(n_trials=5, **RANDOM))
        make_worker(study, tmp_path, Rounds(before)).serve()
        assert states(study) == ["complete", "failed", "complete", "complete", "complete"]
        assert study.store.runs(study.id)[1].failure == "RuntimeError: the toy was told to fail"
        assert steps(study, 1) == [0, 1]
        assert attempts(study) == [(n, 1, "failed" if n == 1 else "complete") for n in range(5)]

    def test_a_trainer_that_fails_as_a_whole_fails_those_of_the_round(
        self, database: Database, tmp_path: Path
    ) -> None:
        class Broken(Rounds):
            def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
                if len(self.rounds) == 2:
                    self.rounds.append([])
                    raise RuntimeError("a bug")
                return super().advance(fits)

        study = make_study(database, make_spec(n_trials=3, max_failures_in_a_row=9, **RANDOM))
        make_worker(study, tmp_path, Broken(), 2).serve()
        assert states(study) == ["failed", "failed", "complete"]
        assert [run.failure for run in study.store.runs(study.id)] == ["RuntimeError: a bug"] * 2 + [None]

    def test_a_config_that_is_refused_leaves_its_slot_to_the_next(self, database: Database, tmp_path: Path) -> None:
        arms = {"good": {}, "bad": {"unknown": 1}}
        study = make_study(database, make_spec(n_trials=6, **{**RANDOM, "arms": arms}))
        make_worker(study, tmp_path, Rounds()).serve()
        assert states(study) == ["complete", "failed"] * 3

    def test_two_workers_with_three_slots_each_never_exceed_the_total(
        self, database: Database, tmp_path: Path
    ) -> None:
        study = make_study(database, make_spec(n_trials=10, **RANDOM))
        url = database.url.render_as_string(hide_password=False)
        n_begun: list[int] = []

        def serve() -> None:
            own = Database(url)
            try:
                mine = Study.open(own, "toy")
                trainer = Rounds(lambda _number, _step: n_begun.append(len(mine.store.runs(mine.id))))
                make_worker(mine, tmp_path, trainer).serve()
            finally:
                own.close()

        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert states(study) == ["complete"] * 10
        assert max(n_begun) <= 10
        assert {(number, outcome) for number, _, outcome in attempts(study)} == {(n, "complete") for n in range(10)}

    def test_each_line_of_the_log_is_its_own_trials(self, database: Database, tmp_path: Path) -> None:
        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2):
                raise RuntimeError("no more")

        lines: list[dict[str, Any]] = []

        class Collects(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(logs.fields_of(record))

        tuner, handler = logging.getLogger("tuner"), Collects()
        level = tuner.level
        tuner.addHandler(handler)
        tuner.setLevel(logging.INFO)
        try:
            study = make_study(database, make_spec(n_trials=3, **RANDOM))
            make_worker(study, tmp_path, Rounds(before)).serve()
            alone = make_study(database, make_spec(n_trials=1, **RANDOM), "alone")
            make_worker(alone, tmp_path, Rounds(), 1).serve()
        finally:
            tuner.removeHandler(handler)
            tuner.setLevel(level)
        of = {
            (line["action"], line["trial"]): line
            for line in lines
            if line.get("study") == "toy" and line["action"] in ("claim", "fail", "release")
        }
        assert sorted(of) == [
            ("claim", 0), ("claim", 1), ("claim", 2), ("fail", 1), ("release", 0), ("release", 1), ("release", 2),
        ]  # fmt: skip
        assert all(line["slot"] == trial for (_, trial), line in of.items())
        assert not any("slot" in line for line in lines if line.get("study") == "alone")


class TestLeaving:
    """What ends the worker puts back all that it has in hand, at its newest checkpoint."""

    def resumed(self, study: Study, tmp_path: Path, trainer: Rounds, slots: int = 3) -> None:
        trainer.before = lambda _number, _step: None
        make_worker(reopened(study), tmp_path, trainer, slots).serve()
        assert states(study) == ["complete"] * len(states(study))
        check_weights(study, tmp_path)
        assert max(Counter(trainer.trained).values()) == 1

    def test_stop(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=5, **RANDOM))
        trainer = Rounds(lambda number, step: worker.stop.set() if (number, step) == (1, 1) else None)
        worker = make_worker(study, tmp_path, trainer)
        worker.serve()
        assert states(study) == ["waiting"] * 3
        assert [steps(study, number) for number in range(3)] == [[0, 1]] * 3
        assert attempts(study) == [(number, 1, "stopped") for number in range(3)]
        self.resumed(study, tmp_path, trainer)

    def test_stop_with_uploads_that_take_their_time(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All go up at once, not one after the other."""
        (tmp_path / "store").mkdir()
        study = make_study(database, make_spec(n_trials=3, **RANDOM))
        all_at_once = threading.Barrier(3)
        name_upload = Store.name_upload

        def name(*arguments: Any) -> bool:
            all_at_once.wait(10)
            return name_upload(*arguments)

        monkeypatch.setattr(Store, "name_upload", name)
        trainer = Rounds(lambda number, step: worker.stop.set() if (number, step) == (2, 1) else None)
        worker = make_worker(study, tmp_path, trainer)
        worker.uploads = Uploads(open_artifacts(f"file://{tmp_path}/store"), "toy", 9999.0)
        worker.serve()
        runs = study.store.runs(study.id)
        assert [(run.uploaded_attempt, run.uploaded_step) for run in runs] == [(1, 1)] * 3
        monkeypatch.undo()
        elsewhere_folder = tmp_path / "elsewhere"  # where nothing is but what was uploaded
        other = make_worker(reopened(study), elsewhere_folder, trainer)
        other.uploads = worker.uploads
        other.serve()
        check_weights(study, elsewhere_folder)
        assert max(Counter(trainer.trained).values()) == 1

    @pytest.mark.parametrize("slots", [2, 3])
    def test_a_kill(self, database: Database, tmp_path: Path, slots: int) -> None:
        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2):
                raise Killed

        study = make_study(database, make_spec(n_trials=5, **RANDOM))
        trainer = Rounds(before)
        with pytest.raises(Killed):
            make_worker(study, tmp_path, trainer, slots, dead()).serve()
        assert states(study) == ["running"] * slots
        assert [steps(study, number) for number in range(slots)] == [[0, 1]] * slots
        self.resumed(study, tmp_path, trainer)
        crashed = [(number, 1, "crashed") for number in range(slots)]
        assert [line for line in attempts(study) if line[2] != "complete"] == crashed

    @pytest.mark.parametrize("error", [DiskError(errno.ENOSPC, "runs: cannot write"), ArtifactError("read-only")])
    def test_a_fault_of_none_of_them(self, database: Database, tmp_path: Path, error: Exception) -> None:
        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2):
                raise error

        study = make_study(database, make_spec(n_trials=5, **RANDOM))
        trainer = Rounds(before)
        with pytest.raises(type(error), match=str(error.args[-1])):
            make_worker(study, tmp_path, trainer).serve()
        assert states(study) == ["waiting"] * 3
        # What the others had measured in that round is recorded before.
        assert [steps(study, number) for number in range(3)] == [[0, 1, 2], [0, 1], [0, 1, 2]]
        assert {outcome for _, _, outcome in attempts(study)} == {"stopped"}
        self.resumed(study, tmp_path, trainer)

    def test_one_that_waits_to_be_put_back_is_put_back_with_the_others(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the database is away one cannot be given back; before it is, the fault of another one ends the
        worker, and is what is told."""

        def before(number: int, step: int) -> None:
            if (number, step) in ((0, 1), (1, 2)):
                raise DiskError(errno.ENOSPC, f"trial {number}: cannot write")

        study, away = make_study(database, make_spec(n_trials=3, **RANDOM)), iter([True])
        stop = Study.stop

        def refusing(self: Study, claim: Any) -> None:
            if next(away, False):
                raise DatabaseUnavailable("away")
            stop(self, claim)

        monkeypatch.setattr(Study, "stop", refusing)
        monkeypatch.setattr("tuner.course.FIRST_DELAY_S", 60.0)
        trainer = Rounds(before)
        with pytest.raises(DiskError, match="trial 1: cannot write"):
            make_worker(study, tmp_path, trainer, 2).serve()
        assert attempts(study) == [(number, 1, "stopped") for number in range(2)]
        self.resumed(study, tmp_path, trainer)

    def test_they_wait_for_the_artifact_store_together(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def before(number: int, step: int) -> None:
            if (number, step) == (1, 1):
                raise DiskError(errno.ENOSPC, "runs: cannot write")

        waited_s = []

        def away(_self: RunUploads, patience_s: float) -> None:
            waited_s.append(patience_s)
            time.sleep(patience_s)
            raise ArtifactUnavailable("away")

        monkeypatch.setattr(RunUploads, "finish", away)
        (tmp_path / "store").mkdir()
        study = make_study(database, make_spec(n_trials=4, **RANDOM))
        worker = make_worker(study, tmp_path, Rounds(before), 4)
        worker.options = replace(worker.options, stop_grace_s=2.0)
        worker.uploads = Uploads(open_artifacts(f"file://{tmp_path}/store"), "toy", 9999.0)
        with pytest.raises(DiskError):
            worker.serve()
        assert len(waited_s) == 3
        assert sum(waited_s) <= 0.5
        assert attempts(study) == [(number, 1, "stopped") for number in range(4)]

    def test_too_many_failures(self, database: Database, tmp_path: Path) -> None:
        def before(number: int, _step: int) -> None:
            if number > 0:
                raise RuntimeError("no luck")

        study = make_study(database, make_spec(n_trials=9, **{**RANDOM, "config": {"x": 0.5, "n_steps": 50}}))
        with pytest.raises(TooManyFailures, match="3 trials failed in a row"):
            make_worker(study, tmp_path, Rounds(before), 2).serve()
        assert states(study) == ["waiting", "failed", "failed", "failed"]
        assert attempts(study)[0] == (0, 1, "stopped")

    def test_the_service_counts_on_all_of_it_when_it_abandons(self, database: Database, tmp_path: Path) -> None:
        hanging, go_on = threading.Event(), threading.Event()

        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2):
                hanging.set()
                go_on.wait(30)

        study = make_study(database, make_spec(n_trials=3, **RANDOM))
        worker = make_worker(study, tmp_path, Rounds(before))
        worker.stop.set = lambda: None  # type: ignore[method-assign]
        thread = threading.Thread(target=worker.work)
        thread.start()
        assert hanging.wait(30)
        worker.abandon()
        assert states(study) == ["waiting"] * 3
        assert attempts(study) == [(number, 1, "stopped") for number in range(3)]
        go_on.set()
        thread.join(30)
        # What the woken thread had to say came too late.
        assert (states(study), [steps(study, n) for n in range(3)]) == (["waiting"] * 3, [[0, 1]] * 3)

    def test_one_that_was_given_to_another_worker(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=4, **RANDOM))
        other = reopened(study)

        def before(number: int, step: int) -> None:
            if (number, step) == (1, 2) and len(attempts(study)) == 3:
                # It froze; this one was given to another worker, which finished it.
                other.store.release(other.id, 1, 1, "lost")
                other.search.requeue(1)
                held = [0, 2]
                taken = other.claim(worker.worker_id, in_hand=held)
                assert taken is not None
                assert (taken.number, taken.attempt) == (1, 2)
                suggest_all(other, taken)
                rows = [MeasurementRow(s, {METRIC: 0.5, VIOLATION: -1.0}, 1.0) for s in (2, 3)]
                other.store.record(other.id, 1, 2, rows)
                other.end(taken, "complete")

        worker = make_worker(study, tmp_path, Rounds(before))
        worker.serve()
        assert states(study) == ["complete"] * 4
        assert attempts(study) == [
            (0, 1, "complete"), (1, 1, "lost"), (1, 2, "complete"), (2, 1, "complete"), (3, 1, "complete"),
        ]  # fmt: skip
        rows = study.store.measurements(study.id, [1])[1]
        assert [(row.step, row.attempt) for row in rows] == [(0, 1), (1, 1), (2, 2), (3, 2)]


class TestOutage:
    """While others train nobody waits for the database."""

    @pytest.fixture(autouse=True)
    def _nobody_sleeps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = time.sleep

        def slept(seconds: float) -> None:
            assert seconds <= 0.02, seconds  # the time of a step
            sleep(seconds)

        monkeypatch.setattr("storage.database.time.sleep", slept)
        monkeypatch.setattr("tuner.course.LONGEST_DELAY_S", 0.0)  # asked again in every round
        monkeypatch.setattr("tuner.course.FIRST_DELAY_S", 0.0)
        monkeypatch.setattr("tuner.worker.LOOK_AGAIN_S", 0.0)

    def study(self, database: Database) -> Study:
        arms = {"long": {"n_steps": 30}, "short": {"n_steps": 2}}
        return make_study(database, make_spec(n_trials=4, **{**RANDOM, "arms": arms}))

    @pytest.mark.parametrize(
        "what", ["claim", "set_config", "measurements", "get_study", "is_current", "end_run", "record"]
    )
    def test_a_trial_that_waits_holds_no_other_up(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        study = self.study(database)
        trainer, original = Rounds(), getattr(Store, what)
        n_refused = [0]

        def away(*arguments: Any, **named: Any) -> Any:
            if 2 <= len(trainer.rounds) < 12:  # when trial 1 ends and others begin
                n_refused[0] += 1
                raise DatabaseUnavailable("away")
            return original(*arguments, **named)

        monkeypatch.setattr(Store, what, away)
        make_worker(study, tmp_path, trainer, 2).serve()
        assert n_refused[0] > 5
        assert all(0 in numbers for numbers in trainer.rounds[:31])  # it went on in every round
        assert states(study) == ["complete"] * 4
        check_weights(study, tmp_path)
        assert max(Counter(trainer.trained).values()) == 1

    def test_a_claim_whose_answer_was_lost_is_taken_up_again_and_the_others_stay(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = self.study(database)
        claim, lost = Store.claim, iter([False, True])

        def answered(*arguments: Any) -> int:
            attempt = claim(*arguments)
            if next(lost, False):
                raise DatabaseUnavailable("away")
            return attempt

        monkeypatch.setattr(Store, "claim", answered)
        make_worker(study, tmp_path, Rounds(), 2).serve()
        assert attempts(study) == [
            (0, 1, "complete"), (1, 1, "lost"), (1, 2, "complete"), (2, 1, "complete"), (3, 1, "complete"),
        ]  # fmt: skip

    def test_away_for_too_long_ends_the_worker(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"x": 0.5, "n_steps": 4000, "step_s": 0.02}
        study = make_study(database, make_spec(n_trials=2, **{**RANDOM, "config": config}))
        trainer = Rounds()
        worker = make_worker(study, tmp_path, trainer, 2)
        worker.options = replace(worker.options, outage_s=0.3)
        record, away = Store.record, [True]

        def refuse(*arguments: Any) -> Any:
            if away[0]:
                raise DatabaseUnavailable("away")
            return record(*arguments)

        monkeypatch.setattr(Store, "record", refuse)
        with pytest.raises(DatabaseUnavailable):
            worker.serve()
        n_trained = len(trainer.rounds)
        assert n_trained > 4
        study.store.end_worker(worker.worker_id)
        away[0] = False
        other = make_worker(reopened(study), tmp_path, trainer, 2)
        trainer.before = lambda _number, step: other.stop.set() if step > n_trained else None
        other.serve()
        for number in range(2):
            assert steps(study, number)[:n_trained] == list(range(n_trained))
        assert max(Counter(trainer.trained).values()) == 1


class TestDeviceFault:
    def broken(self, number: int, step: int) -> Callable[[int, int], None]:
        def before(of: int, at: int) -> None:
            if (of, at) == (number, step):
                raise RuntimeError(BROKEN)

        return before

    def test_alone_its_trial_fails_with_the_reason(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=1, **RANDOM))
        with pytest.raises(DeviceFault, match="device-side") as caught:
            make_worker(study, tmp_path, Rounds(self.broken(0, 1))).serve()
        assert not caught.value.shared
        assert states(study) == ["failed"]
        assert study.store.runs(study.id)[0].failure == f"RuntimeError: {BROKEN}"

    def test_with_others_under_way_nobody_knows_whose_it_was(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=4, **RANDOM))
        with pytest.raises(DeviceFault, match=r"device-side .*\(in hand: trials 0, 1, 2\)") as caught:
            make_worker(study, tmp_path, Rounds(self.broken(1, 1))).serve()
        assert caught.value.shared
        assert states(study) == ["running"] * 3  # until the process is gone, or its lease

    @pytest.mark.parametrize("death", ["fault", "kill"])
    @pytest.mark.parametrize("poison", [0, 1, 3])
    @pytest.mark.parametrize("step", [0, 2])
    def test_who_brings_processes_down_fails_and_takes_nobody_along(
        self, database: Database, tmp_path: Path, death: str, poison: int, step: int
    ) -> None:
        """Four trials begin together, and one of them kills its process again and again."""

        def before(number: int, at: int) -> None:
            if (number, at) == (poison, step):
                raise Killed if death == "kill" else RuntimeError(BROKEN)

        study = make_study(database, make_spec(n_trials=8, **RANDOM))
        trainer, n_deaths = Rounds(before), 0
        while True:
            try:
                make_worker(reopened(study), tmp_path, trainer, 4, dead()).serve()
                break
            except (Killed, DeviceFault):
                n_deaths += 1
                assert n_deaths < 9
                reopened(study).recover(crashed=True)  # as its supervisor does
        assert [n for n, state in enumerate(states(study)) if state != "complete"] == [poison]
        failure = study.store.runs(study.id)[poison].failure
        if death == "kill":
            assert failure is not None
            assert f"died {MAX_BARREN_CRASHES} times in a row without a new checkpoint" in failure
        else:
            assert failure == f"RuntimeError: {BROKEN}"
        # What it had measured at first is to its credit once.
        assert n_deaths == (3 if death == "kill" else 2) + (step > 0)
        check_weights(study, tmp_path)
        # None of the others was in hand at two deaths in a row without having come on in between.
        assert all(study.store.barren_crashes(study.id, n) <= 1 for n in range(8) if n != poison)

    def test_those_that_wait_for_a_suspect_go_back_in_order(self, database: Database, tmp_path: Path) -> None:
        """The fault of one that trains alone in its round is its own, and the others have nothing to do with it."""
        study = make_study(database, make_spec(n_trials=4, **RANDOM))
        failed: list[bool] = []

        class ClosesBadly(Rounds):
            """On a device that failed nothing can be let go."""

            def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Any:
                inner = super().fit(config, data, run)

                class Fit:
                    def __next__(self) -> Measurement:
                        return next(inner)

                    def close(self) -> None:
                        if failed:
                            raise RuntimeError(BROKEN)

                fit = Fit()
                self._numbers[id(fit)] = int(run.directory.name)
                return fit

        def before(number: int, step: int) -> None:
            if (number, step) == (1, 0):
                failed.append(True)
                raise RuntimeError(BROKEN)

        trainer = ClosesBadly(before)
        for _ in range(2):
            with pytest.raises(DeviceFault):
                make_worker(reopened(study), tmp_path, trainer, 3, dead()).serve()
            failed.clear()
            reopened(study).recover(crashed=True)
        assert [(number, outcome) for number, attempt, outcome in attempts(study) if attempt == 2] == [
            (0, "stopped"), (1, "failed"),
        ]  # fmt: skip
        assert states(study) == ["waiting", "failed", "waiting"]


class Asked(Rounds):
    def __init__(self, answer: Any = 4) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []
        self.answer = answer

    def slots(self, config: Any, data: Any, run_device: str, most: int) -> int:
        self.asked.append((config, data.manifest.source, run_device, most))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class TestAuto:
    def worker(self, study: Study, tmp_path: Path, trainer: Any, device: str, slots: Any = "auto") -> Worker:
        worker = make_worker(study, tmp_path, trainer, slots)
        worker.options = replace(worker.options, device=device)
        return worker

    def test_one_on_a_cpu(self, database: Database, tmp_path: Path) -> None:
        study, trainer = make_study(database, make_spec(n_trials=2, **RANDOM)), Asked()
        self.worker(study, tmp_path, trainer, "cpu").serve()
        assert trainer.asked == []
        assert {len(numbers) for numbers in trainer.rounds} == {1}

    def test_elsewhere_the_trainer_is_asked_once(
        self, database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "tuner")
        arms = {"first": {"speed": 0.3}, "second": {}}
        study = make_study(database, make_spec(n_trials=12, **{**RANDOM, "arms": arms}))
        trainer = Asked()
        self.worker(study, tmp_path, trainer, "cuda:3").serve()
        ((config, data, device, most),) = trainer.asked
        assert (config.speed, config.x, data, device, most) == (0.3, 0.5, "toy data 'toy'", "cuda:0", 12)
        assert max(len(numbers) for numbers in trainer.rounds) == 4
        (line,) = [record for record in caplog.records if getattr(record, "action", "") == "slots"]
        assert (line.getMessage(), line.slots, line.most) == ("4 trials at once", 4, 12)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("sampler", "n_trials", "most"),
        [("tpe", 100, 8), ("gp", 100, 8), ("cmaes", 100, 8), ("random", 100, 32), ("qmc", 100, 32), ("tpe", 3, 3)],
    )
    def test_no_more_than_the_search_can_use(
        self, database: Database, tmp_path: Path, sampler: str, n_trials: int, most: int
    ) -> None:
        study = make_study(database, make_spec(n_trials=n_trials, **{**PLAIN, "sampler": {"name": sampler}}))
        trainer = Asked(RuntimeError("enough"))
        with pytest.raises(InputError):
            self.worker(study, tmp_path, trainer, "cuda:0").work()
        assert trainer.asked[0][-1] == most

    def test_of_what_is_left(self, database: Database, tmp_path: Path) -> None:
        study, trainer = make_study(database, make_spec(n_trials=6, **RANDOM)), Asked(2)
        worker = make_worker(study, tmp_path, Rounds(lambda n, _step: worker.stop.set() if n == 4 else None), 1)
        worker.serve()
        assert states(study) == ["complete"] * 4 + ["waiting"]
        self.worker(reopened(study), tmp_path, trainer, "cuda:0").serve()
        assert trainer.asked[0][-1] == 2
        assert states(study) == ["complete"] * 6

    def test_more_trials_than_there_were_may_mean_more_slots(self, database: Database, tmp_path: Path) -> None:
        spec = make_spec(n_trials=1, **{**PLAIN, "sampler": {"name": "tpe"}})
        study, trainer = make_study(database, spec), Asked(2)
        worker = self.worker(study, tmp_path, trainer, "cuda:0")
        asked, slots = [], []
        for total, answer in ((1, 2), (3, 2), (5, 2), (14, 4), (27, 8)):
            study.store.start_study(study.id, total, 0)
            trainer.answer = answer
            worker.serve()
            asked.append([most for *_, most in trainer.asked])
            slots.append(worker.n_slots)
        assert asked == [[], [2], [2], [2, 8], [2, 8]]
        assert slots == [1, 2, 2, 4, 4]
        assert states(study) == ["complete"] * 27

    def test_a_number_is_taken_at_its_word(self, database: Database, tmp_path: Path) -> None:
        study, trainer = make_study(database, make_spec(n_trials=4, **RANDOM)), Asked()
        self.worker(study, tmp_path, trainer, "cuda:0", 2).serve()
        assert trainer.asked == []
        assert max(len(numbers) for numbers in trainer.rounds) == 2

    def test_a_trainer_that_cannot_tell(self, database: Database, tmp_path: Path) -> None:
        study = make_study(database, make_spec(n_trials=4, **RANDOM))
        with pytest.raises(
            InputError, match=r"^--slots auto: expected .* cuda:0 .* got ValueError: no idea; name a number$"
        ):
            self.worker(study, tmp_path, Asked(ValueError("no idea")), "cuda:0").serve()
        for wrong in (0, 5):
            with pytest.raises(InputError, match=f"got ValueError: {wrong} of at most 4; name a number"):
                self.worker(study, tmp_path, Asked(wrong), "cuda:0").serve()
        with pytest.raises(DeviceFault, match="device-side"):
            self.worker(study, tmp_path, Asked(RuntimeError(BROKEN)), "cuda:0").serve()
        assert states(study) == []  # no trial was begun for it

    @pytest.mark.parametrize("slots", [0, -1, 1.5, True, "many", "3", None])
    def test_anything_else_is_refused(self, slots: Any) -> None:
        with pytest.raises(InputError, match=r"^--slots: expected auto or a number from 1, got .*$"):
            WorkerOptions("cpu", "runs", "cache", slots=slots)


def test_a_worker_elsewhere_judges_the_lease_and_not_the_slots(database: Database, tmp_path: Path) -> None:
    """What a worker that is gone had in all its slots is put back at once, once its lease has run out."""

    def before(number: int, step: int) -> None:
        if (number, step) == (2, 1):
            raise Killed

    study = make_study(database, make_spec(n_trials=3, **RANDOM))
    trainer = Rounds(before)
    with pytest.raises(Killed):
        make_worker(study, tmp_path, trainer, 3, elsewhere()).serve()
    again = reopened(study)
    assert again.is_held()
    again.recover(judge_others=True, grace_s=-1.0)
    assert states(study) == ["waiting"] * 3
