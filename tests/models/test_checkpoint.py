from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from models import checkpoint
from models.checkpoint import latest, load, save
from models.trainer import Decision, DiskError, InputError, Measurement, Run


def make_run(directory: Path, attempt: int = 1) -> Run:
    decision = Decision(task="gift", target_precision=0.5)
    return Run(directory=directory, seed=0, device="cpu", attempt=attempt, decision=decision)


def save_step(run: Run, step: int, *, best: bool = False, mark: float | None = None) -> Path:
    """Save a small checkpoint whose contents tell its step (and `mark`, where given)."""
    value = float(step) if mark is None else mark
    tensors = {"w": torch.full((3, 2), value), "rng": torch.arange(4, dtype=torch.uint8)}
    measurement = Measurement(step, {"valid/gift/pr_auc": 0.1 + step / 7}, elapsed_s=step * 1.1)
    return save(run, step, tensors, {"step": step}, measurement, {"w": torch.full((2,), value)} if best else None)


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    tied = torch.randn(5, 4)
    tensors = {
        "weights": tied,
        "tied": tied,  # shares memory
        "transposed": tied.t(),  # not contiguous
        "half": torch.randn(3).to(torch.bfloat16),
        "adam_step": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "rng": torch.get_rng_state(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    state = {
        "numpy": generator.bit_generator.state,
        "plateau": {"best": float("-inf"), "bad_epochs": 3},
        "text": "礼物",
        "lr": 0.1 + 0.2,
        "nothing": None,
    }
    metrics = MappingProxyType({"valid/gift/pr_auc": 1 / 3})
    path = save(make_run(tmp_path), 0, tensors, state, Measurement(0, metrics, 1.5), best={"w": tied})
    back = load(path)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert raw(back.tensors[name]).equal(raw(tensor))
    assert back.state == state
    assert list(back.state) == list(state)
    assert back.measurement == Measurement(0, {"valid/gift/pr_auc": 1 / 3}, 1.5)
    assert (back.path, back.step, back.best_step) == (path, 0, 0)
    restored = np.random.default_rng(0)
    restored.bit_generator.state = back.state["numpy"]
    assert restored.random() == generator.random()


def test_the_best_weights_are_a_real_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    model = torch.nn.Linear(2, 1)
    kept = model.weight.detach().clone()
    save(run, 0, model.state_dict(), {}, Measurement(0, {}, 0.0), best=model.state_dict())
    with torch.no_grad():
        model.weight += 1.0
    save(run, 1, model.state_dict(), {}, Measurement(1, {}, 0.0), best=None)
    found = latest(run)
    assert found is not None
    assert found.best_step == 0
    assert found.load_best()["weight"].equal(kept)
    assert found.tensors["weight"].equal(kept + 1.0)


def test_layout_and_what_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new" / "run")
    assert latest(run) is None
    for step in range(6):
        assert save_step(run, step, best=step in {0, 2, 4}) == run.directory / "attempt-1" / f"step-{step:05d}"
        kept = {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [4, 5]}[step]
        bests = {0: [0], 1: [0], 2: [0, 2], 3: [2], 4: [2, 4], 5: [4]}[step]
        expected = [f"attempt-1/best-{b:05d}.safetensors" for b in bests]
        for s in kept:
            folder = f"attempt-1/step-{s:05d}"
            expected += [folder, f"{folder}/checkpoint.json", f"{folder}/tensors.safetensors"]
        assert files(run.directory) == sorted([*expected, "attempt-1"])
        assert latest(run).step == step
        assert latest(run).best_step == bests[-1]
        assert load(run.directory / f"attempt-1/step-{kept[0]:05d}").load_best()["w"][0] == bests[0]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    save_step(run, 0, best=True)
    save_step(run, 99_999)
    save_step(run, 100_000)
    assert latest(run).step == 100_000


def test_a_measurement_of_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected its own measurement, got step 3"):
        save(make_run(tmp_path), 2, {}, {}, Measurement(3, {}, 0.0), None)


def test_without_a_best_step_load_best_says_so(tmp_path: Path) -> None:
    found = load(save_step(make_run(tmp_path), 0))
    assert found.best_step is None
    with pytest.raises(InputError, match="no step was the best yet"):
        found.load_best()


class TestAttempts:
    def test_a_new_attempt_goes_on_from_the_old_and_keeps_its_best(self, tmp_path: Path) -> None:
        first, second = make_run(tmp_path, 1), make_run(tmp_path, 2)
        save_step(first, 0, best=True)
        save_step(first, 1)
        assert latest(second).step == 1
        save_step(second, 2)
        shutil.rmtree(tmp_path / "attempt-1")
        found = latest(second)
        assert (found.step, found.best_step) == (2, 0)
        assert found.load_best()["w"].tolist() == [0.0, 0.0]
        save_step(second, 3)
        assert latest(second).load_best()["w"].tolist() == [0.0, 0.0]

    def test_the_best_is_copied_where_links_are_not_possible(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        save_step(make_run(tmp_path, 1), 0, best=True)
        monkeypatch.setattr(os, "link", refuse)
        save_step(make_run(tmp_path, 2), 1)
        shutil.rmtree(tmp_path / "attempt-1")
        assert latest(make_run(tmp_path, 2)).load_best()["w"].tolist() == [0.0, 0.0]

    def test_a_higher_attempt_wins_over_a_higher_step_and_later_attempts_are_not_seen(self, tmp_path: Path) -> None:
        save_step(make_run(tmp_path, 1), 0, best=True)
        save_step(make_run(tmp_path, 2), 1)
        save_step(make_run(tmp_path, 1), 1)
        save_step(make_run(tmp_path, 1), 2)
        assert latest(make_run(tmp_path, 3)).path == tmp_path / "attempt-2" / "step-00001"
        assert latest(make_run(tmp_path, 1)).step == 2
        assert latest(make_run(tmp_path, 0)) is None

    def test_a_replaced_process_that_saves_once_more_harms_nothing(self, tmp_path: Path) -> None:
        """It is found out when its next measurement is refused, so one save is what it can still do."""
        old, new = make_run(tmp_path, 1), make_run(tmp_path, 2)
        save_step(old, 0, best=True)
        save_step(old, 1)
        assert latest(new).step == 1
        save_step(old, 2, best=True, mark=-1.0)
        save_step(new, 2)
        found = latest(new)
        assert found.path == tmp_path / "attempt-2" / "step-00002"
        assert found.best_step == 0
        assert found.load_best()["w"].tolist() == [0.0, 0.0]

    def test_the_checkpoint_that_was_resumed_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="expected the checkpoint that step 5 goes on from"):
            save_step(make_run(tmp_path, 2), 5)

    def test_an_empty_newer_attempt_is_passed_over(self, tmp_path: Path) -> None:
        save_step(make_run(tmp_path, 1), 0, best=True)
        (tmp_path / "attempt-2").mkdir()
        (tmp_path / "attempt-x").mkdir()
        assert latest(make_run(tmp_path, 2)).step == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def enlarge(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


class TestDamage:
    @pytest.mark.parametrize("damage", [truncate, flip, enlarge, empty, Path.unlink])
    @pytest.mark.parametrize(
        "name", ["step-00002/tensors.safetensors", "step-00002/checkpoint.json", "best-00002.safetensors"]
    )
    def test_it_is_named_and_the_step_before_is_taken(
        self, tmp_path: Path, damage: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = make_run(tmp_path)
        for step in range(3):
            save_step(run, step, best=step in {0, 2})
        damage(tmp_path / "attempt-1" / name)
        with pytest.raises(InputError, match=name):
            load(tmp_path / "attempt-1" / "step-00002")
        with caplog.at_level(logging.WARNING):
            found = latest(run)
        assert (found.step, found.best_step) == (1, 0)
        assert name in caplog.text
        (record,) = caplog.records
        assert (record.action, record.path) == ("checkpoint_skipped", str(tmp_path / "attempt-1" / "step-00002"))
        save_step(run, 2, mark=9.0)  # training goes on over the damaged one, which was not the best this time
        found = latest(run)
        assert (found.step, found.best_step, found.tensors["w"][0, 0]) == (2, 0, 9.0)

    def test_the_sizes_are_told(self, tmp_path: Path) -> None:
        path = save_step(make_run(tmp_path), 0)
        truncate(path / "tensors.safetensors")
        with pytest.raises(InputError, match=r"tensors\.safetensors: expected \d+ bytes, got \d+"):
            load(path)

    def test_with_all_steps_damaged_the_older_attempt_serves(self, tmp_path: Path) -> None:
        save_step(make_run(tmp_path, 1), 0, best=True)
        truncate(save_step(make_run(tmp_path, 2), 1) / "tensors.safetensors")
        assert latest(make_run(tmp_path, 2)).step == 0

    def test_a_folder_without_content_is_skipped(self, tmp_path: Path) -> None:
        run = make_run(tmp_path)
        save_step(run, 0, best=True)
        (tmp_path / "attempt-1" / "step-00001").mkdir()
        (tmp_path / "attempt-1" / "step-00002").write_text("a file")
        assert latest(run).step == 0

    def test_another_format_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save_step(make_run(tmp_path), 0)
        monkeypatch.setattr(checkpoint, "_FORMAT", 2)
        with pytest.raises(InputError, match="expected checkpoint format 2, got 1"):
            load(path)

    def test_content_that_is_json_but_no_checkpoint(self, tmp_path: Path) -> None:
        path = save_step(make_run(tmp_path), 0)
        for text in ("[]", "{}", "null", '{"sha256": 1, "content": {}}'):
            (path / "checkpoint.json").write_text(text)
            with pytest.raises(InputError, match=r"checkpoint\.json"):
                load(path)

    def test_what_may_not_be_read_is_an_error_and_not_skipped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        run = make_run(tmp_path)
        save_step(run, 0, best=True)
        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(PermissionError):
            latest(run)


CHANGES = ("open", "write", "fsync", "replace", "link", "mkdir", "unlink", "rmdir")  # calls that change a disk
SCENES = ("next step", "new attempt", "over a damaged step")


def before_changes(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Call `act` before every change of the disk, and let a write take 150 bytes at once only."""
    busy = False

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal busy
            if not busy:
                busy = True
                try:
                    act()
                finally:
                    busy = False
                if name == "write":
                    args = (args[0], args[1][:150])
            return real(*args, **kwargs)

        return wrapped

    for name in CHANGES:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))


def prepare(directory: Path, scene: str) -> tuple[Run, int]:
    """Three steps, the first the best; the run and the step that are saved next."""
    run = make_run(directory)
    for step in range(3):
        save_step(run, step, best=step == 0)
    if scene == "new attempt":
        return make_run(directory, 2), 3
    if scene == "over a damaged step":
        flip(directory / "attempt-1" / "step-00002" / "tensors.safetensors")
        return run, 2
    return run, 3


def check_disk(run: Run, step: int, best: bool) -> None:
    """Either the checkpoint of `step` (marked 5) is there whole, or the one before; and a save then works."""
    found = latest(run)
    if found.step == step:
        assert found.tensors["w"][0, 0] == 5.0
        assert found.best_step == (step if best else 0)
    else:
        assert (found.step, found.best_step) == (step - 1, 0)
    expected = 5.0 if found.step == step and best else 0.0
    assert found.load_best()["w"][0] == expected
    again = load(save_step(run, found.step + 1, mark=6.0))
    assert again.load_best()["w"][0] == expected
    assert not [name for name in files(run.directory) if ".tmp" in name]


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("scene", SCENES)
class TestAtEveryMoment:
    def test_a_crash_leaves_a_valid_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: str, best: bool
    ) -> None:
        run, step = prepare(tmp_path / "run", scene)
        images: list[Path] = []

        def photograph() -> None:
            images.append(tmp_path / f"image-{len(images)}")
            shutil.copytree(run.directory, images[-1])

        with monkeypatch.context() as patch:
            before_changes(patch, photograph)
            save_step(run, step, best=best, mark=5.0)
        assert len(images) > 15
        for image in images:
            for seen in image.glob("attempt-*/step-*"):
                if not (scene == "over a damaged step" and seen.name == "step-00002"):
                    load(seen)  # nothing half-written and nothing half-removed is in sight
            check_disk(make_run(image, run.attempt), step, best)

    def test_a_full_disk_is_a_disk_error_and_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: str, best: bool
    ) -> None:
        failing, done = 0, False
        while not done:
            run, step = prepare(tmp_path / f"run-{failing}", scene)
            calls = 0

            def fail(at: int = failing) -> None:
                nonlocal calls
                calls += 1
                if calls - 1 == at:
                    raise OSError(errno.ENOSPC, "No space left on device")

            with monkeypatch.context() as patch:
                before_changes(patch, fail)
                error = None
                try:
                    save_step(run, step, best=best, mark=5.0)
                except DiskError as caught:
                    error = caught
            done = calls <= failing
            assert (error is None) == done  # none is swallowed
            if error is not None:
                assert error.errno == errno.ENOSPC
                assert f"{run.directory}" in str(error)
                assert "make room and run again" in str(error)
            assert not [name for name in files(run.directory) if ".tmp" in name]
            check_disk(run, step, best)
            failing += 1
        assert failing > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    run = make_run(tmp_path)
    save_step(run, 0, best=True)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        before_changes(patch, fail)
        with pytest.raises(DiskError, match=os.strerror(code)):
            save_step(run, 1)
    assert latest(run).step == 0


def test_other_faults_of_the_system_are_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    before_changes(monkeypatch, fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        save_step(make_run(tmp_path), 0)
    assert not isinstance(caught.value, DiskError)


FULL_DISK = """
import sys
from pathlib import Path
import torch
from models.checkpoint import latest, save
from models.trainer import Decision, DiskError, Measurement, Run

run = Run(Path(sys.argv[1]), 0, "cpu", 1, Decision(task="gift", target_precision=0.5))
weights = {"w": torch.zeros(15_000)}  # 60 kB on a disk of 256 kB
save(run, 0, weights, {}, Measurement(0, {}, 0.0), best=weights)
(run.directory / "filler").write_bytes(bytes(80_000))
try:
    save(run, 1, weights, {}, Measurement(1, {}, 0.0), best=weights)
except DiskError as error:
    print(error)
assert latest(run).step == 0
assert not list((run.directory / "attempt-1").glob(".tmp*"))
(run.directory / "filler").unlink()
save(run, 1, weights, {}, Measurement(1, {}, 0.0), best=weights)
assert latest(run).best_step == 1
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a small tmpfs in a mount namespace of its own; where that is forbidden, on /dev/full."""
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, mount], capture_output=True).returncode:
        with pytest.raises(DiskError), checkpoint._refusals(tmp_path / "x"), open("/dev/full", "wb", 0) as full:
            full.write(b"x")
        return
    root = Path(__file__).parents[2]
    command = [*isolated, f'{mount}; exec "$0" -W error -c "$1" "$2"', sys.executable, FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout


def test_flushes_are_few_and_every_file_is_flushed_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    save_step(run, 0, best=True)
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_step(run, 1)
    assert flushed == ["tensors.safetensors", "checkpoint.json", "attempt-1"]
    flushed.clear()
    save_step(run, 2, best=True)
    assert flushed == [".tmp-best-00002.safetensors", "tensors.safetensors", "checkpoint.json", "attempt-1"]
