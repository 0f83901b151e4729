from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from models import checkpoint as checkpoints
from models.gift import fit as fitting
from models.gift import graphs
from models.gift.array import Bucket, GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.fit import Training
from models.gift.fits import Fit
from models.gift.graphs import Launch
from models.gift.network import Dropout
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig, GiftTrainer
from models.trainer import Measurement, Run
from tests.models.gift.planted import CONFIG, DECISION, SEARCH, config, planted, planted_spec
from tests.models.gift.replayed import EagerStream
from tests.trainer_contract import assert_same_checkpoint, folder_of, numbers

CPU = torch.device("cpu")
BATCH = 177  # the last batch is of another size, and neither is a multiple of anything
TASKS = CONFIG["tasks"]
SEEDS = (42, 7, 2**40 + 1, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> GiftDataset:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def double(data, monkeypatch) -> Iterator[GiftDataset]:
    """The data in float64, and everything that is made while it lasts."""
    wide = replace(data)
    tensors = {role: on_device(data, role, CPU) for role in ("train", "valid")}
    vars(wide)["_on_device"] = {
        (role, CPU): replace(t, numeric=t.numeric.double(), targets=t.targets.double())
        for role, t in tensors.items()
    }
    made = fitting._make_network
    monkeypatch.setattr(fitting, "_make_network", lambda *a: made(*a).double())
    torch.set_default_dtype(torch.float64)
    yield wide
    torch.set_default_dtype(torch.float32)


def trial(network: dict[str, Any], optimizer: dict[str, Any], tasks: dict[str, Any], norm: bool) -> GiftConfig:
    return config(
        tasks={name: {**TASKS[name], **changed} for name, changed in tasks.items()},
        network={"batch_norm": norm, **network},
        optimizer={"batch_size": BATCH, **optimizer},
        training={"max_epochs": 4, "lr_patience": 0, "lr_factor": 0.3},
    )


def trials(norm: bool = True) -> list[GiftConfig]:
    """Four that differ in whatever may differ."""
    return [
        trial({}, {}, {name: {} for name in TASKS}, norm),
        trial(
            {"width": 37, "taper": 0.3, "head_width": 5, "embedding_dim": 1, "dropout": 0.0},
            {"lr": 0.1, "weight_decay": 0.01},
            {"watches": {"loss": "huber", "weight": 3.0}, "gives": {"loss": "bce"}, "amount": {"loss": "mse"}},
            norm,
        ),
        trial({"width": 9, "taper": 1.0, "head_width": 33, "dropout": 0.45}, {"lr": 3e-3}, {"gives": {}}, norm),
        trial(
            {"width": 50, "taper": 0.7, "embedding_dim": 3, "dropout": 0.3},
            {"lr": 1e-3, "weight_decay": 1e-3},
            {"gives": {"alpha": 0.8, "gamma": 0.7}, "comments": {"loss": "focal", "weight": 0.01}},
            norm,
        ),
    ]


def run_in(folder: Path, seed: int = 42, attempt: int = 1) -> Run:
    return Run(folder, seed, "cpu", attempt, DECISION)


def array_of(data: GiftDataset, n_slots: int, norm: bool = True, launch: Launch | None = None) -> GiftArray:
    every = trials(norm)
    return GiftArray(bucket_of(every[0]), room_for(every, data), data, n_slots, "cpu", launch)


def trained(array: GiftArray, trainings: list[Training]) -> list[list[Measurement]]:
    """All of them together, each until it has ended; the first is in slot 0."""
    slots = {array.join(training): training for training in trainings}
    found: dict[int, list[Measurement]] = {slot: [] for slot in slots}
    waiting = set(slots)
    while waiting:
        for slot, measured in array.epoch(waiting).items():
            if isinstance(measured, Exception):
                raise measured
            found[slot].append(measured)
            if slots[slot].finished:
                array.leave(slot)
                waiting.remove(slot)
    return list(found.values())


def assert_close(first: Path, second: Path, most: float = 1e-10) -> None:
    """Weights, optimiser, outputs and state of two checkpoints."""
    a, b = checkpoints.load(first), checkpoints.load(second)
    for left, right in ((a.tensors, b.tensors), (a.load_best(), b.load_best())):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype
            assert value.is_floating_point() or torch.equal(value, right[name])
            assert float((value.double() - right[name].double()).abs().max()) <= most, name
    rough = {"plateau": None, "best_value": None}  # they hold metrics
    assert {**a.state, **rough} == {**b.state, **rough}


def assert_close_numbers(first: list[Measurement], second: list[Measurement]) -> None:
    assert [m.step for m in first] == [m.step for m in second]
    for a, b in zip(first, second, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        for name, value in a.metrics.items():
            assert value == pytest.approx(b.metrics[name], rel=1e-10, abs=1e-10), name


# ---- the same numbers as alone


@pytest.mark.parametrize(("norm", "launch"), [(True, "eager"), (False, "eager"), (True, "graph")])
def test_in_float64_every_slot_equals_its_solo_run(double, tmp_path, monkeypatch, norm, launch):
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    monkeypatch.setattr(EagerStream, "log", [], raising=False)
    given = list(zip(trials(norm), SEEDS, strict=True))
    alone = []
    for i, (c, s) in enumerate(given):
        training, found = Training(c, double, run_in(tmp_path / f"a{i}", s), launch), []
        while not training.finished:
            found.append(training.epoch())
        alone.append(found)
    together = [Training(c, double, run_in(tmp_path / f"t{i}", s), launch) for i, (c, s) in enumerate(given)]
    for a, t in zip(alone, trained(array_of(double, 4, norm, launch), together), strict=True):
        assert_close_numbers(a, t)
    for i in range(4):
        step = alone[i][-1].step
        assert step == 3
        assert_close(folder_of(run_in(tmp_path / f"a{i}"), step), folder_of(run_in(tmp_path / f"t{i}"), step))
    rates = {m.metrics["train/lr"] for run in alone for m in run}
    assert not norm or len(rates) > 4, "the test needs a plateau that lowers a rate"


@pytest.mark.parametrize("norm", [True, False])
def test_a_checkpoint_of_an_array_resumes_alone_and_the_other_way_round(double, tmp_path, norm):
    given = list(zip(trials(norm), SEEDS, strict=True))
    for i, (c, s) in enumerate(given):
        whole = list(Fit(c, double, run_in(tmp_path / f"whole{i}", s)))
        first, second = (run_in(tmp_path / f"parts{i}", s, attempt) for attempt in (1, 2))
        others = [Training(trials(norm)[3 - i], double, run_in(tmp_path / f"others{i}", 5))]
        if i % 2:  # two epochs in an array, then alone
            array = array_of(double, 2, norm)
            slots = [array.join(t) for t in (*others, Training(c, double, first))]
            parts = [array.epoch(slots)[1], array.epoch(slots)[1]]
            parts += list(Fit(c, double, second))[1:]
        else:
            alone = Fit(c, double, first)
            parts = [next(alone), next(alone)]
            alone.close()
            training = Training(c, double, second)
            training.restore(checkpoints.latest(second))
            parts += trained(array_of(double, 2, norm), [*others, training])[1]
        assert_close_numbers(whole, parts)
        assert_close(folder_of(run_in(tmp_path / f"whole{i}"), 3), folder_of(second, 3))


@pytest.mark.parametrize("absent", ["numeric_columns", "categorical_columns"])
def test_data_without_numbers_or_without_categories(tmp_path, absent):
    few = GiftTrainer().load(planted_spec(tmp_path, **{absent: []}), SEARCH)
    (c, *_), most = trials(), {"abs": 1e-4, "rel": 1e-3}
    alone = Training(c, few, run_in(tmp_path / "alone")).epoch()
    array = GiftArray(bucket_of(c), room_for([c], few), few, 2, "cpu")
    together = array.epoch([array.join(Training(c, few, run_in(tmp_path / "together")))])[0]
    losses = [name for name in alone.metrics if name.endswith("/loss")]
    assert len(losses) == 8
    assert [together.metrics[n] for n in losses] == [pytest.approx(alone.metrics[n], **most) for n in losses]


def test_weights_order_and_dropout_come_from_the_trials_own_seed(data, tmp_path):
    array, every = array_of(data, 3), trials()
    trainings = [Training(every[i], data, run_in(tmp_path / str(i), SEEDS[i])) for i in (2, 0, 3)]
    for slot, training in enumerate(trainings):
        assert array.join(training) == slot
        array._load(slot, training)
    for slot, training in enumerate(trainings):
        network = training.network
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        assert torch.equal(array.stack.values[slot, array.stack.positions[slot]], weights)
        seed, order = training.begin_epoch()
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(order, torch.randperm(len(order), generator=generator))
        solo = [m for m in network.train().tower if isinstance(m, Dropout)]
        widths = [m.out_features for m in network.tower if isinstance(m, torch.nn.Linear)]
        network.set_generator(generator)
        expected = [layer(torch.ones(BATCH, w)) for layer, w in zip(solo, widths, strict=True)]
        for k, (layer, width) in enumerate(zip(expected, widths, strict=True)):
            draws = {slot: array.stack.dropping[slot]} if slot in array.stack.dropping else {}
            array.stack.dropping, kept = draws, array.stack.dropping
            found = array.stack._dropped(torch.ones(3, BATCH, array.room.widths[k]), k)
            array.stack.dropping = kept
            assert torch.equal(found[slot, :, :width], layer)


# ---- neighbours


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n_slots", [3, 8])
def test_the_bits_of_a_slot_depend_on_no_neighbour_and_no_place(data, tmp_path, norm, n_slots):
    every, rng = trials(norm), random.Random(n_slots)
    alone = []
    for i, c in enumerate(every):
        training = Training(c, data, run_in(tmp_path / f"alone{i}", SEEDS[i]))
        alone += trained(array_of(data, n_slots, norm), [training])
    for turn in range(9 // n_slots + 1):
        chosen = [(i, f"{turn}-{place}") for place, i in enumerate(rng.choices(range(4), k=n_slots))]
        made = [Training(every[i], data, run_in(tmp_path / name, SEEDS[i])) for i, name in chosen]
        for (i, name), found in zip(chosen, trained(array_of(data, n_slots, norm), made), strict=True):
            assert numbers(found) == numbers(alone[i])
            assert_same_checkpoint(
                folder_of(run_in(tmp_path / name), 3), folder_of(run_in(tmp_path / f"alone{i}"), 3)
            )


@pytest.mark.parametrize("seed", range(4))
def test_refill_pruning_and_resume_at_random_moments_change_no_bits(data, tmp_path, seed):
    rng, every = random.Random(seed), trials(norm=seed % 2 == 0)
    whole = [
        trained(array_of(data, 3, seed % 2 == 0), [Training(c, data, run_in(tmp_path / f"whole{i}", SEEDS[i]))])[0]
        for i, c in enumerate(every)
    ]
    array, queue, slots = array_of(data, 3, seed % 2 == 0), [0, 1, 2, 3, 1], {}
    found = {n: {} for n in range(len(queue))}
    attempts, pruned = dict.fromkeys(found, 1), {4: rng.randrange(3)}  # the last of them is cut short
    waiting = list(found)
    while waiting or slots:
        while waiting and array.n_free:
            n = waiting.pop(rng.randrange(len(waiting)))
            run = run_in(tmp_path / f"parts{n}", SEEDS[queue[n]], attempts[n])
            training = Training(every[queue[n]], data, run)
            if (latest := checkpoints.latest(run)) is not None:
                training.restore(latest)
            slots[array.join(training)] = (n, training)
        asked = rng.sample(sorted(slots), rng.randint(1, len(slots)))
        for slot, measured in array.epoch(asked).items():
            n, training = slots[slot]
            found[n][measured.step] = measured
            stops = rng.random() < 0.3 and not training.finished
            if training.finished or stops or pruned.get(n) == measured.step:
                array.leave(slot)
                del slots[slot]
            if stops and pruned.get(n) != measured.step:
                attempts[n] += 1
                waiting.append(n)
    for n, measured in found.items():
        assert numbers(list(measured.values())) == numbers(whole[queue[n]][: len(measured)])
        assert len(measured) == (pruned[n] + 1 if n in pruned else 4)
        if n not in pruned:
            last = folder_of(run_in(tmp_path / f"parts{n}", attempt=attempts[n]), 3)
            assert_same_checkpoint(last, folder_of(run_in(tmp_path / f"whole{queue[n]}"), 3))


def test_a_slot_that_waits_does_not_change(data, tmp_path):
    array, every = array_of(data, 3), trials()
    waits, goes = (Training(every[i], data, run_in(tmp_path / str(i), SEEDS[i])) for i in (0, 1))
    first, second = array.join(waits), array.join(goes)
    before = {n: t.clone() for n, t in waits._tensors().items()}
    array.epoch([second])
    after = waits._tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert array.epoch([first])[first].step == 0
    assert array.epoch([]) == {}


@pytest.mark.parametrize("norm", [True, False])
def test_a_slot_that_diverges_touches_no_other_and_is_refilled(data, tmp_path, norm):
    calm, wild = trials(norm)[3], trials(norm)[1].model_copy(update={"optimizer": config(
        optimizer={"lr": 1e30, "batch_size": BATCH}).optimizer})  # fmt: skip
    expected = trained(array_of(data, 3, norm), [Training(calm, data, run_in(tmp_path / "alone"))])[0]
    array, found, failed = array_of(data, 3, norm), [], []
    slot = array.join(Training(calm, data, run_in(tmp_path / "calm")))
    for epoch in range(4):
        others = {array.join(Training(wild, data, run_in(tmp_path / f"{epoch}-{i}", i))): i for i in range(2)}
        measured = array.epoch([*others, slot])
        found.append(measured.pop(slot))
        failed += measured.values()
        for other in [k for k, m in measured.items() if isinstance(m, Measurement)]:
            array.leave(other)
    assert numbers(found) == numbers(expected)
    assert_same_checkpoint(folder_of(run_in(tmp_path / "calm"), 3), folder_of(run_in(tmp_path / "alone"), 3))
    assert all(isinstance(f, FloatingPointError) and "lower optimizer.lr" in str(f) for f in failed)
    assert len(failed) == 8
    assert array.n_free == 2
    assert not any((tmp_path / f"0-{i}").exists() for i in range(2))
    # what a failed slot leaves behind is not inherited
    again = Training(calm, data, run_in(tmp_path / "again"))
    assert numbers(trained(array, [again])[0]) == numbers(expected)


def test_an_error_of_one_slot_is_its_own(data, tmp_path, monkeypatch):
    array, every = array_of(data, 2), trials()
    good, bad = (Training(every[0], data, run_in(tmp_path / name)) for name in ("good", "bad"))
    monkeypatch.setattr(bad, "save_epoch", lambda *_: (_ for _ in ()).throw(OSError("full")))
    slots = [array.join(bad), array.join(good)]
    found = array.epoch(slots)
    assert isinstance(found[slots[0]], OSError)
    assert found[slots[1]].step == 0
    assert array.n_free == 1


# ---- padding


@pytest.mark.parametrize("norm", [True, False])
def test_padded_weights_and_their_averages_stay_exactly_zero(data, tmp_path, norm):
    array = array_of(data, 5, norm)
    for i, c in enumerate(trials(norm)):
        array.join(Training(c, data, run_in(tmp_path / str(i), SEEDS[i])))
    for _ in range(2):
        array.epoch(range(4))
    stack = array.stack
    for rows in (stack.values, stack.averages, stack.squares):
        for slot in range(4):
            padding = torch.ones(rows.shape[1], dtype=torch.bool)
            padding[stack.positions[slot]] = False
            assert padding.sum() > rows.shape[1] / 10
            assert bool((rows[slot, padding] == 0).all())
            assert bool((rows[slot, ~padding] != 0).any())
        assert bool((rows[4] == 0).all())


def test_every_parameter_has_a_place_of_its_own(data, tmp_path):
    array = array_of(data, 1)
    for i, c in enumerate(trials()):
        training = Training(c, data, run_in(tmp_path / str(i)))
        positions = array.stack.layout.positions(training.network, training.names)
        assert len(positions) == sum(p.numel() for p in training.network.parameters())
        assert len(positions.unique()) == len(positions)


def test_a_slot_starts_where_all_others_do(data):
    stack = array_of(data, 3).stack
    for block in stack.weights.values():
        assert {block[k].data_ptr() % 64 for k in range(3)} == {0}
    blocks = stack.layout.blocks(torch.rand(3, stack.layout.size))
    again = stack.layout.blocks(stack.layout.joined(blocks))
    assert all(torch.equal(block, again[name]) for name, block in blocks.items())


# ---- what belongs together


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"balancing": {"method": "pcgrad"}}, "pcgrad"),
        ({"balancing": {"method": "gradnorm"}}, "gradnorm"),
        ({"network": {"numeric_embedding": "piecewise_linear"}}, "piecewise_linear"),
    ],
)
def test_who_trains_alone_and_why(data, tmp_path, changed, reason):
    assert reason in bucket_of(config(**changed))
    with pytest.raises(ValueError, match=reason):
        array_of(data, 2).join(Training(config(**changed), data, run_in(tmp_path)))


