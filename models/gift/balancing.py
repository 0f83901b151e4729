"""How the tasks' losses become one update: fixed weights, GradNorm, PCGrad or Aligned-MTL.

A balancing fills the parameters' `.grad` from the losses of one batch and says which weights the tasks
effectively had in it. What it has to remember is in `tensors()`, for the checkpoint.

Nothing here is read by the host while it trains and no shape depends on a value, so that a step of any method
can be captured in a CUDA graph. Numbers that are not finite are passed on as such: whoever reads the losses at
the epoch's end finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.gift.trainer import BalancingConfig

# eigenvalues [n] and, as columns, vectors [n, n] of a symmetric float64 matrix
Eigen = Callable[[Tensor], tuple[Tensor, Tensor]]


def gradient_matrix(losses: Tensor, parameter: Tensor) -> Tensor:
    """Gradients of K losses with respect to one parameter, as rows. Shape: [K] -> [K, P]; keeps the graph."""
    rows = [torch.autograd.grad(loss, parameter, retain_graph=True)[0].flatten() for loss in losses.unbind()]
    return torch.stack(rows)


def draw_order(n_tasks: int, seed: int) -> Tensor:
    """The order in which each task's gradient is projected in one step. Shape: [K, K] int64 on the CPU, every row a
    permutation of its own; `seed` decides it, and the global generator is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n_tasks, generator=generator) for _ in range(n_tasks)])


class Fixed:
    """The weighted sum of the losses.

    Attributes:
        draws_order: whether `backward` needs an `order` (`draw_order`).
        phase: what `backward` does may depend on it; it changes between epochs alone.
    """

    draws_order = False
    phase = 0

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def backward(
        self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, order: Tensor | None
    ) -> Tensor:
        """Fill the gradients of all parameters of `network`, which are None before.

        Args:
            losses, present: what `MultiTaskLoss` returns, [K] each.
            features: the shared representation [B, W] from which the losses were computed.
            order: int64 [K, K] on their device where `draws_order`: row i is the order in which task i's gradient
                is projected off the others'. Else it is not looked at.

        Returns:
            The effective weights [K] of the losses in this update.
        """
        torch.dot(losses, self.weights).backward()
        return self.weights

    def end_epoch(self) -> None:
        """Called after the last batch of every epoch."""

    def tensors(self) -> dict[str, Tensor]:
        """State to be kept with the checkpoint."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back a state of `tensors()`."""


class GradNorm(Fixed):
    """Weights that pull the tasks' gradient norms towards a common, progress-dependent size.

    The first epoch trains with the given weights and averages the losses to L(0); from then on each batch
    moves the weights by Adam along the sign of the norm's distance from its target. They are clamped to at
    least a thousandth of their mean and renormalised to the sum they started with. A task without rows in
    a batch keeps its latest norm and loss. Weights are constants for the model's own gradients.

    Args:
        alpha: strength of the pull on tasks that learn slowly; 0 equalises the norms.
        lr: learning rate of the weights.

    Source: Chen et al. 2018, algorithm 1; L(0) is an average (one batch holds few positives), and the
    gradient with respect to the weights is in closed form: n_k * sign(w_k n_k - target_k).
    """

    def __init__(self, weights: Tensor, alpha: float, lr: float = 0.025) -> None:
        super().__init__(weights.clone())
        self.alpha = alpha
        self.total = float(weights.sum())
        self.optimizer = torch.optim.Adam(  # fused, it counts its steps where the weights are
            [self.weights], lr=lr * self.total / len(weights), fused=True, capturable=weights.is_cuda
        )
        names = ("initial_sum", "initial_count", "loss", "norm")  # over the first epoch; latest of each task
        self.state = {name: torch.zeros_like(weights) for name in names}
        self.phase = 0  # 1 after the first epoch

    def backward(
        self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, order: Tensor | None
    ) -> Tensor:
        norms = gradient_matrix(losses, network.last_shared).norm(dim=1) if self.phase else None
        applied = super().backward(losses, present, features, network, order).clone()
        if norms is None:
            self.state["initial_sum"] += losses.detach() * present
            self.state["initial_count"] += present
        else:
            self.update(losses.detach(), norms, present)
        return applied

    def update(self, losses: Tensor, norms: Tensor, present: Tensor) -> None:
        """Move the weights after a batch with these losses and unweighted gradient norms, [K] each."""
        state = self.state
        torch.where(present, losses, state["loss"], out=state["loss"])
        torch.where(present, norms, state["norm"], out=state["norm"])
        initial = state["initial_sum"] / state["initial_count"].clamp(min=1.0)
        known = (state["norm"] > 0.0) & (initial > 0.0)
        n_known = known.sum().clamp(min=1)
        progress = torch.where(known, state["loss"] / initial, 0.0)
        pull = progress / (progress.sum() / n_known).clamp(min=torch.finfo(progress.dtype).tiny)
        norm = self.weights * state["norm"] * known
        target = norm.sum() / n_known * pull**self.alpha
        self.weights.grad = state["norm"] * torch.sign(norm - target) * known
        self.optimizer.step()
        self.weights.clamp_(min=1e-3 * self.total / len(self.weights))
        self.weights.mul_(self.total / self.weights.sum())

    def end_epoch(self) -> None:
        self.phase = 1

    def tensors(self) -> dict[str, Tensor]:
        adam = {f"adam/{name}": value for name, value in self.optimizer.state[self.weights].items()}
        return {"weights": self.weights, **self.state, **adam}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.copy_(tensors["weights"])
        for name, value in self.state.items():
            value.copy_(tensors[name])
        adam = {n.removeprefix("adam/"): t for n, t in tensors.items() if n.startswith("adam/")}
        self.optimizer.state[self.weights] = {n: t.to(self.weights.device, copy=True) for n, t in adam.items()}
        self.phase = 1


