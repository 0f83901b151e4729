"""The space: what it samples lies inside it, whatever the arm, the conditions and the order of the keys."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.trainer import InputError
from tuner.space import Dimension, Space, parse_space
from tuner.tree import find, leaves, merge

CONFIG = {
    "tasks": {
        "watch": {"weight": 0.3},
        "gift": {"weight": 1.0, "loss": "focal", "alpha": 0.25, "gamma": 2.0},
    },
    "balancing": {"method": "fixed", "alpha": 1.5},
    "network": {"depth": 3, "dropout": 0.25, "batch_norm": True, "width": 256},
    "lr": 1e-3,
    "epochs": 50,
}
TREE = {
    "tasks": {
        "watch": {"weight": {"low": 1e-3, "high": 10.0, "log": True}},
        "gift": {
            "loss": {"choices": ["bce", "focal"]},
            "alpha": {"low": 0.05, "high": 0.99, "when": {"loss": "focal"}},
            "gamma": {"low": 0.0, "high": 5.0, "when": {"loss": ["focal"]}},
        },
    },
    "balancing": {
        "method": {"choices": ["fixed", "pcgrad"]},
        "alpha": {"low": 0.1, "high": 3.0, "when": {"method": "gradnorm"}},
    },
    "network": {
        "depth": {"low": 1, "high": 5},
        "width": {"low": 64, "high": 512, "step": 64, "when": {"network.depth": [2, 3, 4, 5]}},
        "dropout": {"low": 0.0, "high": 0.5, "step": 0.05},
        "batch_norm": {"choices": [True, False]},
    },
    "lr": {"low": 1e-4, "high": 1e-2, "log": True, "when": {"tasks.gift.loss": "bce"}},
}
ARMS: dict[str, dict[str, Any]] = {
    "all": {},
    "single": {"tasks": {"watch": None}, "balancing": {"method": "fixed"}},
    "blend": {"balancing": {"method": "gradnorm"}},
    "frozen": {"tasks": {"gift": {"loss": "bce"}}, "network": {"depth": 2}},
    "bare": {"balancing": None, "network": {"batch_norm": False}},
}
SPACE = Space.from_tree(TREE)


def drawn_by(data: st.DataObject):
    """A `choose` that lets hypothesis pick any value of the dimension."""

    def choose(dimension: Dimension, default: Any) -> Any:
        if dimension.kind == "categorical":
            return data.draw(st.sampled_from(dimension.choices), label=dimension.path)
        if dimension.kind == "int":
            steps = (dimension.high - dimension.low) // (dimension.step or 1)
            return dimension.low + (dimension.step or 1) * data.draw(st.integers(0, steps), label=dimension.path)
        if dimension.step is not None:
            steps = round((dimension.high - dimension.low) / dimension.step)
            return dimension.low + dimension.step * data.draw(st.integers(0, steps), label=dimension.path)
        return data.draw(st.floats(dimension.low, dimension.high), label=dimension.path)

    return choose


def by_path(dimension: Dimension, default: Any) -> Any:
    """A `choose` that depends on nothing but the dimension's name."""
    corners = dimension.corners()
    return corners[sum(dimension.path.encode()) % len(corners)][1]


