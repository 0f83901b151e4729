"""What an epoch of the gift trainer is measured by: losses, shares and cosines of its steps, ranks on valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.calibration import FocalInverse
from models.curves import curves
from models.decision import decide
from models.gift.data import GiftDataset, Task
from models.gift.losses import MultiTaskLoss
from models.gift.roles import unit
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig
from models.metrics import Ranking, Truth, read
from models.trainer import Run
from models.unit_cuts import unit_codes


class EpochSums:
    """Sums over an epoch's steps, kept on the device and read once. They stay where they are: `begin` clears them.

    `models` are dimensions in front of the tasks, for several models whose steps are taken at once: what is added
    has them too, and `of` gives the sums of one.
    """

    def __init__(self, n_tasks: int, device: torch.device, models: tuple[int, ...] = ()) -> None:
        # loss, batches with rows, weighted loss, weight
        self.steps = torch.zeros(4, *models, n_tasks, device=device)
        self.shares = torch.zeros(*models, n_tasks, device=device)
        self.cosines = torch.zeros(2, *models, n_tasks, n_tasks, device=device)  # sum, count
        self.n_steps = self.n_compared = 0

    def begin(self, n_steps: int, n_compared: int) -> None:
        """Begin an epoch of so many steps, of which so many are compared."""
        for sums in (self.steps, self.shares, self.cosines):
            sums.zero_()
        self.n_steps, self.n_compared = n_steps, n_compared

    def of(self, model: int, tasks: Sequence[int]) -> EpochSums:
        """The sums of one of several models, for the tasks in these columns."""
        columns = torch.tensor(tasks, device=self.steps.device)
        found = EpochSums(len(tasks), self.steps.device)
        found.steps = self.steps[:, model, columns]
        found.shares = self.shares[model, columns]
        found.cosines = self.cosines[:, model, columns][..., columns]
        found.n_steps, found.n_compared = self.n_steps, self.n_compared
        return found

    def add(self, losses: Tensor, present: Tensor, weights: Tensor) -> None:
        losses = losses.detach()
        self.steps += torch.stack([losses, present.to(losses.dtype), losses * weights, weights])

    def compare(self, gradients: Tensor, weights: Tensor) -> None:
        """Take in the tasks' gradients [K, P] with respect to the last shared layer, before weighting."""
        norms = gradients.norm(dim=-1)
        tiny = torch.finfo(norms.dtype).tiny
        directions = gradients / norms.clamp(min=tiny).unsqueeze(-1)
        alive = (norms > 0).to(norms.dtype)
        self.cosines += torch.stack([directions @ directions.mT, alive.unsqueeze(-1) * alive.unsqueeze(-2)])
        weighted = norms * weights
        self.shares += weighted / weighted.sum(-1, keepdim=True).clamp(min=tiny)

    def metrics(self, names: Sequence[str], order: Sequence[str]) -> dict[str, float]:
        """What the epoch is measured by, for tasks `names` (as the columns), pairs in the order of `order`."""
        loss, count, weighted, weight = self.steps.double().cpu().numpy()
        for name, value in zip(names, loss, strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"train/{name}/loss: expected a finite number, got {value}; lower optimizer.lr"
                )
        shares = (self.shares.double() / self.n_compared).cpu().numpy()
        (cosine, pairs), found = self.cosines.double().cpu().numpy(), {}
        for k, name in enumerate(names):
            if count[k]:
                found[f"train/{name}/loss"] = loss[k] / count[k]
            found[f"train/{name}/weight"] = weight[k] / self.n_steps
            if weighted.sum() > 0:
                found[f"train/{name}/loss_share"] = weighted[k] / weighted.sum()
            found[f"train/{name}/gradient_share"] = shares[k]
        for i, a in enumerate(order):
            for b in order[i + 1 :]:
                j, k = names.index(a), names.index(b)
                if pairs[j, k]:
                    found[f"train/cosine/{a}/{b}"] = cosine[j, k] / pairs[j, k]
        return {name: float(value) for name, value in found.items()}


