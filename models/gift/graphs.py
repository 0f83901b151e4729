"""How the steps of an epoch are launched: one operation after the other, or on a CUDA device as captured graphs.

A small network's step is a hundred kernels of a few microseconds each, and the host takes longer to launch them
than the device to run them. So a step is a function of tensors that stay where they are and is captured in a CUDA
graph, once for each kind of step; from then on a step is one launch:

    plan = Plan(order, sizes, own)           # an epoch's inputs: filled anew before every epoch, never replaced
    launch = launcher(plan, device, "graph")
    for _ in launch(step, kinds): ...        # takes one step at a time
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from models.trainer import InputError

WARM_STEPS = 2  # of each kind, taken one by one before it is captured: they make what is made but once

Launch = Literal["eager", "graph"]
Step = Callable[..., None]
Kind = tuple[Hashable, ...]


def launch_of(device: torch.device) -> Launch:
    """How steps are launched on a device where the caller does not say: as TUNER_LAUNCH says, else as is best.

    Raises InputError where that is no way, or none on this device.
    """
    best: Launch = "graph" if device.type == "cuda" else "eager"
    asked = os.environ.get("TUNER_LAUNCH", best)
    if asked not in get_args(Launch):
        raise InputError(f"TUNER_LAUNCH: expected eager or graph, got {asked!r}; unset it for what is best")
    if asked == "graph" and device.type != "cuda":
        raise InputError(f"TUNER_LAUNCH: expected eager on {device}, which has no graphs, got graph; unset it")
    return asked


def in_graphs(device: torch.device, launch: Launch) -> bool:
    """Whether steps are written so that they can be captured: on a GPU always, so that all launches give the same
    numbers."""
    return launch == "graph" or device.type == "cuda"


@dataclass(frozen=True)
class Plan:
    """What the steps of an epoch read, beside their data and what they train.

    Attributes:
        order: [..., N] rows of the data, those of one step after those of another.
        sizes: how many of them each step takes; their sum is N.
        own: [n_steps, ...] each: by name, what each step has of its own.
    """

    order: Tensor
    sizes: Sequence[int]
    own: Mapping[str, Tensor]


class Launcher(Protocol):
    """Takes the steps of an epoch.

    Each `next` takes one: `step(rows, own, *kind)` with its rows [..., sizes[i]], its own tensors by name and its
    plain arguments `kinds[i]`, of which there are few different ones. On the device the steps come after what the
    caller launched before them, and before what it launches when they have ended.
    """

    def __call__(self, step: Step, kinds: Sequence[Kind]) -> Iterator[None]: ...


def launcher(plan: Plan, device: torch.device, launch: Launch) -> Launcher:
    """With `graph` a step may read nothing on the host, and is to be the same function in every epoch."""
    return Eager(plan) if launch == "eager" else StepGraphs(plan, device)


class Eager:
    """One operation after the other, in the caller's stream."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, step: Step, kinds: Sequence[Kind]) -> Iterator[None]:
        plan = self.plan
        for i, rows in enumerate(plan.order.split(list(plan.sizes), dim=-1)):
            step(rows, {name: tensor[i] for name, tensor in plan.own.items()}, *kinds[i])
            yield


class StepGraphs:
    """A CUDA graph for each kind of step: its number of rows and its plain arguments.

    Which step it is lies on the device: a graph reads its inputs from the plan by it and moves it on. So a replay
    needs nothing from the host, and what changes between epochs (order, rates, seeds) changes no graph. The first
    steps of a kind are taken one by one: they are training like all others, and nothing is undone.

    Attributes:
        n_captured: graphs made so far.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.stream = plan, CudaStream(device)
        self.n_captured = 0
        self._at = torch.zeros(2, dtype=torch.int64, device=device)  # the present step and its first row
        self._on = torch.tensor([[1, size] for size in sorted(set(plan.sizes))], device=device)
        self._row_of = {size: row for row, size in enumerate(sorted(set(plan.sizes)))}
        self._places = torch.arange(max(plan.sizes), device=device)
        self._warm: dict[Kind, int] = {}
        self._replay: dict[Kind, Callable[[], None]] = {}

    def __call__(self, step: Step, kinds: Sequence[Kind]) -> Iterator[None]:
        self._at.zero_()
        self.stream.fork()
        try:
            for size, kind in zip(self.plan.sizes, kinds, strict=True):
                with self.stream:
                    self._launch(step, size, kind)
                yield
        finally:
            self.stream.join()

    def _launch(self, step: Step, size: int, kind: Kind) -> None:
        key = (size, *kind)
        if key in self._replay:
            self._replay[key]()
        elif self._warm.get(key, 0) < WARM_STEPS:
            self._warm[key] = self._warm.get(key, 0) + 1
            self._take(step, size, kind)
        else:
            self._replay[key] = self.stream.capture(lambda: self._take(step, size, kind))
            self.n_captured += 1
            self._replay[key]()  # to capture is not to run

    def _take(self, step: Step, size: int, kind: Kind) -> None:
        """One step: a function of what lies on the device."""
        present, first = self._at.split(1)
        rows = self.plan.order.index_select(-1, first + self._places[:size])
        own = {name: tensor.index_select(0, present)[0] for name, tensor in self.plan.own.items()}
        step(rows, own, *kind)
        self._at += self._on[self._row_of[size]]


class _Line:
    """A stream, and every graph that was captured in it.

    With a graph torch 2.13 frees what cuBLAS works in on that stream, and all others of the stream would go on
    writing there. So they end together.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.graphs: list[torch.cuda.CUDAGraph] = []


_LINES: WeakValueDictionary[tuple[int, int], _Line] = WeakValueDictionary()  # in use, by device and stream
_STREAMS = 32  # of a device: torch hands them out in turn, over and over


def _line(device: torch.device) -> _Line:
    """A line that nobody is in, if there is one."""
    for _ in range(_STREAMS):
        stream = torch.cuda.Stream(device)
        key = stream.device_index, stream.stream_id
        if key not in _LINES:
            break
    return _LINES.setdefault(key, _Line(stream))


class CudaStream(contextlib.AbstractContextManager):
    """A stream of its own to take steps in, as a context, and to capture them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._line = device, _line(device)
        self.stream = self._line.stream
        self._pool: Any = None  # one memory for all graphs: a step leaves nothing there for another
        self._context: Any = None

    def __enter__(self) -> None:
        self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def fork(self) -> None:
        """Let it wait for what the caller has launched so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """Let the caller's stream wait for it."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What launches `work` again, which is recorded but not run. It is the current stream.

        Raises RuntimeError where something in it cannot be captured, as a read by the host.
        """
        torch.cuda.empty_cache()  # what eager steps have left behind no graph can use, nor let go of
        graph = torch.cuda.CUDAGraph()
        self._line.graphs.append(graph)  # also one that fails
        collects = gc.isenabled()
        gc.disable()  # what it frees on the device must not become part of the graph
        try:
            # other threads, that write checkpoints, say, may go on meanwhile
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says again that the capture is invalid
                    graph.capture_end()
                raise
            graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if "captur" in reason:  # the device itself has not failed, as "CUDA error" would say
                reason = reason.removeprefix("CUDA error: ")
            raise RuntimeError(
                f"a training step cannot be captured as a CUDA graph: {reason}; "
                "set TUNER_LAUNCH=eager to train without graphs"
            ) from error
        finally:
            if collects:
                gc.enable()
        self._pool = graph.pool()
        return graph.replay