def shuffled(tree: Any, random: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    keys = list(tree)
    random.shuffle(keys)
    return {key: shuffled(tree[key], random) for key in keys}


@settings(max_examples=60, deadline=None)
@given(arm=st.sampled_from(sorted(ARMS)), data=st.data())
def test_a_sampled_config_is_inside_and_follows_its_conditions(arm: str, data: st.DataObject):
    overlay, asked = ARMS[arm], {}
    inner = drawn_by(data)

    def choose(dimension: Dimension, default: Any) -> Any:
        assert find(merge(CONFIG, overlay), dimension.path) == default
        asked[dimension.path] = inner(dimension, default)
        return asked[dimension.path]

    tree = SPACE.sample(CONFIG, overlay, choose)
    for path, value in leaves(merge(CONFIG, overlay)).items():
        assert find(tree, path) == asked.get(path, value)  # what was not asked for keeps its default
    assert leaves(tree).keys() == leaves(merge(CONFIG, overlay)).keys()
    for path, value in leaves(TREE_BOUNDS).items():
        if path in asked:
            low, high = value
            assert low <= asked[path] <= high
    # The conditions, written out by hand.
    loss = tree["tasks"]["gift"]["loss"]
    assert ("tasks.gift.alpha" in asked) == ("tasks.gift.gamma" in asked) == (loss == "focal")
    assert ("lr" in asked) == (loss == "bce")
    assert ("network.width" in asked) == (tree["network"]["depth"] >= 2)
    assert ("balancing.alpha" in asked) == (arm == "blend")


TREE_BOUNDS = {
    "tasks": {"watch": {"weight": (1e-3, 10.0)}, "gift": {"alpha": (0.05, 0.99), "gamma": (0.0, 5.0)}},
    "balancing": {"alpha": (0.1, 3.0)},
    "network": {"depth": (1, 5), "width": (64, 512), "dropout": (0.0, 0.5 + 1e-12)},
    "lr": (1e-4, 1e-2),
}


@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False), arm=st.sampled_from(sorted(ARMS)))
def test_the_order_of_the_keys_changes_nothing(random: Any, arm: str):
    space = Space.from_tree(shuffled(TREE, random))
    config, overlay = shuffled(CONFIG, random), shuffled(ARMS[arm], random)
    assert space == SPACE
    assert space.sample(config, overlay, by_path) == SPACE.sample(CONFIG, ARMS[arm], by_path)
    assert list(space.defaults(config, overlay)) == list(SPACE.defaults(CONFIG, ARMS[arm]))


@pytest.mark.parametrize(
    ("arm", "gone"),
    [
        ("all", {"balancing.alpha"}),  # gradnorm is no choice, so its alpha can never count
        ("single", {"tasks.watch.weight", "balancing.method", "balancing.alpha"}),
        ("blend", {"balancing.method"}),
        ("frozen", {"tasks.gift.loss", "tasks.gift.alpha", "tasks.gift.gamma", "network.depth", "balancing.alpha"}),
        ("bare", {"balancing.method", "balancing.alpha", "network.batch_norm"}),
    ],
)
def test_what_an_arm_fixes_or_deletes_is_not_searched_in_it(arm: str, gone: set[str]):
    tree, dimensions = SPACE.for_arm(CONFIG, ARMS[arm])
    everything = {dimension.path for dimension in SPACE.dimensions}
    assert {dimension.path for dimension in dimensions} == everything - gone
    assert tree == merge(CONFIG, ARMS[arm])
    sampled = SPACE.sample(CONFIG, ARMS[arm], by_path)
    for path, value in leaves(ARMS[arm]).items():
        assert find(sampled, path) == value


def test_defaults_are_those_of_the_active_dimensions():
    assert SPACE.defaults(CONFIG, ARMS["blend"]) == {
        "balancing.alpha": 1.5,
        "network.batch_norm": True,
        "network.depth": 3,
        "network.dropout": 0.25,
        "network.width": 256,
        "tasks.gift.alpha": 0.25,
        "tasks.gift.gamma": 2.0,
        "tasks.gift.loss": "focal",
        "tasks.watch.weight": 0.3,
    }


def test_sampling_leaves_the_defaults_alone():
    before = json.dumps([CONFIG, ARMS])
    tree = SPACE.sample(CONFIG, ARMS["all"], by_path)
    tree["network"]["depth"] = 99
    assert json.dumps([CONFIG, ARMS]) == before


