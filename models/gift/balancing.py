"""How the tasks' losses become one update: fixed weights, GradNorm, PCGrad or Aligned-MTL.

A balancing fills the parameters' `.grad` from the losses of one batch and says which weights the tasks
effectively had in it. What it has to remember is in `tensors()`, for the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torchjd.aggregation import AlignedMTL, PCGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from models.gift.network import seeded
from models.gift.trainer import BalancingConfig


def gradient_matrix(losses: Tensor, parameter: Tensor) -> Tensor:
    """Gradients of K losses with respect to one parameter, as rows. Shape: [K] -> [K, P]; keeps the graph."""
    rows = [torch.autograd.grad(loss, parameter, retain_graph=True)[0].flatten() for loss in losses.unbind()]
    return torch.stack(rows)


class Fixed:
    """The weighted sum of the losses."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def backward(self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, seed: int) -> Tensor:
        """Fill the gradients of all parameters of `network`.

        Args:
            losses, present: what `MultiTaskLoss` returns, [K] each.
            features: the shared representation [B, W] from which the losses were computed.
            seed: decides whatever the method draws for this batch.

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
        self.optimizer = torch.optim.Adam([self.weights], lr=lr * self.total / len(weights))
        names = ("initial_sum", "initial_count", "loss", "norm")  # over the first epoch; latest of each task
        self.state = {name: torch.zeros_like(weights) for name in names}
        self.started = False

    def backward(self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, seed: int) -> Tensor:
        norms = gradient_matrix(losses, network.last_shared).norm(dim=1) if self.started else None
        applied = super().backward(losses, present, features, network, seed).clone()
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
        self.started = True

    def tensors(self) -> dict[str, Tensor]:
        adam = {f"adam/{name}": value for name, value in self.optimizer.state[self.weights].items()}
        return {"weights": self.weights, **self.state, **adam}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.copy_(tensors["weights"])
        for name, value in self.state.items():
            value.copy_(tensors[name])
        adam = {n.removeprefix("adam/"): t for n, t in tensors.items() if n.startswith("adam/")}
        device = self.weights.device  # Adam keeps its step count on the CPU
        self.optimizer.state[self.weights] = {
            name: value.to("cpu" if name == "step" else device, copy=True) for name, value in adam.items()
        }
        self.started = True


class Aggregated(Fixed):
    """The tasks' gradients of the shared parameters are combined by a torchjd aggregator.

    PCGrad projects the gradients of the weighted losses off each other where they conflict. Aligned-MTL
    aligns the gradients of the losses and weights the aligned ones. A head gets its own task's gradient
    (for PCGrad times the weight). One backward pass of the tower per task.

    Source: Yu et al. 2020, algorithm 1; Senushkin et al. 2023, algorithm 1.
    """

    def __init__(self, weights: Tensor, method: Literal["pcgrad", "aligned_mtl"]) -> None:
        super().__init__(weights)
        self.scale = weights if method == "pcgrad" else torch.ones_like(weights)
        self.aggregator = PCGrad() if method == "pcgrad" else AlignedMTL(pref_vector=weights)

    def backward(self, losses: Tensor, present: Tensor, features: Tensor, network: nn.Module, seed: int) -> Tensor:
        shared, heads = network.shared_parameters(), network.head_parameters()
        mtl_backward(
            list((losses * self.scale).unbind()),
            features=features,
            shared_params=shared,
            tasks_params=[heads] * len(losses),
            retain_graph=True,  # the losses share the graph of the heads; it dies with them
            parallel_chunk_size=1,  # vmap does not go through batch norm on every device
        )
        with seeded(seed):  # PCGrad's order of the tasks comes from the global generator
            return jac_to_grad(shared, self.aggregator) * self.scale


def make_balancing(config: BalancingConfig, weights: Tensor) -> Fixed:
    """The balancing of a configuration over K tasks with the given weights [K] (on the network's device)."""
    if config.method == "gradnorm":
        return GradNorm(weights, config.alpha)
    if config.method == "fixed":
        return Fixed(weights)
    return Aggregated(weights, config.method)
