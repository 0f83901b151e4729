"""The same trivial search through Ray Tune and Syne Tune by their defaults, and through `tuner run`.

Ten parameters, 20 reports a trial, a trainer that does nothing, two trials at a time. Each tool runs in a process
of its own that also ends its servers and workers; the rivals in a virtual environment that this benchmark makes
once. CPU and wall time are those of the whole process tree; the slope between two sizes is the cost of a trial, the
rest that of starting. A tool may begin more trials than it was asked for. Then one process that trains is killed
with SIGKILL in the middle of slower trials: which of eight trials end as they should?

    python -m benchmarks.rivals [--sizes 8,40] [--tools tuner,ray,syne] [--environment DIR] [--step-s 0.3]

By their defaults: Ray Tune searches at random and stops nothing early; Syne Tune has no default scheduler and is
given its ASHA; `tuner` has TPE, the median pruner and SQLite.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from models.trainer import (
    DataSpec,
    Decision,
    FrozenModel,
    Manifest,
    Measurement,
    Problem,
    Role,
    Run,
    advance_in_turn,
)

RIVALS = ("ray[tune]==2.60.0", "syne-tune==0.16.0")
N_PARAMS, N_STEPS, N_WORKERS = 10, 20, 2
METRIC = "valid/t/pr_auc"
# How every trial of every tool tells what it did: one line a step, appended in one write.
LOG = "STEPS_LOG"
STEP_S = "STEP_S"

# What a trial does in the rivals' environment, where nothing of ours can be imported.
_TRIAL = """
import os, time
def steps(config, report):
    height = 1 - sum((config[f"p{i}"] - 0.4) ** 2 for i in range(10)) / 10
    for step in range(20):
        time.sleep(float(os.environ["STEP_S"]))
        with open(os.environ["STEPS_LOG"], "a") as log:
            log.write(f"{os.getpid()} {config['p0']!r} {step}\\n")
        report(step, height * (1 - 0.7 ** (step + 1)))
"""

_RAY = """
import json, os, sys
sys.path.insert(0, os.path.dirname(__file__))
import ray
from ray import tune
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
def trial(config):
    from trial import steps
    steps(config, lambda step, value: tune.report({"value": value, "step": step}))
results = tune.Tuner(
    trial,
    param_space={f"p{i}": tune.uniform(0, 1) for i in range(10)},
    tune_config=tune.TuneConfig(metric="value", mode="max", num_samples=int(sys.argv[1])),
    run_config=tune.RunConfig(storage_path=sys.argv[2], verbose=0),
).fit()
complete = sum(r.error is None and r.metrics.get("step") == 19 for r in results)
print("RESULT", json.dumps({"complete": complete, "pruned": 0, "failed": results.num_errors}))
ray.shutdown()
"""

_SYNE = """
import json, os, sys
from syne_tune import StoppingCriterion, Tuner
from syne_tune.backend import LocalBackend
from syne_tune.config_space import uniform
from syne_tune.optimizer.baselines import ASHA
scheduler = ASHA(
    {f"p{i}": uniform(0, 1) for i in range(10)}, metric="value", time_attr="step", max_t=20, do_minimize=False,
    random_seed=1,
)
entry = os.path.join(os.path.dirname(os.path.abspath(__file__)), "syne_trial.py")
tuner = Tuner(
    trial_backend=LocalBackend(entry_point=entry), scheduler=scheduler, n_workers=2,
    stop_criterion=StoppingCriterion(max_num_trials_finished=int(sys.argv[1])),
)
try:
    tuner.run()
except ValueError as error:  # how it ends where more trials failed than `max_failures`
    print(error)
states = [str(status) for status in tuner.tuning_status.last_trial_status_seen.values()]
print("RESULT", json.dumps({"complete": states.count("Completed"), "pruned": states.count("Stopped"),
                            "failed": states.count("Failed")}))
"""

_SYNE_TRIAL = """
import argparse, os, sys
sys.path.insert(0, os.path.dirname(__file__))
from syne_tune import Reporter
from trial import steps
parser = argparse.ArgumentParser()
for i in range(10):
    parser.add_argument(f"--p{i}", type=float)
