"""What a training step costs on this device in every way of taking it, beside what the hardware allows.

    python -m benchmarks.gpu [--device cuda:0] [--slots 4,8,16,32] [--streams 4,8] [--parts steps,study]

Steps: microseconds a trial-step (one step of one model) of the network 70-256-128-64 with four heads, in batches of
4096 of the synthetic rows of `benchmarks/epoch.py`: the usual script with a DataLoader, the gift trainer alone,
several as one array, several each on a stream of its own. Medians of alternating rounds; on CUDA by its events, on
the CPU by the process time of one thread. The steps at which tasks' gradients are compared (1 in 100) are left out.
Peak: of memory while a way was made and first used; first use: its wall time beyond a later one's (compiling, say).

The floor is the larger of two times: the operations that a step cannot do without at the rate of a large matrix
product, and the bytes that it cannot do without at the rate of a large copy, both measured in the same run.

Study: `tuner run` of mvp13 with one worker, training one trial at once and as many as are best, and where its wall
time went.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import epoch, timed
from models.gift.array import GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.fit import Training
from models.gift.graphs import Launch
from models.gift.network import Dropout
from tuner.crew import device_environment

KILL_RATIO = 3.0  # what the array must be worth on a GPU to stay


# ---- the hardware


class Device:
    """Clock and memory of one device."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device("cuda:0" if name == "cuda" else name)
        self.is_cuda = self.torch.type == "cuda"

    @property
    def name(self) -> str:
        if self.is_cuda:
            return torch.cuda.get_device_name(self.torch)
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(line.partition(":")[2].strip() for line in lines if line.startswith("model name")) + ", 1 thread"
        )

    @property
    def clock(self) -> str:
        return "CUDA events" if self.is_cuda else "process time"

    def takes(self, way: Way) -> bool:
        """Whether it can be measured here."""
        return self.is_cuda or launch_of(way.launch) == "eager"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def seconds(self, work: Callable[[], object]) -> float:
        """What `work` takes, up to the end of what it has launched on the current stream."""
        if not self.is_cuda:
            return epoch.cpu_s(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        work()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """By how many bytes memory in use grew at most within the block, as the one number in the list."""
        found: list[int] = []
        if self.is_cuda:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)
            before = torch.cuda.memory_reserved(self.torch)
            yield found
            self.synchronize()
            found.append(torch.cuda.max_memory_reserved(self.torch) - before)
            return
        ctypes.CDLL(None).malloc_trim(0)  # what others have freed is not in use
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        yield found
        found.append(_resident("VmHWM") - before)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


