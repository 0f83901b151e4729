"""Which room may know what: the dependency directions, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "storage", "tuner")
FORBIDDEN = {
    "models": {"optuna", "optuna_dashboard", "sqlalchemy", "tuner", "storage"},
    "storage": {"optuna", "optuna_dashboard", "torch", "xgboost", "tuner", "models"},
}
# These load code from a file, or run code in it.
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TORCHLESS = ("data", "table", "kuailive", "features", "naive", "simulate", "trainer")


def _files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Every module an `import` statement names, at whatever depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _imported(ast.parse(path.read_text()))}


def test_the_rooms_are_where_this_test_looks() -> None:
    for room in ROOMS:
        assert len(_files(room)) >= 4


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_dependency_directions(room: str) -> None:
    for path in _files(room):
        assert not _packages(path) & FORBIDDEN[room], path


def test_optuna_is_imported_in_its_own_files_alone() -> None:
    users = {path.name for path in _files(*ROOMS) if _packages(path) & {"optuna", "optuna_dashboard"}}
    assert users
    assert all(name.startswith("optuna_") for name in users), users


def test_no_code_is_loaded_from_files() -> None:
    for path in _files(*ROOMS):
        assert not _packages(path) & UNSAFE, path


@pytest.mark.parametrize("name", ["load", "full_load", "unsafe_load", "load_all"])
def test_yaml_is_read_by_safe_loaders_alone(name: str) -> None:
    for path in _files(*ROOMS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
                assert node.attr != name, path


def test_torch_load_is_never_called() -> None:
    """Weights are safetensors; torch.load unpickles."""
    for path in _files(*ROOMS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path


def test_data_are_prepared_without_torch() -> None:
    """The coordinator loads data and specification; torch would cost it seconds and hundreds of megabytes."""
    modules = ", ".join(f"models.gift.{name}" for name in TORCHLESS)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_drawers_for_everything() -> None:
    names = {part for path in _files(*ROOMS) for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "helpers", "base", "core", "common", "managers", "misc"}
