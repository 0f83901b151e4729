"""Optuna's storage on our terms: SQLite safe for several processes, transient errors tried again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models as rdb_models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial
from sqlalchemy import orm
from sqlalchemy.exc import SQLAlchemyError

from storage.database import Database, DatabaseUnavailable, StorageError, is_transient, retry
from tuner.optuna_schema import optuna_versions

T = TypeVar("T")

_RETRIED = (
    "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_all_studies", "_set_trial_param", "set_trial_state_values",
    "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "get_trial", "_get_trials",
    "get_all_trials", "get_trial_id_from_study_id_trial_number", "get_best_trial", "_get_best_trial_id",
    "get_trial_system_attrs", "get_trial_user_attrs", "delete_intermediate_values",
)  # fmt: skip


class RetryingStorage(optuna.storages.RDBStorage):
    """`RDBStorage` that outlives short database outages.

    Each method is tried again on transient errors for `patience_s` seconds, then raises DatabaseUnavailable. A
    change of state whose answer was lost is found done at the second try and counts as success. Creating a trial
    alone is never tried again: a second try would leave one trial too many.
    """

    def __init__(self, database: Database, patience_s: float = 60.0) -> None:
        # RDBStorage.__init__ connects before an engine can be prepared for SQLite, so its few attributes are set
        # here, on the one engine that this process has.
        self.database = database
        self.patience_s = patience_s
        self.url = database.url.render_as_string(hide_password=False)
        self.engine_kwargs = {}
        self.skip_compatibility_check = True
        self.heartbeat_interval = None
        self.grace_period = None
        self.heartbeat_stale_trial_callback = None
        self.failed_trial_callback = None
        self.engine = database.engine
        self.scoped_session = orm.scoped_session(orm.sessionmaker(bind=self.engine))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """As in RDBStorage, which tries five times. Whoever asked may ask again, and then finds the first trial.

        Raises:
            DatabaseUnavailable: the trial was created or not.
        """
        try:
            with _create_scoped_session(self.scoped_session) as session:
                rdb_models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
                row = self._get_prepared_new_trial(study_id, template_trial, session)
                if template_trial is not None:
                    return self._build_frozen_trial_from_trial_model(row)
                return FrozenTrial(
                    number=row.number, state=row.state, value=None, datetime_start=row.datetime_start,
                    datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={},
                    intermediate_values={}, trial_id=row.trial_id,
                )  # fmt: skip
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise self._refusal(error) from error

    def delete_intermediate_values(self, trial_id: int, after_step: int) -> None:
        """Remove a trial's values beyond a step, which Optuna has no call for. Tried again as the others."""
        value = rdb_models.TrialIntermediateValueModel
        with _create_scoped_session(self.scoped_session) as session:
            session.query(value).filter(value.trial_id == trial_id, value.step > after_step).delete()

    def _refusal(self, error: Exception) -> StorageError:
        """An error of Optuna's storage in our vocabulary."""
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        kind = DatabaseUnavailable if cause is not None and is_transient(cause) else StorageError
        return kind(f"storage: {self.database!r}: {str(cause or error).splitlines()[0]}")

    def create_schema(self) -> None:
        """Make Optuna's tables where there are none, else check their version. Process-safe.

        Raises:
            StorageError: they are of another version than this Optuna.
        """
        self.database.make_folder()
        with self.database.exclusive("schema"):
            if not self.has_schema():
                rdb_models.BaseModel.metadata.create_all(self.engine)
            self.check_schema()

    def has_schema(self) -> bool:
        if not self.database.exists():
            return False
        with self.database.transaction() as connection:
            return sa.inspect(connection).has_table("version_info")

    def check_schema(self) -> None:
        """Raises StorageError when Optuna's tables are of another version than this Optuna."""
        versions = optuna_versions(self.database)
        if not versions.equal:
            raise StorageError(
                f"storage: {self.database!r}: expected Optuna schema {versions.expected}, got {versions.found}; "
                "stop every worker, back up, run `tuner db upgrade`, or use another --storage"
            )


def _retrying(method: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(method)
    def wrapper(self: RetryingStorage, *args: Any, **kwargs: Any) -> T:
        tries = 0

        def call() -> T:
            nonlocal tries
            tries += 1
            done_before = tries > 1 and method.__name__ == "set_trial_state_values"
            try:
                answer = method(self, *args, **kwargs)
            except optuna.exceptions.UpdateFinishedTrialError:
                if not done_before:
                    raise
                return True  # type: ignore[return-value]
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
                raise self._refusal(error) from error
            # False: the queued trial runs already, since the first try took it.
            return True if done_before else answer  # type: ignore[return-value]

        return retry(call, self.patience_s, method.__name__)

    return wrapper


for _name in _RETRIED:
    setattr(RetryingStorage, _name, _retrying(getattr(RetryingStorage, _name)))