@dataclass(frozen=True)
class Ceilings:
    """The rates that this device reaches at best: operations and bytes a second."""

    flops: float
    bytes: float

    @classmethod
    def measured(cls, device: Device) -> Ceilings:
        """By the fastest of several products of float32 matrices, as precise as training has them, and copies."""
        side, n_bytes = (8192, 2**32) if device.is_cuda else (2048, 2**28)
        a, b, product = (torch.randn(side, side, device=device.torch) for _ in range(3))
        source = torch.randint(0, 2**31, (n_bytes // 8,), device=device.torch)
        target = torch.empty_like(source)
        works = (lambda: torch.mm(a, b, out=product), lambda: target.copy_(source))
        for work in works:
            work()
        product_s, copy_s = (min(device.seconds(work) for _ in range(7)) for work in works)
        return cls(2 * side**3 / product_s, 2 * n_bytes / copy_s)


@dataclass(frozen=True)
class Work:
    """What one step of one model cannot do without: operations and bytes through the device's memory."""

    flops: int
    bytes: int

    @classmethod
    def of_step(cls, batch: int) -> Work:
        """Three products a layer (the first one two: features need no gradient). The rows and their positions are
        read; every layer's output is written, as batch norm needs it whole, and read again by the backward pass;
        values and Adam's two averages are read and written."""
        heads, n_tasks = epoch.HEAD * len(epoch.WEIGHTS), len(epoch.WEIGHTS)
        outs = (*epoch.WIDTHS, heads)
        sizes = zip((epoch.FEATURES, *epoch.WIDTHS), outs, strict=True)
        forward = 2 * (sum(a * b for a, b in sizes) + heads)
        flops = 3 * forward - 2 * epoch.FEATURES * epoch.WIDTHS[0]
        tower, last = epoch.network()
        n_parameters = sum(p.numel() for module in (tower, last) for p in module.parameters())
        row = 4 * (epoch.FEATURES + n_tasks) + 8 + 2 * 4 * (sum(outs) + n_tasks)
        return cls(batch * flops, batch * row + 6 * 4 * n_parameters)

    def floor_s(self, ceilings: Ceilings) -> tuple[float, float]:
        """Seconds for the operations and seconds for the bytes."""
        return self.flops / ceilings.flops, self.bytes / ceilings.bytes


# ---- ways of taking a step


@dataclass
class Way:
    """One row of the table.

    `make` builds what trains and gives the work that is measured: the same number of steps of each of `n_models`.
    """

    what: str
    launch: str
    n_models: int
    make: Callable[[], Callable[[], object]]
    peak_bytes: int = 0
    first_s: float = 0.0  # what the first measurement took beyond a later one: compiling, capturing, warming up
    step_us: list[float] = field(default_factory=list)  # of one model, of each round


class Script(epoch.Loader):
    """The usual script: rows from Dataset and DataLoader, moved to the device batch by batch, the loss read at
    every step."""

    def __init__(self, data: GiftDataset, device: torch.device, batch: int) -> None:
        super().__init__(data)
        self.device, self.batch = device, batch
        self.tower.to(device).train()
        self.heads.to(device)

    def steps(self) -> None:
        for batch in DataLoader(self.rows["train"], self.batch, shuffle=True):
            features = batch["features"].to(self.device)
            targets = torch.stack([batch[name] for name in epoch.WEIGHTS], 1).to(self.device)
            loss = epoch.total_loss(self.forward(features), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()


class CompiledTraining(Training):
    """Forward and losses as one compiled function; the steps that compare gradients keep more of the graph than it
    can, and stay as they are."""

    @cached_property
    def compiled(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        if not self.in_graphs:
            for layer in self.network.tower:
                if isinstance(layer, Dropout):
                    layer.forward = outside(layer.forward)
        return compiled(super().losses, self.in_graphs)

    def _step(self, rows: Tensor, own: Mapping[str, Tensor], is_compared: bool, phase: int) -> None:
        self.losses = super().losses if is_compared else self.compiled
        super()._step(rows, own, is_compared, phase)


class CompiledArray(GiftArray):
    """See `CompiledTraining`."""

    @cached_property
    def compiled(self) -> Callable[..., tuple[Tensor, Tensor]]:
        if self.hashed is None:
            self.stack._dropped = outside(self.stack._dropped)
        return compiled(super().losses, self.hashed is not None)

    def _step(self, rows: Tensor, own: Mapping[str, Tensor], is_compared: bool, drops: bool) -> None:
        self.losses = super().losses if is_compared else self.compiled
        super()._step(rows, own, is_compared, drops)


def compiled(function: Callable[..., Any], whole: bool) -> Callable[..., Any]:
    """`torch.compile` for fixed shapes; `whole`: without a break, as a graph needs it."""
    return torch.compile(function, dynamic=False, fullgraph=whole)


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """What compiled code calls as it is: dropout that draws from a generator."""
    return torch.compiler.disable(function)


class Ways:
    """Builds what is measured; everything stays alive, so that rounds can alternate."""

    def __init__(self, data: GiftDataset, device: Device, batch: int, folder: str) -> None:
        self.data, self.device, self.batch, self.folder = data, device, batch, folder

    def script(self) -> Callable[[], object]:
        return Script(self.data, self.device.torch, self.batch).steps

    def alone(self, launch: str, seed: int = 42) -> Callable[[], object]:
        training = self._training(CompiledTraining if launch.startswith("compiled") else Training, launch, seed)
        return lambda: in_turn([plain_steps(training)])

    def streams(self, n: int) -> Callable[[], object]:
        trainings = [self._training(Training, "graph", seed) for seed in range(n)]
        return lambda: in_turn([plain_steps(training) for training in trainings])

    def array(self, launch: str, n: int) -> Callable[[], object]:
        trainings = [self._training(Training, launch, seed) for seed in range(n)]
        config = trainings[0].config
        kind = CompiledArray if launch.startswith("compiled") else GiftArray
        room, device = room_for([config], self.data), str(self.device.torch)
        array = kind(bucket_of(config), room, self.data, n, device, launch_of(launch))
        array.train_epoch([array.join(training) for training in trainings])
        return lambda: in_turn([array.launcher(array._step, [(False, True)] * len(array.sizes))])

    def _training(self, kind: type[Training], launch: str, seed: int) -> Training:
        device = str(self.device.torch)
        return epoch.trainer(self.data, self.folder, device, seed, self.batch, launch_of(launch), kind)


def launch_of(launch: str) -> Launch:
    """How the steps of a row are launched."""
    return "graph" if launch.endswith("graph") else "eager"


def plain_steps(training: Training) -> Iterator[None]:
    """An epoch's steps, none of which compares gradients."""
    if training._launcher is None:  # the first epoch makes what all of them use
        return training.steps()
    kinds = [(False, training.balancing.phase)] * len(training._plan.sizes)
    return training._launcher(training._step, kinds)


def in_turn(every: Sequence[Iterator[None]]) -> None:
    """A step of each in turn until all have ended."""
    while every := [steps for steps in every if next(steps, steps) is not steps]:
        pass


def measure(ways: Sequence[Way], device: Device, n_steps: int, n_rounds: int) -> None:
    """Fill in what the ways cost, in rounds that go through all of them, every other one backwards."""
    works = []
    for way in ways:
        with device.peak() as peak:
            began = time.monotonic()
            work = way.make()
            work()
            device.synchronize()
            first_s = time.monotonic() - began
        way.peak_bytes = peak[0]
        began = time.monotonic()
        work()
        device.synchronize()
        way.first_s = max(0.0, first_s - (time.monotonic() - began))
        works.append(work)
        print(f"# {way.what}, {way.launch}, {way.n_models}: ready after {first_s:.1f} s", file=sys.stderr)
    for i in range(n_rounds):
        for way, work in list(zip(ways, works, strict=True))[:: -1 if i % 2 else 1]:
            way.step_us.append(1e6 * device.seconds(work) / (n_steps * way.n_models))


HEADER = """\
| trained | launch | models | us a trial-step | least to most | x floor | peak MB | first use s |
|---|---|---|---|---|---|---|---|"""


def row(way: Way, floor_us: float) -> str:
    """A line of the table."""
    cells = [way.what, way.launch, str(way.n_models)]
    if way.step_us:
        median = statistics.median(way.step_us)
        cells += [f"**{median:,.1f}**", f"{min(way.step_us):,.1f} to {max(way.step_us):,.1f}"]
        cells += [f"{median / floor_us:.1f}", f"{way.peak_bytes / 1e6:,.0f}", f"{way.first_s:.1f}"]
    else:
        cells += ["needs CUDA", "", "", "", ""]
    return "| " + " | ".join(cells) + " |"


def verdict(ways: Sequence[Way]) -> str:
    """Whether the array is worth its code: by the graphs of a GPU alone."""
    found = {(way.what, way.launch, way.n_models): way.step_us for way in ways}
    alone, array = (found.get(key) for key in (("alone", "compiled-graph", 1), ("array", "graph", 16)))
    rule = f"array of 16 (graph) at least {KILL_RATIO:g} x as fast as alone (compiled-graph)"
    if not (alone and array):
        return f"kill criterion: {rule}: undecided, needs CUDA"
    ratio = statistics.median(a / b for a, b in zip(alone, array, strict=True))
    return f"kill criterion: {rule}: {ratio:.2f} x, {'met' if ratio >= KILL_RATIO else 'NOT met'}"


# ---- a study


def study(arguments: argparse.Namespace, device: Device) -> None:
    """Run the same study with each number of slots, on one worker, and print where the wall time went."""
    with tempfile.TemporaryDirectory() as folder:
        studies = {slots: _studied(arguments, device, slots, Path(folder)) for slots in arguments.study_slots}
    for slots, (parts, results) in studies.items():
        counts = ", ".join(f"{n} {state}" for state, n in results["counts"].items() if n)
        n_epochs = sum(trial["last_step"] + 1 for trial in results["trials"] if trial["last_step"] is not None)
        source = results["data"]["source"]
        print(f"\nmvp13, slots {slots}: {counts}; {n_epochs} epochs in {sum(parts.values()):.1f} s; {source}")
    print("\n| part |" + "".join(f" slots {slots}: s | % |" for slots in studies))
    print("|---|" + "---|---|" * len(studies))
    columns = [{**parts, "**all**": sum(parts.values())} for parts, _ in studies.values()]
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {c[name]:.2f} | {100 * c[name] / c['**all**']:.1f} |" for c in columns))


def _studied(
    arguments: argparse.Namespace, device: Device, slots: str, folder: Path
) -> tuple[Mapping[str, float], dict[str, Any]]:
    """Seconds of each part of a study, and its results. What it prepares stays in the folder for the next one."""
    watched, name = folder / f"watched-{slots}", f"slots-{slots}"
    watched.mkdir()
    command = [
        sys.executable, "-m", "tuner", "run", "--study", "mvp13", "--name", name, "--slots", slots,
        "--n-trials", str(arguments.trials), "--runs", str(folder / "runs"), "--workers", "1",
        "--devices", str(device.torch), "--set", "trainer=benchmarks.timed:TimedTrainer",
        "--set", f"data.simulate.scale={arguments.scale}",
    ]  # fmt: skip
    command += ["--data", arguments.data] if arguments.data else []
    for override in arguments.overrides:
        command += ["--set", override]
    began = time.monotonic()
    environment = {**os.environ, timed.FOLDER: str(watched), timed.BEGAN: str(began)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    parts = timed.parts_of(watched, time.monotonic())
    return parts, json.loads((folder / "runs" / name / "results.json").read_text())


# ---- all of it


LAUNCHES = ("eager", "graph", "compiled", "compiled-graph")


def steps(arguments: argparse.Namespace, device: Device) -> None:
    """Measure every way of taking a step and print the table."""
    data = epoch.synthetic(arguments.steps * arguments.batch)
    ceilings, work = Ceilings.measured(device), Work.of_step(arguments.batch)
    flops_us, bytes_us = (1e6 * s for s in work.floor_s(ceilings))
    print(
        f"float32 matrix product: {ceilings.flops / 1e9:,.0f} GFLOP/s; copy: {ceilings.bytes / 1e9:,.0f} GB/s\n"
        f"floor of a trial-step of {arguments.batch} rows: {work.flops / 1e9:.3f} GFLOP, {flops_us:,.1f} us; "
        f"{work.bytes / 1e6:.1f} MB, {bytes_us:,.1f} us\n\n{HEADER}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        make = Ways(data, device, arguments.batch, folder)
        ways = [Way("DataLoader script", "eager", 1, make.script)]
        launches = [name for name in LAUNCHES if name in arguments.launches]
        ways += [Way("alone", launch, 1, partial(make.alone, launch)) for launch in launches]
        ways += [
            Way("array", launch, n, partial(make.array, launch, n)) for n in arguments.slots for launch in launches
        ]
        ways += [Way("streams", "graph", n, partial(make.streams, n)) for n in arguments.streams]
        measure([way for way in ways if device.takes(way)], device, arguments.steps, arguments.rounds)
    for way in ways:
        print(row(way, max(flops_us, bytes_us)))
    print("\n" + verdict(ways))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="cuda:0 or cpu")
    parser.add_argument("--parts", default="steps,study")
    parser.add_argument("--slots", type=numbers, default=[4, 8, 16, 32], help="models of an array")
    parser.add_argument("--streams", type=numbers, default=[4, 8], help="models, each on a stream of its own")
    parser.add_argument("--launches", type=lambda text: text.split(","), default=LAUNCHES)
    parser.add_argument("--batch", type=int, default=epoch.BATCH, help="rows of a step")
    parser.add_argument("--steps", type=int, help="of a measurement; 100 on CUDA, 4 on the CPU")
    parser.add_argument("--rounds", type=int, help="measurements of each; 7 on CUDA, 3 on the CPU")
    parser.add_argument("--study-slots", type=lambda text: text.split(","), default=["1", "auto"])
    parser.add_argument("--trials", type=int, help="of the study; 48 on CUDA, 8 on the CPU")
    parser.add_argument("--scale", type=float, help="of the simulated data; 0.1 on CUDA, 0.002 on the CPU")
    parser.add_argument("--data", help="KuaiLive's own files, for the study")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="of the study")
    arguments = parser.parse_args()
    device = Device(arguments.device)
    defaults = {"steps": (100, 4), "rounds": (7, 3), "trials": (48, 8), "scale": (0.1, 0.002)}
    for name, (on_cuda, on_cpu) in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_cuda if device.is_cuda else on_cpu)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # each number of models is one
    torch._inductor.config.force_disable_caches = True  # what an earlier run has compiled is no measure
    print(f"{device.name}; {date.today()}; torch {torch.__version__}; clock: {device.clock}")
    if "steps" in arguments.parts:
        steps(arguments, device)
    if "study" in arguments.parts:
        study(arguments, device)


if __name__ == "__main__":
    # as a worker has them; the C library reads them where a process begins
    settings = {k: v for k, v in device_environment("cpu", os.environ).items() if k != "CUDA_VISIBLE_DEVICES"}
    if not settings.items() <= os.environ.items():
        again = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **settings})
    main()
