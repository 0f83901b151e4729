"""The worker processes of one supervisor: started one a device, replaced when they die, stopped together."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
from models.trainer import InputError
from storage.database import DatabaseUnavailable
from tuner.worker import WorkerOptions, arguments
from tuner.worker_process import INTERRUPTED_EXIT, REFUSED_EXIT

log = logging.getLogger("tuner")

POLL_S = 0.5
# Workers that die this often in a row without anything new anywhere stop a run; those of a service are from then on
# replaced ever more slowly.
MAX_BARREN_DEATHS = 6
LONGEST_PAUSE_S = 60.0
# On the CPU: memory of a step that glibc would give back, the next step would take again page by page. A gift
# training takes 4 to 8 % less time so; its peak is the same.
_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
# What a worker may take to leave after its grace time, before it is killed.
LEAVING_S = 30.0


class RunFailed(Exception):
    """The run stopped before its total was reached; the message says why."""


def choose_devices(devices: str, workers: int | None) -> list[str]:
    """One device a worker process.

    `auto`: every CUDA device, else one CPU worker per core (each gets one thread: two threads that share a busy
    core were ten times slower). With `workers` the devices are dealt in turn to that many processes.
    """
    cuda = models.cuda_devices() if devices != "cpu" else []
    if devices == "auto":
        chosen = cuda or ["cpu"] * len(os.sched_getaffinity(0))
    elif devices == "cpu":
        chosen = ["cpu"] * (workers or len(os.sched_getaffinity(0)))
    else:
        chosen = [name.strip() for name in devices.split(",")]
        for name in chosen:
            if name not in ["cpu", *cuda]:
                there = f"cpu or some of {', '.join(['cpu', *cuda])}" if cuda else "cpu (there is no GPU)"
                raise InputError(f"device: expected auto, {there}, got {name!r}")
    if workers is not None:
        if workers < 1:
            raise InputError(f"--workers: expected at least 1, got {workers}")
        chosen = [chosen[i % len(chosen)] for i in range(workers)]
    return chosen


def device_environment(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What shows a worker process its own device and no other one, and suits it to that."""
    if device == "cpu":
        kept = {name: value for name, value in _KEPT_MEMORY.items() if name not in environment}
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | kept
    index = int(device.partition(":")[2])
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


