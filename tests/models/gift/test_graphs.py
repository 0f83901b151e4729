from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from models import checkpoint as checkpoints
from models.gift import fit as fitting
from models.gift import graphs
from models.gift.array import GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.fit import Measured, Training, measured_epochs
from models.gift.graphs import WARM_STEPS, CudaStream, Plan, StepGraphs, in_graphs, launch_of
from models.gift.trainer import GiftConfig
from models.trainer import InputError, Measurement, Run
from tests.models.gift.planted import DECISION, config, planted
from tests.models.gift.replayed import EagerStream, NoHostReads, ReplayedStream
from tests.trainer_contract import assert_same_checkpoint, folder_of, numbers

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
METHODS = ["fixed", "gradnorm", "pcgrad", "aligned_mtl"]
NETWORKS = [
    {"dropout": 0.3},
    {"dropout": 0.0, "batch_norm": False, "numeric_embedding": "piecewise_linear"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> GiftDataset:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, int]]:
    """CUDA's streams and graphs are stood in for; what they do."""
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(ReplayedStream, "log", done, raising=False)
    monkeypatch.setattr(graphs, "CudaStream", ReplayedStream)
    return done


def run_in(folder: Path, attempt: int = 1, seed: int = 42) -> Run:
    return Run(folder, seed, "cpu", attempt, DECISION)


def trial(method: str = "fixed", n_epochs: int = 4, batch: int = 177, **changed: Any) -> GiftConfig:
    """Its last batch is of another size."""
    return config(
        balancing={"method": method},
        optimizer={"batch_size": batch},
        training={"max_epochs": n_epochs, "lr_patience": 0, "lr_factor": 0.3},
        **changed,
    )


def whole(training: Training) -> list[Measurement]:
    found = []
    while not training.finished:
        found.append(training.epoch())
    return found


def epochs(trainings: list[Training]) -> list[Measurement]:
    """Of each of several, as in a round."""
    found = zip(trainings, measured_epochs(trainings), strict=True)
    return [training.save_epoch(measured) for training, measured in found]


def falling(optimizer: torch.optim.Optimizer, mode: str, factor: float, *_: Any, **named: Any) -> ReduceLROnPlateau:
    """Lowers the rate after every epoch."""
    return ReduceLROnPlateau(optimizer, mode, factor, -1, **named)


def assert_same_runs(first: Path, second: Path, a: list[Measurement], b: list[Measurement]) -> None:
    assert numbers(a) == numbers(b)
    assert_same_checkpoint(folder_of(run_in(first), a[-1].step), folder_of(run_in(second), a[-1].step))


