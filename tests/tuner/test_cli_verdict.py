"""What `tuner evaluate` says at its end, and that Ctrl-C is told alike wherever it falls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tuner.verdict_document import census_document, mvp13_document, roc_document
from tuner import cli, evaluation
from tuner.cli_verdict import conclusion_parts
from tuner.report_text import conclusion


def said(document: Mapping[str, Any]) -> list[str]:
    """Every line, tables included."""
    console = Console(width=400)
    with console.capture() as captured:
        for part in conclusion_parts(document):
            console.print(part, markup=False)
    return captured.get().replace("\u00a0", " ").splitlines()


@pytest.mark.parametrize(
    "document", [mvp13_document(), census_document(), roc_document(feasible=True), roc_document(feasible=False)]
)
def test_the_answer_comes_first_and_once(document: dict[str, Any]) -> None:
    lines = said(document)
    assert lines[0] == conclusion(document).replace("\u00a0", " ")
    assert len(lines) == len(set(lines))
    assert sum("was asked for" in line for line in lines) == 1
    assert sum("no decisions are issued" in line.lower() for line in lines) <= 1


def test_no_more_is_promised_of_a_candidate_than_a_look_of_the_gate() -> None:
    document = mvp13_document()
    document["model"] = {"name": "mvp13", "version": 2, "checksum": "0" * 64, "size_bytes": 10}
    (line,) = (line for line in said(document) if line.startswith("model: "))
    assert line == "model: mvp13:2 is a candidate; `tuner promote --model mvp13:2` holds it against the gate"


def test_what_is_certified_is_told_with_its_threshold() -> None:
    assert any("is certified at logit" in line for line in said(census_document()))
    assert not any("is certified at logit" in line for line in said(mvp13_document()))


def test_of_what_is_not_certified_it_is_told_whether_the_search_could_have_kept_it() -> None:
    (line,) = (line for line in said(roc_document(feasible=False)) if "was not reachable" in line)
    assert "The threshold of the search, not issued, had a precision of 0.6215 on valid" in line
    assert not any("was not reachable" in line for line in said(roc_document(feasible=True)))


@pytest.mark.parametrize(("document", "label"), [(census_document(), "PR-AUC"), (roc_document(True), "ROC-AUC")])
def test_the_table_is_ranked_by_the_metric_it_shows(document: dict[str, Any], label: str) -> None:
    lines = said(document)
    start = next(i for i, line in enumerate(lines) if f"95 % interval of {label}" in line)
    arms = document["arms"]
    table = lines[start : start + len(arms) + 4]
    assert any(f" {label} " in line for line in table)
    values = {name: arm["metrics"][label.lower().replace("-", "_")]["value"] for name, arm in arms.items()}
    shown = dict.fromkeys(name for line in table for name in arms if line.strip("│ ").split(" ")[0] == name)
    assert list(shown) == sorted(values, key=lambda name: -values[name])


def test_looks_at_the_same_models_are_not_called_this_evaluations_own() -> None:
    document = census_document()
    by_us = f"{document['looks']['test']['n_looks']} looks by this evaluation"
    for n, told in ((0, "none seen before"), (1, "1 further look at the same"), (6, "6 further looks at the same")):
        document["looks"]["test"]["repeated"] = n
        (line,) = (line for line in said(document) if line.startswith(f"test: {by_us}"))
        assert told in line


def test_ctrl_c_in_the_midst_of_judging_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    monkeypatch.setattr(cli, "heed_signals", lambda: None)
    assert cli.main(["evaluate", "--study", "toy", "--runs", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "interrupted; the same command goes on from here\n"