report = Reporter()
steps(vars(parser.parse_known_args()[0]), lambda step, value: report(step=step + 1, value=value))
"""


class Config(FrozenModel):
    p: dict[str, float]


class NoData(FrozenModel):
    path: str = "."


@dataclass(frozen=True)
class Nothing:
    manifest: Manifest


class Trivial:
    """The same trial as a trainer of ours. Its checkpoint is the number of steps it has made."""

    Config = Config
    Data = NoData

    def check(self, config: Config, data: NoData, decision: Decision) -> list[Problem]:
        return []

    def load(self, data: DataSpec, roles: frozenset[Role]) -> Nothing:
        return Nothing(Manifest("0" * 16, "nothing", False, dict.fromkeys(roles, 1)))

    def describe(self, data: DataSpec) -> Mapping[str, Any]:
        return {}

    def advance(self, fits: Sequence[Iterator[Measurement]]) -> list[Measurement | Exception | None]:
        return advance_in_turn(fits)

    def fit(self, config: Config, data: Nothing, run: Run) -> Iterator[Measurement]:
        height = 1 - sum((value - 0.4) ** 2 for value in config.p.values()) / N_PARAMS
        done = [int(path.name[5:]) for path in run.directory.glob("attempt-*/step-*")]
        first = max(done, default=0)  # a resumed trial yields the measurement of its checkpoint once more
        folder = run.directory / f"attempt-{run.attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(first, N_STEPS):
            if step not in done:
                time.sleep(float(os.environ[STEP_S]))
                with open(os.environ[LOG], "a") as log:
                    log.write(f"{os.getpid()} {config.p['p0']!r} {step}\n")
                (folder / f"step-{step:05d}").touch()
            yield Measurement(
                step, {METRIC: height * (1 - 0.7 ** (step + 1)), "valid/t/violation": -0.1}, 1.0 + step
            )


def spec() -> dict[str, Any]:
    names = [f"p{i}" for i in range(N_PARAMS)]
    return {
        "study": "rivals", "trainer": "benchmarks.rivals:Trivial", "data": {},
        "decision": {"task": "t", "target_precision": 0.5}, "objective": {"metric": METRIC}, "n_trials": 1,
        "config": {"p": dict.fromkeys(names, 0.5)},
        "space": {"p": {name: {"low": 0.0, "high": 1.0} for name in names}},
    }  # fmt: skip


# --- running them ----------------------------------------------------------------------------------------------


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment that has the rivals; made where it is not there yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    installed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    if not {rival.replace("[tune]", "") for rival in RIVALS} <= set(installed.splitlines()):
        subprocess.run([python, "-m", "pip", "install", "-q", *RIVALS], check=True)
    return python


def command(tool: str, n_trials: int, folder: Path, python: Path | None) -> list[str]:
    if tool == "tuner":
        (folder / "rivals.yaml").write_text(json.dumps(spec()))  # JSON is YAML
        return [
            sys.executable, "-m", "tuner", "run", "--study", str(folder / "rivals.yaml"), "--devices", "cpu",
            "--workers", str(N_WORKERS), "--n-trials", str(n_trials), "--runs", str(folder / "runs"),
        ]  # fmt: skip
    for name, text in {"trial": _TRIAL, "ray_tune": _RAY, "syne": _SYNE, "syne_trial": _SYNE_TRIAL}.items():
        (folder / f"{name}.py").write_text(text)
    script = {"ray": "ray_tune.py", "syne": "syne.py"}[tool]
    return [str(python), str(folder / script), str(n_trials), str(folder / "results")]


@dataclass(frozen=True)
class Outcome:
    """One search: CPU of the process tree, wall time, how trials ended by the tool's own account, and the steps
    that were trained, as (trial, step)."""

    cpu_s: float
    wall_s: float
    states: Mapping[str, int]
    steps: list[tuple[str, int]]

    @property
    def n_trials(self) -> int:
        """How many were begun, which can be more than were asked for."""
        return len({trial for trial, _ in self.steps})


def run(tool: str, n_trials: int, step_s: float, python: Path | None, kill: bool = False) -> Outcome:
    """Run one search to its end; with `kill`, one of its trials' processes gets SIGKILL after its fifth step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        log = folder / "steps.log"
        log.touch()
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", LOG: str(log), STEP_S: str(step_s), "HOME": name,
            "SYNETUNE_FOLDER": f"{name}/syne", "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        output = (folder / "output.txt").open("w+")
        started = time.monotonic()
        process = psutil.Popen(
            command(tool, n_trials, folder, python), env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        victim = _fifth_step(log) if kill else lambda: None
        try:
            cpu_s = _see_through(process, victim)
        finally:
            _end(process)
        wall_s = time.monotonic() - started
        text = Path(output.name).read_text()
        states = _states(tool, folder, text)
        if states is None or (process.returncode and not kill):
            raise SystemExit(f"{tool} ended with {process.returncode}:\n{text[-4000:]}")
        steps = [(line.split()[1], int(line.split()[2])) for line in log.read_text().splitlines()]
        return Outcome(cpu_s, wall_s, states, steps)


def _states(tool: str, folder: Path, text: str) -> Mapping[str, int] | None:
    """How the trials ended, as the tool itself says."""
    if tool == "tuner":
        results = folder / "runs" / "rivals" / "results.json"
        return json.loads(results.read_text())["counts"] if results.exists() else None
    lines = [line for line in text.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1].partition(" ")[2]) if lines else None


