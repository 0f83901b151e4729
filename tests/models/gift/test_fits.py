"""Rounds of several fits. What an array does with its slots is in `test_array`."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from pathlib import Path

import pytest
import torch

from models import checkpoint as checkpoints
from models.gift import fits as fitting
from models.gift.array import GiftArray
from models.gift.data import GiftDataset
from models.gift.fit import Training
from models.gift.fits import Fit
from models.gift.trainer import GiftConfig, GiftTrainer
from models.trainer import InputError, Measurement
from tests.models.gift.planted import config, planted
from tests.models.gift.test_array import (
    BATCH,
    SEEDS,
    assert_close,
    assert_close_numbers,
    data,
    double,
    run_in,
    trial,
    trials,
)
from tests.trainer_contract import assert_same_checkpoint, folder_of, numbers

__all__ = ["data", "double"]  # fixtures
TRAINER = GiftTrainer()


def solo_only() -> list[GiftConfig]:
    """Two that no array can train, of the bucket of `trials` but for that."""
    given = {"optimizer": {"batch_size": BATCH}, "training": {"max_epochs": 4, "lr_patience": 0}}
    return [
        config(balancing={"method": "pcgrad"}, **given),
        config(network={"numeric_embedding": "piecewise_linear"}, **given),
    ]


def start(c: GiftConfig, data: GiftDataset, folder: Path, seed: int = 42, attempt: int = 1) -> Fit:
    fit = TRAINER.fit(c, data, run_in(folder, seed, attempt))
    assert isinstance(fit, Fit)
    return fit


def alone(c: GiftConfig, data: GiftDataset, folder: Path, seed: int = 42) -> list[Measurement]:
    return list(start(c, data, folder, seed))


def ended(fits: list[Fit]) -> list[list[Measurement]]:
    """All of them advanced until each has ended."""
    found: dict[Fit, list[Measurement]] = {fit: [] for fit in fits}
    waiting = list(fits)
    while waiting:
        for fit, given in zip(waiting, TRAINER.advance(waiting), strict=True):
            if isinstance(given, Exception):
                raise given
            found[fit] += [] if given is None else [given]
        waiting = [fit for fit in waiting if not fit.has_ended]
    return list(found.values())


@pytest.fixture(autouse=True)
def cpu_values(monkeypatch) -> int:
    """Arrays pay here, whatever their size; the size up to which they do."""
    kept = fitting.CPU_VALUES
    monkeypatch.setattr(fitting, "CPU_VALUES", 10**9)
    return kept


@pytest.fixture
def arrays(monkeypatch) -> list[tuple[int, int]]:
    """Slots and trainings of every epoch that an array takes."""
    taken, measured = [], GiftArray.measured_epoch

    def noted(self, slots):
        slots = list(slots)
        taken.append((self.n_slots, len(slots)))
        return measured(self, slots)

    monkeypatch.setattr(GiftArray, "measured_epoch", noted)
    return taken


# ---- the same numbers as alone


@pytest.mark.parametrize("norm", [True, False])
def test_in_float64_advanced_together_equals_alone(double, tmp_path, arrays, norm):
    given = [*trials(norm), *solo_only()]
    whole = [alone(c, double, tmp_path / f"a{i}", i) for i, c in enumerate(given)]
    found = ended([start(c, double, tmp_path / f"t{i}", i) for i, c in enumerate(given)])
    assert arrays == [(4, 4)] * 4
    for i, (a, t) in enumerate(zip(whole, found, strict=True)):
        assert_close_numbers(a, t)
        assert [m.curves is None for m in a] == [m.curves is None for m in t]
        assert_close(folder_of(run_in(tmp_path / f"a{i}"), 3), folder_of(run_in(tmp_path / f"t{i}"), 3))


@pytest.mark.parametrize("seed", range(3))
def test_in_float64_refill_pruning_and_resume_at_random_moments_change_nothing(double, tmp_path, arrays, seed):
    """Five in flight of eight; some wait for a round, some are closed and go on in another round or alone."""
    rng, every = random.Random(seed), [*trials(), trials(norm=False)[0], *solo_only(), trials()[1]]
    whole = [alone(c, double, tmp_path / f"whole{i}", i) for i, c in enumerate(every)]
    queue, attempts = list(range(len(every))), [1] * len(every)
    found: list[dict[int, Measurement]] = [{} for _ in every]
    pruned, held = {7: rng.randrange(3)}, {}
    while queue or held:
        while queue and len(held) < 5:
            i = queue.pop(rng.randrange(len(queue)))
            held[i] = start(every[i], double, tmp_path / f"parts{i}", i, attempts[i])
        asked = rng.sample(sorted(held), rng.randint(1, len(held)))
        for i, given in zip(asked, TRAINER.advance([held[i] for i in asked]), strict=True):
            if given is None:
                del held[i]
                continue
            assert isinstance(given, Measurement), given
            found[i][given.step] = given
            if given.step == pruned.get(i):
                held.pop(i).close()
            elif rng.random() < 0.25:
                held.pop(i).close()
                attempts[i] += 1
                queue.append(i)
    assert len({n for n, _ in arrays}) > 1
    for i, measured in enumerate(found):
        assert len(measured) == (pruned[i] + 1 if i in pruned else 4)
        assert_close_numbers(whole[i][: len(measured)], [measured[step] for step in sorted(measured)])
        if i not in pruned:
            newest = checkpoints.latest(run_in(tmp_path / f"parts{i}", attempt=attempts[i]))
            assert_close(folder_of(run_in(tmp_path / f"whole{i}"), 3), newest.path)


def test_the_bits_of_a_fit_depend_on_no_other_slot(data, tmp_path, arrays):
    """In arrays of the same room and number of slots."""
    first, second, third, fourth = trials()
    wide = second.model_copy(update={"network": fourth.network})  # it needs the room that `fourth` does
    found = []
    for turn, others in enumerate([(third, fourth), (wide, third), (third, wide)]):
        made = [start(c, data, tmp_path / f"{turn}-{i}", 10 * turn + i) for i, c in enumerate(others)]
        made.insert(turn, start(first, data, tmp_path / f"{turn}"))
        found.append(ended(made)[turn])
    assert arrays == [(3, 3)] * 12
    assert numbers(found[0]) == numbers(found[1]) == numbers(found[2])
    for turn in (1, 2):
        assert_same_checkpoint(folder_of(run_in(tmp_path / str(turn)), 3), folder_of(run_in(tmp_path / "0"), 3))


def test_one_alone_has_the_bits_of_its_training(data, tmp_path, arrays):
    c, run = trials()[0], run_in(tmp_path / "training")
    training, expected = Training(c, data, run), []
    while not training.finished:
        expected.append(training.epoch())
    assert numbers(alone(c, data, tmp_path / "fit")) == numbers(expected)
    assert arrays == []


# ---- who trains as one


def test_an_array_is_kept_and_grows_when_a_newcomer_does_not_fit(data, tmp_path, monkeypatch):
    made, init = [], GiftArray.__init__

    def noted(self, bucket, room, data, n_slots, device):
        made.append((room.widths[0], n_slots))
        init(self, bucket, room, data, n_slots, device)

    monkeypatch.setattr(GiftArray, "__init__", noted)

    def of_width(width: int, name: str) -> Fit:
        every = {name: {} for name in ("gives", "watches")}
        return start(trial({"width": width}, {}, every, norm=True), data, tmp_path / name)

    a, b = of_width(20, "a"), of_width(30, "b")
    for _ in range(2):
        TRAINER.advance([a, b])
    assert made == [(32, 2)]
    b.close()
    c = of_width(10, "c")  # it takes the slot that is free
    TRAINER.advance([a, c])
    assert made == [(32, 2)]
    d, e = of_width(40, "d"), of_width(33, "e")
    TRAINER.advance([a, c, d])
    assert made[1:] == [(64, 3)]
    TRAINER.advance([c, e, d])
    TRAINER.advance([c, d])  # an empty slot is paid for, and is kept while most are used
    assert made[2:] == []
    f = [of_width(8, f"f{i}") for i in range(5)]
    TRAINER.advance([d, e, *f])
    assert made[2:] == [(64, 7)]
    TRAINER.advance([f[0], f[1]])
    assert made[3:] == [(32, 2)]


def test_an_array_is_gone_with_the_last_fit_in_it(data, tmp_path):
    fits = [start(c, data, tmp_path / str(i)) for i, c in enumerate(trials()[:2])]
    TRAINER.advance(fits)
    array, training = weakref.ref(fits[0].array), weakref.ref(fits[0].training)
    assert fits[1].array is array()
    fits[0].close()
    gc.collect()
    assert training() is None
    assert array() is not None
    TRAINER.advance([fits[1]])  # alone, and it needs it no more
    gc.collect()
    assert array() is None


def test_other_data_and_other_buckets_are_other_arrays(data, tmp_path, arrays):
    other, (first, second, *_) = planted(tmp_path), trials()
    deep = config(network={"depth": 3}, optimizer={"batch_size": BATCH})
    given = [(first, data), (second, other), (deep, data), (second, data), (first, other), (deep, other)]
    fits = [start(c, d, tmp_path / str(i)) for i, (c, d) in enumerate(given)]
    assert [m.step for m in TRAINER.advance(fits)] == [0] * 6
    assert arrays == [(2, 2), (2, 2)]
    assert fits[0].array is fits[3].array is not fits[1].array is fits[4].array
    assert fits[2].array is None
    assert fits[5].array is None


def test_on_the_cpu_large_steps_are_taken_alone(data, tmp_path, arrays, monkeypatch, cpu_values):
    monkeypatch.setattr(fitting, "CPU_VALUES", cpu_values)
    small, large = trials()[0], config(network={"width": 256}, optimizer={"batch_size": 1024})
    assert fitting.pays([small] * 8, data, "cpu")
    assert not fitting.pays([large] * 8, data, "cpu")
    TRAINER.advance([start(c, data, tmp_path / f"{i}") for i, c in enumerate([small, large] * 2)])
    assert arrays == [(2, 2)]


def test_on_cuda_whatever_can_train_as_one_does(data):
    large, solo = config(network={"width": 256}, optimizer={"batch_size": 1024}), solo_only()[0]
    assert fitting.pays([large] * 2, data, "cuda:0")
    assert not fitting.pays([large], data, "cuda:0")
    assert not fitting.pays([solo] * 8, data, "cuda:0")
    assert not fitting.pays([solo] * 8, data, "cpu")


# ---- ends and errors


def test_a_fit_ends_with_its_last_measurement_and_holds_nothing(data, tmp_path):
    fits = [start(c, data, tmp_path / str(i)) for i, c in enumerate(trials()[:2])]
    for _ in range(4):
        found = TRAINER.advance(fits)
    assert [m.step for m in found] == [3, 3]
    assert all(fit.has_ended and fit.training is None and fit.array is None for fit in fits)
    assert TRAINER.advance(fits) == [None, None]
    with pytest.raises(StopIteration):
        next(fits[0])
    again = start(trials()[0], data, tmp_path / "0", attempt=2)
    assert numbers(list(again)) == numbers([found[0]])
    assert list(again) == []


def test_nothing_is_made_before_the_first_measurement_is_asked_for(data, tmp_path):
    c = trials()[0]
    fit = start(c, data, tmp_path / "a")
    assert fit.training is None
    fit.close()
    assert list(fit) == []
    unknown = run_in(tmp_path / "b")
    object.__setattr__(unknown, "decision", unknown.decision.model_copy(update={"task": "no_such_task"}))
    fit = TRAINER.fit(c, data, unknown)
    with pytest.raises(InputError, match=r"decision\.task"):
        next(fit)
    assert list(fit) == []


@pytest.mark.parametrize("others", [0, 3], ids=["alone", "in an array"])
def test_one_that_fails_ends_and_the_others_go_on(data, tmp_path, monkeypatch, others):
    calm = trials()[3]
    wild = config(optimizer={"lr": 1e30, "batch_size": BATCH})
    fits = [start(calm, data, tmp_path / f"calm{i}", i) for i in range(others + 1)]
    wilds = [start(wild, data, tmp_path / f"wild{i}", i) for i in range(2)]
    failed: list[Exception] = []
    while not all(fit.has_ended for fit in wilds):
        asked = [fit for fit in wilds if not fit.has_ended]
        failed += [f for f in TRAINER.advance([*fits, *asked])[len(fits) :] if isinstance(f, Exception)]
    assert [type(f) for f in failed] == [FloatingPointError] * 2
    assert all(fit.training is None for fit in wilds)
    full = fits[0].training
    monkeypatch.setattr(full, "save_epoch", lambda *_: (_ for _ in ()).throw(OSError("full")))
    found = TRAINER.advance(fits)
    assert isinstance(found[0], OSError)
    assert fits[0].has_ended
    assert all(isinstance(m, Measurement) for m in found[1:])


def test_what_breaks_an_array_is_everyones_and_not_of_those_alone(data, tmp_path, monkeypatch):
    def broken(self, active):
        raise RuntimeError("device lost")

    fits = [start(c, data, tmp_path / str(i)) for i, c in enumerate([*trials()[:2], solo_only()[0]])]
    monkeypatch.setattr(GiftArray, "_train", broken)
    found = TRAINER.advance(fits)
    assert [str(f) for f in found[:2]] == ["device lost"] * 2
    assert isinstance(found[2], Measurement)
    assert [fit.has_ended for fit in fits] == [True, True, False]


def test_an_array_without_memory_is_halved_and_used_twice(data, tmp_path, monkeypatch, arrays, caplog):
    def short_of(most: int) -> None:
        train = kept

        def checked(self, active):
            sums = train(self, active)
            if self.n_slots > most:  # no weight that it has changed counts
                raise torch.OutOfMemoryError("no memory")
            return sums

        monkeypatch.setattr(GiftArray, "_train", checked)

    kept, c = GiftArray._train, trials()[0]
    pairs = [[start(c, data, tmp_path / f"{pair}{i}", i) for i in pair] for pair in ((0, 1), (2, 3), (4, 5))]
    expected = [m for pair in pairs for m in ended(pair)]
    arrays.clear()
    short_of(2)
    found = ended([start(c, data, tmp_path / f"five{i}", i) for i in range(5)])
    assert arrays == [(5, 5), *[(2, 2), (2, 2), (2, 1)] * 4]
    assert [numbers(m) for m in found] == [numbers(m) for m in expected[:5]]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "no memory for 5 slots, 2 at a time"
    ]
    arrays.clear()
    short_of(1)  # then each is alone
    found = ended([start(c, data, tmp_path / f"three{i}", i) for i in range(3)])
    assert arrays == [(3, 3)]
    assert [numbers(m) for m in found] == [numbers(alone(c, data, tmp_path / f"a{i}", i)) for i in range(3)]


def test_a_stop_in_the_midst_of_a_round_leaves_the_checkpoints_before_it(data, tmp_path, monkeypatch):
    every = trials()[:2]
    whole = [ended([start(c, data, tmp_path / f"w{turn}{i}", i) for i, c in enumerate(every)]) for turn in (0, 1)]
    assert [numbers(m) for m in whole[0]] == [numbers(m) for m in whole[1]]
    fits = [start(c, data, tmp_path / str(i), i) for i, c in enumerate(every)]
    TRAINER.advance(fits)

    def stopped(self, measured):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "save_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            TRAINER.advance(fits)
    assert all(fit.has_ended for fit in fits)
    again = ended([start(c, data, tmp_path / str(i), i, attempt=2) for i, c in enumerate(every)])
    assert [[m.step for m in run] for run in again] == [[0, 1, 2, 3]] * 2
    for i, run in enumerate(again):
        assert numbers(run[1:]) == numbers(whole[0][i][1:])


def test_the_checkpoints_of_a_round_are_written_at_the_same_time_and_before_its_measurements(
    data, tmp_path, monkeypatch
):
    together, save = threading.Barrier(3, timeout=30), Training.save_epoch

    def meeting(self, measured):
        together.wait()
        return save(self, measured)

    monkeypatch.setattr(Training, "save_epoch", meeting)
    fits = [start(c, data, tmp_path / str(i)) for i, c in enumerate([*trials()[:2], solo_only()[0]])]
    assert [m.step for m in TRAINER.advance(fits)] == [0, 0, 0]
    for i in range(3):
        assert checkpoints.load(folder_of(run_in(tmp_path / str(i)), 0)).step == 0


def test_global_generators_are_left_as_they_were(data, tmp_path):
    before = torch.get_rng_state()
    ended([start(c, data, tmp_path / str(i), SEEDS[i]) for i, c in enumerate(trials())])
    assert torch.equal(torch.get_rng_state(), before)
