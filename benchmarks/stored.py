"""Finished trials put into a database in seconds, as Optuna and `tuner` would have stored them one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages._rdb import models as tables
from optuna.trial import TrialState

from storage.database import Database
from storage.tables import attempts, measurements, runs

N_PARAMS, N_STEPS = 10, 20
NAMES = tuple(f"p.p{i}" for i in range(N_PARAMS))
METRIC, VIOLATION = "valid/t/pr_auc", "valid/t/violation"


def curve(params: Sequence[float]) -> list[float]:
    """N_STEPS values, alike in all trials up to the last, which tells them apart: whichever points a sampler
    offers, every trial measures all its steps, and about half are pruned at the last one."""
    last = 2.0 - sum((value - 0.4) ** 2 for value in params) / N_PARAMS
    return [1.0 - 0.7 ** (step + 1) for step in range(N_STEPS - 1)] + [last]


def fill_optuna(database: Database, n: int) -> None:
    """`n` finished trials, half of them pruned, of the one study in the database.

    Through Optuna's own `add_trials` ten thousand take many minutes.
    """
    points = np.random.default_rng(0).random((n, N_PARAMS))
    json_of = distribution_to_json(FloatDistribution(0.0, 1.0))
    moment = sa.func.current_timestamp()
    with database.transaction() as connection:
        study_id = connection.scalar(sa.select(tables.StudyModel.study_id))
        table = tables.TrialModel.__table__
        if not n:
            return
        connection.execute(
            table.insert().values(study_id=study_id, datetime_start=moment, datetime_complete=moment),
            [{"number": i, "state": TrialState.PRUNED if i % 2 else TrialState.COMPLETE} for i in range(n)],
        )
        ids = connection.scalars(sa.select(table.c.trial_id).order_by(table.c.number)).all()
        rows: dict[Any, list[dict[str, Any]]] = {}
        for trial_id, point in zip(ids, points.tolist(), strict=True):
            for model, values in _rows_of_trial(point, json_of):
                rows.setdefault(model, []).append({"trial_id": trial_id, **values})
        for model, content in rows.items():
            connection.execute(model.__table__.insert(), content)


def _rows_of_trial(point: list[float], json_of: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    for name, value in zip(NAMES, point, strict=True):
        yield tables.TrialParamModel, {"param_name": name, "param_value": value, "distribution_json": json_of}
    finite = {
        tables.TrialValueModel: {"value_type": tables.TrialValueModel.TrialValueType.FINITE},
        tables.TrialIntermediateValueModel: {
            "intermediate_value_type": tables.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
        },
    }
    for step, value in enumerate(curve(point)):
        yield tables.TrialIntermediateValueModel, {
            "step": step, "intermediate_value": value, **finite[tables.TrialIntermediateValueModel]
        }  # fmt: skip
    yield tables.TrialValueModel, {"objective": 0, "value": value, **finite[tables.TrialValueModel]}
    asked = json.dumps(json.dumps(dict(zip(NAMES, point, strict=True))))
    for key, text in {"constraints:violation": "-0.1", "tpe:relative_params:0": asked}.items():
        yield tables.TrialSystemAttributeModel, {"key": key, "value_json": text}


def fill_ours(database: Database, study_id: int, worker_id: int, n: int, config: str) -> None:
    """Our rows of the same trials, all by one worker and with one config, as JSON."""
    key = {"study_id": study_id}
    rows: dict[sa.Table, list[dict[str, Any]]] = {runs: [], attempts: [], measurements: []}
    for number in range(n):
        rows[runs].append({**key, "number": number, "arm": "default", "config": config, "attempt": 1,
                           "checkpoint_attempt": 1, "checkpoint_step": N_STEPS - 1, "ended_at": 1.0 + number,
                           "best_step": N_STEPS - 1})  # fmt: skip
        rows[attempts].append({**key, "number": number, "attempt": 1, "worker_id": worker_id,
                               "claimed_at": 1.0, "released_at": 2.0, "outcome": "complete"})  # fmt: skip
        rows[measurements] += [
            {**key, "number": number, "step": step, "attempt": 1, "elapsed_s": 1.0,
             "metrics": json.dumps({METRIC: value, VIOLATION: -0.1})}
            for step, value in enumerate(curve([0.5] * N_PARAMS))
        ]  # fmt: skip
    with database.transaction() as connection:
        for table, content in rows.items():
            if content:
                connection.execute(table.insert(), content)