# ---- one training


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_are_the_steps_bit_for_bit(data, tmp_path, log, monkeypatch, method, network):
    given = trial(method, network=network)
    monkeypatch.setattr(fitting, "ReduceLROnPlateau", falling)
    training = Training(given, data, run_in(tmp_path / "replayed"), "graph")
    replayed = whole(training)
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    again = whole(Training(given, data, run_in(tmp_path / "again"), "graph"))
    assert_same_runs(tmp_path / "replayed", tmp_path / "again", replayed, again)
    assert len({m.metrics["train/lr"] for m in replayed}) == 4
    monkeypatch.setattr(fitting, "in_graphs", lambda *_: True)
    eager = whole(Training(given, data, run_in(tmp_path / "eager"), "eager"))
    assert_same_runs(tmp_path / "replayed", tmp_path / "eager", replayed, eager)
    phases = 2 if method == "gradnorm" else 1
    # the plain step and the shorter last one; the compared one comes once an epoch, too seldom in gradnorm's first
    n_steps = -(-len(data.part("train").labels) // 177)
    assert n_steps > WARM_STEPS + 1
    assert training._launcher.n_captured == (4 if phases == 2 else 3)


def test_only_dropout_differs_from_steps_without_graphs(data, tmp_path, log):
    """Where nothing is drawn the numbers are those of the CPU, but for a rate in float32."""
    given = trial(network={"dropout": 0.0})
    replayed = whole(Training(given, data, run_in(tmp_path / "replayed"), "graph"))
    plain = whole(Training(given, data, run_in(tmp_path / "plain")))
    for a, b in zip(replayed, plain, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_makes_graphs_of_its_own_and_the_same_numbers(data, tmp_path, log, method):
    given = trial(method, network={"dropout": 0.2})
    expected = whole(Training(given, data, run_in(tmp_path / "whole"), "graph"))
    first = Training(given, data, run_in(tmp_path / "parts"), "graph")
    parts = [first.epoch() for _ in range(3)]
    second = Training(given, data, run_in(tmp_path / "parts", 2), "graph")
    second.restore(checkpoints.latest(second.run))
    assert numbers(parts + whole(second)) == numbers(expected)
    assert_same_checkpoint(folder_of(run_in(tmp_path / "whole"), 3), folder_of(run_in(tmp_path / "parts", 2), 3))
    assert second._launcher.n_captured > 0


def test_graphs_of_before_a_restore_are_not_used_after_it(data, tmp_path, log):
    given = trial(network={"dropout": 0.2})
    expected = whole(Training(given, data, run_in(tmp_path / "whole"), "graph"))
    training = Training(given, data, run_in(tmp_path / "parts"), "graph")
    training.epoch(), training.epoch()
    training.restore(checkpoints.latest(training.run))
    assert numbers(whole(training)) == numbers(expected[2:])


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_anything_on_the_host(data, tmp_path, monkeypatch, method):
    step, taken = Training._step, []

    def watched(self, *arguments):
        with NoHostReads():
            step(self, *arguments)
        taken.append(arguments)

    monkeypatch.setattr(fitting, "in_graphs", lambda *_: True)
    monkeypatch.setattr(Training, "_step", watched)
    training = Training(trial(method, network={"dropout": 0.3}), data, run_in(tmp_path))
    training.epoch(), training.epoch()
    assert len(taken) == 2 * len(training._plan.sizes)


def test_a_host_read_in_a_step_is_found_when_it_is_captured(log):
    sums = torch.zeros(())

    def step(rows, own):
        sums.add_(1.0 if bool(rows[0] >= 0) else 2.0)

    launch = StepGraphs(Plan(torch.arange(8), [2] * 4, {}), CPU)
    with pytest.raises(RuntimeError, match="not permitted"):
        list(launch(step, [()] * 4))
    assert log[-1][0] == "joined"


def test_steps_get_their_rows_and_what_is_theirs(log):
    order = torch.tensor([[5, 3, 1, 0, 2, 4, 6], [6, 5, 4, 3, 2, 1, 0]])
    own = {"rate": torch.arange(4.0).unsqueeze(1)}
    seen = torch.zeros(7, 2)

    def step(rows, own, factor):
        seen[rows[0]] = torch.stack([rows[1] * 1.0, own["rate"] * factor + 0.0 * rows[1]], dim=1)

    launch = StepGraphs(Plan(order, [2, 2, 2, 1], own), CPU)
    for epoch in range(4):
        expected = torch.zeros(7, 2)
        for i, (rows, factor) in enumerate(zip(order.split(2, 1), (1, 1, 10, 1), strict=True)):
            expected[rows[0], 0] = rows[1].float()
            expected[rows[0], 1] = own["rate"][i].item() * factor
        assert sum(1 for _ in launch(step, [(1,), (1,), (10,), (1,)])) == 4
        assert torch.equal(seen, expected), epoch
        order.copy_(order.roll(1, 1))
        own["rate"] += 1.0
    assert launch.n_captured == 3  # the kinds (2, 1), (2, 10) and (1, 1)


def test_how_steps_are_launched(monkeypatch):
    monkeypatch.delenv("TUNER_LAUNCH", raising=False)
    assert launch_of(CPU) == "eager"
    assert launch_of(GPU) == "graph"
    monkeypatch.setenv("TUNER_LAUNCH", "eager")
    assert launch_of(CPU) == launch_of(GPU) == "eager"
    assert in_graphs(GPU, "eager")  # the numbers of a GPU do not depend on it
    monkeypatch.setenv("TUNER_LAUNCH", "graph")
    assert launch_of(GPU) == "graph"


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cpu", "graph", "TUNER_LAUNCH: expected eager on cpu, .* got graph; unset it$"),
        ("cpu", "graphs", "TUNER_LAUNCH: expected eager or graph, got 'graphs'; unset it"),
        ("cuda", "", "TUNER_LAUNCH: expected eager or graph, got ''; unset it"),
    ],
)
def test_a_launch_that_is_none_is_refused_in_one_line(monkeypatch, device, asked, expected):
    monkeypatch.setenv("TUNER_LAUNCH", asked)
    with pytest.raises(InputError, match=expected) as found:
        launch_of(torch.device(device))
    assert "\n" not in str(found.value)


