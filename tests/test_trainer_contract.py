"""The contract, held against every registered trainer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from models import TRAINERS, get_trainer
from models.trainer import ROLES, Role
from tests.models.gift import planted
from tests.trainer_contract import Case, TrainerContract


def gift_case(folder) -> Case:
    trainer, spec = get_trainer("gift"), planted.planted_spec(folder)

    def labels():
        data = trainer.load(spec, planted.SEARCH)
        return data.part("valid").labels[:, [t.name for t in data.tasks].index("gives")]

    def rows_of(role: Role) -> np.ndarray:
        return trainer.load(spec, frozenset(ROLES)).part(role).unit  # split by hash: a row is its own unit

    source = folder / "new" / "rows.parquet"
    source.parent.mkdir()
    columns = [*planted.DATA["numeric_columns"], *planted.DATA["categorical_columns"]]
    pd.read_parquet(spec.path, columns=columns).to_parquet(source, row_group_size=1500)
    return Case(trainer, planted.config(), spec, planted.DECISION, 0.35, labels, source, rows_of)


CASES = {"gift": gift_case}


def test_every_registered_trainer_is_held_to_the_contract():
    assert set(CASES) == set(TRAINERS)


class TestTrainers(TrainerContract):
    @pytest.fixture(scope="class", params=sorted(CASES))
    @classmethod
    def case(cls, request, tmp_path_factory) -> Case:
        return CASES[request.param](tmp_path_factory.mktemp("data"))
