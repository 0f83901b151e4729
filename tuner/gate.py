"""The quality gate: what a model has to show before it may be put into service."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.trainer import InputError
from storage.rows import ModelRow
from storage.runs import Store
from tuner.judged_metric import label_of, metric_of
from tuner.registry import find_folder, get_model, parse_reference, there_is
from tuner.spec import GateSpec


@dataclass(frozen=True)
class Rule:
    """One rule and how a model stands to it; `text` says what was expected and found, and by how much it fails."""

    name: str
    passed: bool
    expected: float | None
    found: float | None
    text: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class GateRefused(Exception):
    """A model may not be put into service; the message has one line a failed rule."""

    def __init__(self, model: ModelRow, failed: Sequence[Rule]) -> None:
        self.failed = list(failed)
        super().__init__("\n".join(f"{model.name}:{model.version} refused: {rule.text}" for rule in failed))


def promote(store: Store, model: ModelRow, runs: Path, artifacts: str | None) -> tuple[ModelRow, list[Rule]]:
    """Put a model into service, if its files are whole and its study's gate lets it pass.

    Returns:
        The champion, and the rules that it was held against.

    Raises:
        GateRefused: a rule failed; nothing was changed.
        RegistryConflict: another promotion came first; nothing was changed.
        InputError: its files are missing or damaged, or its study is gone and its gate with it.
    """
    champion = store.find_model(model.name)
    rules = judge(gate_of(store, model), model, champion)
    failed = [rule for rule in rules if not rule.passed]
    if failed:
        raise GateRefused(model, failed)
    find_folder(model, runs, artifacts)
    passed = {"rules": [rule.as_json() for rule in rules]}
    expected = None if champion is None else champion.version
    return store.promote(model.name, model.version, expected, passed), rules


def chosen_model(store: Store, reference: str) -> ModelRow:
    """The model that NAME:VERSION names; without a version the newest one. Raises InputError."""
    name, number = parse_reference(reference)
    if number is not None:
        return get_model(store, reference)
    versions = store.models(name)
    if not versions:
        raise InputError(f"model {name}: expected one in the registry, got none; {there_is(store, name)}")
    return versions[-1]


def model_of_study(store: Store, study: str) -> ModelRow:
    """The model of a stored study's newest evaluation that came to one. Raises InputError."""
    row = store.find_study(study)
    for evaluation in reversed(store.evaluations(row.id) if row is not None else []):
        named = (evaluation.document or {}).get("model")
        if named is not None:
            return get_model(store, f"{named['name']}:{named['version']}")
    raise InputError(
        f"study {study}: expected an evaluation with a model, got none; `tuner evaluate --study {study}` makes one"
    )


def gate_of(store: Store, model: ModelRow) -> GateSpec:
    """The gate in the stored specification of the study that a model came from. Raises InputError."""
    evaluation = store.find_evaluation(model.evaluation)
    if evaluation is None:
        raise InputError(
            f"model {model.name}:{model.version}: expected the study of {model.evaluation}, whose specification "
            "has the gate, got none: it was deleted; evaluate again"
        )
    return GateSpec.model_validate(json.loads(store.get_study(evaluation.study_id).spec).get("gate", {}))


def judge(gate: GateSpec, model: ModelRow, champion: ModelRow | None) -> list[Rule]:
    """Every rule that the gate has; a number that is missing fails its rule.

    Args:
        champion: the one in service, None where there is none; a model is not held against itself.
    """
    rules = []
    if gate.certificate:
        rules.append(_certificate(model))
    if gate.champion and champion is not None and champion.version != model.version:
        rules.append(_champion(model, champion))
    limits = (
        ("max_ece", "calibrated ECE on test", own(model, "ece_calibrated"), gate.max_ece),
        ("max_feature_pr_auc", "PR-AUC of the best single feature", _leak(model), gate.max_feature_pr_auc),
        ("max_pr_auc", "PR-AUC on test", own(model, "pr_auc"), gate.max_pr_auc),
        ("max_size_mb", "size in MB", model.size_bytes / 1e6, gate.max_size_mb),
    )
    rules += [_at_most(name, what, found, limit) for name, what, found, limit in limits if limit is not None]
    return rules


def own(model: ModelRow, metric: str) -> float | None:
    """What this very model measured on test."""
    return model.metrics.get("own", {}).get(metric)


def interval(model: ModelRow, metric: str) -> Mapping[str, Any]:
    """Value and interval of the model's configuration over its seeds; empty where it was not measured."""
    return model.metrics.get("intervals", {}).get(metric, {})


def _certificate(model: ModelRow) -> Rule:
    """Certified, and not refuted: chance alone may bring test below the target, and is no reason to refuse."""
    certificate, check = model.certificate, model.metrics.get("check")
    if certificate is None:
        return Rule("certificate", False, None, None, "certificate: expected one, got none")
    target = certificate.get("target")
    if certificate.get("status") != "certified":
        reached = certificate.get("certifiable_precision")
        short = "" if reached is None or target is None else (
            f"; a precision of {reached:.4f} could be certified, {target - reached:.4f} below {target:.4f}"
        )  # fmt: skip
        text = f"certificate: expected a certified threshold, got {certificate.get('status')}{short}"
        return Rule("certificate", False, target, reached, text)
    bound = certificate.get("bound")
    if check is None:
        return Rule(
            "certificate", False, target, bound, "certificate: expected to hold on test, got no check of it"
        )
    precision, where = check.get("precision"), f"[{check.get('low')}, {check.get('high')}]"
    if check.get("refuted") is not False:
        short = (
            "no precision" if precision is None else f"precision {precision:.4f}, {target - precision:.4f} below"
        )
        text = (
            f"certificate: expected precision {target:.4f} not to be refuted on test, got {short}, interval {where}"
        )
        return Rule("certificate", False, target, precision, text)
    seen = "no row is selected on test" if precision is None else f"on test precision {precision:.4f}"
    return Rule("certificate", True, target, bound, f"certificate: precision {target:.4f} certified; {seen}")


def _champion(model: ModelRow, champion: ModelRow) -> Rule:
    """By the metric that both were judged by; models of different ones are not compared."""
    name, label = f"champion {champion.name}:{champion.version}", label_of(model.metrics)
    metric = metric_of(model.metrics)
    found, low = own(model, metric), interval(champion, metric).get("low")
    if metric != metric_of(champion.metrics):
        text = (
            f"champion: expected a model judged by {label_of(champion.metrics)} as the {name}, got one judged by "
            f"{label}, and these are not compared; set gate.champion to false to promote it all the same"
        )
        return Rule("champion", False, None, None, text)
    if found is None or low is None:
        who = "the model" if found is None else f"the {name}"
        return Rule("champion", False, low, found, f"champion: expected {label} on test of {who}, got none")
    other = "" if model.data_hash == champion.data_hash else " (measured on other data)"
    text = f"champion: expected {label} on test >= {low:.4f}, the low end of the {name}{other}, got {found:.4f}"
    if found < low:
        text += f", {low - found:.4f} below"
    return Rule("champion", found >= low, low, found, text)


def _at_most(name: str, what: str, found: float | None, limit: float) -> Rule:
    if found is None:
        return Rule(name, False, limit, None, f"{name}: expected {what} <= {limit:g}, got none")
    over = f", {found - limit:.4g} above" if found > limit else ""
    return Rule(name, found <= limit, limit, found, f"{name}: expected {what} <= {limit:g}, got {found:.4g}{over}")


def _leak(model: ModelRow) -> float | None:
    return model.metrics.get("leak", {}).get("best")