class Aggregated(Fixed):
    """The tasks' gradients of the shared parameters are added up with weights made from their inner products.

    A head gets its own task's gradient, times `scale`. One backward pass of the tower per task.
    """

    def __init__(self, weights: Tensor, scale: Tensor) -> None:
        super().__init__(weights)
        self.scale = scale

    def combine(self, gramian: Tensor, order: Tensor | None) -> Tensor:
        """Weights [K] of the gradients of the scaled losses, from their inner products [K, K]."""
        raise NotImplementedError

    def backward(
        self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, order: Tensor | None
    ) -> Tensor:
        shared, heads = network.shared_parameters(), network.head_parameters()
        scaled = losses * self.scale
        own = torch.autograd.grad(scaled.sum(), heads, retain_graph=True)  # no head's block is in two tasks' losses
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in scaled.unbind()]
        gradients = torch.cat([g.flatten() for row in rows for g in row]).view(len(rows), -1)
        weights = self.combine(gradients @ gradients.T, order)
        joint = (weights @ gradients).split([p.numel() for p in shared])
        for parameter, gradient in zip([*shared, *heads], [*joint, *own], strict=True):
            parameter.grad = gradient.view_as(parameter)
        return weights * self.scale


class PCGrad(Aggregated):
    """The gradients of the weighted losses are projected off each other where they conflict.

    Source: Yu et al. 2020, algorithm 1.
    """

    draws_order = True

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights, weights)

    def combine(self, gramian: Tensor, order: Tensor | None) -> Tensor:
        return pcgrad_weights(gramian, order)


class AlignedMTL(Aggregated):
    """The gradients of the losses are replaced by the nearest that are orthogonal and of one length (that of their
    smallest principal component), and these are weighted.

    Source: Senushkin et al. 2023, algorithm 1.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights, torch.ones_like(weights))
        on_cpu = weights.device.type == "cpu"  # elsewhere `eigh` reads its errors on the host
        self.eigen: Eigen = torch.linalg.eigh if on_cpu else Jacobi(len(weights), weights.device)

    def combine(self, gramian: Tensor, order: Tensor | None) -> Tensor:
        return aligned_weights(gramian, self.weights, self.eigen)


class Jacobi:
    """Eigenvalues and vectors of a symmetric float64 matrix by a fixed number of rotations.

    A round turns disjoint pairs of axes at once so that the products of each pair vanish; a sweep of n - 1 rounds
    (n where n is odd) meets every pair, and after n + 1 sweeps nothing but rounding is left for n up to 8 (found
    by trying). Nothing is read by the host, unlike in `torch.linalg.eigh`, which asks the device for its errors.

    Source: Golub and Van Loan, Matrix Computations, section 8.5 (parallel ordering).
    """

    def __init__(self, n: int, device: torch.device | str) -> None:
        self.axes = torch.eye(n, dtype=torch.float64, device=device)
        self.quarter = torch.tensor([[0.0], [-math.pi / 2]], dtype=torch.float64, device=device)
        self.rounds = [[t.to(device) for t in _rotations(n, pairs)] for pairs in _rounds(n)]

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues [n], in no order, and the vectors as columns [n, n]."""
        vectors = self.axes
        for read, floor, write, still in self.rounds * (len(matrix) + 1):
            twice, difference = torch.addmv(floor, read, matrix.flatten()).view(2, -1)
            angle = torch.add(self.quarter, (twice / difference).atan(), alpha=0.5)  # as it is, and a quarter less
            cosine_sine = angle.cos().flatten()
            turn = torch.addmv(still, write, cosine_sine).view_as(matrix)
            matrix, vectors = turn.T @ matrix @ turn, vectors @ turn
        return matrix.diagonal(), vectors


