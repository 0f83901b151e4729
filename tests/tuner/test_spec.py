"""Specifications: every fault at once and at its line; round trip; what may change and what may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from models import get_trainer
from models.stock.data import StockData
from models.stock.trainer import StockConfig
from models.trainer import Decision, FrozenModel, InputError, Objective, Problem
from tuner.spec import PrunerSpec, Spec, VerdictSpec, differences
from tuner.spec_checks import SpecError, check_spec, load_spec

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("mvp13", "census")

YAML = """\
study: small
trainer: tests.tuner.test_spec:SmallTrainer
data: {path: somewhere, split: {by: day, train: 0.7}}
decision: {task: gift, target_precision: 0.5}
objective: {metric: valid/gift/pr_auc}
config:
  tasks:
    gift: {weight: 0.3, loss: focal, alpha: 0.25}
    watch: {weight: 0.2, loss: mse}
  lr: 1e-3
  width: 64
arms:
  single:
    tasks: {watch: null}
  both: {}
space:
  tasks:
    gift:
      loss: {choices: [bce, focal]}
      alpha: {low: 0.05, high: 0.99, when: {loss: focal}}
    watch:
      weight: {low: 1e-3, high: 10.0, log: true}
  lr:
    low: 1e-4
    high: 1e-2
    log: true
  width: {low: 16, high: 128}
