from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from models.trainer import DataSpec, InputError, Role
from storage.database import Database
from storage.leases import ProcessIdentity
from storage.runs import Store
from tests.toy import ToyDataset, ToyTrainer
from tests.tuner.toy_study import ROOT, files_below, make_study, url, write_spec
from tuner.cli import cli, main
from tuner.coordinator import RunOptions
from tuner.crew import RunFailed
from tuner.study import Study

HEAVY = ("torch", "optuna", "pandas", "sqlalchemy", "pydantic", "numpy", "rich")


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two studies: `toy`, feasible, and `hard`, where nothing is. Nobody may change it."""
    folder = tmp_path_factory.mktemp("worked")
    make_study(folder)
    make_study(folder, "hard", n_trials=4, decision={"task": "toy", "target_precision": 0.9},
               config={"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 3, "violation": 0.5})  # fmt: skip
    return folder


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Tuner]:
    for name in [name for name in os.environ if name.startswith("TUNER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(folder: Path, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error of `tuner arguments` in `folder`."""
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = main(arguments)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


Tuner = Callable[..., tuple[int, str, str]]


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))


COMMANDS = dict(_commands(cli))


# --- help ----------------------------------------------------------------------------------------------------


def test_every_command_of_the_house_is_there() -> None:
    names = {" ".join(path) for path in COMMANDS}
    assert names == {
        *("run", "show", "best", "studies", "delete", "check", "dashboard"),
        *("data", "data simulate", "data describe"),
        *("submit", "worker", "status", "stop", "logs", "db", "db upgrade", "db check"),
        *("manifest", "manifest slurm", "manifest k8s"),
        *("evaluate", "report", "models", "promote", "rollback", "predict", "export", "import"),
    }


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_help_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom tuner.cli import main\n"
        f"assert main([*{path!r}, '--help']) == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage: tuner" in told.stdout
    assert told.stdout.splitlines()[-1] == "HEAVY []"


