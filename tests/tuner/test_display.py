from __future__ import annotations

import io
import json
import logging
import math
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from storage.leases import ProcessIdentity
from storage.runs import AttemptRow, WorkerRow
from tests.tuner.toy_study import make_study, summary_of
from tuner import display, formats
from tuner.summary import StudySummary


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """Six trials of two arms, all feasible."""
    folder = tmp_path_factory.mktemp("done")
    make_study(folder)
    return summary_of(folder)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """Four trials, none feasible."""
    folder = tmp_path_factory.mktemp("hard")
    config = {"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 3, "violation": 0.5}
    make_study(folder, decision={"task": "toy", "target_precision": 0.9}, n_trials=4, config=config)
    return summary_of(folder)


def running(summary: StudySummary) -> StudySummary:
    """The same study with its last trial in the hands of a living worker."""
    last = replace(summary.trials[-1], state="running", value=None, last_step=3)
    worker = WorkerRow(77, ProcessIdentity.current(), "cuda:1", 0.0, 1.0, None)
    return replace(
        summary,
        trials=[*summary.trials[:-1], last],
        attempts=[*summary.attempts[:-1], AttemptRow(last.number, 1, 77, 0.0, None, None)],
        workers=[*summary.workers, worker],
        counts={**summary.counts, "running": 1, "complete": summary.counts["complete"] - 1},
    )


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- progress --------------------------------------------------------------------------------------------


def test_a_line_says_all(done: StudySummary) -> None:
    line = display.progress_line(running(done), 90.0)
    best = done.best
    assert best is not None
    assert line.startswith(f"5/6 trials ({done.counts['complete'] - 1} complete, {done.counts['pruned']} pruned, ")
    assert f"best valid/toy/pr_auc {best.value:.4g} ± 0.01 (trial {best.number}, {best.arm})" in line
    assert f"cuda:1: trial 5 {done.trials[5].arm} step 3" in line
    assert line.endswith("ETA 90 s")
    assert "\n" not in line


def test_a_line_where_nothing_is_feasible_or_complete(hard: StudySummary) -> None:
    assert "nothing feasible yet, nearest" in display.progress_line(hard, None)
    assert "violates by 0.5" in display.progress_line(hard, None)
    empty = replace(hard, nearest=None, trials=[])
    assert "no trial is complete yet; ETA ?" in display.progress_line(empty, None)


def test_eta_is_the_pace_of_this_run(done: StudySummary) -> None:
    half = replace(done, row=replace(done.row, n_trials=10))
    assert display.remaining_s(half, 2, 60.0) == 120.0  # 4 are left, at 30 s each
    assert display.remaining_s(half, 0, 60.0) is None
    assert display.remaining_s(done, 6, 60.0) == 0.0


def test_without_a_terminal_a_line_only_when_a_trial_has_ended(done: StudySummary) -> None:
    console = screen(terminal=False)
    with display.Progress(console) as progress:
        progress.show(running(done), 0.0)
        progress.show(running(done), 0.0)
        progress.show(done, 0.0)
    assert [line[:3] for line in printed(console).splitlines()] == ["5/6", "6/6"]


def test_without_a_terminal_a_line_now_and_then(done: StudySummary) -> None:
    console = screen(terminal=False)
    with display.Progress(console, line_every_s=0.0) as progress:
        progress.show(done, 0.0)
        progress.show(done, 0.0)
    assert len(printed(console).splitlines()) == 2


def test_long_lines_are_not_broken(done: StudySummary) -> None:
    console = screen(terminal=False)
    with display.Progress(console) as progress:
        progress.say("word [bold] " * 40)
    assert printed(console) == "word [bold] " * 40 + "\n"


def test_on_a_terminal_a_panel_with_log_lines_above(done: StudySummary) -> None:
    console = screen(terminal=True)
    handler = logging.StreamHandler()
    with display.Progress(console) as progress:
        handler.setStream(sys.stderr)
        progress.show(running(done), 0.0)
        handler.emit(logging.LogRecord("tuner", logging.WARNING, "", 0, "database away", None, None))
    text = printed(console)
    assert "5/6" in text
    assert "trial 5" in text
    assert "step 3" in text
    assert "database away" in text


# --- the end of a run --------------------------------------------------------------------------------------


def test_summary_of_a_feasible_study(done: StudySummary) -> None:
    text = display.summary_text(done, Path("runs"))
    best = done.best
    assert best is not None
    assert best.value == max(t.value for t in done.trials if t.state == "complete" and t.value is not None)
    default = done.defaults[best.arm]
    assert default.value is not None
    assert f"gain over its arm's default (trial {default.number}): {best.value - default.value:+.4g}" in text
    assert "feasible: " in text
    assert "(search threshold, not certified) on valid: precision 0.5, lower bound 0.4, recall 0.2" in text
    assert text.splitlines()[-2:] == [
        "results: runs/toy/results.json",
        "next: tuner best --study toy; tuner dashboard (both with this run's --storage and --runs)",
    ]


def test_fits_that_differ_by_their_seed_are_compared_with_no_default(done: StudySummary) -> None:
    fits = replace(done, spec=done.spec.model_copy(update={"replicate": True}))
    text = display.summary_text(fits, Path("runs"))
    assert "default" not in text
    assert "best: trial" in text


def test_changes_are_those_against_the_default_of_the_arm(done: StudySummary) -> None:
    assert display.config_changes(done, done.defaults["b"]) == []
    trial = next(t for t in done.trials if t.arm == "b" and t.number > 1)
    changes = display.config_changes(done, trial)
    assert [line.split(":")[0] for line in changes] == ["x", "y"]  # the arm's own `shape` is no change
    assert changes[0] == f"x: 0.9 -> {trial.params['x']:.4g}"


def test_summary_of_an_infeasible_study(hard: StudySummary) -> None:
    text = display.summary_text(hard, Path("runs"))
    assert (
        "not feasible: none of 4 complete trials reaches a precision of 0.9 (lower bound, confidence 0.9), "
        "the nearest has 0.4" in text
    )
    assert "nearest (infeasible): trial" in text
    assert "\nbest:" not in text


def test_simulated_data_are_called_so(done: StudySummary) -> None:
    simulated = replace(done, data={**done.data, "simulated": True})
    assert "(simulated, not real)" in display.summary_text(simulated, Path("runs"))
    assert "(real)" in display.summary_text(done, Path("runs"))


def test_a_threshold_that_overflows_as_probability(done: StudySummary) -> None:
    trial = replace(done.trials[0], threshold=-1e6)
    assert "probability 9.86e-305" in display.threshold_text(trial)
    assert display.threshold_text(replace(trial, threshold=None)) == "none"


# --- tables ------------------------------------------------------------------------------------------------


def drawn(part: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(part)
    return printed(console)


def test_trials_are_listed_with_the_best_marked(done: StudySummary) -> None:
    text = drawn(display.trials_table(done))
    assert done.best is not None
    assert [line.split()[0] for line in text.splitlines()[2:]] == [str(n) for n in range(6)]
    assert sum(" * " in line for line in text.splitlines()[2:]) == 1
    assert f"{done.best.number} *" in text


def test_interrupted_trials_show_their_attempts(done: StudySummary) -> None:
    twice = replace(
        done,
        trials=[replace(done.trials[0], attempts=2), *done.trials[1:]],
        attempts=[AttemptRow(0, 1, 1, 0.0, 5.0, "stopped"), AttemptRow(0, 2, 2, 6.0, None, None)],
    )
    parts = [drawn(part) for part in display.study_tables(twice)]
    assert len(parts) == 4
    assert "stopped" in parts[2]
    assert "in hand" in parts[2]
    assert len(list(display.study_tables(done))) == 3


def test_workers_say_what_they_do(done: StudySummary) -> None:
    alive = ProcessIdentity.current()
    dead = replace(alive, process_start=alive.process_start + 1)
    far = replace(alive, boot="elsewhere")
    rows = [
        WorkerRow(77, alive, "cpu", 0.0, 1.0, None),
        WorkerRow(78, alive, "cpu", 0.0, 1.0, None),
        WorkerRow(79, dead, "cpu", 0.0, 1.0, None),
        WorkerRow(80, far, "cpu", 0.0, 30.0, None),
        WorkerRow(81, far, "cpu", 0.0, 6000.0, None),
        WorkerRow(82, alive, "cpu", 0.0, 1.0, 1.0),
    ]
    lines = drawn(display.workers_table(replace(running(done), workers=rows))).splitlines()[2:]
    said = ["trial 5, step 3", "idle", "gone", "idle", "gone", "ended"]
    assert all(word in line for word, line in zip(said, lines, strict=True))


def test_a_worker_tells_of_all_that_it_has_in_hand(done: StudySummary) -> None:
    busy = running(done)
    one = replace(busy.trials[-2], state="running", value=None, last_step=1)
    attempts = [AttemptRow(one.number, 1, 77, 0.0, None, None), busy.attempts[-1]]
    several = replace(busy, trials=[*busy.trials[:-2], one, busy.trials[-1]], attempts=attempts)
    assert "trial 4, step 1; trial 5, step 3" in drawn(display.workers_table(several))
    gone = replace(several, workers=[replace(w, ended_at=None, identity=replace(w.identity, process_start=1))
                                     for w in several.workers])  # fmt: skip
    assert "gone (held trials 4, 5; the next run goes on with them)" in drawn(display.workers_table(gone))


def test_nothing_is_cut_off_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    formats.print_table("t", ["a", "b"], [["x" * 150, "y" * 150]], "table")
    assert f"{'x' * 150}  {'y' * 150}" in capsys.readouterr().out


def test_a_description_is_shown_and_flattened() -> None:
    described = {
        "tables": {"roles": {"columns": ["role", "rows"], "rows": [["train", 70], ["valid", 10]]}},
        "checks": [{"name": "a", "ok": True, "detail": "fine"}, {"name": "b", "ok": False, "detail": "leak"}],
    }
    parts = list(display.describe_tables(described))
    assert "train" in drawn(parts[0])
    assert parts[1:] == ["PASS  a: fine", "FAILED  b: leak", "1 of 2 checks failed"]
    columns, rows = display.describe_rows(described)
    assert columns == ["table", "row", "column", "value"]
    assert ["roles", 1, "rows", 10] in rows
    assert ["checks", 1, "ok", False] in rows


# --- values ------------------------------------------------------------------------------------------------


def test_json_is_strict() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": (np.float64(2.0), np.int64(3), np.float32("nan")), 4: None}
    text = formats.to_json({**value, "d": date(2023, 3, 17)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": [2.0, 3, None], "4": None, "d": "2023-03-17"}


def test_csv_quotes_what_needs_it() -> None:
    assert formats.to_csv(["a", "b"], [["x,y", None], [1, 0.1]]) == 'a,b\n"x,y",\n1,0.1\n'


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (42.4, "42 s"), (210, "3.5 min"), (7560, "2.1 h"), (0, "0 s")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.123456, "0.1235"), (12345, "12345"), (True, "True"), (np.float32(0.5), "0.5")],
)
def test_numbers(value: Any, text: str) -> None:
    assert formats.number(value) == text
