"""`tuner evaluate` with real processes and real signals: killed, interrupted, asked twice, and seen to its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from models.trainer import InputError
from storage.database import Database
from storage.runs import Store
from tests.e2e.test_run import PATIENCE_S, ROOT, Runs
from tests.tuner.test_evaluation import Said
from tuner.evaluation import EvaluateOptions, evaluate, newest_document

FITS = "toy.evaluation-1"


class Verdicts(Runs):
    """`tuner evaluate` of one study, again and again."""

    def evaluate(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tuner", "evaluate", "--study", "toy", "--storage", self.url]
        command += ["--devices", "cpu", "--workers", "2", "--runs", str(self.folder / "runs")]
        command += ["--seeds", "3", "--replicates", "200", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def copy(self) -> Verdicts:
        """The same search once more, in a folder of its own."""
        folder = self.folder / "copy"
        folder.mkdir()
        for name in ("tuner.db", "toy.yaml"):
            shutil.copy(self.folder / name, folder)
        shutil.copytree(self.folder / "runs", folder / "runs")
        copy = Verdicts(folder, f"sqlite:///{folder}/tuner.db")
        copy.processes = self.processes
        return copy

    def document(self) -> Mapping[str, Any]:
        database = Database(self.url)
        try:
            return newest_document(database, "toy")
        finally:
            database.close()

    def wait_for_line(self, process: subprocess.Popen[bytes], part: str) -> None:
        assert process.stdout is not None
        seen = []
        while line := process.stdout.readline().decode():
            seen.append(line)
            if part in line:
                return
        pytest.fail(f"{part!r} was never said: {''.join(seen)}")

    def check_trained_once(self, n_fits: int, n_steps: int) -> None:
        executed = sorted((number, step) for number, _, step in self.trained(FITS))
        assert executed == [(number, step) for number in range(n_fits) for step in range(n_steps)]


@pytest.fixture
def verdicts(tmp_path: Path, sqlite_url: str, nothing_left: None) -> Iterator[Verdicts]:
    """A search of two arms that has ended, whose fits take their time."""
    verdicts = Verdicts(tmp_path, sqlite_url)
    verdicts.write_spec(
        n_trials=6,
        config={"x": 0.9, "y": 0.1, "n_steps": 4, "step_s": 0.15},
        decision={"task": "toy", "target_precision": 0.5, "min_selected": 5, "unit": "user"},
        pruner={"name": "none"},
    )
    verdicts.run("--workers", "2")
    yield verdicts
    for process in verdicts.processes:
        if process.poll() is None:
            verdicts.kill(process)
        if process.stdout is not None:
            process.stdout.close()


def without_times(document: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in document.items() if key not in ("finished_at", "cost")}
    return json.dumps(kept, sort_keys=True)


def test_killed_and_interrupted_it_comes_to_the_same_document(verdicts: Verdicts) -> None:
    undisturbed = verdicts.copy()
    process = verdicts.evaluate()
    verdicts.wait_for_trained(3, FITS)
    asked = EvaluateOptions("toy", storage=verdicts.url, runs=str(verdicts.folder / "runs"), devices="cpu")
    with pytest.raises(InputError, match=f"no other evaluation of this study, got process {process.pid} at it"):
        evaluate(asked, Said())
    verdicts.kill(process)

    process = verdicts.evaluate()
    verdicts.wait_for_trained(len(verdicts.trained(FITS)) + 6, FITS)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from here" in verdicts.finish(process, code=130)
    before = verdicts.trained(FITS)

    process = verdicts.evaluate()
    verdicts.wait_for_line(process, "nominee: ")  # in the midst of the conclusion
    verdicts.kill(process)
    assert set(before) <= set(verdicts.trained(FITS))
    verdicts.check_trained_once(9, 4)

    output = verdicts.finish(verdicts.evaluate())
    document = verdicts.document()
    verdicts.check_trained_once(9, 4)
    assert [arm for arm, found in document["arms"].items() if found["kind"] == "searched"] == ["fast", "slow"]
    assert document["looks"]["test"]["repeated"] == 0
    assert document["nominees"][0]["certificate"]["number_on_set"] == 1
    assert "tuner report --study toy" in output

    undisturbed.finish(undisturbed.evaluate())
    assert without_times(undisturbed.document()) == without_times(document)


def test_workers_of_the_service_train_its_fits(verdicts: Verdicts) -> None:
    waiting = verdicts.evaluate("--devices", "none")
    command = [sys.executable, "-m", "tuner", "worker", "--storage", verdicts.url, "--devices", "cpu"]
    command += ["--workers", "2", "--runs", str(verdicts.folder / "runs"), "--data", str(verdicts.folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(command, cwd=verdicts.folder, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert "workers: those of the service" in verdicts.finish(waiting)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(PATIENCE_S)
    verdicts.check_trained_once(9, 4)
    database = Database(verdicts.url)
    store = Store(database)
    fits = store.find_study(FITS)
    assert fits is not None
    assert {worker.study_id for worker in store.workers(fits.id)} == {None}
    database.close()


def test_from_the_search_to_the_report(verdicts: Verdicts) -> None:
    output = verdicts.finish(verdicts.evaluate())
    assert "model: toy:1 is a candidate" in output
    document = verdicts.document()
    again = verdicts.finish(verdicts.evaluate())
    assert "it has ended before" in again
    assert output.splitlines()[-1] == again.splitlines()[-1] == "report: tuner report --study toy"
    assert verdicts.document() == document
    verdicts.check_trained_once(9, 4)

    where = ("--storage", verdicts.url, "--runs", str(verdicts.folder / "runs"))
    paths = [Path(line) for line in verdicts.tuner("report", "--study", "toy", *where).splitlines()]
    assert {"results.json", "report.md", "report.html"} <= {path.name for path in paths}
    assert all(path.stat().st_size > 0 for path in paths)
    assert json.loads(paths[0].read_text())["evaluation"] == document
    for command in ("best", "show"):
        assert verdicts.tuner(command, "--study", FITS, *where)
