"""`tuner evaluate`: what is planned, which evaluation goes on, what is trained again and what never twice."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.trainer import SEARCH_ROLES, InputError
from storage.database import Database, StorageError
from storage.leases import ProcessIdentity
from storage.runs import Store
from tests.e2e.trainer import trained
from tests.tuner.toy_study import Said, make_study, summary_of, url
from tuner import catalog, coordinator, evaluation
from tuner.background import EVALUATE_LOCK, running_alone
from tuner.crew import RunFailed
from tuner.evaluation import EvaluateOptions, evaluate, newest_document
from tuner.plan import Plan, make_plan, overlay_to, spec_of_fits
from tuner.spec_checks import check_spec
from tuner.study import Study, TooManyFailures
from tuner.tree import merge
from tuner.worker import Worker, WorkerOptions
from tuner.worker_process import load_data

SEARCH: dict[str, Any] = {
    "trainer": "tests.e2e.trainer:LoggedToy",
    "n_trials": 8,
    "config": {"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 3, "violation": -0.1},
    "pruner": {"name": "none"},
}


class LocalCrew:
    """Workers of this process, in the place of processes of their own; one call serves at most `limit` trials."""

    limit: int | None = None

    def __init__(self, study: Study, devices: Any, worker: WorkerOptions, observer: Any) -> None:
        self.study, self.options = study, worker
        self.devices = list(devices)

    def see_through(self, tick: Callable[[], None]) -> int:
        work_off(self.study, self.options, self.limit)
        tick()
        return 0 if self.study.is_over() else 1


def work_off(study: Study, options: WorkerOptions, limit: int | None = None) -> None:
    import models

    trainer = models.get_trainer(study.spec.trainer)
    stored = json.loads(study.store.get_study(study.id).data)
    data = load_data(trainer, study.spec.data, stored, options, SEARCH_ROLES)
    worker_id = study.store.register_worker(study.id, ProcessIdentity.current(), "cpu")
    worker = Worker(study, trainer, data, worker_id, options, threading.Event())
    n = 0
    while (limit is None or n < limit) and worker.work():
        n += 1
    study.store.end_worker(worker_id)


class Conclusions:
    """In the place of `tuner.verdict`: keeps what it was given, and stores a document of the right outline."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def conclude(self, study: Any, row: Any, fits: Any, plan: Any, trainer: Any, data_of: Any, *rest: Any) -> Any:
        self.given.append((study.name, row.name, fits.name, plan))
        data = data_of(frozenset({"test"}))
        asked = study.spec.compared
        verdict = asked and {
            "arm": asked.treatment, "against": asked.baseline, "min_gain": asked.min_gain, "reading": asked.reading,
        }  # fmt: skip
        document = {
            "seeds": plan.seeds, "n_replicates": plan.n_replicates, "verdict": verdict,
            "rows": data.manifest.rows["test"], "times": len(self.given),
        }  # fmt: skip
        study.store.finish_evaluation(row.id, document)
        return document


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> Conclusions:
    """Evaluations train in this process and come to a made-up conclusion."""
    conclusions = Conclusions()
    fake = ModuleType("tuner.verdict")
    fake.conclude = conclusions.conclude  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuner.verdict", fake)
    monkeypatch.setattr(evaluation, "local_crew", LocalCrew)
    monkeypatch.setattr(LocalCrew, "limit", None)
    return conclusions


@pytest.fixture(scope="module")
def _searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    make_study(folder, **SEARCH)
    return folder


@pytest.fixture
def searched(_searched: Path, tmp_path: Path) -> Path:
    """A folder with a finished search of two arms."""
    shutil.copytree(_searched, tmp_path, dirs_exist_ok=True)
    return tmp_path


def options_of(folder: Path, **changes: Any) -> EvaluateOptions:
    given = {"seeds": 2, "devices": "cpu", "runs": str(folder / "runs"), "storage": url(folder), **changes}
    return EvaluateOptions(**{"study": "toy", **given})


def run(folder: Path, **changes: Any) -> tuple[Mapping[str, Any], int, Said]:
    said = Said()
    document, code = evaluate(options_of(folder, **changes), said)
    return document, code, said


