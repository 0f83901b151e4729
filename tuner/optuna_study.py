"""One Optuna study as the rest of the tuner sees it: ask, suggest, report, prune, tell.

Sampler and pruner are rebuilt from the specification in every process; Optuna does not store them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from models.trainer import Objective
from storage.database import Database, StorageError
from storage.runs import Fenced
from tuner.optuna_storage import RetryingStorage
from tuner.space import Dimension
from tuner.spec import PrunerSpec, SamplerSpec, Spec

# Its warnings tell of every single value of a conditional dimension that is sampled independently.
optuna.logging.set_verbosity(optuna.logging.ERROR)
# What is left goes the way of all our lines, which masks passwords.
optuna.logging.disable_default_handler()
optuna.logging.enable_propagation()

CONSTRAINT = "violation"
# These samplers rank by the objective alone; the feasible best is still chosen among all trials.
IGNORES_CONSTRAINTS = frozenset({"random", "qmc", "cmaes"})


@dataclass(frozen=True)
class TrialRow:
    """One trial as Optuna stores it. `state` is one of complete, pruned, failed, running, waiting."""

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    started_at: float | None
    ended_at: float | None

    @property
    def ended(self) -> bool:
        return self.state in ("complete", "pruned", "failed")


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_ENDED = frozenset(state for state in TrialState if state.is_finished())


def create_optuna_schema(database: Database) -> None:
    """Make Optuna's tables once, or check their version. Process-safe; raises StorageError."""
    RetryingStorage(database).create_schema()


def delete_study(database: Database, name: str) -> None:
    optuna.delete_study(study_name=name, storage=RetryingStorage(database))


