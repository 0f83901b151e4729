"""The service under test: its database, machines that serve it, and what must be true of a study in the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
import yaml

from storage.artifacts import open_artifacts
from storage.database import Database
from storage.runs import AttemptRow, RunRow, Store
from storage.tables import measurements
from tests.e2e.postgresql import PostgresqlServer
from tests.hosts import Host
from tests.searches import METRIC
from tests.toy import ToyConfig, stored_weights, uninterrupted_weights
from tuner.study import Study
from tuner.uploads import Uploads

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300.0
# Everything of the service that a person would wait for, in seconds that a test can wait.
SHORT_TIMES = {"TUNER_RENEW_EVERY": "1", "TUNER_LEASE_GRACE": "600", "TUNER_UPLOAD_EVERY": "0.5"}
PROMPT = "$ python "


class Machine:
    """`tuner worker` in a folder of its own, as often as it is started.

    Args:
        host: where it runs; None: on this one.
    """

    def __init__(self, service: Service, name: str, host: Host | None = None) -> None:
        self.folder = service.folder / name
        self.folder.mkdir(exist_ok=True)
        self.runs = self.folder / "runs"
        self.seen_runs = self.runs  # by this process, where the host has a disk of its own there
        self.host = host
        self._service = service
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, n_workers: int = 1, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "tuner", "worker", "--devices", "cpu", "--workers", str(n_workers)]
        command += ["--runs", str(self.runs), *flags]
        if self._service.artifacts is not None:
            command += ["--artifacts", self._service.artifacts]
        self._process = self._popen(command, {**SHORT_TIMES, **environment})

    def start_script(self, script: str, *arguments: str) -> None:
        """Run Python instead of the supervisor."""
        self._process = self._popen([sys.executable, "-c", script, *arguments], {})

    def tuner(self, *arguments: str, code: int = 0) -> str:
        """Run another command here to its end; returns what it printed."""
        process = self._popen([sys.executable, "-m", "tuner", *arguments, "--runs", str(self.runs)], {})
        with self._ends_with_us(process):
            process.wait(PATIENCE_S)
        assert process.returncode == code, self.said
        return self.last_said

    def _popen(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        url = self._service.server.local_url if self.host is None else self._service.server.url
        settings = {"TUNER_STORAGE": url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        shown = command[command.index(sys.executable) + 1 :]
        if self.host is not None:
            command = self.host.command(command, self.folder, settings)
        with (self.folder / "said.txt").open("a") as output:
            output.write(f"{PROMPT}{' '.join(shown)}\n")
            output.flush()
            return subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **settings}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def _ends_with_us(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        try:
            yield
        finally:
            if process.poll() is None:
                kill(_tree(process.pid))
                process.wait()

    @property
    def said(self) -> str:
        """What all its commands printed, each under its name."""
        path = self.folder / "said.txt"
        return path.read_text() if path.exists() else ""

    @property
    def last_said(self) -> str:
        """What its newest command printed."""
        return self.said.rpartition(PROMPT)[2].partition("\n")[2]

    @property
    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.seen_runs.glob("worker-logs/*.log")))

    def logged(self, action: str) -> list[str]:
        """The lines of its workers' logs with this action."""
        return [line for line in self.logs.splitlines() if re.search(rf"\baction={action}\b", line)]

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, from the first moment on."""
        assert self._process is not None
        found = []
        for process in _tree(self._process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "tuner.worker_process" in process.cmdline():
                    found.append(process)
        return found

    def send(self, number: signal.Signals) -> None:
        """A signal to its supervisor."""
        assert self._process is not None
        tree = _tree(self._process.pid)
        # On a host of its own, the process that went in there waits for the one that is meant.
        (tree[0] if self.host is None else tree[1]).send_signal(number)

    def finish(self, code: int = 0) -> None:
        """Wait until its supervisor has ended with this code."""
        assert self._process is not None
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end\n{self.said}\n{self.logs}") from None
        assert self._process.returncode == code, self.said + self.logs
        self._process = None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it in order."""
        self.send(number)
        self.finish()

    def kill(self) -> None:
        """kill -9 of its supervisor and all its workers at once."""
        if self._process is not None:
            kill(_tree(self._process.pid))
            self._process.wait()
            self._process = None


