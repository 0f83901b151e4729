"""The contract, held against every registered trainer."""

from __future__ import annotations

import pytest

from models import TRAINERS, get_trainer
from tests.models.gift import planted
from tests.trainer_contract import Case, TrainerContract


def gift_case(folder) -> Case:
    trainer, spec = get_trainer("gift"), planted.planted_spec(folder)

    def labels():
        data = trainer.load(spec, planted.SEARCH)
        return data.part("valid").labels[:, [t.name for t in data.tasks].index("gives")]

    return Case(trainer, planted.config(), spec, planted.DECISION, floor=0.35, labels=labels)


CASES = {"gift": gift_case}


def test_every_registered_trainer_is_held_to_the_contract():
    assert set(CASES) == set(TRAINERS)


class TestTrainers(TrainerContract):
    @pytest.fixture(scope="class", params=sorted(CASES))
    @classmethod
    def case(cls, request, tmp_path_factory) -> Case:
        return CASES[request.param](tmp_path_factory.mktemp("data"))
