"""A specification read from its YAML file and checked; every fault at once, each with file, line and dotted path.

`load_spec` reads a file and needs no trainer; `check_spec` holds what was read against the trainer's own models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models import BASELINES, TRAINERS, get_trainer
from models.trainer import Decision, FrozenModel, InputError, Objective, Problem, Trainer
from tuner.source import Source, expected_one_of, problems_of, read_tree, show
from tuner.space import Dimension, Space, parse_space
from tuner.spec import Spec, VerdictSpec, in_full
from tuner.tree import find, merge, put, same, settles

ROOT = Path(__file__).resolve().parent.parent

# What every trainer measures of the decision's task at every step, and which way is better.
_MAXIMISED = (
    *("pr_auc", "roc_auc", "recall_at_1pct", "recall_at_5pct", "recall_at_10pct"),
    *("capture_at_1pct", "capture_at_5pct", "capture_at_10pct"),
    *("revenue_at_1pct", "revenue_at_5pct", "revenue_at_10pct"),
)
_MINIMISED = ("loss", "log_loss", "ece", "ece_calibrated")

# Beside the arms an evaluation has BASELINES, and further configurations of each.
_FURTHER = re.compile(r"(.+)(?:/default|#\d+)")


class SpecError(InputError):
    """Faults of a specification; `problems` has one line for each, the message all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load_spec(reference: str, overrides: Sequence[str] = ()) -> Spec:
    """Read a study's specification.

    Args:
        reference: `NAME` for `configs/NAME.yaml` (of the working directory, else of this installation), or the
            path of a YAML file.
        overrides: `dotted.key=value`, the value in YAML, laid over the file.

    Raises:
        SpecError: every fault that was found. Where there is one, the sections that could be read are held
            against the trainer too, so that nobody mends a file in rounds.
    """
    file, label = _find_file(reference)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SpecError([f"{label}: cannot be read: {error.strerror}"]) from error
    tree, source, problems = read_tree(content, label, overrides)
    if problems and not tree:
        raise SpecError([source.tell(problem) for problem in problems])
    space, faults = parse_space(tree.get("space"))
    problems += faults
    spec = None
    try:
        spec = Spec.model_validate({**tree, "space": space})
        parts = _Parts.of(spec)
    except ValidationError as error:
        problems += problems_of(error, Spec, tree, "")
        parts = _Parts.salvage(tree, space)
    problems += parts.problems_without_trainer()
    if problems or spec is None:
        problems += _problems_with_named_trainer(parts)
        raise _spec_error(source, problems)
    spec._source = source
    return spec


def check_spec(spec: Spec, trainer: Trainer) -> None:
    """Hold a specification against its trainer: data, config, every arm's defaults, every end of every
    dimension in every arm, and what the trainer itself finds between the sections.

    Raises:
        SpecError: every fault, those that `load_spec` finds included.
    """
    parts = _Parts.of(spec)
    problems = [*parts.problems_without_trainer(), *parts.problems_with_trainer(trainer)]
    if problems:
        raise _spec_error(spec._source, problems)


def _spec_error(source: Source, problems: Sequence[Problem]) -> SpecError:
    return SpecError(list(dict.fromkeys(source.tell(problem) for problem in problems)))


def _problems_with_named_trainer(parts: _Parts) -> list[Problem]:
    if parts.trainer is None or _unknown_trainer(parts.trainer):
        return []
    try:
        trainer = get_trainer(parts.trainer)
    except InputError as error:
        return [Problem("trainer", str(error).removeprefix("trainer: "))]
    return list(parts.problems_with_trainer(trainer))


def _unknown_trainer(name: str) -> str:
    if name in TRAINERS or ":" in name:
        return ""
    return expected_one_of(name, TRAINERS) + " (or package.module:Class for one of your own)"


