"""A trial goes on on another machine, by the trainers' own checkpoints; and a store on a disk that is full."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.trainer import Decision, Measurement, Run
from storage.artifacts import open_artifacts
from tests import s3
from tests.toy import ToyConfig, ToyTrainer, stored_weights, uninterrupted_weights
from tests.tuner.stored_runs import WatchedStore
from tuner.uploads import Uploads

DECISION = Decision(task="toy", target_precision=0.5)


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return WatchedStore(tmp_path / "store")


def save(run: Run, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(64, 32, generator=generator), "rng": generator.get_state()}
    best = {"w": tensors["w"]} if step in (0, 2) else None
    measurement = Measurement(step, {"valid/toy/pr_auc": step / 10}, float(step))
    checkpoint.save(run, step, tensors, {"epoch": step}, measurement, best)


def toy_run(directory: Path, attempt: int) -> Run:
    return Run(directory, 7, "cpu", attempt, DECISION)


def assert_same(first: Run, second: Run) -> None:
    one, two = checkpoint.latest(first), checkpoint.latest(second)
    assert one is not None
    assert two is not None
    assert (one.step, one.state, one.measurement, one.best_step) == (
        two.step,
        two.state,
        two.measurement,
        two.best_step,
    )
    for left, right in ((one.tensors, two.tensors), (one.load_best(), two.load_best())):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


class TestCheckpoints:
    def test_they_go_on_elsewhere(self, store: WatchedStore, tmp_path: Path) -> None:
        uploads = Uploads(store, "study", 0.0)
        first, second, third = (tmp_path / name for name in "abc")
        with uploads.open(3, 1, first, lambda _step: None) as up:
            for step in range(4):
                save(toy_run(first, 1), step)
                up.offer(step)
            up.finish(20)
        assert uploads.restore(3, second, (1, 3)) == (1, 3)
        assert_same(toy_run(first, 1), toy_run(second, 2))
        with uploads.open(3, 2, second, lambda _step: None) as up:
            up.offer(3)
            up.finish(20)
            assert uploads.restore(3, third, (2, 3)) == (2, 3)
            assert_same(toy_run(first, 1), toy_run(third, 3))
            save(toy_run(second, 2), 4)  # brings the best step's tensors along
            up.offer(4)
            up.finish(20)
        assert uploads.restore(3, third, (2, 4)) == (2, 4)
        assert_same(toy_run(second, 2), toy_run(third, 3))

    def test_a_damaged_one_is_not_brought(self, store: WatchedStore, tmp_path: Path) -> None:
        uploads = Uploads(store, "study", 0.0)
        first, second = (tmp_path / name for name in "ab")
        with uploads.open(3, 1, first, lambda _step: None) as up:
            for step in range(4):
                save(toy_run(first, 1), step)
                up.offer(step)
                up.finish(20)
        newest = (first / "attempt-1" / "step-00003" / "tensors.safetensors").read_bytes()
        (path,) = (p for p in store.root.rglob("*") if p.is_file() and p.read_bytes() == newest)
        path.write_bytes(newest[:-1] + bytes([newest[-1] ^ 1]))
        assert uploads.restore(3, second, (1, 3)) == (1, 2)
        found = checkpoint.latest(toy_run(second, 2))
        assert found is not None
        assert found.step == 2

    @pytest.mark.parametrize("kind", ["file", "s3"])
    def test_weights_equal_the_uninterrupted_runs(
        self, kind: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """Four machines, each stopped after some steps; in S3, and on a shared disk."""
        url = request.getfixturevalue("bucket_url") if kind == "s3" else f"file://{tmp_path}/store"
        (tmp_path / "store").mkdir()
        uploads = Uploads(open_artifacts(url), "study", 0.0)
        config, named = ToyConfig(n_steps=12), []
        known: tuple[int, int] | None = None
        for attempt, n_steps in enumerate((4, 3, 5, 99), start=1):
            run = toy_run(tmp_path / str(attempt), attempt)
            if attempt > 1:
                assert uploads.restore(3, run.directory, known) == known
            with uploads.open(3, attempt, run.directory, named.append) as up:
                steps = ToyTrainer().fit(config, None, run)
                for measurement in itertools.islice(steps, n_steps):
                    up.offer(measurement.step)
                    newest = measurement.step
                steps.close()
                up.finish(20)
            known = (attempt, newest)
        assert known == (4, 11)
        assert {3, 5, 9, 11} <= set(named)
        weights = stored_weights(tmp_path / "4" / "attempt-4" / "step-00011")
        assert weights == uninterrupted_weights(config, 7)

    @pytest.fixture
    def bucket_url(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        s3.use_credentials(monkeypatch)
        with s3.moto_server() as endpoint:
            client = s3.client(endpoint)
            client.create_bucket(Bucket="runs", CreateBucketConfiguration={"LocationConstraint": s3.REGION})
            client.close()
            yield f"s3://runs/tuner?endpoint_url={endpoint}&region={s3.REGION}"


# --- a disk that is really full --------------------------------------------------------------------------------

ON_A_SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from storage.artifacts import ArtifactError, open_artifacts
from tuner.uploads import Uploads

disk, run, other = map(Path, sys.argv[1:])
named = []

def step(number, n_bytes):
    folder = run / "attempt-1" / f"step-{number:05d}"
    folder.mkdir(parents=True)
    (folder / "tensors").write_bytes(os.urandom(n_bytes))

def upload(number):
    with Uploads(open_artifacts(f"file://{disk}"), "study", 0.0).open(3, 1, run, named.append) as up:
        try:
            up.offer(number)
            up.finish(20.0)
        except ArtifactError as error:
            print(type(error).__name__, error, flush=True)

def remount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

step(0, 100_000); upload(0)
step(1, 2_000_000); upload(1)
assert named == [0] and not list(disk.rglob(".tmp-*")) and not list(run.glob(".*")), named
remount("size=8m"); upload(1)
remount("ro"); step(2, 1000); upload(2)
remount("rw"); upload(2)
assert named == [0, 1, 2], named
assert Uploads(open_artifacts(f"file://{disk}"), "study").restore(3, other, (1, 2)) == (1, 2)
assert (other / "attempt-1/step-00002/tensors").read_bytes() == (run / "attempt-1/step-00002/tensors").read_bytes()
print("resumed")
"""


@pytest.mark.skipif(os.environ.get("TUNER_NO_NS") == "1", reason="TUNER_NO_NS=1")
def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    disk, run, other = (tmp_path / name for name in ("disk", "run", "other"))
    disk.mkdir()
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    python = [sys.executable, "-c", ON_A_SMALL_DISK, *map(str, (disk, run, other))]
    done = subprocess.run(
        ["unshare", *as_root, "--mount", "sh", "-c", script, "sh", str(disk), *python],
        capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n(TUNER_NO_NS=1 leaves this test out)"
    full, read_only, resumed = done.stdout.splitlines()
    assert full.startswith(f"ArtifactError artifacts: file://{disk}: cannot use study/trials/00003/attempt-1/")
    assert full.endswith("(No space left on device); make room and go on")
    assert read_only.endswith("(Read-only file system); mount it writable and go on")
    assert resumed == "resumed"
