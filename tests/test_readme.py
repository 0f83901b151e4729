"""What the README says a person can type: every command parses, and the cheap ones run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml

from tuner.cli import cli, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


TUNER = [command[1:] for command in commands() if command[0] == "tuner"]
MAKE = [target for command in commands() if command[0] == "make" for target in command[1:]]


def test_the_readme_has_commands() -> None:
    assert len(TUNER) >= 12
    assert {"run", "test", "install", "lint"} <= set(MAKE)
    assert all(command[0] in ("tuner", "make") for command in commands())


@pytest.mark.parametrize("arguments", TUNER, ids=" ".join)
def test_every_tuner_command_parses(arguments: list[str]) -> None:
    command: click.Command = cli
    context = cli.make_context("tuner", list(arguments), resilient_parsing=False)
    rest = list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, name
        command = found
        context = click.Context(command, parent=context, info_name=name)
    command.make_context(command.name, rest, parent=context.parent)
    study = dict(pairwise(rest)).get("--study")
    assert study is None or (ROOT / "configs" / f"{study}.yaml").is_file()


def test_every_command_is_in_the_readme() -> None:
    assert {arguments[0] for arguments in TUNER} == set(cli.commands)


@pytest.mark.parametrize("target", sorted(set(MAKE)))
def test_every_make_target_is_there(target: str) -> None:
    make = shutil.which("make")
    assert make, "the README needs make"
    told = subprocess.run([make, "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
    if target == "run":
        assert "tuner run --study mvp13 --n-trials 50" in told.stdout


def test_the_cheap_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TUNER_")]:
        monkeypatch.delenv(name)
    simulate = next(arguments for arguments in TUNER if arguments[:2] == ["data", "simulate"])
    scale = simulate.index("--scale") + 1
    assert main([*simulate[:scale], "0.001", *simulate[scale + 1 :]]) == 0
    assert (tmp_path / simulate[simulate.index("--out") + 1]).is_dir()
    for arguments in TUNER:
        if arguments[0] in ("show", "best", "studies", "delete", "dashboard"):
            assert main(arguments) == 2  # there is no database yet, and each says so
            assert "expected a database" in capsys.readouterr().err


def test_files_and_folders_that_are_named_are_there() -> None:
    for name in re.findall(r"`((?:configs|docs)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text, flags=re.M)
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(.*?)`", row)
        folder = Path(names[0]).parent
        for name in names:
            path = Path(name) if "/" in name else folder / name
            assert list(ROOT.glob(str(path))), path


def test_the_lock_holds_what_the_project_needs() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    for requirement in wanted:
        name = re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-")
        assert name in locked, name
    assert "torch==2.13.0" in lines
    assert all("==" in line and "+" not in line for line in lines if not line.startswith("#"))


def test_the_containers_start_commands_that_there_are() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name in ("worker", "dashboard"):
        command, *rest = services[name]["command"]
        cli.commands[command].make_context(command, rest)
    assert services["database"]["image"].startswith("postgres:")
