"""What an operator deploys: compose file, images, manifests, and the page that tells how."""

from __future__ import annotations

import configparser
import copy
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
import venv
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from models.trainer import InputError
from tuner import manifest
from tuner.cli import cli
from tuner.cli_manifest import manifest as manifest_group
from tuner.manifest import KubernetesOptions, SlurmOptions, kubernetes, slurm

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
PASSWORD = "p@s\"s/w:%o $rd'"


# --- docker-compose.yml ------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE)


def services(profile: str | None = None) -> dict[str, dict[str, Any]]:
    """Those that are started, by default or with a profile."""
    return {n: s for n, s in compose()["services"].items() if s.get("profiles", [None]) == [profile]}


def check_compose(document: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(json.loads((ASSETS / "compose-spec.json").read_text())).validate(document)


def test_the_compose_file_is_one() -> None:
    check_compose(compose())
    wrong = copy.deepcopy(compose())
    wrong["services"]["worker"]["stop_grace"] = "2m"
    with pytest.raises(jsonschema.ValidationError, match="stop_grace"):
        check_compose(wrong)


def test_what_is_started() -> None:
    assert list(services()) == ["database", "migrate", "dashboard", "worker"]
    assert list(services("gpu")) == ["worker-gpu"]
    assert list(services("pgbouncer")) == ["pgbouncer"]
    gpu = services("gpu")["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_tables_are_made_before_anybody_reads_them() -> None:
    found = compose()["services"]
    assert found["migrate"]["command"] == ["db", "upgrade"]
    assert found["migrate"]["restart"] == "no"
    assert found["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    for name in ("dashboard", "worker", "worker-gpu"):
        assert found[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}


@pytest.mark.parametrize("name", ["migrate", "dashboard", "worker", "worker-gpu"])
def test_containers_start_commands_that_there_are(name: str) -> None:
    service = compose()["services"][name]
    assert service["image"] == "tuner"
    parse(service["command"])


def test_passwords_come_from_the_environment_alone() -> None:
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable:
                # Required: without it nothing is started.
                assert VARIABLE.fullmatch(value)[2] == "?", (name, variable)
            elif value is not None:
                assert not re.search(r"//[^/]*:[^/]*@", value), (name, variable)


def test_nothing_but_this_machine_is_listened_to() -> None:
    published = {n: s["ports"] for n, s in compose()["services"].items() if "ports" in s}
    assert set(published) == {"database", "dashboard", "pgbouncer"}
    for ports in published.values():
        for port in ports:
            assert VARIABLE.sub(lambda match: match[3], port).startswith("127.0.0.1:"), port
    # Inside its container the dashboard has to listen to all: so it asks for a password.
    dashboard = compose()["services"]["dashboard"]
    assert dashboard["command"][1:3] == ["--host", "0.0.0.0"]
    assert "TUNER_DASHBOARD_PASSWORD" in dashboard["environment"]
    assert dashboard["ports"][0].startswith("127.0.0.1:")


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_workers_are_given_the_time_to_stop_in_order(name: str) -> None:
    service = compose()["services"][name]
    grace_s = float(service["environment"]["TUNER_STOP_GRACE"])
    assert service["stop_grace_period"] == f"{grace_s + manifest.KILL_MARGIN_S:.0f}s"
    # The supervisor's own deadline comes first: it can still say what it killed.
    from tuner.crew import LEAVING_S

    assert manifest.KILL_MARGIN_S > LEAVING_S


def test_services_that_stay_say_how_they_are() -> None:
    for name, service in compose()["services"].items():
        assert ("healthcheck" in service) == (name != "migrate"), name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert name == "database" or service["cap_drop"] == ["ALL"]  # that one starts as root and steps down


def test_every_volume_is_used_and_every_used_one_is_there() -> None:
    mounted = {
        VARIABLE.sub(lambda match: match[3], volume).split(":")[0]
        for service in compose()["services"].values()
        for volume in service.get("volumes", [])
    }
    assert mounted - {"./data"} == set(compose()["volumes"])


# --- images ------------------------------------------------------------------------------------------------------


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile; continued lines are one."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def stub(folder: Path, name: str, body: str = "") -> None:
    """A command of this name that writes down how it was called."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {shlex.quote(str(folder / "calls"))}\n{body}\n')
    path.chmod(0o755)


class Image:
    """An image built in a scratch folder: COPY copies, RUN runs below it, and what needs root is written down."""

    def __init__(self, folder: Path, context: Path, stubs: dict[str, str]) -> None:
        self.folder = folder
        self.context = context
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, body in stubs.items():
            stub(self.bin, name, body)
        self.workdir = folder

    def build(self) -> None:
        for instruction, rest in instructions(self.context / "Dockerfile"):
            if instruction == "WORKDIR":
                self.workdir = self.folder / rest.strip("/")
                self.workdir.mkdir(parents=True)
            elif instruction == "COPY":
                *sources, target = rest.split()
                base = self.folder if target.startswith("/") else self.workdir
                for source in sources:
                    self.copy(self.context / source, base / target.strip("/"))
            elif instruction == "RUN":
                # Absolute paths of the image lie below the folder.
                command = re.sub(r"(?<=\s)/(?=\w)", f"{self.folder}/", rest)
                environment = {**os.environ, "PATH": f"{self.bin}:/usr/bin:/bin"}
                subprocess.run(["bash", "-euc", command], cwd=self.workdir, env=environment, check=True)

    def copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)  # files are copied into folders only
            shutil.copy(source, target)

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.bin / "calls").read_text().splitlines()]


def test_the_image_is_built_from_its_run_lines(tmp_path: Path) -> None:
    """pip really installs, in an environment of its own; the packages of the lock are those of this one."""
    scratch = tmp_path / "venv"
    venv.create(scratch, with_pip=False)
    packages = next(scratch.glob("lib/python*/site-packages"))
    (packages / "locked.pth").write_text(str(Path(pytest.__file__).parent.parent))
    pip = f'PIP_NO_INDEX=1 exec {scratch}/bin/python -m pip "$@"'
    root = tmp_path / "root"
    root.mkdir()
    image = Image(root, ROOT, {"pip": pip, "groupadd": "", "useradd": "", "chown": ""})
    image.build()

    installed = subprocess.run(
        [scratch / "bin" / "tuner", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", installed.stdout)
    where = subprocess.run(
        [scratch / "bin" / "python", "-c", "import tuner.cli, models, storage; print(tuner.cli.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(root / "app" / "tuner" / "cli.py")
    assert (root / "app" / "configs" / "mvp13.yaml").is_file()
    calls = image.calls
    assert ["groupadd", "--gid", "1000", "tuner"] in calls
    assert ["useradd", "--create-home", "--uid", "1000", "--gid", "tuner", "tuner"] in calls
    # What a volume is mounted on belongs to the user, except for the data.
    assert ["chown", "tuner:tuner", "runs", str(root / "artifacts")] in calls
    assert (root / "artifacts").is_dir()
    assert (root / "app" / "data").is_dir()
    installs = [call[1:] for call in calls if call[0] == "pip"]
    assert all(call[0] == "install" and "--no-cache-dir" in call for call in installs)
    assert sum("--constraint" in call for call in installs) == 2


def test_the_image_runs_as_the_user_of_the_manifests() -> None:
    said = dict(instructions(ROOT / "Dockerfile"))
    assert said["USER"] == f"{manifest.IMAGE_ID}:{manifest.IMAGE_ID}"
    assert said["ENTRYPOINT"] == '["tuner"]'
    parse(json.loads(said["CMD"]))


def test_what_the_image_copies_is_in_the_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    copied = [rest.split()[:-1] for instruction, rest in instructions(ROOT / "Dockerfile") if instruction == "COPY"]
    for name in [name for names in copied for name in names]:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_the_pooler_is_built_from_its_run_lines(tmp_path: Path) -> None:
    image = Image(tmp_path, ROOT / "docker" / "pgbouncer", {"apt-get": "", "rm": ""})
    image.build()
    assert ["apt-get", "update"] in image.calls
    install = next(call for call in image.calls if call[:2] == ["apt-get", "install"])
    assert install[2:] == ["--yes", "--no-install-recommends", "pgbouncer", "postgresql-client"]
    assert {path.name for path in (tmp_path / "etc" / "pgbouncer").iterdir()} == {"pgbouncer.ini", "start.sh"}
    assert dict(instructions(image.context / "Dockerfile"))["USER"] == "postgres"


def test_the_pooler_keeps_sessions() -> None:
    parser = configparser.ConfigParser(inline_comment_prefixes=None)
    parser.read(ROOT / "docker" / "pgbouncer" / "pgbouncer.ini")
    settings = parser["pgbouncer"]
    assert settings["pool_mode"] == "session"
    # The port of the database, so that its host name alone changes.
    assert settings["listen_port"] == "5432"
    limit = compose()["services"]["database"]["command"][-1]
    assert int(settings["default_pool_size"]) < int(limit.removeprefix("max_connections="))
    assert parser["databases"]["tuner"].startswith("host=database ")


def test_the_pooler_learns_the_password_from_the_environment(tmp_path: Path) -> None:
    stub(tmp_path, "pgbouncer")
    script = (ROOT / "docker" / "pgbouncer" / "start.sh").read_text()
    users = configparser.ConfigParser()
    users.read(ROOT / "docker" / "pgbouncer" / "pgbouncer.ini")
    path = users["pgbouncer"]["auth_file"]
    assert path in script
    script = script.replace(path, str(tmp_path / "users"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TUNER_PASSWORD": PASSWORD}
    subprocess.run(["sh", "-c", script], env=environment, check=True)
    assert (tmp_path / "users").read_text() == '"tuner" "p@s""s/w:%o $rd\'"\n'
    assert stat.S_IMODE((tmp_path / "users").stat().st_mode) == 0o600
    assert (tmp_path / "calls").read_text() == "pgbouncer /etc/pgbouncer/pgbouncer.ini\n"
    del environment["TUNER_PASSWORD"]
    refused = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "set TUNER_PASSWORD" in refused.stderr


# --- manifests ---------------------------------------------------------------------------------------------------


SLURM = SlurmOptions(8, "s3://tuner/prod", studies=("mvp13",), data="/data/kuailive")
JOB = KubernetesOptions(8, "file:///artifacts", data_claim="kuailive", artifacts_claim="tuner-artifacts")


def directives(script: str) -> dict[str, str]:
    """The #SBATCH lines, which count only before the first command."""
    head = script.partition("\nset ")[0].splitlines()
    assert head[0] == "#!/bin/bash"
    assert "#SBATCH" not in script.partition("\nset ")[2]
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in head if line.startswith("#SBATCH")]
    return {key: value for key, _, value in pairs}


def test_slurm_directives() -> None:
    assert directives(slurm(SLURM)) == {
        "job-name": "tuner-worker", "array": "0-7", "nodes": "1", "ntasks": "1", "cpus-per-task": "4",
        "mem": "16G", "gres": "gpu:1", "time": "24:00:00", "signal": "B:TERM@140", "requeue": "",
        "open-mode": "append", "output": "%x-%A_%a.log",
    }  # fmt: skip
    changed = SlurmOptions(1, "s3://b/p", gpu=False, partition="short", time_limit="2-00:00:00", stop_grace_s=10)
    found = directives(slurm(changed))
    assert "gres" not in found
    assert (found["array"], found["partition"], found["time"]) == ("0-0", "short", "2-00:00:00")
    assert found["signal"] == "B:TERM@50"


def test_the_slurm_script_is_bash_and_holds_no_password() -> None:
    script = slurm(SlurmOptions(2, "file:///shared/o'ne two", data="/data/a b", tuner="/opt/x y/bin/tuner"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "PASSWORD@HOST" in script
    assert not re.search(r"^export TUNER_STORAGE|TUNER_STORAGE=", script, flags=re.M)


class Task:
    """The script as Slurm runs it, with a `tuner` that says what it was given and waits."""

    def __init__(self, folder: Path, script: str, storage: str | None) -> None:
        self.folder = folder
        stub(folder, "tuner", "env > env.txt; echo $$ > pid; exec sleep 60")
        if storage is not None:
            (folder / ".tuner.env").write_text(f"TUNER_STORAGE={shlex.quote(storage)}\n")
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "SLURM_ARRAY_TASK_ID": "5"}
        self.process = subprocess.Popen(
            ["bash", "-s"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folder, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(script)
        self.process.stdin.close()
        self.process.stdin = None

    def wait_for(self, name: str) -> str:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists() or not (self.folder / name).read_text().endswith("\n"):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return (self.folder / name).read_text()


def test_slurms_signal_reaches_the_supervisor(tmp_path: Path) -> None:
    storage = f"postgresql://tuner:{PASSWORD}@db/tuner"
    task = Task(tmp_path, slurm(SLURM), storage)
    try:
        # Slurm signals the process that it started, and nobody else.
        assert int(task.wait_for("pid")) == task.process.pid
        found = dict(line.partition("=")[::2] for line in (tmp_path / "env.txt").read_text().splitlines())
        assert found["TUNER_STORAGE"] == storage
        assert found["TUNER_RUNS"] == "runs/task-5"
    finally:
        task.process.send_signal(signal.SIGTERM)
        task.process.communicate(timeout=20)
    assert task.process.returncode == -signal.SIGTERM
    call = shlex.split((tmp_path / "calls").read_text())
    assert call[1:] == SLURM.arguments("/data/kuailive")


def test_without_a_database_the_task_ends_and_says_so(tmp_path: Path) -> None:
    (tmp_path / ".tuner.env").write_text("")
    task = Task(tmp_path, slurm(SLURM), None)
    _, errors = task.process.communicate(timeout=20)
    assert task.process.returncode != 0
    assert "TUNER_STORAGE" in errors
    assert not (tmp_path / "calls").exists()


def check_job(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(json.loads((ASSETS / "kubernetes-job.json").read_text())).validate(document)


@pytest.mark.parametrize("options", [JOB, KubernetesOptions(1, "s3://b/p", gpu=False)], ids=["gpu", "cpu"])
def test_the_kubernetes_job_is_one(options: KubernetesOptions) -> None:
    job = yaml.safe_load(kubernetes(options))
    check_job(job)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 100
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        check_job(job)


def test_what_a_pod_is_given() -> None:
    job = yaml.safe_load(kubernetes(JOB))
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (
        8,
        8,
        "Indexed",
    )
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["args"] == JOB.arguments("/data")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["terminationGracePeriodSeconds"] == JOB.stop_grace_s + manifest.KILL_MARGIN_S
    secret = {"secretKeyRef": {"name": "tuner", "key": "TUNER_STORAGE"}}
    assert container["env"] == [{"name": "TUNER_STORAGE", "valueFrom": secret}]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == manifest.IMAGE_ID
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"runs": "/app/runs", "data": "/data", "artifacts": "/artifacts"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_a_pod_without_a_gpu_has_a_process_per_core() -> None:
    pod = yaml.safe_load(kubernetes(KubernetesOptions(1, "s3://b/p", gpu=False, cores=3)))["spec"]["template"][
        "spec"
    ]
    assert pod["containers"][0]["args"][1:5] == ["--devices", "cpu", "--workers", "3"]
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert [volume["name"] for volume in pod["volumes"]] == ["runs"]


@pytest.mark.parametrize("options", [SLURM, SlurmOptions(1, "s3://b/p", gpu=False), JOB], ids=["gpu", "cpu", "k8s"])
def test_manifests_start_a_command_that_there_is(options: SlurmOptions | KubernetesOptions) -> None:
    parse(options.arguments("/data"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workers": 0}, "--workers: expected at least 1, got 0"),
        ({"stop_grace_s": 0}, "--stop-grace"),
        ({"name": "Tuner_1"}, "--job-name"),
        ({"artifacts": "/shared"}, "--artifacts"),
        ({"artifacts": "file://shared"}, "--artifacts"),
    ],
)
def test_what_a_cluster_would_refuse(given: dict[str, Any], told: str) -> None:
    for kind in (SlurmOptions, KubernetesOptions):
        with pytest.raises(InputError, match=told):
            kind(**{"workers": 1, "artifacts": "s3://b/p", **given})


def test_credentials_in_the_url_are_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match="without credentials") as refused:
        SlurmOptions(1, "s3://key:hidden@bucket/prefix")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("time_limit", ["tomorrow", "1:2:3:4", ""])
def test_times_that_slurm_does_not_know(time_limit: str) -> None:
    with pytest.raises(InputError, match="--time"):
        SlurmOptions(1, "s3://b/p", time_limit=time_limit)


def test_a_partition_is_one_word() -> None:
    with pytest.raises(InputError, match="--partition"):
        SlurmOptions(1, "s3://b/p", partition="gpu\n#SBATCH --uid=0")


@pytest.mark.parametrize(("artifacts", "claim"), [("file:///artifacts", None), ("s3://b/p", "claim")])
def test_a_folder_needs_a_claim_and_a_bucket_none(artifacts: str, claim: str | None) -> None:
    with pytest.raises(InputError, match="--artifacts-claim"):
        KubernetesOptions(1, artifacts, artifacts_claim=claim)


# --- docs --------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> None:
    """Have the command line parse it, without running it."""
    command: click.Command = cli
    rest = list(arguments)
    context = cli.make_context("tuner", list(rest), resilient_parsing=rest == ["--help"])
    while isinstance(command, click.Group) and rest != ["--help"]:
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, name
        command = found
        context = click.Context(command, parent=context, info_name=name)
    if not isinstance(command, click.Group):
        command.make_context(command.name, rest, parent=context.parent)


def shell_lines() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", OPERATIONS, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def ours(words: list[str]) -> bool:
    """Whether `tuner` in this line is our command: typed, in the worker's container, or as the image's entry."""
    return "tuner" in words and (words[:2] != ["docker", "compose"] or words[2:4] == ["exec", "worker"])


TUNER = [words[words.index("tuner") + 1 :] for words in shell_lines() if ours(words)]


@pytest.mark.parametrize("arguments", TUNER, ids=" ".join)
def test_the_commands_of_the_operations_page_parse(arguments: list[str]) -> None:
    end = next((i for i, word in enumerate(arguments) if word in (">", "&&", "|", ";")), len(arguments))
    parse(arguments[:end])


def test_the_page_names_the_variables_of_the_compose_file() -> None:
    assert len(TUNER) > 10
    for name in {match[0] for match in VARIABLE.findall(COMPOSE)}:
        assert name in OPERATIONS, name


def test_the_examples_are_what_the_page_says_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    examples = {}
    for arguments in TUNER:
        if arguments[0] == "manifest":
            assert arguments[-2] == ">"
            manifest_group.main(arguments[1:-2], prog_name="tuner manifest", standalone_mode=False)
            examples[arguments[-1]] = capsys.readouterr().out
    assert {Path(name).suffix for name in examples} == {".sbatch", ".yaml"}
    for name, text in examples.items():
        assert (ROOT / "docs" / "deploy" / name).read_text() == text, name


def test_files_that_the_page_names_are_there() -> None:
    names = re.findall(r"`((?:docs|docker|tuner|storage|models|tests|configs)/[\w./-]+)`", OPERATIONS)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name