class Service:
    """One database and one artifact store that machines share.

    Args:
        artifacts: URL of the artifact store; None: checkpoints stay on the machine that wrote them.
    """

    def __init__(self, folder: Path, server: PostgresqlServer, artifacts: str | None = None) -> None:
        self.folder = folder
        self.server = server
        self.artifacts = artifacts
        self.seen_artifacts = artifacts  # by this process, where a host has a disk of its own there
        self.machines: list[Machine] = []
        self._database = Database(server.local_url)
        self.store = Store(self._database)

    def close(self) -> None:
        for machine in self.machines:
            machine.kill()
        self._database.close()

    def machine(self, name: str, host: Host | None = None) -> Machine:
        machine = Machine(self, name, host)
        self.machines.append(machine)
        return machine

    def submit(self, name: str, n_trials: int, **changes: Any) -> None:
        """Put a study of the toy into the queue; an existing one gets a higher total."""
        spec = {
            "study": name,
            "trainer": "tests.e2e.trainer:SafeToy",
            "data": {},
            "decision": {"task": "toy", "target_precision": 0.5},
            "objective": {"metric": METRIC},
            "n_trials": n_trials,
            "config": {"x": 0.5, "y": 0.5, "n_steps": 6, "step_s": 0.02},
            "arms": {"fast": {}, "slow": {"speed": 0.2}},
            "space": {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}},
            "sampler": {"name": "random"},
            "pruner": {"name": "none"},
            **changes,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        said = Machine(self, "operator").tuner("submit", "--study", str(self.folder / f"{name}.yaml"))
        assert "queued" in said

    # --- waiting ---------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """Until it is true; returns that. Fails when a machine ended meanwhile, or patience did."""
        deadline = time.monotonic() + patience_s
        running = [machine for machine in self.machines if machine.running]
        while not (found := until()):
            assert all(machine.running for machine in running), f"ended before {what}\n{self.told()}"
            assert time.monotonic() < deadline, f"{what}: not within {patience_s:.0f} s\n{self.told()}"
            time.sleep(0.05)
        return found

    def told(self) -> str:
        return "\n".join(f"--- {machine.folder.name}\n{machine.said}{machine.logs}" for machine in self.machines)

    def study_id(self, name: str) -> int:
        row = self.store.find_study(name)
        assert row is not None
        return row.id

    def count(self, name: str) -> int:
        """How many measurements are stored."""
        return self.store.count_measurements(self.study_id(name))

    def runs(self, name: str) -> list[RunRow]:
        return self.store.runs(self.study_id(name))

    def attempts(self, name: str) -> list[AttemptRow]:
        return self.store.attempts(self.study_id(name))

    def n_ended(self, name: str) -> int:
        return sum(run.ended_at is not None for run in self.runs(name))

    def held(self, name: str) -> dict[int, list[AttemptRow]]:
        """The unreleased attempts, by their worker."""
        found: dict[int, list[AttemptRow]] = {}
        for attempt in self.attempts(name):
            if attempt.released_at is None:
                found.setdefault(attempt.worker_id, []).append(attempt)
        return found

    def most_barren_crashes(self, name: str) -> dict[int, int]:
        """Of each worker with something in hand: how often a trial of it has crashed in a row without coming on."""
        count, study_id = self.store.barren_crashes, self.study_id(name)
        return {worker: max(count(study_id, a.number) for a in held) for worker, held in self.held(name).items()}

    def wait_for_count(self, name: str, n_measurements: int) -> None:
        self.wait(lambda: self.count(name) >= n_measurements, f"{n_measurements} measurements")

    def wait_for_end(self, name: str, n_trials: int) -> None:
        self.wait(lambda: self.n_ended(name) >= n_trials, f"{n_trials} ended trials")

    # --- what must be true -----------------------------------------------------------------------------------

    def checkpoints(self, name: str, number: int) -> list[tuple[int, int, Path]]:
        """Every checkpoint of a run on any machine: attempt, step, where."""
        found = []
        for machine in self.machines:
            for path in machine.seen_runs.glob(f"{name}/trials/{number:05d}/attempt-*/step-*"):
                found.append((int(path.parent.name[8:]), int(path.name[5:]), path))
        return sorted(found)

    def check_whole(
        self, name: str, n_trials: int, failed: Sequence[int] = (), first_here: int = 0, trained_once: bool = True
    ) -> None:
        """Exactly so many trials, all ended; every step of each once, without a gap; the weights those of a run
        that nothing interrupted.

        Args:
            failed: the numbers of the trials that had to fail.
            first_here: the first trial whose checkpoints are on one of the machines.
            trained_once: no step was trained by two attempts.
        """
        study = Study.open(self._database, name)
        trials = study.search.trials()
        assert [trial.number for trial in trials] == list(range(n_trials))
        assert all(trial.ended for trial in trials), Counter(trial.state for trial in trials)
        assert [trial.number for trial in trials if trial.state == "failed"] == list(failed), self.told()
        runs = self.runs(name)
        assert [run.number for run in runs] == list(range(n_trials))
        assert all(run.ended_at for run in runs)
        assert all(attempt.outcome for attempt in self.attempts(name))
        self._check_rows(study, n_trials)
        rows = self.store.measurements(study.id, range(n_trials))
        for trial, run in zip(trials, runs, strict=True):
            steps = [row.step for row in rows[run.number]]
            config = ToyConfig.model_validate(run.config)
            assert steps == list(range(len(steps))), (run, steps)
            if trial.state == "complete":
                assert len(steps) == config.n_steps, (run, steps)
            if trial.state != "failed" and run.number >= first_here:
                whole = uninterrupted_weights(config, study.spec.seed, len(steps))
                self._check_weights(name, run, len(steps) - 1, whole)
        if trained_once:
            for number in range(n_trials):
                by_attempt = {(attempt, step) for attempt, step, _ in self.checkpoints(name, number)}
                trained = Counter(step for _, step in by_attempt)
                assert set(trained.values()) <= {1}, (number, trained, self.told())

    def _check_rows(self, study: Study, n_trials: int) -> None:
        """No step is stored twice, and both tables hold the same values."""
        query = sa.select(measurements.c.number, measurements.c.step).where(measurements.c.study_id == study.id)
        with self._database.transaction() as connection:
            stored = [tuple(row) for row in connection.execute(query)]
        assert len(stored) == len(set(stored))
        rows = self.store.measurements(study.id, range(n_trials))
        for trial in study.search.study.trials:
            ours = [(row.step, row.metrics[METRIC]) for row in rows[trial.number]]
            assert sorted(trial.intermediate_values.items()) == ours, trial.number

    def _check_weights(self, name: str, run: RunRow, last_step: int, whole: str) -> None:
        """The named checkpoint has these weights, on the machine that wrote it and in the artifact store."""
        assert run.checkpoint_step == last_step, run
        found = {
            stored_weights(path)
            for attempt, step, path in self.checkpoints(name, run.number)
            if (attempt, step) == (run.checkpoint_attempt, last_step)
        }
        assert found == {whole}, run
        if self.seen_artifacts is not None:
            assert run.uploaded_attempt is not None, run
            assert run.uploaded_step == last_step, run
            fresh = self.folder / "fetched" / name / f"{run.number:05d}"
            uploads = Uploads(open_artifacts(self.seen_artifacts), name)
            restored = uploads.restore(run.number, fresh, (run.uploaded_attempt, last_step))
            assert restored is not None, run
            assert restored[1] == last_step, run
            assert stored_weights(fresh / f"attempt-{restored[0]}" / f"step-{last_step:05d}") == whole


def kill(processes: Sequence[psutil.Process]) -> None:
    """kill -9 of all of them at once: none sees another die."""
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, the oldest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []
