"""The specification of a study: what it says, how it is stored, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import yaml
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from models.trainer import Decision, FrozenModel, Objective
from tuner.source import Source
from tuner.space import Space
from tuner.tree import leaves

# A study's name is the name of its folder: it must not lead out of the folder of runs.
STUDY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_NAME = 100

# Other names of a metric.
_ALSO = {"auc": "roc_auc"}

# Tells the seeds of replicates from others that are derived from a study's.
_REPLICATES = 0x65_76_61_6C


class SamplerSpec(FrozenModel):
    """`random`, `qmc` and `cmaes` ignore the constraint."""

    name: Literal["tpe", "gp", "random", "qmc", "cmaes"] = "tpe"
    n_startup_trials: int = Field(default=10, ge=1)


class PrunerSpec(FrozenModel):
    """When a trial is stopped early, always against trials of its own arm.

    Args:
        min_completed: completed trials of the arm before anything is pruned.
        warmup_steps: steps at the beginning of every trial that are never pruned.
        patience: steps without improvement that `patient` waits for.
        max_steps: the longest a trial can get; `hyperband` lays its brackets up to there.
    """

    name: Literal["median", "patient", "hyperband", "successive_halving", "none"] = "median"
    min_completed: int = Field(default=3, ge=1)
    warmup_steps: int = Field(default=4, ge=0)
    patience: int = Field(default=2, ge=0)
    max_steps: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _hyperband_has_room(self) -> PrunerSpec:
        if self.name == "hyperband" and self.max_steps <= max(1, self.warmup_steps):
            raise ValueError(f"max_steps: expected more than warmup_steps, got {self.max_steps}")
        return self


NotifyEvent = Literal["finished", "stalled", "failed"]


class NotifySpec(FrozenModel):
    """A webhook that is sent JSON by POST (`Notifier`).

    Args:
        url: http or https, without a user name or password in it.
        on: which events are told.
        stalled_after_s: a study with budget left stalls when nothing of it is measured or claimed for so long.
        timeout_s: for the webhook to answer.
    """

    url: str
    on: tuple[NotifyEvent, ...] = Field(default=("finished", "stalled", "failed"), min_length=1)
    stalled_after_s: float = Field(default=1800.0, gt=0.0, allow_inf_nan=False)
    timeout_s: float = Field(default=10.0, gt=0.0, le=60.0)

    @field_validator("url")
    @classmethod
    def _is_a_webhook(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
            raise ValueError("expected a URL like https://host/path")  # what was got may hold a token
        if parts.username is not None or parts.password is not None:
            raise ValueError("expected a URL without a user name or password, got one with")
        return url


class VerdictSpec(FrozenModel):
    """What an evaluation decides, written down before it looks: does `treatment` help over `baseline`?

    Args:
        baseline: an arm.
        treatment: another one.
        min_gain: the least gain that counts as help, of the judged metric: the decision's ROC-AUC where that is the
            objective, else its PR-AUC.
        reading: of `min_gain`: a share of the baseline's metric, or points of the metric itself.
    """

    baseline: str
    treatment: str
    min_gain: float = Field(default=0.03, ge=0.0, lt=1.0, allow_inf_nan=False)
    reading: Literal["relative", "points"] = "relative"

    @model_validator(mode="after")
    def _compares_two(self) -> VerdictSpec:
        if self.baseline == self.treatment:
            raise ValueError(f"treatment: expected another arm than the baseline, got {self.treatment!r} twice")
        return self


class GateSpec(FrozenModel):
    """What `tuner promote` asks of a model; null leaves a rule out, a number that is missing fails its rule.

    Args:
        certificate: its threshold is certified.
        champion: its judged metric (`VerdictSpec`) on test is not below the interval of the champion's.
        max_ece: of the calibrated probabilities on test.
        max_feature_pr_auc: what a single feature reaches alone; more is taken for a leak.
        max_pr_auc: more on test is taken for a leak.
        max_size_mb: of the model's folder.
    """

    certificate: bool = True
    champion: bool = True
    max_ece: float | None = Field(default=0.05, ge=0.0, le=1.0)
    max_feature_pr_auc: float | None = Field(default=None, gt=0.0, le=1.0)
    max_pr_auc: float | None = Field(default=None, gt=0.0, le=1.0)
    max_size_mb: float | None = Field(default=500.0, gt=0.0, allow_inf_nan=False)


class Spec(FrozenModel):
    """A study as it was specified. `data` and `config` are held against the trainer by `check_spec`.

    `objective.metric` may be written without `valid/<task>/`, the decision's task, and is kept with it.
    `arms` are overlays on `config`, in the order in which they are dealt; `n_trials` counts ended trials. `notify`
    names a webhook that is told when the study finishes, stalls or keeps failing. With `replicate` nothing is
    searched: every arm is trained again and again, each time with the next seed.
    """

    study: str = Field(pattern=f"^{STUDY_NAME}$", max_length=MAX_NAME)
    description: str = ""
    trainer: str
    data: dict[str, Any]
    decision: Decision
    objective: Objective
    n_trials: int = Field(default=50, ge=1)
    seed: int = Field(default=42, ge=0)
    config: dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"default": {}}, min_length=1)
    space: Space = Field(default_factory=Space)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    pruner: PrunerSpec = Field(default_factory=PrunerSpec)
    max_failures_in_a_row: int = Field(default=3, ge=1)
    notify: NotifySpec | None = None
    replicate: bool = False
    verdict: VerdictSpec | None = None
    gate: GateSpec = Field(default_factory=GateSpec)

    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("arms", mode="before")
    @classmethod
    def _an_empty_arm_is_the_config(cls, arms: Any) -> Any:
        if isinstance(arms, Mapping):
            return {name: {} if overlay is None else overlay for name, overlay in arms.items()}
        return arms

    @field_validator("objective")
    @classmethod
    def _metric_has_its_full_name(cls, objective: Objective, info: ValidationInfo) -> Objective:
        return in_full(objective, info.data.get("decision"))

    @model_validator(mode="after")
    def _replicates_search_nothing(self) -> Spec:
        if self.replicate and self.space.dimensions:
            raise ValueError("replicate: expected no space, as nothing is searched, got one; remove either")
        if self.replicate and self.pruner.name != "none":
            raise ValueError(
                f"replicate: expected `pruner: {{name: none}}`, as every fit has to end, got {self.pruner.name}"
            )
        return self

    @property
    def compared(self) -> VerdictSpec | None:
        """What the verdict is about: as specified, else the first arm against the second; None with one arm."""
        if self.verdict is None and len(self.arms) > 1:
            baseline, treatment, *_ = self.arms
            return VerdictSpec(baseline=baseline, treatment=treatment)
        return self.verdict

    def seed_of(self, number: int) -> int:
        """The seed of a trial: the study's, or where it replicates that of its round, the same for every arm."""
        if not self.replicate:
            return self.seed
        entropy = np.random.SeedSequence([self.seed, _REPLICATES, number // len(self.arms)])
        return int(entropy.generate_state(1)[0])

    def to_json(self) -> str:
        """The specification as text for the database, which holds no path: data are known by their content.
        `from_json` gives back an equal one, but for that."""
        return self.model_dump_json(exclude={"data": {"path"}})

    def to_yaml(self) -> str:
        """The specification as a file that `load_spec` reads: what ran, also where a flag had changed the YAML. Its
        data have a path that says nothing."""
        tree = json.loads(self.to_json())
        tree["data"] = {"path": f"data/{self.study}", **tree["data"]}
        tree["space"] = self.space.as_tree()
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The specification that `to_json` wrote. Raises pydantic's ValidationError on anything else."""
        return cls.model_validate_json(text)


def in_full(objective: Objective, decision: Decision | None) -> Objective:
    """The objective with the full name of its metric: `roc_auc` is `valid/<task of the decision>/roc_auc`."""
    if decision is None or "/" in objective.metric:
        return objective
    name = _ALSO.get(objective.metric, objective.metric)
    return objective.model_copy(update={"metric": f"valid/{decision.task}/{name}"})


_FREE = ("study", "description", "n_trials", "max_failures_in_a_row", "data.path", "notify")
_FREE_SECTIONS = ("notify.", "gate.")


def differences(old: Spec, new: Spec) -> list[str]:
    """What keeps a stored study from going on under a changed specification, a line for each difference:
    `space.optimizer.lr.high: 0.01 -> 0.03`.

    Name, description, number of trials, `data.path` (the content's hash is compared instead),
    `max_failures_in_a_row`, `notify` and `gate` are free to change. `verdict` may be added; what was said once
    stays, so that nobody chooses the question after the answer.
    """
    if old.verdict is None:
        new = new.model_copy(update={"verdict": None})
    before, after = _flat(old), _flat(new)
    lines = []
    for path in dict.fromkeys((*before, *after)):
        a, b = before.get(path), after.get(path)
        if a != b:
            lines.append(f"{path}: {'absent' if a is None else a} -> {'absent' if b is None else b}")
    if set(old.arms) == set(new.arms) and list(old.arms) != list(new.arms):
        lines.append(f"arms: dealt in the order {', '.join(old.arms)} -> {', '.join(new.arms)}")
    return lines


def _flat(spec: Spec) -> dict[str, str]:
    """Everything that may not change, by path, as text; a number that is written otherwise stays the same."""
    tree = spec.model_dump(mode="json", exclude={"space"})
    for dimension in spec.space.dimensions:
        tree[f"space.{dimension.path}"] = {"kind": dimension.kind, **dimension.as_leaf()}
    flat = {path: _text(value) for path, value in leaves(tree).items()}
    return {path: text for path, text in flat.items() if path not in _FREE and not path.startswith(_FREE_SECTIONS)}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 1e15 else repr(value)
    return "null" if value is None else repr(value) if not isinstance(value, bool) else str(value).lower()
