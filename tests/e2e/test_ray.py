"""`tuner run --launcher ray` on a real cluster of two nodes, one of which is lost."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from storage.database import Database
from tests.searches import METRIC
from tuner.study import Study

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0


@dataclass
class Node:
    """`ray start --block` and everything below it."""

    process: subprocess.Popen[bytes]

    def tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [*root.children(recursive=True), root]
        return []

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "tuner.worker_process" in process.cmdline():
                    found.append(process)
        return found

    def kill(self) -> None:
        """The machine is gone: nothing of it says good-bye."""
        kill(self.tree())
        self.process.wait()


def kill(processes: Sequence[psutil.Process]) -> None:
    for act in (psutil.Process.suspend, psutil.Process.kill):  # none sees another die
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
    psutil.wait_procs(processes, timeout=20)


class Cluster:
    """Two nodes of one core each on this machine."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets need a short name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        # A token: nobody else on the network may use the cluster of a test.
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": self.address,
        }  # fmt: skip
        self.nodes: list[Node] = []

    def start(self) -> None:
        self._start_node("--head", "--port", self.address.split(":")[1], "--temp-dir", str(self.folder))
        self._wait_for_nodes(1)
        self._start_node("--address", self.address)
        self._wait_for_nodes(2)

    def _start_node(self, *where: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", *where, "--block", "--num-cpus", "1"]
        command += ["--num-gpus", "0", "--object-store-memory", "80000000"]
        command += ["--include-dashboard", "false", "--disable-usage-stats"] if "--head" in where else []
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        with log:
            environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.nodes.append(Node(process))

    def _wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        log = self.folder / f"node-{count - 1}.log"
        while "Ray runtime started" not in log.read_text():
            assert self.nodes[-1].process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        left = [process for node in reversed(self.nodes) for process in node.tree()]
        kill(left)
        for node in self.nodes:
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def write_spec(folder: Path, **changes: object) -> None:
    spec = {
        "study": "toy", "trainer": "tests.toy:ToyTrainer", "data": {}, "n_trials": 6,
        "decision": {"task": "toy", "target_precision": 0.5}, "objective": {"metric": METRIC},
        "config": {"x": 0.5, "y": 0.5, "n_steps": 12, "step_s": 0.1}, "arms": {"fast": {}},
        "space": {"x": {"low": 0.0, "high": 1.0}}, "sampler": {"name": "random"}, "pruner": {"name": "none"},
        **changes,
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def start(cluster: Cluster, folder: Path, url: str, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tuner", "run", "--study", "toy.yaml", "--launcher", "ray"]
    command += ["--runs", str(folder / "runs"), "--renew-every", "0.5", "--lease-grace", "3", *flags]
    return subprocess.Popen(
        command, cwd=folder, env={**cluster.environment, "TUNER_STORAGE": url}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes], code: int, folder: Path) -> str:
    output = process.communicate(timeout=PATIENCE_S)[0].decode()
    logs = "".join(path.read_text() for path in sorted(folder.glob("runs/**/*.log")))
    assert process.returncode == code, output + logs
    return output


@contextlib.contextmanager
def opened(url: str) -> Iterator[Study]:
    database = Database(url)
    try:
        yield Study.open(database, "toy")
    finally:
        database.close()


def wait_for(condition: str, process: subprocess.Popen[bytes], url: str, met) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, condition
        with contextlib.suppress(Exception), opened(url) as study:
            if met(study):
                return
        time.sleep(0.1)


def both_train(study: Study) -> bool:
    """Whether two trials are under way, each with steps to go on from."""
    steps = [run.checkpoint_step for run in study.store.runs(study.id, open_only=True)]
    return len(steps) == 2 and all(step is not None and 1 <= step < 10 for step in steps)


def check_whole(study: Study, n_trials: int, n_steps: int = 12) -> None:
    trials = study.search.trials()
    assert [(trial.number, trial.state) for trial in trials] == [(number, "complete") for number in range(n_trials)]
    for rows in study.store.measurements(study.id, range(n_trials)).values():
        assert [row.step for row in rows] == list(range(n_steps))


def test_a_run_on_two_nodes_outlives_one_of_them(cluster: Cluster, tmp_path: Path, postgresql_url: str) -> None:
    write_spec(tmp_path)
    process = start(cluster, tmp_path, postgresql_url)
    try:
        # One worker a core of the cluster, each on a node of its own, and both are at work.
        wait_for("both train", process, postgresql_url, both_train)
        assert [len(node.workers()) for node in cluster.nodes] == [1, 1]
        (lost,) = [worker.pid for worker in cluster.nodes[1].workers()]
        cluster.nodes[1].kill()
        output = finish(process, 0, tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert "worker 0: on" in output
    assert "worker 1: on" in output
    assert "the others go on" in output
    with opened(postgresql_url) as study:
        check_whole(study, 6)
        owners = {worker.id: worker.identity.pid for worker in study.store.workers(study.id)}
        attempts = study.store.attempts(study.id)
        of_lost = [attempt for attempt in attempts if owners[attempt.worker_id] == lost]
        # What it held was given to the other, which went on at its checkpoint.
        (given_up,) = [attempt for attempt in of_lost if attempt.outcome not in ("complete", "pruned")]
        (resumed,) = [a for a in attempts if a.number == given_up.number and a.attempt == given_up.attempt + 1]
        assert owners[resumed.worker_id] != lost
        rows = study.store.measurements(study.id, [given_up.number])[given_up.number]
        assert {row.attempt for row in rows} == {given_up.attempt, resumed.attempt}
    results = json.loads((tmp_path / "runs" / "toy" / "results.json").read_text())
    assert results["this_run"]["fit_s"] > 0
    assert " MB in the largest worker" in output  # of those that ended in order


def test_an_interrupt_stops_the_workers_in_order(cluster: Cluster, tmp_path: Path, postgresql_url: str) -> None:
    write_spec(tmp_path)
    process = start(cluster, tmp_path, postgresql_url, "--workers", "1")
    try:
        wait_for("it trains", process, postgresql_url, lambda study: study.store.count_measurements(study.id) >= 2)
        process.send_signal(signal.SIGTERM)
        output = finish(process, 130, tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert "interrupted: workers stop at their next measurement" in output
    with opened(postgresql_url) as study:
        assert [trial.state for trial in study.search.trials()] == ["waiting"]
        assert [attempt.outcome for attempt in study.store.attempts(study.id)] == ["stopped"]
    assert not cluster.nodes[0].workers()


def test_a_worker_that_cannot_start_ends_the_run(cluster: Cluster, tmp_path: Path, postgresql_url: str) -> None:
    """A refusal on a node is told where the run was asked for."""
    write_spec(tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "logs").write_text("in the way")
    process = start(cluster, tmp_path, postgresql_url, "--workers", "1")
    try:
        output = finish(process, 2, tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert "expected a folder to write to" in output


FOREIGN = """
import sys
from pathlib import Path
from tuner import ray_launcher
from tuner.crew import RunFailed
from tuner.worker import WorkerOptions

sys.path.insert(0, "here_alone")
from known_here_alone import Supervisor

ray_launcher._Supervisor = Supervisor
worker = WorkerOptions("", "runs", "cache", ("toy",))
crew = ray_launcher.RayCrew(1, worker, "postgresql://h/n", Path("logs"), print)
try:
    crew.see_through()
except RunFailed as error:
    print(error)
"""


def test_a_node_without_the_package_ends_the_run(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "here_alone").mkdir()
    (tmp_path / "here_alone" / "known_here_alone.py").write_text(
        "class Supervisor:\n    def __init__(self, *_): ...\n    def where(self): ...\n"
        "    def see_through(self): ...\n    def stop(self): ...\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", FOREIGN], cwd=tmp_path, env=cluster.environment, timeout=PATIENCE_S,
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == (
        "--launcher ray: a node cannot start a worker: ModuleNotFoundError: No module named 'known_here_alone'; "
        "every node needs the same Python, tuner and Ray"
    )