def evaluations(folder: Path, name: str = "toy") -> list[Any]:
    database = Database(url(folder))
    try:
        store = Store(database)
        found = store.find_study(name)
        assert found is not None
        return store.evaluations(found.id)
    finally:
        database.close()


def steps(folder: Path, name: str = "toy.evaluation-1") -> list[tuple[int, int, int]]:
    return trained(folder / "runs" / name / "trials")


# --- the plan --------------------------------------------------------------------------------------------------


def test_the_best_of_every_arm_and_the_default_of_the_winner(searched: Path) -> None:
    summary = summary_of(searched)
    plan = make_plan(summary)
    assert [(arm.name, arm.kind, arm.rank) for arm in plan.arms[:2]] == [("a", "searched", 1), ("b", "searched", 1)]
    for arm in plan.arms[:2]:
        of_arm = [trial for trial in summary.trials if trial.arm == arm.arm]
        best = max(of_arm, key=lambda trial: trial.value or 0.0)
        assert (arm.trial, arm.config) == (best.number, best.config)
    winner = max(plan.arms[:2], key=lambda arm: summary.trials[arm.trial or 0].value or 0.0).arm
    default = plan.arms[2]
    assert (default.name, default.kind, default.rank) == (f"{winner}/default", "default", 0)
    assert default.config == merge(SEARCH["config"], {} if winner == "a" else {"shape": "b"})
    assert default.trial == ("a", "b").index(winner)
    assert plan.data_hash == summary.data["data_hash"]
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


def test_feasible_or_not_the_best_is_compared(tmp_path: Path) -> None:
    make_study(tmp_path, **{**SEARCH, "config": {**SEARCH["config"], "violation": 0.2}})
    assert len(make_plan(summary_of(tmp_path)).arms) == 3


def test_the_default_is_not_trained_twice_where_it_is_the_best(tmp_path: Path) -> None:
    best = {**SEARCH["config"], "x": 0.3, "y": 0.6}  # the top of the toy's hill
    make_study(tmp_path, **{**SEARCH, "config": best})
    assert [arm.name for arm in make_plan(summary_of(tmp_path)).arms] == ["a", "b"]


def test_several_of_an_arm_are_all_different(tmp_path: Path) -> None:
    make_study(tmp_path, **{**SEARCH, "space": {"x": {"choices": [0.9, 0.5]}}, "n_trials": 12})
    plan = make_plan(summary_of(tmp_path), top=9)
    assert 3 <= len(plan.arms) <= 4  # of two values of x, one of them the default
    configs = [json.dumps(arm.config, sort_keys=True) for arm in plan.arms]
    assert len(set(configs)) == len(configs)


def test_an_arm_without_a_complete_trial_is_named(tmp_path: Path) -> None:
    arms = {"a": {}, "b": {"fault": "raise", "fault_step": 0}}
    make_study(tmp_path, **{**SEARCH, "arms": arms, "n_trials": 4})
    plan = make_plan(summary_of(tmp_path))
    assert {arm.arm for arm in plan.arms} == {"a"}
    assert plan.left_out == ({"arm": "b", "reason": "expected a complete trial, got 2 failed"},)


def test_the_smallest_is_best_where_it_is_minimised(searched: Path) -> None:
    from dataclasses import replace

    summary = summary_of(searched)
    objective = summary.spec.objective.model_copy(update={"direction": "minimize"})
    turned = replace(summary, spec=summary.spec.model_copy(update={"objective": objective}))
    worst = {
        arm: min((t for t in summary.trials if t.arm == arm), key=lambda t: t.value or 0.0) for arm in ("a", "b")
    }
    searched = [arm for arm in make_plan(turned).arms if arm.kind == "searched"]
    assert {arm.arm: arm.trial for arm in searched} == {arm: trial.number for arm, trial in worst.items()}


