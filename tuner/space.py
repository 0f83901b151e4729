"""The search space: the same tree as the trainer's config, with ranges where the config has values.

A leaf is `{low, high}` (with `log` or `step`; whole numbers when all its bounds are whole) or
`{choices: [...]}`, either with an optional `when: {path: value or [values]}`. A path without a dot in
`when` is a sibling, one with dots counts from the root of the config. `null` is "not searched".

An arm lays an overlay over the config; `null` there deletes a key. What an arm fixes or deletes is not
searched in that arm.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field

from models.trainer import FrozenModel, InputError, Problem
from tuner.source import expected_one_of, show
from tuner.tree import find, leaves, merge, put, same, settles

Scalar = bool | int | float | str
_LEAF_KEYS = ("low", "high", "log", "step", "choices")


class Dimension(FrozenModel):
    """One searched value of the config, at the dotted `path`.

    `low` and `high` are inclusive. `when` maps dotted paths of the config to the values under which the
    dimension is searched; under others the config keeps its default.
    """

    path: str
    kind: Literal["float", "int", "categorical"]
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: tuple[Scalar, ...] = ()
    when: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)

    def contains(self, value: Any) -> bool:
        """Whether `value` can be sampled: inside the bounds and on the grid, or one of the choices."""
        if self.kind == "categorical":
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8

    def corners(self) -> tuple[tuple[str, Scalar], ...]:
        """Named values that stand for the whole dimension when it is checked against a trainer."""
        if self.kind == "categorical":
            return tuple(("choice", choice) for choice in self.choices)
        ends = (("low", self.low), ("high", self.high))
        if self.kind == "int":
            return ends
        # A value inside shows what the ends hide: 32.0 and 64.0 pass as whole numbers, 44.2 does not.
        if self.step is not None:
            return (*ends, ("low + step", self.low + self.step))
        if self.log:
            inside = math.exp(0.618 * math.log(self.low) + 0.382 * math.log(self.high))
        else:
            inside = 0.618 * self.low + 0.382 * self.high
        return (*ends, ("inside", inside))

    def active(self, tree: Mapping[str, Any]) -> bool:
        """Whether every condition holds in the config `tree`."""
        return all(any(same(find(tree, path), value) for value in values) for path, values in self.when.items())

    def as_leaf(self) -> dict[str, Any]:
        """The dimension as the YAML writes it."""
        if self.kind == "categorical":
            leaf: dict[str, Any] = {"choices": list(self.choices)}
        else:
            leaf = {"low": self.low, "high": self.high}
            leaf |= {"log": True} if self.log else {}
            leaf |= {"step": self.step} if self.step is not None else {}
        return leaf | ({"when": {k: list(v) for k, v in self.when.items()}} if self.when else {})


class Space(FrozenModel):
    """All dimensions of a study.

    They stand in one order that does not depend on the order in the YAML: by path, a dimension after those
    that its conditions name.
    """

    dimensions: tuple[Dimension, ...] = ()

    def as_tree(self) -> dict[str, Any]:
        """The space as the YAML writes it."""
        tree: dict[str, Any] = {}
        for dimension in self.dimensions:
            *above, last = dimension.path.split(".")
            below = tree
            for key in above:
                below = below.setdefault(key, {})
            below[last] = dimension.as_leaf()
        return tree

    @classmethod
    def from_tree(cls, tree: Any) -> Space:
        """The space written as `tree`. Raises InputError naming every fault."""
        space, problems = parse_space(tree)
        if problems:
            raise InputError("\n".join(f"{problem.path}: {problem.message}" for problem in problems))
        return space

    def for_arm(
        self, config: Mapping[str, Any], overlay: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[Dimension, ...]]:
        """The arm's default config (a copy) and the dimensions that can be searched in it, in order."""
        merged = merge(config, overlay)
        fates = self.fates(config, overlay)
        return merged, tuple(d for d in self.dimensions if fates[d.path] == "live")

    def fates(self, config: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, str]:
        """What becomes of each dimension in an arm, by path.

        `live`; `fixed` (the arm's overlay sets or deletes it); `absent` (the arm's config has no such place);
        `never` (its conditions cannot hold in this arm).
        """
        merged = merge(config, overlay)
        fates: dict[str, str] = {}
        live: dict[str, Dimension] = {}
        for dimension in self.dimensions:
            parent = dimension.path.rpartition(".")[0]
            if settles(overlay, dimension.path):
                fate = "fixed"
            elif not isinstance(find(merged, parent), Mapping):
                fate = "absent"
            else:
                fate = "live" if _possible(dimension, live, merged) else "never"
            fates[dimension.path] = fate
            if fate == "live":
                live[dimension.path] = dimension
        return fates

    def sample(
        self,
        config: Mapping[str, Any],
        overlay: Mapping[str, Any],
        choose: Callable[[Dimension, Any], Any],
    ) -> dict[str, Any]:
        """One config of an arm.

        Args:
            config: the defaults of the study.
            overlay: the arm.
            choose: called once for each dimension whose conditions hold under the values chosen so far, in
                order, with the dimension and its default; returns the value.

        Raises:
            ValueError: `choose` returned a value outside the dimension.
        """
        tree, dimensions = self.for_arm(config, overlay)
        for dimension in dimensions:
            if not dimension.active(tree):
                continue
            default = find(tree, dimension.path)
            value = choose(dimension, default)
            if not dimension.contains(value):
                raise ValueError(f"{dimension.path}: {value!r} is outside {dimension.as_leaf()}")
            put(tree, dimension.path, value)
        return tree

    def defaults(self, config: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
        """The arm's default values, by dotted path, of the dimensions that are active under them."""
        values: dict[str, Any] = {}
        self.sample(config, overlay, lambda dimension, default: values.setdefault(dimension.path, default))
        return values

    def problems(self, config: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
        """Faults between the space, the config's defaults and the arms; paths start with `space`."""
        merged = {arm: merge(config, overlay) for arm, overlay in arms.items()}
        fates = {arm: self.fates(config, overlay) for arm, overlay in arms.items()}
        by_path = {dimension.path: dimension for dimension in self.dimensions}
        for dimension in self.dimensions:
            path = f"space.{dimension.path}"
            if message := _unsearched(dimension, {fates[arm][dimension.path] for arm in arms}, merged):
                yield Problem(path, message)
            yield from _condition_problems(dimension, by_path, list(merged.values()))
            told = set()
            for arm, tree in merged.items():
                if fates[arm][dimension.path] == "live":
                    told.add(_default_problem(dimension, tree))
            yield from (Problem(path, message) for message in sorted(told - {""}))


def _possible(dimension: Dimension, live: Mapping[str, Dimension], tree: Mapping[str, Any]) -> bool:
    """Whether each condition alone can hold in an arm with the defaults `tree` and the `live` dimensions."""
    return all(
        any(same(find(tree, path), value) or (path in live and live[path].contains(value)) for value in values)
        for path, values in dimension.when.items()
    )


def _unsearched(dimension: Dimension, fates: set[str], merged: Mapping[str, Mapping[str, Any]]) -> str:
    if "live" in fates:
        return ""
    if "absent" in fates:
        known = {path for tree in merged.values() for path in leaves(tree)}
        near = difflib.get_close_matches(dimension.path, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"expected a place of the config, got {dimension.path!r}, which no arm has{hint}"
    if "never" in fates:
        return f"its condition holds in no arm: {show(dimension.as_leaf()['when'])}"
    return "every arm fixes or deletes it, so there is nothing to search: remove it here or in an arm"


def _default_problem(dimension: Dimension, tree: Mapping[str, Any]) -> str:
    default = find(tree, dimension.path)
    if default is None:
        if not dimension.active(tree):
            return ""
        return f"config.{dimension.path} is missing: the first trial of every arm takes its value from there"
    if dimension.kind == "int" and isinstance(default, float):
        return (
            f"whole bounds search whole numbers alone, but config has {default!r}: "
            f"write {float(dimension.low)} and {float(dimension.high)}"
        )
    if dimension.contains(default):
        return ""
    if dimension.kind == "categorical":
        return expected_one_of(default, dimension.choices, "the config's default: ")
    grid = f" in steps of {dimension.step}" if dimension.step is not None else ""
    return f"expected the config's default inside {dimension.low} to {dimension.high}{grid}, got {show(default)}"


def _condition_problems(
    dimension: Dimension, by_path: Mapping[str, Dimension], configs: Collection[Mapping[str, Any]]
) -> Iterator[Problem]:
    for path, values in dimension.when.items():
        where = f"space.{dimension.path}.when"
        on = by_path.get(path)
        if on is None:
            if all(find(tree, path) is None for tree in configs):
                known = {*by_path, *(leaf for tree in configs for leaf in leaves(tree))}
                near = difflib.get_close_matches(path, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                yield Problem(where, f"expected a place of the config, got {path!r}{hint}")
        elif on.kind == "float":
            yield Problem(where, f"expected a whole number or choices as condition, got {path}, a range of numbers")
        else:
            for value in values:
                set_by_an_arm = any(same(find(tree, path), value) for tree in configs)
                if not (set_by_an_arm or on.contains(value)):
                    among = on.choices if on.kind == "categorical" else range(on.low, on.high + 1, on.step or 1)
                    yield Problem(where, expected_one_of(value, list(among)[:20], f"{path}: "))


def parse_space(tree: Any) -> tuple[Space, list[Problem]]:
    """The space written as `tree` and every fault in it, paths starting with `space`; faulty leaves are left
    out of the space."""
    problems: list[Problem] = []
    found: dict[str, Dimension] = {}
    if tree is not None and not isinstance(tree, Mapping):
        return Space(), [Problem("space", f"expected a mapping, got {show(tree)}")]
    for path, leaf in _leaves_of_space(tree or {}, ""):
        dimension = _parse_leaf(path, leaf, problems)
        if dimension is not None:
            found[path] = dimension
    return Space(dimensions=tuple(_in_order(found, problems))), problems


def _leaves_of_space(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        below = f"{path}.{key}" if path else key
        is_leaf = not isinstance(value, Mapping) or any(
            name in value and not isinstance(value[name], Mapping) for name in _LEAF_KEYS
        )
        if is_leaf:
            if value is not None:
                yield below, value
        else:
            yield from _leaves_of_space(value, below)


def _parse_leaf(path: str, leaf: Any, problems: list[Problem]) -> Dimension | None:
    here = f"space.{path}"
    faults: list[Problem] = []
    if not isinstance(leaf, Mapping):
        problems.append(Problem(here, f"expected {{low, high}} or {{choices}}, got {show(leaf)}"))
        return None
    allowed = ("choices", "when") if "choices" in leaf else ("low", "high", "log", "step", "when")
    for key in leaf:
        if key not in allowed:
            faults.append(Problem(f"{here}.{key}", expected_one_of(key, allowed, "unknown key: ")))
    when = _parse_when(path, leaf.get("when"), faults)
    if "choices" in leaf:
        faults += [Problem(here, message) for message in _choice_faults(leaf["choices"])]
        values: dict[str, Any] = {"kind": "categorical", "choices": leaf["choices"]}
    else:
        faults += [Problem(here, message) for message in _range_faults(leaf)]
        bounds = [leaf.get(key) for key in ("low", "high", "step") if leaf.get(key) is not None]
        kind = "int" if all(isinstance(bound, int) for bound in bounds) else "float"
        values = {"kind": kind, "log": leaf.get("log", False), "step": leaf.get("step")}
        values |= {"low": leaf.get("low"), "high": leaf.get("high")}
    problems.extend(faults)
    return None if faults else Dimension(path=path, when=when, **values)


def _choice_faults(choices: Any) -> Iterator[str]:
    if not isinstance(choices, list):
        yield f"choices: expected a list, got {show(choices)}"
        return
    for choice in choices:
        if not isinstance(choice, Scalar):
            yield f"choices: expected numbers, text, true or false, got {show(choice)}"
    if any(a == b for i, a in enumerate(choices) for b in choices[:i]):
        yield f"choices: expected different values, got {show(choices)}"
    elif len(choices) < 2:
        yield f"choices: expected at least two, got {show(choices)}: put a fixed value into config"


def _range_faults(leaf: Mapping[str, Any]) -> Iterator[str]:
    for key in ("low", "high"):
        if not _is_number(leaf.get(key)):
            yield f"{key}: expected a number, got {show(leaf.get(key))}"
    log, step = leaf.get("log", False), leaf.get("step")
    if not isinstance(log, bool):
        yield f"log: expected true or false, got {show(log)}"
    if step is not None and not (_is_number(step) and step > 0):
        yield f"step: expected a number above 0, got {show(step)}"
        step = None
    low, high = leaf.get("low"), leaf.get("high")
    if not (_is_number(low) and _is_number(high)):
        return
    if low >= high:
        yield f"low must be below high (got {low} and {high})"
    elif step is not None and log is True:
        yield "log and step exclude each other: remove one"
    elif step is not None:
        steps = (Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step))
        if steps != steps.to_integral_value():
            nearest = Decimal(str(low)) + int(steps) * Decimal(str(step))
            yield f"expected high = low + a whole number of steps of {step}, got {high}: try {nearest}"
    if log is True and low <= 0:
        yield f"log needs low above 0 (got {low})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse_when(path: str, when: Any, faults: list[Problem]) -> dict[str, tuple[Scalar, ...]]:
    where = f"space.{path}.when"
    if when is None:
        return {}
    if not isinstance(when, Mapping) or not when:
        faults.append(Problem(where, f"expected a mapping such as {{loss: focal}}, got {show(when)}"))
        return {}
    conditions = {}
    parent = path.rpartition(".")[0]
    for key, values in when.items():
        target = key if "." in key or not parent else f"{parent}.{key}"
        listed = values if isinstance(values, list) else [values]
        if not listed or not all(isinstance(value, Scalar) for value in listed):
            faults.append(Problem(f"{where}.{key}", f"expected a value or a list of values, got {show(values)}"))
        conditions[target] = tuple(listed)
    return dict(sorted(conditions.items()))


def _in_order(found: Mapping[str, Dimension], problems: list[Problem]) -> list[Dimension]:
    """By path, each after the dimensions that its conditions name; cycles are faults."""
    ordered: dict[str, Dimension] = {}
    waiting = sorted(found)
    while waiting:
        ready = next((p for p in waiting if not (found[p].when.keys() & set(waiting))), None)
        if ready is None:
            cycle = ", ".join(waiting)
            problems.append(Problem(f"space.{waiting[0]}.when", f"conditions go in a circle: {cycle}"))
            break
        waiting.remove(ready)
        ordered[ready] = found[ready]
    return list(ordered.values())
