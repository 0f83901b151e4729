"""What a cluster needs to run `tuner worker`: a Slurm batch script, a Kubernetes Job.

Neither holds a password: the database's URL and the artifact store's credentials come from a file of the user, or
from a Secret.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from models.trainer import InputError

# After the grace time a supervisor kills what has not left for 30 s; then it ends itself.
KILL_MARGIN_S = 40
# The user and group of the image (Dockerfile).
IMAGE_ID = 1000

_RUNS, _DATA = "/app/runs", "/data"


@dataclass(frozen=True)
class _Workers:
    """Supervisors (`tuner worker`) on a cluster, each with one GPU or with some cores.

    Args:
        workers: how many of them.
        artifacts: URL of the artifact store, which all of them must reach: file:///FOLDER or s3://BUCKET/PREFIX.
        studies: serve these alone; empty: every queued study.
        name: of the job.
        gpu: one GPU each, else one worker process per core.
        cores: CPU cores of each.
        memory_gb: memory of each, in GiB.
        stop_grace_s: told to stop, a worker waits this long for its next measurement.

    Raises:
        InputError: a value that the cluster would refuse, or that would show a password.
    """

    workers: int
    artifacts: str
    studies: tuple[str, ...] = ()
    name: str = "tuner-worker"
    gpu: bool = True
    cores: int = 4
    memory_gb: int = 16
    stop_grace_s: int = 100

    def __post_init__(self) -> None:
        if not (re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", self.name) and len(self.name) <= 50):
            raise InputError(
                f"--job-name: expected lower-case letters, digits and '-', at most 50, got {self.name!r}"
            )
        for flag in ("workers", "cores", "memory-gb", "stop-grace"):
            value = getattr(self, "stop_grace_s" if flag == "stop-grace" else flag.replace("-", "_"))
            if value < 1:
                raise InputError(f"--{flag}: expected at least 1, got {value}")
        url = urlsplit(self.artifacts)
        if url.scheme not in ("file", "s3") or "@" in url.netloc or (url.scheme == "file" and url.netloc):
            raise InputError(
                "--artifacts: expected file:///FOLDER or s3://BUCKET/PREFIX without credentials, got "
                f"{url.scheme or 'no scheme'}; credentials belong in the environment"
            )

    @property
    def kill_after_s(self) -> int:
        """From the first signal to the one that nobody survives."""
        return self.stop_grace_s + KILL_MARGIN_S

    def arguments(self, data: str | None) -> list[str]:
        """Of `tuner`: on the GPU that the cluster gave (it refuses to start without one), or on its cores."""
        device = ["--devices", "cuda:0"] if self.gpu else ["--devices", "cpu", "--workers", str(self.cores)]
        found = ["--data", data] if data else []
        studies = [word for name in self.studies for word in ("--study", name)]
        grace = ["--stop-grace", str(self.stop_grace_s)]
        return ["worker", *device, *found, "--artifacts", self.artifacts, *grace, *studies]


@dataclass(frozen=True)
class SlurmOptions(_Workers):
    """Workers as a Slurm job array.

    Args:
        data: folders below which the data are found, comma-separated; None: simulated data only.
        runs: folder of checkpoints and logs, from where the job is submitted; each task has its own below it.
        time_limit: of each task, as Slurm writes it.
        partition: None: the cluster's default.
        tuner: the command, or its path in a virtual environment.
    """

    data: str | None = None
    runs: str = "runs"
    time_limit: str = "24:00:00"
    partition: str | None = None
    tuner: str = "tuner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})", self.time_limit):
            raise InputError(f"--time: expected [DAYS-]HOURS:MINUTES:SECONDS, got {self.time_limit!r}")
        if self.partition is not None and not re.fullmatch(r"[\w.,-]+", self.partition):
            raise InputError(f"--partition: expected the name of a partition, got {self.partition!r}")


def slurm(options: SlurmOptions) -> str:
    """A batch script for `sbatch`: one array task a GPU.

    At the time limit Slurm sends SIGTERM early enough for an orderly stop; a task that was preempted, or whose node
    failed, is queued again.
    """
    directives = {
        "job-name": options.name,
        "array": f"0-{options.workers - 1}",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": options.cores,
        "mem": f"{options.memory_gb}G",
        **({"gres": "gpu:1"} if options.gpu else {}),
        **({"partition": options.partition} if options.partition else {}),
        "time": options.time_limit,
        "signal": f"B:TERM@{options.kill_after_s}",
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%A_%a.log",
    }
    lines = [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in directives.items()]
    command = shlex.join([options.tuner, *options.arguments(options.data)])
    return f"""#!/bin/bash
{chr(10).join(lines)}
#
# Stop in order: scancel --batch --signal=TERM JOB, or `tuner stop --now` for a study on every machine.
# TUNER_STORAGE, and an S3 store's AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, are lines NAME='value' of a file
# that only you can read (chmod 600), so that they stand neither here nor in Slurm's records.
set -euo pipefail
set -a
source "${{TUNER_ENV_FILE:-$HOME/.tuner.env}}"
set +a
: "${{TUNER_STORAGE:?expected postgresql://USER:PASSWORD@HOST/NAME in ~/.tuner.env}}"
# A folder for each task: supervisors do not share their logs.
export TUNER_RUNS={shlex.quote(options.runs)}/task-"$SLURM_ARRAY_TASK_ID"
# exec: Slurm's signal reaches this process alone, and it has to be the supervisor.
exec {command}
"""


@dataclass(frozen=True)
class KubernetesOptions(_Workers):
    """Workers as a Kubernetes Job.

    Args:
        image: of the Dockerfile, in a registry that the nodes can reach.
        secret: name of the Secret whose key TUNER_STORAGE is the database's URL; its other keys become environment
            variables too (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
        data_claim: PersistentVolumeClaim with the data; None: simulated data only.
        artifacts_claim: PersistentVolumeClaim (ReadWriteMany) mounted at the folder of a file:// store.
    """

    image: str = "tuner"
    secret: str = "tuner"
    data_claim: str | None = None
    artifacts_claim: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        url = urlsplit(self.artifacts)
        if (url.scheme == "file") != (self.artifacts_claim is not None):
            raise InputError(
                "--artifacts-claim: expected one for a file:// store, and none for s3://, got "
                f"{self.artifacts_claim!r} for {url.scheme}://"
            )
        if url.scheme == "file" and (not url.path.startswith("/") or len(PurePosixPath(url.path).parts) < 2):
            raise InputError(f"--artifacts: expected file:///FOLDER, got {self.artifacts!r}")


def kubernetes(options: KubernetesOptions) -> str:
    """A Job for `kubectl apply`: one pod a GPU.

    The Job is indexed, so that a worker that has ended is told from one that never began. A pod that is drained or
    whose node is lost counts as failed and is replaced, hence the high limit.
    """
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": options.name, "labels": {"app.kubernetes.io/name": options.name}},
        "spec": {
            "completionMode": "Indexed",
            "completions": options.workers,
            "parallelism": options.workers,
            "backoffLimit": 1000,
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": options.name}},
                "spec": _pod(options),
            },
        },
    }
    return (
        f"# The Secret, once: kubectl create secret generic {options.secret} --from-env-file=tuner.env\n"
        "# with the line TUNER_STORAGE=postgresql://USER:PASSWORD@HOST/NAME in tuner.env (chmod 600).\n"
        f"# Stop in order: kubectl delete job {options.name}\n"
    ) + yaml.safe_dump(job, sort_keys=False)


def _pod(options: KubernetesOptions) -> dict[str, Any]:
    mounts = [("runs", {"emptyDir": {}}, _RUNS, False)]
    if options.data_claim:
        claim = {"claimName": options.data_claim, "readOnly": True}
        mounts.append(("data", {"persistentVolumeClaim": claim}, _DATA, True))
    if options.artifacts_claim:
        claim = {"claimName": options.artifacts_claim}
        mounts.append(("artifacts", {"persistentVolumeClaim": claim}, urlsplit(options.artifacts).path, False))
    return {
        "restartPolicy": "Never",
        # The grace time for the measurement that is under way, and what it takes to upload and sign off.
        "terminationGracePeriodSeconds": options.kill_after_s,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": IMAGE_ID, "runAsGroup": IMAGE_ID, "fsGroup": IMAGE_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(options, mounts)],
        "volumes": [{"name": name, **volume} for name, volume, _, _ in mounts],
    }  # fmt: skip


def _container(options: KubernetesOptions, mounts: list[tuple[str, dict[str, Any], str, bool]]) -> dict[str, Any]:
    limits = {"memory": f"{options.memory_gb}Gi", **({"nvidia.com/gpu": 1} if options.gpu else {})}
    url = {"secretKeyRef": {"name": options.secret, "key": "TUNER_STORAGE"}}
    return {
        "name": "worker",
        "image": options.image,
        "args": options.arguments(_DATA if options.data_claim else None),
        # By name, so that a Secret without it is an error and not a search in a file of the pod.
        "env": [{"name": "TUNER_STORAGE", "valueFrom": url}],
        "envFrom": [{"secretRef": {"name": options.secret}}],
        "resources": {"requests": {"cpu": options.cores, "memory": f"{options.memory_gb}Gi"}, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
            for name, _, path, read_only in mounts
        ],
    }