def test_what_is_asked_of_the_environment_is_for_trainings_and_arrays_that_are_not_told(
    data, tmp_path, log, monkeypatch
):
    monkeypatch.setenv("TUNER_LAUNCH", "graph")
    (c, *_), run = array_trials(), run_in(tmp_path)
    for made in (
        lambda: Training(c, data, run),
        lambda: GiftArray(bucket_of(c), room_for([c], data), data, 1, "cpu"),
    ):
        with pytest.raises(InputError, match="TUNER_LAUNCH"):
            made()
    assert Training(c, data, run, "graph").launch == "graph"
    assert array_of(data).launcher.n_captured == 0


# ---- several trainings


def test_epochs_of_several_take_turns_and_are_those_of_each_alone(data, tmp_path, log):
    every = [trial(m, batch=b, network={"dropout": 0.2}) for m, b in (("fixed", 300), ("gradnorm", 177))]
    alone = [whole(Training(c, data, run_in(tmp_path / f"a{i}"), "graph")) for i, c in enumerate(every)]
    log.clear()
    trainings = [Training(c, data, run_in(tmp_path / f"t{i}"), "graph") for i, c in enumerate(every)]
    together = [epochs(trainings) for _ in range(4)]
    for i in range(2):
        assert_same_runs(tmp_path / f"a{i}", tmp_path / f"t{i}", alone[i], [m[i] for m in together])
    first = [stream for what, stream in log if what == "steps"][:8]
    assert first == first[:2] * 4
    assert len(set(first)) == 2


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_what_one_fails_with_is_its_own(data, tmp_path, log, monkeypatch, launch):
    given = [trial(), trial(network={"depth": 1}), trial()]
    alone = Training(given[2], data, run_in(tmp_path / "alone"), launch).epoch()
    every = [Training(c, data, run_in(tmp_path / str(i)), launch) for i, c in enumerate(given)]
    monkeypatch.setattr(every[0], "_step", lambda *_: (_ for _ in ()).throw(FloatingPointError("step")))
    monkeypatch.setattr(every[1], "measure_epoch", lambda *_: (_ for _ in ()).throw(ValueError("measure")))
    found = measured_epochs(every)
    assert [type(f) for f in found] == [FloatingPointError, ValueError, Measured]
    assert not folder_of(run_in(tmp_path / "2"), 0).exists()
    assert numbers([every[2].save_epoch(found[2])]) == numbers([alone])
    assert folder_of(run_in(tmp_path / "2"), 0).exists()
    assert measured_epochs([]) == []


# ---- an array


def array_trials(n_epochs: int = 4) -> list[GiftConfig]:
    tasks = trial().model_dump(mode="json")["tasks"]
    return [
        trial(n_epochs=n_epochs, network={"width": 24, "dropout": 0.3}),
        trial(n_epochs=n_epochs, network={"width": 9, "dropout": 0.0}, tasks={"gives": tasks["gives"]}),
        trial(n_epochs=n_epochs, network={"width": 17, "dropout": 0.5, "head_width": 5}),
    ]


def trained(array: GiftArray, trainings: list[Training], n_epochs: int) -> list[list[Measurement]]:
    slots = [array.join(t) for t in trainings]
    every = [array.epoch(slots) for _ in range(n_epochs)]
    return [[found[slot] for found in every] for slot in slots]


