"""`tuner manifest`: what a cluster needs to run `tuner worker`, on standard output."""

from __future__ import annotations

from typing import Any

import click

from tuner.options import option, together

_workers = together(
    option("--workers", env="WORKERS", type=click.IntRange(min=1), default=1, show_default=True,
           help="Number of tasks or pods, each with one GPU."),
    option("--artifacts", env="ARTIFACTS", required=True, metavar="URL",
           help="Artifact store that all of them reach: file:///FOLDER or s3://BUCKET/PREFIX."),
    option("--study", "studies", env="STUDY", multiple=True, metavar="NAME",
           help="Serve this queued study alone; may be repeated.  [default: every queued study]"),
    option("--job-name", "name", env="JOB_NAME", default="tuner-worker", show_default=True, help="Of the job."),
    option("--gpu/--cpu", env="GPU", default=True, show_default=True,
           help="One GPU each, or one worker process per core."),
    option("--cores", env="CORES", type=click.IntRange(min=1), default=4, show_default=True, help="Of each."),
    option("--memory-gb", env="MEMORY_GB", type=click.IntRange(min=1), default=16, show_default=True,
           help="Of each, in GiB."),
    option("--stop-grace", "stop_grace_s", env="STOP_GRACE", type=click.IntRange(min=1), default=100,
           show_default=True, metavar="SECONDS", help="Told to stop, wait this long for the next measurement."),
)  # fmt: skip


@click.group()
def manifest() -> None:
    """Print what a cluster needs to run `tuner worker`."""


@manifest.command("slurm")
@_workers
@option("--data", env="DATA", metavar="ROOT[,ROOT]",
        help="Folders below which the studies' data are found.  [default: simulated data only]")  # fmt: skip
@option("--runs", env="RUNS", default="runs", show_default=True, metavar="DIR",
        help="Folder of checkpoints and logs, from where the job is submitted.")  # fmt: skip
@option("--time", "time_limit", env="TIME", default="24:00:00", show_default=True, help="Limit of each task.")
@option("--partition", env="PARTITION", help="Of the cluster.  [default: the cluster's own]")
@option("--tuner", env="COMMAND", default="tuner", show_default=True, metavar="PATH", help="The command on a node.")
def slurm_script(**given: Any) -> int:
    """A batch script for sbatch: an array of tasks, one per GPU."""
    from tuner.manifest import SlurmOptions, slurm

    click.echo(slurm(SlurmOptions(**given)), nl=False)
    return 0


@manifest.command("k8s")
@_workers
@option("--image", env="IMAGE", default="tuner", show_default=True, help="Of the Dockerfile, in your registry.")
@option("--secret", env="SECRET", default="tuner", show_default=True,
        help="Secret with the key TUNER_STORAGE, and the artifact store's credentials.")  # fmt: skip
@option("--data-claim", env="DATA_CLAIM", metavar="NAME",
        help="Volume claim with the data.  [default: simulated data only]")  # fmt: skip
@option("--artifacts-claim", env="ARTIFACTS_CLAIM", metavar="NAME",
        help="Volume claim (ReadWriteMany) of a file:// artifact store.")  # fmt: skip
def kubernetes_job(**given: Any) -> int:
    """A Kubernetes Job: one pod per GPU."""
    from tuner.manifest import KubernetesOptions, kubernetes

    click.echo(kubernetes(KubernetesOptions(**given)), nl=False)
    return 0
