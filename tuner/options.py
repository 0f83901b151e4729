"""Flags that several commands share. Each has an environment variable, TUNER_ and its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Override(click.ParamType):
    """`dotted.key=value`; in the environment variable several are divided by semicolons."""

    name = "dotted.key=value"
    envvar_list_splitter = ";"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "=" not in value:
            self.fail(f"expected dotted.key=value, got {value!r}", param, ctx)
        return value.strip()


def option(*names: str, env: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, envvar=f"TUNER_{env}", show_envvar=True, **settings)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


study_option = option(
    "--study", env="STUDY", required=True, metavar="NAME", help="configs/NAME.yaml, or the path of a YAML file."
)
name_option = option("--name", env="NAME", metavar="NAME", help="Name in the database, if not the YAML's own.")
data_option = option(
    "--data", env="DATA", metavar="PATH", help="Folder or file of the data, if not the YAML's own."
)
runs_option = option(
    "--runs", env="RUNS", default="runs", show_default=True, metavar="DIR", type=click.Path(file_okay=False),
    help="Folder of checkpoints, results and prepared data.",
)  # fmt: skip
storage_option = option(
    "--storage", env="STORAGE", metavar="URL",
    help="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.  [default: sqlite:///RUNS/tuner.db]",
)  # fmt: skip


def database_url(storage: str | None, runs: str) -> str:
    """What `--storage` said, else the SQLite file in the folder of runs."""
    return storage or f"sqlite:///{runs}/tuner.db"


set_option = option(
    "--set", "overrides", env="SET", multiple=True, type=Override(), metavar="KEY=VALUE",
    help="Change one value of the YAML, by dotted key; may be repeated (in the variable: divided by ;).",
)  # fmt: skip
seed_option = option("--seed", env="SEED", type=click.IntRange(min=0), help="Seed of everything random.")
yaml_options = together(study_option, data_option, seed_option, set_option, runs_option)
machine_options = together(
    option("--devices", env="DEVICES", default="auto", show_default=True, metavar="LIST",
            help="auto (every CUDA device, else one CPU worker a core), cpu, or a list: cuda:0,cuda:1."),
    option("--workers", env="WORKERS", type=click.IntRange(min=1), help="Number of worker processes."),
)  # fmt: skip


class _Slots(click.ParamType):
    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"expected auto or a number from 1, got {value!r}", param, ctx)
        return int(value)


slots_option = option(
    "--slots", env="SLOTS", type=_Slots(), default="auto", show_default=True, metavar="N",
    help="Trials that each worker trains at once; auto: as many as are best on its device, measured (CPU: 1).",
)  # fmt: skip


def output_format(*forms: str) -> Callable[[F], F]:
    return option(
        "--format", "form", env="FORMAT", type=click.Choice(forms), default="table", show_default=True,
        help="How results are printed.",
    )  # fmt: skip


def seconds(*names: str, env: str, what: str, **settings: Any) -> Callable[[F], F]:
    return option(
        *names, env=env, type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help=what, **settings
    )


artifacts_option = option(
    "--artifacts", env="ARTIFACTS", metavar="URL",
    help="Where checkpoints and models are kept for other machines: file:///FOLDER or s3://BUCKET/PREFIX.",
)  # fmt: skip
# Checkpoints that outlive this machine, and how workers leave it; the hidden ones shorten times for tests.
service_options = together(
    artifacts_option,
    seconds("--upload-every", "upload_every_s", env="UPLOAD_EVERY", default=30.0, show_default=True,
            what="Upload a trial's checkpoint at most this often."),
    seconds("--stop-grace", "stop_grace_s", env="STOP_GRACE", default=100.0, show_default=True,
            what="Told to stop, wait this long for the next measurement."),
    seconds("--outage", "outage_s", env="OUTAGE", default=900.0, show_default=True,
            what="Give up when the database has been away this long."),
    seconds("--renew-every", "renew_every_s", env="RENEW_EVERY", default=30.0, hidden=True, what="Of leases."),
    seconds("--lease-grace", "grace_s", env="LEASE_GRACE", default=600.0, hidden=True, what="Of leases."),
)  # fmt: skip
