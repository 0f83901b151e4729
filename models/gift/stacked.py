"""K networks of the gift model in one set of tensors: one batched product where K networks take K.

Every slot has a row of `Stack.values` for its parameters, and the same row of Adam's two averages. Weights lie
padded to the widths of the `Room`, and padding needs no mask: a padded unit has no weight, scale or shift, so it
is 0, ReLU has no gradient there, and no product gives its weights one. So padded weights stay exactly zero.

Nothing is summed over slots, and all dimensions are those of the room, whoever is in it: what a slot computes
depends neither on its neighbours nor on its place. For that, whatever is summed or vectorised begins at a multiple
of `ALIGNED` elements in every slot. It holds to the bit with one thread on the CPU; several may divide the slots'
elements unevenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.gift.dropout import HashedDraws
from models.gift.network import Dropout, MultiTaskMLP, cut_of_32, draws_16, tower_widths
from models.gift.trainer import NetworkConfig

ALIGNED = 32  # elements; a multiple of every vector register and, in bytes, of a cache line
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's defaults, as solo training has them
_MOMENTUM, _NORM_EPS = 0.1, 1e-5  # batch norm's


def aligned(n: int) -> int:
    """The least multiple of `ALIGNED` that is not below n."""
    return -(-n // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Room:
    """What one slot has room for: the width of each tower layer, of a head and of an embedding, and the tasks by
    name, regression first. A network that needs less is padded."""

    widths: tuple[int, ...]
    head_width: int
    embedding_dim: int
    batch_norm: bool
    tasks: tuple[str, ...]

    @classmethod
    def covering(cls, networks: Iterable[NetworkConfig], tasks: Sequence[str]) -> Room:
        """The least room for networks of the same depth and norm."""
        networks = list(networks)
        widths = zip(*(tower_widths(n) for n in networks), strict=True)
        return cls(
            tuple(aligned(max(w)) for w in widths),
            aligned(max(n.head_width for n in networks)),
            max(n.embedding_dim for n in networks),
            networks[0].batch_norm,
            tuple(tasks),
        )

    def holds(self, network: NetworkConfig, tasks: Iterable[str]) -> bool:
        """Whether a network with heads for `tasks` fits in."""
        widths = tower_widths(network)
        return (
            len(widths) == len(self.widths)
            and all(w <= most for w, most in zip(widths, self.widths, strict=True))
            and network.head_width <= self.head_width
            and network.embedding_dim <= self.embedding_dim
            and network.batch_norm == self.batch_norm
            and network.numeric_embedding == "none"
            and set(tasks) <= set(self.tasks)
        )


class Layout:
    """Where each padded parameter lies in a slot's row of `size` elements. Linear weights are [in, out]."""

    def __init__(self, room: Room, n_numeric: int, cardinalities: Sequence[int]) -> None:
        self.room, self.n_numeric, self.n_codes = room, n_numeric, len(cardinalities)
        self.n_inputs = n_numeric + self.n_codes * room.embedding_dim
        n_tasks, units = len(room.tasks), len(room.tasks) * room.head_width
        width, self.shapes = aligned(self.n_inputs), {}
        if cardinalities:
            self.shapes["embedding"] = (sum(cardinalities), room.embedding_dim)
        for i, out in enumerate(room.widths):
            self.shapes |= {f"weight{i}": (width, out), f"shift{i}": (out,)}
            self.shapes |= {f"scale{i}": (out,)} if room.batch_norm else {}
            width = out
        self.shapes |= {"head_hidden": (width, units), "head_hidden_bias": (units,)}
        self.shapes |= {"head_weight": (n_tasks, room.head_width), "head_bias": (n_tasks,)}
        self.starts, self.size = {}, 0
        for name, shape in self.shapes.items():
            self.starts[name], self.size = self.size, self.size + aligned(math.prod(shape))

    def blocks(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters of all slots as views, [K, size] -> [K, *shape] each."""
        return {
            name: rows[:, start : start + math.prod(self.shapes[name])].unflatten(1, self.shapes[name])
            for name, start in self.starts.items()
        }

    def joined(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """[K, *shape] each -> [K, size]: what `blocks` takes apart, with zeros between the blocks."""
        rows: list[Tensor] = []
        for name in self.shapes:
            row = blocks[name].flatten(1)
            rows += [row, row.new_zeros(len(row), aligned(row.shape[1]) - row.shape[1])]
        return torch.cat(rows, dim=1)

    def positions(self, network: MultiTaskMLP, tasks: Sequence[str]) -> Tensor:
        """Where in a slot's row the parameters of a network lie, one after the other in the order of
        `network.parameters()`. Shape: [n_parameters]."""
        grid = {name: block[0] for name, block in self.blocks(torch.arange(self.size).unsqueeze(0)).items()}
        found: dict[nn.Parameter, Tensor] = {}
        inputs = list(range(self.n_numeric))
        if network.embedding is not None:
            dim, most = network.embedding.embedding_dim, self.room.embedding_dim
            found[network.embedding.weight] = grid["embedding"][:, :dim]
            inputs += [self.n_numeric + c * most + j for c in range(self.n_codes) for j in range(dim)]
        for i, (linear, norm) in enumerate(_layers(network)):
            out = linear.out_features
            found[linear.weight] = grid[f"weight{i}"][inputs, :out].T
            found[linear.bias if norm is None else norm.bias] = grid[f"shift{i}"][:out]
            if norm is not None:
                found[norm.weight] = grid[f"scale{i}"][:out]
            inputs = list(range(out))
        columns, width = [self.room.tasks.index(t) for t in tasks], network.head_weight.shape[1]
        units = [t * self.room.head_width + j for t in columns for j in range(width)]
        found[network.head_hidden.weight] = grid["head_hidden"][: len(inputs), units].T
        found[network.head_hidden.bias] = grid["head_hidden_bias"][units]
        found[network.head_weight] = grid["head_weight"][columns, :width]
        found[network.head_bias] = grid["head_bias"][columns]
        return torch.cat([found[p].flatten() for p in network.parameters()])


def _layers(network: MultiTaskMLP) -> list[tuple[nn.Linear, nn.BatchNorm1d | None]]:
    """The tower's linear layers, each with the norm that follows it."""
    norms = {i: layer for i, layer in enumerate(network.tower) if isinstance(layer, nn.BatchNorm1d)}
    return [(m, norms.get(i + 1)) for i, m in enumerate(network.tower) if isinstance(m, nn.Linear)]


class _BatchNorm(torch.autograd.Function):
    """Batch norm of each slot over its own rows, [K, B, W]; also gives mean and unbiased variance [K, 1, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + _NORM_EPS)
        normal = (x - mean).mul_(inverse)
        ctx.save_for_backward(normal, inverse, scale)
        unbiased = variance * (x.shape[1] / (x.shape[1] - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return torch.addcmul(shift.unsqueeze(1), normal, scale.unsqueeze(1)), mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normal, inverse, scale = ctx.saved_tensors
        n = dy.shape[1]
        d_shift = dy.sum(1)
        d_scale = (dy * normal).sum(1)
        inner = torch.addcmul(dy, normal, d_scale.unsqueeze(1), value=-1.0 / n)
        inner.sub_(d_shift.unsqueeze(1) / n)
        return inner.mul_(inverse * scale.unsqueeze(1)), d_scale, d_shift


class Stack:
    """Parameters, Adam's averages and running statistics of K networks; an empty slot has zeros.

    Between epochs a network and its optimiser hold their own state: `load` copies it in, `store` back. All tensors
    are of torch's default dtype, and stay where they are.

    Args:
        offsets: [n_codes] where each categorical column's codes begin in the table; None without such columns.
        hashed: what dropout draws from; None: from each network's generator.
    """

    def __init__(
        self,
        layout: Layout,
        n_slots: int,
        offsets: Tensor | None,
        device: torch.device,
        hashed: HashedDraws | None = None,
    ) -> None:
        room = layout.room
        self.layout, self.device, self.hashed = layout, device, hashed
        self.values, self.averages, self.squares = (
            torch.zeros(n_slots, layout.size, device=device) for _ in range(3)
        )
        # views that are leaves: they share the memory of `values`, and gradients come block by block
        self.weights = {n: b.detach().requires_grad_() for n, b in layout.blocks(self.values).items()}
        norms = room.widths if room.batch_norm else ()
        self.means = [torch.zeros(n_slots, 1, w, device=device) for w in norms]
        self.variances = [torch.ones(n_slots, 1, w, device=device) for w in norms]
        self.decay = torch.zeros(n_slots, 1, device=device)
        drawn = torch.int16 if hashed is None else torch.int32
        self.cut = torch.zeros(n_slots, 1, 1, dtype=drawn, device=device)
        self.scale = torch.ones(n_slots, 1, 1, device=device)
        self.dropping: dict[int, tuple[torch.Generator, list[int]]] = {}
        self.positions: dict[int, Tensor] = {}
        self._diagonal = torch.eye(len(room.tasks), device=device).unsqueeze(1)
        if offsets is not None:  # slot k's codes begin after k tables
            starts = torch.arange(n_slots, device=device) * layout.shapes["embedding"][0]
            self._offsets = starts.view(-1, 1, 1) + offsets

    @property
    def last_shared(self) -> Tensor:
        """Weights [K, in, out] of the tower's last linear layer."""
        return self.weights[f"weight{len(self.layout.room.widths) - 1}"]

    # ---- in and out

    def clear(self, slot: int) -> None:
        """Make a slot an empty one, whatever was in it."""
        for rows in (self.values, self.averages, self.squares, self.decay):
            rows[slot] = 0.0
        for mean, variance in zip(self.means, self.variances, strict=True):
            mean[slot], variance[slot] = 0.0, 1.0
        self.cut[slot], self.scale[slot] = self._cut_of(0), 1.0
        self.dropping.pop(slot, None)
        self.positions.pop(slot, None)

    def load(self, slot: int, network: MultiTaskMLP, optimizer: torch.optim.Adam, tasks: Sequence[str]) -> None:
        """Take in a network with heads for `tasks` and what its optimiser remembers."""
        self.clear(slot)
        parameters = list(network.parameters())
        where = self.layout.positions(network, tasks).to(self.device)
        states = [state for p in parameters if (state := optimizer.state.get(p))]  # none before the first step
        self.values[slot, where] = _flat(p.detach() for p in parameters)
        if states:
            self.averages[slot, where] = _flat(s["exp_avg"] for s in states)
            self.squares[slot, where] = _flat(s["exp_avg_sq"] for s in states)
        for i, (_, norm) in enumerate(_layers(network)):
            if norm is not None:
                self.means[i][slot, 0, : norm.num_features] = norm.running_mean
                self.variances[i][slot, 0, : norm.num_features] = norm.running_var
        drop = next(m for m in network.tower if isinstance(m, Dropout))
        if drop.cut:
            widths = [linear.out_features for linear, _ in _layers(network)]
            self.dropping[slot] = (drop.generator, widths)
        self.cut[slot], self.scale[slot] = self._cut_of(drop.cut), 65536 / (65536 - drop.cut)
        self.decay[slot] = optimizer.param_groups[0]["weight_decay"]
        self.positions[slot] = where

    def _cut_of(self, cut: int) -> int:
        """What a draw has to reach where `cut` of 65536 units are dropped."""
        return cut - 32768 if self.hashed is None else cut_of_32(cut)

    @torch.no_grad()
    def store(self, slot: int, network: MultiTaskMLP, optimizer: torch.optim.Adam, n_new: int, n_all: int) -> None:
        """Give back what `load` took in, `n_new` steps later, after `n_all` in all. What the optimiser has is
        written over where it lies: graphs of the network's own steps may have been captured with it."""
        parameters, where = list(network.parameters()), self.positions[slot]
        sizes = [p.numel() for p in parameters]
        rows = [rows[slot, where].split(sizes) for rows in (self.values, self.averages, self.squares)]
        for parameter, value, average, square in zip(parameters, *rows, strict=True):
            parameter.copy_(value.view_as(parameter))
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                state |= {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state["step"].fill_(n_all)
            state["exp_avg"].copy_(average.view_as(parameter))
            state["exp_avg_sq"].copy_(square.view_as(parameter))
        for i, (_, norm) in enumerate(_layers(network)):
            if norm is not None:
                norm.running_mean.copy_(self.means[i][slot, 0, : norm.num_features])
                norm.running_var.copy_(self.variances[i][slot, 0, : norm.num_features])
                norm.num_batches_tracked += n_new

    # ---- a step

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Outputs [K, B, T] in training mode of numeric [K, B, D] and codes [K, B, C]."""
        weights = self.weights
        x = self._inputs(numeric, codes)
        for i in range(len(self.layout.room.widths)):
            x = self._dropped(self._layer(x, i).relu_(), i)
        hidden = torch.baddbmm(weights["head_hidden_bias"].unsqueeze(1), x, weights["head_hidden"]).relu_()
        blocks = (weights["head_weight"].unsqueeze(-1) * self._diagonal).flatten(1, 2)
        return torch.baddbmm(weights["head_bias"].unsqueeze(1), hidden, blocks)

    def _inputs(self, numeric: Tensor, codes: Tensor) -> Tensor:
        parts, n_inputs = [numeric], self.layout.n_inputs
        if self.layout.n_codes:
            tables = self.weights["embedding"].flatten(0, 1)
            parts.append(F.embedding(codes + self._offsets, tables).flatten(2))
        parts.append(numeric.new_zeros(*numeric.shape[:2], aligned(n_inputs) - n_inputs))
        return torch.cat(parts, dim=2)

    def _layer(self, x: Tensor, i: int) -> Tensor:
        weight, shift = self.weights[f"weight{i}"], self.weights[f"shift{i}"]
        if not self.layout.room.batch_norm:
            return torch.baddbmm(shift.unsqueeze(1), x, weight)
        x, mean, variance = _BatchNorm.apply(torch.bmm(x, weight), self.weights[f"scale{i}"], shift)
        self.means[i].lerp_(mean, _MOMENTUM)
        self.variances[i].lerp_(variance, _MOMENTUM)
        return x

    def _dropped(self, x: Tensor, layer: int) -> Tensor:
        """Dropout of [K, B, W]; each slot draws the numbers for its own width that it would draw alone."""
        if not self.dropping:
            return x
        keep = torch.empty_like(x, requires_grad=False)
        if self.hashed is not None:
            torch.ge(self.hashed.draw(layer, x.shape[1]), self.cut, out=keep)
            return x * keep.mul_(self.scale)
        draws = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
        for slot, (generator, widths) in self.dropping.items():
            width = widths[layer]
            draws[slot, :, :width] = draws_16(x.shape[1] * width, generator, x.device).view(-1, width)
        torch.ge(draws, self.cut, out=keep)
        return x * keep.mul_(self.scale)

    @torch.no_grad()
    def step(self, gradients: Tensor, rate: Tensor, correction: Tensor) -> None:
        """Adam with L2 penalty.

        Shape: gradients [K, size], of `weights` and joined by the layout (overwritten); `rate` [K, 1] the
        learning rate over the first average's bias; `correction` [K, 1] the root of the second one's bias.
        """
        gradients.addcmul_(self.values, self.decay)
        self.averages.lerp_(gradients, 1.0 - _BETA1)
        self.squares.mul_(_BETA2).addcmul_(gradients, gradients, value=1.0 - _BETA2)
        size = self.squares.sqrt().div_(correction).add_(_EPS)
        self.values.addcmul_(size.reciprocal_().mul_(self.averages), rate, value=-1.0)


def adam_rates(lr: Tensor, first: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """`rate` and `correction` of `Stack.step` for steps `first` + 1 and on. Shape: lr and first [K] float64 ->
    [n_steps, K, 1] float64 each. Made once an epoch: in float32 the bias of the first steps would be inexact."""
    steps = (first + torch.arange(1, n_steps + 1, dtype=torch.float64).unsqueeze(1)).unsqueeze(-1)
    return lr.unsqueeze(-1) / (1.0 - _BETA1**steps), (1.0 - _BETA2**steps).sqrt()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