class Crew:
    """Worker processes of this machine, one for each of `devices`.

    Args:
        worker: what all of them are told; the device is filled in.
        url: of the database; with its password, so it goes through the environment.
        logs: folder of `worker-<slot>.log`.
        say: is told what a person should know.
        on_death: called when a worker died without a word, to put back what it held; is told whether it crashed, or
            left at once when asked twice; returns a number that changes when something has come forward since.
    """

    def __init__(
        self, devices: Sequence[str], worker: WorkerOptions, url: str, logs: Path, say: Callable[[str], None],
        on_death: Callable[[bool], int],
    ) -> None:  # fmt: skip
        self._devices = dict(enumerate(devices))
        self._worker = worker
        self._url = url
        self._logs = logs
        self._say = say
        self._on_death = on_death
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._due: dict[int, float] = {}  # when a slot gets its next process, on the monotonic clock
        self._stop = threading.Event()
        self._interrupts = 0
        self._barren_deaths = 0
        self._n_measured = -1
        self.time_s = {"serve_s": 0.0, "fit_s": 0.0}  # over all workers that ended in order
        self.peak_bytes = 0  # memory of the largest worker that told how it ended; 0: none did
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{logs}: expected a folder to write to, got {error.strerror}; name another"
            ) from error

    @property
    def devices(self) -> list[str]:
        """One a worker."""
        return list(self._devices.values())

    @property
    def pids(self) -> dict[int, int]:
        """The process id of each slot's worker."""
        return {slot: process.pid for slot, process in list(self._processes.items())}  # asked by other threads

    def stop(self) -> None:
        """Stop in order, from another thread."""
        self._stop.set()

    def see_through(self, tick: Callable[[], None] = lambda: None, timeout_s: float | None = None) -> int:
        """Start the workers and wait until all have ended: nothing is left to do, the time is up, a signal.

        Args:
            tick: called about twice a second meanwhile.

        Returns:
            The number of interrupts (SIGINT, SIGTERM): at the first workers stop in order, at the second at once.

        Raises:
            InputError: a worker refused what it was given. RunFailed: a worker gave up, or all keep dying.
        """
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        previous = {number: signal.signal(number, self._interrupt) for number in signals}
        try:
            for slot in self._devices:
                self._start(slot)
            self._watch(tick, timeout_s)
        finally:
            for process in self._processes.values():
                with process:  # waits, and closes its pipes
                    process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._interrupts

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupts += 1

    def _start(self, slot: int) -> None:
        device = self._devices[slot]
        environment = {**os.environ, "TUNER_STORAGE": self._url, **device_environment(device, os.environ)}
        with (self._logs / f"worker-{slot}.log").open("ab") as log_file:
            # Its own session: Ctrl-C reaches the supervisor alone, which then asks the workers to stop.
            self._processes[slot] = subprocess.Popen(
                arguments(replace(self._worker, device=device)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log_file, env=environment, start_new_session=True,
            )  # fmt: skip

    def _watch(self, tick: Callable[[], None], timeout_s: float | None) -> None:
        started = time.monotonic()
        stopping_since: float | None = None
        patience = 1  # interrupts that are asked for in order; after a stop of another kind the first is at once
        fault: InputError | RunFailed | None = None
        while self._processes or (self._due and stopping_since is None):
            for slot, process in self._reap():
                found = self._ended(slot, process, stopping_since is not None or fault is not None)
                fault = fault or found
            now = time.monotonic()
            timed_out = timeout_s is not None and now - started > timeout_s
            if stopping_since is None and (self._interrupts or timed_out or fault or self._stop.is_set()):
                stopping_since = now
                word = "interrupted" if self._interrupts else "time is up" if timed_out else "stopping"
                again = "again" if self._interrupts else "Ctrl-C"
                patience = 1 if self._interrupts else 0
                self._say(f"{word}: workers stop at their next measurement ({again} to stop at once)")
                for process in self._processes.values():
                    process.stdin.close()  # type: ignore[union-attr]
            for slot in [slot for slot, due in self._due.items() if stopping_since is None and now >= due]:
                del self._due[slot]
                self._start(slot)
            late = stopping_since is not None and now - stopping_since > self._worker.stop_grace_s + LEAVING_S
            if self._interrupts > patience or late:
                break
            tick()
            if self._processes or self._due:
                time.sleep(POLL_S)
        if fault is not None:
            raise fault

    def _reap(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        ended = [(slot, process) for slot, process in self._processes.items() if process.poll() is not None]
        for slot, _ in ended:
            del self._processes[slot]
        return ended

    def _ended(self, slot: int, process: subprocess.Popen[bytes], stopping: bool) -> InputError | RunFailed | None:
        """Note how a worker ended; one that died is replaced. Returns what makes it pointless to go on."""
        told = _ending(process)
        self.peak_bytes = max(self.peak_bytes, told.get("peak_bytes", 0) if told else 0)
        if process.returncode == 0 and told:
            self.time_s = {key: self.time_s[key] + told[key] for key in self.time_s}
            return None
        if told and told["reason"]:
            return (InputError if process.returncode == REFUSED_EXIT else RunFailed)(told["reason"])
        n_barren = self._died(slot, process) - MAX_BARREN_DEATHS
        if n_barren >= 0 and not self._worker.stay:
            return RunFailed(f"worker processes keep dying (exit {process.returncode}); see {self._logs}")
        if n_barren >= 0:
            pause_s = min(LONGEST_PAUSE_S, 2.0**n_barren)
            log.error("worker processes keep dying", extra={"action": "pause", "slot": slot, "pause_s": pause_s})
            self._due[slot] = time.monotonic() + pause_s
        elif not stopping:
            self._start(slot)
        return None

    def _died(self, slot: int, process: subprocess.Popen[bytes]) -> int:
        """Note a death without a word; how many in a row left nothing behind."""
        log.warning("worker died", extra={"action": "worker_died", "slot": slot, "exit": process.returncode})
        try:
            n_measured = self._on_death(process.returncode != INTERRUPTED_EXIT)
        except DatabaseUnavailable as error:
            log.warning("its trial is left to the next claim: %s", error, extra={"action": "outage"})
            return 0
        self._barren_deaths = self._barren_deaths + 1 if n_measured == self._n_measured else 1
        self._n_measured = n_measured
        return self._barren_deaths


def _ending(process: subprocess.Popen[bytes]) -> Mapping[str, Any] | None:
    """The last line a worker printed; None when it died without one."""
    with process:  # closes its pipes
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)  # its own children may live on and hold the pipe open
        output = process.stdout.read() or b""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
