"""Training of the multi-task gift model: epochs over tensors that live on the device.

Everything random comes from `run.seed`: the initial weights from one derived seed, each epoch's batch order
and dropout from another. So an epoch depends on nothing but the checkpoint before it, and a resumed run
equals an uninterrupted one without any generator's state being stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from models import checkpoint as checkpoints
from models.calibration import FocalInverse
from models.gift.balancing import draw_order, gradient_matrix, make_balancing
from models.gift.data import GiftDataset, Task
from models.gift.dropout import HashedDraws
from models.gift.graphs import Launch, Launcher, Plan, in_graphs, launch_of, launcher
from models.gift.measures import EpochSums, Validation
from models.gift.model import WEIGHTS, below, outputs, trained_tasks
from models.gift.network import MultiTaskMLP, tower_widths
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig, TaskConfig
from models.trainer import InputError, Measurement, Run

COMPARED_STEPS = 100  # the tasks' gradients are compared at one of so many steps, and once in a shorter epoch


def initial_bias(config: TaskConfig, base_rate: float) -> float:
    """Logit that a binary task's constant model outputs at its optimum.

    For BCE the logit of the base rate; for focal loss the logit whose calibrated probability is the base
    rate, so that the first epochs are not spent on the intercept.
    """
    wanted = float(np.log(base_rate) - np.log1p(-base_rate))
    if config.loss == "bce":
        return wanted
    inverse = FocalInverse(config.alpha, config.gamma)
    low, high = -200.0, 200.0
    while high - low > 1e-6:  # the inverse is strictly increasing
        middle = (low + high) / 2.0
        above = inverse.logits(torch.tensor(middle)).item() > wanted
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2.0


def batch_sizes(n_rows: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches, all rows once. A last batch of one row, of which batch norm has no
    variance, joins the batch before it."""
    sizes = [batch_size] * (n_rows // batch_size)
    rest = n_rows % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def compared_steps(n_steps: int) -> list[bool]:
    """At which steps of an epoch the tasks' gradients are compared."""
    compared = min(n_steps, COMPARED_STEPS) // 2
    return [step % COMPARED_STEPS == compared for step in range(n_steps)]


def row_type(device: torch.device) -> torch.dtype:
    """Of the numbers of rows: small where K orders of all rows lie in a GPU's memory."""
    return torch.int64 if device.type == "cpu" else torch.int32


def _seed(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)


def _make_network(config: GiftConfig, data: GiftDataset, tasks: Sequence[Task], seed: int) -> MultiTaskMLP:
    bias = [
        initial_bias(config.tasks[t.name], data.base_rate[t.name]) if t.kind == "binary" else 0.0 for t in tasks
    ]
    n_numeric = len(data.numeric_names)
    return MultiTaskMLP(config.network, n_numeric, data.cardinalities, bias, data.quantiles, seed)


@dataclass(frozen=True)
class Measured:
    """An epoch that has no checkpoint yet. `best` holds the tensors of a best step, as they lie in its training."""

    measurement: Measurement
    best: dict[str, Tensor] | None
    start: float


class Training:
    """One run of `fit`: network, optimiser and everything a checkpoint holds.

    Args:
        launch: how its steps are launched; None: as is best on the device.
    """

    def __init__(self, config: GiftConfig, data: GiftDataset, run: Run, launch: Launch | None = None) -> None:
        self.config, self.run, self.device = config, run, torch.device(run.device)
        self.launch = launch or launch_of(self.device)
        self.in_graphs = in_graphs(self.device, self.launch)
        tasks = trained_tasks(config, data.tasks)
        self.names, self.order = [t.name for t in tasks], [t.name for t in data.tasks if t.name in config.tasks]
        if run.decision.task not in self.names:
            raise InputError(f"decision.task: expected a trained task, got {run.decision.task!r}")
        self.train = on_device(data, "train", self.device)
        every = [t.name for t in data.tasks]
        self.targets = self.train.targets[:, [every.index(n) for n in self.names]]
        self.validation = Validation(config, data, tasks, run)
        self.network = _make_network(config, data, tasks, _seed(run.seed, 0)).to(self.device)
        self.loss = self.validation.loss
        weights = torch.tensor([config.tasks[n].weight for n in self.names], device=self.device)
        self.balancing = make_balancing(config.balancing, weights)
        optimizer, lr = config.optimizer, config.optimizer.lr
        if self.in_graphs:  # a rate that the plateau fills anew; float32 is all that the fused kernel takes
            lr = torch.tensor(lr, dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr,
            weight_decay=optimizer.weight_decay,
            fused=True,
            capturable=self.in_graphs,
        )
        training = config.training
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, "max", training.lr_factor, training.lr_patience, threshold=0.0
        )
        self.generator = torch.Generator(self.device)
        self.network.set_generator(self.generator)
        self.sums = EpochSums(len(self.names), self.device)
        self._hashed: HashedDraws | None = None
        self._plan: Plan | None = None
        self._launcher: Launcher | None = None
        self.next_epoch, self.elapsed_s = 0, 0.0
        self.best_step, self.best_value = -1, -math.inf

    @property
    def lr(self) -> float:
        """The learning rate of the next epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def finished(self) -> bool:
        """The budget or the patience is used up."""
        training = self.config.training
        waited = self.next_epoch - 1 - self.best_step
        return self.next_epoch >= training.max_epochs or (self.next_epoch > 0 and waited >= training.patience)

    def epoch(self) -> Measurement:
        """Train and validate one epoch; on return its checkpoint is durable."""
        start = time.monotonic()
        return self.save_epoch(self.measure_epoch(self._train(), start))

    def measure_epoch(self, trained: Mapping[str, float], start: float) -> Measured:
        """Validate an epoch that began at `start` (`time.monotonic`), its steps measured by `trained`. Before the
        next one it has to be saved."""
        step, task = self.next_epoch, self.run.decision.task
        metrics = {"train/lr": self.lr, **trained}
        rows = self.validation.rows
        found = outputs(self.network, rows.numeric, rows.codes)
        if not bool(found.isfinite().all()):
            raise FloatingPointError(f"epoch {step}: an output is not finite on valid; lower optimizer.lr")
        metrics |= self.validation.measure(found)
        value = self.run.value(metrics)
        is_best = value > self.best_value
        if is_best:
            self.best_step, self.best_value = step, value
        self.scheduler.step(value)
        self.next_epoch += 1
        best = curves = None
        if is_best:
            logits = found[:, self.names.index(task)]
            best, curves = self._weights() | {"valid_logits": logits}, self.validation.curves(logits, metrics)
        return Measured(Measurement(step, metrics, self.elapsed_s + time.monotonic() - start, curves), best, start)

    def save_epoch(self, measured: Measured) -> Measurement:
        """Write the checkpoint of the epoch that was just measured; on return it is durable. Trainings may be saved
        by several threads at once."""
        measurement = measured.measurement
        checkpoints.save(self.run, measurement.step, self._tensors(), self._state(), measurement, measured.best)
        self.elapsed_s += time.monotonic() - measured.start
        return measurement

    def begin_epoch(self) -> tuple[int, Tensor]:
        """Seed the epoch's random numbers; the seed and the order of its rows [N]."""
        seed = _seed(self.run.seed, 1, self.next_epoch)
        self.generator.manual_seed(seed)
        return seed, torch.randperm(len(self.targets), generator=self.generator, device=self.device)

    def steps(self) -> Iterator[None]:
        """Take the steps of the next epoch, one with each `next`. Nothing is read on the host meanwhile."""
        seed, order = self.begin_epoch()
        if self._launcher is None:
            self._plan, self._launcher = self._planned()
        plan, n_steps = self._plan, len(self._plan.sizes)
        plan.order.copy_(order)
        if "turns" in plan.own:
            turns = [draw_order(len(self.names), seed ^ step) for step in range(n_steps)]
            plan.own["turns"].copy_(torch.stack(turns))
        if self._hashed is not None:
            self._hashed.begin_epoch([seed])
        compared = compared_steps(n_steps)
        self.sums.begin(n_steps, sum(compared))
        self.network.train()
        yield from self._launcher(self._step, [(c, self.balancing.phase) for c in compared])

    def end_steps(self) -> dict[str, float]:
        """What the steps of an epoch are measured by. Raises FloatingPointError where a loss is not finite."""
        self.balancing.end_epoch()
        return self.sums.metrics(self.names, self.order)

    def _train(self) -> dict[str, float]:
        for _ in self.steps():
            pass
        return self.end_steps()

    def _planned(self) -> tuple[Plan, Launcher]:
        """Where the steps of every epoch find their inputs."""
        n_rows, n_tasks = len(self.targets), len(self.names)
        sizes = batch_sizes(n_rows, self.config.optimizer.batch_size)
        own = {}
        if self.balancing.draws_order:
            own["turns"] = torch.zeros(len(sizes), n_tasks, n_tasks, dtype=torch.int64, device=self.device)
        if self.in_graphs and self.config.network.dropout > 0.0:
            widths = tower_widths(self.config.network)
            self._hashed = HashedDraws(1, max(sizes), widths, len(sizes), self.device)
            self.network.set_hashed(self._hashed)
            own["dropout"] = self._hashed.keys
        plan = Plan(torch.zeros(n_rows, dtype=row_type(self.device), device=self.device), sizes, own)
        return plan, launcher(plan, self.device, self.launch)

    def _step(self, rows: Tensor, own: Mapping[str, Tensor], is_compared: bool, phase: int) -> None:
        """One step on these rows [B]; `phase` (of the balancing) is what else decides which operations it takes."""
        if self._hashed is not None:
            self._hashed.begin_step(own["dropout"])
        every = (self.train.numeric, self.train.codes, self.targets)
        losses, present, features = self.losses(*(values.index_select(0, rows) for values in every))
        gradients = gradient_matrix(losses, self.network.last_shared) if is_compared else None
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.balancing.backward(losses, present, features, self.network, own.get("turns"))
        self.optimizer.step()
        self.sums.add(losses, present, weights)
        if gradients is not None:
            self.sums.compare(gradients, weights)

    def losses(self, numeric: Tensor, codes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one batch: what `MultiTaskLoss` returns, and the shared representation."""
        features = self.network.features(numeric, codes)
        return (*self.loss(self.network.heads(features), targets), features)

    def _weights(self) -> dict[str, Tensor]:
        return {f"{WEIGHTS}{name}": value for name, value in self.network.state_dict().items()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._weights()
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        return tensors | {f"balancing/{name}": value for name, value in self.balancing.tensors().items()}

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "seed": self.run.seed,
            "lr": self.lr,
            "plateau": {name: getattr(self.scheduler, name) for name in _PLATEAU},
            "best_step": self.best_step,
            "best_value": self.best_value,
        }

    def restore(self, found: checkpoints.Checkpoint) -> Measurement:
        """Continue after a checkpoint; its measurement, as `epoch` gave it.

        Raises InputError where it belongs to another configuration or seed.
        """
        state, tensors = found.state, found.tensors
        checkpoints.refuse_other(found, {"config": self.config.model_dump(mode="json"), "seed": self.run.seed})
        self._launcher = None  # a graph writes to the optimiser's tensors that it was captured with
        self.network.load_state_dict(below(WEIGHTS, tensors))
        for name, parameter in self.network.named_parameters():
            saved = below(f"optimizer/{name}/", tensors)
            self.optimizer.state[parameter] = {k: v.to(self.device, copy=True) for k, v in saved.items()}
        self.balancing.load(below("balancing/", tensors))
        group = self.optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(state["lr"]) if self.in_graphs else state["lr"]
        for name, value in state["plateau"].items():
            setattr(self.scheduler, name, value)
        self.next_epoch, self.elapsed_s = found.step + 1, found.measurement.elapsed_s
        self.best_step, self.best_value = state["best_step"], state["best_value"]
        if self.best_step != found.step:
            return found.measurement
        logits = found.load_best()["valid_logits"].to(self.device)  # a checkpoint keeps no curves
        return replace(found.measurement, curves=self.validation.curves(logits, found.measurement.metrics))


_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


def measured_epochs(trainings: Sequence[Training]) -> list[Measured | Exception]:
    """Train and validate one epoch of each of several trainings of one device, or what it failed with: the others
    go on. Those that were measured are still to be saved (`Training.save_epoch`)."""
    found: dict[Training, Measured | Exception] = {}
    for party in parties(trainings):
        start = time.monotonic()
        for training, failure in zip(party, take_steps(party), strict=True):
            try:
                if failure is not None:
                    raise failure
                found[training] = training.measure_epoch(training.end_steps(), start)
            except Exception as error:  # whatever it is, it is this training's
                found[training] = error
    return [found[training] for training in trainings]


def parties(trainings: Sequence[Training]) -> list[list[Training]]:
    """Who take their steps in turn: those in graphs, each on a stream of its own, so that they overlap. The others
    train one after the other."""
    in_turn = [training for training in trainings if training.launch == "graph"]
    return [in_turn, *([training] for training in trainings if training.launch != "graph")]


def take_steps(trainings: Sequence[Training]) -> list[Exception | None]:
    """Take an epoch's steps, one of each training in turn; what each failed with, while the others go on."""
    failures: list[Exception | None] = [None] * len(trainings)
    going = {i: training.steps() for i, training in enumerate(trainings)}
    while going:
        for i, steps in list(going.items()):
            try:
                goes_on = next(steps, steps) is not steps
            except Exception as error:  # whatever it is, it is this training's
                failures[i], goes_on = error, False
            if not goes_on:
                del going[i]
    return failures
