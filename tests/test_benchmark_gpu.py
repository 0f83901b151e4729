"""The benchmark of training steps runs on the CPU too, and what it counts is what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import epoch, gpu, timed
from models.gift import graphs
from models.gift.array import GiftArray, bucket_of, room_for
from models.gift.fit import Training
from tests.models.gift.replayed import EagerStream

# torch.compile makes an instance of an autograd function and looks at gradients of what is no leaf
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def run(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=True).stdout


def cells(output: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return [[cell.strip("* ") for cell in row] for row in rows]


def test_every_row_is_measured_or_says_what_it_needs() -> None:
    output = run("--parts", "steps", "--batch", "128", "--slots", "2,3", "--streams", "2", "--steps", "5",
                 "--rounds", "2", "--launches", "eager,graph")  # fmt: skip
    rows = cells(output)[1:]
    assert [row[:3] for row in rows] == [
        ["DataLoader script", "eager", "1"],
        ["alone", "eager", "1"],
        ["alone", "graph", "1"],
        ["array", "eager", "2"],
        ["array", "graph", "2"],
        ["array", "eager", "3"],
        ["array", "graph", "3"],
        ["streams", "graph", "2"],
    ]
    for row in rows:
        if row[1] == "graph":
            assert row[3:] == ["needs CUDA"]
            continue
        median, low, high = float(row[3].replace(",", "")), *map(_number, row[4].split(" to "))
        assert 0 < low <= median <= high
        assert float(row[5]) > 1.0, "nothing is faster than the floor"
        assert float(row[7]) >= 0.0
    assert re.search(r"undecided, needs CUDA", output)
    assert re.search(r"GFLOP/s", output)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


# ---- the ways are the trainer's own steps


N_EPOCHS = 2


def weights(training: Training) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.network.parameters()])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Ways:
    """What compiles traces everything and leaves the operations as they are."""
    monkeypatch.setattr(EagerStream, "log", [], raising=False)
    monkeypatch.setattr(graphs, "CudaStream", EagerStream)
    monkeypatch.setattr(
        gpu, "compiled", lambda f, whole: torch.compile(f, dynamic=False, fullgraph=whole, backend="aot_eager")
    )
    return gpu.Ways(epoch.synthetic(5 * 64), gpu.Device("cpu"), 64, str(tmp_path))


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_compiled_steps_alone_are_the_same_steps(small: gpu.Ways, launch: str) -> None:
    plain, other = (small._training(k, launch, 42) for k in (Training, gpu.CompiledTraining))
    for training in (plain, other):
        for _ in range(N_EPOCHS):
            gpu.in_turn([gpu.plain_steps(training)])
    assert torch.allclose(weights(plain), weights(other), atol=1e-5)
    assert torch.allclose(plain.sums.steps, other.sums.steps, rtol=1e-4)


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_compiled_steps_of_an_array_are_the_same_steps(small: gpu.Ways, launch: str) -> None:
    found = []
    for kind in (GiftArray, gpu.CompiledArray):
        trainings = [small._training(Training, launch, seed) for seed in range(2)]
        config = trainings[0].config
        room = room_for([config], small.data)
        array = kind(bucket_of(config), room, small.data, 2, "cpu", launch)
        array.train_epoch([array.join(training) for training in trainings])
        found.append(array)
    plain, other = found
    assert torch.allclose(plain.stack.values, other.stack.values, atol=1e-5)
    assert torch.allclose(plain.sums.steps, other.sums.steps, rtol=1e-4)


def test_every_way_takes_all_its_steps_without_comparing(small: gpu.Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, bool]] = []
    for kind in (Training, GiftArray, gpu.CompiledTraining, gpu.CompiledArray):
        step = kind._step

        def noted(self: object, *args: object, step: object = step, kind: type = kind) -> None:
            if type(self) is kind:  # a compiled step goes on to the plain one
                taken.append((kind.__name__, bool(args[2])))
            step(self, *args)

        monkeypatch.setattr(kind, "_step", noted)
    works = {
        ("Training", 1): small.alone("graph"),
        ("CompiledTraining", 1): small.alone("compiled-graph"),
        ("Training", 2): small.streams(2),
        ("GiftArray", 1): small.array("graph", 2),
        ("CompiledArray", 1): small.array("compiled-graph", 2),
    }
    for (kind, n), work in works.items():
        work()
        taken.clear()
        work()
        assert taken == [(kind, False)] * 5 * n


def test_the_script_takes_every_row_once(small: gpu.Ways) -> None:
    script = gpu.Script(small.data, torch.device("cpu"), 64)
    before = [p.detach().clone() for p in script.tower.parameters()]
    script.steps()
    assert script.optimizer.state[next(script.tower.parameters())]["step"] == 5
    assert not any(torch.equal(a, b) for a, b in zip(before, script.tower.parameters(), strict=True))


# ---- the hardware and the criterion


def test_the_operations_of_a_step_are_those_torch_counts() -> None:
    batch = 32
    reference = epoch.Reference(epoch.synthetic(batch))
    with FlopCounterMode(display=False) as counter:
        reference.steps()
    assert gpu.Work.of_step(batch).flops == counter.get_total_flops()


def test_the_floor_is_what_takes_longer() -> None:
    work = gpu.Work(flops=1000, bytes=400)
    assert work.floor_s(gpu.Ceilings(flops=100.0, bytes=100.0)) == (10.0, 4.0)


def way(what: str, launch: str, n_models: int, step_us: list[float]) -> gpu.Way:
    return gpu.Way(what, launch, n_models, lambda: print, step_us=step_us)


@pytest.mark.parametrize(("array", "says"), [([20.0, 30.0, 40.0], "3.00 x, met"), ([21.0, 31.0, 41.0], "NOT met")])
def test_the_kill_criterion_compares_rounds(array: list[float], says: str) -> None:
    alone = way("alone", "compiled-graph", 1, [60.0, 90.0, 140.0])
    ways = [way("alone", "graph", 1, [1.0] * 3), alone, way("array", "graph", 16, array)]
    assert says in gpu.verdict([*ways, way("array", "graph", 8, [1.0] * 3)])
    assert "undecided" in gpu.verdict([alone, way("array", "graph", 16, [])])


def test_rounds_alternate_and_the_first_use_is_not_among_them() -> None:
    calls: list[str] = []
    ways = [gpu.Way(n, "eager", 2, lambda n=n: lambda: calls.append(n)) for n in ("a", "b")]
    gpu.measure(ways, gpu.Device("cpu"), 1, 2)
    assert "".join(calls) == "aabb" + "ab" + "ba"
    assert all(len(way.step_us) == 2 for way in ways)


def test_every_moment_of_the_main_thread_belongs_to_one_part() -> None:
    began = time.monotonic()
    watch = timed.Watch(began)
    with watch.part("outer"):
        time.sleep(0.02)
        with watch.part("inner"):
            time.sleep(0.04)
        other = threading.Thread(target=lambda: _in_part(watch))
        other.start()
        other.join()
    watch.turn("rest")
    time.sleep(0.01)
    watch.turn()
    assert set(watch.seconds) == {"start", "outer", "inner", "rest"}
    assert sum(watch.seconds.values()) == pytest.approx(watch._since - began)
    assert watch.seconds["inner"] == pytest.approx(0.04, abs=0.02)
    assert watch.seconds["outer"] == pytest.approx(0.05, abs=0.03)


def test_nothing_is_taken_out_of_a_whole_part() -> None:
    watch = timed.Watch(time.monotonic(), frozenset({"whole"}))
    with watch.part("whole"), watch.part("inner"):
        time.sleep(0.01)
    assert "inner" not in watch.seconds
    assert watch.seconds["whole"] >= 0.01


def _in_part(watch: timed.Watch) -> None:
    with watch.part("thread"):
        time.sleep(0.03)


def test_the_parts_of_a_study_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["config.training.max_epochs=2"]
    given = Namespace(trials=2, scale=0.002, data=None, overrides=overrides, study_slots=["1", "2"])
    began = time.monotonic()
    gpu.study(given, gpu.Device("cpu"))
    took_s = time.monotonic() - began
    output = capsys.readouterr().out
    assert len(re.findall("2 complete; 4 epochs", output)) == 2
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in cells(output)[1:]}
    whole = rows.pop("all")
    assert list(rows) == list(timed.PARTS)
    for i in (0, 2):
        assert sum(row[i] for row in rows.values()) == pytest.approx(whole[i], abs=0.1)
        assert all(rows[name][i] > 0 for name in ("start", "load", "train", "metrics", "checkpoints", "end"))
    assert took_s == pytest.approx(whole[0] + whole[2], abs=1.0)
    assert rows["data"][0] > rows["data"][2], "the second study finds it prepared"


def test_times_of_other_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"role": "worker", "ended": 0, "seconds": {}}')
    with pytest.raises(ValueError, match="coordinator and a worker"):
        timed.parts_of(tmp_path, 0.0)


def test_memory_is_what_was_held_at_once() -> None:
    """In a process of its own, as the benchmark is: what others have freed may not be in use again."""
    code = """
import torch
from benchmarks import gpu
with gpu.Device("cpu").peak() as peak:
    for _ in range(3):
        torch.ones(8_000_000)
print(peak[0])
"""
    root = Path(gpu.__file__).parents[1]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert 30e6 < int(told) < 70e6


def test_with_graphs_every_row_is_measured_and_the_criterion_decided(
    small: gpu.Ways, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.Device, "takes", lambda *_: True)  # `small` stands in for CUDA's graphs
    monkeypatch.setattr(gpu.Ceilings, "measured", lambda _: gpu.Ceilings(1e12, 1e11))
    given = Namespace(batch=64, steps=5, rounds=1, slots=[16], streams=[2], launches=gpu.LAUNCHES)
    gpu.steps(given, gpu.Device("cpu"))
    output = capsys.readouterr().out
    rows = cells(output)[1:]
    assert len(rows) == 1 + 4 + 4 + 1
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)
    assert re.search(r"[\d.]+ x, (NOT )?met", output)
