"""The Optuna side of a study: sampling, pruning, constraints, queue and totals."""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.search_space import intersection

from storage.database import Database, DatabaseUnavailable, StorageError
from storage.runs import Fenced
from tests.race import counted, race
from tests.searches import (
    make_spec,
    make_study,
    measure,
    new_worker,
    value_of,
    work_off,
)  # fmt: skip
from tuner import optuna_study
from tuner.optuna_storage import RetryingStorage
from tuner.optuna_study import CONSTRAINT, IGNORES_CONSTRAINTS, Search, build_pruner, ranked_violation
from tuner.spec import Objective, PrunerSpec, Spec
from tuner.study import Study

SAMPLERS = ["tpe", "gp", "random", "qmc", "cmaes"]
PRUNERS = ["median", "patient", "hyperband", "successive_halving", "none"]
STATE = optuna.trial.TrialState


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches keep their trials in memory: for questions about sampling and pruning that take many trials."""
    monkeypatch.setattr("tuner.optuna_study.RetryingStorage", lambda _database: optuna.storages.InMemoryStorage())


def configs(spec: Spec, search: Search, trial: optuna.Trial, limit: int = 99) -> dict[str, Any]:
    """Suggest the first `limit` dimensions of a trial, in order."""
    told: dict[str, Any] = {}

    class KilledHere(Exception):
        pass

    def choose(dimension: Any, default: Any) -> Any:
        if len(told) == limit:
            raise KilledHere
        told[dimension.path] = search.suggest(trial, dimension, default)
        return told[dimension.path]

    try:
        return spec.space.sample(spec.config, spec.arms[search.arm_of(trial.number)], choose)
    except KilledHere:
        return told


class TestSampling:
    @staticmethod
    def params(database: Database, spec: Spec, name: str, n: int, killed: tuple[int, ...] = ()) -> list[Any]:
        """The parameters of `n` trials, some of which were killed between two suggestions."""
        search = Search(database, spec, name, create=True)
        for number in range(n):
            trial = search.ask()
            if number in killed:
                configs(spec, search, trial, limit=1 + number % 2)
                search = Search(database, spec, name)  # another process
                search.requeue(number)
                trial = search.ask()
            assert trial.number == number
            value = value_of(configs(spec, search, trial), 3)
            search.end(trial, "complete", value, 0.1 if number % 3 else -0.1)
        return [trial.params for trial in search.trials()]

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_study_is_reproducible_also_when_killed_between_two_suggestions(
        self, sqlite: Database, sampler: str
    ) -> None:
        n = 7 if sampler == "gp" else 14
        spec = make_spec(sampler={"name": sampler, "n_startup_trials": 3})
        whole = self.params(sqlite, spec, "whole", n)
        assert self.params(sqlite, spec, "killed", n, killed=(1, 3, n - 2, n - 1)) == whole
        assert len({params["x"] for params in whole}) > n / 2

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_trial_that_is_asked_for_in_between_changes_nothing(self, sqlite: Database, sampler: str) -> None:
        """A worker with several slots may have to wait for the database between asking and suggesting."""
        spec = make_spec(sampler={"name": sampler, "n_startup_trials": 3})
        found = []
        for name in ("at once", "late"):
            self.params(sqlite, spec, name, 6)
            search = Search(sqlite, spec, name)
            trial = search.ask()
            if name == "late":
                search.ask()
            found.append(configs(spec, search, trial))
        assert found[0] == found[1]

    def test_the_seed_decides(self, sqlite: Database) -> None:
        a, b = (self.params(sqlite, make_spec(seed=seed), str(seed), 5) for seed in (1, 2))
        assert a[:2] == b[:2]  # the defaults
        assert all(one["x"] != other["x"] for one, other in zip(a[2:], b[2:], strict=True))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_first_trial_of_every_arm_is_its_default(self, sqlite: Database, sampler: str) -> None:
        spec = make_spec(sampler={"name": sampler, "n_startup_trials": 1})
        first = self.params(sqlite, spec, "s", 3)[:2]
        assert first == [{"shape": "a", "x": 0.5, "speed": 0.5, "y": 0.5}, {"shape": "a", "x": 0.5, "y": 0.5}]

    def test_arms_are_dealt_and_named(self, sqlite: Database) -> None:
        search = Search(sqlite, make_spec(arms={"one": {}, "two": {}, "three": {}}), "s", create=True)
        trials = [search.ask() for _ in range(7)]
        assert [t.user_attrs["arm"] for t in trials] == [
            "one", "two", "three", "one", "two", "three", "one",
        ]  # fmt: skip
        assert [search.is_default(t.number) for t in trials] == [True] * 3 + [False] * 4

    def test_independent_values_differ_from_trial_to_trial(self, sqlite: Database) -> None:
        spec = make_spec(sampler={"name": "qmc"}, arms={"only": {}})
        params = self.params(sqlite, spec, "s", 10)
        conditional = [p["y"] for p in params[1:] if "y" in p]
        assert len(set(conditional)) == len(conditional) > 2

    def test_which_samplers_ignore_constraints(self) -> None:
        assert {"random", "qmc", "cmaes"} == IGNORES_CONSTRAINTS


class TestInfeasible:
    def test_ranking(self) -> None:
        up = Objective(metric="m")
        down = Objective(metric="m", direction="minimize")
        assert ranked_violation(-0.2, 0.5, up) == -0.2
        assert ranked_violation(0.0, 0.5, up) == 0.0
        assert 1.0 < ranked_violation(0.01, 0.9, up) < ranked_violation(0.01, 0.1, up)
        assert 1.0 < ranked_violation(9.0, 0.1, down) < ranked_violation(0.01, 0.9, down)

    def test_the_constraint_is_set_once(self, sqlite: Database) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        trial = search.ask()
        trial.set_constraint(CONSTRAINT, 1.5)  # killed before it was told
        search.end(trial, "complete", 0.9, -1.0)
        assert search.study.trials[0].constraints == {CONSTRAINT: 1.5}

    @pytest.mark.parametrize("state", ["complete", "pruned"])
    def test_complete_and_pruned_trials_have_one(self, sqlite: Database, state: str) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        search.end(search.ask(), state, 0.75, 0.2)
        assert search.study.trials[0].constraints == {CONSTRAINT: pytest.approx(1.25)}

    def test_failed_trials_have_none(self, sqlite: Database) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        search.end(search.ask(), "failed", None, None)
        trial = search.study.trials[0]
        assert (trial.state, trial.constraints) == (STATE.FAIL, {})

    def test_where_nothing_is_feasible_the_search_still_beats_random_search(
        self, sqlite: Database, in_memory: None
    ) -> None:
        n_trials, seeds = 18, range(20)
        space = {name: {"low": 0.0, "high": 1.0} for name in ("x", "y", "speed")}

        def height(x: float, y: float, z: float) -> float:
            return math.exp(-3 * ((x - 0.3) ** 2 + (y - 0.6) ** 2 + (z - 0.8) ** 2))

        def best(seed: int) -> float:
            spec = make_spec(seed=seed, space=space, arms={"a": {}}, sampler={"n_startup_trials": 8})
            search = Search(sqlite, spec, f"s{seed}", create=True)
            values = []
            for _ in range(n_trials):
                trial = search.ask()
                config = configs(spec, search, trial)
                values.append(height(config["x"], config["y"], config["speed"]))
                # The precision is out of reach everywhere, and nearest to it far from the best objective.
                search.end(trial, "complete", values[-1], 0.1 + (1 - config["x"]) * 0.3 + config["y"] * 0.3)
            return max(values)

        generator = np.random.default_rng(0)
        points = generator.random((2000, n_trials, 3))
        points[:, 0] = 0.5  # the default config, which every study begins with
        far = ((points - [0.3, 0.6, 0.8]) ** 2).sum(axis=2)
        random_bests = np.exp(-3 * far).max(axis=1)
        found = [best(seed) for seed in seeds]
        # Of ten random searches, seven end below. With the raw violation, two did.
        assert np.mean(found) > np.mean(random_bests) + 0.03
        assert np.mean([np.mean(random_bests < value) for value in found]) > 0.65


def walk(search: Search, trial: optuna.Trial, curve: Any, n_ended: int) -> tuple[float, str]:
    """Report a curve until its end or the pruner's; returns the best value reached and how it ended."""
    state = "complete"
    for step, value in enumerate(curve):
        search.report(trial, step, float(value))
        if search.should_prune(trial, n_ended):
            state = "pruned"
            break
    best = float(max(curve[: step + 1]))
    search.end(trial, state, best, -0.1)
    return best, state


