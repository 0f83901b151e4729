"""Fits of the gift trainer as iterators, and rounds of several of them.

What can train as one does, where that pays: configurations of one bucket on the same data and device, as a
`GiftArray`. Its fits alone hold an array: newcomers join it for as long as they fit in, a new one takes its place
when they do not, and with the last fit that trained in it it is gone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from models import checkpoint as checkpoints
from models.gift.array import Bucket, GiftArray, bucket_of, room_for
from models.gift.data import GiftDataset
from models.gift.fit import Measured, Training, measured_epochs
from models.gift.trainer import GiftConfig
from models.trainer import Measurement, Run

# On the CPU an array saves the cost of starting operations, up to half of a step, and loses the cache. It pays
# while the values between a slot's layers, one for each row and unit, stay within an L2 cache: with two to eight
# slots and one thread it is 1.0 to 1.9 times as fast at 57,000 values, 0.9 to 1.2 at 90,000, 0.5 at 900,000.
CPU_VALUES = 65_536
_WRITERS = 8  # checkpoints that are flushed at the same time

_log = logging.getLogger("models.gift")


class Fit:
    """See `GiftTrainer.fit`. Nothing is made before the first measurement is asked for.

    It has ended with its last measurement, with an exception, or when it is closed, and then holds nothing.
    """

    def __init__(self, config: GiftConfig, data: GiftDataset, run: Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.training: Training | None = None
        self.array: GiftArray | None = None  # the one it last trained in
        self.most = sys.maxsize  # slots of an array that there was memory for
        self.has_ended = False

    def __iter__(self) -> Iterator[Measurement]:
        return self

    def __next__(self) -> Measurement:
        (found,) = advance([self])
        if found is None:
            raise StopIteration
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Stop. Every epoch that gave a measurement has its checkpoint."""
        self.has_ended, self.training, self.array = True, None, None

    def resume(self) -> Measurement | None:
        """Make the training; the measurement of the checkpoint it goes on from, None where it is new."""
        training = Training(self.config, self.data, self.run)
        found = next(checkpoints.resumed(self.run, training.restore), None)
        self.training = training
        return found

    @property
    def team(self) -> tuple[Any, ...]:
        """What fits that can train as one have in common."""
        return id(self.data), self.run.device, bucket_of(self.config)


def advance(fits: Sequence[Fit]) -> list[Measurement | Exception | None]:
    """See `GiftTrainer.advance`. What is no `Exception` (a stop) ends all of them, at their checkpoints."""
    try:
        found = {fit: _tried(_begun, fit) for fit in fits}
        waiting = [fit for fit in fits if found[fit] is None and not fit.has_ended]
        found |= dict(zip(waiting, _epochs(waiting), strict=True))
    except BaseException:
        for fit in fits:
            fit.close()
        raise
    for fit, given in found.items():
        if isinstance(given, Exception) or (fit.training is not None and fit.training.finished):
            fit.close()
    return [found[fit] for fit in fits]


def _begun(fit: Fit) -> Measurement | None:
    """What a fit gives before it trains: once, the measurement of its checkpoint."""
    return None if fit.has_ended or fit.training is not None else fit.resume()


def _epochs(fits: Sequence[Fit]) -> list[Measurement | Exception]:
    """An epoch of each of several open fits, durable."""
    teams: dict[Any, list[Fit]] = {}
    for fit in fits:
        teams.setdefault(fit.team, []).append(fit)
    measured: dict[Fit, Measured | Exception] = {}
    for team in teams.values():
        if pays([fit.config for fit in team], team[0].data, team[0].run.device):
            measured |= _as_one(team)
    alone = [fit for fit in fits if fit not in measured]
    for fit in alone:
        fit.array = None
    measured |= dict(zip(alone, measured_epochs([_open(fit) for fit in alone]), strict=True))
    # a flush waits for the disk and not for the interpreter, so that those of a round overlap
    if len(fits) < 2:
        return [_tried(_saved, fit, measured[fit]) for fit in fits]
    with ThreadPoolExecutor(min(len(fits), _WRITERS), thread_name_prefix="checkpoints") as writers:
        return list(writers.map(lambda fit: _tried(_saved, fit, measured[fit]), fits))


def pays(configs: Sequence[GiftConfig], data: GiftDataset, device: str) -> bool:
    """Whether fits of these configurations are better off as one than one after the other, on a GPU than each on a
    stream of its own. There it is as it was measured (`found_to_pay`), and until then they are taken as one."""
    if len(configs) < 2 or isinstance(bucket_of(configs[0]), str):
        return False
    if torch.device(device).type != "cpu":
        return vars(data).get("_arrays_pay", {}).get(device, True)
    room = room_for(configs, data)
    rows = min(configs[0].optimizer.batch_size, len(data.part("train").labels))
    return rows * (sum(room.widths) + len(room.tasks) * room.head_width) <= CPU_VALUES


def found_to_pay(data: GiftDataset, device: str, arrays_pay: bool) -> None:
    """Note for all later rounds on a GPU what has been measured there; it is kept as long as the data."""
    vars(data).setdefault("_arrays_pay", {})[device] = arrays_pay


def _as_one(team: Sequence[Fit]) -> dict[Fit, Measured | Exception]:
    """Of those that an array had memory for; an error of the array is everyone's."""
    found: dict[Fit, Measured | Exception] = {}
    while (waiting := [fit for fit in team if fit not in found]) and _n_slots(team) > 1:
        part, array = waiting[: _n_slots(team)], None
        try:
            array = _array_for(team)
            slots = [array.join(_open(fit)) for fit in part]
            measured = array.measured_epoch(slots)
        except torch.OutOfMemoryError:  # it has trained nobody yet; what it holds has to go before the next one
            n_slots, array = _n_slots(team), None
            for fit in team:
                fit.array, fit.most = None, n_slots // 2
            _log.warning("no memory for %d slots, %d at a time", n_slots, n_slots // 2, extra={"action": "slots"})
        except Exception as error:
            return found | dict.fromkeys(waiting, error)
        else:
            found |= {fit: measured[slot] for fit, slot in zip(part, slots, strict=True)}
        finally:
            if array is not None:
                array.clear()
    return found


def _n_slots(team: Sequence[Fit]) -> int:
    return min(len(team), *(fit.most for fit in team))


def _array_for(team: Sequence[Fit]) -> GiftArray:
    """The array that some of them trained in, if all fit in and most of it is used; else a new one for all."""
    found = next((fit.array for fit in team if fit.array is not None and _holds(fit.array, team)), None)
    if found is None:
        for fit in team:
            fit.array = None  # so that its memory is free for the next one
        bucket, first = bucket_of(team[0].config), team[0]
        assert isinstance(bucket, Bucket)
        room = room_for([fit.config for fit in team], first.data)
        found = GiftArray(bucket, room, first.data, _n_slots(team), first.run.device)
    for fit in team:
        fit.array = found
    return found


def _holds(array: GiftArray, team: Sequence[Fit]) -> bool:
    fit_in = all(array.room.holds(fit.config.network, fit.config.tasks) for fit in team)
    return fit_in and array.n_slots // 2 < _n_slots(team) <= array.n_slots


def _open(fit: Fit) -> Training:
    if fit.training is None:
        raise ValueError("expected a fit that has begun, got one that has not or has ended")
    return fit.training


def _saved(fit: Fit, measured: Measured | Exception) -> Measurement | Exception:
    return measured if isinstance(measured, Exception) else _open(fit).save_epoch(measured)


def _tried(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives, or the exception that it raised: it is one fit's, and the others go on."""
    try:
        return call(*args)
    except Exception as error:
        return error