@pytest.mark.parametrize("value", [6, 0, 2.0, True, "3", None])
def test_a_value_outside_the_dimension_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"network\.depth: .* is outside"):
        SPACE.sample(CONFIG, {}, lambda d, default: value if d.path == "network.depth" else default)


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 40), step=st.sampled_from([0.05, 0.1, 0.3, 1.5]), low=st.sampled_from([0.0, 0.1, -2.0]))
def test_grids_of_decimal_numbers_are_grids(steps: int, step: float, low: float):
    high = float(f"{low + steps * step:.6f}")
    space, problems = parse_space({"x": {"low": low, "high": high, "step": step}})
    assert problems == []
    (dimension,) = space.dimensions
    assert all(dimension.contains(low + i * step) for i in range(steps))
    assert dimension.contains(high)
    assert not dimension.contains(low + 0.5 * step)
    assert not dimension.contains(high + step)


def test_kinds_follow_the_bounds():
    tree = {
        "a": {"low": 1, "high": 5},
        "b": {"low": 1.0, "high": 5},
        "c": {"low": 0, "high": 4, "step": 0.5},
        "d": {"choices": [0, 2.5, "x", True]},
    }
    assert {d.path: d.kind for d in Space.from_tree(tree).dimensions} == {
        "a": "int",
        "b": "float",
        "c": "float",
        "d": "categorical",
    }


def test_null_is_not_searched_and_a_branch_may_be_called_like_a_leafs_key():
    space = Space.from_tree({"lr": None, "step": {"low": {"low": 1, "high": 3}}})
    assert [dimension.path for dimension in space.dimensions] == ["step.low"]


@settings(max_examples=100, deadline=None)
@given(low=st.floats(1e-12, 1e12), ratio=st.floats(1.0001, 1e12), log=st.booleans())
def test_the_inner_corner_is_inside(low: float, ratio: float, log: bool):
    dimension = Dimension(path="x", kind="float", low=low, high=low * ratio, log=log)
    inside = dict(dimension.corners())["inside"]
    assert low <= inside <= low * ratio
    assert math.isfinite(inside)


def test_a_dimension_survives_json():
    for dimension in SPACE.dimensions:
        again = Dimension.model_validate_json(dimension.model_dump_json())
        assert again == dimension
        assert [type(c) for c in again.choices] == [type(c) for c in dimension.choices]
        assert type(again.low) is type(dimension.low)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ({"low": 0.01, "high": 0.001}, "low must be below high (got 0.01 and 0.001)"),
        ({"low": 3, "high": 3}, "low must be below high (got 3 and 3)"),
        ({"low": 0, "high": 1.0, "log": True}, "log needs low above 0 (got 0)"),
        ({"low": "heavy", "high": 1.0}, "low: expected a number, got 'heavy'"),
        ({"low": True, "high": 5}, "low: expected a number, got true"),
        ({"low": 1}, "high: expected a number, got nothing"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "log and step exclude each other: remove one"),
        ({"low": 0.0, "high": 1.0, "step": 0.3}, "a whole number of steps of 0.3, got 1.0: try 0.9"),
        ({"low": 0.0, "high": 1.0, "step": 0}, "step: expected a number above 0, got 0"),
        ({"low": 1, "high": 2, "log": "yes"}, "log: expected true or false, got 'yes'"),
        ({"low": 1, "hihg": 2, "high": 3}, "unknown key: expected one of high, log, low, step, when, got 'hihg'"),
        ({"choices": []}, "choices: expected at least two, got []"),
        ({"choices": ["a", "a"]}, "choices: expected different values, got ['a', 'a']"),
        ({"choices": "a"}, "choices: expected a list, got 'a'"),
        ({"choices": [1, [2]]}, "choices: expected numbers, text, true or false, got [2]"),
        ({"choices": [1, 2], "low": 1}, "unknown key: expected one of choices, when, got 'low'"),
        ({"low": 1, "high": 2, "when": "loss"}, "expected a mapping such as {loss: focal}, got 'loss'"),
        ({"low": 1, "high": 2, "when": {"y": []}}, "expected a value or a list of values, got []"),
        (0.3, "expected {low, high} or {choices}, got 0.3"),
    ],
)
def test_a_faulty_leaf_is_told_and_left_out(leaf: Any, message: str):
    space, problems = parse_space({"x": leaf, "fine": {"low": 1, "high": 2}})
    assert any(message in problem.message for problem in problems), problems
    assert all(problem.path.startswith("space.x") for problem in problems)
    assert [dimension.path for dimension in space.dimensions] == ["fine"]


