"""What `--launcher ray` refuses before anything is placed; the cluster itself is in tests/e2e/test_ray.py."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from models.trainer import InputError
from tuner.ray_launcher import choose_devices

ROOT = Path(__file__).resolve().parents[2]


def test_ray_is_imported_in_its_launcher_alone() -> None:
    users = set()
    for path in [path for room in ("models", "storage", "tuner") for path in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            users |= {path.name for name in names if name.split(".")[0] == "ray"}
    assert users == {"ray_launcher.py"}


def test_nodes_share_no_sqlite_file() -> None:
    with pytest.raises(InputError, match="expected PostgreSQL"):
        choose_devices("sqlite:///runs/tuner.db", None)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody"])
def test_a_cluster_has_to_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match="expected a running Ray cluster") as refused:
        choose_devices("postgresql://h/n", None)
    assert "\n" not in str(refused.value)


def test_without_ray_the_way_out_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; import tuner.ray_launcher"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1
    assert "InputError: --launcher ray: expected Ray, got no such package; pip install 'tuner[ray]'" in told.stderr