def test_help_answers_at_once() -> None:
    """In processor time, since the machine of a test may be busy."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "tuner", "--help"], capture_output=True, check=True, cwd=ROOT)
    after = os.times()
    assert after.children_user - before.children_user + after.children_system - before.children_system < 0.3


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_flag_names_its_environment_variable(tuner: Tuner, tmp_path: Path, path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    flags = [p for p in command.params if isinstance(p, click.Option) and p.name != "help"]
    told = " ".join(tuner(tmp_path, *path, "--help")[1].split())
    for flag in flags:
        assert isinstance(flag.envvar, str)
        assert flag.envvar.startswith("TUNER_")
        assert flag.hidden or f"env var: {flag.envvar}" in told, flag.name


def test_without_a_command_the_help_is_shown(tuner: Tuner, tmp_path: Path) -> None:
    code, out, err = tuner(tmp_path)
    assert code == 2
    assert "Usage: tuner" in out + err


def test_version(tuner: Tuner, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tuner(tmp_path, "--version")[:2] == (0, f"{project['version']}\n")


# --- run -----------------------------------------------------------------------------------------------------


def test_run_then_again_then_more(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path)
    code, out, err = tuner(tmp_path, "run", "--study", "toy", "--devices", "cpu", "--workers", "2")
    assert code == 0
    assert out.startswith("study toy: 6 of 6 trials ended")
    assert "feasible: " in out
    assert "data: toy data 'toy' (real)" in out
    assert "search threshold, not certified" in out
    assert "gain over its arm's default" in out
    assert "results: runs/toy/results.json" in out
    assert "tuner best --study toy" in out
    assert "/6 trials (" in err
    results = json.loads((tmp_path / "runs/toy/results.json").read_text())
    assert results["n_ended"] == 6
    assert results["this_run"]["fit_s"] > 0

    code, _, err = tuner(tmp_path, "run", "--study", "toy", "--n-trials", "4")
    assert code == 0
    assert "nothing is to do" in err
    assert "never lowered" in err

    code, out, _ = tuner(tmp_path, "run", "--study", "toy", "--n-trials", "8", "--workers", "1")
    assert code == 0
    assert out.startswith("study toy: 8 of 8 trials ended")


def test_flags_come_from_the_environment(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunOptions] = []

    def fake(options: RunOptions, _observer: object) -> None:
        seen.append(options)
        raise RunFailed("stopped here")

    monkeypatch.setattr("tuner.coordinator.run", fake)
    values = {
        "STUDY": "toy", "STORAGE": "sqlite:///x.db", "N_TRIALS": "7", "DATA": "d", "DEVICES": "cpu",
        "WORKERS": "3", "TIMEOUT": "9.5", "SEED": "5", "NAME": "other", "RUNS": "elsewhere",
        "RETRY_FAILED": "1", "SET": "config.x=1;space.y={low: 0, high: 1}", "SLOTS": "6",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"TUNER_{name}", value)
    code, _, err = tuner(tmp_path, "run")
    assert (code, err) == (1, "stopped here\n")
    assert seen == [
        RunOptions(
            "toy", 7, "other", "d", "sqlite:///x.db", "cpu", 3, 9.5, 5, True,
            ("config.x=1", "space.y={low: 0, high: 1}"), "elsewhere", 6,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "evaluate", "worker"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_a_number_of_slots_that_is_none_is_one_line(tuner: Tuner, tmp_path: Path, command: str, value: str) -> None:
    code, out, err = tuner(tmp_path, command, "--study", "toy", f"--slots={value}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'--slots'" in err
    assert f"expected auto or a number from 1, got '{value}'" in err


def test_the_default_storage_lies_in_the_folder_of_runs(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(options: RunOptions, _observer: object) -> None:
        raise RunFailed(options.storage)

    monkeypatch.setattr("tuner.coordinator.run", fake)
    assert tuner(tmp_path, "run", "--study", "toy")[2] == "sqlite:///runs/tuner.db\n"
    assert tuner(tmp_path, "run", "--study", "toy", "--runs", "/a/b")[2] == "sqlite:////a/b/tuner.db\n"


def test_a_bug_keeps_its_traceback(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_options: object, _observer: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tuner.coordinator.run", fake)
    with pytest.raises(ZeroDivisionError):
        tuner(tmp_path, "run", "--study", "toy")


def test_terminated_before_any_worker_is_an_interrupt(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.coordinator.run", lambda _options, _observer: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert tuner(tmp_path, "run", "--study", "toy")[0] == 130
    finally:
        signal.signal(signal.SIGTERM, before)


def test_interrupted_before_any_worker(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_options: object, _observer: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tuner.coordinator.run", fake)
    code, _, err = tuner(tmp_path, "run", "--study", "toy")
    assert code == 130
    assert "interrupted" in err


def test_ctrl_c_stops_and_the_next_run_goes_on(tuner: Tuner, tmp_path: Path) -> None:
    slow = {"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 40, "step_s": 0.05, "violation": -0.1}
    write_spec(tmp_path, n_trials=2, config=slow, pruner={"name": "none"})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tuner", "run", "--study", "toy", "--workers", "1", "--devices", "cpu"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoints = tmp_path / "runs/toy/trials/00000/attempt-1"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: workers stop" in err
    assert "0 of 2 trials ended" in out
    done = len(list(checkpoints.glob("step-*")))

    assert tuner(tmp_path, "run", "--study", "toy", "--workers", "1", "--devices", "cpu")[0] == 0
    repeated = list((tmp_path / "runs/toy/trials/00000/attempt-2").glob("step-*"))
    assert done + len(repeated) == 40


# --- bad input: one line a fault, exit 2, nothing written ----------------------------------------------------


BAD = {
    "unknown flag": (("run", "--bogus"), "No such option '--bogus'"),
    "no study": (("run",), "Missing option '--study'"),
    "unknown study": (("run", "--study", "nosuch"), "got 'nosuch'"),
    "no number": (("run", "--study", "toy", "--n-trials", "x"), "'--n-trials'"),
    "no trials": (("run", "--study", "toy", "--n-trials", "0"), "'--n-trials'"),
    "no workers": (("run", "--study", "toy", "--workers", "0"), "'--workers'"),
    "unknown device": (("run", "--study", "toy", "--devices", "cuda:97"), "got 'cuda:97'"),
    "name that leads out": (("run", "--study", "toy", "--name", "../../x"), "got '../../x'"),
    "name of the cache": (("run", "--study", "toy", "--name", "cache"), "got 'cache', under which runs keep"),
    "name of the models": (("submit", "--study", "toy", "--name", "models"), "got 'models', under which runs keep"),
    "name of the database": (("run", "--study", "toy", "--name", "tuner.db"), "got the place of something else"),
    "describe, unknown study": (("data", "describe", "--study", "nosuch"), "got 'nosuch'"),
    "no override": (("run", "--study", "toy", "--set", "config.x"), "expected dotted.key=value"),
    "override of nothing": (("run", "--study", "toy", "--set", "config.nosuch=1"), "config.nosuch"),
    "low above high": (("run", "--study", "toy", "--set", "space.x={low: 2, high: 1}"), "low must be below high"),
    "unknown trainer": (("run", "--study", "toy", "--set", "trainer=nosuch"), "nosuch"),
    "missing data": (("run", "--study", "toy", "--data", "/nowhere"), "/nowhere: expected a folder"),
    "other engine": (("run", "--study", "toy", "--storage", "mysql://u:hush@h/d"), "expected sqlite or postgresql"),
    "no URL": (("run", "--study", "toy", "--storage", "nonsense"), "expected sqlite:///FILE"),
    "no server": (
        ("run", "--study", "toy", "--storage", "postgresql://u:hush@127.0.0.1:9/d"), "u:***@127.0.0.1:9/d",
    ),
    "show, no database": (("show", "--study", "toy"), "expected a database, got no such file"),
    "best, no database": (("best", "--study", "toy"), "expected a database, got no such file"),
    "studies, no database": (("studies",), "expected a database, got no such file"),
    "delete, no database": (("delete", "--study", "toy", "--yes"), "expected a database, got no such file"),
    "dashboard, no database": (("dashboard",), "expected a database, got no such file"),
    "dashboard for all": (("dashboard", "--host", "0.0.0.0"), "--host: expected a password in TUNER_DASH"),
    "describe, no number": (("data", "describe", "--study", "toy", "--seed", "x"), "'--seed'"),
    "simulate what": (("data", "simulate", "nosuch", "--out", "d"), "nosuch"),
    "simulate too much": (("data", "simulate", "kuailive", "--out", "d", "--scale", "7"), "scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tuner: Tuner, tmp_path: Path, case: str) -> None:
    arguments, expected = BAD[case]
    write_spec(tmp_path)
    before = files_below(tmp_path)
    code, out, err = tuner(tmp_path, *arguments)
    assert code == 2
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1, err
    assert "hush" not in err
    assert files_below(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_every_fault_of_a_specification_has_its_line(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path, n_trials=0, objective={"metric": "valid/other/pr_auc"})
    code, _, err = tuner(tmp_path, "run", "--study", "toy")
    assert code == 2
    assert [line.split(": ")[1] for line in sorted(err.splitlines())] == ["objective.metric", "n_trials"]


def test_a_refused_resume_names_the_difference(tuner: Tuner, worked: Path) -> None:
    code, _, err = tuner(worked, "run", "--study", "toy", "--set", "config.x=0.7")
    assert code == 2
    assert err.splitlines()[-1].startswith("study 'toy' exists and differs: config.x: 0.9 -> 0.7")
    assert "--name NEW" in err
    assert "tuner delete --study toy --yes" in err


def test_a_new_study_does_not_take_up_the_files_of_a_lost_one(tuner: Tuner, tmp_path: Path) -> None:
    make_study(tmp_path)
    (tmp_path / "runs/tuner.db").unlink()
    before = files_below(tmp_path)
    code, _, err = tuner(tmp_path, "run", "--study", "toy", "--workers", "1")
    assert code == 2
    assert "runs/toy: expected no trials of a new study" in err
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("command", ["show", "best", "dashboard", "studies", "delete", "run", "check"])
def test_an_optuna_schema_of_another_version(tuner: Tuner, tmp_path: Path, command: str) -> None:
    make_study(tmp_path, n_trials=1)
    with sqlite3.connect(tmp_path / "runs/tuner.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.0.0.a'")
    connection.close()
    before = files_below(tmp_path / "runs/toy")
    study = () if command in ("dashboard", "studies") else ("--study", "toy")
    code, _, err = tuner(tmp_path, command, *study, *(("--yes",) if command == "delete" else ()))
    assert code == 2
    assert "expected Optuna schema" in err
    assert len(err.splitlines()) == 1
    assert files_below(tmp_path / "runs/toy") == before


def test_a_database_without_our_tables(tuner: Tuner, tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    code, _, err = tuner(tmp_path, "studies", "--storage", "sqlite:///other.db")
    assert code == 2
    assert "expected our tables, got none; `tuner db upgrade`" in err


# --- show, best, studies -------------------------------------------------------------------------------------


def test_looking_changes_nothing(tuner: Tuner, worked: Path) -> None:
    before = files_below(worked)
    for arguments in (
        ("show", "--study", "toy"),
        ("best", "--study", "toy"),
        ("studies",),
        ("check", "--study", "toy"),
    ):
        assert tuner(worked, *arguments)[0] == 0
    assert files_below(worked) == before


def test_show_as_table(tuner: Tuner, worked: Path) -> None:
    code, out, err = tuner(worked, "show", "--study", "toy")
    assert (code, err) == (0, "")
    assert out.startswith("study toy: 6 of 6 trials ended")
    for word in ("workers", "precision ≥", "complete", "valid/toy/pr_auc", "ended 20"):
        assert word in out


def test_show_as_json(tuner: Tuner, worked: Path) -> None:
    code, out, _ = tuner(worked, "show", "--study", "toy", "--format", "json")
    shown = json.loads(out, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert code == 0
    assert [trial["number"] for trial in shown["trials"]] == list(range(6))
    assert len(shown["attempts"]) == 6
    assert shown["workers"][0]["device"] == "cpu"
    assert shown["best"]["value"] == max(t["value"] for t in shown["trials"] if t["state"] == "complete")


def test_show_as_csv(tuner: Tuner, worked: Path) -> None:
    code, out, _ = tuner(worked, "show", "--study", "toy", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 6
    assert {row["arm"] for row in rows} == {"a", "b"}
    assert float(rows[2]["params.x"]) <= 1.0


def test_best(tuner: Tuner, worked: Path) -> None:
    code, out, _ = tuner(worked, "best", "--study", "toy", "--format", "json")
    best = json.loads(out)
    assert code == 0
    assert best["feasible"]
    assert best["threshold_status"] == "search threshold, not certified"
    assert (worked / best["model"]).exists()
    code, out, _ = tuner(worked, "best", "--study", "toy")
    assert code == 0
    assert f"model: {best['model']}" in out
    assert "(search threshold, not certified)" in out
    assert f"  valid/toy/pr_auc: {best['trial']['value']:.4g}" in out


def test_best_exits_3_where_nothing_is_feasible(tuner: Tuner, worked: Path) -> None:
    code, out, err = tuner(worked, "best", "--study", "hard")
    assert (code, err) == (3, "")
    assert "not feasible: none of 4 complete trials reaches a precision of 0.9" in out
    assert "nearest (infeasible): trial" in out
    code, out, _ = tuner(worked, "best", "--study", "hard", "--format", "json")
    shown = json.loads(out)
    assert code == 3
    assert not shown["feasible"]
    # All violate by the same, so the nearest is the one with the best objective.
    told = json.loads(tuner(worked, "show", "--study", "hard", "--format", "json")[1])
    assert shown["trial"]["value"] == max(trial["value"] for trial in told["trials"])


def test_a_run_that_finds_nothing_feasible_is_done_all_the_same(tuner: Tuner, worked: Path) -> None:
    code, out, _ = tuner(worked, "run", "--study", "hard")
    assert code == 0
    assert "not feasible: none of 4" in out


def test_studies(tuner: Tuner, worked: Path) -> None:
    shown = json.loads(tuner(worked, "studies", "--format", "json")[1])
    assert [(row["study"], row["trials"], row["total"]) for row in shown] == [("toy", 6, 6), ("hard", 4, 4)]
    assert shown[1]["best"] is None


def test_an_unknown_study_is_answered_with_those_there_are(tuner: Tuner, worked: Path) -> None:
    for arguments in (("show", "--study", "nosuch"), ("best", "--study", "toy", "--name", "other")):
        code, _, err = tuner(worked, *arguments)
        assert code == 2
        assert "there is toy, hard" in err


def test_a_study_is_found_by_name_and_by_file(tuner: Tuner, worked: Path) -> None:
    for reference in ("toy", "configs/toy.yaml"):
        assert tuner(worked, "best", "--study", reference)[1].startswith("study toy,")
    assert tuner(worked, "best", "--study", "nosuch", "--name", "toy")[1].startswith("study toy,")


# --- delete --------------------------------------------------------------------------------------------------


def test_delete(tuner: Tuner, tmp_path: Path) -> None:
    make_study(tmp_path, n_trials=1)
    make_study(tmp_path, "kept", n_trials=1)
    code, _, err = tuner(tmp_path, "delete", "--study", "toy")
    assert code == 2
    assert "add --yes" in err
    assert (tmp_path / "runs/toy").exists()

    code, out, _ = tuner(tmp_path, "delete", "--study", "toy", "--yes")
    assert (code, out) == (0, "deleted study toy and runs/toy\n")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == ["kept"]
    with sqlite3.connect(tmp_path / "runs/tuner.db") as connection:
        for table in (
            "tuner_studies",
            "tuner_runs",
            "tuner_attempts",
            "tuner_measurements",
            "tuner_workers",
            "trials",
        ):
            expected = 5 if table == "tuner_measurements" else 1
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (expected,), table
    connection.close()
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 2


def test_delete_takes_the_artifacts_along(tuner: Tuner, tmp_path: Path) -> None:
    for name in ("toy", "kept"):
        make_study(tmp_path, name, n_trials=1)
        (tmp_path / "store" / name / "trials").mkdir(parents=True)
        (tmp_path / "store" / name / "trials" / "x").write_text("")
    store = ("--artifacts", f"file://{tmp_path}/store")
    code, _, err = tuner(tmp_path, "delete", "--study", "toy", *store)
    assert code == 2
    assert f"and what file://{tmp_path}/store has of it" in err
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes", *store)[0] == 0
    assert not list((tmp_path / "store").rglob("toy/**/x"))
    assert (tmp_path / "store/kept/trials/x").exists()


def test_delete_asks_of_a_worker_of_the_service_only_what_it_is_at(tuner: Tuner, tmp_path: Path) -> None:
    make_study(tmp_path, n_trials=1)
    database = Database(url(tmp_path))
    study = Study.open(database, "toy")
    study.store.start_study(study.id, 3, 0)
    worker_id = study.store.register_worker(None, ProcessIdentity.current(), "cpu")
    claim = study.claim(worker_id)
    assert claim is not None
    assert "at work" in tuner(tmp_path, "delete", "--study", "toy", "--yes")[2]
    study.stop(claim)
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 0
    database.close()


def test_delete_is_refused_while_a_worker_lives(tuner: Tuner, tmp_path: Path) -> None:
    make_study(tmp_path, n_trials=1)
    database = Database(url(tmp_path))
    store = Store(database)
    row = store.find_study("toy")
    assert row is not None
    worker_id = store.register_worker(row.id, ProcessIdentity.current(), "cpu")
    code, _, err = tuner(tmp_path, "delete", "--study", "toy", "--yes")
    assert code == 2
    assert f"pid {os.getpid()} at work" in err
    assert (tmp_path / "runs/toy").exists()
    store.end_worker(worker_id)
    database.close()
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 0


def test_a_killed_deletion_can_be_repeated(tuner: Tuner, tmp_path: Path) -> None:
    from tuner.optuna_study import delete_study

    make_study(tmp_path, n_trials=1)
    database = Database(url(tmp_path))
    delete_study(database, "toy")
    database.close()
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 0
    assert tuner(tmp_path, "studies", "--format", "json")[1] == "[]\n"


def test_a_deletion_killed_among_the_files_can_be_repeated(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study(tmp_path, n_trials=1)
    with monkeypatch.context() as patched:
        patched.setattr("tuner.catalog.shutil.rmtree", lambda _folder: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 130
    assert tuner(tmp_path, "delete", "--study", "toy", "--yes")[0] == 0
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == []


# --- check ---------------------------------------------------------------------------------------------------


def test_check_writes_nothing(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path)
    before = files_below(tmp_path)
    code, out, err = tuner(tmp_path, "check", "--study", "toy")
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["OK", "specification:"], ["OK", "device:"], ["OK", "data:"], ["OK", "database:"]
    ]  # fmt: skip
    assert files_below(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_check_shows_every_fault(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path)
    code, out, err = tuner(
        tmp_path, "check", "--study", "toy", "--devices", "cuda:97", "--data", "/nowhere", "--storage", "mysql://x"
    )
    assert code == 2
    assert out.startswith("OK      specification")
    assert [line.split()[:2] for line in err.splitlines()] == [
        ["FAULT", "device:"], ["FAULT", "data:"], ["FAULT", "database:"]
    ]  # fmt: skip


def test_check_tells_a_name_that_would_be_refused(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path)
    code, _, err = tuner(tmp_path, "check", "--study", "toy", "--name", "..")
    assert code == 2
    assert "--name: expected letters" in err
    assert not (tmp_path / "runs").exists()


def test_check_tells_a_resume_that_would_be_refused(tuner: Tuner, worked: Path) -> None:
    assert "study 'toy' goes on" in tuner(worked, "check", "--study", "toy")[1]
    assert "study 'new' is new" in tuner(worked, "check", "--study", "toy", "--name", "new")[1]
    code, _, err = tuner(worked, "check", "--study", "toy", "--seed", "7")
    assert code == 2
    assert "study 'toy' exists and differs: seed: 42 -> 7" in err


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_role_of_no_use_is_told_before_there_is_a_study(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    whole = ToyTrainer.load

    def load(self: ToyTrainer, data: DataSpec, roles: frozenset[Role]) -> ToyDataset:
        assert roles == {"train", "valid"}, "what is kept back stays closed"
        if "valid" in roles:
            raise InputError("data.split: expected rows of both labels in role valid, got no row; give more data")
        return whole(self, data, roles)

    monkeypatch.setattr("tests.toy.ToyTrainer.load", load)
    write_spec(tmp_path)
    code, _, err = tuner(tmp_path, command, "--study", "toy")
    assert code == 2
    (line,) = err.splitlines()
    assert "expected rows of both labels in role valid" in line
    assert not (tmp_path / "runs" / "tuner.db").exists()


# --- data ----------------------------------------------------------------------------------------------------


def test_simulate(tuner: Tuner, tmp_path: Path) -> None:
    arguments = ("data", "simulate", "kuailive", "--out", "out", "--scale", "0.001", "--seed", "3")
    code, out, _ = tuner(tmp_path, *arguments, "--format", "json")
    rows = {row["file"]: row["rows"] for row in json.loads(out)}
    assert code == 0
    assert len([path for path in (tmp_path / "out").iterdir() if path.suffix == ".csv"]) == len(rows) == 7


def test_describe(tuner: Tuner, tmp_path: Path) -> None:
    write_spec(tmp_path)
    code, out, _ = tuner(tmp_path, "data", "describe", "--study", "toy")
    assert code == 0
    assert out.splitlines()[-1] == "PASS"
    assert json.loads(tuner(tmp_path, "data", "describe", "--study", "toy", "--format", "json")[1])["checks"] == []


def test_describe_exits_1_when_a_check_fails(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"tables": {}, "checks": [{"name": "no leak", "ok": False, "detail": "x alone reaches 0.9"}]}
    monkeypatch.setattr("tests.toy.ToyTrainer.describe", lambda _self, _data: described)
    write_spec(tmp_path)
    code, out, _ = tuner(tmp_path, "data", "describe", "--study", "toy")
    assert code == 1
    assert "FAILED  no leak: x alone reaches 0.9" in out
    assert out.splitlines()[-1] == "1 of 1 checks failed"
