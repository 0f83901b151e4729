"""One run at a time for a study and folder, and runs in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.trainer import InputError
from tuner import background
from tuner.background import running_alone


def test_a_second_one_is_refused_by_pid_and_the_folder_is_free_again_after(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    with running_alone(folder):
        told = rf"toy: expected no other run.*process {os.getpid()} at it"
        with pytest.raises(InputError, match=told), running_alone(folder):
            pytest.fail("two at once")
        with running_alone(tmp_path / "runs" / "other"):
            pass
    with running_alone(folder):
        pass


def test_a_killed_one_leaves_nothing_locked(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tuner.background import running_alone\n"
        "with running_alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"process {process.pid}"), running_alone(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with running_alone(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with (
        pytest.raises(InputError, match=r"--runs .*: expected a folder"),
        running_alone(tmp_path / "runs/x"),
    ):
        pass


def test_what_refuses_a_detached_run_is_told_here(tmp_path: Path) -> None:
    arguments = ["run", "--study", "nothing", "--runs", str(tmp_path)]
    with pytest.raises(InputError, match="--study nothing: expected one of"):
        background.detach(arguments, tmp_path / "nothing")
    assert "--study nothing" in (tmp_path / "nothing" / "logs" / "run.log").read_text()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # that is what it is for
def test_one_that_is_slow_to_begin_is_not_said_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(background.sys, "executable", str(slow))
    monkeypatch.setattr(background, "STARTED_WITHIN_S", 0.2)
    pid = background.detach(["run"], tmp_path / "toy")
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