def _rounds(n: int) -> list[list[tuple[int, int]]]:
    """The rounds of a tournament of n players in which each meets each other once; an odd one out rests."""
    last = n - 1 + n % 2  # stays in its place while the others move on by one; nobody where n is odd
    return [
        [(turn, last)] * (last < n) + [((turn + i) % last, (turn - i) % last) for i in range(1, (last + 1) // 2)]
        for turn in range(last if n > 1 else 0)
    ]


def _rotations(n: int, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How a round with these m pairs reads a flat matrix, and how it writes the flat rotation.

    Returns:
        [2 m, n²] giving twice the product of each pair and the difference of its squares; [2 m] to be added, which
        makes 0 / 0 none; [n², 2 m] taking the cosines and the sines of the pairs; [n²] to be added: axes at rest.
    """
    m = len(pairs)
    read = torch.zeros(2, m, n, n, dtype=torch.float64)
    write = torch.zeros(n, n, 2, m, dtype=torch.float64)
    still = torch.eye(n, dtype=torch.float64)
    for i, (p, q) in enumerate(pairs):
        read[0, i, p, q] = read[0, i, q, p] = 1.0
        read[1, i, q, q], read[1, i, p, p] = 1.0, -1.0
        write[p, p, 0, i] = write[q, q, 0, i] = 1.0
        write[p, q, 1, i], write[q, p, 1, i] = 1.0, -1.0
        still[p, p] = still[q, q] = 0.0
    floor = torch.tensor([0.0] * m + [1e-100] * m, dtype=torch.float64)  # far below what float32 can hold
    return read.view(2 * m, -1), floor, write.view(n * n, -1), still.flatten()


def pcgrad_weights(gramian: Tensor, order: Tensor) -> Tensor:
    """Weights [K] of K gradients whose projections are added up.

    Shape: gramian [K, K] their inner products, order [K, K] int64: gradient i is projected off the gradients
    order[i] one after the other, wherever what is left of it points against one of them. A zero gradient is no
    one's conflict.
    """
    n = len(gramian)
    left = own = torch.eye(n, dtype=gramian.dtype, device=gramian.device)  # a gradient as weights of them all
    size = gramian.diagonal().unsqueeze(1)
    shares = torch.where(size > 0.0, gramian / size, 0.0)  # inner products over the square of the one met
    shares = shares.index_select(0, order.T.flatten()).view(n, n, n)
    met = own.index_select(0, order.T.flatten()).view(n, n, n) * (1.0 - own)  # never itself
    for share, other in zip(shares.unbind(), met.unbind(), strict=True):
        turned = (share * left).sum(1, keepdim=True).clamp(max=0.0)
        left = torch.addcmul(left, turned, other, value=-1.0)
    return left.sum(0)


def aligned_weights(gramian: Tensor, preference: Tensor, eigen: Eigen) -> Tensor:
    """Weights [K] of K gradients whose sum is that of the aligned gradients with the weights `preference` [K].

    All singular values of the aligned gradients are the smallest one of the given ones that is not zero, within the
    rounding of their inner products `gramian` [K, K]. Where all gradients are zero the weights are `preference`.
    """
    finite = gramian.isfinite().all()
    values, vectors = eigen(torch.where(finite, gramian, 0.0).double())
    kept = values > values.max() * len(values) * torch.finfo(gramian.dtype).eps
    smallest = torch.where(kept, values, torch.inf).min()
    shrink = torch.where(kept, smallest / values, 0.0).sqrt()
    aligned = (vectors * shrink) @ (vectors.T @ preference.double())
    weights = torch.where(kept.any(), aligned, preference.double())
    return torch.where(finite, weights, torch.nan).to(gramian.dtype)


def make_balancing(config: BalancingConfig, weights: Tensor) -> Fixed:
    """The balancing of a configuration over K tasks with the given weights [K] (on the network's device)."""
    match config.method:
        case "fixed":
            return Fixed(weights)
        case "gradnorm":
            return GradNorm(weights, config.alpha)
        case "pcgrad":
            return PCGrad(weights)
        case "aligned_mtl":
            return AlignedMTL(weights)
