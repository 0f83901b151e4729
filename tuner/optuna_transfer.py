"""Optuna's side of a study from one database into another, within a transaction of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models as rdb_models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import orm
from sqlalchemy.exc import SQLAlchemyError

from storage.database import StorageError
from storage.transfer import Side
from tuner.optuna_storage import RetryingStorage

_BATCH = 500


def copy_trials(
    source: Side, target: Side, name: str, new: str, progress: Callable[[int], None] = lambda n: None
) -> list[TrialState]:
    """Copy a study of Optuna's with all that it has; its trials keep their numbers.

    A trial that runs waits at the target, where nobody works on it.

    Args:
        progress: called with how many further trials are written.

    Returns:
        The states of the trials at the target, by number.

    Raises:
        StorageError: the target has a study `new`.
        KeyError: the source has no study `name`.
    """
    reading, writing = _StorageWithin(source), _StorageWithin(target)
    old_id = reading.get_study_id_from_name(name)
    try:
        new_id = writing.create_new_study(reading.get_study_directions(old_id), new)
    except optuna.exceptions.DuplicatedStudyError:
        raise StorageError(
            f"storage: {target.database!r}: expected no study {new!r}, got one of Optuna's that is not ours; take "
            "another name with --study NEW"
        ) from None
    for key, value in reading.get_study_user_attrs(old_id).items():
        writing.set_study_user_attr(new_id, key, value)
    for key, value in reading.get_study_system_attrs(old_id).items():
        writing.set_study_system_attr(new_id, key, value)
    trials = reading.get_all_trials(old_id, deepcopy=False)
    for first in range(0, len(trials), _BATCH):
        batch = trials[first : first + _BATCH]
        writing.create_trials(new_id, batch)
        progress(len(batch))
    return [_state(trial) for trial in trials]


class _StorageWithin(RetryingStorage):
    """Optuna's storage within one transaction of ours: what it reads is of one moment, what it writes is there with
    the rest of that transaction or not at all."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.database, patience_s=0.0)
        # Its own commits do not end a transaction that it has not begun.
        session = orm.sessionmaker(bind=side.connection, join_transaction_mode="rollback_only")
        self.scoped_session = orm.scoped_session(session)

    def create_trials(self, study_id: int, trials: Sequence[FrozenTrial]) -> None:
        """Trials with their numbers and all that they have, in Optuna's own models and its own encoding.

        Optuna creates them one by one and looks, for each of their values, for one that is there: sixteen
        milliseconds for a trial of twenty measurements, while nobody else can write.
        """
        try:
            with _create_scoped_session(self.scoped_session) as session:
                rows = [
                    rdb_models.TrialModel(
                        study_id=study_id, number=trial.number, state=_state(trial),
                        datetime_start=trial.datetime_start, datetime_complete=trial.datetime_complete,
                    )
                    for trial in trials
                ]  # fmt: skip
                session.add_all(rows)
                session.flush()
                ids = [row.trial_id for row in rows]
                for model, of_trial in _PARTS:
                    of_all = zip(ids, map(of_trial, trials), strict=True)
                    parts = [{"trial_id": trial_id} | part for trial_id, parts in of_all for part in parts]
                    session.bulk_insert_mappings(sa.inspect(model), parts)
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise self._refusal(error) from error


def _state(trial: FrozenTrial) -> TrialState:
    return TrialState.WAITING if trial.state == TrialState.RUNNING else trial.state


def _params(trial: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {
            "param_name": name,
            "param_value": trial.distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]


def _values(trial: FrozenTrial) -> list[dict[str, Any]]:
    stored = map(rdb_models.TrialValueModel.value_to_stored_repr, trial.values or ())
    return [{"objective": i, "value": value, "value_type": kind} for i, (value, kind) in enumerate(stored)]


def _intermediate_values(trial: FrozenTrial) -> list[dict[str, Any]]:
    encode = rdb_models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
    stored = {step: encode(value) for step, value in trial.intermediate_values.items()}
    return [
        {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        for step, (value, kind) in stored.items()
    ]


def _attributes(of_trial: Callable[[FrozenTrial], dict[str, Any]]) -> Callable[[FrozenTrial], list[dict[str, Any]]]:
    return lambda trial: [{"key": key, "value_json": json.dumps(v)} for key, v in of_trial(trial).items()]


_PARTS: tuple[tuple[Any, Callable[[FrozenTrial], list[dict[str, Any]]]], ...] = (
    (rdb_models.TrialParamModel, _params),
    (rdb_models.TrialValueModel, _values),
    (rdb_models.TrialIntermediateValueModel, _intermediate_values),
    (rdb_models.TrialUserAttributeModel, _attributes(lambda trial: trial.user_attrs)),
    (rdb_models.TrialSystemAttributeModel, _attributes(lambda trial: trial.system_attrs)),
)