SCALARS = st.one_of(
    st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, 1.0, 0.5]), st.sampled_from(["a", "b"])
)
TREES = st.recursive(
    st.dictionaries(st.sampled_from("xyz"), SCALARS, max_size=3),
    lambda below: st.dictionaries(st.sampled_from("xyz"), st.one_of(SCALARS, below), max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(TREES, TREES)
def test_the_overlay_makes_one_config_of_another(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    made = merge(config, overlay_to(wanted, config))
    assert json.dumps(made, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def test_what_is_null_in_the_config_stays_null() -> None:
    config = {"x": None, "y": 1}
    assert merge(config, overlay_to({"x": None, "y": 2}, config)) == {"x": None, "y": 2}


def test_the_fits_search_nothing_and_hold_against_the_trainer(searched: Path) -> None:
    from tests.e2e.trainer import LoggedToy

    summary = summary_of(searched)
    plan = make_plan(summary, seeds=3)
    spec = spec_of_fits(summary.spec, plan)
    check_spec(spec, LoggedToy())  # type: ignore[arg-type]
    assert (spec.replicate, spec.n_trials, spec.pruner.name) == (True, 9, "none")
    for arm in plan.arms:
        assert spec.space.sample(spec.config, spec.arms[arm.name], lambda *_: None) == arm.config
    assert spec.decision == summary.spec.decision


# --- a whole evaluation ----------------------------------------------------------------------------------------


def test_every_configuration_is_trained_with_every_seed(searched: Path, concluded: Conclusions) -> None:
    from tests.toy import ToyConfig, stored_weights, uninterrupted_weights

    document, code, said = run(searched)
    assert (code, document["rows"]) == (0, 100)
    summary = summary_of(searched, "toy.evaluation-1")
    plan = concluded.given[0][3]
    assert [trial.state for trial in summary.trials] == ["complete"] * 6
    for trial in summary.trials:
        assert trial.arm == plan.arms[trial.number % 3].name
        assert trial.config == plan.arms[trial.number % 3].config
        seed = summary.spec.seed_of(trial.number)
        weights = stored_weights(searched / "runs" / summary.name / str(trial.checkpoint))
        assert weights == uninterrupted_weights(ToyConfig(**trial.config), seed)
    assert len({summary.spec.seed_of(number) for number in range(6)}) == 2
    assert summary.row.queued_at is not None  # for workers of the service
    assert said.has("3 configurations with 2 seeds each; 0 of 6 fits ended; workers: cpu")
    (row,) = evaluations(searched)
    assert (row.number, row.name, row.document) == (1, "toy.evaluation-1", document)


def test_an_evaluation_that_has_ended_trains_nothing(searched: Path, concluded: Conclusions) -> None:
    first, _, _ = run(searched)
    before = steps(searched)
    second, code, said = run(searched)
    assert (second, code) == (first, 0)
    assert len(concluded.given) == 1
    assert steps(searched) == before
    assert said.has("it has ended before")
    assert newest(searched) == first
    with pytest.raises(InputError, match="got the fits of an evaluation; use --study toy"):
        newest(searched, study="toy.evaluation-1")


def newest(folder: Path, number: int | None = None, study: str = "toy") -> Mapping[str, Any]:
    database = Database(url(folder))
    try:
        return newest_document(database, study, number)
    finally:
        database.close()


def test_an_interrupted_one_goes_on_without_repeating_a_fit(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalCrew, "limit", 4)
    document, code, _ = run(searched)
    assert (document, code, concluded.given) == ({}, 130, [])
    assert len(steps(searched)) == 4 * 3
    with pytest.raises(InputError, match=r"toy.*expected an evaluation that has ended, got 1 \(not ended\)"):
        newest(searched)
    monkeypatch.setattr(LocalCrew, "limit", None)
    document, code, said = run(searched)
    assert code == 0
    assert said.has("4 of 6 fits ended")
    assert sorted(steps(searched)) == [(number, 1, step) for number in range(6) for step in range(3)]
    assert len(evaluations(searched)) == 1


def test_one_that_was_killed_before_its_study_was_made_goes_on(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "create_study", killed)
        with pytest.raises(KeyboardInterrupt):
            run(searched)
    _, code, _ = run(searched)
    assert code == 0
    assert [row.number for row in evaluations(searched)] == [1]


def test_one_that_was_killed_in_its_conclusion_concludes_only(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tuner.verdict"], "conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            run(searched)
    before = steps(searched)
    _, code, _ = run(searched)
    assert (code, len(concluded.given)) == (0, 1)
    assert steps(searched) == before


def test_more_seeds_extend_it_and_fewer_change_nothing(searched: Path, concluded: Conclusions) -> None:
    run(searched)
    document, _, _ = run(searched, seeds=3)
    assert document["seeds"] == 3
    assert sorted(steps(searched)) == [(number, 1, step) for number in range(9) for step in range(3)]
    document, _, said = run(searched, seeds=2)
    assert (document["seeds"], len(concluded.given)) == (3, 2)
    assert said.has("the evaluation has 3 and goes on with them (asked for 2)")


def test_more_replicates_conclude_again_without_training(searched: Path, concluded: Conclusions) -> None:
    run(searched)
    before = steps(searched)
    document, _, _ = run(searched, n_replicates=500)
    assert (document["n_replicates"], document["times"]) == (500, 2)
    assert steps(searched) == before


def test_a_verdict_that_was_added_is_answered(searched: Path, concluded: Conclusions) -> None:
    run(searched)
    changed = make_study(searched, **SEARCH, verdict={"baseline": "b", "treatment": "a"})
    assert changed.study.endswith("toy.yaml")
    document, _, _ = run(searched)
    assert (document["verdict"]["against"], document["times"]) == ("b", 2)


def test_a_search_that_went_on_is_evaluated_anew(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalCrew, "limit", 1)
    run(searched)
    monkeypatch.setattr(LocalCrew, "limit", None)
    document, _, said = run(searched, top=2)
    assert concluded.given[0][1] == "toy.evaluation-2"
    assert said.has("toy.evaluation-1: has another plan and is stopped")
    assert summary_of(searched, "toy.evaluation-1").row.stop == "drain"
    assert [row.document is None for row in evaluations(searched)] == [True, False]
    assert newest(searched) == document
    # asked for again, the former one goes on
    assert run(searched)[1] == 0
    assert sorted({number for number, _, _ in steps(searched)}) == list(range(6))
    assert newest(searched, 1)["times"] == 2
    with pytest.raises(InputError, match=r"expected evaluation 3, ended, got 1 \(ended\), 2 \(ended\)"):
        newest(searched, 3)


def test_a_search_that_still_runs_is_said_to(searched: Path, concluded: Conclusions) -> None:
    database = Database(url(searched))
    store = Store(database)
    found = store.find_study("toy")
    assert found is not None
    store.start_study(found.id, 50, 0)
    database.close()
    _, _, said = run(searched)
    assert said.has("study toy: 8 of 50 trials have ended; what is evaluated is the best so far")


def test_an_arm_that_cannot_be_trained_again_stops_no_other(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.toy import ToyConfig, ToyTrainer

    fit = ToyTrainer.fit

    def moody(self: Any, config: ToyConfig, data: Any, run: Any) -> Any:
        if config.shape == "b":
            raise RuntimeError("no memory for b")
        return fit(self, config, data, run)

    monkeypatch.setattr(ToyTrainer, "fit", moody)
    _, code, said = run(searched)
    assert code == 0
    assert said.has("(b) failed: RuntimeError: no memory for b")
    states = [trial.state for trial in summary_of(searched, "toy.evaluation-1").trials if trial.arm == "a"]
    assert states == ["complete"] * 2


def test_stopped_by_hand_it_says_so_and_goes_on_when_asked(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner import service

    class Stopped(LocalCrew):
        def see_through(self, tick: Callable[[], None]) -> int:
            service.stop(url(searched), "toy.evaluation-1", None, now=True)
            return super().see_through(tick)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "local_crew", Stopped)
        with pytest.raises(RunFailed, match=r"toy\.evaluation-1: expected 6 ended fits, got 0: .*`tuner stop`"):
            run(searched)
    assert run(searched)[1] == 0


@pytest.mark.parametrize("slots", [3, "auto"])
def test_its_workers_are_told_how_many_fits_to_train_at_once(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch, slots: Any
) -> None:
    told = []

    class Told(LocalCrew):
        def see_through(self, tick: Callable[[], None]) -> int:
            told.append(self.options.slots)
            return super().see_through(tick)

    monkeypatch.setattr(evaluation, "local_crew", Told)
    assert run(searched, slots=slots)[1] == 0
    assert told == [slots]


def test_without_devices_it_waits_for_the_service(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = []

    class Visited(evaluation.Watch):
        def tick(self) -> None:
            """In the meantime a worker of the service comes by."""
            visits.append(1)
            database = Database(url(searched))
            runs = searched / "runs"
            work_off(
                Study.open(database, "toy.evaluation-1"), WorkerOptions("cpu", str(runs), str(runs / "cache")), 3
            )
            database.close()

    monkeypatch.setattr(evaluation, "WAIT_POLL_S", 0.0)
    monkeypatch.setattr(evaluation, "POLL_S", 0.0)
    monkeypatch.setattr(evaluation, "Watch", Visited)
    _, code, said = run(searched, devices="none")
    assert (code, len(visits)) == (0, 2)
    assert said.has("workers: those of the service")
    assert len(concluded.given) == 1


def test_who_waits_is_told_why_the_service_gave_up(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.toy import ToyTrainer

    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory at all")

    class Visited(evaluation.Watch):
        def tick(self) -> None:
            database, runs = Database(url(searched)), searched / "runs"
            fits = Study.open(database, "toy.evaluation-1")
            try:
                work_off(fits, WorkerOptions("cpu", str(runs), str(runs / "cache")))
            except TooManyFailures:  # as a worker of the service does
                fits.store.stop_study(fits.id, "drain")
            database.close()

    monkeypatch.setattr(ToyTrainer, "fit", broken)
    monkeypatch.setattr(evaluation, "WAIT_POLL_S", 0.0)
    monkeypatch.setattr(evaluation, "POLL_S", 0.0)
    monkeypatch.setattr(evaluation, "Watch", Visited)
    said = Said()
    with pytest.raises(RunFailed, match=r"expected 6 ended fits, got 4: .* too many failures in a row"):
        evaluate(options_of(searched, devices="none"), said)
    assert said.has("failed: RuntimeError: no memory at all")


def test_who_waits_can_be_interrupted(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Watch, "tick", interrupt)
    assert run(searched, devices="none")[:2] == ({}, 130)
    database = Database(url(searched))
    queued = [row.name for row in Store(database).queued_studies()]
    database.close()
    assert queued == ["toy.evaluation-1"]  # the service goes on


# --- refusals --------------------------------------------------------------------------------------------------


def test_an_unknown_study_lists_those_there_are(searched: Path, concluded: Conclusions) -> None:
    with pytest.raises(StorageError, match=r"study 'tou' is not in .*: there is toy"):
        run(searched, study="tou")


def test_a_study_without_a_finished_trial_is_refused(tmp_path: Path, concluded: Conclusions) -> None:
    make_study(
        tmp_path, **{**SEARCH, "n_trials": 2, "config": {**SEARCH["config"], "fault": "raise", "fault_step": 0}}
    )
    with pytest.raises(InputError, match="study 'toy': expected a complete trial, got 2 failed; search first"):
        run(tmp_path)
    assert evaluations(tmp_path) == []


def test_changed_data_are_refused_before_anything_is_written(
    searched: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tests.toy import ToyDataset, ToyTrainer

    load = ToyTrainer.load

    def changed(self: ToyTrainer, data: Any, roles: Any) -> ToyDataset:
        return ToyDataset(replace(load(self, data, roles).manifest, data_hash="f" * 16, source="changed files"))

    monkeypatch.setattr(ToyTrainer, "load", changed)
    with pytest.raises(InputError, match=r"expected toy data 'toy' \(toy0+\), got changed files \(f+\); the data"):
        run(searched)
    assert evaluations(searched) == []


def test_data_from_files_are_found_by_their_content(tmp_path: Path, concluded: Conclusions) -> None:
    (tmp_path / "there" / "deep").mkdir(parents=True)
    file = tmp_path / "there" / "deep" / "rows.csv"
    file.write_text("1,2\n")
    data = {"path": str(file.parent), "file": "rows.csv"}
    make_study(tmp_path, **{**SEARCH, "data": data})
    moved = tmp_path / "elsewhere"
    (tmp_path / "there").rename(moved)
    with pytest.raises(InputError, match=r"data: expected rows\.csv .*, got no file of that name"):
        run(tmp_path, data=str(tmp_path / "runs"))
    assert run(tmp_path, data=str(moved))[1] == 0
    (moved / "deep" / "rows.csv").write_text("1,3\n")
    with pytest.raises(InputError, match=r"data: expected rows\.csv .*, got rows\.csv: .*rows\.csv"):
        run(tmp_path, data=str(moved), seeds=3)


def test_the_specification_beside_us_says_where_the_data_lie(
    tmp_path: Path, concluded: Conclusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.csv").write_text("1,2\n")
    make_study(tmp_path, **{**SEARCH, "data": {"path": str(tmp_path / "there"), "file": "rows.csv"}})
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path)[1] == 0


def test_the_fits_of_an_evaluation_are_not_evaluated(searched: Path, concluded: Conclusions) -> None:
    run(searched)
    with pytest.raises(InputError, match=r"'toy.evaluation-1': .*got the fits of an evaluation; use --study toy"):
        run(searched, study="toy.evaluation-1")


def test_one_evaluation_of_a_study_at_a_time(searched: Path, concluded: Conclusions) -> None:
    import os

    folder = searched / "runs" / "toy"
    with (
        running_alone(folder, EVALUATE_LOCK),
        pytest.raises(
            InputError, match=rf"no other evaluation of this study, got process {os.getpid()} at it; `kill"
        ),
    ):
        run(searched)
    with running_alone(folder):  # its search may well go on
        assert run(searched)[1] == 0


def test_checkpoints_of_another_database_are_not_taken_up(searched: Path, concluded: Conclusions) -> None:
    (searched / "runs" / "toy.evaluation-1" / "trials" / "00000").mkdir(parents=True)
    with pytest.raises(InputError, match="expected no trials of a new study, got those of another database"):
        run(searched)


@pytest.mark.parametrize("flags", [{"name": "toy.evaluation-1"}, {"overrides": ("study=toy.evaluation-12",)}])
def test_no_study_is_made_under_the_name_of_an_evaluation(tmp_path: Path, flags: dict[str, Any]) -> None:
    from tests.tuner.toy_study import write_spec

    options = coordinator.RunOptions(str(write_spec(tmp_path)), storage=url(tmp_path), **flags)
    with pytest.raises(InputError, match=r"is that of an evaluation; `tuner evaluate --study toy` makes it"):
        coordinator.prepare(options)


# --- with the rest of the tuner --------------------------------------------------------------------------------


def test_a_study_is_deleted_with_its_evaluations(searched: Path, concluded: Conclusions) -> None:
    run(searched)
    database = Database(url(searched))
    store, runs = Store(database), searched / "runs"
    fits = store.find_study("toy.evaluation-1")
    assert fits is not None
    worker = store.register_worker(fits.id, ProcessIdentity.current(), "cpu")
    with pytest.raises(
        StorageError, match=r"study 'toy.evaluation-1': expected no worker, .* stop `tuner evaluate`"
    ):
        catalog.delete(database, "toy", runs)
    assert (runs / "toy" / "trials").is_dir()  # nothing is gone yet
    store.end_worker(worker)
    assert catalog.delete(database, "toy", runs)
    assert store.studies() == []
    assert not (runs / "toy").exists()
    assert not (runs / "toy.evaluation-1").exists()
    database.close()


def test_a_study_that_was_deleted_and_made_again_takes_no_name_that_has_looked(
    searched: Path, concluded: Conclusions
) -> None:
    run(searched)
    database = Database(url(searched))
    store = Store(database)
    for name in ("toy.evaluation-1", "toy.evaluation-1/again-1", "toy.evaluation-3"):
        store.open_look("d", "test", "toy", name, "m")
    store.open_look("d", "test", "other", "other.evaluation-7", "m")
    assert catalog.delete(database, "toy", searched / "runs")
    database.close()
    make_study(searched, **SEARCH)
    run(searched)
    assert [(row.number, row.name) for row in evaluations(searched)] == [(4, "toy.evaluation-4")]
    assert run(searched)[2].has("toy.evaluation-4: it has ended before")


def test_it_is_shown_like_any_study(searched: Path, concluded: Conclusions) -> None:
    from tuner import display, status

    run(searched)
    database = Database(url(searched))
    _, rows = display.study_rows(database)
    assert [row[0] for row in rows] == ["toy", "toy.evaluation-1"]
    assert status.as_json(status.read(database))
    database.close()
    summary = summary_of(searched, "toy.evaluation-1")
    assert display.study_tables(summary)
    assert display.best_lines(summary, searched / "runs")
