from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.gift import fits, slots
from models.gift.array import GiftArray
from models.gift.data import GiftDataset
from models.gift.fit import COMPARED_STEPS, Training
from models.gift.slots import Meter, SlotCost, best, measure
from models.gift.tensors import on_device
from models.gift.trainer import GiftTrainer
from tests.models.gift.planted import config, planted
from tests.models.gift.test_array import run_in
from tests.trainer_contract import numbers

CPU = torch.device("cpu")
GIB = 2**30
CONFIG = config(optimizer={"batch_size": 8})
SOLO = config(optimizer={"batch_size": 8}, balancing={"method": "pcgrad"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> GiftDataset:
    return planted(tmp_path_factory.mktemp("planted"))


class Scripted(Meter):
    """A clock that only training moves, and memory that grows with what is trained at once."""

    def __init__(self, free_bytes: int | None = None) -> None:
        super().__init__(CPU)
        self.free_bytes, self.now, self.n_trained, self.n_started = free_bytes, 0.0, 0, 0

    def start(self) -> None:
        self.n_started += 1

    def seconds(self) -> float:
        return self.now

    def peak_bytes(self) -> int | None:
        return None if self.free_bytes is None else self.n_trained * GIB


@pytest.fixture
def scripted(monkeypatch) -> Callable[..., Scripted]:
    """A meter by which steps of n trainings take `round_s(n)`, the first time a hundred times as long. More than
    100 do not fit into memory."""

    def make(round_s: Callable[[int], float], free_bytes: int | None = None) -> Scripted:
        meter, seen = Scripted(free_bytes), set()

        def take(n: int) -> None:
            if n > 100:
                raise torch.OutOfMemoryError("no memory")
            meter.now += round_s(n) * (1 if n in seen else 100)
            meter.n_trained = n
            seen.add(n)

        monkeypatch.setattr(GiftArray, "train_epoch", lambda _, joined: take(len(joined)))
        monkeypatch.setattr(Training, "steps", lambda _: (take(1) for _ in range(1)))
        return meter

    return make


def of(costs: list[SlotCost]) -> list[int]:
    return [cost.slots for cost in costs]


# ---- what is chosen


def test_the_fewest_slots_within_a_tenth_of_the_fastest():
    def chosen(*steps: float) -> int:
        return best([SlotCost(2**i, s, None) for i, s in enumerate(steps)])

    assert chosen(1.0) == 1
    assert chosen(1.0, 0.6, 0.4, 0.38) == 4
    assert chosen(1.0, 0.6, 0.4, 0.35) == 8
    assert chosen(1.0, 1.2) == 1
    assert chosen(1.05, 1.0) == 1


# ---- what is measured


def test_doubling_ends_where_it_gains_less_than_a_tenth(data, scripted):
    n_steps = COMPARED_STEPS
    meter = scripted(lambda n: 0.9 + 0.1 * n)
    costs = measure(CONFIG, data, "cpu", 32, meter)
    assert of(costs) == [1, 2, 4, 8, 16, 32]
    assert costs[2].step_s == pytest.approx((0.9 + 0.4) / 4 / n_steps)
    assert all(cost.memory_bytes is None for cost in costs)
    costs = measure(CONFIG, data, "cpu", 32, scripted(lambda n: 0.1 + 0.3 * n))
    assert [c.step_s * n_steps for c in costs] == pytest.approx([0.4, 0.35, 0.325])
    costs = measure(CONFIG, data, "cpu", 32, scripted(lambda n: 1.0 if n == 1 else 1.6 + 0.2 * n))
    assert of(costs) == [1, 2, 4, 8, 16, 32]  # an array of two is no faster than one alone, one of four is
    assert best(costs) == 32
    assert of(measure(CONFIG, data, "cpu", 32, scripted(lambda n: float(n)))) == [1, 2, 4]
    assert of(measure(CONFIG, data, "cpu", 3, scripted(lambda n: 1.0))) == [1, 2, 3]
    assert of(measure(CONFIG, data, "cpu", 1, scripted(lambda n: 1.0))) == [1]


def test_no_more_than_four_fifths_of_the_free_memory(data, scripted):
    costs = measure(CONFIG, data, "cpu", 64, scripted(lambda n: 1.0, free_bytes=21 * GIB))
    assert of(costs) == [1, 2, 4, 8, 16]
    # what a training of all rows keeps beside what one of a few rows does
    hidden = 4 * (4 + 1) * (len(data.part("train").labels) - 8 * COMPARED_STEPS)
    assert hidden > 0
    assert [c.memory_bytes for c in costs] == [n * (GIB + hidden) for n in (1, 2, 4, 8, 16)]
    assert of(measure(CONFIG, data, "cpu", 64, scripted(lambda n: 1.0, free_bytes=19 * GIB))) == [1, 2, 4, 8]


def test_what_does_not_fit_at_all_is_not_measured(data, scripted, monkeypatch):
    assert of(measure(CONFIG, data, "cpu", 128, scripted(lambda n: 1.0))) == [1, 2, 4, 8, 16, 32, 64]

    def full(self):
        raise torch.OutOfMemoryError("no memory")
        yield

    monkeypatch.setattr(Training, "steps", full)
    with pytest.raises(torch.OutOfMemoryError):
        measure(CONFIG, data, "cpu", 4)


def test_the_fastest_round_after_the_first_counts(data, monkeypatch):
    meter, times = Scripted(), iter([50.0, 3.0, 2.0])

    def steps(self):
        meter.now += next(times)
        yield

    monkeypatch.setattr(Training, "steps", steps)
    (cost,) = measure(CONFIG, data, "cpu", 1, meter)
    assert cost.step_s == pytest.approx(2.0 / COMPARED_STEPS)


def test_the_steps_are_those_of_a_round(data, monkeypatch):
    """An array of as many slots where that pays, and each alone where it does not."""
    taken = []
    steps, train_epoch = Training.steps, GiftArray.train_epoch

    def alone(self):
        taken.append(len(self.targets))
        yield from steps(self)

    def together(self, joined):
        taken.append((self.n_slots, len(joined), len(self.targets)))
        return train_epoch(self, joined)

    monkeypatch.setattr(Training, "steps", alone)
    monkeypatch.setattr(GiftArray, "train_epoch", together)
    measure(CONFIG, data, "cpu", 2)
    assert taken == [800] * 3 + [(2, 2, 800)] * 3
    taken.clear()
    monkeypatch.setattr(fits, "CPU_VALUES", 0)
    measure(CONFIG, data, "cpu", 2)
    assert taken == [800] * 9
    taken.clear()
    measure(SOLO, data, "cpu", 2)
    assert taken == [800] * 9
    taken.clear()
    n_rows = len(data.part("train").labels)
    measure(config(optimizer={"batch_size": 4096}), data, "cpu", 1)
    assert taken == [n_rows] * 3


def test_a_gpu_compares_arrays_with_trainings_on_their_own(data, scripted, monkeypatch):
    meter = scripted(lambda n: 0.5 + 0.2 * n)
    meter.compares = True
    costs = measure(CONFIG, data, "cpu", 4, meter)
    n_steps = COMPARED_STEPS
    assert [(c.slots, c.as_array) for c in costs] == [(1, False), (2, True), (4, True)]
    assert [c.step_s * n_steps for c in costs] == pytest.approx([0.7, 0.45, 0.325])
    meter = scripted(lambda n: 0.1 if n == 1 else 1.0)
    meter.compares = True
    costs = measure(CONFIG, data, "cpu", 2, meter)
    assert [(c.slots, c.as_array) for c in costs] == [(1, False), (2, False)]
    assert costs[1].step_s * n_steps == pytest.approx(0.1)
    assert not any(c.as_array for c in measure(SOLO, data, "cpu", 2, meter))


@pytest.mark.parametrize("as_array", [True, False])
def test_rounds_on_a_gpu_go_the_faster_way_from_then_on(data, monkeypatch, as_array):
    monkeypatch.setattr(slots, "measure", lambda *_: [SlotCost(1, 1.0, GIB), SlotCost(4, 0.5, GIB, as_array)])
    fresh = replace(data)
    assert fits.pays([CONFIG] * 2, fresh, "cuda:0"), "until it is measured"
    assert slots.slots(SOLO, fresh, "cuda:0", 8) == 4
    assert fits.pays([CONFIG] * 2, fresh, "cuda:0"), "it says nothing of what cannot be in an array"
    assert slots.slots(CONFIG, fresh, "cuda:0", 8) == 4
    assert fits.pays([CONFIG] * 2, fresh, "cuda:0") is as_array
    assert fits.pays([CONFIG] * 2, fresh, "cuda:1"), "another device"


@pytest.mark.parametrize(("launch", "order"), [("eager", "aaabbb"), ("graph", "ababab")])
def test_alone_in_graphs_they_take_a_step_in_turn(launch, order):
    taken = []
    trainings = [SimpleNamespace(launch=launch, steps=lambda n=name: map(taken.append, n * 3)) for name in "ab"]
    slots._alone(trainings)
    assert "".join(taken) == order


def test_a_real_measurement_leaves_no_trace(data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    trainer, short = GiftTrainer(), config(training={"max_epochs": 2})
    expected = list(trainer.fit(short, data, run_in(tmp_path / "before")))
    fit = trainer.fit(short, data, run_in(tmp_path / "during"))
    found = [next(fit)]
    train = on_device(data, "train", CPU)
    state, kept = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()), set(vars(data))
    with caplog.at_level(logging.INFO, "models.gift"):
        assert trainer.slots(short, data, "cpu", 4) in (1, 2, 4)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert random.getstate() == state[2]
    assert set(vars(data)) == kept
    assert on_device(data, "train", CPU) is train
    found += list(fit)
    assert numbers(found) == numbers(expected)
    assert {p.name for p in tmp_path.iterdir()} == {"before", "during"}
    (line,) = [r for r in caplog.records if r.action == "slots"]
    assert "a step of one trial: 1: " in line.getMessage()
    assert set(line.step_us) <= {1, 2, 4}
    assert line.slots in line.step_us


def test_one_slot_needs_no_measurement(data, monkeypatch):
    monkeypatch.setattr(slots, "measure", lambda *_: pytest.fail("expected none"))
    assert GiftTrainer().slots(CONFIG, data, "cpu", 1) == 1