def array_of(data: GiftDataset, n_slots: int = 3) -> GiftArray:
    every = array_trials()
    return GiftArray(bucket_of(every[0]), room_for(every, data), data, n_slots, "cpu", "graph")


def test_an_array_replayed_is_the_array_bit_for_bit_and_a_refill_captures_nothing(data, tmp_path, log, monkeypatch):
    def course(folder: Path) -> tuple[list[Any], GiftArray]:
        array, every = array_of(data), array_trials()
        first = [Training(c, data, run_in(folder / f"a{i}", seed=i), "graph") for i, c in enumerate(every)]
        found = trained(array, first[:2], 4)
        captured = array.launcher.n_captured
        array.leave(0)
        slot = array.join(first[2])
        found += [[array.epoch([slot])[slot] for _ in range(4)]]
        assert array.launcher.n_captured == captured
        return found, array

    replayed, array = course(tmp_path / "replayed")
    assert array.launcher.n_captured == 3
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    eager, _ = course(tmp_path / "eager")
    assert [numbers(m) for m in replayed] == [numbers(m) for m in eager]
    for i in range(3):
        folders = [folder_of(run_in(tmp_path / name / f"a{i}"), 3) for name in ("replayed", "eager")]
        assert_same_checkpoint(*folders)


def test_an_array_replayed_equals_each_alone_replayed(data, tmp_path, log):
    """In float32, up to the order of summation; the masks of dropout are the same."""
    every = array_trials(2)
    alone = [whole(Training(c, data, run_in(tmp_path / f"a{i}", seed=i), "graph")) for i, c in enumerate(every)]
    together = [Training(c, data, run_in(tmp_path / f"t{i}", seed=i), "graph") for i, c in enumerate(every)]
    for a, t in zip(alone, trained(array_of(data), together, 2), strict=True):
        losses = {n: v for n, v in a[0].metrics.items() if n.startswith("train/") and n.endswith("/loss")}
        assert losses
        assert {n: t[0].metrics[n] for n in losses} == pytest.approx(losses, rel=1e-4)


def test_a_slot_replayed_depends_on_no_neighbour(data, tmp_path, log):
    every = array_trials()
    alone = trained(array_of(data), [Training(every[2], data, run_in(tmp_path / "alone"), "graph")], 4)[0]
    others = [Training(c, data, run_in(tmp_path / f"o{i}", seed=9), "graph") for i, c in enumerate(every[:2])]
    given = Training(every[2], data, run_in(tmp_path / "among"), "graph")
    assert numbers(trained(array_of(data), [*others, given], 4)[2]) == numbers(alone)


def test_the_first_dropout_in_an_array_is_not_overlooked(data, tmp_path, log):
    every = array_trials()
    alone = trained(array_of(data), [Training(every[0], data, run_in(tmp_path / "alone"), "graph")], 2)[0]
    array = array_of(data)
    trained(array, [Training(every[1], data, run_in(tmp_path / "none"), "graph")], 4)
    assert array.launcher.n_captured > 0
    among = Training(every[0], data, run_in(tmp_path / "among"), "graph")
    slot = array.join(among)
    assert numbers([array.epoch([0, slot])[slot] for _ in range(2)]) == numbers(alone)


def test_graphs_of_a_training_hold_after_a_stay_in_an_array(data, tmp_path, log, monkeypatch):
    def course(folder: Path) -> list[Measurement]:
        training = Training(array_trials()[0], data, run_in(folder), "graph")
        found = [training.epoch(), training.epoch(), training.epoch()]
        array = array_of(data, 1)
        found.append(array.epoch([array.join(training)])[0])
        return [*found, training.epoch()]

    replayed = course(tmp_path / "replayed")
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    assert_same_runs(tmp_path / "replayed", tmp_path / "eager", replayed, course(tmp_path / "eager"))


def test_no_step_of_an_array_reads_anything_on_the_host(data, tmp_path, log, monkeypatch):
    step, taken = GiftArray._step, []

    def watched(self, *arguments):
        with NoHostReads():
            step(self, *arguments)
        taken.append(arguments)

    monkeypatch.setattr(GiftArray, "_step", watched)
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    array = array_of(data)
    trained(array, [Training(c, data, run_in(tmp_path / str(i)), "graph") for i, c in enumerate(array_trials())], 1)
    assert len(taken) == len(array.sizes)


