"""The multi-task network: one shared tower, one small head per task."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.gift.dropout import HashedDraws
from models.gift.trainer import NetworkConfig

_GLOBAL_GENERATOR = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global CPU generator seeded, and put its state back afterwards.

    For code of others that draws from the global generator, as initialisers do. Blocks of several threads exclude
    each other, so that concurrent fits do not draw each other's numbers.
    """
    with _GLOBAL_GENERATOR:
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(state)


def draws_16(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """[n] int16, every value equally likely: four from each 64-bit number of the generator."""
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:n]


def cut_of_32(cut: int) -> int:
    """What a draw of 32 bits has to reach where `cut` of 65536 units are dropped."""
    return (cut - 32768) * 65536


class Dropout(nn.Module):
    """Inverted dropout that draws from a generator of its own: four 16-bit draws from one 64-bit number.

    torch's `dropout` draws from the global generator and, on the CPU, spends 8 ns on each element, which
    is a third of a training step of a small network; this takes 1.4 ns. The rate is rounded to 1/65536. In steps
    that are captured the draws are hashed instead: it is layer number `layer` of them.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.cut = round(rate * 65536)
        self.generator: torch.Generator | None = None
        self.hashed: HashedDraws | None = None
        self.layer = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.cut == 0:
            return x
        if self.hashed is None:
            draws, cut = draws_16(x.numel(), self.generator, x.device).view(x.shape), self.cut - 32768
        else:
            draws, cut = self.hashed.draw(self.layer, len(x))[0], cut_of_32(self.cut)
        keep = torch.empty_like(x, requires_grad=False)
        torch.ge(draws, cut, out=keep)
        return x * keep.mul_(65536 / (65536 - self.cut))


class PiecewiseLinearEmbedding(nn.Module):
    """Every numeric column as its own piecewise-linear function into `dim` dimensions.

    The same function and initialisation as `PiecewiseLinearEmbeddings(bins, dim, activation=False, version="B")` of
    rtdl_num_embeddings, up to twice as fast on the CPU: columns come first in memory, so that the product per
    column is contiguous, and one clamp with a bound for each bin does what takes four passes there.

    Args:
        bins: edges of each column, increasing, at least two.

    Shape:
        [B, D] -> [B, D * dim].

    Source: Gorishniy et al. 2022, equation 1 (encoding), with a linear part beside it.
    """

    def __init__(self, bins: Sequence[Tensor], dim: int) -> None:
        super().__init__()
        n_bins = max(len(edges) - 1 for edges in bins)
        scale, shift, low, high = (torch.zeros(len(bins), 1, n_bins) for _ in range(4))
        for column, edges in enumerate(bins):
            n, width = len(edges) - 1, edges.diff()
            scale[column, 0, :n], shift[column, 0, :n] = 1.0 / width, -edges[:-1] / width
            high[column, 0, :n] = 1.0
            low[column, 0, 0], high[column, 0, n - 1] = -math.inf, math.inf  # the outer bins go on for ever
        for name, value in (("scale", scale), ("shift", shift), ("low", low), ("high", high)):
            self.register_buffer(name, value, persistent=False)
        bound = dim**-0.5
        self.linear = nn.Parameter(torch.empty(len(bins), dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(bins), dim).uniform_(-bound, bound))
        self.weight = nn.Parameter(torch.zeros(len(bins), n_bins, dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # the encoding has no parameters
            columns = x.T.contiguous().unsqueeze(-1)
            encoded = torch.addcmul(self.shift, self.scale, columns)
            encoded = torch.clamp(encoded, self.low, self.high)
        embedded = torch.bmm(encoded, self.weight).transpose(0, 1)
        return torch.addcmul(self.bias + embedded, self.linear, x.unsqueeze(-1)).flatten(1)


def tower_widths(config: NetworkConfig) -> list[int]:
    """Width of each layer of the tower."""
    return [max(1, round(config.width * config.taper**i)) for i in range(config.depth)]


class MultiTaskMLP(nn.Module):
    """Shared tower with a head for each of K tasks.

    Every tower layer is linear, batch norm, ReLU, dropout; the widths are round(width * taper^i). The K
    heads (linear, ReLU, linear) are computed as one: side by side in the first layer and block-diagonal
    in the second, so that no head sees another's units.

    Args:
        bias: output of each head for an average row (logit of the base rate; 0 for a standardised target).
        quantiles: [Q+1, D] of the numeric columns; needed for piecewise-linear embeddings alone.
        seed: decides the initial weights; torch's global generator is left as it was.

    Shape:
        numeric [B, D] float32, codes [B, C] int (0 = unknown) -> [B, K] float32: logits or standardised values.
    """

    def __init__(
        self,
        config: NetworkConfig,
        n_numeric: int,
        cardinalities: Sequence[int],
        bias: Sequence[float],
        quantiles: np.ndarray | None,
        seed: int,
    ) -> None:
        super().__init__()
        with seeded(seed):
            self._build(config, n_numeric, cardinalities, torch.tensor(bias, dtype=torch.float32), quantiles)

    def _build(
        self,
        config: NetworkConfig,
        n_numeric: int,
        cardinalities: Sequence[int],
        bias: Tensor,
        quantiles: np.ndarray | None,
    ) -> None:
        self.numeric_embedding = None
        width = n_numeric
        if config.numeric_embedding == "piecewise_linear" and n_numeric:
            bins = bins_of(quantiles, config.n_bins)
            self.numeric_embedding = PiecewiseLinearEmbedding(bins, config.bin_embedding_dim)
            width = n_numeric * config.bin_embedding_dim
        self.embedding = None
        if cardinalities:  # one table for all columns: one gather and one gradient
            starts = np.concatenate([[0], np.cumsum(cardinalities)[:-1]])
            self.register_buffer("offsets", torch.as_tensor(starts, dtype=torch.int64), persistent=False)
            self.embedding = nn.Embedding(int(np.sum(cardinalities)), config.embedding_dim)
            nn.init.normal_(self.embedding.weight, std=1.0 / math.sqrt(config.embedding_dim))
            width += len(cardinalities) * config.embedding_dim
        layers: list[nn.Module] = []
        for out in tower_widths(config):
            layers.append(nn.Linear(width, out, bias=not config.batch_norm))
            layers += [nn.BatchNorm1d(out)] if config.batch_norm else []
            layers += [nn.ReLU(inplace=True), Dropout(config.dropout)]
            width = out
        self.tower = nn.Sequential(*layers)
        self.head_hidden = nn.Linear(width, len(bias) * config.head_width)
        bound = 1.0 / math.sqrt(config.head_width)
        self.head_weight = nn.Parameter(torch.empty(len(bias), config.head_width).uniform_(-bound, bound))
        self.head_bias = nn.Parameter(bias.clone())
        self.register_buffer("_diagonal", torch.eye(len(bias)).unsqueeze(-1), persistent=False)

    @property
    def last_shared(self) -> nn.Parameter:
        """Weight matrix of the tower's last linear layer: where the tasks' gradients are compared."""
        return next(layer.weight for layer in reversed(self.tower) if isinstance(layer, nn.Linear))

    @property
    def widest(self) -> int:
        """The most values that a row has anywhere in the network."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        embedding = self.numeric_embedding
        encoded = 0 if embedding is None else embedding.weight[..., 0].numel()
        return max(encoded, *(max(m.in_features, m.out_features) for m in linear))

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters below the heads."""
        heads = {id(p) for p in self.head_parameters()}
        return [p for p in self.parameters() if id(p) not in heads]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the heads; the blocks of two tasks never overlap."""
        return [*self.head_hidden.parameters(), self.head_weight, self.head_bias]

    def _dropouts(self) -> list[Dropout]:
        return [layer for layer in self.tower if isinstance(layer, Dropout)]

    def set_generator(self, generator: torch.Generator) -> None:
        """Draw all dropout from `generator` (of the network's device)."""
        for layer in self._dropouts():
            layer.generator = generator

    def set_hashed(self, hashed: HashedDraws) -> None:
        """Draw all dropout from a hash, of one model with the tower's layers."""
        for number, layer in enumerate(self._dropouts()):
            layer.hashed, layer.layer = hashed, number

    def features(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """The shared representation [B, W]."""
        parts = []
        if numeric.shape[1]:
            x = numeric if self.numeric_embedding is None else self.numeric_embedding(numeric)
            parts.append(x)
        if self.embedding is not None:
            parts.append(self.embedding(codes + self.offsets).flatten(1))
        return self.tower(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def heads(self, features: Tensor) -> Tensor:
        """Outputs [B, K] from the shared representation."""
        hidden = self.head_hidden(features).relu_()
        return F.linear(hidden, (self._diagonal * self.head_weight).flatten(1), self.head_bias)

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        return self.heads(self.features(numeric, codes))


def bins_of(quantiles: np.ndarray, n_bins: int) -> list[Tensor]:
    """Edges of at most `n_bins` bins per column out of train quantiles [Q+1, D].

    The edges are spread evenly over the distinct quantiles, so that a column of mostly zeros still gets bins
    for the rest; a constant column gets one bin of width 1, in which it encodes as 0.
    """
    edges = []
    for column in np.asarray(quantiles, dtype=np.float32).T:
        distinct = np.unique(column)
        picked = np.linspace(0, len(distinct) - 1, min(n_bins + 1, len(distinct))).round().astype(int)
        found = distinct[picked]
        edges.append(torch.from_numpy(found if len(found) > 1 else np.concatenate([found, found + 1.0])))
    return edges
