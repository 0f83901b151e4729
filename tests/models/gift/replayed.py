"""A stand-in for CUDA's streams and graphs on the CPU, as strict as they are: what is captured is not run, a host
read or a generator in it is refused, and a replay runs the same operations on the same memory and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
READS = {  # by the host; and constants that it sends to the device
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select,
    aten.unique_dim, aten._unique2, aten.lift_fresh,
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Fails where something reads what the device has computed, or draws from a generator, whose state is the
    host's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        draws = any(isinstance(a, torch.Generator) for a in (kwargs or {}).values())
        if func.overloadpacket in READS or draws or _is_masked(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nmore of it")
        return func(*args, **(kwargs or {}))


def _is_masked(func: Any, args: tuple) -> bool:
    """Whether a mask is an index: how much it selects is read by the host."""
    indexes = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)
    return indexes and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


class _Recording(NoHostReads):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[tuple[int, Tensor]]]] = []
        self.made: dict[int, Tensor] = {}  # by storage: what only the graph has
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        before = _aliases(args)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in _written(func, args, kwargs):
            if _storage(tensor) not in self.made and _storage(tensor) not in self.before:
                storage = tensor.untyped_storage()
                self.before[_storage(tensor)] = (storage, storage.clone())
        found = super().__torch_dispatch__(func, types, args, kwargs)
        new = [(i, t) for i, t in _tensors(found) if _storage(t) not in given]
        self.made |= {_storage(t): t for _, t in new}
        # kept as they are now: some operations change the shape of a tensor in place
        args, kwargs, new = _aliases((before, kwargs, new))
        self.calls.append((func, args, kwargs, new))
        return found

    def end(self) -> None:
        """As if nothing had been run."""
        for storage, content in self.before.values():
            storage.copy_(content)
        with torch.no_grad():
            for tensor in self.made.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, new in self.calls:
            found = dict(_tensors(func(*_aliases(args), **kwargs)))
            for i, tensor in new:
                tensor.copy_(found[i])


def _aliases(values: Any) -> Any:
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, values)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(found: Any) -> list[tuple[int, Tensor]]:
    return [(i, t) for i, t in enumerate(tree_leaves(found)) if isinstance(t, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    values = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if func is aten.native_batch_norm.default:  # does not say so
        names += ["running_mean", "running_var"]
    return [t for name in names for t in tree_leaves(values.get(name)) if isinstance(t, Tensor)]


class ReplayedStream(contextlib.AbstractContextManager):
    """In the place of `models.gift.graphs.CudaStream`."""

    open: ReplayedStream | None = None  # where steps are being taken
    log: list[tuple[str, int]]  # set by a test: what was done, by which stream

    def __init__(self, device: torch.device) -> None:
        self.log.append(("made", id(self)))
        self.forked = False

    def __enter__(self) -> None:
        assert self.forked
        assert ReplayedStream.open is None
        ReplayedStream.open = self
        self.log.append(("steps", id(self)))

    def __exit__(self, *error: object) -> None:
        ReplayedStream.open = None

    def fork(self) -> None:
        self.forked = True

    def join(self) -> None:
        self.forked = False
        self.log.append(("joined", id(self)))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert ReplayedStream.open is self
        recording = _Recording()
        with recording:
            work()
        recording.end()
        return recording.replay


class EagerStream(ReplayedStream):
    """Runs again what was to be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work
