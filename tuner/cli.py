"""The command line. Everything heavy is imported inside the commands, so that `--help` answers at once.

Exit codes: 0 done; 1 a run that cannot go on, a failed data check, or a bug (with its traceback); 2 bad input, one
line a fault; 3 `tuner best` where nothing is feasible; 4 `tuner promote` where the gate refuses; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuner.options import (
    artifacts_option,
    database_url,
    machine_options,
    name_option,
    option,
    output_format,
    runs_option,
    seconds,
    service_options,
    slots_option,
    storage_option,
    study_option,
    yaml_options,
)

if TYPE_CHECKING:
    from tuner.coordinator import RunOptions
    from tuner.summary import StudySummary

FAILED, REFUSED, INFEASIBLE, INTERRUPTED = 1, 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tuner", message="%(version)s")
def cli() -> None:
    """Hyperparameter search under a precision constraint, in a database that can be resumed and browsed.

    Exit codes: 0 done, 1 failed, 2 bad input, 3 nothing feasible (best), 4 gate refused (promote), 130 interrupted.
    """


@cli.command()
@yaml_options
@name_option
@storage_option
@machine_options
@slots_option
@option(
    "--n-trials",
    env="N_TRIALS",
    type=click.IntRange(min=1),
    help="Total of ended trials in the study, over all its runs; only ever raised.",
)
@seconds("--timeout", "timeout_s", env="TIMEOUT", what="Stop in order after this time; the next run goes on.")
@option("--retry-failed", env="RETRY_FAILED", is_flag=True, help="Add a new trial for each failed one.")
@service_options
@option("--launcher", env="LAUNCHER", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="Where workers run: on this machine, or one a GPU on an existing Ray cluster.")  # fmt: skip
@option("--detach", env="DETACH", is_flag=True, help="Run in the background; `tuner logs` shows what it says.")
@click.pass_obj
def run(arguments: Sequence[str], detach: bool, **given: Any) -> int:
    """Search: make the study or go on with it, until its total of trials has ended.

    Ctrl-C stops the workers at their next measurement; the same command goes on from there.
    """
    from rich.console import Console

    from tuner import background, coordinator, display

    options = run_options(**given)
    if detach:
        spec, _ = coordinator.read_spec(options)
        name = options.name or spec.study
        pid = background.detach([a for a in arguments if a != "--detach"], Path(options.runs) / name)
        click.echo(f"study {name}: process {pid}; tuner logs --study {name} -f; tuner stop --study {name}")
        return 0
    heed_signals()
    with display.Progress(Console(stderr=True)) as progress:
        summary, code = coordinator.run(options, progress)
    click.echo(display.summary_text(summary, Path(options.runs)))
    return code


@cli.command()
@yaml_options
@name_option
@storage_option
@machine_options
def check(**given: Any) -> int:
    """Look at specification, device, data and database; train nothing and write nothing.

    Data are prepared as for a run: in the cache of --runs where there is one, else in a temporary folder.
    """
    from tuner.check import check as findings

    code = 0
    for finding in findings(run_options(**given)):
        if finding.ok:
            click.echo(f"OK      {finding.what}: {finding.detail}")
        for fault in finding.faults:
            code = REFUSED
            click.echo(f"FAULT   {finding.what}: {fault}", err=True)
    return code


@cli.command()
@study_option
@name_option
@storage_option
@runs_option
@output_format("table", "json", "csv")
def show(study: str, name: str | None, storage: str | None, runs: str, form: str) -> int:
    """The study: its trials with their attempts, its workers, its best (CSV: the trials)."""
    from tuner import display, formats

    summary = _summary(study, name, storage, runs)
    if form == "json":
        click.echo(display.show_json(summary))
    elif form == "csv":
        click.echo(formats.to_csv(*display.trial_rows(summary)), nl=False)
    else:
        formats.print_parts(display.study_tables(summary))
    return 0


@cli.command()
@study_option
@name_option
@storage_option
@runs_option
@output_format("table", "json")
def best(study: str, name: str | None, storage: str | None, runs: str, form: str) -> int:
    """The best trial: config, metrics, threshold, where its model lies.

    Exits 3 when no trial is feasible, and shows the nearest.
    """
    from tuner import display, formats

    summary = _summary(study, name, storage, runs)
    if form == "json":
        click.echo(formats.to_json(display.best_json(summary, Path(runs))))
    else:
        click.echo(display.best_lines(summary, Path(runs)))
    return 0 if summary.best is not None else INFEASIBLE


@cli.command()
@storage_option
@runs_option
@output_format("table", "json", "csv")
def studies(storage: str | None, runs: str, form: str) -> int:
    """The studies of a database."""
    from tuner import formats
    from tuner.catalog import open_database
    from tuner.display import study_rows

    database = open_database(database_url(storage, runs))
    try:
        columns, rows = study_rows(database)
    finally:
        database.close()
    formats.print_table("studies", columns, rows, form)
    return 0


@cli.command()
@study_option
@name_option
@storage_option
@runs_option
@artifacts_option
@option("--yes", env="YES", is_flag=True, help="Really delete; without it nothing happens.")
def delete(
    study: str, name: str | None, storage: str | None, runs: str, artifacts: str | None, yes: bool
) -> int:  # fmt: skip
    """Delete a study and its evaluations: rows, Optuna's, folders of runs, artifacts.

    Refused while a worker is at it. Its models, and what was seen of its data, stay known.
    """
    from tuner import catalog

    database = catalog.open_database(database_url(storage, runs), read_only=False)
    try:
        found = catalog.find_name(database, study, name)
        if not yes:
            also = f" and what {artifacts} has of it" if artifacts else ""
            raise click.UsageError(
                f"study {found!r} would be deleted with {Path(runs) / found}{also}; add --yes to do it"
            )
        removed = catalog.delete(database, found, Path(runs), artifacts)
    finally:
        database.close()
    click.echo(f"deleted study {found}" + (f" and {Path(runs) / found}" if removed else ""))
    return 0


@cli.group()
def data() -> None:
    """Simulate data, or describe those of a study."""


@data.command()
@click.argument("kind", type=click.Choice(["kuailive"]))
@option("--out", env="OUT", required=True, metavar="DIR", type=click.Path(), help="A new or empty folder.")
@option("--scale", env="SCALE", type=float, default=0.02, show_default=True, help="1 = as many rows as published.")
@option("--seed", env="SEED", type=int, default=42, show_default=True, help="Seed of everything random.")
@output_format("table", "json", "csv")
def simulate(kind: str, out: str, scale: float, seed: int, form: str) -> int:
    """Write simulated files with the schema, the quirks and the published statistics of the real ones."""
    from models.gift import simulate as simulator
    from tuner import formats

    rows = simulator.simulate(Path(out), scale, seed)
    formats.print_table(f"simulated {kind} in {out}", ["file", "rows"], list(rows.items()), form)
    return 0


@data.command()
@yaml_options
@output_format("table", "json", "csv")
def describe(form: str, **given: Any) -> int:
    """Rows, base rates, splits, date ranges, orphans; checks for leaks. Exits 1 when a check fails."""
    from tuner import coordinator, display, formats

    options = run_options(**given)
    spec, trainer = coordinator.read_spec(options)
    described = trainer.describe(coordinator.data_spec(spec, trainer, options))
    if form == "json":
        click.echo(formats.to_json(described))
    elif form == "csv":
        click.echo(formats.to_csv(*display.describe_rows(described)), nl=False)
    else:
        formats.print_parts(display.describe_tables(described))
    return 0 if all(found["ok"] for found in described["checks"]) else FAILED


@cli.command()
@storage_option
@runs_option
@option("--host", env="HOST", default="127.0.0.1", show_default=True,
        help="Address to listen on; one that others can reach needs TUNER_DASHBOARD_PASSWORD.")  # fmt: skip
@option("--port", env="PORT", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@option("--allow-edit", env="ALLOW_EDIT", is_flag=True, help="Let the browser change and delete studies.")
def dashboard(storage: str | None, runs: str, host: str, port: int, allow_edit: bool) -> int:
    """Show every study of the database in a browser, until Ctrl-C.

    With a password in TUNER_DASHBOARD_PASSWORD nothing is readable without logging in.
    """
    from tuner.optuna_dashboard import serve

    heed_signals()
    serve(
        database_url(storage, runs), host, port, lambda url: click.echo(f"dashboard: {url} (Ctrl-C stops it)"),
        allow_edit, os.environ.get("TUNER_DASHBOARD_PASSWORD"),
    )  # fmt: skip
    return 0


def heed_signals() -> None:
    """Let Ctrl-C and SIGTERM interrupt this process, from its first moment on.

    A container's first process does not hear SIGTERM by default, and what a script starts in the background is
    born deaf to Ctrl-C.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def run_options(storage: str | None = None, runs: str = "runs", **given: Any) -> RunOptions:
    from tuner.coordinator import RunOptions

    return RunOptions(storage=database_url(storage, runs), runs=runs, **given)


