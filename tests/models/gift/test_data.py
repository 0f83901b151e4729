"""models/gift/data.py: the specification, and what load returns and refuses."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import ValidationError

from models import prepared
from models.gift import preparation
from models.gift.data import GiftData, load
from models.gift.origin import find_origin
from models.gift.simulate import SCALES, SIMULATOR_VERSION
from models.trainer import ROLES, DataSpec, DiskError, InputError, Role
from tests.models.gift.tables import (
    ALL,
    KUAILIVE,
    SEARCH,
    SHARES,
    TASKS,
    make_frame,
    options,
    spec,
    train_statistics,
)

# ------------------------------------------------------------------------------------------- the specification


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"split": {"by": "hash", **SHARES, "train": 0.6}}, "expected 1, got 0.9"),
        ({"split": {"by": "day", "timezone": "Asia/Peking", "column": "when", **SHARES}}, "got 'Asia/Peking'"),
        ({"split": {"by": "time", **SHARES}}, "split.column: expected a column for `by: time`"),
        ({"split": {"by": "hash", "column": "age", **SHARES}}, "not allowed with `by: hash`"),
        ({"numeric_columns": ["age", "paid"]}, "paid: is the target of task"),
        ({"numeric_columns": ["age", "city"]}, "city: listed twice"),
        ({"numeric_columns": [], "categorical_columns": []}, "at least one feature column"),
        ({"simulate": {"scale": 0.1}}, "simulate: for `source: kuailive` only"),
        ({"snapshot_features": True}, "snapshot_features: for `source: kuailive` only"),
        ({"tasks": {}}, "at least 1 item"),
        ({"tasks": {"a b": {"kind": "binary", "column": "y"}}}, "expected a name of letters"),
        ({"tasks": {"y": {"kind": "binary", "column": "y", "transform": "log1p"}}}, "transform: not allowed"),
        ({"tasks": {"y": {"kind": "regression", "column": "y", "above": 1}}}, "above: not allowed"),
        ({"tasks": {"y": {"kind": "binary", "column": "y", "above": 1, "positive": 2}}}, "exclude each other"),
        ({"tasks": {"y": {"kind": "regression", "column": "y", "conditional_on": "z"}}}, "expected a binary task"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_a_wrong_specification_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(**changed)
    assert expected in str(caught.value)


def test_kuailive_knows_its_columns() -> None:
    with pytest.raises(ValidationError, match="expected one of watch_time") as caught:
        GiftData(**{**KUAILIVE, "tasks": {"y": {"kind": "binary", "column": "has_gfit"}}, "numeric_columns": ["a"]})
    assert "numeric_columns, categorical_columns: for `source: table` only" in str(caught.value)


def test_tasks_keep_their_order() -> None:
    assert [task.name for task in options().task_list()] == list(TASKS)


def test_the_coordinator_imports_no_torch() -> None:
    code = (
        "import sys, models.gift.data, models.gift.origin, models.gift.description\n"
        "assert not {'torch', 'optuna', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# ------------------------------------------------------------------------------------------- load


def test_load_prepares_once_and_opens_only_the_roles_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = spec(tmp_path, make_frame(), options())
    dataset = load(given, SEARCH)
    assert dict(dataset.manifest.rows) == {"train": 1400, "valid": 200, "calibrate": 100, "test": 300}
    assert not dataset.manifest.simulated
    assert dataset.manifest.source == "table t.csv"
    part = dataset.part("train")
    assert [type(a) for a in (part.numeric, part.categorical, part.labels, part.unit)] == [np.memmap] * 4
    with pytest.raises(KeyError, match="role test was not opened"):
        dataset.part("test")
    monkeypatch.setattr(preparation, "write", None)  # a second preparation would fail
    np.testing.assert_equal(train_statistics(load(given, ALL)), train_statistics(dataset))


def test_a_search_is_unaffected_by_deleted_calibrate_and_test_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = spec(tmp_path, make_frame(), options())
    before = load(given, SEARCH)
    folder = next((tmp_path / "cache").glob(f"{before.manifest.data_hash[:16]}*"))
    for role in ("calibrate", "test"):
        shutil.rmtree(folder / role)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write", None)
        after = load(given, SEARCH)
        np.testing.assert_equal(train_statistics(after), train_statistics(before))
    with caplog.at_level(logging.WARNING):
        assert len(load(given, ALL).part("test").unit) == 300
    assert "building it again" in caplog.text


def test_the_hash_follows_content_and_options_but_no_path(tmp_path: Path) -> None:
    frame = make_frame()
    (tmp_path / "elsewhere").mkdir()
    first = load(spec(tmp_path, frame, options()), SEARCH).manifest
    moved = load(spec(tmp_path / "elsewhere", frame, options(path="other.csv")), SEARCH).manifest
    assert moved.data_hash == first.data_hash
    assert moved.files == first.files == {"t.csv": first.files["t.csv"]}
    hashes = {first.data_hash}
    variants = [
        options(numeric_columns=["age"]),
        options(categorical_columns=[]),
        options(split={"by": "time", "column": "when", **SHARES, "train": 0.65, "test": 0.2}),
        options(tasks={**TASKS, "pays": {**TASKS["pays"], "above": 20}}),
        options(tasks=dict(reversed(TASKS.items()))),  # the order of the label columns
    ]
    hashes |= {load(spec(tmp_path, None, variant), SEARCH).manifest.data_hash for variant in variants}
    frame.loc[0, "age"] += 1
    hashes.add(load(spec(tmp_path, frame, options()), SEARCH).manifest.data_hash)
    assert len(hashes) == 7


def test_versions_are_part_of_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = spec(tmp_path, make_frame(), options())
    first = load(given, SEARCH).manifest.data_hash
    monkeypatch.setattr("models.gift.origin.PREPARATION_VERSION", 99)
    assert load(given, SEARCH).manifest.data_hash != first


@pytest.mark.parametrize(
    ("role", "rows"), [("train", slice(0, 1400)), ("valid", slice(1400, 1600)), ("test", slice(1700, 2000))]
)
def test_a_role_without_positives_is_refused_where_it_is_opened(tmp_path: Path, role: Role, rows: slice) -> None:
    frame = make_frame()
    frame.loc[frame.index[rows], "income"] = "- 50000."
    given = spec(tmp_path, frame, options())
    with pytest.raises(InputError, match=f"split: role {role} has no positive rich among"):
        load(given, ALL)
    assert not list((tmp_path / "cache").glob("[!.]*/train")), "nothing is kept of a refused dataset"
    if role == "test":  # a search does not open it
        assert len(load(given, SEARCH).part("valid").unit) == 200
        with pytest.raises(InputError, match="role test has no positive rich"):
            load(given, ALL)  # also where it was prepared before


def test_a_role_without_negatives_or_rows_is_refused(tmp_path: Path) -> None:
    frame = make_frame()
    frame.loc[1400:1599, "income"] = "50000+."
    with pytest.raises(InputError, match="role valid has no negative rich"):
        load(spec(tmp_path, frame, options()), SEARCH)
    frame = make_frame()
    frame.loc[1400:, "when"] = 1400  # one moment: all of it is test
    with pytest.raises(InputError, match="role valid has no rows"):
        load(spec(tmp_path, frame, options()), SEARCH)


def test_a_target_that_never_varies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tasks\.weeks: expected a target that varies on train"):
        load(spec(tmp_path, make_frame().assign(weeks=5), options()), SEARCH)


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = spec(tmp_path, make_frame(), options())
    write = preparation.write

    def write_and_touch(*args: Any, **more: Any) -> None:
        write(*args, **more)
        given.path.write_text(given.path.read_text() + "\n")

    monkeypatch.setattr(preparation, "write", write_and_touch)
    with pytest.raises(InputError, match="changed while they were read"):
        load(given, SEARCH)


def test_a_full_disk_is_a_disk_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: prepared.ArrayWriter, rows: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.ArrayWriter, "append", full)
    with pytest.raises(DiskError):
        load(spec(tmp_path, make_frame(), options()), SEARCH)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) in ([".lock"], [".json", ".lock"])


# ------------------------------------------------------------------------------------------- KuaiLive


def test_simulated_data_take_the_place_of_an_absent_default_path_and_say_so(
    simulated: DataSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = load(simulated, ALL)
    said = [r.getMessage() for r in caplog.records if r.action == "simulated_data"]
    assert len(said) == 1
    assert "scale 0.004, seed 7" in said[0]
    assert dataset.manifest.simulated
    assert "scale 0.004, seed 7" in dataset.manifest.source
    assert [p.name for p in simulated.cache.glob("simulated-*")] == [f"simulated-0.004-7-v{SIMULATOR_VERSION}"]
    assert {task.name for task in dataset.tasks} == {"watch_time", "has_comment", "has_gift", "gift_amount"}
    part = dataset.part("train")
    assert np.isfinite(part.numeric).all()
    gift, amount = part.labels[:, 2] == 1, part.labels[:, 3]
    np.testing.assert_array_equal(amount > 0, gift)
    assert dataset.base_rate["has_gift"] == pytest.approx(gift.mean())


def test_close_scales_of_the_simulation_do_not_share_a_folder(tmp_path: Path) -> None:
    given = [GiftData(**{**KUAILIVE, "simulate": {"scale": scale}}) for scale in (0.01234567, 0.01234568)]
    found = [find_origin(DataSpec(options, Path("nowhere/at/all"), tmp_path)) for options in given]
    assert found[0].path != found[1].path


@pytest.mark.parametrize("scale", SCALES)
def test_the_specification_takes_the_scales_that_the_simulator_takes(scale: float) -> None:
    GiftData(**{**KUAILIVE, "simulate": {"scale": scale}})
    for beyond in (SCALES[0] / 2, SCALES[1] * 1.5):
        with pytest.raises(ValueError, match=r"simulate\.scale"):
            GiftData(**{**KUAILIVE, "simulate": {"scale": beyond}})


def test_a_simulated_hash_travels_and_needs_no_files(simulated: DataSpec, tmp_path: Path) -> None:
    here = load(simulated, SEARCH).manifest
    shutil.copytree(simulated.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("simulated-*"))
    there = load(DataSpec(simulated.options, Path("nowhere/at/all"), tmp_path / "cache"), SEARCH).manifest
    assert there.data_hash == here.data_hash
    assert not list((tmp_path / "cache").glob("simulated-*")), "the prepared arrays are enough"
    other = GiftData(**{**KUAILIVE, "simulate": {"scale": 0.004, "seed": 8}})
    assert find_origin(DataSpec(other, simulated.path, simulated.cache)).data_hash != here.data_hash


def test_a_given_path_or_a_null_is_never_replaced_by_simulated_data(tmp_path: Path) -> None:
    given = DataSpec(GiftData(**KUAILIVE), tmp_path / "KuaiLive", tmp_path / "cache", path_given=True)
    with pytest.raises(InputError, match="expected a folder with the KuaiLive files"):
        load(given, SEARCH)
    never = GiftData(**{**KUAILIVE, "simulate": None})
    with pytest.raises(InputError, match="expected a folder with the KuaiLive files"):
        load(DataSpec(never, tmp_path / "KuaiLive", tmp_path / "cache"), SEARCH)
    assert not (tmp_path / "cache").exists()


def test_real_files_are_taken_where_they_are_and_equal_the_simulation(simulated: DataSpec, tmp_path: Path) -> None:
    shutil.copytree(simulated.cache / f"simulated-0.004-7-v{SIMULATOR_VERSION}" / "KuaiLive", tmp_path / "KuaiLive")
    given = DataSpec(simulated.options, tmp_path / "KuaiLive", tmp_path / "cache")
    dataset = load(given, SEARCH)
    assert not dataset.manifest.simulated
    names = {"click", "comment", "like", "gift", "user", "streamer", "room"}
    assert set(dataset.manifest.files) == {f"{name}.csv" for name in names}
    np.testing.assert_equal(train_statistics(dataset), train_statistics(load(simulated, SEARCH)))
    assert dataset.manifest.data_hash != load(simulated, SEARCH).manifest.data_hash


def test_tasks_of_kuailive_can_be_thresholds(simulated: DataSpec) -> None:
    tasks = {"long": {"kind": "binary", "column": "watch_time", "above": 300_000}}
    given = DataSpec(GiftData(**{**KUAILIVE, "tasks": tasks}), simulated.path, simulated.cache)
    labels = load(given, SEARCH).part("train").labels[:, 0]
    watch = load(simulated, SEARCH).part("train").labels[:, 0]
    np.testing.assert_array_equal(labels, watch > 300_000)
    wrong = {"long": {"kind": "binary", "column": "watch_time"}}
    with pytest.raises(InputError, match=r"tasks\.long\.column: expected a 0/1 column, got watch_time"):
        load(DataSpec(GiftData(**{**KUAILIVE, "tasks": wrong}), simulated.path, simulated.cache), SEARCH)


# ------------------------------------------------------------------------------------------- real data

SHARED = Path(os.environ.get("TUNER_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
CENSUS = Path(__file__).parents[3] / "configs" / "census.yaml"


@pytest.mark.skipif(not (SHARED / "census").is_dir(), reason=f"no census extract under {SHARED}")
@pytest.mark.skipif(not CENSUS.is_file(), reason="configs/census.yaml is not there yet")
def test_census(tmp_path: Path) -> None:
    section = yaml.safe_load(CENSUS.read_text())["data"]
    given = DataSpec(GiftData(**section), SHARED / "census", tmp_path, path_given=True)
    dataset = load(given, ALL)
    assert sum(dataset.manifest.rows.values()) == 99_762
    assert dataset.base_rate == pytest.approx({"has_dividends": 0.106, "income_50k": 0.062}, abs=0.003)
    assert len(dataset.numeric_names) + len(dataset.categorical_names) == 38
    frame = pd.read_parquet(next((SHARED / "census").glob("*.parquet")))
    columns = [*section["numeric_columns"], *section["categorical_columns"]]
    role = pd.Series({int(row): role for role in ROLES for row in dataset.part(role).unit}).sort_index()
    copies = frame.groupby(columns, observed=True, dropna=False).ngroup()
    assert role.groupby(copies.to_numpy()).nunique().max() == 1
    assert frame.duplicated().sum() == 883
