"""The commands of the registry: which models there are, which one serves, and what it says of new rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuner.options import (
    artifacts_option,
    database_url,
    name_option,
    option,
    output_format,
    runs_option,
    storage_option,
)

if TYPE_CHECKING:
    from storage.rows import ModelRow
    from storage.runs import Store
    from tuner.prediction import Newest, Written
    from tuner.registry import ModelFolder

GATE_REFUSED = 4


def register(cli: click.Group) -> None:
    for command in (models, promote, rollback, predict):
        cli.add_command(command)


@click.command()
@option("--model", env="MODEL", metavar="NAME", help="This model alone.  [default: all]")
@storage_option
@runs_option
@output_format("table", "json", "csv")
def models(model: str | None, storage: str | None, runs: str, form: str) -> int:
    """The models of the registry: versions, which one is champion, what they measured on test.

    Of one model also its promotions and rollbacks.
    """
    from models.trainer import InputError
    from tuner import formats
    from tuner.registry import there_is

    with _store(storage, runs) as store:
        rows = store.models(model)
        if model is not None and not rows:
            raise InputError(f"model {model}: expected one in the registry, got none; {there_is(store, model)}")
        history = store.promotions(model) if model is not None else []
    if form == "json":
        click.echo(formats.to_json([vars(row) for row in rows]))
        return 0
    if not rows and form == "table":
        click.echo("no models yet; `tuner evaluate` makes one")
        return 0
    formats.print_table("models", *_model_rows(rows), form)
    if history and form == "table":
        told = [
            [
                formats.clock(h.at),
                h.action,
                f"{h.name}:{h.version}",
                "" if h.former is None else f"{h.name}:{h.former}",
            ]
            for h in history
        ]
        formats.print_table("promotions", ["at", "action", "champion", "instead of"], told, form)
    return 0


@click.command()
@option("--study", env="STUDY", metavar="NAME", help="The model of this study's newest evaluation.")
@option("--model", env="MODEL", metavar="NAME[:VERSION]", help="This model; without a version its newest one.")
@name_option
@storage_option
@runs_option
@artifacts_option
def promote(
    study: str | None, model: str | None, name: str | None, storage: str | None, runs: str, artifacts: str | None
) -> int:
    """Put a model into service, if it passes the gate of its study's specification.

    Exits 4 when the gate refuses, and names every rule that failed, and by how much.
    """
    from tuner import gate
    from tuner.catalog import find_name

    if (study is None) == (model is None):
        raise click.UsageError("expected either --study or --model")
    with _store(storage, runs, read_only=False) as store:
        if model is not None:
            wanted = gate.chosen_model(store, model)
        else:
            wanted = gate.model_of_study(store, find_name(store.database, str(study), name))
        try:
            champion, rules = gate.promote(store, wanted, Path(runs), artifacts)
        except gate.GateRefused as refused:
            click.echo(str(refused), err=True)
            return GATE_REFUSED
    for rule in rules:
        click.echo(f"passed  {rule.text}")
    click.echo(f"{champion.name}:{champion.version} is the champion")
    return 0


@click.command()
@option("--model", env="MODEL", required=True, metavar="NAME", help="The model whose champion steps back.")
@storage_option
@runs_option
def rollback(model: str, storage: str | None, runs: str) -> int:
    """Take back the newest promotion: the former champion serves again."""
    from models.trainer import InputError
    from tuner.registry import get_model, parse_reference

    if parse_reference(model)[1] is not None:
        raise InputError(f"--model: expected NAME alone, for its champion is what steps back; got {model!r}")
    with _store(storage, runs, read_only=False) as store:
        former = get_model(store, model)
        champion = store.rollback(former.name, former.version)
    click.echo(
        f"{champion.name}:{champion.version} is the champion again, instead of {former.name}:{former.version}"
    )
    return 0


@click.command()
@option("--model", env="MODEL", required=True, metavar="NAME[:VERSION]|PATH",
        help="A model of the registry, without a version its champion; or a folder (a path with a /).")  # fmt: skip
@option("--data", env="DATA", required=True, metavar="PATH", type=click.Path(), help="File or folder of new rows.")
@option("--out", env="OUT", metavar="FILE", type=click.Path(), help="Parquet file to write.")
@option("--newest", env="NEWEST", is_flag=True,
        help="Only the rows of the newest day; without --out they are printed and not written.")  # fmt: skip
@option("--top", env="TOP", type=click.IntRange(min=1), default=20, show_default=True,
        help="Newest rows that are printed, best first.")  # fmt: skip
@option("--device", env="DEVICE", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@option("--batch-rows", env="BATCH_ROWS", type=click.IntRange(min=1), default=65536, show_default=True,
        help="Rows that are held and scored at a time.")  # fmt: skip
@option("--force", env="FORCE", is_flag=True, help="Replace the file where it is there.")
@output_format("table", "json", "csv")
@storage_option
@runs_option
@artifacts_option
def predict(
    model: str, data: str, out: str | None, newest: bool, top: int, device: str, batch_rows: int, force: bool,
    form: str, storage: str | None, runs: str, artifacts: str | None,
) -> int:  # fmt: skip
    """Score new rows: row, keys, score, probability, decision, expected amounts and model version of each.

    Where rows are ordered in time, those of the newest day are printed, best first. Memory does not grow with a
    table's rows. Unknown categories and missing values are encoded as in training.
    """
    from tuner import prediction
    from tuner.cli import heed_signals
    from tuner.crew import choose_devices
    from tuner.output import rows_done

    if out is None and not newest:
        raise click.UsageError("expected --out FILE, or --newest to print the newest rows alone")
    heed_signals()
    folder, version = _model(model, storage, runs, artifacts)
    chosen = choose_devices(device, None)[0]
    file = None if out is None else Path(out)
    with rows_done("scored") as progress:
        written = prediction.predict(
            folder, version, Path(data), file, Path(runs) / "cache", chosen, batch_rows, force, progress, newest
        )
    if out is not None:
        told = "no threshold is certified, so nothing is decided"
        if written.n_selected is not None:
            told = f"{written.n_selected} selected"
        click.echo(f"{out}: {written.n_rows} rows by {version}, {told}", err=form != "table")
    _print_newest(written, folder, version, out, top, form)
    return 0


def _print_newest(written: Written, model: ModelFolder, version: str, out: str | None, top: int, form: str) -> None:
    """The newest rows, best first; as JSON with what was written and what the model promises."""
    from tuner import formats

    newest, certificate = written.newest, model.verdict["certificate"]
    if form == "json":
        head = {"model": version, "out": out, "n_rows": written.n_rows, "n_selected": written.n_selected}
        head |= {name: certificate[name] for name in ("status", "target", "confidence")}
        day = None
        if newest is not None:
            day = {"key": newest.time, "value": newest.value, "n_rows": newest.rows.num_rows}
            day |= {"n_selected": newest.n_selected, "rows": newest.best(top)}
        click.echo(formats.to_json({**head, "newest": day}))
    elif newest is not None and form == "csv":
        rows = newest.best(top)
        click.echo(formats.to_csv(list(rows[0]), [list(row.values()) for row in rows]), nl=False)
    elif newest is not None:
        columns = [name for name in newest.keys if name not in (newest.time, newest.eligible)]
        told = [
            [row["rank"], *(row[name] for name in columns), row["probability"], _decision(row, newest.eligible)]
            for row in newest.best(top)
        ]
        drawn = formats.table("", ["rank", *columns, "probability", "decision"], told)
        formats.print_parts([_newest_heading(newest, version, certificate), drawn])


def _newest_heading(newest: Newest, version: str, certificate: Mapping[str, Any]) -> str:
    n_rows, n_selected = newest.rows.num_rows, newest.n_selected
    if n_selected is None:
        promise = f"{version} is {certificate['status']}: no decisions are issued"
    else:
        promise = (
            f"{n_selected} selected by {version}, certified at precision {certificate['target']:g} "
            f"with confidence {certificate['confidence']:g}"
        )
    return f"{newest.time} {newest.value}: {n_rows} rows, {promise}"


def _decision(row: Mapping[str, Any], eligible: str | None) -> str:
    if eligible is not None and not row[eligible]:
        return f"not {eligible}"
    return "–" if row["decision"] is None else "yes" if row["decision"] else "no"


def _model(reference: str, storage: str | None, runs: str, artifacts: str | None) -> tuple[ModelFolder, str]:
    """A verified model folder, and how the model is called."""
    from tuner.registry import find_folder, get_model, open_folder

    if os.sep in reference:
        folder = open_folder(Path(reference))
        return folder, folder.checksum
    with _store(storage, runs) as store:
        row = get_model(store, reference)
    return find_folder(row, Path(runs), artifacts), f"{row.name}:{row.version}"


def _model_rows(rows: list[ModelRow]) -> tuple[list[str], list[list[Any]]]:
    from tuner import formats
    from tuner.gate import interval, own
    from tuner.judged_metric import LABELS, metric_of

    columns = ["model", "version", "state", "since", "metric", "on test", "low", "high", "ECE", "certificate",
               "precision", "MB", "evaluation", "checksum"]  # fmt: skip
    told = []
    for row in rows:
        by, certificate = metric_of(row.metrics), row.certificate or {}
        around = interval(row, by)
        told.append([
            row.name, row.version, row.state, formats.clock(row.changed_at), LABELS[by], own(row, by),
            around.get("low"), around.get("high"), own(row, "ece_calibrated"), certificate.get("status", "none"),
            _promised(certificate), row.size_bytes / 1e6, row.evaluation, row.checksum[:16],
        ])  # fmt: skip
    return columns, told


def _promised(certificate: Mapping[str, Any]) -> float | None:
    return certificate.get("target") if certificate.get("status") == "certified" else None


@contextmanager
def _store(storage: str | None, runs: str, read_only: bool = True) -> Iterator[Store]:
    from storage.runs import Store
    from tuner.catalog import open_database

    database = open_database(database_url(storage, runs), read_only)
    try:
        yield Store(database)
    finally:
        database.close()