def _summary(study: str, name: str | None, storage: str | None, runs: str) -> StudySummary:
    from tuner.catalog import open_database, open_study
    from tuner.summary import summarize

    database = open_database(database_url(storage, runs))
    try:
        return summarize(open_study(database, study, name))
    finally:
        database.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what is expected to go wrong is told in one line a fault."""
    from tuner import logs

    atexit.register(gc.freeze)  # the interpreter would look for garbage before it ends, for up to a second
    logs.configure_console()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return cli.main(given, prog_name="tuner", standalone_mode=False, obj=given) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return REFUSED
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "tuner"
        click.echo(f"{path}: {error.format_message()} (see {path} --help)".replace("\n", " "), err=True)
        return REFUSED
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        code = _expected(error)
        if code is None:
            raise
        click.echo(str(error), err=True)
        return code


def _expected(error: Exception) -> int | None:
    """The exit code of an error that is no bug; None for a bug."""
    from models.trainer import DiskError, InputError
    from storage.database import StorageError

    if isinstance(error, (InputError, DiskError, StorageError)):
        return REFUSED
    crew = sys.modules.get("tuner.crew")
    return FAILED if crew is not None and isinstance(error, crew.RunFailed) else None


from tuner import cli_registry, cli_service, cli_transfer, cli_verdict  # noqa: E402  (their commands need `cli`)

for _part in (cli_service, cli_verdict, cli_registry, cli_transfer):
    _part.register(cli)