"""


class SmallTask(FrozenModel):
    weight: float = Field(gt=0)
    loss: Literal["bce", "focal", "mse"]
    alpha: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _focal_has_alpha(self) -> SmallTask:
        if self.loss == "focal" and self.alpha is None:
            raise ValueError("alpha: focal needs one")
        return self


class SmallConfig(FrozenModel):
    tasks: dict[str, SmallTask]
    lr: float = Field(gt=0)
    width: int = Field(default=64, ge=1, le=1024)


class SmallSplit(FrozenModel):
    by: Literal["day", "hash"]
    train: float = Field(gt=0, lt=1)


class Csv(FrozenModel):
    kind: Literal["csv"]
    separator: str = ","


class Parquet(FrozenModel):
    kind: Literal["parquet"]
    columns: int = 1


class SmallData(FrozenModel):
    path: Path
    split: SmallSplit
    reader: Annotated[Csv | Parquet, Field(discriminator="kind")] = Csv(kind="csv")
    columns: tuple[str, ...] = ()


class SmallTrainer:
    """As much of a trainer as a specification meets."""

    Config = SmallConfig
    Data = SmallData

    def check(self, config: SmallConfig, data: SmallData, decision: Decision) -> list[Problem]:
        problems = []
        if decision.task not in config.tasks:
            problems.append(Problem("decision.task", f"{decision.task!r} is not trained"))
        for name, task in config.tasks.items():
            if task.loss == "focal" and task.alpha is not None and task.alpha > 0.995:
                problems.append(Problem(f"config.tasks.{name}.alpha", "too much for focal"))
        if len(config.tasks) == 1 and config.width > 512:
            problems.append(Problem("config.width", f"one task needs no {config.width}"))
        return problems


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `configs/small.yaml`, as the working directory."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs" / "small.yaml"


def faults(reference: str = "small", overrides: list[str] | None = None) -> list[str]:
    """All faults that loading, then checking tell."""
    with pytest.raises(SpecError) as raised:
        check_spec(load_spec(reference, overrides or []), SmallTrainer())
    assert str(raised.value) == "\n".join(raised.value.problems)
    assert not any("\n" in line for line in raised.value.problems)
    return raised.value.problems


def written(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)


# -- the shipped studies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_hold_against_their_trainer(name: str):
    spec = load_spec(name)
    check_spec(spec, get_trainer(spec.trainer))
    assert spec.study == name
    assert len(spec.arms) == 4
    assert (spec.seed, spec.n_trials, spec.sampler.name) == (42, 50, "tpe")
    assert (spec.pruner.name, spec.pruner.min_completed, spec.pruner.warmup_steps) == ("median", 3, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_value_of_the_shipped_spaces_is_a_valid_config(name: str):
    """By brute force, beside what `check_spec` does: random configs of every arm."""
    spec, random = load_spec(name), Random(0)
    trainer = get_trainer(spec.trainer)
    data = trainer.Data.model_validate(spec.data)
    for overlay in spec.arms.values():
        for _ in range(50):
            tree = spec.space.sample(spec.config, overlay, lambda d, _: random.choice(d.corners())[1])
            assert trainer.check(trainer.Config.model_validate(tree), data, spec.decision) == []


def test_mvp13_starts_from_the_values_of_its_experiment():
    spec = load_spec("mvp13")
    weights = {name: task["weight"] for name, task in spec.config["tasks"].items()}
    assert weights == {"watch_time": 0.3, "has_comment": 0.2, "has_gift": 0.3, "gift_amount": 0.2}
    assert spec.config["tasks"]["has_gift"] == {"weight": 0.3, "loss": "focal", "alpha": 0.25, "gamma": 2.0}
    network, optimizer = spec.config["network"], spec.config["optimizer"]
    assert [network["width"] * network["taper"] ** i for i in range(network["depth"])] == [256, 128, 64]
    assert (network["head_width"], network["dropout"], network["batch_norm"]) == (32, 0.2, True)
    assert (optimizer["lr"], optimizer["batch_size"]) == (1e-3, 4096)
    assert (spec.config["training"]["max_epochs"], spec.config["training"]["patience"]) == (50, 10)
    decision = spec.decision
    assert (decision.target_precision, decision.confidence, decision.min_selected) == (0.10, 0.9, 30)
    trained = {
        arm: list(spec.space.for_arm(spec.config, overlay)[0]["tasks"]) for arm, overlay in spec.arms.items()
    }
    assert trained == {
        "single_task_gift": ["has_gift"],
        "multi_task_all": ["watch_time", "has_comment", "has_gift", "gift_amount"],
        "multi_task_no_amount": ["watch_time", "has_comment", "has_gift"],
        "multi_task_gradient_blend": ["watch_time", "has_comment", "has_gift", "gift_amount"],
    }
    methods = [spec.space.for_arm(spec.config, o)[0]["balancing"]["method"] for o in spec.arms.values()]
    assert methods == ["fixed", "fixed", "fixed", "gradnorm"]


@pytest.mark.parametrize("name", SHIPPED)
def test_task_weights_span_three_decades(name: str):
    weights = [d for d in load_spec(name).space.dimensions if d.path.endswith(".weight")]
    assert len(weights) == 3
    assert all(d.log and d.high / d.low >= 1e3 for d in weights)


def test_census_targets_and_weights_are_no_features():
    spec = load_spec("census")
    features = {*spec.data["numeric_columns"], *spec.data["categorical_columns"]}
    assert len(features) == 42 - 4
    assert not features & {"income_50k", "weeks_worked", "stock_dividends", "instance_weight"}


def test_reading_a_specification_needs_nothing_heavy():
    code = (
        "import sys; from tuner.spec_checks import load_spec; load_spec('mvp13');"
        "print([m for m in ('torch', 'optuna', 'pandas', 'sqlalchemy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- finding and reading ------------------------------------------------------------------------------------


def test_a_study_is_a_name_or_a_path(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    by_name = load_spec("small")
    assert by_name == load_spec("configs/small.yaml") == load_spec(str(small))
    check_spec(by_name, SmallTrainer())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_spec("mvp13").study == "mvp13"  # beside the installation
    assert load_spec("../configs/small.yaml") == by_name


def test_an_unknown_study_lists_the_known_ones(small: Path):
    known = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} | {"small"})
    assert set(SHIPPED) < set(known)
    assert faults("smal") == [
        f"--study smal: expected one of {', '.join(known)}, got 'smal'; did you mean 'small'? "
        "(or the path of a file)"
    ]
    assert faults("no/where.yaml") == ["--study no/where.yaml: expected a YAML file, found none there"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": expected a mapping with the key `study`, got an empty file"),
        ("- a\n- b\n", ":1: expected a mapping with the key `study`, got list"),
        ("study: x\n  y: z\n", ":2: not valid YAML: mapping values are not allowed here"),
        ("study: x\na: [1, 2\n", ":3: not valid YAML: expected ',' or ']'"),
        ("study: \x00", ": not valid YAML: special characters are not allowed"),
        ("study: a\n---\nstudy: b\n", ":2: not valid YAML: but found another document"),
    ],
)
def test_a_file_that_is_no_mapping(small: Path, text: str, expected: str):
    small.write_text(text)
    (fault,) = faults()
    assert fault.startswith("configs/small.yaml" + expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  lr: 1e-3\n", "  lr: 1e-3\n  lr: 1e-2\n", ":10: config.lr: the key is there twice (lines 10 and 11)"),
        ("  lr: 1e-3\n", "  lr: .nan\n", ":10: config.lr: expected a number, got .nan"),
        (
            "  lr: 1e-3\n",
            "  lr: !!python/object:os.system 1\n",
            ":10: config.lr: the tag tag:yaml.org,2002:python/",
        ),
        ("  lr: 1e-3\n", "  lr: !x 1\n", ":10: config.lr: the tag !x is not allowed"),
        ("  lr: 1e-3\n", "  opt.lr: 1e-3\n", ":10: config.opt.lr: expected a key without a dot, got 'opt.lr'"),
        ("  lr: 1e-3\n", "  1: 1e-3\n", ":6: config: expected keys that are text, got one that is not on line 10"),
        ("  lr: 1e-3\n", "  lr: &a [*a]\n", ":10: config.lr.0: an anchor cannot contain itself"),
    ],
)
def test_faults_of_yaml_itself(small: Path, old: str, new: str, expected: str):
    written(small, (old, new))
    assert any(fault.startswith("configs/small.yaml" + expected) for fault in faults()), faults()


def test_scalars_are_those_of_yaml_1_2(small: Path):
    written(
        small, ("path: somewhere", "path: 2025-05-05, columns: [no, on, 1:30, ~x]"), ("width: 64", "width: 0_064")
    )
    written(small, ("lr: 1e-3", "lr: 1.E-3"))
    spec = load_spec("small")
    assert spec.data["path"] == "2025-05-05"
    assert spec.data["columns"] == ["no", "on", "1:30", "~x"]
    assert spec.config["width"] == 64
    assert spec.config["lr"] == 1e-3
    assert spec.space.dimensions[0].low == 1e-4


# -- faults at their lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # the space
        ("    high: 1e-2\n", "    high: 1e-5\n", ":23: space.lr: low must be below high (got 0.0001 and 1e-05)"),
        ("    low: 1e-4\n", "    low: 0.0\n", ":23: space.lr: log needs low above 0 (got 0.0)"),
        (
            "{low: 1e-3, high",
            "{low: heavy, high",
            ":22: space.tasks.watch.weight: low: expected a number, got 'heavy'",
        ),
        (
            "  width: {low: 16",
            "  widht: {low: 16",
            ":27: space.widht: config.widht is missing: the first trial of every arm takes its value from there",
        ),
        (
            "  width: {low: 16",
            "  widht: {low: 16",
            ":27: space.widht: low 16 is refused: unknown key: expected one of lr, tasks, width, got 'widht'; "
            "did you mean 'width'?",
        ),
        ("{low: 16", "{low: 0", ":27: space.width: low 0 is refused: expected a number of at least 1, got 0"),
        (
            "{low: 16, high: 128}",
            "{low: 16.0, high: 128.0}",
            ":27: space.width: inside 58.784 is refused: expected a whole number, got 58.784",
        ),
        (
            "[bce, focal]",
            "[bce, focal, dice]",
            ":19: space.tasks.gift.loss: choice 'dice' is refused: expected 'bce', ",
        ),
        (
            "high: 0.99",
            "high: 1.0",
            ":20: space.tasks.gift.alpha: high 1.0 is refused: expected a number below 1, got",
        ),
        (
            "high: 0.99, when: {loss: focal}",
            "high: 0.99, when: {loss: [fokal]}",
            ":20: space.tasks.gift.alpha.when: ",
        ),
        ("{low: 16", "{low: 65", ":27: space.width: expected the config's default inside 65 to 128, got 64"),
        (
            "high: 128}",
            "high: 600}",
            ":27: space.width: high 600 is refused: one task needs no 600 (arm single)",
        ),
        # the sections that the trainer knows
        ("weight: 0.3", "weight: heavy", ":8: config.tasks.gift.weight: expected a number, got 'heavy'"),
        (
            "weight: 0.2",
            "weight: 0.0",
            ":9: config.tasks.watch.weight: expected a number above 0, got 0.0 (arm both)",
        ),
        (", alpha: 0.25", "", ":8: config.tasks.gift.alpha: focal needs one"),
        ("  lr: 1e-3\n", "", ":6: config.lr: is missing: expected a value here"),
        (
            "  width: 64\n",
            "  width: 64\n  depht: 2\n",
            ":12: config.depht: unknown key: expected one of lr, tasks, width, got 'depht'",
        ),
        (
            "loss: mse}",
            "loss: mse, wieght: 1}",
            ":9: config.tasks.watch.wieght: unknown key: expected one of alpha, loss, weight, got 'wieght'; "
            "did you mean 'weight'? (arm both)",
        ),
        ("by: day", "by: dai", ":3: data.split.by: expected 'day' or 'hash', got 'dai'"),
        (", train: 0.7", "", ":3: data.split.train: is missing: expected a value here"),
        (
            "{path: somewhere",
            "{pth: somewhere",
            ":3: data.pth: unknown key: expected one of columns, path, reader, split, got",
        ),
        # arms
        (
            "{watch: null}",
            "{wach: null}",
            ":14: arms.single.tasks.wach: nothing to delete here: expected one of gift, watch, got 'wach'; "
            "did you mean 'watch'?",
        ),
        ("both: {}", "both: {lr: fast}", ":15: arms.both.lr: expected a number, got 'fast'"),
        ("both: {}", "both: {tasks: {gift: null}}", ":4: decision.task: 'gift' is not trained (arm both)"),
        ("both: {}", "both: 3", ":15: arms.both: expected a mapping, got 3"),
        # the specification itself
        (
            "trainer: tests.tuner.test_spec:SmallTrainer",
            "trainer: gfit",
            ":2: trainer: expected one of gift, stock, got 'gfit'; did",
        ),
        ("trainer: tests.tuner.test_spec:SmallTrainer", "", ": trainer: is missing: expected a value here"),
        ("study: small", "study: a/b", ":1: study: expected text like ^[A-Za-z0-9]"),
        (
            "pr_auc}",
            "pr_au}",
            ":5: objective.metric: unknown metric: expected one of capture_at_10pct, ",
        ),
        (
            "metric: valid/gift/pr_auc",
            "metric: loss",
            ":5: objective.direction: expected minimize for valid/gift/loss, got maximize",
        ),
        ("metric: valid/gift/pr_auc", "metric: rocauc", ":5: objective.metric: unknown metric: expected one of "),
        (
            "metric: valid/gift/pr_auc",
            "metric: gift/pr_auc",
            ":5: objective.metric: expected a metric of the decision's task (valid/gift/pr_auc), got 'gift/pr_auc'",
        ),
        (
            "gift/pr_auc",
            "watch/loss",
            ":5: objective.metric: expected a metric of the decision's task (valid/gift/loss)",
        ),
        (
            "gift/pr_auc",
            "gift/loss",
            ":5: objective.direction: expected minimize for valid/gift/loss, got maximize",
        ),
        (
            "task: gift, target_precision: 0.5",
            "task: gift, target_precision: 60",
            ":4: decision.target_precision: expected ",
        ),
        (
            "task: gift, target_precision",
            "task: gift, rang: 1, target_precision",
            ":4: decision.rang: unknown key: ",
        ),
        (
            "task: gift, target",
            "task: gift, threshold_range: [0.45, 0.15], target",
            ":4: decision.threshold_range: expected 0 <= low < high <= 1, got [0.45, 0.15]",
        ),
        (
            "task: gift, target",
            "task: gift, threshold_range: [low, 0.15], target",
            ":4: decision.threshold_range.0: expected a number, got 'low'",
        ),
        (
            "task: gift, target",
            "task: gift, threshold_range: [0.1, 0.2], range: [0.1, 0.2], target",
            ":4: decision.range: expected range or threshold_range, which is the same, got both; remove one",
        ),
        (
            "arms:\n",
            "sampler: {name: tpr}\narms:\n",
            ":12: sampler.name: expected 'tpe', 'gp', 'random', 'qmc' or 'cmaes'",
        ),
        ("arms:\n", "n_trails: 3\narms:\n", ":12: n_trails: unknown key: "),
        ("arms:\n", "n_trials: 0\narms:\n", ":12: n_trials: expected a number of at least 1, got 0"),
        (
            "arms:\n",
            "verdict: {baseline: single, treatment: bath}\narms:\n",
            ":12: verdict.treatment: expected one of both, single, got 'bath'; did you mean 'both'?",
        ),
        (
            "arms:\n",
            "verdict: {baseline: single, treatment: single}\narms:\n",
            ":12: verdict.treatment: expected another arm than the baseline, got 'single' twice",
        ),
        ("  both: {}", "  xgboost: {}", ":15: arms.xgboost: expected another name, got that of a baseline"),
        (
            "  both: {}",
            "  single#2: {}",
            ":15: arms.single#2: expected another name, got that of a further configuration of single",
        ),
        (
            "  both: {}",
            "  single/default: {}",
            ":15: arms.single/default: expected another name, got that of a further configuration of single",
        ),
        ("arms:\n", "gate: {max_ece: 2}\narms:\n", ":12: gate.max_ece: expected a number of at most 1, got 2"),
        ("arms:\n", "gate: {champ: true}\narms:\n", ":12: gate.champ: unknown key: "),
        ("arms:\n", "replicate: true\narms:\n", ":12: replicate: expected no space, as nothing is searched"),
    ],
)
def test_a_fault_is_told_at_its_line(small: Path, old: str, new: str, expected: str):
    written(small, (old, new))
    told = faults()
    assert any(fault.startswith("configs/small.yaml" + expected) for fault in told), told


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ("{kind: csv, separator: [1]}", "data.reader.separator: expected text, got [1]"),
        ("{kind: cvs}", "data.reader: expected 'csv', 'parquet', got 'cvs'"),
        (
            "{kind: csv, seperator: x}",
            "data.reader.seperator: unknown key: expected one of columns, kind, separator, got 'seperator'; "
            "did you mean 'separator'?",
        ),
    ],
)
def test_a_fault_below_a_choice_of_models_is_told_at_its_place(small: Path, reader: str, expected: str):
    written(small, ("path: somewhere", f"path: somewhere, reader: {reader}"))
    assert faults() == [f"configs/small.yaml:3: {expected}"]


def test_the_ends_of_a_conditional_dimension_are_tried_where_it_counts(small: Path):
    """By default the loss is bce, to which alpha says nothing."""
    written(small, ("loss: focal, alpha: 0.25", "loss: bce, alpha: 0.25"), ("high: 0.99", "high: 0.999"))
    assert faults() == ["configs/small.yaml:20: space.tasks.gift.alpha: high 0.999 is refused: too much for focal"]


def test_a_grid_between_whole_ends_is_tried_inside(small: Path):
    written(small, ("{low: 16, high: 128}", "{low: 16.0, high: 128.0, step: 0.5}"))
    assert faults() == [
        "configs/small.yaml:27: space.width: low + step 16.5 is refused: expected a whole number, got 16.5"
    ]


def test_every_fault_is_told_at_once(small: Path):
    """Faults of the file, the space, the arms and the trainer's sections in one go."""
    written(
        small,
        ("study: small", "study: small\nstudy: big"),
        ("target_precision: 0.5", "target_precision: 1.5"),
        ("high: 1e-2", "high: 1e-5"),
        ("weight: 0.3", "weight: heavy"),
        ("by: day", "by: dai"),
        ("{watch: null}", "{wach: null}"),
    )
    told = [fault.split(": ")[1] for fault in faults()]
    assert set(told) == {
        "study",
        "decision.target_precision",
        "space.lr",
        "config.tasks.gift.weight",
        "data.split.by",
        "arms.single.tasks.wach",
    }