def test_all_faults_of_a_space_are_told_at_once():
    with pytest.raises(InputError) as raised:
        Space.from_tree({"x": {"low": 2, "high": 1}, "y": {"z": {"low": 0, "high": 1, "log": True}}})
    assert str(raised.value).splitlines() == [
        "space.x: low must be below high (got 2 and 1)",
        "space.y.z: log needs low above 0 (got 0)",
    ]


def test_conditions_in_a_circle_are_told():
    tree = {
        "a": {"choices": [1, 2], "when": {"b": 1}},
        "b": {"choices": [1, 2], "when": {"a": 1}},
    }
    _, problems = parse_space(tree)
    assert [(p.path, p.message) for p in problems] == [("space.a.when", "conditions go in a circle: a, b")]


@pytest.mark.parametrize(
    ("leaf", "config", "message"),
    [
        ({"low": 1.0, "high": 2.0}, {"x": 3.0}, "expected the config's default inside 1.0 to 2.0, got 3.0"),
        ({"low": 0, "high": 9, "step": 3}, {"x": 4}, "inside 0 to 9 in steps of 3, got 4"),
        ({"choices": ["a", "b"]}, {"x": "c"}, "the config's default: expected one of a, b, got 'c'"),
        ({"choices": [0, 1]}, {"x": True}, "the config's default: expected one of 0, 1, got true"),
        ({"low": 0, "high": 5}, {"x": 2.0}, "whole bounds search whole numbers alone, but config has 2.0"),
        ({"low": 0, "high": 5}, {"y": 2}, "config.x is missing"),
        ({"low": 0, "high": 5, "when": {"yy": 1}}, {"x": 1, "y": 2}, "got 'yy'; did you mean 'y'?"),
        ({"low": 0, "high": 5, "when": {"y": 3}}, {"x": 1, "y": 2}, "its condition holds in no arm"),
    ],
)
def test_faults_between_space_and_config(leaf: Any, config: dict[str, Any], message: str):
    space = Space.from_tree({"x": leaf})
    problems = list(space.problems(config, {"default": {}}))
    assert any(message in problem.message for problem in problems), problems


def test_a_dimension_that_no_arm_has_is_told():
    space = Space.from_tree({"network": {"widht": {"deep": {"low": 1, "high": 2}}}})
    (problem,) = space.problems({"network": {"width": {"deep": 1}}}, {"default": {}})
    assert "which no arm has; did you mean 'network.width.deep'?" in problem.message
    space = Space.from_tree({"x": {"low": 1, "high": 2}})
    (problem,) = space.problems({"x": 1}, {"a": {"x": 2}, "b": {"x": None}})
    assert problem.message.startswith("every arm fixes or deletes it")


@pytest.mark.parametrize(
    ("on", "value", "message"),
    [
        (
            {"choices": ["bce", "focal"]},
            "fokal",
            "y: expected one of bce, focal, got 'fokal'; did you mean 'focal'?",
        ),
        (
            {"low": 0.0, "high": 1.0},
            0.5,
            "expected a whole number or choices as condition, got y, a range of numbers",
        ),
        ({"low": 1, "high": 3}, 4, "y: expected one of 1, 2, 3, got 4"),
    ],
)
def test_a_condition_has_to_be_possible(on: Any, value: Any, message: str):
    space = Space.from_tree({"x": {"low": 1, "high": 2, "when": {"y": value}}, "y": on})
    default = on["choices"][0] if "choices" in on else on["low"]
    problems = list(space.problems({"x": 1, "y": default}, {"default": {}}))
    assert ("space.x.when", message) in [(p.path, p.message) for p in problems]


def test_a_condition_may_need_a_value_that_only_an_arm_sets():
    assert list(SPACE.problems(CONFIG, ARMS)) == []
