"""Losses of all tasks at once, each averaged over the rows that count for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.gift.trainer import TaskConfig

REGRESSION = ("mse", "huber")
BINARY = ("bce", "focal")


def binary_losses(logits: Tensor, targets: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
    """Focal loss -alpha_t (1 - p_t)^gamma log p_t of logits, elementwise.

    Finite, with finite gradients, for every finite logit and gamma >= 0; gamma 0 is the weighted BCE.

    Args:
        targets: 0 or 1, in the shape of the logits [B, K].
        alpha: [2, K], the weight of a negative and of a positive row (alpha_t).
        gamma: [K].

    Source: Lin et al. 2017, eq. 5, with log(1 - p_t) = log p_t - s for the signed logit s.
    """
    signed = logits * (2.0 * targets - 1.0)
    log_p = F.logsigmoid(signed)
    weight = torch.where(targets > 0.5, alpha[1], alpha[0])
    return -weight * torch.exp(gamma * (log_p - signed)) * log_p


def regression_losses(outputs: Tensor, targets: Tensor, huber: Tensor) -> Tensor:
    """Squared error, or where `huber` [K] holds Huber's loss with delta 1 (d²/2, then |d| - 1/2), elementwise."""
    error = outputs - targets
    size = error.abs()
    bent = torch.where(size < 1.0, 0.5 * error * error, size - 0.5)
    return torch.where(huber, bent, error * error)


class MultiTaskLoss:
    """Mean loss of each of K tasks over the rows of a batch that count for it.

    The first columns are the regression tasks, the others the binary ones (`loss_order` gives the order).

    Args:
        tasks: the tasks' configurations in that order.
    """

    def __init__(self, tasks: Sequence[TaskConfig], device: torch.device | str) -> None:
        kinds = [task.loss for task in tasks]
        self.n_regression = sum(kind in REGRESSION for kind in kinds)
        if any(kind in REGRESSION for kind in kinds[self.n_regression :]):
            raise ValueError("regression tasks come before binary ones")
        bent = [kind == "huber" for kind in kinds[: self.n_regression]]
        self.huber = torch.tensor(bent, dtype=torch.bool, device=device)
        binary = tasks[self.n_regression :]
        pairs = [(1.0 - t.alpha, t.alpha) if t.loss == "focal" else (1.0, 1.0) for t in binary]
        self.alpha = torch.tensor(pairs, dtype=torch.float32, device=device).reshape(-1, 2).T.contiguous()
        gammas = [t.gamma if t.loss == "focal" else 0.0 for t in binary]
        self.gamma = torch.tensor(gammas, dtype=torch.float32, device=device)

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [K] and which of them have a row [K] (bool).

        A row without a target (NaN: no label, or its condition is not met) contributes neither value nor
        gradient, whatever the output; a task without any row has the loss 0 and the gradient 0.

        Shape: outputs and targets [B, K]; targets standardised, or 0/1. With further dimensions in front the
        losses have them too.
        """
        counts = ~targets.isnan()
        targets = torch.where(counts, targets, 0.0)
        outputs = torch.where(counts, outputs, 0.0)  # also stops a gradient of inf * 0
        n = self.n_regression
        parts = []
        if n:
            parts.append(regression_losses(outputs[..., :n], targets[..., :n], self.huber))
        if n < outputs.shape[-1]:
            parts.append(binary_losses(outputs[..., n:], targets[..., n:], self.alpha, self.gamma))
        losses = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        n_rows = counts.sum(-2)
        return (losses * counts).sum(-2) / n_rows.clamp(min=1), n_rows > 0


def loss_order(losses: Sequence[str]) -> list[int]:
    """Positions of the tasks with these losses, regression first, otherwise in the given order."""
    return sorted(range(len(losses)), key=lambda k: losses[k] not in REGRESSION)