def test_a_fault_of_all_arms_is_told_once(small: Path):
    written(small, ("  width: 64\n", "  width: 0\n"))
    told = faults()
    assert [fault for fault in told if "config.width" in fault] == [
        "configs/small.yaml:11: config.width: expected a number of at least 1, got 0"
    ]


def test_errors_are_input_errors(small: Path):
    with pytest.raises(InputError):
        load_spec("smal")


# -- overrides ----------------------------------------------------------------------------------------------


def test_overrides_lie_over_the_file(small: Path):
    overrides = [
        "config.lr=2e-3",
        "n_trials=7",
        "sampler.name=gp",
        "space.width=null",
        "space.lr={low: 1e-3, high: 1e-1, log: true}",
        "arms.single.tasks.watch=null",
    ]
    spec = load_spec("small", overrides)
    check_spec(spec, SmallTrainer())
    assert (spec.config["lr"], spec.n_trials, spec.sampler.name) == (2e-3, 7, "gp")
    assert {d.path: d.high for d in spec.space.dimensions if d.path in ("lr", "width")} == {"lr": 0.1}
    assert spec.arms["single"] == {"tasks": {"watch": None}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("config.lr=fast", "--set config.lr: expected a number, got 'fast'"),
        ("config.lr", "--set config.lr: expected dotted.key=value, got 'config.lr'"),
        ("config..lr=1", "--set config..lr: expected dotted.key=value, got 'config..lr=1'"),
        ("config.lr=[1", "--set config.lr: not valid YAML: "),
        ("config.lr.x=1", "--set config.lr.x: config.lr is 0.001, no mapping: set config.lr itself"),
        # The range stands in the file and its fault was set: both are named.
        (
            "space.lr.low=1",
            "configs/small.yaml:23 (with --set space.lr.low): space.lr: low must be below high (got 1 and 0.01)",
        ),
        ("space.lr={low: 2, high: 1}", "--set space.lr: low must be below high (got 2 and 1)"),
        (
            "config.tasks.gift={weight: 1, weight: 2, loss: bce}",
            "--set config.tasks.gift: config.tasks.gift.weight: the",
        ),
        ("optimiser.lr=1", "--set optimiser.lr: optimiser: unknown key: "),
        ("data.split.by=dai", "--set data.split.by: expected 'day' or 'hash', got 'dai'"),
    ],
)
def test_a_faulty_override_is_told_by_its_key(small: Path, override: str, expected: str):
    told = faults("small", [override])
    assert any(fault.startswith(expected) for fault in told), told


