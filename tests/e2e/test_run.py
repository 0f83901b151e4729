"""`tuner run` with real processes, real signals and real databases."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from storage.database import Database
from tests.e2e.trainer import trained
from tests.searches import METRIC
from tuner.study import Study
from tuner.summary import summarize

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0


class Runs:
    """`tuner run` of one study, again and again, in a folder of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.processes: list[subprocess.Popen[bytes]] = []

    def write_spec(self, name: str = "toy", **changes: Any) -> None:
        spec = {
            "study": name,
            "trainer": "tests.e2e.trainer:LoggedToy",
            "data": {},
            "decision": {"task": "toy", "target_precision": 0.5},
            "objective": {"metric": METRIC},
            "n_trials": 10,
            "config": {"x": 0.5, "y": 0.5, "n_steps": 6, "step_s": 0.02},
            "arms": {"fast": {}, "slow": {"speed": 0.2}},
            "space": {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}},
            "sampler": {"name": "tpe", "n_startup_trials": 4},
            "pruner": {"name": "median", "min_completed": 2, "warmup_steps": 2},
            **changes,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))

    def start(self, *flags: str, name: str = "toy") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tuner", "run", "--study", f"{name}.yaml", "--storage", self.url]
        command += ["--devices", "cpu", "--runs", str(self.folder / "runs"), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def tuner(self, *arguments: str) -> str:
        """Another command, seen to its end."""
        command = [sys.executable, "-m", "tuner", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def finish(self, process: subprocess.Popen[bytes], code: int = 0) -> str:
        output = process.communicate(timeout=PATIENCE_S)[0].decode()
        logs = "".join(path.read_text() for path in self.folder.glob("runs/*/logs/*.log"))
        assert process.returncode == code, output + logs
        return output

    def run(self, *flags: str, code: int = 0, name: str = "toy") -> str:
        return self.finish(self.start(*flags, name=name), code)

    @contextlib.contextmanager
    def opened(self, name: str = "toy") -> Iterator[Study]:
        database = Database(self.url)
        try:
            yield Study.open(database, name)
        finally:
            database.close()

    def states(self, name: str = "toy") -> Counter[str]:
        with self.opened(name) as study:
            return Counter(trial.state for trial in study.search.trials())

    def wait_for_trained(self, n_steps: int, name: str = "toy") -> None:
        """Until so many steps have been trained."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.trained(name)) < n_steps:
            assert self.processes[-1].poll() is None, "it has ended before"
            assert time.monotonic() < deadline, "nothing is trained"
            time.sleep(0.01)

    def trained(self, name: str = "toy") -> list[tuple[int, int, int]]:
        return trained(self.folder / "runs" / name / "trials")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """kill -9 of a coordinator and all its workers at once."""
        everybody = [*workers_of(process), psutil.Process(process.pid)]
        for one in everybody:
            one.suspend()  # none sees another die
        for one in everybody:
            one.kill()
        process.communicate()
        psutil.wait_procs(everybody, timeout=10)

    def check_whole(self, n_trials: int, name: str = "toy") -> None:
        """Exactly so many trials, all ended; of each run every step once, none trained twice."""
        with self.opened(name) as study:
            trials = study.search.trials()
            assert [trial.number for trial in trials] == list(range(n_trials))
            assert all(trial.ended for trial in trials)
            runs = study.store.runs(study.id)
            assert [run.number for run in runs] == list(range(n_trials))
            assert all(run.ended_at for run in runs)
            rows = study.store.measurements(study.id, range(n_trials))
            optuna = {t.number: list(t.intermediate_values.items()) for t in study.search.study.trials}
            for trial in trials:
                steps = [row.step for row in rows[trial.number]]
                assert steps == list(range(len(steps)))
                assert optuna[trial.number] == [(row.step, row.metrics[METRIC]) for row in rows[trial.number]]
                if trial.state == "complete":
                    assert steps == list(range(6))
                    assert trial.value == max(row.metrics[METRIC] for row in rows[trial.number])
            assert all(attempt.outcome for attempt in study.store.attempts(study.id))
            checkpoints = [self.folder / "runs" / name / str(trial.checkpoint) for trial in summarize(study).trials]
            assert all(path.exists() for path in checkpoints)
        executed = Counter((number, step) for number, _, step in self.trained(name))
        assert max(executed.values()) == 1
        assert executed == Counter((number, row.step) for number, of_run in rows.items() for row in of_run)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture
def runs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runs]:
    backend = getattr(request, "param", "sqlite")
    runs = Runs(tmp_path, request.getfixturevalue(f"{backend}_url"))
    runs.write_spec()
    yield runs
    for process in runs.processes:
        if process.poll() is None:
            runs.kill(process)
    # Workers whose coordinator was killed are no children any more: they have to end by themselves.
    deadline = time.monotonic() + 20.0
    while left := [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("runs", ["sqlite", "postgresql"], indirect=True)
def test_four_workers_reach_the_total_exactly(runs: Runs) -> None:
    output = runs.run("--workers", "4", "--n-trials", "14")
    runs.check_whole(14)
    results = json.loads((runs.folder / "runs/toy/results.json").read_text())
    assert (results["n_trials"], results["n_ended"], len(results["trials"])) == (14, 14, 14)
    assert results["counts"]["running"] == results["counts"]["waiting"] == 0
    best = max((t for t in results["trials"] if t["state"] == "complete"), key=lambda t: t["value"])
    assert (results["best"]["number"], results["best"]["value"]) == (best["number"], best["value"])
    assert results["threshold_status"] == "search threshold, not certified"
    assert len(results["workers"]) == 4
    assert all(worker["ended_at"] for worker in results["workers"])
    assert f"{best['value']:.3f}"[:4] in output


def test_interrupted_timed_out_and_a_worker_killed(runs: Runs) -> None:
    runs.write_spec(config={"x": 0.5, "y": 0.5, "n_steps": 6, "step_s": 0.1}, n_trials=12)
    process = runs.start("--workers", "2")
    runs.wait_for_trained(8)
    process.send_signal(signal.SIGINT)
    runs.finish(process, code=130)
    first = runs.states()
    assert first["running"] == 0
    assert 1 <= first["waiting"] <= 2
    interrupted = runs.trained()
    with runs.opened() as study:
        waiting = [trial.number for trial in study.search.trials() if trial.state == "waiting"]
        assert {a.outcome for a in study.store.attempts(study.id) if a.number in waiting} == {"stopped"}

    output = runs.run("--workers", "2", "--timeout", "1.2")
    assert "time is up" in output
    second = runs.states()
    assert second["running"] == 0
    # Each interrupted trial went on where it was.
    for number in waiting:
        before = [step for n, _, step in interrupted if n == number]
        after = [(attempt, step) for n, attempt, step in runs.trained() if n == number][len(before) :]
        assert not after or after[0] == (2, max(before) + 1)

    process = runs.start("--workers", "2")
    runs.wait_for_trained(len(runs.trained()) + 4)
    workers_of(process)[0].kill()
    runs.finish(process)
    runs.check_whole(12)
    with runs.opened() as study:
        assert len(study.store.workers(study.id)) == 7  # one of them in the place of the dead one
        outcomes = Counter(a.outcome for a in study.store.attempts(study.id))
    assert outcomes["lost"] == 0
    assert outcomes["crashed"] <= 1  # none where it was killed between two trials


@pytest.mark.parametrize("runs", ["postgresql"], indirect=True)
def test_the_coordinator_killed_then_everything_killed(runs: Runs) -> None:
    runs.write_spec(config={"x": 0.5, "y": 0.5, "n_steps": 6, "step_s": 0.1}, n_trials=10)
    process = runs.start("--workers", "2")
    runs.wait_for_trained(2)  # of six: no trial has ended
    left_alone = workers_of(process)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(left_alone, timeout=20)
    assert not alive  # the end of their standard input told them
    states = runs.states()
    assert states["running"] == 0
    assert states["waiting"] >= 1

    process = runs.start("--workers", "2")
    runs.wait_for_trained(len(runs.trained()) + 8)
    runs.kill(process)
    assert runs.states()["running"] >= 1
    n_trained = len(runs.trained())

    started = time.monotonic()
    process = runs.start("--workers", "2")
    runs.wait_for_trained(n_trained + 1)
    assert time.monotonic() - started < 15.0  # with the grace time as it is shipped
    runs.finish(process)
    runs.check_whole(10)

    runs.run("--workers", "2", "--n-trials", "13")
    runs.check_whole(13)
    output = runs.run("--n-trials", "5")
    assert "never lowered" in output
    assert "nothing is to do" in output
    runs.check_whole(13)


def test_in_the_background_and_alone(runs: Runs) -> None:
    runs.write_spec(config={"x": 0.5, "y": 0.5, "n_steps": 6, "step_s": 0.3}, n_trials=50)
    output = runs.run("--workers", "1", "--detach")
    pid = int(re.findall(r"process (\d+)", output)[0])
    background = psutil.Process(pid)
    try:
        told = runs.run("--workers", "1", code=2)
        assert f"expected no other run of this study, got process {pid} at it" in told
        assert f"got process {pid} at it" in runs.run("--workers", "1", "--detach", code=2)
        deadline = time.monotonic() + PATIENCE_S
        while len(runs.trained()) < 2:
            assert time.monotonic() < deadline, "nothing is trained"
            time.sleep(0.05)
        said = runs.tuner("logs", "--study", "toy", "--runs", str(runs.folder / "runs"))
        assert "action=claim study=toy trial=0" in said
        assert "0 of 50 trials ended" in said
        runs.tuner("stop", "--study", "toy", "--now", "--storage", runs.url)
        background.wait(timeout=PATIENCE_S)
    finally:
        if background.is_running():
            background.terminate()
    assert runs.states()["running"] == 0
    said = runs.tuner("logs", "--study", "toy", "--runs", str(runs.folder / "runs"))
    assert "study toy: stopped by `tuner stop`" in said


def test_one_worker_is_reproducible_also_when_killed(runs: Runs) -> None:
    def result(name: str) -> list[Any]:
        with runs.opened(name) as study:
            return [
                (t.number, t.state, t.value, t.params, {r.step: r.metrics for r in rows})
                for t, rows in zip(
                    study.search.trials(),
                    study.store.measurements(study.id, range(10)).values(),
                    strict=True,
                )
            ]

    runs.run("--workers", "1", "--name", "whole")
    for _ in range(2):
        process = runs.start("--workers", "1", "--name", "killed")
        runs.wait_for_trained(len(runs.trained("killed")) + 11, "killed")
        runs.kill(process)
    runs.run("--workers", "1", "--name", "killed")
    runs.check_whole(10, "whole")
    runs.check_whole(10, "killed")
    assert result("killed") == result("whole")


def test_failures_are_told_and_replaced_on_demand(runs: Runs) -> None:
    runs.write_spec(
        config={"x": 0.5, "n_steps": 3, "fault": "none", "fault_step": 1},
        arms={"only": {}}, space={"x": {"low": 0.0, "high": 1.0}, "fault": {"choices": ["none", "raise"]}},
        sampler={"name": "random"}, max_failures_in_a_row=50,
    )  # fmt: skip
    runs.run("--workers", "2", "--n-trials", "8")
    states = runs.states()
    assert sum(states.values()) == 8
    assert 1 <= states["failed"] <= 7
    runs.run("--workers", "2", "--n-trials", "8", "--retry-failed")
    assert sum(runs.states().values()) == 8 + states["failed"]
    with runs.opened() as study:
        failures = [run.failure for run in study.store.runs(study.id) if run.failure]
    assert set(failures) == {"RuntimeError: the toy was told to fail"}


def test_a_trial_that_kills_its_workers_fails_and_the_study_goes_on(runs: Runs) -> None:
    runs.write_spec(
        config={"x": 0.5, "n_steps": 3, "fault_step": 1}, arms={"good": {}, "bad": {"fault": "exit"}},
        space={"x": {"low": 0.0, "high": 1.0}}, n_trials=3,
    )  # fmt: skip
    runs.run("--workers", "1")
    with runs.opened() as study:
        assert [trial.state for trial in study.search.trials()] == ["complete", "failed", "complete"]
        assert "died 3 times in a row" in str(study.store.runs(study.id)[1].failure)
        # The first of its attempts had measured something.
        assert [a.outcome for a in study.store.attempts(study.id) if a.number == 1] == ["crashed"] * 4