class Search:
    """The Optuna side of one study.

    The sampler's seed is SeedSequence(study seed, trial number, parameter), so what a trial is offered depends on
    the trials before it and on nothing else: with one worker a study is reproducible, also when killed and resumed.
    The first trial of every arm gets the default config.

    Args:
        spec: the study's specification.
        name: the study's name in the database; it exists already unless `create`.
    """

    def __init__(self, database: Database, spec: Spec, name: str, create: bool = False) -> None:
        self.arms = tuple(spec.arms)
        self.objective = spec.objective
        self.storage = RetryingStorage(database)
        self._sampler = _SeededSampler(spec.sampler, spec.seed, len(self.arms))
        self._read: list[FrozenTrial] = []
        self._n_ended = -1  # how many of the trials read had ended
        self._completed: dict[str, list[FrozenTrial]] = {}  # of the trials read, by arm
        self._ended_rows: dict[int, TrialRow] = {}  # which change no more: a claim would make ten thousand anew
        if create:
            self.study = optuna.create_study(
                study_name=name, storage=self.storage, sampler=self._sampler, pruner=optuna.pruners.NopPruner(),
                direction=spec.objective.direction, load_if_exists=True,
            )  # fmt: skip
            if self._frozen() or self.study.direction.name.lower() != spec.objective.direction:
                raise StorageError(
                    f"storage: {database!r}: expected no study {name!r}, got one of Optuna's that is not ours; "
                    "use --name NEW or another --storage"
                )
        else:
            self.study = optuna.load_study(
                study_name=name, storage=self.storage, sampler=self._sampler, pruner=optuna.pruners.NopPruner()
            )
        self._pruner = build_pruner(spec.pruner)
        self._arm_studies: dict[str, optuna.Study] = {}

    @contextmanager
    def without_patience(self) -> Iterator[None]:
        """Within it nothing is tried again: DatabaseUnavailable is raised at once."""
        patience_s, self.storage.patience_s = self.storage.patience_s, 0.0
        try:
            yield
        finally:
            self.storage.patience_s = patience_s

    def arm_of(self, number: int) -> str:
        return self.arms[number % len(self.arms)]

    def is_default(self, number: int) -> bool:
        """Whether this trial runs its arm's default config; such a trial is never pruned."""
        return number < len(self.arms)

    def trials(self) -> list[TrialRow]:
        """Every trial, by number."""
        rows = []
        for trial in self._frozen():
            row = self._ended_rows.get(trial.number)
            if row is None:
                row = _row_of(trial)
                if row.ended:
                    self._ended_rows[trial.number] = row
            rows.append(row)
        return rows

    def _frozen(self) -> list[FrozenTrial]:
        self._read = self.study.get_trials(deepcopy=False)
        self._n_ended = sum(trial.state in _ENDED for trial in self._read)
        self._completed.clear()
        return self._read

    def completed(self, arm: str) -> list[FrozenTrial]:
        """An arm's completed trials, among those read last."""
        if arm not in self._completed:
            trials = self._read[self.arms.index(arm) :: len(self.arms)]
            self._completed[arm] = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        return self._completed[arm]

    def ask(self) -> optuna.Trial:
        """A queued trial if there is one, else a new one. The caller holds the study's lock."""
        trial = self.study.ask()
        if "arm" not in trial.user_attrs:
            trial.set_user_attr("arm", self.arm_of(trial.number))
        return trial

    def requeue(self, number: int) -> bool:
        """Put a RUNNING trial back in the queue under its own number, with all that it holds.

        Returns:
            False where it has ended meanwhile: the last word of a worker that was killed, or whose lock went down
            with the server, can arrive after everything that is read here.
        """
        return self._set_state(number, TrialState.WAITING)

    def fail(self, number: int) -> bool:
        """End a trial that nobody holds as failed; False where it has ended meanwhile."""
        return self._set_state(number, TrialState.FAIL)

    def _set_state(self, number: int, state: TrialState) -> bool:
        trial_id = self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        try:
            self.study._storage.set_trial_state_values(trial_id, state)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def suggest(self, trial: optuna.Trial, dimension: Dimension, default: Any) -> Any:
        """The value of one dimension: the stored one if the trial was asked before. Raises Fenced."""
        self._sampler.defaults[dimension.path] = default
        path, low, high = dimension.path, dimension.low, dimension.high
        with _unended(trial):
            if dimension.kind == "categorical":
                return trial.suggest_categorical(path, dimension.choices)
            if dimension.kind == "int":
                step = 1 if dimension.step is None else int(dimension.step)
                return trial.suggest_int(path, int(low), int(high), step=step, log=dimension.log)
            return trial.suggest_float(path, low, high, step=dimension.step, log=dimension.log)

    def report(self, trial: optuna.Trial, step: int, value: float) -> None:
        """Store one intermediate value; a step that is there already is left alone. Raises Fenced."""
        if step not in trial._cached_frozen_trial.intermediate_values:
            with _unended(trial):
                trial.report(value, step)

    def forget(self, trial: optuna.Trial, after_step: int) -> None:
        """Remove the intermediate values beyond a step, to be measured again. The trial is the caller's."""
        self.storage.delete_intermediate_values(trial._trial_id, after_step)
        known = trial._cached_frozen_trial.intermediate_values
        for step in [step for step in known if step > after_step]:
            del known[step]

    def should_prune(self, trial: optuna.Trial, n_ended: int) -> bool:
        """Whether the pruner gives up on the trial, compared with its arm's completed trials alone.

        `n_ended` is the number of ended runs in the study: trials are read again only when it has changed.
        """
        if self._pruner is None or self.is_default(trial.number):
            return False
        if n_ended != self._n_ended:
            self._frozen()
            self._n_ended = n_ended
        arm = self.arm_of(trial.number)
        if arm not in self._arm_studies:
            view: Any = _ArmStorage(self, arm)
            self._arm_studies[arm] = optuna.Study(self.study.study_name, view, pruner=self._pruner)
        return self._pruner.prune(self._arm_studies[arm], trial._get_latest_trial())

    def end(self, trial: optuna.Trial, state: str, value: float | None, violation: float | None) -> None:
        """Tell Optuna the outcome: complete, pruned or failed. The constraint is set once, just before.

        Infeasible trials are ranked by the objective, not by their violation: given the raw violation TPE was no
        better than random search wherever the target was out of reach.

        Raises:
            Fenced: somebody else has ended the trial.
        """
        if violation is not None and value is not None:
            attributes = self.study._storage.get_trial_system_attrs(trial._trial_id)
            if not any(key.startswith("constraints") for key in attributes):
                with _unended(trial):
                    trial.set_constraint(CONSTRAINT, ranked_violation(violation, value, self.objective))
        told = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        self.study.tell(trial, value if told == TrialState.COMPLETE else None, state=told, skip_if_finished=True)


