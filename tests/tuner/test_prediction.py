"""New rows scored with a stored model: what is written, that it is whole or not there, that memory stays flat."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from models.calibration import smeared
from models.trainer import DiskError, InputError, Predictions, ScoredRows
from storage.database import Database
from tests.toy import ToyTrainer
from tests.tuner.stored_models import INFEASIBLE, VALUE, make_model, write_export
from tests.tuner.toy_study import ROOT
from tuner import registry, snapshots
from tuner.cli import main
from tuner.prediction import Written, predict
from tuner.registry import ModelFolder, open_folder

N_ROWS = 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.txt", N_ROWS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "predictions.parquet"


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    return make_folder(tmp_path / "model")


def write_rows(path: Path, n_rows: int) -> Path:
    path.write_text("hint\n" + "\n".join(f"{hint:.6f}" for hint in hints_of(n_rows)) + "\n")
    return path


def hints_of(n_rows: int) -> np.ndarray:
    return np.round(np.random.default_rng(1).normal(size=n_rows), 6)


def make_folder(path: Path, **export: Any) -> ModelFolder:
    folder = write_export(path, **export)
    (folder / "SHA256SUMS").write_bytes(registry._sums(folder)[0])
    return open_folder(folder)


def run(model: ModelFolder, source: Path, out: Path, **changes: Any) -> Written:
    return predict(model, "s:1", source, out, out.parent / "cache", **changes)


def order_in_time(monkeypatch: pytest.MonkeyPatch, days: np.ndarray, tradable: np.ndarray | None = None) -> None:
    """The toy's rows are bars from now on: each of a symbol, on a day, tradable or not."""
    plain = ToyTrainer.score
    tradable = np.ones(len(days), bool) if tradable is None else tradable

    def score(*arguments: Any) -> Iterator[ScoredRows]:
        for batch in plain(*arguments):
            rows = np.arange(batch.first_row, batch.first_row + len(batch.keys["line"]))
            keys = {"symbol": np.array([f"s{row}" for row in rows]), "date": days[rows], "tradable": tradable[rows]}
            yield dataclasses.replace(batch, keys=keys, time="date", eligible="tradable")

    monkeypatch.setattr(ToyTrainer, "score", score)