# -- the stored form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_the_stored_form_gives_back_the_same_study(name: str):
    spec = load_spec(name)
    again = Spec.from_json(spec.to_json())
    # But for the path: the database knows data by their content.
    assert "path" in spec.data
    assert again == spec.model_copy(update={"data": {k: v for k, v in spec.data.items() if k != "path"}})
    assert differences(again, spec) == []
    assert list(again.arms) == list(spec.arms)
    assert again.to_json() == spec.to_json()
    assert differences(spec, again) == []
    check_spec(again.model_copy(update={"data": spec.data}), get_trainer(again.trainer))


def test_faults_of_a_stored_study_have_no_line(small: Path):
    spec = Spec.from_json(load_spec("small").to_json().replace('"lr":0.001', '"lr":-1.0'))
    with pytest.raises(SpecError) as raised:
        check_spec(spec, SmallTrainer())
    assert "stored specification: config.lr: expected a number above 0, got -1.0" in raised.value.problems


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**15), 10**15)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    config=st.dictionaries(st.text("abcxyz", min_size=1), plain, max_size=4),
    overlay=st.dictionaries(st.text("abcxyz", min_size=1), plain, max_size=3),
    seed=st.integers(0, 2**63),
)
def test_any_study_survives_the_database(config: dict[str, Any], overlay: dict[str, Any], seed: int):
    spec = Spec(
        study="any",
        trainer="gift",
        data=config,
        config=config,
        arms={"b": overlay, "a": {}},
        decision=Decision(task="gift", target_precision=0.5, range=(0.1, 0.9)),
        objective=Objective(metric="valid/gift/pr_auc"),
        seed=seed,
    )
    again = Spec.from_json(spec.to_json())
    assert again == spec.model_copy(update={"data": {k: v for k, v in spec.data.items() if k != "path"}})
    assert differences(spec, again) == []
    assert list(again.arms) == ["b", "a"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("space.lr.high=0.03", ["space.lr.high: 0.01 -> 0.03"]),
        ("space.lr.log=false", ["space.lr.log: true -> absent"]),
        (
            "space.width={low: 16.0, high: 128.0}",
            ["space.width.kind: 'int' -> 'float'"],
        ),
        (
            "space.tasks.gift.loss.choices=[focal, bce]",
            ["space.tasks.gift.loss.choices: ['bce', 'focal'] -> ['focal', 'bce']"],
        ),
        (
            "space.tasks.gift.alpha.when.loss=[focal, bce]",
            ["space.tasks.gift.alpha.when.tasks.gift.loss: ['focal'] -> ['focal', 'bce']"],
        ),
        ("arms.both.lr=0.01", ["arms.both: {} -> absent", "arms.both.lr: absent -> 0.01"]),
        ("arms.third={}", ["arms.third: absent -> {}"]),
        ("objective.upper=0.5", ["objective.upper: 1 -> 0.5"]),
        ("decision.target_precision=0.6", ["decision.target_precision: 0.5 -> 0.6"]),
        ("decision.range=[0.1, 0.2]", ["decision.range: null -> [0.1, 0.2]"]),
        ("data.split.train=0.6", ["data.split.train: 0.7 -> 0.6"]),
        ("data.columns=[a]", ["data.columns: absent -> ['a']"]),
        ("seed=1", ["seed: 42 -> 1"]),
        ("config.lr=0.002", ["config.lr: 0.001 -> 0.002"]),
        ("trainer=gift", ["trainer: 'tests.tuner.test_spec:SmallTrainer' -> 'gift'"]),
        ("sampler.name=gp", ["sampler.name: 'tpe' -> 'gp'"]),
        ("pruner.patience=5", ["pruner.patience: 2 -> 5"]),
        # free to change
        ("n_trials=80", []),
        ("description=other words", []),
        ("data.path=elsewhere", []),
        ("max_failures_in_a_row=9", []),
        ("gate={champion: false, max_ece: null}", []),
        # a verdict may be added to a study that had none
        ("verdict={baseline: both, treatment: single, min_gain: 0.1}", []),
        ("config.width=64.0", []),
    ],
)
def test_differences_name_what_may_not_change(small: Path, override: str, expected: list[str]):
    assert differences(load_spec("small"), _loaded(override)) == expected