class Validation:
    """The valid role of the trained tasks: its truth is built once, its metrics every epoch."""

    def __init__(self, config: GiftConfig, data: GiftDataset, tasks: Sequence[Task], run: Run) -> None:
        device = torch.device(run.device)
        self.rows = on_device(data, "valid", device)
        self.tasks, self.decision = tasks, run.decision
        names = [task.name for task in data.tasks]
        columns = [names.index(task.name) for task in tasks]
        self.targets = self.rows.targets[:, columns]
        self.loss = MultiTaskLoss([config.tasks[t.name] for t in tasks], device)
        self.std = {t.name: data.target_std[t.name] or 1.0 for t in tasks if t.kind == "regression"}
        self.truths: dict[str, tuple[Truth, Tensor | None]] = {}
        self.inverses = {
            t.name: FocalInverse(config.tasks[t.name].alpha, config.tasks[t.name].gamma)
            for t in tasks
            if config.tasks[t.name].loss == "focal"
        }
        for task in tasks:
            if task.kind == "binary":
                self.truths[task.name] = self._truth(data.tasks, names.index(task.name))
        self.unit = self._unit(data, device)

    def _unit(self, data: GiftDataset, device: torch.device) -> Tensor | None:
        """Codes of the units of the decision's rows; None where rows count."""
        if self.decision.unit == "row":
            return None
        known = self.truths[self.decision.task][1]
        codes = unit_codes(unit(data, "valid", self.decision), device)
        return codes if known is None else codes[known]

    def _truth(self, tasks: Sequence[Task], column: int) -> tuple[Truth, Tensor | None]:
        """Truth of a binary task and the rows that have its label (None for all). Money is the first
        regression task conditional on it, where no amount is negative."""
        labels, name = self.rows.labels[:, column], tasks[column].name
        known = None if not bool(labels.isnan().any()) else (~labels.isnan()).nonzero().flatten()
        money = next((k for k, t in enumerate(tasks) if t.conditional_on == name), None)
        amounts = None
        if money is not None:
            amounts = torch.where(labels == 1, self.rows.labels[:, money], 0.0).nan_to_num(nan=0.0)
            amounts = None if bool((amounts < 0).any()) else amounts
        if known is not None:
            labels = labels[known]
            amounts = None if amounts is None else amounts[known]
        return Truth.of(labels, amounts, name=f"valid/{name}"), known

    def _ranking(self, task: str, logits: Tensor) -> Ranking:
        truth, known = self.truths[task]
        return Ranking.of(logits if known is None else logits[known], truth)

    def measure(self, outputs: Tensor) -> dict[str, float]:
        """All metrics of one epoch from the outputs [N, K]."""
        losses, present = self.loss(outputs, self.targets)
        pending, found, chosen = {}, {}, {}
        for k, task in enumerate(self.tasks):
            prefix = f"valid/{task.name}"
            pending[f"{prefix}/loss"] = torch.where(present[k], losses[k], -1.0)
            if task.kind == "binary":
                ranking = self._ranking(task.name, outputs[:, k])
                ranked = ranking.metrics(self.inverses.get(task.name))
                pending |= {f"{prefix}/{name}": value for name, value in ranked.items()}
                if task.name == self.decision.task:
                    decided = decide(ranking, self.decision, self.unit)
                    chosen = {f"{prefix}/{n}": v for n, v in decided.items()}
            else:
                error = (outputs[:, k] - self.targets[:, k]).nan_to_num(nan=0.0)
                mean = error.square().sum() / (~self.targets[:, k].isnan()).sum().clamp(min=1)
                pending[f"{prefix}/rmse"] = torch.where(present[k], mean.sqrt() * self.std[task.name], -1.0)
        found = read(pending)
        # a loss is never negative: -1 stands for a task without a row in valid
        return {n: v for n, v in found.items() if v >= 0 or not n.endswith(("/loss", "/rmse"))} | chosen

    def curves(self, logits: Tensor, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What is drawn of the decision's task, from its logits [N] and the metrics that `measure` made of them.

        Where the task is trained with focal loss the calibration shown is that of the calibrated probabilities.
        """
        task = self.decision.task
        probability = self.inverses.get(task, torch.sigmoid)
        threshold = metrics.get(f"valid/{task}/threshold")
        return curves(self._ranking(task, logits), self.decision, threshold, probability, self.unit)