def scores_of_all() -> np.ndarray:
    return (4.0 * VALUE * hints_of(N_ROWS) - 0.5).astype(np.float32)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestColumns:
    def test_every_row_in_order(self, model: ModelFolder, source: Path, out: Path) -> None:
        written = run(model, source, out, batch_rows=300)
        table = pq.read_table(out)
        assert table.column_names == [
            "row", "line", "score", "probability", "decision", "expected_money", "model_version",
        ]  # fmt: skip
        scores = (4.0 * VALUE * hints_of(N_ROWS) - 0.5).astype(np.float32)
        found = {name: table[name].to_numpy() for name in table.column_names}
        np.testing.assert_array_equal(found["row"], np.arange(N_ROWS))
        np.testing.assert_array_equal(found["line"], np.arange(N_ROWS) + 2)
        np.testing.assert_array_equal(found["score"], scores)
        np.testing.assert_allclose(found["probability"], expit(0.5 * scores.astype(np.float64) - 1.0), rtol=1e-12)
        np.testing.assert_array_equal(found["decision"], scores >= 0.25)
        money = np.full(N_ROWS, np.exp(2.0 + 0.1 * VALUE * hints_of(N_ROWS)), np.float32)
        np.testing.assert_allclose(found["expected_money"], smeared(money, 1.5, "log1p"), rtol=1e-6)
        assert set(found["model_version"]) == {"s:1"}
        assert written == Written(N_ROWS, int((scores >= 0.25).sum()))

    def test_types(self, model: ModelFolder, source: Path, out: Path) -> None:
        run(model, source, out)
        schema = pq.read_schema(out)
        types = {name: schema.field(name).type for name in schema.names if name != "model_version"}
        assert types == {
            "row": pa.int64(), "line": pa.int64(), "score": pa.float32(), "probability": pa.float64(),
            "decision": pa.bool_(), "expected_money": pa.float64(),
        }  # fmt: skip

    def test_nothing_is_decided_where_nothing_is_certified(self, tmp_path: Path, source: Path, out: Path) -> None:
        model = make_folder(tmp_path / "infeasible", certificate=INFEASIBLE)
        assert run(model, source, out, batch_rows=300) == Written(N_ROWS, None)
        decisions = pq.read_table(out)["decision"]
        assert decisions.type == pa.bool_()
        assert decisions.null_count == N_ROWS

    def test_a_row_at_the_threshold_is_selected(self, tmp_path: Path, out: Path) -> None:
        source = tmp_path / "one.txt"
        source.write_text("hint\n0.1\n")
        score = float(np.float32(4.0 * VALUE * 0.1 - 0.5))
        model = make_folder(tmp_path / "at", certificate=INFEASIBLE | {"threshold": score})
        assert run(model, source, out).n_selected == 1

    def test_without_amounts(self, tmp_path: Path, source: Path, out: Path) -> None:
        run(make_folder(tmp_path / "bare", smearing={}), source, out)
        assert "expected_money" not in pq.read_schema(out).names

    def test_an_amount_that_counts_under_a_condition_is_expected_with_its_probability(
        self, tmp_path: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An amount given a gift is no amount to expect of a click."""
        how = {"factor": 1.5, "transform": "log1p"}
        smearing = {
            "money": how, "own": how | {"given": "toy"}, "other": how | {"given": "binary"},
            "lost": how | {"given": "untrained"},
        }  # fmt: skip
        plain = ToyTrainer.score

        def score(*arguments: Any) -> Iterator[ScoredRows]:
            for batch in plain(*arguments):
                scores = dict(batch.predictions.scores)
                scores |= dict.fromkeys(("own", "other", "lost"), scores["money"])
                scores["binary"] = scores["toy"] - 1.0
                yield ScoredRows(batch.first_row, batch.n_rows, batch.keys, Predictions(scores))

        monkeypatch.setattr(ToyTrainer, "score", score)
        run(make_folder(tmp_path / "conditional", smearing=smearing), source, out)
        table = pq.read_table(out)
        found = {name: table[name].to_numpy() for name in table.column_names if name != "model_version"}
        money = found["expected_money"]
        np.testing.assert_allclose(found["expected_own"], found["probability"] * money, rtol=1e-12)
        np.testing.assert_allclose(
            found["expected_other"], expit(found["score"].astype(float) - 1) * money, rtol=1e-6
        )
        np.testing.assert_allclose(found["expected_lost_given_untrained"], money, rtol=1e-12)
        assert "expected_lost" not in found

    def test_the_inverse_of_the_loss_goes_before_the_calibrator(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = ToyTrainer.score

        def score(*arguments: Any) -> Iterator[ScoredRows]:
            for batch in plain(*arguments):
                scores = batch.predictions.scores
                shifted = {"toy": scores["toy"].astype(np.float64) - 2.0}
                yield ScoredRows(batch.first_row, batch.n_rows, batch.keys, Predictions(scores, shifted))

        monkeypatch.setattr(ToyTrainer, "score", score)
        run(model, source, out)
        table = pq.read_table(out)
        scores = table["score"].to_numpy().astype(np.float64)
        np.testing.assert_allclose(table["probability"].to_numpy(), expit(0.5 * (scores - 2.0) - 1.0), rtol=1e-12)

    def test_batches_change_nothing(self, model: ModelFolder, source: Path, out: Path) -> None:
        tables = []
        for batch_rows in (7, N_ROWS, 65536):
            run(model, source, out, batch_rows=batch_rows, force=True)
            tables.append(pq.read_table(out).to_pydict())
        assert tables[0] == tables[1] == tables[2]

    def test_progress(self, model: ModelFolder, source: Path, out: Path) -> None:
        told: list[tuple[int, int | None]] = []
        run(model, source, out, batch_rows=400, progress=lambda done, total: told.append((done, total)))
        assert told == [(400, None), (800, None), (1000, None)]


class TestNewest:
    @pytest.fixture
    def days(self) -> np.ndarray:
        """Ten days of 100 rows each, in order."""
        return 20230306 + np.repeat(np.arange(10), N_ROWS // 10)

    @pytest.mark.parametrize("batch_rows", [7, 100, 950, 65536])
    @pytest.mark.parametrize("shuffled", [False, True])
    def test_its_rows_whatever_the_batches_and_their_order(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray,
        batch_rows: int, shuffled: bool,
    ) -> None:  # fmt: skip
        if shuffled:
            days = np.random.default_rng(3).permutation(days)
        order_in_time(monkeypatch, days)
        written = run(model, source, out, batch_rows=batch_rows)
        newest = written.newest
        assert newest is not None
        assert (newest.time, newest.value, newest.eligible) == ("date", 20230315, "tradable")
        assert newest.keys == ("symbol", "date", "tradable")
        of_the_day = np.flatnonzero(days == 20230315)
        assert newest.rows["row"].to_pylist() == of_the_day.tolist()
        assert newest.n_selected == (scores_of_all()[of_the_day] >= 0.25).sum()
        assert newest.rows.to_pylist() == pq.read_table(out).take(pa.array(of_the_day)).to_pylist()
        assert written.n_rows == N_ROWS  # the file has them all

    @pytest.mark.parametrize("kind", ["text", "date", "time"])
    def test_days_of_any_kind(
        self, model: ModelFolder, source: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray, kind: str
    ) -> None:
        dates = np.datetime64("2023-03-06") + (days - 20230306)
        texts = dates.astype(str)
        order_in_time(monkeypatch, {"text": texts, "date": dates, "time": dates.astype("datetime64[us]")}[kind])
        newest = predict(model, "s:1", source, None, source.parent, batch_rows=70).newest
        assert newest is not None
        assert str(newest.value)[:10] == "2023-03-15"
        assert newest.rows.num_rows == 100

    def test_best_first_among_equals_in_order(
        self, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "few.txt"
        source.write_text("hint\n9.0\n0.1\n0.3\n-0.2\n0.3\n0.2\n")
        order_in_time(monkeypatch, np.array([1, 2, 2, 2, 2, 2]))
        newest = predict(model, "s:1", source, None, tmp_path, batch_rows=3).newest
        assert newest is not None
        best = newest.best(4)
        assert [(row["rank"], row["symbol"]) for row in best] == [(1, "s2"), (2, "s4"), (3, "s5"), (4, "s1")]
        assert list(best[0]) == ["rank", "symbol", "date", "tradable", "probability", "decision"]
        assert best[0]["probability"] == pytest.approx(expit(0.5 * (4.0 * VALUE * 0.3 - 0.5) - 1.0), rel=1e-6)
        assert [row["decision"] for row in best] == [True, True, False, False]
        assert len(newest.best(99)) == 5

    def test_what_cannot_be_acted_upon_is_never_selected(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray
    ) -> None:
        tradable = np.random.default_rng(5).random(N_ROWS) < 0.5
        order_in_time(monkeypatch, days, tradable)
        written = run(model, source, out, batch_rows=300)
        reached = scores_of_all() >= 0.25
        assert 0 < (reached & tradable).sum() < reached.sum()
        np.testing.assert_array_equal(pq.read_table(out)["decision"].to_numpy(), reached & tradable)
        assert written.n_selected == (reached & tradable).sum()
        newest = written.newest
        assert newest is not None
        assert newest.n_selected == (reached & tradable)[days == 20230315].sum()

    def test_only_them(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray
    ) -> None:
        order_in_time(monkeypatch, days)
        run(model, source, out, batch_rows=130)
        whole = pq.read_table(out)
        told: list[int] = []
        written = run(model, source, out, batch_rows=130, force=True, newest_only=True,
                      progress=lambda done, _total: told.append(done))  # fmt: skip
        table = pq.read_table(out)
        assert table.schema == whole.schema
        assert table.to_pylist() == whole.slice(900).to_pylist()
        assert (written.n_rows, written.n_selected) == (100, int((scores_of_all()[900:] >= 0.25).sum()))
        assert told[-1] == N_ROWS

    def test_nothing_is_written_without_a_file(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray
    ) -> None:
        order_in_time(monkeypatch, days)
        written = predict(model, "s:1", source, None, out.parent, newest_only=True)
        assert written.n_rows == 100
        assert left_in(out.parent) == []

    def test_nothing_is_decided_where_nothing_is_certified(
        self, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, days: np.ndarray
    ) -> None:
        order_in_time(monkeypatch, days, np.arange(N_ROWS) % 2 == 0)
        model = make_folder(tmp_path / "infeasible", certificate=INFEASIBLE)
        newest = predict(model, "s:1", source, None, tmp_path).newest
        assert newest is not None
        assert newest.n_selected is None
        assert {row["decision"] for row in newest.best(100)} == {None}

    def test_rows_without_an_order_in_time(self, model: ModelFolder, source: Path, out: Path) -> None:
        assert run(model, source, out).newest is None
        with pytest.raises(InputError, match="--newest: expected rows with an order in time, got those of tests"):
            run(model, source, out, force=True, newest_only=True)
        assert pq.read_metadata(out).num_rows == N_ROWS
        assert left_in(out.parent) == [out.name]


class TestOut:
    def test_one_that_is_there_stays(self, model: ModelFolder, source: Path, out: Path) -> None:
        out.write_text("mine")
        with pytest.raises(InputError, match="expected no such file, got one; --force replaces it"):
            run(model, source, out)
        assert out.read_text() == "mine"
        run(model, source, out, force=True)
        assert pq.read_table(out).num_rows == N_ROWS

    def test_what_is_read_is_never_replaced(
        self, model: ModelFolder, source: Path, out: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "rows"
        folder.mkdir()
        there = source.rename(folder / "rows.parquet")
        before = there.read_bytes()
        link = tmp_path / "link.parquet"
        link.symlink_to(there)
        for data, place in ((there, there), (folder, there), (there, link)):
            with pytest.raises(InputError, match="no part of"):
                run(model, data, place, force=True)
        assert there.read_bytes() == before

    def test_one_that_comes_meanwhile_stays(self, model: ModelFolder, source: Path, out: Path) -> None:
        with pytest.raises(InputError, match="that somebody made meanwhile"):
            run(model, source, out, progress=lambda *_: out.write_text("theirs"))
        assert out.read_text() == "theirs"
        assert left_in(out.parent) == [out.name]

    def test_a_file_system_without_links(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        run(model, source, out)
        assert left_in(out.parent) == [out.name]

    @pytest.mark.parametrize(
        ("place", "said"),
        [
            ("out", "expected a file to write, got a folder"),
            ("none/p.parquet", "expected a folder to write to, got none"),
            ("p.csv", "expected a name that ends in .parquet"),
        ],
    )
    def test_no_place_for_it(
        self, model: ModelFolder, source: Path, out: Path, tmp_path: Path, place: str, said: str
    ) -> None:
        with pytest.raises(InputError, match=said):
            run(model, source, tmp_path / place)

    def test_a_disk_that_refuses(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskError, match=r"predictions.parquet: the disk refused it \(No space left on device\)"
        ):
            run(model, source, out)
        assert left_in(out.parent) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_may_not_be_written_to(self, model: ModelFolder, source: Path, out: Path) -> None:
        out.parent.chmod(0o500)
        try:
            with pytest.raises(DiskError, match="the disk refused it"):
                run(model, source, out)
        finally:
            out.parent.chmod(0o700)

    def test_a_device_that_is_no_file(self, model: ModelFolder, source: Path) -> None:
        with pytest.raises(InputError, match="--force replaces it"):
            run(model, source, Path("/dev/null"))

    @pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
    def test_killed_it_leaves_nothing_under_the_name(
        self, model: ModelFolder, source: Path, out: Path, signal: str
    ) -> None:
        code = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from tuner.cli import heed_signals\n"
            "from tuner.prediction import predict\n"
            "from tuner.registry import open_folder\n"
            "heed_signals()\n"
            "folder, source, out = map(Path, sys.argv[1:])\n"
            f"stop = lambda done, total: os.kill(os.getpid(), signal.{signal}) if done >= 500 else None\n"
            "predict(open_folder(folder), 's:1', source, out, out.parent, batch_rows=100, progress=stop)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(model.path), str(source), str(out)],
            cwd=ROOT, check=False, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode != 0
        assert not out.exists()
        left = left_in(out.parent)
        # SIGKILL cannot be heard: a hidden draft stays, for a day.
        assert [name.startswith(".predictions.parquet.tmp-") for name in left] == [True] * (signal == "SIGKILL")
        run(model, source, out)
        assert pq.read_table(out).num_rows == N_ROWS
        assert left_in(out.parent) == sorted([*left, out.name])

    def test_old_drafts_are_swept(self, model: ModelFolder, source: Path, out: Path) -> None:
        fresh, stale, others = (out.parent / f".{name}" for name in (
            "predictions.parquet.tmp-1", "predictions.parquet.tmp-2", "other.parquet.tmp-3"))  # fmt: skip
        for path in (fresh, stale, others):
            path.mkdir()
        for path in (stale, others):
            os.utime(path, (time.time() - snapshots.STALE_S - 60,) * 2)
        run(model, source, out)
        assert left_in(out.parent) == [others.name, fresh.name, out.name]


class TestBadInput:
    def test_no_source(self, model: ModelFolder, tmp_path: Path, out: Path) -> None:
        with pytest.raises(InputError, match="expected a file or folder to score, got nothing"):
            run(model, tmp_path / "nowhere.txt", out)
        assert left_in(out.parent) == []

    def test_a_bad_row_in_the_middle(self, model: ModelFolder, source: Path, out: Path) -> None:
        with source.open("a") as file:
            file.write("many\n")
        with pytest.raises(InputError, match=r"rows.txt:1002: expected a number, got 'many'"):
            run(model, source, out, batch_rows=100)
        assert left_in(out.parent) == []

    def test_no_rows(self, model: ModelFolder, tmp_path: Path, out: Path) -> None:
        (tmp_path / "empty.txt").write_text("hint\n")
        with pytest.raises(InputError, match=r"empty.txt: expected rows to score, got none"):
            run(model, tmp_path / "empty.txt", out)
        assert left_in(out.parent) == []

    def test_a_trainer_that_is_not_there(self, model: ModelFolder, source: Path, out: Path) -> None:
        with pytest.raises(InputError, match=r"trainer: 'nobody.at:Home' cannot be imported"):
            run(dataclasses.replace(model, trainer="nobody.at:Home"), source, out)

    def test_a_task_that_it_does_not_score(self, tmp_path: Path, source: Path, out: Path) -> None:
        with pytest.raises(InputError, match="expected scores of other, got none; the model is damaged"):
            run(make_folder(tmp_path / "other", task="other"), source, out)

    def test_what_is_no_number(self, model: ModelFolder, source: Path, out: Path) -> None:
        lines = source.read_text().splitlines()
        lines[701] = "nan"
        source.write_text("\n".join(lines))
        with pytest.raises(InputError, match="expected a finite score of row 700, got nan"):
            run(model, source, out, batch_rows=300)
        assert left_in(out.parent) == []

    def test_keys_that_are_called_like_ours(
        self, model: ModelFolder, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def score(*_: Any) -> Iterator[ScoredRows]:
            yield ScoredRows(0, 1, {"score": np.zeros(1)}, Predictions({"toy": np.zeros(1), "money": np.zeros(1)}))

        monkeypatch.setattr(ToyTrainer, "score", score)
        with pytest.raises(InputError, match="expected keys of other names than score"):
            run(model, source, out)


def test_memory_does_not_grow_with_the_rows(model: ModelFolder, tmp_path: Path, out: Path) -> None:
    """Days of 500 rows each, of which only the newest's are kept."""
    short, long = (write_rows(tmp_path / f"{n}.txt", n) for n in (50_000, 1_500_000))
    code = (
        "import dataclasses, resource, sys\n"
        "from pathlib import Path\n"
        "from tests.toy import ToyTrainer\n"
        "from tuner.prediction import predict\n"
        "from tuner.registry import open_folder\n"
        "plain = ToyTrainer.score\n"
        "def score(*given):\n"
        "    for batch in plain(*given):\n"
        "        keys = {**batch.keys, 'day': batch.keys['line'] // 500}\n"
        "        yield dataclasses.replace(batch, keys=keys, time='day')\n"
        "ToyTrainer.score = score\n"
        "folder, short, long, out = map(Path, sys.argv[1:])\n"
        "for source in (short, long):\n"
        "    predict(open_folder(folder), 's:1', source, out, out.parent, batch_rows=10_000, force=True)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (model.path, short, long, out))],
        cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert after - before < 20 * 1024  # kB; the columns of all rows are 61 MB
    assert pq.read_metadata(out).num_rows == 1_500_000


class TestCommand:
    @pytest.fixture
    def tuner(
        self, tmp_path: Path, sqlite_with_tables_url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> Iterator[Callable[..., tuple[int, str, str]]]:
        for name in [name for name in os.environ if name.startswith("TUNER_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("TUNER_STORAGE", sqlite_with_tables_url)
        monkeypatch.chdir(tmp_path)
        database = Database(sqlite_with_tables_url)
        for number in (1, 2):
            make_model(database, tmp_path, number=number)
        database.close()
        write_rows(tmp_path / "rows.txt", N_ROWS)

        def call(*arguments: str) -> tuple[int, str, str]:
            capsys.readouterr()
            code = main(arguments)
            told = capsys.readouterr()
            return code, told.out, told.err

        return call

    def test_by_the_champion(self, tuner: Any, tmp_path: Path) -> None:
        arguments = ["predict", "--model", "s", "--data", "rows.txt", "--out", "p.parquet", "--device", "cpu"]
        code, _, err = tuner(*arguments)
        assert (code, "model s: expected a champion, got none; there is s:1 (candidate), s:2" in err) == (2, True)
        assert tuner("promote", "--model", "s:2")[0] == 0
        code, out, _ = tuner(*arguments)
        assert code == 0
        assert out.startswith("p.parquet: 1000 rows by s:2, ")
        assert set(pq.read_table(tmp_path / "p.parquet")["model_version"].to_pylist()) == {"s:2"}
        code, _, err = tuner(*arguments)
        assert (code, err) == (2, "p.parquet: expected no such file, got one; --force replaces it\n")
        assert tuner(*arguments, "--force")[0] == 0

    def test_by_a_version_and_by_a_folder_to_the_same_scores(self, tuner: Any, tmp_path: Path) -> None:
        (folder,) = (path for path in (tmp_path / "runs" / "models" / "s").iterdir() if b"0.79" in
                     (path / "model.json").read_bytes())  # fmt: skip
        for reference, file in (("s:1", "a.parquet"), (str(folder), "b.parquet")):
            code, out, _ = tuner("predict", "--model", reference, "--data", "rows.txt", "--out", file)
            assert code == 0
        checksum = open_folder(folder).checksum
        assert checksum in out
        tables = [pq.read_table(tmp_path / name).drop(["model_version"]) for name in ("a.parquet", "b.parquet")]
        assert tables[0].equals(tables[1])

    NEWEST = ("predict", "--model", "s:1", "--data", "rows.txt", "--device", "cpu", "--newest")

    def test_the_newest_day_is_ranked(self, tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order = np.argsort(-scores_of_all()[990:], kind="stable") + 990
        tradable = np.ones(N_ROWS, bool)
        tradable[order[1]] = False
        order_in_time(monkeypatch, 20230306 + np.arange(N_ROWS) // 10, tradable)
        arguments = ["predict", "--model", "s:1", "--data", "rows.txt", "--device", "cpu", "--top", "6"]
        code, out, _ = tuner(*arguments, "--out", "p.parquet")
        first, title, columns, *rows = out.splitlines()
        n_selected = int((scores_of_all()[order] >= 0.25).sum()) - 1
        assert (code, 0 < n_selected < 5) == (0, True)
        assert first.startswith("p.parquet: 1000 rows by s:1, ")
        assert title == (
            f"date 20230405: 10 rows, {n_selected} selected by s:1, certified at precision 0.6 with confidence 0.9"
        )
        assert columns.split() == ["rank", "symbol", "probability", "decision"]
        assert [row.split()[:2] for row in rows] == [[str(i + 1), f"s{row}"] for i, row in enumerate(order[:6])]
        told = [row.split(maxsplit=3)[3].strip() for row in rows]
        assert told == ["yes", "not tradable", *["yes"] * (n_selected - 1), *["no"] * (5 - n_selected)]

    def test_the_newest_day_alone(self, tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order_in_time(monkeypatch, np.arange(N_ROWS) // 10)
        before = left_in(tmp_path)
        code, out, _ = tuner(*self.NEWEST)
        assert code == 0
        assert out.startswith("date 99: 10 rows, ")
        assert set(left_in(tmp_path)) <= {*before, "runs"}
        code, out, _ = tuner(*self.NEWEST, "--out", "p.parquet")
        assert out.startswith("p.parquet: 10 rows by s:1, ")
        assert pq.read_table(tmp_path / "p.parquet")["row"].to_pylist() == list(range(990, 1000))

    def test_the_newest_day_of_a_model_that_promises_nothing(
        self, tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(tmp_path / "infeasible", certificate=INFEASIBLE)
        order_in_time(monkeypatch, np.arange(N_ROWS) // 10, np.arange(N_ROWS) % 10 != 0)
        arguments = ["predict", "--model", "./infeasible", *self.NEWEST[3:]]
        code, out, _ = tuner(*arguments)
        title, _, *rows = out.splitlines()
        assert code == 0
        assert title.startswith("date 99: 10 rows, ")
        assert title.endswith(" is infeasible: no decisions are issued")
        assert sorted(row.split(maxsplit=3)[3].strip() for row in rows) == ["not tradable", *["–"] * 9]
        content = json.loads(tuner(*arguments, "--format", "json")[1])
        assert (content["status"], content["n_selected"], content["newest"]["n_selected"]) == (
            "infeasible", None, None,
        )  # fmt: skip

    def test_the_newest_day_for_machines(self, tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order_in_time(monkeypatch, np.arange(N_ROWS) // 10)
        code, out, err = tuner(*self.NEWEST, "--format", "json", "--out", "p.parquet", "--top", "3")
        content = json.loads(out)
        rows = content["newest"].pop("rows")
        n_selected = int((scores_of_all()[990:] >= 0.25).sum())
        assert content == {
            "model": "s:1", "out": "p.parquet", "n_rows": 10, "n_selected": n_selected, "status": "certified",
            "target": 0.6, "confidence": 0.9,
            "newest": {"key": "date", "value": 99, "n_rows": 10, "n_selected": n_selected},
        }  # fmt: skip
        assert code == 0
        assert "p.parquet: 10 rows by s:1" in err
        table = pq.read_table(tmp_path / "p.parquet").sort_by([("score", "descending")]).slice(0, 3)
        names = ["symbol", "date", "tradable", "probability", "decision"]
        assert rows == [{"rank": i + 1, **row} for i, row in enumerate(table.select(names).to_pylist())]
        read = list(csv.DictReader(io.StringIO(tuner(*self.NEWEST, "--format", "csv", "--top", "3")[1])))
        assert read == [{name: str(value) for name, value in row.items()} for row in rows]

    def test_rows_without_an_order_in_time(self, tuner: Any) -> None:
        arguments = ["predict", "--model", "s:1", "--data", "rows.txt", "--out", "p.parquet", "--force"]
        assert len(tuner(*arguments)[1].splitlines()) == 1
        assert json.loads(tuner(*arguments, "--format", "json")[1])["newest"] is None
        assert tuner(*arguments, "--format", "csv")[1] == ""
        code, out, err = tuner(*self.NEWEST)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith(
            "--newest: expected rows with an order in time, got those of tests.toy"
        )

    def test_neither_a_file_nor_the_newest_day(self, tuner: Any) -> None:
        code, out, err = tuner(*self.NEWEST[:-1])
        assert (code, out) == (2, "")
        assert "expected --out FILE, or --newest to print the newest rows alone" in err
        assert len(err.splitlines()) == 1

    @pytest.mark.parametrize("reference", ["s:1", "folder"])
    def test_damaged_it_scores_nothing(self, tuner: Any, tmp_path: Path, reference: str) -> None:
        for folder in (tmp_path / "runs" / "models" / "s").iterdir():
            (folder / "model.json").write_text("{}")
        chosen = f"./runs/models/s/{folder.name}" if reference == "folder" else reference
        code, _, err = tuner("predict", "--model", chosen, "--data", "rows.txt", "--out", "p.parquet")
        assert code == 2
        assert "model.json: checksum does not match; the model is damaged, restore the folder" in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "p.parquet").exists()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"--model": "t"}, "model t: expected a registered model, got none; there is s"),
            ({"--model": "s:7"}, "model s: expected version 7, got none"),
            ({"--model": "./t"}, "t: expected a model folder, got none"),
            ({"--data": "none.txt"}, "none.txt: expected a file or folder to score, got nothing"),
            ({"--out": "none/p.parquet"}, "none: expected a folder to write to, got none"),
            ({"--device": "cuda:99"}, "got 'cuda:99'"),
        ],
    )
    def test_bad_input(self, tuner: Any, changes: dict[str, str], said: str) -> None:
        given = {"--model": "s:1", "--data": "rows.txt", "--out": "p.parquet", **changes}
        code, _, err = tuner("predict", *(part for pair in given.items() for part in pair))
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1