def play(search: Search, curve: Callable[[int], float], n_steps: int, n_ended: int) -> str:
    """One more trial along a curve; returns how it ended."""
    return walk(search, search.ask(), [curve(step) for step in range(n_steps)], n_ended)[1]


class TestPruning:
    def spec(self, **pruner: Any) -> Spec:
        return make_spec(pruner={"name": "median", "min_completed": 2, "warmup_steps": 2, **pruner})

    def test_a_trial_is_compared_with_its_own_arm_alone(self, sqlite: Database) -> None:
        search = Search(sqlite, self.spec(), "s", create=True)
        # Arm one reaches 0.9, arm two 0.3; trials 0 and 1 are the defaults.
        endings = [
            play(search, lambda step, top=top: top * (step + 1) / 5, 5, n_ended)
            for n_ended, top in enumerate([0.9, 0.3] * 3)
        ]
        assert endings == ["complete"] * 6
        assert play(search, lambda step: 0.8 * (step + 1) / 5, 5, 6) == "pruned"  # arm one: below 0.9
        assert play(search, lambda step: 0.4 * (step + 1) / 5, 5, 7) == "complete"  # arm two: above 0.3
        assert play(search, lambda step: 1.0 * (step + 1) / 5, 5, 8) == "complete"
        assert play(search, lambda step: 0.2 * (step + 1) / 5, 5, 9) == "pruned"

    @pytest.mark.parametrize("min_completed", [1, 3])
    def test_nothing_is_pruned_before_enough_of_the_arm_are_complete(
        self, sqlite: Database, min_completed: int
    ) -> None:
        search = Search(sqlite, self.spec(min_completed=min_completed), "s", create=True)
        endings = [play(search, lambda step, n=n: -n + step / 10, 5, n) for n in range(10)]
        # Of the arm: its default and those that followed.
        assert endings == ["complete"] * 2 * min_completed + ["pruned"] * (10 - 2 * min_completed)

    @pytest.mark.parametrize("warmup_steps", [0, 3])
    def test_nothing_is_pruned_during_the_warm_up(self, sqlite: Database, warmup_steps: int) -> None:
        search = Search(sqlite, self.spec(warmup_steps=warmup_steps), "s", create=True)
        for n in range(4):
            assert play(search, lambda step: 0.5 + step, 6, n) == "complete"
        assert play(search, lambda step: 0.1 + step / 9, 6, 4) == "pruned"
        assert max(search.study.trials[4].intermediate_values) == warmup_steps

    def test_the_default_of_an_arm_is_never_pruned(self, sqlite: Database) -> None:
        search = Search(sqlite, self.spec(min_completed=1, warmup_steps=0), "s", create=True)
        trial_0, trial_1 = search.ask(), search.ask()
        trial_2, trial_3 = search.ask(), search.ask()
        for trial in (trial_2, trial_3):
            search.report(trial, 0, 0.9)
            search.end(trial, "complete", 0.9, -0.1)
        for trial in (trial_0, trial_1):
            search.report(trial, 0, 0.1)
            assert not search.should_prune(trial, 2)
        loser = search.ask()
        search.report(loser, 0, 0.1)
        assert search.should_prune(loser, 2)

    def test_completed_trials_are_read_again_when_more_have_ended(self, sqlite: Database) -> None:
        search, other = (Search(sqlite, self.spec(min_completed=1), "s", create=c) for c in (True, False))
        assert [play(other, lambda step: 0.5, 4, n) for n in range(2)] == ["complete"] * 2
        trial = search.ask()
        for step in range(3):
            search.report(trial, step, 0.6)
        assert not search.should_prune(trial, 2)
        other.ask()
        assert play(other, lambda step: 0.9, 4, 2) == "complete"  # trial 4, of the same arm
        assert not search.should_prune(trial, 2)
        assert search.should_prune(trial, 3)  # 0.6 against the median of 0.5 and 0.9

    def test_steps_that_are_forgotten_are_judged_no_more(self, sqlite: Database) -> None:
        search = Search(sqlite, self.spec(min_completed=1, warmup_steps=0), "s", create=True)
        assert [play(search, lambda step: 0.5, 4, n) for n in range(2)] == ["complete"] * 2
        trial = search.ask()
        for step, value in enumerate((0.1, 0.2, 0.9)):
            search.report(trial, step, value)
        assert not search.should_prune(trial, 2)  # saved by step 2
        search.forget(trial, 0)
        assert search.study.trials[2].intermediate_values == {0: 0.1}
        assert search.should_prune(trial, 2)
        search.report(trial, 1, 0.6)
        assert search.study.trials[2].intermediate_values == {0: 0.1, 1: 0.6}

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_every_pruner_works(self, sqlite: Database, pruner: str) -> None:
        spec = self.spec(name=pruner, max_steps=12, patience=1)
        search = Search(sqlite, spec, "s", create=True)
        assert (build_pruner(spec.pruner) is None) == (pruner == "none")
        curves = [lambda step, top=top: top - 0.01 * step for top in (0.9, 0.8)]
        curves += [lambda step, n=n: 0.7 - 0.05 * n - 0.01 * step for n in range(16)]
        endings = Counter(play(search, curve, 12, n) for n, curve in enumerate(curves))
        assert (endings["pruned"] > 3) == (pruner != "none")

    def test_a_slow_learning_arm_completes_as_many_trials_as_the_others(
        self, sqlite: Database, in_memory: None
    ) -> None:
        # The slow arm is behind at every step up to the last few, where it ends best.
        arms = {"fast": (0.6, 0.9), "medium": (0.7, 0.4), "slow": (1.0, 0.15)}
        completed: Counter[str] = Counter()
        for seed in range(3):
            spec = make_spec(
                seed=seed,
                sampler={"name": "random"},
                arms={name: {} for name in arms},
                space={"x": {"low": 0.0, "high": 1.0}},
                pruner={"name": "median", "min_completed": 3, "warmup_steps": 4},
            )
            search = Search(sqlite, spec, f"s{seed}", create=True)
            noise = np.random.default_rng(seed)
            bests = dict.fromkeys(arms, 0.0)
            for n_ended in range(48):
                trial = search.ask()
                arm = search.arm_of(trial.number)
                top, speed = arms[arm]
                x = configs(spec, search, trial)["x"]
                curve = top * (1 - 0.5 * abs(x - 0.3)) * (1 - np.exp(-speed * np.arange(1, 13)))
                curve = curve + noise.normal(0, 0.005, 12)
                reached, state = walk(search, trial, curve, n_ended)
                completed[arm] += state == "complete"
                bests[arm] = max(bests[arm], reached)
            assert max(bests, key=lambda arm: bests[arm]) == "slow"
        assert max(completed.values()) - min(completed.values()) <= 2 * 3
        assert sum(completed.values()) < 0.7 * 3 * 48  # it does prune

    def test_hyperband_needs_room(self) -> None:
        with pytest.raises(ValueError, match="max_steps"):
            PrunerSpec(name="hyperband", warmup_steps=50, max_steps=50)