@contextmanager
def _unended(trial: optuna.Trial) -> Iterator[None]:
    """A trial that was ended from outside (`study.tell` by a person) is no longer the worker's."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        raise Fenced(f"trial {trial.number}: it was ended from outside") from None


def ranked_violation(violation: float, value: float, objective: Objective) -> float:
    """What Optuna is given as constraint: <= 0 iff feasible; larger the worse the objective where infeasible."""
    if violation <= 0:
        return violation
    return 1.0 + abs(objective.upper - value)


def build_pruner(spec: PrunerSpec) -> optuna.pruners.BasePruner | None:
    """The pruner named by the specification; None for `none`."""
    median = optuna.pruners.MedianPruner(
        n_startup_trials=spec.min_completed, n_warmup_steps=spec.warmup_steps, n_min_trials=spec.min_completed
    )
    if spec.name == "median":
        return median
    if spec.name == "patient":
        with _experimental():
            return optuna.pruners.PatientPruner(median, patience=spec.patience)
    if spec.name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, spec.warmup_steps), max_resource=spec.max_steps)
    if spec.name == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, spec.warmup_steps))
    return None


def _build_sampler(spec: SamplerSpec, seed: int) -> optuna.samplers.BaseSampler:
    if spec.name == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=spec.n_startup_trials, seed=seed)
    if spec.name == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=spec.n_startup_trials, seed=seed)
    if spec.name == "qmc":
        with _experimental():
            return _NumberedQMCSampler(seed=seed, warn_asynchronous_seeding=False, warn_independent_sampling=False)
    if spec.name == "cmaes":
        return optuna.samplers.CmaEsSampler(
            n_startup_trials=spec.n_startup_trials, seed=seed, warn_independent_sampling=False
        )
    return optuna.samplers.RandomSampler(seed=seed)


@contextmanager
def _experimental() -> Iterator[None]:
    """Use what Optuna calls experimental without its saying so every time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class _NumberedQMCSampler(optuna.samplers.QMCSampler):
    """Trial i gets the sequence's point i, also when it is asked again; Optuna's counter would go on."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self._number


class _SeededSampler(optuna.samplers.BaseSampler):
    """Delegates to a fresh sampler seeded by (study seed, trial number[, parameter])."""

    def __init__(self, spec: SamplerSpec, seed: int, n_arms: int) -> None:
        self._spec = spec
        self._seed = seed
        self._n_arms = n_arms
        # Asked for the space alone, which no seed changes: it remembers the trials that it has looked at.
        self._surveyor = _build_sampler(spec, seed)
        self.defaults: dict[str, Any] = {}

    def _seeded(self, *key: int) -> optuna.samplers.BaseSampler:
        entropy = np.random.SeedSequence([self._seed, *key])
        return _build_sampler(self._spec, int(entropy.generate_state(1)[0]))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number < self._n_arms:
            return {}
        return self._surveyor.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        # TPE and GP store what they sample for the other workers to see, and so for a trial that is asked again.
        parts = sorted(
            (int(key.rpartition(":")[2]), part)
            for key, part in trial.system_attrs.items()
            if ":relative_params:" in key
        )
        if parts:
            stored = json.loads("".join(part for _, part in parts))
            return {name: value for name, value in stored.items() if name in search_space}
        return self._seeded(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        if trial.number < self._n_arms:
            return self.defaults[param_name]
        # Own seed per parameter: a trial killed between two suggestions goes on with the same values.
        sampler = self._seeded(trial.number, *param_name.encode())
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class _ArmStorage:
    """A storage that shows one arm's trials, the completed ones as they were read last.

    Optuna's pruners read all trials at every call; here that would be most of the database traffic of a step.
    """

    def __init__(self, search: Search, arm: str) -> None:
        self._search = search
        self._arm = arm
        self._storage = search.study._storage

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        if states == (TrialState.COMPLETE,):
            return self._search.completed(self._arm)
        trials = self._storage.get_all_trials(study_id, deepcopy=False, states=states)
        return [trial for trial in trials if self._search.arm_of(trial.number) == self._arm]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def _row_of(trial: FrozenTrial) -> TrialRow:
    return TrialRow(
        trial.number, _STATES[trial.state], trial.values[0] if trial.values else None, trial.params,
        _epoch_seconds(trial.datetime_start), _epoch_seconds(trial.datetime_complete),
    )  # fmt: skip


def _epoch_seconds(moment: Any) -> float | None:
    return moment.timestamp() if moment is not None else None
