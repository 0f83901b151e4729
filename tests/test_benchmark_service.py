"""The benchmarks of the service run, and what they count is what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys


def run(module: str, *arguments: str) -> list[list[str]]:
    """The cells of the rows that a benchmark prints, its head left out."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    rows = [line.strip("| ").split(" | ") for line in output.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_service_against_plain_optuna() -> None:
    rows = run("service", "--stored", "8", "--workers", "2", "--trials", "1", "--blocks", "2")
    assert [(row[0], row[2], row[3]) for row in rows] == [("sqlite", "8", "2"), ("postgresql", "8", "2")]
    for row in rows:
        plain, ours = float(row[4]), float(row[5])
        assert 0.1 < ours / plain < 10.0  # the figure itself is for a quiet machine
        assert re.fullmatch(r"\*\*[+-]\d+\*\* \([+-]\d+ to [+-]\d+\)", row[6])
        # A trial has 20 measurements: at least 20 transactions on either side, at most three a measurement on ours.
        in_plain, in_ours = map(float, row[8].split(" / "))
        assert 20 < in_plain < in_ours < 20 * 3 + 40


def test_our_part_of_the_comparison_with_rivals() -> None:
    (row,) = run("rivals", "--tools", "tuner", "--sizes", "2,4", "--step-s", "0.1")
    assert row[0] == "tuner"
    assert row[5] == "4 / 4"
    ended = {state: int(count) for count, state in re.findall(r"(\d+) (complete|pruned|failed)", row[7])}
    assert sum(ended.values()) == 8
    assert "failed" not in ended
    assert row[7].endswith(" 0 steps trained twice")
