"""The commands that take a study along: into a file, and out of it into another database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.options import database_url, name_option, option, runs_option, storage_option, study_option

if TYPE_CHECKING:
    from tuner.transfer import Copied


def register(cli: click.Group) -> None:
    for command in (export, import_):
        cli.add_command(command)


@click.command()
@study_option
@name_option
@option("--out", env="OUT", metavar="FILE", type=click.Path(), help="File to write.  [default: NAME.db]")
@option("--force", env="FORCE", is_flag=True, help="Replace the file where it is there.")
@storage_option
@runs_option
def export(
    study: str, name: str | None, out: str | None, force: bool, storage: str | None, runs: str
) -> int:  # fmt: skip
    """Write a study into one file, for `tuner import`, and for Optuna, which opens it as it is.

    With its trials, measurements, evaluations, looks, certificates and models' rows; without checkpoints and model
    folders. Workers may be at it: the file shows one moment, and what was running then waits in it. Every command
    that reads takes the file as --storage sqlite:///FILE.
    """
    from tuner import transfer
    from tuner.catalog import find_name, open_database
    from tuner.cli import heed_signals
    from tuner.output import rows_done

    heed_signals()
    database = open_database(database_url(storage, runs))
    try:
        found = find_name(database, study, name)
        file = Path(out or f"{found}.db")
        with rows_done("written") as progress:
            copied = transfer.export_study(database, found, file, force, progress)
    finally:
        database.close()
    click.echo(f"{file}: {_told(copied)}, {file.stat().st_size / 1e6:.1f} MB")
    click.echo(f"not in it: checkpoints{_begun(copied)}, and model folders (RUNS/models/{found})")
    return 0


@click.command("import")
@click.argument("file", type=click.Path())
@option("--study", env="STUDY", metavar="NEW", help="The study's name here.  [default: its own]")
@storage_option
@runs_option
def import_(file: str, study: str | None, storage: str | None, runs: str) -> int:
    """Bring the study of an exported file into this database, whole or not at all.

    `tuner run` goes on from there. Trials that were under way begin anew, unless --artifacts has their checkpoints.
    """
    from storage.database import Database
    from tuner import transfer
    from tuner.cli import heed_signals
    from tuner.output import rows_done

    heed_signals()
    database = Database(database_url(storage, runs))
    try:
        with rows_done("read") as progress:
            copied = transfer.import_study(Path(file), database, study, progress)
    finally:
        database.close()
    click.echo(_told(copied))
    click.echo(f"not in the file: checkpoints{_begun(copied)}, and model folders")
    moved = [f"{was} is {now} here" for was, now in copied.certificates if was != now]
    if moved:
        click.echo(
            f"certificates on these data were here already: of those that came along number {', '.join(moved)}; "
            "each keeps what it has spent, so all together promise less than either database knew"
        )
    return 0


def _told(copied: Copied) -> str:
    counts = {
        "measurement": copied.n_measurements,
        "evaluation": copied.n_evaluations,
        "model": copied.n_models,
        "look": copied.n_looks,
        "certificate": len(copied.certificates),
    }
    told = [f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items() if n]
    return ", ".join([f"study {copied.name}: {copied.n_trials} trials ({copied.n_ended} ended)", *told])


def _begun(copied: Copied) -> str:
    if not copied.n_begun:
        return ""
    return f" ({copied.n_begun} trial{'' if copied.n_begun == 1 else 's'} under way would begin anew)"
