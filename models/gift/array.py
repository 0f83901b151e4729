"""Several trainings of one device at once: a slot each of one array of networks.

Every slot's `Training` keeps its seeds, its schedule, its checkpoints and its validation; only the steps of an
epoch are taken together. Between epochs nothing of a slot lies here, so that it may leave after any of them, go on
alone or in another array, or make room for the next one, and the others do not notice:

    array = GiftArray(bucket_of(config), room, data, n_slots=8, device="cuda")
    slot = array.join(training)          # new, or restored from a checkpoint
    found = array.epoch([slot, ...])     # a measurement of each, durable, or what it failed with
    array.leave(slot)                    # ended, pruned, or to be continued elsewhere
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.gift.data import GiftDataset
from models.gift.dropout import HashedDraws
from models.gift.fit import Measured, Training, batch_sizes, compared_steps, row_type
from models.gift.graphs import Launch, Plan, in_graphs, launch_of, launcher
from models.gift.losses import MultiTaskLoss
from models.gift.measures import EpochSums
from models.gift.stacked import Layout, Room, Stack, adam_rates, aligned
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig, TaskConfig
from models.trainer import Measurement


@dataclass(frozen=True)
class Bucket:
    """What trainings of one array have in common, beside their data. All else is per slot."""

    depth: int
    batch_norm: bool
    batch_size: int


def bucket_of(config: GiftConfig) -> Bucket | str:
    """The bucket of a configuration; a reason in words where it can only train alone."""
    if config.balancing.method != "fixed":
        return f"balancing {config.balancing.method} needs the gradient of every task"
    if config.network.numeric_embedding != "none":
        return f"numeric embedding {config.network.numeric_embedding} has edges of its own"
    return Bucket(config.network.depth, config.network.batch_norm, config.optimizer.batch_size)


def room_for(configs: Sequence[GiftConfig], data: GiftDataset) -> Room:
    """The least room for configurations of one bucket: that of the widest, with the tasks of all."""
    trained = {name for config in configs for name in config.tasks}
    known = [t for kind in ("regression", "binary") for t in data.tasks if t.kind == kind]
    return Room.covering([c.network for c in configs], [t.name for t in known if t.name in trained])


class GiftArray:
    """Trains up to `n_slots` models of a bucket at once.

    A slot's numbers are those of its `Training` alone, up to the order of summation. They depend on `room` and
    `n_slots` in the last bits, and on nothing else: not on who is in the other slots nor on the slot's place.

    Args:
        room: the greatest widths; every slot is padded to them, and pays for them.
        launch: how its steps are launched; None: as is best on the device.
    """

    def __init__(
        self,
        bucket: Bucket,
        room: Room,
        data: GiftDataset,
        n_slots: int,
        device: str,
        launch: Launch | None = None,
    ) -> None:
        self.bucket, self.room, self.n_slots = bucket, room, n_slots
        self.device = torch.device(device)
        self.rows = on_device(data, "train", self.device)
        names = [t.name for t in data.tasks]
        self.targets = self.rows.targets[:, [names.index(n) for n in room.tasks]]
        self.sizes = batch_sizes(len(self.targets), bucket.batch_size)
        starts = torch.tensor([0, *data.cardinalities[:-1]]).cumsum(0).to(self.device)
        layout = Layout(room, len(data.numeric_names), data.cardinalities)
        launch = launch or launch_of(self.device)
        self.hashed = None
        if in_graphs(self.device, launch):
            self.hashed = HashedDraws(n_slots, max(self.sizes), room.widths, len(self.sizes), self.device)
        self.stack = Stack(layout, n_slots, starts if data.cardinalities else None, self.device, self.hashed)
        kinds = {t.name: "mse" if t.kind == "regression" else "bce" for t in data.tasks}
        self.loss = MultiTaskLoss([TaskConfig(loss=kinds[n]) for n in room.tasks], self.device)
        n_regression, n_binary = self.loss.n_regression, len(room.tasks) - self.loss.n_regression
        self.loss.huber = torch.zeros(n_slots, 1, n_regression, dtype=torch.bool, device=self.device)
        self.loss.alpha = torch.ones(2, n_slots, 1, n_binary, dtype=torch.float32, device=self.device)
        self.loss.gamma = torch.zeros(n_slots, 1, n_binary, dtype=torch.float32, device=self.device)
        self.task_weights = torch.zeros(n_slots, len(room.tasks), device=self.device)
        self.trained = torch.zeros(n_slots, 1, len(room.tasks), dtype=torch.bool, device=self.device)
        self.sums = EpochSums(len(room.tasks), self.device, (n_slots,))
        self.plan = self._planned()
        self.launcher = launcher(self.plan, self.device, launch)
        self._trainings: dict[int, Training] = {}
        for slot in range(n_slots):
            self.stack.clear(slot)

    # ---- who is in it

    @property
    def n_free(self) -> int:
        """Slots that a training can join."""
        return self.n_slots - len(self._trainings)

    def join(self, training: Training) -> int:
        """Give a training a free slot; it may be new, restored from a checkpoint, or come from another array.

        Raises ValueError where no slot is free, or where it cannot train here (`bucket_of`, `room_for`).
        """
        if bucket_of(training.config) != self.bucket:
            raise ValueError(f"expected a training of {self.bucket}, got {bucket_of(training.config)}")
        if not self.room.holds(training.config.network, training.names):
            raise ValueError(f"expected a training that fits into {self.room}, got {training.config.network}")
        if training.train is not self.rows:
            raise ValueError("expected a training on the same data and device, got one on others")
        if not self.n_free:
            raise ValueError(f"expected a free slot, got none of {self.n_slots}")
        slot = min(set(range(self.n_slots)) - set(self._trainings))
        self._trainings[slot] = training
        return slot

    def leave(self, slot: int) -> None:
        """Free a slot. Its training has everything of the epochs it has ended."""
        del self._trainings[slot]

    def clear(self) -> None:
        """Free every slot."""
        self._trainings.clear()

    # ---- an epoch

    def epoch(self, slots: Iterable[int]) -> dict[int, Measurement | Exception]:
        """One epoch of the trainings in these slots; the others wait and do not change.

        Of each its measurement, as `Training.epoch` gives it, or the exception that it raised. A slot that
        failed is free, and its training is not to be used again.
        """
        trainings = dict(self._trainings)
        return {
            slot: self._saved(slot, trainings[slot], found) for slot, found in self.measured_epoch(slots).items()
        }

    def measured_epoch(self, slots: Iterable[int]) -> dict[int, Measured | Exception]:
        """`epoch` without its checkpoints: what was measured is still to be saved (`Training.save_epoch`)."""
        start = time.monotonic()
        active = {slot: self._trainings[slot] for slot in sorted(slots)}
        if not active:
            return {}
        sums = self.train_epoch(active)
        return {slot: self._measured(slot, training, sums, start) for slot, training in active.items()}

    def train_epoch(self, slots: Iterable[int]) -> EpochSums:
        """The steps of an epoch alone: the trainings in these slots do not learn of them."""
        active = {slot: self._trainings[slot] for slot in slots}
        for slot in range(self.n_slots):
            self.stack.clear(slot)
            self.trained[slot], self.task_weights[slot] = False, 0.0
        for slot, training in active.items():
            self._load(slot, training)
        return self._train(active)

    def _columns(self, training: Training) -> list[int]:
        return [self.room.tasks.index(name) for name in training.names]

    def _load(self, slot: int, training: Training) -> None:
        columns, n = self._columns(training), self.loss.n_regression
        self.stack.load(slot, training.network, training.optimizer, training.names)
        own, n_own = training.loss, training.loss.n_regression
        binary = [column - n for column in columns[n_own:]]
        self.loss.huber[slot, 0, columns[:n_own]] = own.huber
        self.loss.alpha[:, slot, 0, binary] = own.alpha
        self.loss.gamma[slot, 0, binary] = own.gamma
        self.task_weights[slot, columns] = training.balancing.weights
        self.trained[slot, 0, columns] = True

    def _planned(self) -> Plan:
        """Where the steps of every epoch find their inputs."""
        shape = self.n_slots, len(self.targets)
        own = {"rates": torch.zeros(len(self.sizes), 2, self.n_slots, 1, device=self.device)}
        if self.hashed is not None:
            own["dropout"] = self.hashed.keys
        return Plan(torch.zeros(shape, dtype=row_type(self.device), device=self.device), self.sizes, own)

    def _train(self, active: dict[int, Training]) -> EpochSums:
        """Take the steps of an epoch. An empty slot reads the first row again and again, and learns nothing."""
        n_steps, seeds = len(self.sizes), [0] * self.n_slots
        self.plan.order.zero_()
        lr, first = torch.zeros(2, self.n_slots, dtype=torch.float64)
        for slot, training in active.items():
            seeds[slot], order = training.begin_epoch()
            self.plan.order[slot] = order
            lr[slot] = training.lr
            first[slot] = training.next_epoch * n_steps
        self.plan.own["rates"].copy_(torch.stack(adam_rates(lr, first, n_steps), dim=1))
        if self.hashed is not None:
            self.hashed.begin_epoch(seeds)
        compared = compared_steps(n_steps)
        self.sums.begin(n_steps, sum(compared))
        drops = bool(self.stack.dropping)
        for _ in self.launcher(self._step, [(c, drops) for c in compared]):
            pass
        return self.sums

    def _step(self, rows: Tensor, own: Mapping[str, Tensor], is_compared: bool, drops: bool) -> None:
        """One step of every slot. Shape: rows [K, B], rates [2, K, 1]. `drops`: some slot has dropout."""
        stack, sums = self.stack, self.sums
        if drops and self.hashed is not None:
            self.hashed.begin_step(own["dropout"])
        every = (self.rows.numeric, self.rows.codes, self.targets)
        losses, present = self.losses(*(_taken(values, rows) for values in every))
        if is_compared:
            sums.compare(_gradient_matrices(losses, stack.last_shared), self.task_weights)
        leaves = list(stack.weights.values())
        # the sum over slots has the gradient 1 for each of them, and nobody reads its value
        gradients = torch.autograd.grad((losses * self.task_weights).sum(), leaves)
        stack.step(stack.layout.joined(dict(zip(stack.weights, gradients, strict=True))), *own["rates"])
        sums.add(losses, present, self.task_weights)

    def losses(self, numeric: Tensor, codes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `MultiTaskLoss` returns of one batch of each slot. Shape: [K, B, ...] each -> [K, T] each."""
        outputs = self.stack.forward(numeric, codes)
        targets = torch.where(self.trained, targets, torch.nan)
        if more := aligned(targets.shape[1]) - targets.shape[1]:  # they do not count: so that slots are aligned
            outputs = F.pad(outputs, (0, 0, 0, more))
            targets = F.pad(targets, (0, 0, 0, more), value=torch.nan)
        return self.loss(outputs, targets)

    def _measured(self, slot: int, training: Training, sums: EpochSums, start: float) -> Measured | Exception:
        try:
            trained = sums.of(slot, self._columns(training)).metrics(training.names, training.order)
            n_new = len(self.sizes)
            n_all = (training.next_epoch + 1) * n_new
            self.stack.store(slot, training.network, training.optimizer, n_new, n_all)
            return training.measure_epoch(trained, start)
        except Exception as error:  # whatever it is, it is this training's, and the others go on
            self.leave(slot)
            return error

    def _saved(self, slot: int, training: Training, found: Measured | Exception) -> Measurement | Exception:
        try:
            return found if isinstance(found, Exception) else training.save_epoch(found)
        except Exception as error:  # its disk is full, say
            self.leave(slot)
            return error


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """[N, D] at rows [K, B] -> [K, B, D]."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, values.shape[1])


def _gradient_matrices(losses: Tensor, weights: Tensor) -> Tensor:
    """Gradients of the losses [K, T] with respect to each slot's weights [K, ...] -> [K, T, P]; keeps the graph."""
    per_task = [torch.autograd.grad(t.sum(), weights, retain_graph=True)[0].flatten(1) for t in losses.unbind(1)]
    return torch.stack(per_task, dim=1)
