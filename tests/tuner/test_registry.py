"""Model folders, the gate, promotion and rollback: by their functions, then by their commands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.trainer import DiskError, InputError
from storage.artifacts import ArtifactError, FolderStore
from storage.database import Database
from storage.registry import RegistryConflict
from storage.rows import ModelRow
from storage.runs import Store
from tests.race import race
from tests.tuner.stored_models import CERTIFIED, CHECK, INFEASIBLE, document, make_model, write_export
from tuner import gate, registry
from tuner.cli import main
from tuner.gate import GateRefused, judge, promote
from tuner.registry import add_candidate, find_folder, get_model, open_folder
from tuner.spec import GateSpec


@pytest.fixture
def database(sqlite_with_tables_url: str) -> Iterator[Database]:
    database = Database(sqlite_with_tables_url)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestAddCandidate:
    def test_what_is_registered(self, database: Database, store: Store, tmp_path: Path, runs: Path) -> None:
        row = make_model(database, tmp_path)
        assert (row.name, row.version, row.state, row.evaluation) == ("s", 1, "candidate", "s.evaluation-1")
        assert row.artifact == f"models/s/{row.checksum[:16]}"
        assert (row.config, row.certificate, row.data_hash) == ({"x": 0.5}, CERTIFIED, "d")
        assert row.metrics["own"] == {"pr_auc": 0.55, "ece_calibrated": 0.02}
        assert row.metrics["intervals"]["pr_auc"] == {"value": 0.54, "low": 0.5, "high": 0.58}
        assert row.metrics["check"] == CHECK
        assert row.metrics["leak"]["best"] == 0.4
        folder = runs / row.artifact
        assert files_of(folder) == ["SHA256SUMS", "model.json", "verdict.json"]
        assert row.size_bytes == sum((folder / name).stat().st_size for name in ("model.json", "verdict.json"))

    def test_the_checksum_is_that_of_the_sorted_list(self, database: Database, tmp_path: Path, runs: Path) -> None:
        row = make_model(database, tmp_path)
        folder = runs / row.artifact
        lines = [
            f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
            for name in ("model.json", "verdict.json")
        ]
        assert row.checksum == hashlib.sha256("".join(lines).encode()).hexdigest()
        subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True
        )

    def test_again_it_is_the_same(self, store: Store, tmp_path: Path, runs: Path) -> None:
        exported = write_export(tmp_path / "export")
        first = add_candidate(store, "s", exported, document(), runs, None)
        assert add_candidate(store, "s", exported, document(), runs, None) == first
        assert [path.name for path in (runs / "models" / "s").iterdir()] == [first.checksum[:16]]

    def test_a_damaged_copy_is_mended(self, store: Store, tmp_path: Path, runs: Path) -> None:
        exported = write_export(tmp_path / "export")
        row = add_candidate(store, "s", exported, document(), runs, None)
        (runs / row.artifact / "model.json").write_text("{}")
        assert add_candidate(store, "s", exported, document(), runs, None) == row
        assert open_folder(runs / row.artifact, row.checksum).checksum == row.checksum
        assert [path.name for path in (runs / "models" / "s").iterdir()] == [row.checksum[:16]]

    def test_folders_in_it_and_the_artifact_store(self, store: Store, tmp_path: Path, runs: Path) -> None:
        exported = write_export(tmp_path / "export")
        (exported / "parts").mkdir()
        (exported / "parts" / "a.bin").write_bytes(b"abc")
        (tmp_path / "store").mkdir()
        row = add_candidate(store, "s", exported, document(), runs, f"file://{tmp_path}/store")
        names = ["SHA256SUMS", "model.json", "parts/a.bin", "verdict.json"]
        assert files_of(runs / row.artifact) == names
        assert FolderStore(tmp_path / "store").names("models") == [f"{row.artifact}/{name}" for name in names]

    def test_the_nominee_that_the_folder_holds(self, store: Store, tmp_path: Path, runs: Path) -> None:
        second = CERTIFIED | {"number_on_set": 2, "assumptions": ("one", "two")}
        told = document()
        told["arms"]["two"] = {"config": {"x": 0.9}, "metrics": told["arms"]["one"]["metrics"]}
        told["nominees"].append({"arm": "two", "number": 7, "certificate": second, "check": None})
        exported = write_export(tmp_path / "export", certificate=second)
        row = add_candidate(store, "s", exported, told, runs, None)
        assert (row.config, row.metrics["arm"], row.metrics["fit"]) == ({"x": 0.9}, "two", 7)

    def test_of_no_nominee_it_is_refused(self, store: Store, tmp_path: Path, runs: Path) -> None:
        exported = write_export(tmp_path / "export", certificate=CERTIFIED | {"number_on_set": 9})
        with pytest.raises(
            InputError, match=r"verdict.json: expected the certificate of a nominee of s.evaluation-1"
        ):
            add_candidate(store, "s", exported, document(), runs, None)
        assert store.models() == []
        assert not runs.exists()

    def test_a_disk_that_refuses(self, store: Store, tmp_path: Path, runs: Path) -> None:
        runs.mkdir()
        (runs / "models").write_text("a file lies where the folder belongs")
        with pytest.raises(DiskError, match="the disk refused the model"):
            add_candidate(store, "s", write_export(tmp_path / "export"), document(), runs, None)
        assert store.models() == []

    def test_nothing_is_registered_before_it_is_stored(self, store: Store, tmp_path: Path, runs: Path) -> None:
        with pytest.raises(ArtifactError, match="expected a folder, got none"):
            add_candidate(
                store, "s", write_export(tmp_path / "export"), document(), runs, f"file://{tmp_path}/nowhere"
            )
        assert store.models() == []

    def test_killed_in_between_it_can_be_repeated(
        self, store: Store, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exported = write_export(tmp_path / "export")
        for name in ("_publish", "_flush"):
            with monkeypatch.context() as patched:
                patched.setattr(registry, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    add_candidate(store, "s", exported, document(), runs, None)
            assert store.models() == []
            assert list((runs / "models" / "s").iterdir()) == []
        assert add_candidate(store, "s", exported, document(), runs, None).version == 1


class TestOpenFolder:
    @pytest.fixture
    def folder(self, database: Database, tmp_path: Path, runs: Path) -> Path:
        return runs / make_model(database, tmp_path).artifact

    def test_what_it_is(self, folder: Path) -> None:
        found = open_folder(folder)
        assert (found.trainer, found.task, found.threshold) == ("tests.toy:ToyTrainer", "toy", 0.25)
        assert found.smearing == {"money": {"factor": 1.5, "transform": "log1p"}}
        assert found.calibrator.kind == "platt"

    def test_it_may_lie_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "elsewhere")
        assert open_folder(tmp_path / "elsewhere").checksum == open_folder(folder).checksum

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda f: (f / "model.json").unlink(), "expected the file model.json, got none"),
            (lambda f: (f / "model.json").write_text("{"), "model.json: checksum does not match"),
            (lambda f: (f / "verdict.json").write_text("{}"), "verdict.json: checksum does not match"),
            (lambda f: (f / "more.pkl").write_text(""), "expected 2 files, got one more: more.pkl"),
            (lambda f: (f / "SHA256SUMS").write_text(""), "expected 0 files, got one more: model.json"),
            (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS: expected a file of a model folder, got none"),
            (lambda f: shutil.rmtree(f), "expected a model folder, got none"),
        ],
    )
    def test_damage_is_told(self, folder: Path, damage: Callable[[Path], Any], said: str) -> None:
        damage(folder)
        with pytest.raises(InputError, match=said) as caught:
            open_folder(folder)
        assert "\n" not in str(caught.value)

    def test_another_model_in_its_place(self, database: Database, folder: Path, tmp_path: Path, runs: Path) -> None:
        other = make_model(database, tmp_path, number=2)
        with pytest.raises(InputError, match=r"expected checksum .* it is another model"):
            open_folder(folder, other.checksum)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("verdict.json", {"format": 9}, "verdict.json: expected format 1, got 9; use the tuner version"),
            ("verdict.json", {"format": 1}, "expected a model with its verdict, got one without 'task'"),
            ("verdict.json", [], "expected a JSON object, got list"),
            ("model.json", {}, "expected a model with its verdict, got one without 'trainer'"),
        ],
    )
    def test_of_another_version(self, tmp_path: Path, name: str, content: Any, said: str) -> None:
        folder = write_export(tmp_path / "export")
        (folder / name).write_text(json.dumps(content))
        (folder / "SHA256SUMS").write_bytes(registry._sums(folder)[0])
        with pytest.raises(InputError, match=said):
            open_folder(folder)


class TestFindFolder:
    @pytest.fixture
    def artifacts(self, tmp_path: Path) -> str:
        (tmp_path / "store").mkdir()
        return f"file://{tmp_path}/store"

    def test_from_here(self, database: Database, tmp_path: Path, runs: Path) -> None:
        row = make_model(database, tmp_path)
        assert find_folder(row, runs, None).path == runs / row.artifact

    @pytest.mark.parametrize("damaged", [False, True])
    def test_from_the_artifact_store(
        self, database: Database, tmp_path: Path, runs: Path, artifacts: str, damaged: bool
    ) -> None:
        row = make_model(database, tmp_path, artifacts=artifacts)
        if damaged:
            (runs / row.artifact / "model.json").write_text("{}")
        else:
            shutil.rmtree(runs)
        assert find_folder(row, runs, artifacts).checksum == row.checksum
        assert [path.name for path in (runs / "models" / "s").iterdir()] == [row.checksum[:16]]
        shutil.rmtree(tmp_path / "store")
        assert find_folder(row, runs, artifacts).checksum == row.checksum  # it is here now

    def test_nowhere(self, database: Database, tmp_path: Path, runs: Path, artifacts: str) -> None:
        row = make_model(database, tmp_path)
        shutil.rmtree(runs)
        with pytest.raises(InputError, match="or name the artifact store with --artifacts"):
            find_folder(row, runs, None)
        with pytest.raises(InputError, match=r"model s:1: expected its files here or in file:///\S+, got neither"):
            find_folder(row, runs, artifacts)

    def test_damaged_everywhere(self, database: Database, tmp_path: Path, runs: Path, artifacts: str) -> None:
        row = make_model(database, tmp_path, artifacts=artifacts)
        shutil.rmtree(runs)
        (tmp_path / "store" / row.artifact / "model.json").write_text("{}")
        with pytest.raises(InputError, match=r"model.json: checksum does not match"):
            find_folder(row, runs, artifacts)
        assert list((runs / "models" / "s").iterdir()) == []

    @pytest.mark.parametrize("name", ["../../stolen", "/stolen", "a//b"])
    def test_a_store_cannot_make_it_write_elsewhere(
        self, database: Database, tmp_path: Path, runs: Path, artifacts: str, name: str
    ) -> None:
        row = make_model(database, tmp_path, artifacts=artifacts)
        shutil.rmtree(runs)
        (tmp_path / "store" / row.artifact / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(InputError, match="expected names of files of the folder"):
            find_folder(row, runs, artifacts)


def judged(spec: GateSpec, model: ModelRow, champion: ModelRow | None = None) -> dict[str, str]:
    """The texts of the rules that failed, by name."""
    return {rule.name: rule.text for rule in judge(spec, model, champion) if not rule.passed}


def changed(model: ModelRow, **metrics: Any) -> ModelRow:
    return dataclasses.replace(model, metrics=model.metrics | metrics)


class TestGate:
    ALL = GateSpec(max_ece=0.05, max_feature_pr_auc=0.5, max_pr_auc=0.9, max_size_mb=1.0)

    @pytest.fixture
    def model(self, database: Database, tmp_path: Path) -> ModelRow:
        return make_model(database, tmp_path)

    def test_everything_passes(self, model: ModelRow) -> None:
        champion = dataclasses.replace(model, version=2)
        rules = judge(self.ALL, model, champion)
        assert [rule.name for rule in rules] == [
            "certificate", "champion", "max_ece", "max_feature_pr_auc", "max_pr_auc", "max_size_mb",
        ]  # fmt: skip
        assert all(rule.passed for rule in rules)

    def test_rules_can_be_left_out(self, model: ModelRow) -> None:
        nothing = GateSpec(certificate=False, champion=False, max_ece=None, max_size_mb=None)
        assert judge(nothing, dataclasses.replace(model, certificate=None, metrics={}), model) == []

    def test_infeasible(self, model: ModelRow) -> None:
        failed = judged(self.ALL, dataclasses.replace(model, certificate=INFEASIBLE))
        assert failed == {
            "certificate": "certificate: expected a certified threshold, got infeasible; a precision of 0.5200 "
            "could be certified, 0.0800 below 0.6000"
        }

    def test_refuted_on_test(self, model: ModelRow) -> None:
        check = {"precision": 0.55, "low": 0.51, "high": 0.59, "kept": False, "refuted": True}
        assert judged(self.ALL, changed(model, check=check)) == {
            "certificate": "certificate: expected precision 0.6000 not to be refuted on test, got precision "
            "0.5500, 0.0500 below, interval [0.51, 0.59]"
        }

    @pytest.mark.parametrize("precision", [0.59, None])
    def test_what_chance_alone_explains_does_not_refute(self, model: ModelRow, precision: float | None) -> None:
        check = {"precision": precision, "low": 0.5, "high": 0.7, "kept": None, "refuted": False}
        assert judged(self.ALL, changed(model, check=check)) == {}

    @pytest.mark.parametrize(("found", "passes"), [(0.5, True), (0.4999, False)])
    def test_the_champions_interval(self, model: ModelRow, found: float, passes: bool) -> None:
        champion = dataclasses.replace(model, version=2)
        failed = judged(self.ALL, changed(model, own={"pr_auc": found, "ece_calibrated": 0.01}), champion)
        assert (failed == {}) == passes
        if not passes:
            assert failed["champion"].endswith(
                ">= 0.5000, the low end of the champion s:2, got 0.4999, 0.0001 below"
            )

    def test_a_champion_of_other_data_is_said_to_be(self, model: ModelRow) -> None:
        champion = dataclasses.replace(model, version=2, data_hash="other")
        failed = judged(self.ALL, changed(model, own={"pr_auc": 0.1, "ece_calibrated": 0.01}), champion)
        assert "champion s:2 (measured on other data), got 0.1000, 0.4000 below" in failed["champion"]

    def test_champion_and_model_are_compared_by_the_metric_that_both_were_judged_by(self, model: ModelRow) -> None:
        both = {"metric": "roc_auc", "intervals": {"roc_auc": {"value": 0.6, "low": 0.58, "high": 0.62}}}
        champion = dataclasses.replace(changed(model, **both), version=2)
        for found, passes in ((0.59, True), (0.57, False)):
            ours = changed(model, **both, own={"pr_auc": 0.1, "roc_auc": found, "ece_calibrated": 0.01})
            failed = judged(self.ALL, ours, champion)
            assert (failed == {}) == passes
        assert failed["champion"].startswith("champion: expected ROC-AUC on test >= 0.5800, the low end of")

    @pytest.mark.parametrize("metric", ["pr_auc", None])  # None: of a model that is older than the choice
    def test_models_judged_by_different_metrics_are_not_compared(self, model: ModelRow, metric: str | None) -> None:
        older = changed(model, metric=metric)
        if metric is None:
            del older.metrics["metric"]
        champion = dataclasses.replace(older, version=2)
        failed = judged(
            self.ALL, changed(model, metric="roc_auc", own=model.metrics["own"] | {"roc_auc": 0.9}), champion
        )
        assert failed == {
            "champion": "champion: expected a model judged by PR-AUC as the champion s:2, got one judged by "
            "ROC-AUC, and these are not compared; set gate.champion to false to promote it all the same"
        }
        assert judged(self.ALL, older, champion) == {}

    def test_a_leak_is_a_matter_of_pr_auc_whatever_the_metric(self, model: ModelRow) -> None:
        own = {"pr_auc": 0.55, "roc_auc": 0.95, "ece_calibrated": 0.01}
        assert judged(self.ALL, changed(model, metric="roc_auc", own=own)) == {}

    def test_it_is_not_held_against_itself(self, model: ModelRow) -> None:
        assert "champion" not in [rule.name for rule in judge(self.ALL, model, model)]

    @pytest.mark.parametrize(
        ("change", "name", "said"),
        [
            ({"own": {"pr_auc": 0.55, "ece_calibrated": 0.06}}, "max_ece", "<= 0.05, got 0.06, 0.01 above"),
            ({"leak": {"best": 0.7}}, "max_feature_pr_auc", "single feature <= 0.5, got 0.7, 0.2 above"),
            ({"own": {"pr_auc": 0.95, "ece_calibrated": 0.01}}, "max_pr_auc", "<= 0.9, got 0.95, 0.05 above"),
        ],
    )
    def test_limits(self, model: ModelRow, change: dict[str, Any], name: str, said: str) -> None:
        failed = judged(self.ALL, changed(model, **change))
        assert list(failed) == [name]
        assert said in failed[name]

    def test_size(self, model: ModelRow) -> None:
        failed = judged(self.ALL, dataclasses.replace(model, size_bytes=1_500_000))
        assert failed == {"max_size_mb": "max_size_mb: expected size in MB <= 1, got 1.5, 0.5 above"}

    def test_what_is_missing_fails(self, model: ModelRow) -> None:
        bare = dataclasses.replace(model, certificate=None, metrics={})
        failed = judged(self.ALL, bare, dataclasses.replace(model, version=2))
        assert list(failed) == ["certificate", "champion", "max_ece", "max_feature_pr_auc", "max_pr_auc"]
        assert all("got none" in text for text in failed.values())
        assert "got no check of it" in judged(self.ALL, changed(model, check=None))["certificate"]


class TestPromote:
    def test_the_rules_are_kept_with_the_promotion(
        self, database: Database, store: Store, tmp_path: Path, runs: Path
    ) -> None:
        champion, rules = promote(store, make_model(database, tmp_path), runs, None)
        assert champion.state == "champion"
        (told,) = store.promotions("s")
        assert told.gate == {"rules": [rule.as_json() for rule in rules]}

    def test_the_gate_is_that_of_the_stored_specification(
        self, database: Database, store: Store, tmp_path: Path, runs: Path
    ) -> None:
        model = make_model(database, tmp_path, gate={"max_ece": 0.001, "max_pr_auc": 0.5})
        with pytest.raises(GateRefused) as refused:
            promote(store, model, runs, None)
        assert [rule.name for rule in refused.value.failed] == ["max_ece", "max_pr_auc"]
        assert store.find_model("s") is None
        assert (
            str(refused.value).splitlines()[1].startswith("s:1 refused: max_pr_auc: expected PR-AUC on test <= 0.5")
        )

    def test_damaged_it_is_not_promoted(self, database: Database, store: Store, tmp_path: Path, runs: Path) -> None:
        model = make_model(database, tmp_path)
        (runs / model.artifact / "model.json").write_text("{}")
        with pytest.raises(InputError, match="checksum does not match"):
            promote(store, model, runs, None)
        assert store.find_model("s") is None

    def test_its_study_is_gone(self, database: Database, store: Store, tmp_path: Path, runs: Path) -> None:
        model = make_model(database, tmp_path)
        store.delete_study(1)
        with pytest.raises(
            InputError, match=r"expected the study of s.evaluation-1.*it was deleted; evaluate again"
        ):
            promote(store, model, runs, None)

    def test_another_promotion_in_between(
        self, database: Database, store: Store, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (make_model(database, tmp_path, number=number) for number in (1, 2))

        def meanwhile(*_: Any) -> None:
            store.promote("s", second.version, None, {})

        monkeypatch.setattr(gate, "find_folder", meanwhile)
        with pytest.raises(RegistryConflict, match="expected no champion in service, got version 2"):
            promote(store, first, runs, None)
        assert store.find_model("s", 2).state == "champion"  # type: ignore[union-attr]

    def test_of_two_at_once_one_wins_and_the_other_is_told(
        self, storage_url: str, tmp_path: Path, runs: Path
    ) -> None:
        from tests.searches import make_database

        database = make_database(storage_url)
        models = [make_model(database, tmp_path, number=number) for number in (1, 2, 3)]
        promote(Store(database), models[0], runs, None)
        told = race(2, promoted, storage_url, str(runs))
        champion = Store(database).find_model("s")
        assert champion is not None
        won = [version for version in told if version in (2, 3)]
        # Who asks once the other is in service is held against that one, and may follow it.
        assert champion.version in won
        assert len(Store(database).promotions("s")) == 1 + len(won)
        assert all("somebody else changed it meanwhile" in str(text) for text in told if text not in won)
        database.close()


def promoted(index: int, url: str, runs: str) -> int | str:
    database = Database(url)
    store = Store(database)
    try:
        return promote(store, get_model(store, f"s:{index + 2}"), Path(runs), None)[0].version
    except RegistryConflict as conflict:
        return str(conflict)
    finally:
        database.close()


class TestCommands:
    @pytest.fixture
    def tuner(
        self, tmp_path: Path, sqlite_with_tables_url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> Iterator[Callable[..., tuple[int, str, str]]]:
        for name in [name for name in os.environ if name.startswith("TUNER_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("TUNER_STORAGE", sqlite_with_tables_url)
        monkeypatch.chdir(tmp_path)

        def call(*arguments: str) -> tuple[int, str, str]:
            capsys.readouterr()
            code = main(arguments)
            told = capsys.readouterr()
            return code, told.out, told.err

        return call

    def test_from_candidate_to_champion_and_back(self, database: Database, tmp_path: Path, tuner: Any) -> None:
        for number in (1, 2):
            make_model(database, tmp_path, number=number)
        code, out, _ = tuner("promote", "--model", "s:1")
        assert (code, out.splitlines()[-1]) == (0, "s:1 is the champion")
        assert "passed  max_ece: expected calibrated ECE on test <= 0.05, got 0.02" in out
        assert tuner("promote", "--study", "s")[1].endswith("s:2 is the champion\n")
        code, out, _ = tuner("models", "--model", "s")
        assert "retired" in out
        assert "champion" in out
        assert "s:2" in out  # promotions
        assert tuner("rollback", "--model", "s")[:2] == (0, "s:1 is the champion again, instead of s:2\n")
        code, _, err = tuner("rollback", "--model", "s")
        assert (code, err) == (
            2, "registry: s: expected a champion before this one, got none; promote another version\n",
        )  # fmt: skip

    def test_the_newest_version_is_promoted_without_a_number(
        self, database: Database, tmp_path: Path, tuner: Any
    ) -> None:
        for number in (1, 2):
            make_model(database, tmp_path, number=number)
        assert tuner("promote", "--model", "s")[1].endswith("s:2 is the champion\n")

    def test_a_refusal(self, database: Database, tmp_path: Path, tuner: Any) -> None:
        make_model(database, tmp_path, gate={"max_ece": 0.01}, certificate=INFEASIBLE)
        code, out, err = tuner("promote", "--study", "s")
        assert (code, out) == (4, "")
        assert err.splitlines() == [
            "s:1 refused: certificate: expected a certified threshold, got infeasible; a precision of 0.5200 could "
            "be certified, 0.0800 below 0.6000",
            "s:1 refused: max_ece: expected calibrated ECE on test <= 0.01, got 0.02, 0.01 above",
        ]

    def test_models_in_every_format(self, database: Database, tmp_path: Path, tuner: Any) -> None:
        make_model(database, tmp_path)
        rows = json.loads(tuner("models", "--format", "json")[1])
        assert (rows[0]["name"], rows[0]["version"], rows[0]["metrics"]["own"]["pr_auc"]) == ("s", 1, 0.55)
        head, row = tuner("models", "--format", "csv")[1].splitlines()
        told = dict(zip(head.split(","), row.split(","), strict=True))
        assert (told["certificate"], told["metric"], told["on test"]) == ("certified", "PR-AUC", "0.55")

    def test_models_are_listed_with_the_metric_they_were_judged_by(
        self, database: Database, store: Store, tmp_path: Path, runs: Path, tuner: Any
    ) -> None:
        make_model(database, tmp_path)
        told = document(metric="roc_auc")
        told["arms"]["one"]["metrics"]["roc_auc"] = {"value": 0.61, "low": 0.58, "high": 0.64}
        exported = write_export(tmp_path / "roc", metrics={"pr_auc": 0.3, "roc_auc": 0.6125})
        add_candidate(store, "t", exported, told, runs, None)
        head, *rows = tuner("models", "--format", "csv")[1].splitlines()
        found = {row["model"]: row for row in (dict(zip(head.split(","), r.split(","), strict=True)) for r in rows)}
        by = ("metric", "on test", "low")
        assert [found["s"][name] for name in by] == ["PR-AUC", "0.55", "0.5"]
        assert [found["t"][name] for name in by] == ["ROC-AUC", "0.6125", "0.58"]

    def test_none_yet(self, tuner: Any) -> None:
        code, _, err = tuner("models", "--model", "s")
        assert (code, err) == (
            2,
            "model s: expected one in the registry, got none; there is no model yet; `tuner evaluate` makes one\n",
        )  # fmt: skip
        assert tuner("models")[:2] == (0, "no models yet; `tuner evaluate` makes one\n")
        assert tuner("models", "--format", "json")[:2] == (0, "[]\n")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["promote"], "expected either --study or --model"),
            (["promote", "--study", "s", "--model", "s"], "expected either --study or --model"),
            (["promote", "--model", "t"], "model t: expected one in the registry, got none; there is s"),
            (["promote", "--model", "s:9"], "expected version 9, got none; there is s:1 (candidate)"),
            (["promote", "--model", "s:0"], "expected NAME or NAME:VERSION, got 's:0'"),
            (["promote", "--study", "t"], "study 't' is not in"),
            (["rollback", "--model", "s:1"], "--model: expected NAME alone, for its champion is what steps back"),
            (
                ["rollback", "--model", "s"],
                "expected a champion, got none; there is s:1 (candidate); `tuner promote`",
            ),
        ],
    )
    def test_bad_input(
        self, database: Database, tmp_path: Path, tuner: Any, arguments: list[str], said: str
    ) -> None:
        make_model(database, tmp_path)
        code, _, err = tuner(*arguments)
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1

    def test_a_study_without_an_evaluation(self, database: Database, store: Store, tuner: Any) -> None:
        store.create_study("s", "{}", "{}", "0.2.0", 10)
        code, _, err = tuner("promote", "--study", "s")
        assert code == 2
        assert "study s: expected an evaluation with a model, got none; `tuner evaluate --study s`" in err
