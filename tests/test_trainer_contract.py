"""The contract, held against every registered trainer."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest

from models import TRAINERS, get_trainer
from models.stock import bars, matrices
from models.trainer import ROLES, Role
from tests.models.gift import planted as gift
from tests.models.stock import planted as stock
from tests.trainer_contract import Case, TrainerContract


def gift_case(folder) -> Case:
    trainer, spec = get_trainer("gift"), gift.planted_spec(folder)

    def labels():
        data = trainer.load(spec, gift.SEARCH)
        return data.part("valid").labels[:, [t.name for t in data.tasks].index("gives")]

    def rows_of(role: Role) -> np.ndarray:
        return trainer.load(spec, frozenset(ROLES)).part(role).unit  # split by hash: a row is its own unit

    source = folder / "new" / "rows.parquet"
    source.parent.mkdir()
    columns = [*gift.DATA["numeric_columns"], *gift.DATA["categorical_columns"]]
    pd.read_parquet(spec.path, columns=columns).to_parquet(source, row_group_size=1500)
    return Case(
        trainer=trainer,
        config=gift.config(),
        spec=spec,
        decision=gift.DECISION,
        floor=0.35,
        labels=labels,
        source=source,
        n_source_rows=gift.N_ROWS,
        rows_of=rows_of,
        ablated=frozenset({"group", "unit"}),
    )


def stock_case(folder, n_folds: int = 1) -> Case:
    trainer, spec = get_trainer("stock"), stock.planted_spec(folder, split={"folds": n_folds})

    def load():
        return trainer.load(spec, frozenset(ROLES))

    source = folder / "new"
    shutil.copytree(spec.path, source)
    return Case(
        trainer=trainer,
        config=stock.config(),
        spec=spec,
        decision=stock.DECISION,
        floor=0.55,  # 0.37 of valid rise
        labels=lambda: load().part("valid").labels,
        source=source,
        n_source_rows=len(bars.read(spec.path, spec.options)),
        rows_of=lambda role: load().part(role).row,
        ablated=frozenset({"group"}),
        folds=lambda: [fold.part for fold in matrices.folds(load())],
    )


CASES = {"gift": gift_case, "stock": stock_case, "stock in folds": partial(stock_case, n_folds=3)}


def test_every_registered_trainer_is_held_to_the_contract():
    assert {name.split()[0] for name in CASES} == set(TRAINERS)


class TestTrainers(TrainerContract):
    @pytest.fixture(scope="class", params=sorted(CASES))
    @classmethod
    def case(cls, request, tmp_path_factory) -> Case:
        return CASES[request.param](tmp_path_factory.mktemp("data"))
