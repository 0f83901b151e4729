"""models/gift/inference.py: an exported model alone, on rows it has seen and on rows that are like no other."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.exported import MODEL
from models.gift.data import GiftDataset, load
from models.gift.inference import KEYS, TENSORS, read_model
from models.gift.trainer import GiftConfig, GiftTrainer
from models.trainer import ROLES, DataSpec, Decision, InputError, Predictions, Run, ScoredRows
from tests.models.gift.tables import ALL, make_frame, options, spec

TRAINER = GiftTrainer()
DECISION = Decision(task="rich", target_precision=0.3)
FEATURES = ["age", "gains", "gaps", "fixed", "city"]
CONFIG: dict[str, Any] = {
    "tasks": {
        "weeks": {"loss": "mse"},
        "rich": {"loss": "focal"},
        "pays": {"loss": "bce"},
        "paid": {"loss": "huber"},
    },
    "network": {"depth": 2, "width": 24, "head_width": 4, "embedding_dim": 2},
    "training": {"max_epochs": 1},
}


def fitted(config: dict[str, Any], data: GiftDataset, folder: Path, decision: Decision = DECISION) -> Path:
    run = Run(folder, 5, "cpu", 1, decision)
    last = [m.step for m in TRAINER.fit(GiftConfig(**config), data, run)][-1]
    return folder / "attempt-1" / f"step-{last:05d}"


def exported(checkpoint: Path, data: GiftDataset, folder: Path) -> Path:
    folder.mkdir()
    TRAINER.export(checkpoint, data, folder)
    return folder


def score(model: Path, source: Path, batch_rows: int = 65536) -> list[ScoredRows]:
    return list(TRAINER.score(model, source, source.parent / "no-cache", batch_rows=batch_rows))


def joined(batches: list[ScoredRows]) -> Predictions:
    parts = [batch.predictions for batch in batches]
    kinds = []
    for kind in ("scores", "calibrated"):
        names = getattr(parts[0], kind)
        kinds.append({name: np.concatenate([getattr(p, kind)[name] for p in parts]) for name in names})
    return Predictions(*kinds)


def assert_same(found: Predictions, expected: Predictions, rows: Any = slice(None)) -> None:
    for kind in ("scores", "calibrated"):
        assert getattr(found, kind).keys() == getattr(expected, kind).keys()
        for name, values in getattr(expected, kind).items():
            assert getattr(found, kind)[name][rows].tobytes() == values.tobytes(), (kind, name)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GiftDataset, Path]:
    """The table's CSV file, the data, and a checkpoint of them."""
    folder = tmp_path_factory.mktemp("table")
    given = spec(folder, make_frame(), options())
    data = load(given, ALL)
    return given.path, data, fitted(CONFIG, data, folder / "run")


