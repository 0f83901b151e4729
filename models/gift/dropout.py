"""Dropout's random numbers as a function of where they are used, for steps that are launched as CUDA graphs.

A generator is host state: a captured step would have to register it, and several models in one set of tensors
would need one each. Here the number of a unit is a hash of its epoch's seed, its step, layer, row and place in the
layer. So a model draws the same numbers alone, in an array and under padding. On the CPU a generator is faster (see
`models.gift.network.Dropout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64
_ROWS, _UNITS, _STEPS = (n << 48 for n in range(3))  # what is numbered, in the upper bits of its number
_LAYER = 1 << 32


class HashedDraws:
    """The numbers of an epoch of K models, 32 bits each, as fast as two passes over them.

    A row of the batch has a number a, and each unit of a layer has, anew in every step, two of its own, b (odd) and
    c: what is drawn is g(a b + c), where g(x) = x (2 x + 1) is a permutation of the 32-bit numbers whose upper bits
    depend on all of x. The tables behind a, b and c are hashed once an epoch.

    All tensors stay where they are: a captured step reads the numbers of whatever epoch they hold.

    Args:
        n_rows: the greatest number of rows in a batch.
        widths: units of each layer.
        n_steps: of an epoch.

    Attributes:
        keys: [n_steps, K, 2] int32, given to `begin_step` step by step.
    """

    def __init__(
        self, n_models: int, n_rows: int, widths: Sequence[int], n_steps: int, device: torch.device
    ) -> None:
        self.spans: list[tuple[int, int, int]] = []  # of each layer: where its b and its c begin, where they end
        units, start = [], 0
        for layer, width in enumerate(widths):
            self.spans.append((start, start + width, start + 2 * width))
            start += 2 * width
            place = torch.arange(width) * 2 + layer * _LAYER
            units += [place, place + 1]
        self._numbers = [  # of rows, units and steps
            (torch.arange(n_rows) + _ROWS).to(device),
            (torch.cat(units) + _UNITS).to(device),
            (torch.arange(2 * n_steps) + _STEPS).to(device),
        ]
        odd = torch.zeros(start, dtype=torch.int32)
        for b, c, _ in self.spans:
            odd[b:c] = 1
        self._odd = odd.to(device)
        whole = {"dtype": torch.int32, "device": device}
        self.rows = torch.zeros(n_models, n_rows, 1, **whole)
        self.units = torch.zeros(n_models, 1, start, **whole)
        self.keys = torch.zeros(n_steps, n_models, 2, **whole)
        self._drawn = self.units  # b and c of the present step

    def begin_epoch(self, seeds: Iterable[int]) -> None:
        """Take the seeds of an epoch, one for each model, below 2**63."""
        seed = torch.tensor(list(seeds), dtype=torch.int64, device=self.rows.device).unsqueeze(1)
        rows, units, steps = (_hashed(seed, numbers) for numbers in self._numbers)
        self.rows.copy_(rows.unsqueeze(2))
        self.units.copy_((units | self._odd).unsqueeze(1))
        keys = steps.view(len(rows), -1, 2).transpose(0, 1)
        # an odd factor and an even summand: what is odd in `units` stays so
        self.keys.copy_(torch.stack([keys[..., 0] | 1, keys[..., 1] & ~1], dim=2))

    def begin_step(self, keys: Tensor) -> None:
        """Make the units' numbers of a step from its row [K, 2] of `keys`."""
        factor, summand = keys.view(-1, 1, 2).split(1, dim=2)
        self._drawn = _mixed(torch.addcmul(summand, self.units, factor))

    def draw(self, layer: int, n_rows: int) -> Tensor:
        """[K, n_rows, width] int32 for one layer in the present step, every value equally likely."""
        b, c, end = self.spans[layer]
        drawn = self._drawn
        return _mixed(torch.addcmul(drawn[..., c:end], self.rows[:, :n_rows], drawn[..., b:c]))


def _mixed(x: Tensor) -> Tensor:
    """x (2 x + 1), which overflows as it is meant to."""
    return torch.addcmul(x, x, x, value=2)


def _hashed(seeds: Tensor, numbers: Tensor) -> Tensor:
    """[K, 1] and [n] int64 -> [K, n] int32.

    Source: Steele, Lea and Flood 2014 (splitmix64), of which these are the upper halves.
    """
    x = seeds + (numbers + 1) * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return (x >> 32).to(torch.int32)  # the last shift of splitmix64 leaves the upper half nearly as it is


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros: torch's brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
