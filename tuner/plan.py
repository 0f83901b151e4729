"""What an evaluation trains again: configurations chosen from a search, arms of a study that searches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from models.trainer import InputError
from tuner.space import Space
from tuner.spec import PrunerSpec, SamplerSpec, Spec
from tuner.summary import StudySummary, TrialSummary


@dataclass(frozen=True)
class PlannedArm:
    """One configuration that is trained again.

    Args:
        name: the arm's own; `arm#2` for its second best; `arm/default`.
        trial: of the search, where it was found; None: the default, which was not run.
        rank: within its arm, from 1; 0 for a default.
    """

    name: str
    arm: str
    trial: int | None
    kind: Literal["searched", "default"]
    rank: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is trained again and on which data: a snapshot of the search, kept with the evaluation."""

    arms: tuple[PlannedArm, ...]
    seeds: int
    nominees: int
    n_replicates: int
    data_hash: str
    left_out: tuple[Mapping[str, str], ...] = ()

    @property
    def n_fits(self) -> int:
        return len(self.arms) * self.seeds

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Plan:
        arms = tuple(PlannedArm(**arm) for arm in tree["arms"])
        return cls(**{**tree, "arms": arms, "left_out": tuple(tree["left_out"])})

    def same_fits(self, other: Plan) -> bool:
        """Whether both train the same, but for the number of seeds, and certify as many."""

        def identity(plan: Plan) -> tuple[Any, ...]:
            arms = [(arm.name, arm.kind, _text(arm.config)) for arm in plan.arms]
            return arms, plan.data_hash, plan.nominees

        return identity(self) == identity(other)


def make_plan(
    summary: StudySummary, top: int = 1, seeds: int = 5, nominees: int = 1, n_replicates: int = 2000
) -> Plan:
    """The best configurations of every arm by the objective, feasible or not, and the winner's default.

    A configuration that an arm has found twice counts once. An arm without a complete trial is left out.

    Raises:
        InputError: no trial of any arm is complete.
    """
    spec = summary.spec
    arms: list[PlannedArm] = []
    left_out = []
    for arm in spec.arms:
        found = _best_of(arm, summary, top)
        if not found:
            states = [trial.state for trial in summary.trials if trial.arm == arm]
            told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
            left_out.append({"arm": arm, "reason": f"expected a complete trial, got {told}"})
        for rank, trial in enumerate(found, 1):
            name = arm if rank == 1 else f"{arm}#{rank}"
            arms.append(PlannedArm(name, arm, trial.number, "searched", rank, dict(trial.config or {})))
    if not arms:
        raise InputError(
            f"study {summary.name!r}: expected a complete trial, got {_counted(summary)}; "
            "search first, with `tuner run`"
        )
    arms = _with_default(arms, summary)
    hash_ = summary.data["data_hash"]
    return Plan(tuple(arms), seeds, nominees, n_replicates, hash_, tuple(left_out))


def _best_of(arm: str, summary: StudySummary, top: int) -> list[TrialSummary]:
    sign = -1.0 if summary.spec.objective.direction == "maximize" else 1.0
    complete = [
        trial
        for trial in summary.trials
        if trial.arm == arm and trial.state == "complete" and trial.value is not None and trial.config is not None
    ]
    complete.sort(key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    different = {_text(trial.config): trial for trial in reversed(complete)}  # of equals the best stays
    return [trial for trial in complete if different[_text(trial.config)] is trial][:top]


def _with_default(arms: list[PlannedArm], summary: StudySummary) -> list[PlannedArm]:
    """With the default configuration of the best one's arm, unless it is the best one itself."""
    spec, values = summary.spec, {trial.number: trial.value or 0.0 for trial in summary.trials}
    sign = 1.0 if spec.objective.direction == "maximize" else -1.0
    winner = max(arms, key=lambda arm: sign * values[arm.trial or 0])
    default, _ = spec.space.for_arm(spec.config, spec.arms[winner.arm])
    if _text(default) == _text(winner.config):
        return arms
    run = summary.defaults.get(winner.arm)
    kept = [arm for arm in arms if arm.arm != winner.arm or _text(arm.config) != _text(default)]
    number = run.number if run else None
    return [*kept, PlannedArm(f"{winner.arm}/default", winner.arm, number, "default", 0, default)]


def _counted(summary: StudySummary) -> str:
    return ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count) or "no trial at all"


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def spec_of_fits(spec: Spec, plan: Plan) -> Spec:
    """The specification of the study that trains a plan: its arms are the plan's, nothing is searched or pruned."""
    changes = {
        "description": f"fits of an evaluation of {spec.study}",
        "replicate": True,
        "arms": {arm.name: overlay_to(arm.config, spec.config) for arm in plan.arms},
        "n_trials": plan.n_fits,
        "space": Space(),
        "sampler": SamplerSpec(name="random"),
        "pruner": PrunerSpec(name="none"),
        "verdict": None,
        # One arm that cannot be trained is left out; all of them failing is a fault of something else.
        "max_failures_in_a_row": max(spec.max_failures_in_a_row, len(plan.arms) + 1),
    }
    return Spec.from_json(spec.model_copy(update=changes).to_json())


def overlay_to(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The arm that makes `wanted` of `config`: merge(config, overlay_to(wanted, config)) == wanted."""
    overlay: dict[str, Any] = {key: None for key in config if key not in wanted}
    for key, value in wanted.items():
        there = config.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if below := overlay_to(value, there):
                overlay[key] = below
        elif key not in config or _text(value) != _text(there):
            overlay[key] = value
    return overlay