def _fifth_step(log: Path) -> Callable[[], int | None]:
    """Gives the pid of the first trial process that has made five steps, once."""
    told: list[int] = []

    def victim() -> int | None:
        pids = [int(line.split()[0]) for line in log.read_text().splitlines()]
        ripe = [pid for pid in pids if pids.count(pid) >= 5]
        if told or not ripe:
            return None
        told.append(ripe[0])
        return ripe[0]

    return victim


def _see_through(process: psutil.Popen, victim: Callable[[], int | None]) -> float:
    """Wait for the end; the CPU seconds of the whole process tree.

    Processes that are waited for by their parents are counted by the kernel, those that are not (Ray's servers) as
    they were seen last, every 50 ms. Each count is a lower bound; the larger one is returned.
    """
    seen: dict[tuple[int, float], float] = {}
    waited = os.times()
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            family = []
        for member in family:
            try:
                times = member.cpu_times()
                seen[member.pid, member.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        pid = victim()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    now = os.times()
    by_kernel = now.children_user + now.children_system - waited.children_user - waited.children_system
    return max(sum(seen.values()), by_kernel)


def _end(process: psutil.Popen) -> None:
    """Nothing of a search that was broken off lives on."""
    if process.poll() is None:
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--environment", type=Path, default=cache / "tuner" / "rivals", help="virtual environment")
    parser.add_argument("--sizes", default="8,40", help="two numbers of trials")
    parser.add_argument("--tools", default="tuner,ray,syne")
    parser.add_argument("--step-s", type=float, default=0.3, help="length of a step where one worker is killed")
    given = parser.parse_args()
    small, large = map(int, given.sizes.split(","))
    tools = given.tools.split(",")
    python = make_environment(given.environment) if set(tools) - {"tuner"} else None
    print(f"rivals: {', '.join(RIVALS)}; {N_WORKERS} trials at a time, {N_STEPS} reports, {N_PARAMS} parameters\n")
    columns = [
        "tool",
        "CPU ms a trial",
        "wall ms a trial",
        "start: CPU s",
        "wall s",
        "asked / run",
        "steps a trial",
        "8, one killed",
    ]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    for tool in tools:
        few, many = (run(tool, n, 0.0, python) for n in (small, large))
        killed = run(tool, 8, given.step_s, python, kill=True)
        n = many.n_trials - few.n_trials
        cpu_s, wall_s = (many.cpu_s - few.cpu_s) / n, (many.wall_s - few.wall_s) / n
        twice = len(killed.steps) - len(set(killed.steps))
        cells = [
            tool, f"{1000 * cpu_s:.0f}", f"{1000 * wall_s:.0f}", f"{few.cpu_s - few.n_trials * cpu_s:.1f}",
            f"{few.wall_s - few.n_trials * wall_s:.1f}", f"{large} / {many.n_trials}",
            f"{len(many.steps) / many.n_trials:.1f}", f"{_said(killed.states)}; {twice} steps trained twice",
        ]  # fmt: skip
        print("|", " | ".join(cells), "|", flush=True)


def _said(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items() if count)


if __name__ == "__main__":
    main()
