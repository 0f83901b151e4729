"""The gift trainer with a watch: which part of a study's time goes where.

`benchmarks/gpu.py` names `benchmarks.timed:TimedTrainer` as a study's trainer, so that the commands and processes
it measures are those of every study. Each process leaves what it saw in the folder that `TUNER_WATCH` names.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.gift.trainer import GiftTrainer

FOLDER, BEGAN = "TUNER_WATCH", "TUNER_WATCH_BEGAN"


class Watch:
    """Wall seconds of the main thread by part. Every moment belongs to one part, the innermost that is open, so
    that the parts add up to the whole.

    Args:
        began: when the first part, `start`, began: `time.monotonic()`, which the processes of a machine share.
        whole: parts inside which nothing belongs to another.
    """

    def __init__(self, began: float, whole: frozenset[str] = frozenset()) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open, self._since, self._whole = ["start"], began, whole

    def turn(self, outermost: str | None = None) -> None:
        """Close the accounts up to now; from now on what is in no other part is `outermost`."""
        now = time.monotonic()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
        self._open[0] = outermost or self._open[0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens in the block belongs to `name`. Other threads work while the main one waits for them or
        does something else: their time is nobody's."""
        if threading.current_thread() is not threading.main_thread() or self._open[-1] in self._whole:
            yield
            return
        self.turn()
        self._open.append(name)
        try:
            yield
        finally:
            self.turn()
            self._open.pop()

    def over(self, owner: Any, function: str, name: str) -> None:
        """Count all calls of a function of a module or class as `name`."""
        inner: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, function, watched)


class TimedTrainer(GiftTrainer):
    """The gift trainer; one a process, which watches it to its end."""

    def __init__(self) -> None:
        self.watch = Watch(float(os.environ[BEGAN]), frozenset({"number of slots"}))
        self._role = "coordinator"
        atexit.register(self._write)

    def load(self, *args: Any) -> Any:
        with self.watch.part("load"):
            data = super().load(*args)
        self.watch.turn("search and database")
        return data

    def slots(self, *args: Any) -> int:
        self._look_inside()
        with self.watch.part("number of slots"):
            return super().slots(*args)

    def advance(self, fits: Sequence[Any]) -> list[Any]:
        self._look_inside()
        with self.watch.part("rest of the trainer"):
            return super().advance(fits)

    def _look_inside(self) -> None:
        """Watch what a round consists of, from the first use on."""
        if self._role == "worker":
            return
        self._role = "worker"
        with self.watch.part("start"):  # importing torch takes seconds
            from models.gift import fits, graphs
            from models.gift.array import GiftArray
            from models.gift.fit import Training
            from models.gift.measures import EpochSums

        for owner, function, name in (
            (fits, "_epochs", "checkpoints"),  # what is left of a round when the following is taken out
            (fits, "_as_one", "rest of the trainer"),
            (fits, "measured_epochs", "train"),
            (GiftArray, "train_epoch", "train"),
            (EpochSums, "metrics", "train"),  # waits for the steps that were launched
            (graphs.CudaStream, "capture", "compile and capture"),
            (Training, "measure_epoch", "metrics"),
        ):
            self.watch.over(owner, function, name)

    def _write(self) -> None:
        self.watch.turn()
        found = {"role": self._role, "ended": time.monotonic(), "seconds": self.watch.seconds}
        (Path(os.environ[FOLDER]) / f"{os.getpid()}.json").write_text(json.dumps(found))


PARTS = (
    "start", "data", "load", "number of slots", "compile and capture", "train", "metrics", "checkpoints",
    "rest of the trainer", "search and database", "end",
)  # fmt: skip


def parts_of(folder: Path, ended: float) -> Mapping[str, float]:
    """Seconds of each of PARTS in a study of one coordinator and one worker, whose commands ended at `ended`.

    `data` is what the coordinator had to prepare; `start` everything else up to the worker's loading of it. Raises
    ValueError where the folder holds something else.
    """
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    roles = sorted(process["role"] for process in found)
    if roles != ["coordinator", "worker"]:
        raise ValueError(f"{folder}: expected the times of a coordinator and a worker, got {roles}")
    coordinator, worker = sorted(found, key=lambda process: process["role"])
    seconds = defaultdict(float, worker["seconds"])
    seconds["data"] = coordinator["seconds"].get("load", 0.0)
    seconds["start"] -= seconds["data"]
    seconds["end"] = ended - worker["ended"]
    if unknown := set(seconds) - set(PARTS):
        raise ValueError(f"{folder}: expected times of {', '.join(PARTS)}, got {', '.join(sorted(unknown))} too")
    return {name: seconds[name] for name in PARTS}
