"""A long soak of the service, for release days: `python -m tests.soak`.

Workers and whole machines are killed at random moments, machines are stopped in order, and the database goes away
for a while or is killed, while trials run without a break. In the end the counts have to be exact; a report says
what happened. Exits 1 where something was lost, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from storage.database import DatabaseUnavailable
from tests.e2e.postgresql import PostgresqlServer
from tests.e2e.service import Machine, Service

STUDY = "soak"
# Trials are added in such portions, as soon as fewer than half of one are left.
PORTION = 100
# How often what happens, as weights. A machine is killed with all its workers, and started again at once.
EVENTS = {"worker killed": 90, "machine killed": 6, "machine stopped": 4}
LONGEST_OUTAGE_S = 20.0


class Soak:
    def __init__(self, service: Service, given: argparse.Namespace) -> None:
        self._service = service
        self._chance = random.Random(given.seed)
        self._pause_s = given.minutes * 60.0 / given.kills
        self._outages = given.outages
        self._given = given
        self._machines = [service.machine(f"machine-{i}") for i in range(given.machines)]
        self._total = 0
        self.happened: Counter[str] = Counter()
        self.away_s = 0.0

    def run(self) -> None:
        self._feed()
        for machine in self._machines:
            self._start(machine)
        started = time.monotonic()
        service = self._service
        next_outage = self._outage_at(started)
        while self._n_kills < self._given.kills:
            until = time.monotonic() + self._chance.uniform(0.0, 2.0 * self._pause_s)
            while time.monotonic() < until:
                self._look()
                time.sleep(0.1)
            if time.monotonic() > next_outage:
                self._outage()
                next_outage = self._outage_at(time.monotonic())
            self._strike()
        service.wait_for_end(STUDY, self._total)
        for machine in self._machines:
            service.wait(lambda machine=machine: "serving" in machine.last_said, "that it serves")
            machine.stop()
        service.check_whole(STUDY, self._total, trained_once=False)
        self._report(time.monotonic() - started)

    @property
    def _n_kills(self) -> int:
        return self.happened["worker killed"] + self.happened["machine killed"] * (self._given.workers + 1)

    def _start(self, machine: Machine) -> None:
        machine.start(self._given.workers, "--slots", str(self._given.slots), TUNER_UPLOAD_EVERY="1")

    def _feed(self) -> None:
        self._total += PORTION
        self._service.submit(
            STUDY, self._total, config={"x": 0.5, "y": 0.5, "n_steps": 12, "step_s": 0.15},
            pruner={"name": "median", "min_completed": 3, "warmup_steps": 6},
        )  # fmt: skip

    def _look(self) -> None:
        assert all(machine.running for machine in self._machines), self._service.told()[-20_000:]
        if self._total - self._service.n_ended(STUDY) < PORTION / 2:
            self._feed()

    def _strike(self) -> None:
        names = list(EVENTS)
        event = self._chance.choices(names, [EVENTS[name] for name in names])[0]
        machine = self._chance.choice(self._machines)
        if event == "worker killed":
            if not self._kill_worker(machine):
                return
        elif event == "machine killed":
            machine.kill()
            self._start(machine)
        else:
            # Before it serves anything a signal simply ends it.
            self._service.wait(lambda: "serving" in machine.last_said, "that it serves")
            machine.stop()
            self._start(machine)
        self.happened[event] += 1

    def _kill_worker(self, machine: Machine) -> bool:
        """Kill one of its workers, but none whose death would make an innocent trial look like a poison."""
        service = self._service
        crashes = service.most_barren_crashes(STUDY)
        spared = {worker.identity.pid for worker in service.store.workers() if crashes.get(worker.id, 0) >= 1}
        victims = [process for process in machine.workers() if process.pid not in spared]
        if not victims:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            self._chance.choice(victims).kill()
        return True

    def _outage_at(self, now: float) -> float:
        mean_s = self._given.minutes * 60.0 / max(1, self._outages)
        return now + self._chance.uniform(0.5 * mean_s, 1.5 * mean_s) if self._outages else float("inf")

    def _outage(self) -> None:
        """The database goes away, in order or not, and comes back."""
        server = self._service.server
        killed = self._chance.random() < 0.5
        server.kill() if killed else server.stop()
        went_away = time.monotonic()
        away_s = self._chance.uniform(0.0, LONGEST_OUTAGE_S)
        while time.monotonic() - went_away < away_s:
            if self._chance.random() < 0.1:  # a worker or two die meanwhile
                victims = self._chance.choice(self._machines).workers()
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    self._chance.choice(victims).kill()
                    self.happened["worker killed"] += 1
            time.sleep(1.0)
        server.start()
        self.away_s += time.monotonic() - went_away
        self.happened["database killed" if killed else "database stopped"] += 1
        self._settled()

    def _settled(self) -> None:
        """Until something was measured again."""
        service = self._service
        before = reached(lambda: service.count(STUDY))
        service.wait(lambda: reached(lambda: service.count(STUDY)) > before, "a measurement after the outage")

    def _report(self, took_s: float) -> None:
        service = self._service
        outcomes = Counter(attempt.outcome for attempt in service.attempts(STUDY))
        stored = service.count(STUDY)
        states = Counter("failed" if run.failure else "ended" for run in service.runs(STUDY))
        lines = {
            "time": f"{took_s / 60:.1f} min, {self._given.machines} machines of {self._given.workers} workers "
            f"with {self._given.slots} slots",
            "happened": told(self.happened),
            "database away": f"{self.away_s:.0f} s",
            "trials": f"{self._total} of {self._total}, {told(states)}",
            "attempts": told(outcomes),
            "measurements": f"{stored}, each once, without a gap; weights as of uninterrupted runs",
        }
        for name, value in lines.items():
            print(f"{name:>14}  {value}")


def reached(count: Callable[[], int]) -> int:
    """The count, once the database answers."""
    while True:
        try:
            return count()
        except DatabaseUnavailable:
            time.sleep(0.2)


def told(counts: Counter[str] | Counter[str | None]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="processes to kill (1000)")
    parser.add_argument("--minutes", type=float, default=60.0, help="over about this long (60)")
    parser.add_argument("--outages", type=int, default=60, help="of the database, about (60)")
    parser.add_argument("--machines", type=int, default=2, help="supervisors (2)")
    parser.add_argument("--workers", type=int, default=3, help="worker processes of each (3)")
    parser.add_argument("--slots", type=int, default=1, help="trials that each worker trains at once (1)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when (0)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tuner-soak-"))
    (folder / "store").mkdir()
    server = PostgresqlServer()
    server.start()
    service = Service(folder, server, f"file://{folder}/store")
    try:
        Soak(service, given).run()
    except AssertionError as error:
        print(f"FAILED: {error}\nleft for a look: {folder}", file=sys.stderr)
        return 1
    finally:
        service.close()
        server.close()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