class TestTransactions:
    @pytest.mark.parametrize("n_metrics", [1, 60])
    def test_two_at_most_per_measurement(self, database: Database, n_metrics: int, tmp_path: Path) -> None:
        from models.trainer import Measurement
        from tuner.reporter import Reporter

        study = make_study(database, make_spec(pruner={"name": "median", "min_completed": 1, "warmup_steps": 0}))
        worker = new_worker(study)
        for _ in range(4):
            claim = study.claim(worker)
            assert claim is not None
            work_off(study, claim, n_steps=6)
        claim = study.claim(worker)
        assert claim is not None
        reporter = Reporter(study, claim, tmp_path)
        metrics = {f"train/m{i}": 0.5 for i in range(n_metrics)}
        counts = []
        for step in range(6):
            with counted(database.engine) as counter:
                reporter.add(
                    Measurement(step, {"valid/toy/pr_auc": 0.9, "valid/toy/violation": 0.1, **metrics}, 1.0)
                )
                assert not study.search.should_prune(claim.trial, reporter.flush().n_ended)
            counts.append(counter.transactions)
        # The first of an arm in a process opens the pruner's view of the arm.
        assert counts == [3, 2, 2, 2, 2, 2]


class TestQueue:
    def test_a_requeued_trial_keeps_number_parameters_and_values(self, database: Database) -> None:
        spec = make_spec()
        search = Search(database, spec, "s", create=True)
        for _ in range(3):
            trial = search.ask()
        before = configs(spec, search, trial)
        search.report(trial, 0, 0.25)
        other = Search(database, spec, "s")
        other.requeue(2)
        assert [t.state for t in other.trials()] == ["running", "running", "waiting"]
        again = other.ask()
        assert again.number == 2
        assert configs(spec, other, again) == before
        other.report(again, 0, 0.25)  # it is there: ignored
        other.report(again, 1, 0.5)
        other.end(again, "complete", 0.5, -0.1)
        assert other.study.trials[2].intermediate_values == {0: 0.25, 1: 0.5}
        assert other.trials()[2].value == 0.5

    def test_ended_trials_are_looked_at_once(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a claim costs must not grow by every trial there ever was."""
        looked_at: list[int] = []
        row_of, calculate = optuna_study._row_of, intersection._calculate
        spaces: list[int] = []

        def counted_row(trial: optuna.trial.FrozenTrial) -> Any:
            looked_at.append(trial.number)
            return row_of(trial)

        def counted_space(trials: Any, include_pruned: bool, space: Any, first_unseen: int) -> Any:
            spaces.append(first_unseen)
            return calculate(trials, include_pruned, space, first_unseen)

        monkeypatch.setattr(optuna_study, "_row_of", counted_row)
        monkeypatch.setattr(intersection, "_calculate", counted_space)
        spec = make_spec(arms={"only": {}}, sampler={"n_startup_trials": 1})
        search = Search(database, spec, "s", create=True)
        for number in range(5):
            search.trials()
            trial = search.ask()
            configs(spec, search, trial)
            search.end(trial, "complete", 0.1 * number, -0.1)
        assert [row.state for row in search.trials()] == ["complete"] * 5
        assert looked_at == [0, 1, 2, 3, 4]
        assert spaces == [-1, 1, 2, 3]

    def test_what_was_ended_from_outside_is_nobodys(self, database: Database) -> None:
        spec = make_spec()
        search = Search(database, spec, "s", create=True)
        trial = search.ask()
        Search(database, spec, "s").fail(0)
        with pytest.raises(Fenced, match="from outside"):
            search.report(trial, 0, 0.5)
        with pytest.raises(Fenced, match="from outside"):
            configs(spec, search, trial)
        with pytest.raises(Fenced, match="from outside"):
            search.end(trial, "complete", 0.5, 0.1)
        assert search.trials()[0].state == "failed"

    @pytest.mark.parametrize("n_processes", [8])
    def test_exact_total_in_a_race_and_a_queued_trial_is_handed_out_once(
        self, database: Database, storage_url: str, n_processes: int
    ) -> None:
        study = make_study(database, make_spec(n_trials=24))
        for claim in [study.claim(new_worker(study)) for _ in range(6)]:
            assert claim is not None
            study.stop(claim)
        assert Counter(t.state for t in study.search.trials()) == {"waiting": 6}
        results = race(n_processes, compete, storage_url)
        handed = [number for result in results for number in result]
        assert sorted(handed) == list(range(24))
        trials = study.search.trials()
        assert Counter(t.state for t in trials) == {"complete": 24}
        assert len(study.store.runs(study.id)) == 24
        assert {a.attempt for a in study.store.attempts(study.id) if a.number < 6} == {1, 2}
        assert {a.attempt for a in study.store.attempts(study.id) if a.number >= 6} == {1}

    def test_a_foreign_study_of_that_name_is_refused(self, database: Database) -> None:
        foreign = optuna.create_study(study_name="s", storage=RetryingStorage(database), direction="minimize")
        foreign.add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(StorageError, match="not ours"):
            Search(database, make_spec(), "s", create=True)
        assert len(foreign.trials) == 1


def compete(_index: int, url: str) -> list[int]:
    """Claim and end trials until all have ended; returns their numbers."""
    import time

    database = Database(url)
    study = Study.open(database, "toy")
    worker = new_worker(study)
    numbers = []
    while not study.is_over():
        claim = study.claim(worker)
        if claim is None:
            time.sleep(0.01)
            continue
        measure(study, claim, 0, 0.5)
        study.end(claim, "complete")
        numbers.append(claim.number)
    database.close()
    return numbers


class TestRetries:
    """Transient errors of the database, injected below SQLAlchemy."""

    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storage.database.time.sleep", lambda _s: None)

    def failing(self, database: Database, fails: Callable[[str], bool]) -> Callable[[], None]:
        def listener(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if fails(statement):
                raise sa.exc.OperationalError(statement, {}, sqlite3.OperationalError("database is locked"))

        sa.event.listen(database.engine, "before_cursor_execute", listener)
        return lambda: sa.event.remove(database.engine, "before_cursor_execute", listener)

    def test_every_tenth_statement_fails_and_the_trial_is_whole(self, sqlite: Database) -> None:
        spec = make_spec(n_trials=1)
        study = make_study(sqlite, spec)
        search, told = study.search, {"n": 0}
        generator = np.random.default_rng(0)
        trial = search.ask()

        def fails(statement: str) -> bool:
            told["n"] += 1
            return generator.random() < 0.1

        stop = self.failing(sqlite, fails)
        config = configs(spec, search, trial)
        for step in range(3):
            search.report(trial, step, step / 10)
        search.end(trial, "complete", 0.2, -0.1)
        stored = search.study.get_trials(deepcopy=False)
        stop()
        assert told["n"] > 30
        assert [t.state for t in stored] == [STATE.COMPLETE]
        assert stored[0].params == {"shape": config["shape"], "x": config["x"], "y": config["y"], "speed": 0.5}
        assert stored[0].intermediate_values == {0: 0.0, 1: 0.1, 2: 0.2}

    def test_patience_ends_with_one_line(self, sqlite: Database) -> None:
        study = make_study(sqlite, make_spec())
        storage = RetryingStorage(sqlite, patience_s=0.0)
        stop = self.failing(sqlite, lambda _s: True)
        with pytest.raises(DatabaseUnavailable, match="database is locked") as caught:
            storage.get_all_trials(study.search.study._study_id)
        stop()
        assert "\n" not in str(caught.value)

    def test_other_errors_are_told_at_once(self, sqlite: Database) -> None:
        with sqlite.transaction() as connection:
            connection.execute(sa.text("drop table trial_params"))
        with pytest.raises(StorageError, match="no such table") as caught:
            make_study(sqlite, make_spec()).search.ask().suggest_float("x", 0, 1)
        assert type(caught.value) is StorageError

    def lose_answers(self, database: Database, monkeypatch: pytest.MonkeyPatch, n: int) -> Callable[[], int]:
        """The next `n` commits succeed, but their answers are lost."""
        commit, left = database.engine.dialect.do_commit, [n]

        def do_commit(connection: Any) -> None:
            commit(connection)
            if left[0]:
                left[0] -= 1
                raise sqlite3.OperationalError("database is locked")

        monkeypatch.setattr(database.engine.dialect, "do_commit", do_commit)
        return lambda: left[0]

    @pytest.mark.parametrize("state", [STATE.COMPLETE, STATE.PRUNED, STATE.FAIL, STATE.WAITING])
    def test_a_change_of_state_whose_answer_was_lost(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch, state: STATE
    ) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        trial = search.ask()
        left = self.lose_answers(sqlite, monkeypatch, 1)
        assert search.storage.set_trial_state_values(trial._trial_id, state, [1.0]) is True
        assert left() == 0
        assert search.study.trials[0].state == state

    def test_a_queued_trial_whose_answer_was_lost_is_taken(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        search.ask()
        search.requeue(0)
        trial_id = search.study.trials[0]._trial_id
        self.lose_answers(sqlite, monkeypatch, 1)
        assert search.storage.set_trial_state_values(trial_id, STATE.RUNNING) is True
        assert search.storage.set_trial_state_values(trial_id, STATE.RUNNING) is False  # somebody else's

    def test_ended_twice_without_a_lost_answer_is_an_error(self, sqlite: Database) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        trial = search.ask()
        search.end(trial, "complete", 1.0, -1.0)
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            search.storage.set_trial_state_values(trial._trial_id, STATE.FAIL)
        search.end(trial, "failed", None, None)  # told already: nothing changes
        assert search.trials()[0].state == "complete"

    def test_a_new_trial_is_asked_for_once(self, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        search = Search(sqlite, make_spec(), "s", create=True)
        n_commits = []
        sa.event.listen(sqlite.engine, "commit", lambda _c: n_commits.append(1))
        search.study._storage.get_all_trials(search.study._study_id)  # ask reads first
        n_reading = len(n_commits)
        commit = sqlite.engine.dialect.do_commit
        calls = []

        def do_commit(connection: Any) -> None:
            commit(connection)
            calls.append(1)
            if len(calls) == n_reading + 1:
                raise sqlite3.OperationalError("database is locked")

        monkeypatch.setattr(sqlite.engine.dialect, "do_commit", do_commit)
        with pytest.raises(DatabaseUnavailable):
            search.ask()
        assert len(search.trials()) == 1
