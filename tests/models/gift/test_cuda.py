"""What only a GPU can show. Its logic is shown on the CPU by `test_graphs`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gift.array import GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.dropout import HashedDraws
from models.gift.fit import Training, measured_epochs
from models.gift.fits import Fit
from models.gift.graphs import WARM_STEPS, CudaStream
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig
from models.trainer import Measurement, Run
from tests.models.gift.planted import DECISION, config, planted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")

METHODS = ["fixed", "gradnorm", "pcgrad", "aligned_mtl"]
CLOSE = {"rel": 2e-3, "abs": 2e-3}  # a GPU's sums are not in the order of another launch's


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> GiftDataset:
    return planted(tmp_path_factory.mktemp("planted"))


def run_in(folder: Path, seed: int = 42) -> Run:
    return Run(folder, seed, "cuda", 1, DECISION)


def trial(method: str = "fixed", batch: int = 177, **changed: Any) -> GiftConfig:
    return config(
        balancing={"method": method},
        optimizer={"batch_size": batch},
        training={"max_epochs": 4, "lr_patience": 0, "lr_factor": 0.3},
        **changed,
    )


def trials() -> list[GiftConfig]:
    return [trial(network={"width": w, "dropout": d}) for w, d in ((24, 0.3), (9, 0.0), (17, 0.5))]


def array_of(data: GiftDataset, launch: str = "graph") -> GiftArray:
    return GiftArray(bucket_of(trials()[0]), room_for(trials(), data), data, 3, "cuda", launch)


def losses(measured: list[Measurement]) -> list[dict[str, float]]:
    return [{n: v for n, v in m.metrics.items() if n.endswith("/loss")} for m in measured]


def assert_close(first: list[Measurement], second: list[Measurement]) -> None:
    for a, b in zip(losses(first), losses(second), strict=True):
        assert a == pytest.approx(b, **CLOSE)


@pytest.mark.parametrize("embedding", ["none", "piecewise_linear"])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_train_what_single_launches_train(data, tmp_path, method, embedding):
    given = trial(method, network={"dropout": 0.3, "numeric_embedding": embedding})
    found = {}
    for launch in ("graph", "eager"):
        training = Training(given, data, run_in(tmp_path / launch), launch)
        found[launch] = [training.epoch() for _ in range(4)]
        if launch == "graph":
            assert training._launcher.n_captured >= 3
    assert_close(found["graph"], found["eager"])


@pytest.fixture
def waiting(monkeypatch):
    """Sets what a wait for the device is: fine by default, or an error. A capture may wait before it begins."""
    capture, waits = CudaStream.capture, torch.cuda.set_sync_debug_mode

    def captured(self, work):
        mode = torch.cuda.get_sync_debug_mode()
        waits("default")
        try:
            return capture(self, work)
        finally:
            waits(mode)

    monkeypatch.setattr(CudaStream, "capture", captured)
    yield waits
    waits("default")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_nothing_waits_for_the_device_within_an_epochs_steps(data, tmp_path, waiting, method, launch):
    training = Training(trial(method, network={"dropout": 0.3}), data, run_in(tmp_path), launch)
    for _ in range(WARM_STEPS + 1):
        steps = training.steps()
        next(steps)  # the epoch's inputs are made before its first step
        waiting("error")
        for _ in steps:
            pass
        waiting("default")
        training.save_epoch(training.measure_epoch(training.end_steps(), 0.0))


def test_an_array_trains_what_each_trains_alone_and_a_refill_captures_nothing(data, tmp_path):
    alone = []
    for i, c in enumerate(trials()):
        training = Training(c, data, run_in(tmp_path / f"a{i}", seed=i))
        alone.append([training.epoch() for _ in range(3)])
    array = array_of(data)
    together = [Training(c, data, run_in(tmp_path / f"t{i}", seed=i)) for i, c in enumerate(trials())]
    slots = [array.join(t) for t in together[:2]]
    found = [array.epoch(slots) for _ in range(3)]
    captured = array.launcher.n_captured
    assert captured >= 2
    array.leave(slots[0])
    slot = array.join(together[2])
    late = [array.epoch([slot])[slot] for _ in range(3)]
    assert array.launcher.n_captured == captured
    for i, measured in enumerate([*([f[s] for f in found] for s in slots), late]):
        assert_close(measured[:1], alone[i][:1])


def test_the_launch_of_an_array_changes_nothing(data, tmp_path):
    found = []
    for launch in ("graph", "eager"):
        array = array_of(data, launch)
        given = [Training(c, data, run_in(tmp_path / f"{launch}{i}"), launch) for i, c in enumerate(trials())]
        slots = [array.join(t) for t in given]
        found.append([array.epoch(slots) for _ in range(3)])
    for slot in range(3):
        assert_close([f[slot] for f in found[0]], [f[slot] for f in found[1]])


def test_trainings_in_streams_of_their_own_are_those_of_each_alone(data, tmp_path):
    given = [trial("fixed"), trial("gradnorm", batch=300), trial("pcgrad", network={"width": 64})]
    alone = []
    for i, c in enumerate(given):
        training = Training(c, data, run_in(tmp_path / f"a{i}"))
        alone.append([training.epoch() for _ in range(4)])
    trainings = [Training(c, data, run_in(tmp_path / f"t{i}")) for i, c in enumerate(given)]
    together = [
        [t.save_epoch(m) for t, m in zip(trainings, measured_epochs(trainings), strict=True)] for _ in range(4)
    ]
    for i in range(3):
        assert_close([m[i] for m in together], alone[i])


def test_one_that_ends_takes_no_memory_from_another_whose_stream_came_round_again(data, tmp_path):
    """torch gives out 32 streams in turn, and frees the workspace of a stream with any graph of it."""
    given = trial("pcgrad", network={"width": 64})
    alone = Training(given, data, run_in(tmp_path / "alone"))
    expected = [alone.epoch() for _ in range(6)]
    long = Training(given, data, run_in(tmp_path / "long"))
    found = [long.epoch() for _ in range(3)]
    for i in range(33):
        short = Training(given, data, run_in(tmp_path / f"short{i}", seed=i))
        for _ in range(2):
            for _ in short.steps():
                pass
        assert short._launcher.stream.stream != long._launcher.stream.stream
    del short
    torch.cuda.empty_cache()
    found += [long.epoch() for _ in range(3)]
    assert_close(found, expected)


def test_the_masks_of_dropout_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        draws = HashedDraws(2, 300, [70, 20], 3, torch.device(device))
        draws.begin_epoch([2**62 + 5, 7])
        draws.begin_step(draws.keys[2])
        found.append(torch.cat([draws.draw(layer, 299).flatten().cpu() for layer in range(2)]))
    assert torch.equal(*found)


def test_codes_are_small_and_the_checkpoint_comes_back(data, tmp_path):
    rows = on_device(data, "train", torch.device("cuda"))
    assert rows.codes.dtype in (torch.uint8, torch.int16)
    expected = on_device(data, "train", torch.device("cpu")).codes
    assert torch.equal(rows.codes.cpu().int(), expected.int())
    first = Training(trial(), data, run_in(tmp_path))
    expected = [first.epoch() for _ in range(4)]
    again = list(Fit(trial(), data, run_in(tmp_path)))
    assert [m.metrics for m in again] == [m.metrics for m in expected[3:]]


def test_memory_is_given_back(data, tmp_path):
    on_device(data, "train", torch.device("cuda"))
    on_device(data, "valid", torch.device("cuda"))

    def course(name: str) -> None:
        array = array_of(data)
        training = Training(trials()[0], data, run_in(tmp_path / name / "a"))
        slot = array.join(training)
        for _ in range(3):
            array.epoch([slot])
        alone = Training(trial("gradnorm"), data, run_in(tmp_path / name / "b"))
        for _ in range(3):
            alone.epoch()

    course("first")  # what is made once a process
    gc.collect()
    before = torch.cuda.memory_allocated()
    course("second")
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
