"""The commands that turn a finished search into an answer: evaluate it, report what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from tuner.options import (
    database_url,
    name_option,
    option,
    output_format,
    runs_option,
    service_options,
    slots_option,
    storage_option,
    study_option,
)


def register(cli: click.Group) -> None:
    for command in (evaluate, report):
        cli.add_command(command)


@click.command()
@study_option
@name_option
@option("--data", env="DATA", metavar="PATH",
        help="The data, or a folder below which they are found.  [default: data, or the YAML's own]")  # fmt: skip
@option("--seeds", env="SEEDS", type=click.IntRange(min=2), default=5, show_default=True,
        help="Fits of every configuration, each with its own seed; only ever raised.")  # fmt: skip
@option("--top", env="TOP", type=click.IntRange(min=1), default=1, show_default=True,
        help="Configurations of every arm, the best on valid first.")  # fmt: skip
@option("--nominees", env="NOMINEES", type=click.IntRange(min=1), default=1, show_default=True,
        help="Models to certify; they share what the decision may be wrong.")  # fmt: skip
@option("--replicates", "n_replicates", env="REPLICATES", type=click.IntRange(min=100), default=2000,
        show_default=True, help="Bootstrap replicates behind every interval.")  # fmt: skip
@storage_option
@runs_option
@option("--devices", env="DEVICES", default="auto", show_default=True, metavar="LIST",
        help="auto, cpu, or a list as for `tuner run`; none: wait for the workers of `tuner worker`.")  # fmt: skip
@option("--workers", env="WORKERS", type=click.IntRange(min=1), help="Number of worker processes.")
@slots_option
@service_options
@output_format("table", "json")
def evaluate(storage: str | None, runs: str, form: str, **given: Any) -> int:
    """Train the best configurations of every arm again with several seeds, and judge them on data kept back.

    The only command that opens the calibrate and test roles. Ctrl-C stops it in order, and the same command goes on
    from there; of an evaluation that has ended it shows the conclusion.
    """
    from rich.console import Console

    from tuner import display, evaluation, formats
    from tuner.cli import heed_signals

    options = evaluation.EvaluateOptions(storage=database_url(storage, runs), runs=runs, **given)
    heed_signals()
    with display.Progress(Console(stderr=True)) as progress:
        try:
            document, code = evaluation.evaluate(options, progress)
        except KeyboardInterrupt:  # while it judges; in the midst of fits it has stopped its workers first
            document, code = {}, evaluation.INTERRUPTED
    if not document:
        click.echo("interrupted; the same command goes on from here", err=True)
    elif form == "json":
        click.echo(formats.to_json(document))
    else:
        formats.print_parts(conclusion_parts(document))
    return code


@click.command()
@study_option
@name_option
@option(
    "--number", env="NUMBER", type=click.IntRange(min=1), help="Which evaluation.  [default: the newest that ended]"
)
@option("--out", env="OUT", metavar="DIR", type=click.Path(file_okay=False), help="[default: RUNS/STUDY/report]")
@storage_option
@runs_option
def report(
    study: str, name: str | None, number: int | None, out: str | None, storage: str | None, runs: str
) -> int:
    """Figures, a report in Markdown and one self-contained HTML file, and results.json, of an evaluation."""
    from tuner.catalog import find_name, open_database
    from tuner.evaluation import newest_document
    from tuner.report import write_report
    from tuner.study import Study
    from tuner.summary import summarize

    database = open_database(database_url(storage, runs))
    try:
        found = find_name(database, study, name)
        document = newest_document(database, found, number)
        summary = summarize(Study.open(database, found))
    finally:
        database.close()
    for path in write_report(document, summary, Path(out) if out else Path(runs) / found / "report"):
        click.echo(str(path))
    return 0


def conclusion_parts(document: Mapping[str, Any]) -> Iterator[Any]:
    """What an evaluation has come to, for a terminal: the answer first."""
    from tuner import formats
    from tuner.judged_metric import label_of, metric_of
    from tuner.report_findings import certified, percent
    from tuner.report_text import conclusion, verdict_lines

    yield conclusion(document)
    yield from verdict_lines(document)
    by, label = metric_of(document), label_of(document)
    columns = ["arm", "fits", label, "low", "high", "recall at 1 %", "ECE", "log loss"]
    between = f"low, high: {percent(document['confidence'])} interval of {label}"
    yield formats.table(f"{document['sample']['role']} ({between})", columns, [
        [name, _fits(arm), *_numbers(arm, by)] for name, arm in _ranked(document, by)
    ])  # fmt: skip
    for name, arm in document["arms"].items():
        for fit in arm["fits"]:
            if fit["failure"]:
                yield f"fit {fit['number']} ({name}) failed: {fit['failure']}"
    for entry in document["left_out"]:
        yield f"arm {entry['arm']}: left out: {entry['reason']}"
    yield from map(certified, document["nominees"])
    for role, looks in document["looks"].items():
        yield f"{role}: {_looks(looks)}"
    if (model := document["model"]) is not None:
        version = f"{model['name']}:{model['version']}"
        yield f"model: {version} is a candidate; `tuner promote --model {version}` holds it against the gate"
    yield f"report: tuner report --study {document['study']}"


def _ranked(document: Mapping[str, Any], by: str) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(document["arms"].items(), key=lambda item: -(_value(item[1], by, "value") or 0.0))


def _value(arm: Mapping[str, Any], metric: str, part: str) -> float | None:
    return arm["metrics"].get(metric, {}).get(part)


def _fits(arm: Mapping[str, Any]) -> str:
    ended = sum(fit["state"] == "complete" for fit in arm["fits"])
    return str(ended) if ended == len(arm["fits"]) else f"{ended} of {len(arm['fits'])}"


def _numbers(arm: Mapping[str, Any], by: str) -> list[float | None]:
    judged = [_value(arm, by, part) for part in ("value", "low", "high")]
    return judged + [_value(arm, m, "value") for m in ("recall_at_1pct", "ece_calibrated", "log_loss_calibrated")]


def _looks(looks: Mapping[str, int]) -> str:
    from tuner.report_findings import counted

    by_us = f"{counted(looks['n_looks'], 'look')} by this evaluation at {counted(looks['n_models'], 'model')}"
    again = f"{counted(looks['repeated'], 'further look')} at the same" if looks["repeated"] else "none seen before"
    return f"{by_us}, {again}; {looks['all_on_this_set']} by all evaluations of these data"
