"""Score files: asked once, checked when read, and no look at a guarded role that is not written down before."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from models.trainer import InputError, Predictions
from storage.artifacts import open_artifacts
from storage.database import Database
from storage.rows import RunRow
from storage.runs import Store
from tuner.scoring import Model, Scoring, checksum_of, checksum_of_text, find_checkpoint, read_arrays, write_arrays
from tuner.uploads import Uploads

N = 50
MODEL = Model("00003", "a" * 64)


class Asked:
    """A model that counts how often it is asked."""

    def __init__(self, scores: np.ndarray | None = None) -> None:
        self.n = 0
        self.values = np.linspace(-3, 3, N).astype(np.float32) if scores is None else scores

    def __call__(self) -> Predictions:
        self.n += 1
        return Predictions(
            {"gives": self.values, "amount": self.values + 9}, {"gives": np.float64(self.values) / 3}
        )


@pytest.fixture
def scoring(sqlite: Database, tmp_path: Path) -> Scoring:
    return Scoring(Store(sqlite), tmp_path / "scores", "data1", "s", "s.evaluation-1")


def same(a: Predictions, b: Predictions) -> bool:
    return all(
        left.keys() == right.keys()
        and all(left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left)
        for left, right in ((a.scores, b.scores), (a.calibrated, b.calibrated))
    )


@pytest.mark.parametrize("role", ["valid", "test", "calibrate"])
def test_a_model_is_asked_once_and_its_scores_come_back_to_the_bit(scoring: Scoring, role):
    asked = Asked()
    first = scoring.scores(MODEL, role, N, asked)
    again = scoring.scores(MODEL, role, N, asked)
    assert asked.n == 1
    assert same(first, again)
    assert first.scores["gives"].dtype == np.float32
    assert first.calibrated["gives"].dtype == np.float64
    np.testing.assert_array_equal(first.scores["amount"], asked.values + 9)


def test_the_file_names_what_it_was_made_from(scoring: Scoring):
    scoring.scores(MODEL, "test", N, Asked())
    with safe_open(scoring.folder / "00003-test.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    expected = {"checkpoint": "a" * 64, "data_hash": "data1", "role": "test"}
    assert {name: metadata[name] for name in expected} == expected
    assert [path.name for path in scoring.folder.iterdir()] == ["00003-test.safetensors"]  # no draft is left


@pytest.mark.parametrize(
    "other", [{"data_hash": "data2"}, {"model": Model("00003", "b" * 64)}], ids=["other data", "other checkpoint"]
)
def test_scores_of_something_else_are_never_taken(scoring: Scoring, other):
    scoring.scores(MODEL, "valid", N, Asked())
    asked = Asked(np.zeros(N, np.float32))
    scoring.data_hash = other.get("data_hash", scoring.data_hash)
    found = scoring.scores(other.get("model", MODEL), "valid", N, asked)
    assert asked.n == 1
    assert not found.scores["gives"].any()


def test_valid_needs_no_look(scoring: Scoring):
    scoring.scores(MODEL, "valid", N, Asked())
    assert scoring.store.looks("data1") == []


@pytest.mark.parametrize("role", ["test", "calibrate"])
def test_a_look_is_written_down_before_the_model_is_asked_and_closed_after(scoring: Scoring, role):
    asked = Asked()

    def predict() -> Predictions:
        (look,) = scoring.store.looks("data1", role)
        assert look.scored_at is None
        assert (look.study, look.evaluation, look.model) == ("s", "s.evaluation-1", MODEL.checksum)
        return asked()

    scoring.scores(MODEL, role, N, predict)
    (look,) = scoring.store.looks("data1", role)
    assert look.scored_at is not None


def test_killed_while_scoring_the_same_look_goes_on(scoring: Scoring):
    def killed() -> Predictions:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            scoring.scores(MODEL, "test", N, killed)
    scoring.scores(MODEL, "test", N, Asked())
    assert scoring.looks("test") == {"n_models": 1, "n_looks": 1, "repeated": 0, "all_on_this_set": 1}
    assert scoring.store.looks("data1", "test")[0].scored_at is not None


def test_killed_between_the_file_and_its_look_the_look_is_closed(scoring: Scoring, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "close_look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scoring.scores(MODEL, "test", N, Asked())
    asked = Asked()
    scoring.scores(MODEL, "test", N, asked)
    assert asked.n == 0
    (look,) = scoring.store.looks("data1", "test")
    assert look.scored_at is not None


@pytest.mark.parametrize("where", ["begin", "middle", "end", "cut", "empty"])
def test_a_damaged_file_is_made_again_and_the_further_look_counted(scoring: Scoring, where, caplog):
    first = scoring.scores(MODEL, "test", N, Asked())
    path = scoring.folder / "00003-test.safetensors"
    content = bytearray(path.read_bytes())
    at = {"begin": 2, "middle": len(content) // 2, "end": len(content) - 1}.get(where)
    if at is None:
        content = content[:-7] if where == "cut" else b""
    else:
        content[at] ^= 0x40
    path.write_bytes(content)
    asked = Asked()
    assert same(scoring.scores(MODEL, "test", N, asked), first)
    assert asked.n == 1
    assert "made again" in caplog.text
    assert scoring.looks("test") == {"n_models": 1, "n_looks": 2, "repeated": 1, "all_on_this_set": 2}
    assert all(look.scored_at is not None for look in scoring.store.looks("data1", "test"))
    scoring.scores(MODEL, "test", N, asked)
    assert asked.n == 1
    assert scoring.looks("test")["n_looks"] == 2


def test_killed_while_scoring_a_damaged_file_again_there_is_no_third_look(scoring: Scoring):
    scoring.scores(MODEL, "test", N, Asked())
    (scoring.folder / "00003-test.safetensors").write_bytes(b"")

    def killed() -> Predictions:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scoring.scores(MODEL, "test", N, killed)
    scoring.scores(MODEL, "test", N, Asked())
    assert scoring.looks("test")["n_looks"] == 2


def test_looks_of_others_at_the_same_set_and_at_the_same_model_are_counted(scoring: Scoring):
    other = Scoring(scoring.store, scoring.folder.with_name("other"), "data1", "t", "t.evaluation-1")
    other.scores(MODEL, "test", N, Asked())
    other.scores(Model("00004", "c" * 64), "test", N, Asked())
    elsewhere = Scoring(scoring.store, scoring.folder.with_name("third"), "data2", "u", "u.evaluation-1")
    elsewhere.scores(MODEL, "test", N, Asked())
    scoring.scores(MODEL, "test", N, Asked())
    assert scoring.looks("test") == {"n_models": 1, "n_looks": 1, "repeated": 1, "all_on_this_set": 3}
    assert scoring.looks("calibrate") == {"n_models": 0, "n_looks": 0, "repeated": 0, "all_on_this_set": 0}


@pytest.mark.parametrize(
    "scores", [np.zeros(N - 1, np.float32), np.full(N, np.nan, np.float32), np.full(N, np.inf, np.float32)]
)
def test_scores_that_are_not_one_finite_number_a_row_are_refused(scoring: Scoring, scores):
    with pytest.raises(InputError, match=r"00003-valid.*expected a finite number for each of 50 rows"):
        scoring.scores(MODEL, "valid", N, Asked(scores))
    assert not scoring.folder.exists()


def test_an_ablation_is_measured_once(scoring: Scoring):
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"group/b": 0.25, "group/a": 1 / 3, "unit/0": 0.5}

    first, again = (scoring.ablation(MODEL, "pr_auc", measure) for _ in range(2))
    assert first == again == {"group/b": 0.25, "group/a": 1 / 3, "unit/0": 0.5}
    assert len(calls) == 1
    scoring.ablation(Model("00003", "b" * 64), "pr_auc", measure)
    assert len(calls) == 2
    scoring.ablation(Model("00003", "b" * 64), "roc_auc", measure)
    assert len(calls) == 3, "what was measured by one metric is no answer for another"


def test_a_refused_write_is_an_error_of_the_disk_and_leaves_nothing(tmp_path: Path, monkeypatch):
    import tuner.scoring as module
    from models.trainer import DiskError

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        write_arrays(tmp_path / "a.safetensors", {"x": np.zeros(3)}, {"of": "x"})
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_any_shape_come_back(tmp_path: Path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "none": np.zeros(0, np.float32), "i": np.arange(3)}
    write_arrays(tmp_path / "x.safetensors", arrays, {"of": "x"})
    found = read_arrays(tmp_path / "x.safetensors", {"of": "x"})
    assert found is not None
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
    assert read_arrays(tmp_path / "x.safetensors", {"of": "y"}) is None
    assert read_arrays(tmp_path / "y.safetensors", {"of": "x"}) is None


# --- checkpoints -----------------------------------------------------------------------------------------------

RUN = RunRow(
    number=3, arm="a", config=None, attempt=2, checkpoint_attempt=2, checkpoint_step=7, best_step=5, ended_at=1.0,
    failure=None, measured_at=1.0, uploaded_attempt=None, uploaded_step=None,
)  # fmt: skip


def test_a_checksum_is_that_of_the_content_and_not_of_the_place(tmp_path: Path):
    for name in ("a", "b"):
        folder = tmp_path / name / "step-00007"
        (folder / "inner").mkdir(parents=True)
        (folder / "tensors").write_bytes(b"123")
        (folder / "inner" / "state").write_bytes(b"456")
    a, b = (tmp_path / name / "step-00007" for name in ("a", "b"))
    assert checksum_of(a) == checksum_of(b)
    (b / "inner" / "state").write_bytes(b"457")
    assert checksum_of(a) != checksum_of(b)
    (b / "inner" / "state").write_bytes(b"456")
    (b / "inner" / "state").rename(b / "inner" / "other")
    assert checksum_of(a) != checksum_of(b)
    assert checksum_of(a / "tensors") == hashlib.sha256(b"123").hexdigest()
    assert checksum_of_text("a", 1) != checksum_of_text("a", 2)


def test_a_checkpoint_is_found_by_what_the_database_names(tmp_path: Path):
    for attempt, step in ((1, 7), (2, 6), (2, 7)):
        (tmp_path / f"trials/00003/attempt-{attempt}/step-{step:05d}").mkdir(parents=True)
    assert find_checkpoint(RUN, tmp_path, None) == tmp_path / "trials/00003/attempt-2/step-00007"


def test_a_checkpoint_that_is_not_here_comes_from_the_artifact_store(tmp_path: Path):
    (tmp_path / "artifacts").mkdir()
    artifacts = open_artifacts((tmp_path / "artifacts").as_uri())
    uploads = Uploads(artifacts, "s.evaluation-1")
    there, here = tmp_path / "there", tmp_path / "here"
    step = there / "trials/00003/attempt-2/step-00007"
    step.mkdir(parents=True)
    (step / "tensors").write_bytes(b"123")
    named = []
    with uploads.open(3, 2, step.parent.parent, named.append) as up:
        up.offer(7)
        up.finish(20.0)
    assert named == [7]
    run = replace(RUN, uploaded_attempt=2, uploaded_step=7)
    found = find_checkpoint(run, here, uploads)
    assert found == here / "trials/00003/attempt-2/step-00007"
    assert checksum_of(found) == checksum_of(step)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_checkpoint_that_is_nowhere_is_an_error_with_a_way_out(tmp_path: Path, is_shared):
    (tmp_path / "artifacts").mkdir()
    uploads = Uploads(open_artifacts((tmp_path / "artifacts").as_uri()), "s") if is_shared else None
    with pytest.raises(InputError, match=r"attempt-2/step-00007: expected the checkpoint of a fit.*--artifacts"):
        find_checkpoint(RUN, tmp_path, uploads)
