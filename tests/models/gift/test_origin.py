"""models/gift/origin.py: what identifies the data is the same on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from models.gift.data import GiftData, load
from models.gift.origin import find_origin
from models.gift.simulate import SIMULATOR_VERSION
from models.location import locate
from models.trainer import DataSpec, FileStamp, InputError, Manifest
from tests.models.gift.tables import KUAILIVE, SEARCH, make_frame, options, spec

NAMES = ("click", "comment", "like", "gift", "user", "streamer", "room")


def kuailive_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.csv").write_text(name)
    return folder


def stored(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a database gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(manifest)))


def test_hashes_of_stored_studies_stay(tmp_path: Path) -> None:
    """Golden: studies begun with the first release go on. Change them only together with a version of a rule."""
    (tmp_path / "t.csv").write_text("age,when\n1,2\n")
    given = GiftData(**KUAILIVE)
    cases = [
        (DataSpec(options(), tmp_path / "t.csv", tmp_path, True), "dc097fd4273b145060a080a2929d81aa"),
        (DataSpec(given, tmp_path / "nowhere", tmp_path), "9c73bc89eca0f69c48febdeda43aab23"),
        (DataSpec(given, kuailive_folder(tmp_path / "k"), tmp_path, True), "3b8129c41c01a8bc77858b510c3dc559"),
    ]
    assert [find_origin(data).data_hash[:32] for data, _ in cases] == [golden for _, golden in cases]


def test_a_manifest_holds_names_hashes_sizes_and_versions_but_no_path(tmp_path: Path) -> None:
    manifest = load(spec(tmp_path, make_frame(), options()), SEARCH).manifest
    content = (tmp_path / "t.csv").read_bytes()
    assert dict(manifest.files) == {"t.csv": FileStamp(hashlib.sha256(content).hexdigest(), len(content))}
    assert set(manifest.preparation) == {"preparation", "reader"}
    assert manifest.simulation is None
    assert str(tmp_path) not in json.dumps(stored(manifest))


def test_files_are_found_again_by_what_was_stored(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    first = load(spec(tmp_path / "here", make_frame(), options()), SEARCH).manifest
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "t.csv").rename(tmp_path / "there" / "deep" / "t.csv")
    files = {name: FileStamp(**stamp) for name, stamp in stored(first)["files"].items()}
    path = locate(files, [tmp_path / "there"], tmp_path / "cache" / "file-hashes.json")
    again = load(DataSpec(options(), path, tmp_path / "cache", True), SEARCH).manifest
    assert stored(again) == stored(first)


def test_kuailive_files_go_by_their_names_in_the_folder(tmp_path: Path) -> None:
    folder = kuailive_folder(tmp_path / "k")
    found = find_origin(DataSpec(GiftData(**KUAILIVE), folder, tmp_path / "cache", True))
    assert found.source == "KuaiLive"
    assert set(found.files) == {f"{name}.csv" for name in NAMES}
    assert found.files["gift.csv"] == FileStamp(hashlib.sha256(b"gift").hexdigest(), 4)
    assert set(found.preparation) == {"preparation", "labels", "features"}
    assert locate(found.files, [tmp_path], tmp_path / "cache" / "file-hashes.json") == folder


def test_simulated_data_travel_as_version_scale_and_seed(
    simulated: DataSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rebuilt from the options alone: no path is looked at, though one is in the specification."""
    first = load(simulated, SEARCH).manifest
    assert first.simulation == {"simulator": SIMULATOR_VERSION, "scale": 0.004, "seed": 7}
    assert dict(first.files) == {}
    there = GiftData(**{**KUAILIVE, "path": str(kuailive_folder(tmp_path / "k"))})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = load(DataSpec(there, None, tmp_path / "cache"), SEARCH).manifest
    assert stored(again) == stored(first)
    assert not caplog.records, "nothing is absent where no path is given"


def test_another_simulator_version_gives_another_hash_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = DataSpec(GiftData(**KUAILIVE), None, tmp_path)
    first = find_origin(given)
    monkeypatch.setattr("models.gift.simulate.SIMULATOR_VERSION", 99)
    other = find_origin(given)
    assert other.data_hash != first.data_hash
    assert f"simulator version {SIMULATOR_VERSION}" in first.source
    assert "simulator version 99" in other.source


@pytest.mark.parametrize("section", [options(), GiftData(**{**KUAILIVE, "simulate": None})], ids=lambda s: s.source)
def test_without_a_path_and_without_a_simulation_there_are_no_data(section: GiftData, tmp_path: Path) -> None:
    for is_given in (False, True):
        with pytest.raises(InputError, match="expected files or `simulate` in the specification, got neither"):
            load(DataSpec(section, None, tmp_path, is_given), SEARCH)
