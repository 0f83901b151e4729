"""The toy, which writes down every step that it has trained: number, attempt, step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from models.trainer import DiskError, Measurement, Run
from tests.toy import ToyConfig, ToyDataset, ToyTrainer


class LoggedToy(ToyTrainer):
    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        resumed = any(run.directory.glob("attempt-*/step-*"))
        for measurement in super().fit(config, data, run):
            if not resumed:
                # Its checkpoint is durable: whatever dies from here on, this step must not be trained again.
                with (run.directory / "trained.txt").open("a") as file:
                    file.write(f"{int(run.directory.name)} {run.attempt} {measurement.step}\n")
            resumed = False
            yield measurement


def trained(trials: Path) -> list[tuple[int, int, int]]:
    """Every trained step below a study's folder of trials, in order, as (number, attempt, step)."""
    lines = [line for path in sorted(trials.glob("*/trained.txt")) for line in path.read_text().splitlines()]
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


class SafeToy(ToyTrainer):
    """The toy on a disk that may refuse, told as every trainer has to tell it."""

    def fit(self, config: ToyConfig, data: ToyDataset, run: Run) -> Iterator[Measurement]:
        try:
            yield from super().fit(config, data, run)
        except OSError as error:
            raise DiskError(
                error.errno, f"{run.directory}: cannot write ({error.strerror}); free space, run again"
            ) from error