def _loaded(override: str) -> Spec:
    """The small study with an override, though its defaults may no longer fit the trainer."""
    if override.startswith("config.width"):  # 64.0 is no whole number to the space, but the same to a study
        spec = load_spec("small")
        return spec.model_copy(update={"config": {**spec.config, "width": 64.0}})
    if override.startswith("space.width"):
        return load_spec("small", [override, "config.width=64"])
    return load_spec("small", [override])


def test_a_dimension_or_arm_that_is_gone_is_a_difference(small: Path):
    old = load_spec("small")
    assert differences(old, load_spec("small", ["space.width=null"])) == [
        "space.width.kind: 'int' -> absent",
        "space.width.low: 16 -> absent",
        "space.width.high: 128 -> absent",
    ]
    swapped = old.model_copy(update={"arms": dict(reversed(old.arms.items()))})
    assert differences(old, swapped) == ["arms: dealt in the order single, both -> both, single"]


def test_the_order_of_keys_and_the_place_of_the_file_are_no_difference(small: Path, tmp_path: Path):
    old = load_spec("small")
    text = small.read_text()
    head, space = text.split("space:\n")
    lr = "  lr:\n    low: 1e-4\n    high: 1e-2\n    log: true\n"
    (tmp_path / "other.yaml").write_text("space:\n" + lr + space.replace(lr, "") + head)
    new = load_spec(str(tmp_path / "other.yaml"))
    assert new == old
    assert differences(old, new) == []


