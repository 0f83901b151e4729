"""How many trials of one device are best trained at once: measured there, on the first rows of train.

The steps are those that a round would take: as an array, on streams of a device, or one after the other. On a GPU
arrays and streams are compared, and rounds go the faster way from then on. Nothing is validated or written, and
nothing that a trial draws from is touched.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from models.gift.array import Bucket, GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.fit import COMPARED_STEPS, Training, batch_sizes, parties, take_steps
from models.gift.fits import found_to_pay, pays
from models.gift.tensors import RoleTensors, on_device
from models.gift.trainer import GiftConfig
from models.trainer import Decision, Run

_TOLERANCE = 0.1  # of a step's time: what less is gained by twice as many trials is not worth their memory
_SHARE = 0.8  # of the device's free memory that they may take
_ROUNDS = 2  # after one to warm up; the fastest counts

_log = logging.getLogger("models.gift")


@dataclass(frozen=True)
class SlotCost:
    """What so many trials at once cost.

    `step_s` are seconds of one step of one trial: those of a step of all of them over their number. `memory_bytes`
    is what they hold on the device at their peak, beside the data; None on the CPU. `as_array`: that was the faster
    way to take them.
    """

    slots: int
    step_s: float
    memory_bytes: int | None
    as_array: bool = False


class Meter:
    """The clock and the memory of a device. `free_bytes` is what was free at first; None on the CPU. `compares`:
    whether arrays and trainings that are each alone are both timed, which on the CPU is known (`fits.pays`)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.compares = device, device.type != "cpu"
        self.free_bytes, self._held = None, 0
        if device.type == "cuda":
            self._collect()
            self._held = torch.cuda.memory_reserved(device)
            self.free_bytes = torch.cuda.mem_get_info(device)[0]

    def start(self) -> None:
        """Let go of what is not used, and begin to look for the peak."""
        if self.device.type == "cuda":
            self._collect()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self) -> float:
        """The time when all that was launched has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_bytes(self) -> int | None:
        """The most that torch has held since `start`, graphs' own memory with it, beyond what it held at first."""
        if self.device.type != "cuda":
            return None
        return max(0, torch.cuda.max_memory_reserved(self.device) - self._held)

    def _collect(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def slots(config: GiftConfig, data: GiftDataset, run_device: str, most: int) -> int:
    """See `GiftTrainer.slots`."""
    if most == 1:
        return 1
    costs = measure(config, data, run_device, most)
    chosen = best(costs)
    if chosen > 1 and torch.device(run_device).type != "cpu" and isinstance(bucket_of(config), Bucket):
        found_to_pay(data, run_device, next(cost.as_array for cost in costs if cost.slots == chosen))
    table = ", ".join(_told(cost) for cost in costs)
    told = {"action": "slots", "slots": chosen, "step_us": {c.slots: round(1e6 * c.step_s, 1) for c in costs}}
    _log.info("%d slots on %s; a step of one trial: %s", chosen, run_device, table, extra=told)
    return chosen


def best(costs: Sequence[SlotCost]) -> int:
    """The fewest slots within a tenth of the fastest."""
    fastest = min(cost.step_s for cost in costs)
    return min(cost.slots for cost in costs if cost.step_s <= (1.0 + _TOLERANCE) * fastest)


def measure(
    config: GiftConfig, data: GiftDataset, run_device: str, most: int, meter: Meter | None = None
) -> list[SlotCost]:
    """The cost of 1, 2, 4, ... and `most` trials at once.

    Ends before what would take more than four fifths of the free memory, and after a doubling, from two on,
    that gains less than a tenth.

    Raises:
        torch.OutOfMemoryError: there is no memory for one.
    """
    device = torch.device(run_device)
    rows = on_device(data, "train", device), on_device(data, "valid", device)
    meter = meter or Meter(device)
    few = _first_rows(data, device, COMPARED_STEPS * config.optimizer.batch_size)
    # a training keeps its tasks' targets and the order of all rows of train; here it has but a few of them
    hidden = 4 * (len(config.tasks) + 1) * (len(rows[0].targets) - len(on_device(few, "train", device).targets))
    costs: list[SlotCost] = []
    trainings: list[Training] = []
    n = 1
    while True:
        meter.start()
        try:
            trainings += [_training(config, few, run_device, seed) for seed in range(len(trainings), n)]
            step_s, as_array = min(_timed(trainings, few, meter))
        except torch.OutOfMemoryError:
            if not costs:
                raise
            return costs
        peak = meter.peak_bytes()
        peak = None if peak is None else peak + n * hidden
        if costs and not _fits_in(peak, meter):
            return costs
        # from one alone to an array of two there may be no gain, and yet one from two to four
        gains = len(costs) < 2 or step_s <= (1.0 - _TOLERANCE) * costs[-1].step_s
        costs.append(SlotCost(n, step_s, peak, as_array))
        more = min(2 * n, most)
        if n == most or not gains or not _fits_in(None if peak is None else peak * more // n, meter):
            return costs
        n = more


def _timed(trainings: Sequence[Training], data: GiftDataset, meter: Meter) -> Iterator[tuple[float, bool]]:
    """Seconds of a step over the number of trainings, for each way to take them; whether that is an array."""
    config, n = trainings[0].config, len(trainings)
    n_steps = len(batch_sizes(len(trainings[0].targets), config.optimizer.batch_size)) * n
    fusable = isinstance(bucket_of(config), Bucket) and n > 1
    fused = fusable and (meter.compares or pays([config] * n, data, str(trainings[0].device)))
    if fused:
        yield _fastest(_as_array(trainings, data), meter) / n_steps, True
    if not fused or meter.compares:
        yield _fastest(partial(_alone, trainings), meter) / n_steps, False


def _as_array(trainings: Sequence[Training], data: GiftDataset) -> Callable[[], object]:
    config, device = trainings[0].config, str(trainings[0].device)
    array = GiftArray(bucket_of(config), room_for([config], data), data, len(trainings), device)
    return partial(array.train_epoch, [array.join(training) for training in trainings])


def _fastest(steps: Callable[[], object], meter: Meter) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        start = meter.seconds()
        steps()
        times.append(meter.seconds() - start)
    return min(times[1:])


def _alone(trainings: Sequence[Training]) -> None:
    """As `models.gift.fit.measured_epochs` takes their steps."""
    for party in parties(trainings):
        for failure in take_steps(party):
            if failure is not None:
                raise failure


def _training(config: GiftConfig, data: GiftDataset, device: str, seed: int) -> Training:
    """One that is never validated: whatever it decides on, and its folder, are not asked for."""
    binary = next(task.name for task in data.tasks if task.kind == "binary" and task.name in config.tasks)
    decision = Decision(task=binary, target_precision=0.5)
    return Training(config, data, Run(Path("never written"), seed, device, 1, decision))


def _first_rows(data: GiftDataset, device: torch.device, n: int) -> GiftDataset:
    """The same data, with n rows of train on the device."""
    few, train = replace(data), on_device(data, "train", device)
    first = RoleTensors(*(getattr(train, field.name)[:n] for field in fields(RoleTensors)))
    vars(few)["_on_device"] = {("train", device): first, ("valid", device): on_device(data, "valid", device)}
    return few


def _fits_in(n_bytes: int | None, meter: Meter) -> bool:
    return n_bytes is None or meter.free_bytes is None or n_bytes <= _SHARE * meter.free_bytes


def _told(cost: SlotCost) -> str:
    memory = "" if cost.memory_bytes is None else f" and {cost.memory_bytes / 2**20:.0f} MiB"
    way = " as an array" if cost.as_array else ""
    return f"{cost.slots}{way}: {1e6 * cost.step_s:.1f} us{memory}"
