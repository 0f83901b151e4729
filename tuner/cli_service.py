"""The commands of the service: the queue, workers anywhere, what they are at, and the database under them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tuner.cli_manifest import manifest
from tuner.options import (
    artifacts_option,
    data_option,
    database_url,
    machine_options,
    name_option,
    option,
    output_format,
    runs_option,
    seed_option,
    service_options,
    set_option,
    slots_option,
    storage_option,
    study_option,
)


def register(cli: click.Group) -> None:
    for command in (submit, worker, status, stop, logs, manifest, db):
        cli.add_command(command)


@click.command()
@study_option
@data_option
@seed_option
@set_option
@runs_option
@name_option
@storage_option
@option("--n-trials", env="N_TRIALS", type=click.IntRange(min=1),
        help="Total of ended trials in the study, over all workers; only ever raised.")  # fmt: skip
@artifacts_option
def submit(storage: str | None, runs: str, **given: Any) -> int:
    """Put a study and its budget into the database's queue, for `tuner worker` on any machine.

    The data are read here to know them by their content; only hashes and the specification travel.
    """
    from rich.console import Console

    from tuner import display, service
    from tuner.coordinator import RunOptions

    options = RunOptions(storage=database_url(storage, runs), runs=runs, **given)
    with display.Progress(Console(stderr=True)) as progress:
        row = service.submit(options, progress)
    click.echo(f"study {row.name}: queued, {row.total} trials in all; tuner status shows how it goes")
    return 0


@click.command()
@option("--study", "studies", env="STUDY", multiple=True, metavar="NAME",
        help="Serve this queued study alone; may be repeated.  [default: every queued study]")  # fmt: skip
@option("--data", "roots", env="DATA", default="data", show_default=True, metavar="ROOT[,ROOT]",
        help="Folders below which the studies' data are found, by content.")  # fmt: skip
@storage_option
@runs_option
@machine_options
@slots_option
@service_options
@option("--metrics-port", env="METRICS_PORT", type=click.IntRange(1, 65535),
        help="Serve Prometheus metrics on this port of 127.0.0.1.")  # fmt: skip
def worker(storage: str | None, runs: str, roots: str, studies: tuple[str, ...], **given: Any) -> int:
    """Serve queued studies on this machine's devices, one process each; wait when there are none.

    Ctrl-C or SIGTERM: workers stop at their next measurement, their trials go back in the queue; twice: at once.
    """
    from tuner import logs, service
    from tuner.cli import heed_signals

    heed_signals()
    if not sys.stderr.isatty():
        logs.configure()  # nobody watches: every event is worth its line
    folders = tuple(root.strip() for root in roots.split(",") if root.strip())
    options = service.ServiceOptions(
        storage=database_url(storage, runs), runs=runs, roots=folders, studies=studies, **given
    )
    service.serve(options, lambda line: click.echo(line, err=True))
    return 0


@click.command()
@storage_option
@runs_option
@option("--watch", env="WATCH", is_flag=True, help="Stay and show it live, until Ctrl-C.")
@output_format("table", "json")
def status(storage: str | None, runs: str, watch: bool, form: str) -> int:
    """Workers, devices and leases; of every study its state, trials an hour and time to go; the queue."""
    from tuner import formats
    from tuner import status as service_status
    from tuner.catalog import open_database

    database = open_database(database_url(storage, runs))
    try:
        if watch:
            service_status.watch(database)
            return 0
        found = service_status.read(database)
    finally:
        database.close()
    if form == "json":
        click.echo(formats.to_json(service_status.as_json(found)))
    else:
        formats.print_parts(service_status.tables(found))
    return 0


@click.command()
@study_option
@name_option
@storage_option
@runs_option
@option("--now", env="NOW", is_flag=True, help="Stop running trials at their next measurement and re-queue them.")
def stop(study: str, name: str | None, storage: str | None, runs: str, now: bool) -> int:
    """Take a study out of the queue: running trials finish, none is begun. `submit` or `run` goes on with it."""
    from tuner import service

    found, running = service.stop(database_url(storage, runs), study, name, now)
    fate = "stop at their next measurement" if now else "finish"
    click.echo(f"study {found}: stopped" + (f"; {running} running trials {fate}" if running else ""))
    return 0


@click.command()
@option("--study", env="STUDY", metavar="NAME", help="Of `tuner run` of this study.  [default: of `tuner worker`]")
@name_option
@runs_option
@option("-f", "--follow", env="FOLLOW", is_flag=True, help="Go on with what comes, until Ctrl-C.")
def logs(study: str | None, name: str | None, runs: str, follow: bool) -> int:
    """What the processes of this machine wrote: all their log files, in the order of time."""
    from models.trainer import InputError
    from tuner.logs import merged
    from tuner.spec_checks import load_spec

    folder = Path(runs) / "worker-logs"
    if study is not None or name is not None:
        chosen = name or str(study)
        if name is None and not (Path(runs) / chosen).is_dir():
            chosen = load_spec(chosen).study
        folder = Path(runs) / chosen / "logs"
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of logs, got none; name the right --study and --runs")
    for line in merged(folder, follow):
        click.echo(line)
    return 0


@click.group()
def db() -> None:
    """The tables of the database."""


@db.command()
@storage_option
@runs_option
def upgrade(storage: str | None, runs: str) -> int:
    """Bring the tables to this version (making them where there are none). Stop every worker first."""
    from tuner.upgrade import upgrade as upgraded

    for line in upgraded(database_url(storage, runs)):
        click.echo(line)
    return 0


@db.command("check")
@storage_option
@runs_option
def check_tables(storage: str | None, runs: str) -> int:
    """Say which versions the tables have; exits 2 when they are not this package's."""
    from tuner.upgrade import check

    for line in check(database_url(storage, runs)):
        click.echo(line)
    return 0