def test_a_verdict_that_was_written_down_stays(small: Path):
    asked = "verdict={baseline: single, treatment: both, min_gain: 0.05}"
    old = load_spec("small", [asked])
    assert differences(old, load_spec("small", [asked, "verdict.min_gain=0.03"])) == [
        "verdict.min_gain: 0.05 -> 0.03"
    ]
    assert "verdict.baseline: 'single' -> absent" in differences(old, load_spec("small"))


def test_a_study_that_was_stored_before_there_were_verdicts_is_no_other(small: Path):
    spec = load_spec("small")
    tree = json.loads(spec.to_json())
    for name in ("replicate", "verdict", "gate"):
        del tree[name]
    stored = Spec.from_json(json.dumps(tree))
    assert differences(stored, spec) == []
    assert stored.seed_of(3) == spec.seed
    assert stored.gate.certificate is True


# -- verdicts and replicates ----------------------------------------------------------------------------------


def test_without_a_verdict_the_first_arm_is_held_against_the_second(small: Path):
    assert load_spec("small").compared == VerdictSpec(
        baseline="single", treatment="both", min_gain=0.03, reading="relative"
    )
    asked = load_spec("small", ["verdict={baseline: both, treatment: single, reading: points}"])
    assert asked.compared == VerdictSpec(baseline="both", treatment="single", reading="points")
    assert asked.model_copy(update={"arms": {"one": {}}, "verdict": None}).compared is None


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_studies_ask_whether_joint_training_helps(name: str):
    spec = load_spec(name)
    assert spec.verdict is not None
    assert spec.verdict.baseline == next(iter(spec.arms))
    assert spec.verdict.treatment == "multi_task_all"
    assert (spec.verdict.min_gain, spec.verdict.reading) == (0.03, "relative")
    assert spec.gate.max_feature_pr_auc is not None


