"""The benchmark of the search runs, and what it counts keeps its promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.search import measure


@pytest.mark.parametrize("n_stored", [0, 8])
def test_it_runs(n_stored: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratio = measure(n_stored, n_trials=4, n_blocks=1, folder=tmp_path)
    assert 0.2 < ratio < 5.0  # the figure itself is for a quiet machine
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(n_stored), "plain", "ours", "ratio"]
    most = int(lines[2].rpartition("at most ")[2].rstrip(")"))
    assert most <= 3  # two, and once more where the pruner's view of an arm is opened