def test_buckets_differ_in_depth_norm_and_batch_size_alone():
    assert {bucket_of(c) for c in trials()} == {Bucket(2, True, BATCH)}
    assert bucket_of(config(network={"depth": 3, "batch_norm": False})) == Bucket(3, False, 256)


def test_what_does_not_fit_is_refused(data, tmp_path):
    array, other = array_of(data, 2), planted(tmp_path)
    run = run_in(tmp_path / "run")
    for changed in ({"width": 500}, {"head_width": 65}, {"embedding_dim": 9}):
        with pytest.raises(ValueError, match="fits"):
            array.join(Training(trial(changed, {}, {"gives": {}}, norm=True), data, run))
    with pytest.raises(ValueError, match="same data"):
        array.join(Training(trials()[0], other, run))
    for _ in range(2):
        array.join(Training(trials()[0], data, run))
    with pytest.raises(ValueError, match="free slot"):
        array.join(Training(trials()[0], data, run))


def test_what_an_array_trained_predicts_what_was_measured(data, tmp_path):
    training = Training(trials()[0], data, run_in(tmp_path))
    (measured,) = trained(array_of(data, 2), [training])
    assert max(m.metrics["valid/gives/pr_auc"] for m in measured) > 0.3
    scores = GiftTrainer().predict(folder_of(run_in(tmp_path), 3), data, "valid").scores["gives"]
    best = training.best_step
    expected = average_precision_score(np.asarray(data.part("valid").labels[:, 2]), scores)
    assert measured[best].metrics["valid/gives/pr_auc"] == pytest.approx(expected, abs=1e-6)
    assert measured[best].curves is not None