def test_replicates_have_a_seed_a_round_that_all_arms_share(small: Path):
    spec = load_spec("small", ["replicate=true", "space=null", "pruner.name=none"])
    seeds = [spec.seed_of(number) for number in range(8)]
    assert seeds[::2] == seeds[1::2]
    assert len(set(seeds)) == 4
    assert seeds == [Spec.from_json(spec.to_json()).seed_of(number) for number in range(8)]
    other = load_spec("small", ["replicate=true", "space=null", "pruner.name=none", "seed=43"])
    assert not set(seeds) & {other.seed_of(number) for number in range(8)}
    assert spec.seed not in seeds  # the search has seen that one


def test_replicates_are_never_pruned(small: Path):
    with pytest.raises(SpecError, match=r"replicate: expected `pruner: \{name: none\}`"):
        load_spec("small", ["replicate=true", "space=null"])


# -- other names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written_as", "kept"), [("pr_auc", "pr_auc"), ("roc_auc", "roc_auc"), ("auc", "roc_auc"), ("ece", "ece")]
)
def test_a_metric_without_its_task_is_that_of_the_decision(small: Path, written_as: str, kept: str):
    direction = "minimize" if kept == "ece" else "maximize"
    short = load_spec("small", [f"objective={{metric: {written_as}, direction: {direction}}}"])
    full = load_spec("small", [f"objective={{metric: valid/gift/{kept}, direction: {direction}}}"])
    assert short.objective.metric == f"valid/gift/{kept}"
    assert short == full
    assert short.to_json() == full.to_json()
    assert differences(Spec.from_json(full.to_json()), short) == []
    check_spec(short, SmallTrainer())


def test_a_metric_without_its_task_is_known_beside_other_faults(small: Path):
    written(small, ("valid/gift/pr_auc", "auc"), ("weight: 0.3", "weight: heavy"), ("study: small", "study: a/b"))
    assert {fault.split(": ")[1] for fault in faults()} == {"study", "config.tasks.gift.weight"}


def test_of_an_unknown_decision_a_short_metric_says_nothing(small: Path):
    written(small, ("valid/gift/pr_auc", "auc"), ("target_precision: 0.5", "target_precision: 5"))
    (fault,) = faults()
    assert fault.startswith("configs/small.yaml:4: decision.target_precision: expected a number below 1")


def test_the_range_of_thresholds_has_two_names(small: Path):
    other = load_spec("small", ["decision.threshold_range=[0.15, 0.45]"])
    plain = load_spec("small", ["decision.range=[0.15, 0.45]"])
    assert other == plain
    assert other.decision.range == (0.15, 0.45)
    assert other.to_json() == plain.to_json()
    assert "threshold_range" not in other.to_json() + other.to_yaml()
    assert differences(load_spec("small"), other) == ["decision.range: null -> [0.15, 0.45]"]


def test_the_range_of_thresholds_is_told_at_its_own_line(small: Path):
    """Where every key has a line, the fault is at that of the name that was written."""
    block = "decision:\n  task: gift\n  target_precision: 0.5\n  threshold_range: [0.5, 0.1]\n"
    written(small, ("decision: {task: gift, target_precision: 0.5}\n", block))
    assert faults() == [
        "configs/small.yaml:7: decision.threshold_range: expected 0 <= low < high <= 1, got [0.5, 0.1]"
    ]