def _find_file(reference: str) -> tuple[Path, str]:
    """The file of a reference and how it is called in messages."""
    if os.sep in reference or reference.endswith((".yaml", ".yml")):
        path = Path(reference)
        if not path.is_file():
            raise SpecError([f"--study {reference}: expected a YAML file, found none there"])
        return path, reference
    folders = list(dict.fromkeys((Path.cwd() / "configs", ROOT / "configs")))
    for folder in folders:
        path = folder / f"{reference}.yaml"
        if path.is_file():
            return path, os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    known = {path.stem for folder in folders for path in folder.glob("*.yaml")}
    raise SpecError([expected_one_of(reference, known, f"--study {reference}: ") + " (or the path of a file)"])


@dataclass(frozen=True)
class _Parts:
    """The sections of a specification that could be read; None for those that could not."""

    trainer: str | None
    data: dict[str, Any] | None
    decision: Decision | None
    objective: Objective | None
    config: dict[str, Any] | None
    arms: dict[str, dict[str, Any]]
    space: Space
    verdict: VerdictSpec | None
    replicate: bool

    @classmethod
    def of(cls, spec: Spec) -> _Parts:
        names = ("trainer", "data", "decision", "objective", "config", "arms", "space", "verdict", "replicate")
        return cls(**{name: getattr(spec, name) for name in names})

    @classmethod
    def salvage(cls, tree: Mapping[str, Any], space: Space) -> _Parts:
        def mapping(name: str) -> dict[str, Any] | None:
            return tree.get(name) if isinstance(tree.get(name), dict) else None

        def model(name: str, of: type[FrozenModel]) -> Any:
            try:
                return of.model_validate(tree.get(name))
            except ValidationError:
                return None

        arms = {name: arm or {} for name, arm in (mapping("arms") or {"default": {}}).items()}
        arms = {name: arm for name, arm in arms.items() if isinstance(arm, dict)}
        trainer = tree.get("trainer") if isinstance(tree.get("trainer"), str) else None
        decision, objective = model("decision", Decision), model("objective", Objective)
        objective = None if objective is None else in_full(objective, decision)
        verdict, replicate = model("verdict", VerdictSpec), tree.get("replicate") is True
        return cls(
            trainer, mapping("data"), decision, objective, mapping("config"), arms, space, verdict, replicate
        )  # fmt: skip

    def problems_without_trainer(self) -> Iterator[Problem]:
        if self.trainer is not None and (message := _unknown_trainer(self.trainer)):
            yield Problem("trainer", message)
        if self.decision is not None and self.objective is not None:
            yield from _objective_problems(self.objective, self.decision)
        if not self.replicate:
            yield from _arm_name_problems(self.arms)
        if self.verdict is not None:
            for side in ("baseline", "treatment"):
                if (arm := getattr(self.verdict, side)) not in self.arms:
                    yield Problem(f"verdict.{side}", expected_one_of(arm, self.arms))
        if self.config is not None:
            for arm, overlay in self.arms.items():
                yield from _overlay_problems(self.config, overlay, f"arms.{arm}", "")
            yield from self.space.problems(self.config, self.arms)

    def problems_with_trainer(self, trainer: Trainer) -> Iterator[Problem]:
        data = None
        if self.data is not None:
            try:
                data = trainer.Data.model_validate(self.data)
            except ValidationError as error:
                yield from problems_of(error, trainer.Data, self.data, "data")
        if self.config is None:
            return
        told: dict[Problem, dict[str, None]] = {}
        for arm in self.arms:
            for problem in _arm_problems(self, arm, trainer, data):
                told.setdefault(problem, {})[arm] = None
        for problem, arms in told.items():
            everywhere = len(arms) == len(self.arms) or problem.path.startswith("arms.")
            where = "" if everywhere else f" (arm {', '.join(arms)})"
            yield Problem(problem.path, problem.message + where)