@pytest.fixture(scope="module")
def model(table: tuple[Path, GiftDataset, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, data, checkpoint = table
    return exported(checkpoint, data, tmp_path_factory.mktemp("exported") / "model")


# ------------------------------------------------------------------------------------------- rows of the study

NETWORKS = {
    "bins": {"network": {"depth": 1, "width": 33, "numeric_embedding": "piecewise_linear", "bin_embedding_dim": 3}},
    "no batch norm": {"network": {"depth": 3, "width": 48, "batch_norm": False}},
    "one task": {"tasks": {"rich": {"loss": "bce"}}},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_scores_the_rows_of_its_study_to_the_bit(
    table: tuple[Path, GiftDataset, Path], tmp_path: Path, name: str
) -> None:
    """Train has gaps, missing and rare levels; the file is scored in batches that no role begins with."""
    file, data, _ = table
    checkpoint = fitted({**CONFIG, **NETWORKS[name]}, data, tmp_path / "run")
    found = joined(score(exported(checkpoint, data, tmp_path / "model"), file, batch_rows=391))
    start = 0
    for role in ROLES:  # split by time: roles follow one another
        rows = slice(start, start + data.manifest.rows[role])
        assert_same(found, TRAINER.predict(checkpoint, data, role), rows)
        start = rows.stop


@pytest.mark.parametrize("kind", ["numbers alone", "categories alone"])
def test_a_model_of_one_kind_of_column(tmp_path: Path, kind: str) -> None:
    changed = {"categorical_columns": []} if kind == "numbers alone" else {"numeric_columns": []}
    given = spec(tmp_path, make_frame(), options(**changed))
    data = load(given, ALL)
    checkpoint = fitted(CONFIG, data, tmp_path / "run")
    found = joined(score(exported(checkpoint, data, tmp_path / "model"), given.path))
    assert_same(found, TRAINER.predict(checkpoint, data, "train"), slice(0, data.manifest.rows["train"]))


def test_a_clicks_folder_is_scored_with_the_features_of_training(simulated: DataSpec, tmp_path: Path) -> None:
    data = load(simulated, ALL)
    config = {
        "tasks": {"has_gift": {"loss": "focal"}, "gift_amount": {"loss": "mse"}},
        "network": {"depth": 1, "width": 16},
        "training": {"max_epochs": 1},
    }
    decision = Decision(task="has_gift", target_precision=0.1, unit="user_id")
    checkpoint = fitted(config, data, tmp_path / "run", decision)
    source = next(simulated.cache.glob("simulated-*")) / "KuaiLive"
    batches = score(exported(checkpoint, data, tmp_path / "model"), source, batch_rows=1111)
    n_rows = sum(data.manifest.rows.values())
    assert {b.n_rows for b in batches} == {n_rows}
    assert [b.first_row for b in batches] == list(range(0, n_rows, 1111))
    found = joined(batches)
    start = 0
    for role in ROLES:  # split by day: roles follow one another
        rows = slice(start, start + data.manifest.rows[role])
        assert_same(found, TRAINER.predict(checkpoint, data, role), rows)
        start = rows.stop
    keys = {name: np.concatenate([b.keys[name] for b in batches]) for name in KEYS}
    clicks = pd.read_csv(source / "click.csv")
    expected = clicks.sort_values(["timestamp", "user_id", "live_id", "streamer_id", "watch_live_time"])
    for name in KEYS:
        np.testing.assert_array_equal(keys[name], expected[name])
    test_user = TRAINER.labels(data, "test", decision).unit
    np.testing.assert_array_equal(keys["user_id"][-len(test_user) :], test_user)
    with pytest.raises(InputError, match="expected a folder with the KuaiLive files"):
        score(tmp_path / "model", tmp_path / "nowhere")


def test_every_format_of_a_table_has_the_same_scores(
    table: tuple[Path, GiftDataset, Path], model: Path, tmp_path: Path
) -> None:
    file, _, _ = table
    expected = joined(score(model, file))
    frame = pd.read_csv(file)
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=300)
    frame.astype({"city": "category"}).to_parquet(tmp_path / "c.parquet", row_group_size=700)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(file.read_bytes()))
    for name, known in (("t.parquet", 2000), ("c.parquet", 2000), ("t.csv.gz", None)):
        batches = score(model, tmp_path / name, batch_rows=450)
        assert [(b.first_row, b.n_rows) for b in batches] == [(450 * i, known) for i in range(5)]
        assert all(b.keys == {} for b in batches)
        assert_same(joined(batches), expected)


@pytest.mark.parametrize("batch_rows", [1, 7, 4096, 4097])
def test_a_row_has_the_same_scores_in_any_batch(model: Path, tmp_path: Path, batch_rows: int) -> None:
    make_frame(n=60, seed=9)[FEATURES].to_csv(tmp_path / "new.csv", index=False)
    whole = score(model, tmp_path / "new.csv")
    assert_same(joined(score(model, tmp_path / "new.csv", batch_rows)), joined(whole))
    with pytest.raises(InputError, match="batch_rows: expected at least 1, got 0"):
        score(model, tmp_path / "new.csv", 0)


# ------------------------------------------------------------------------------------------- the documented rule

ROW = {"age": 40.0, "gains": 10.0, "gaps": 0.5, "fixed": 7.25, "city": "Bern"}


@pytest.fixture
def of_rows(model: Path, tmp_path: Path) -> Callable[..., list[tuple[float, ...]]]:
    """Scores of ROW with fields changed, one tuple of all tasks a row."""

    def scores(*changes: dict[str, Any]) -> list[tuple[float, ...]]:
        pd.DataFrame([{**ROW, **change} for change in changes]).to_parquet(tmp_path / "rows.parquet")
        found = joined(score(model, tmp_path / "rows.parquet")).scores
        return list(zip(*(values.tolist() for values in found.values()), strict=True))

    return scores


def test_unknown_and_missing_levels_are_one_and_the_same(
    of_rows: Callable[..., list[tuple[float, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "models.gift"):
        bern, unknown, missing, blank = of_rows({}, {"city": "Atlantis"}, {"city": None}, {"city": "bern"})
    assert unknown == missing == blank != bern
    told = [r.getMessage() for r in caplog.records if r.action == "scored"]
    assert told == ["rows.parquet: 4 rows scored; levels unknown to the model: city 2"]


def test_a_missing_number_is_the_mean_of_train_and_says_so_where_train_had_gaps(
    of_rows: Callable[..., list[tuple[float, ...]]],
) -> None:
    train = make_frame()[:1400]
    mean = {"age": float(train["age"].mean()), "gaps": float(train["gaps"].mean())}
    missing, at_mean = of_rows({"age": np.nan}, {"age": mean["age"]})
    assert missing == pytest.approx(at_mean, rel=1e-5)
    missing, at_mean = of_rows({"gaps": np.nan}, {"gaps": mean["gaps"]})
    assert missing != pytest.approx(at_mean, rel=1e-3)


def test_a_column_that_was_constant_in_train_says_nothing(of_rows: Callable[..., list[tuple[float, ...]]]) -> None:
    usual, other, missing = of_rows({}, {"fixed": 1e30}, {"fixed": np.nan})
    assert usual == other == missing


# ------------------------------------------------------------------------------------------- bad rows


def refusal(model: Path, source: Path, batch_rows: int = 10) -> str:
    with pytest.raises(InputError) as caught:
        score(model, source, batch_rows)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{source.parent}/")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("age", "old", "column age: expected a number, got 'old'"),
        ("age", "inf", "column age: expected a finite number, got inf"),
        ("gaps", "-inf", "column gaps: expected a finite number, got -inf"),
        ("age", "1e39", "column age: expected a number within +-3.4e+38, got 1e+39"),
        ("gaps", "3e38", "column gaps: expected a number of train's magnitude, got 3e+38"),
        ("age", "2024-01-01", "column age: expected a number, got '2024-01-01'"),
    ],
)
def test_a_bad_number_is_named_by_its_line(
    model: Path, tmp_path: Path, column: str, value: str, expected: str
) -> None:
    """In the third batch, and the same in parquet, where it has a row instead of a line."""
    frame = make_frame(n=40)[FEATURES].astype(str).replace("None", "").replace("nan", "")
    frame.loc[24, column] = value
    frame.to_csv(tmp_path / "new.csv", index=False)
    assert refusal(model, tmp_path / "new.csv").startswith(f"new.csv:26: {expected}")
    frame.replace("", None).to_parquet(tmp_path / "new.parquet", row_group_size=7)
    assert refusal(model, tmp_path / "new.parquet").startswith(f"new.parquet: row 25: {expected}")


def test_columns_of_the_wrong_type_are_refused(model: Path, tmp_path: Path) -> None:
    frame = make_frame(n=5)[FEATURES]
    frame.assign(age=pd.Timestamp("2024-01-01")).to_parquet(tmp_path / "new.parquet")
    assert refusal(model, tmp_path / "new.parquet").startswith("new.parquet: row 1: column age: expected a number")
    frame.assign(city=[["Bern"]] * 5).to_parquet(tmp_path / "new.parquet")
    expected = "new.parquet: column city: expected texts, numbers or dates, got list<"
    assert refusal(model, tmp_path / "new.parquet").startswith(expected)


def test_a_missing_column_names_the_nearest(model: Path, tmp_path: Path) -> None:
    for name in ("new.csv", "new.parquet"):
        frame = make_frame(n=5)[FEATURES].rename(columns={"gains": "gain"})
        frame.to_csv(tmp_path / name, index=False) if name.endswith("csv") else frame.to_parquet(tmp_path / name)
        assert refusal(model, tmp_path / name).startswith(
            f"{name}: expected column 'gains', got none such; the nearest are gain"
        )


def test_files_that_are_no_tables_with_rows(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text(",".join(FEATURES) + "\n")
    assert refusal(model, file) == "new.csv: expected a table with rows, got an empty one"
    file.write_text("")
    assert refusal(model, file) == "new.csv: expected a header line and rows, got an empty file"
    file.write_text(",".join(FEATURES) + "\n" + "1,1,1,1,Bern\n" * 30 + "1,2\n")
    assert refusal(model, file) == "new.csv:32: expected 5 fields as in the header, got 2"
    make_frame(n=5)[FEATURES].to_parquet(tmp_path / "new.parquet")
    (tmp_path / "new.parquet").write_bytes((tmp_path / "new.parquet").read_bytes()[:-30])
    assert refusal(model, tmp_path / "new.parquet").startswith("new.parquet: expected a ")
    assert "new.csv, new.parquet; name the file" in refusal(model, tmp_path)
    make_frame(n=5)[FEATURES][:0].to_parquet(tmp_path / "none.parquet")
    assert refusal(model, tmp_path / "none.parquet") == "none.parquet: expected a table with rows, got an empty one"


# ------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_no_path_and_nothing_of_the_rows(model: Path) -> None:
    assert sorted(p.name for p in model.iterdir()) == [MODEL, TENSORS]
    content = json.loads((model / MODEL).read_text())
    assert content["trainer"] == "gift"
    assert "path" not in content["data"]
    assert content["levels"] == {"city": ["Basel", "Bern", "Chur"]}
    tensors = load_file(model / TENSORS)
    assert {name.partition("/")[0] for name in tensors} == {"network", "quantiles"}


def test_an_export_needs_an_empty_folder(table: tuple[Path, GiftDataset, Path], tmp_path: Path) -> None:
    _, data, checkpoint = table
    (tmp_path / "left").write_text("from before")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="expected an empty folder to export to"):
            TRAINER.export(checkpoint, data, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["left"]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def altered(**changed: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        content = json.loads((folder / MODEL).read_text())
        (folder / MODEL).write_text(json.dumps({**content, **changed}))

    return alter


def with_tensors(alter: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        alter(tensors)
        save_file(tensors, folder / TENSORS)

    return write


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model": (lambda f: (f / MODEL).unlink(), "expected an exported model, got none"),
    "no json": (lambda f: (f / MODEL).write_text('{"trainer": "gi'), "expected JSON, got a damaged file"),
    "another trainer": (altered(trainer="toy"), "expected a model of the trainer gift, got another"),
    "another format": (altered(format=2), "expected model format 1, got 2"),
    "other rules": (
        altered(versions={"preparation": 9, "reader": 2}),
        "expected a model of the rules preparation 1, reader 2, got preparation 9, reader 2; score with the",
    ),
    "no versions": (altered(versions=None), "expected a model of the rules preparation 1, reader 2, got None"),
    "no config": (altered(config={}), "expected a whole exported model, got a damaged one"),
    "no encoder": (altered(numeric={}), "expected a whole exported model, got a damaged one"),
    "other levels": (altered(levels={"city": ["Bern"]}), "expected a whole exported model, got a damaged one"),
    "no weights": (lambda f: (f / TENSORS).unlink(), "expected the weights of the model, got none"),
    "torn weights": (lambda f: (f / TENSORS).write_bytes(b"torn"), "expected safetensors, got a damaged file"),
    "a weight less": (with_tensors(lambda t: t.pop("network/head_bias")), "got a damaged one"),
    "no quantiles": (with_tensors(lambda t: t.pop("quantiles")), "got a damaged one"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_refused_before_any_row_is_read(copy: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    read_model(copy, "cpu")
    damage(copy)
    with pytest.raises(InputError) as caught:
        TRAINER.score(copy, copy / "nowhere", copy)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- memory


def random_rows(n_rows: int, seed: int) -> pa.Table:
    """Features alone."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.random(n_rows) for name in FEATURES[:4]}
    columns["city"] = pa.array(["Bern", "Basel", "Zug"]).take(pa.array(rng.integers(0, 3, n_rows)))
    return pa.table(columns)


def write_parquet(path: Path, n_rows: int, rows_of_a_group: int) -> None:
    with pa.parquet.ParquetWriter(path, random_rows(1, 0).schema) as file:
        for start in range(0, n_rows, rows_of_a_group):
            rows = random_rows(min(rows_of_a_group, n_rows - start), start)
            file.write_table(rows, row_group_size=rows_of_a_group)


MEASURE = """
import sys
from pathlib import Path
import pyarrow as pa
from models.gift.trainer import GiftTrainer
model, *sources = map(Path, sys.argv[1:])
for source in sources:
    n_rows = held = 0
    for batch in GiftTrainer().score(model, source, source, batch_rows=20_000):
        n_rows += len(batch.predictions.scores["rich"])
        held = max(held, pa.total_allocated_bytes())
    status = Path("/proc/self/status").read_text().split()
    print(n_rows, held // 1024, status[status.index("VmHWM:") + 1])
"""
LENGTHS = {"short.csv": 40_000, "short.parquet": 40_000, "long.parquet": 600_000, "one-group.parquet": 600_000}
LENGTHS["long.csv"] = 100_000


def test_memory_does_not_grow_with_the_rows(model: Path, tmp_path: Path) -> None:
    """The long parquet files are 19 MB as numbers alone, one of them a single group of rows. What arrow holds is
    some buffers; the whole process is allowed more, as allocators keep what is free."""
    for name, n_rows in LENGTHS.items():
        if name.endswith(".csv"):
            pa.csv.write_csv(random_rows(n_rows, 0), tmp_path / name)
        else:
            write_parquet(tmp_path / name, n_rows, n_rows if name.startswith("one") else 30_000)
    command = [sys.executable, "-c", MEASURE, str(model), *(str(tmp_path / name) for name in LENGTHS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    found = dict(zip(LENGTHS, (tuple(map(int, line.split())) for line in done.stdout.splitlines()), strict=True))
    assert {name: n_rows for name, (n_rows, _, _) in found.items()} == LENGTHS
    assert max(held for _, held, _ in found.values()) < 14_000, found
    assert found["long.parquet"][2] < found["short.parquet"][2] + 10_000, found
    for name in LENGTHS:
        (tmp_path / name).unlink()