SKETCH = """\
study: sketch
trainer: tests.tuner.test_spec:SketchTrainer
n_trials: 50
data: {path: bars, universe: {n_stocks: 150}, label: {min_return: 0.04}}
decision: {task: rise, target_precision: 0.6, threshold_range: [0.15, 0.45]}
objective: {metric: auc}
config: {booster: {tree_method: hist, max_bin: 128}}
"""


class SketchTrainer:
    Config = StockConfig
    Data = StockData

    def check(self, config: StockConfig, data: StockData, decision: Decision) -> list[Problem]:
        return []


def test_the_options_of_the_sketch_of_stock_keep_their_names(small: Path):
    (small.parent / "sketch.yaml").write_text(SKETCH)
    spec = load_spec("sketch")
    check_spec(spec, SketchTrainer())
    data, config = StockData.model_validate(spec.data), StockConfig.model_validate(spec.config)
    assert (spec.n_trials, spec.objective.metric) == (50, "valid/rise/roc_auc")
    assert (spec.decision.target_precision, spec.decision.range) == (0.6, (0.15, 0.45))
    assert (config.booster.tree_method, config.booster.max_bin) == ("hist", 128)
    assert (data.universe.n_stocks, data.label.min_return) == (150, 0.04)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("n_trials: 50", "n_trials: many", ":3: n_trials: expected a whole number, got 'many'"),
        ("n_stocks: 150", "n_stocks: 1", ":4: data.universe.n_stocks: expected a number of at least 2, got 1"),
        ("min_return: 0.04", "min_return: 0", ":4: data.label.min_return: expected a number above 0, got 0"),
        ("target_precision: 0.6", "target_precision: 1", ":5: decision.target_precision: expected a number below"),
        ("metric: auc", "metric: aucs", ":6: objective.metric: unknown metric: expected one of "),
        ("tree_method: hist", "tree_method: exact", ":7: config.booster.tree_method: expected 'hist', got 'exact'"),
        ("max_bin: 128", "max_bin: 1", ":7: config.booster.max_bin: expected a number of at least 2, got 1"),
    ],
)
def test_faults_of_the_options_of_the_sketch(small: Path, old: str, new: str, expected: str):
    (small.parent / "sketch.yaml").write_text(SKETCH)
    written(small.parent / "sketch.yaml", (old, new))
    with pytest.raises(SpecError) as raised:
        check_spec(load_spec("sketch"), SketchTrainer())
    (fault,) = raised.value.problems
    assert fault.startswith("configs/sketch.yaml" + expected)


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("n_stocks=40", "data.universe.n_stocks"), ("metric=pr_auc", "objective.metric"),
        ("min_return=0.02", "data.label.min_return"), ("tree_method=hist", "config.booster.tree_method"),
        ("target_precision=0.3", "decision.target_precision"),
    ],
)  # fmt: skip
def test_an_option_outside_its_section_is_told_its_place(small: Path, option: str, place: str):
    (small.parent / "sketch.yaml").write_text(SKETCH)
    with pytest.raises(SpecError) as raised:
        load_spec("sketch", [option])
    key = option.partition("=")[0]
    (fault,) = raised.value.problems
    assert fault.startswith(f"--set {key}: unknown key: expected one of ")
    assert fault.endswith(f", got {key!r}; did you mean {place!r}?")


def test_of_an_option_with_many_places_none_is_named(small: Path):
    (fault,) = faults("small", ["weight=1"])
    assert "did you mean" not in fault


# -- small things -------------------------------------------------------------------------------------------


def test_a_specification_without_arms_has_one(small: Path):
    written(small, ("arms:\n  single:\n    tasks: {watch: null}\n  both: {}\n", ""))
    assert load_spec("small").arms == {"default": {}}


def test_an_arm_without_content_is_the_config(small: Path):
    written(small, ("both: {}", "both:"))
    assert load_spec("small").arms["both"] == {}


def test_the_best_of_a_loss_is_zero():
    assert Objective(metric="valid/gift/loss", direction="minimize").upper == 0.0
    assert Objective(metric="valid/gift/loss", direction="minimize", upper=0.2).upper == 0.2
    assert Objective(metric="valid/gift/pr_auc").upper == 1.0


def test_hyperband_needs_room_above_its_warm_up():
    with pytest.raises(ValueError, match="max_steps: expected more than warmup_steps, got 4"):
        PrunerSpec(name="hyperband", max_steps=4)
    assert PrunerSpec(name="median", max_steps=4).warmup_steps == 4


def test_a_specification_cannot_be_changed(small: Path):
    spec = load_spec("small")
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1