def _objective_problems(objective: Objective, decision: Decision) -> Iterator[Problem]:
    """The objective has to be a metric of the task that the decision is about."""
    prefix, name = f"valid/{decision.task}/", objective.metric.rpartition("/")[2]
    names = (*_MAXIMISED, *_MINIMISED)
    if objective.metric != prefix + name:
        near = prefix + (name if name in names else "pr_auc")
        message = f"expected a metric of the decision's task ({near}), got {objective.metric!r}"
        yield Problem("objective.metric", message)
        return
    if name not in names:
        yield Problem("objective.metric", expected_one_of(name, names, "unknown metric: "))
        return
    better = "maximize" if name in _MAXIMISED else "minimize"
    if objective.direction != better:
        message = f"expected {better} for {objective.metric}, got {objective.direction}"
        yield Problem("objective.direction", message)


def _arm_name_problems(arms: Mapping[str, Any]) -> Iterator[Problem]:
    """An evaluation has to tell the arms from what it holds against them."""
    for arm in arms:
        further = _FURTHER.fullmatch(arm)
        if arm in BASELINES:
            yield Problem(f"arms.{arm}", "expected another name, got that of a baseline of every evaluation")
        elif further and further[1] in arms:
            message = f"expected another name, got that of a further configuration of {further[1]} in an evaluation"
            yield Problem(f"arms.{arm}", message)


def _overlay_problems(
    config: Mapping[str, Any], overlay: Mapping[str, Any], where: str, path: str
) -> Iterator[Problem]:
    """What an arm deletes has to be there."""
    for key, value in overlay.items():
        here = f"{path}.{key}" if path else key
        if value is None and key not in config:
            message = expected_one_of(key, config, "nothing to delete here: ")
            yield Problem(f"{where}.{here}", message)
        elif isinstance(value, Mapping):
            below = config.get(key)
            yield from _overlay_problems(below if isinstance(below, Mapping) else {}, value, where, here)


def _arm_problems(parts: _Parts, arm: str, trainer: Trainer, data: Any) -> Iterator[Problem]:
    """Faults of one arm's defaults, then of the ends of its dimensions that the defaults do not have."""

    def faults(tree: Mapping[str, Any]) -> list[Problem]:
        try:
            config = trainer.Config.model_validate(tree)
        except ValidationError as error:
            return problems_of(error, trainer.Config, tree, "config")
        if data is None or parts.decision is None:
            return []
        return list(trainer.check(config, data, parts.decision))

    overlay = parts.arms[arm]
    defaults, dimensions = parts.space.for_arm(parts.config or {}, overlay)
    known = faults(defaults)
    yield from (_at_owner(problem, arm, overlay) for problem in known)
    paths = {problem.path for problem in known}
    by_path = {dimension.path: dimension for dimension in dimensions}
    for dimension in dimensions:
        told: set[Problem] = set()
        for name, value in dimension.corners():
            tree = merge(defaults, {})
            _meet(dimension, by_path, tree)
            put(tree, dimension.path, value)
            for problem in faults(tree):
                if problem.path in paths or problem in told:
                    continue
                told.add(problem)
                at = "" if problem.path == f"config.{dimension.path}" else f"{problem.path}: "
                yield Problem(f"space.{dimension.path}", f"{name} {show(value)} is refused: {at}{problem.message}")


def _meet(dimension: Dimension, by_path: Mapping[str, Dimension], tree: dict[str, Any]) -> None:
    """Set what the conditions of `dimension` need, where it is searched itself."""
    for path, values in dimension.when.items():
        if path in by_path and not any(same(value, find(tree, path)) for value in values):
            _meet(by_path[path], by_path, tree)
            put(tree, path, next(value for value in values if by_path[path].contains(value)))


def _at_owner(problem: Problem, arm: str, overlay: Mapping[str, Any]) -> Problem:
    """A fault of a value that the arm sets belongs to the arm's lines."""
    section, _, path = problem.path.partition(".")
    if section == "config" and path and settles(overlay, path):
        return Problem(f"arms.{arm}.{path}", problem.message)
    return problem