# ---- CUDA's own part, with CUDA stood in for


class Graph:
    """What `torch.cuda.CUDAGraph` is asked for."""

    made: list[Graph]

    def __init__(self) -> None:
        self.begun, self.ended = None, False
        self.made.append(self)

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.begun = (pool, capture_error_mode, gc.isenabled())

    def capture_end(self) -> None:
        self.ended = True

    def pool(self) -> str:
        return "pool"

    def replay(self) -> str:
        return "replayed"


class Stream:
    """What `torch.cuda.Stream` gives: one of a few, in turn."""

    given: Iterator[int]
    device_index = 0

    def __init__(self, device: torch.device) -> None:
        self.stream_id = next(self.given)


@pytest.fixture
def cuda(monkeypatch) -> torch.device:
    """Streams, of which there are three, and graphs are stood in for."""
    monkeypatch.setattr(Graph, "made", [], raising=False)
    monkeypatch.setattr(Stream, "given", itertools.cycle(range(3)), raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    return torch.device("cuda:0")


@pytest.fixture
def stream(cuda) -> CudaStream:
    return CudaStream(cuda)


def test_graphs_of_a_stream_share_one_memory_and_collect_no_garbage_meanwhile(stream):
    ran = []
    assert stream.capture(lambda: ran.append(gc.isenabled()))() == "replayed"
    stream.capture(lambda: ran.append(gc.isenabled()))
    assert ran == [False, False]
    assert gc.isenabled()
    assert [g.begun for g in Graph.made] == [(None, "thread_local", False), ("pool", "thread_local", False)]
    assert all(g.ended for g in Graph.made)


def test_what_eager_steps_left_behind_is_let_go_of_before_a_capture(stream, monkeypatch):
    begun = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: begun.append([g.begun for g in Graph.made]))
    stream.capture(lambda: None)
    stream.capture(lambda: None)
    assert begun == [[], [Graph.made[0].begun]]


def test_no_stream_is_taken_twice_while_there_are_others(cuda):
    def taken(stream: CudaStream) -> int:
        return stream.stream.stream_id

    first, second, third = (CudaStream(cuda) for _ in range(3))
    assert [taken(s) for s in (first, second, third)] == [0, 1, 2]
    del second
    assert taken(fourth := CudaStream(cuda)) == 1
    del first, third
    assert sorted(taken(s) for s in [CudaStream(cuda), CudaStream(cuda)]) == [0, 2]
    assert taken(fourth) == 1


def test_graphs_of_one_stream_end_together(cuda):
    """One that is destroyed breaks the others of its stream: torch frees what they write to."""
    every = [CudaStream(cuda) for _ in range(4)]
    first, second = (s for s in every if s.stream is every[3].stream)
    every.clear()
    first.capture(lambda: None)
    second.capture(lambda: None)
    with pytest.raises(ZeroDivisionError):
        second.capture(lambda: 1 / 0)
    graphs = [weakref.ref(g) for g in Graph.made]
    Graph.made.clear()
    del second
    assert [g() is not None for g in graphs] == [True] * 3
    del first
    assert [g() for g in graphs] == [None] * 3


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (RuntimeError("CUDA error: an illegal\nlong advice"), RuntimeError, "graph: CUDA error: an illegal; "),
        (RuntimeError("CUDA error: not while capturing\nx"), RuntimeError, "a CUDA graph: not while capturing; "),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_a_failed_capture_ends_it_and_says_why_in_one_line(stream, error, kind, expected):
    def work():
        raise error

    with pytest.raises(kind, match=expected) as found:
        stream.capture(work)
    assert "\n" not in str(found.value)
    assert kind is KeyError or str(found.value).endswith("; set TUNER_LAUNCH=eager to train without graphs")
    assert Graph.made[0].ended
    assert gc.isenabled()


def test_memory_that_runs_out_in_a_capture_is_told_as_such(stream):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        stream.capture(work)
