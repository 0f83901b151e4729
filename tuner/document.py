"""The document of an evaluation: everything that was found, as JSON, for the report, the gate and whoever asks.

Format 1. Every number in it can be derived again from the score files, the stored measurements and the database;
all floats are finite or null.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from models.bootstrap import Draws, Scores
from models.calibration import reliability
from models.verdict import fresh_probability, judge
from storage.rows import AttemptRow, EvaluationRow, MeasurementRow, RunRow
from tuner.fits import Fit, OnValid, Rows, best_fit
from tuner.judged_metric import LABELS, Metric, metric_of_study
from tuner.plan import Plan
from tuner.report import FORMAT, SPECIFICATION
from tuner.study import Study

CONFIDENCE = 0.95
VERSIONS = ("torch", "numpy", "scipy", "xgboost", "optuna")


@dataclass(frozen=True)
class Findings:
    """What the stages of a conclusion have come to. Arms and baselines by name; `valid` by the model's name."""

    judged: Mapping[str, Sequence[Fit]]
    left_out: Sequence[Mapping[str, str]]
    valid: Mapping[str, OnValid]
    rows: Rows  # of test
    scores: Mapping[str, Sequence[Scores]]
    draws: Draws
    nominees: Sequence[Mapping[str, Any]]
    looks: Mapping[str, Mapping[str, int]]
    leak: Mapping[str, Any]
    importance: Mapping[str, Any] | None


def write_document(
    study: Study, evaluation: EvaluationRow, fits: Study, plan: Plan, findings: Findings
) -> dict[str, Any]:
    """The document, but for the time it was finished at and the model that comes of it."""
    store, decision, rows = study.store, study.spec.decision, findings.rows
    metric = metric_of_study(study.spec.objective, decision.task)
    measured = store.measurements(fits.id, [fit.number for fit in _trained(findings)])
    comparisons = _comparisons(findings, study, plan, metric)
    document = {
        "format": FORMAT,
        "study": study.name,
        "evaluation": evaluation.name,
        "number": evaluation.number,
        "finished_at": None,
        "package_version": version("tuner"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
        "data": json.loads(store.get_study(study.id).data),
        "task": decision.task,
        "metric": metric,
        "decision": decision.model_dump(mode="json"),
        "confidence": CONFIDENCE,
        "n_replicates": plan.n_replicates,
        "seeds": plan.seeds,
        "sample": {
            "role": rows.role,
            "n_rows": len(rows.labels),
            "n_positive": rows.n_positive,
            "n_units": len(np.unique(rows.unit)),
            "unit": decision.unit,
            "base_rate": rows.n_positive / len(rows.labels),
        },
        "looks": findings.looks,
        "arms": _arms(findings, plan, store.runs(fits.id), measured, fits.spec.seed_of, metric),
        "left_out": list(findings.left_out),
        "comparisons": comparisons,
        "verdict": _verdict(comparisons, study),
        "former": _former(evaluation.document, plan),
        "tuning_gain": _tuning_gain(findings, plan, metric),
        "reliability": _reliability(findings),
        "nominees": list(findings.nominees),
        "leak": findings.leak,
        "gradient_cosine": _gradient_cosine(findings, study, measured),
        "training": {
            arm: training_curves(measured[best_fit(of_arm, findings.valid, metric).number], decision.task)
            for arm, of_arm in findings.judged.items()
            if of_arm[0].run is not None
        },
        "importance": findings.importance,
        "cost": _cost(store.attempts(study.id), store.attempts(fits.id)),
        "reproduce": _reproduce(study, plan),
        "model": None,
    }
    return finite(document)


def _former(document: Mapping[str, Any] | None, plan: Plan) -> list[dict[str, Any]]:
    """What this evaluation had answered before it went on, oldest first: whoever adds seeds because of an answer
    that test gave has to be seen doing it."""
    if document is None:
        return []
    if (document["seeds"], document["n_replicates"]) == (plan.seeds, plan.n_replicates):
        return list(document.get("former", []))
    answer = document["verdict"]
    newest = {
        "seeds": document["seeds"], "n_replicates": document["n_replicates"],
        "finished_at": document["finished_at"],
        "outcome": None if answer is None else answer["outcome"],
    }  # fmt: skip
    return [*document.get("former", []), newest]


def finite(value: Any) -> Any:
    """The same as plain JSON values: what is not a finite number becomes null."""
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    return value


def _version(package: str) -> str | None:
    """Of a package under whichever name it was installed: xgboost comes with and without CUDA."""
    for name in (package, f"{package}-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _trained(findings: Findings) -> list[Fit]:
    return [fit for of_arm in findings.judged.values() for fit in of_arm if fit.run is not None]


# --- arms ------------------------------------------------------------------------------------------------------


def _arms(
    findings: Findings, plan: Plan, runs: Sequence[RunRow], measured: Mapping[int, Sequence[MeasurementRow]],
    seed_of: Callable[[int], int], metric: Metric,
) -> dict[str, Any]:  # fmt: skip
    planned, found = {arm.name: arm for arm in plan.arms}, {}
    for name, fits in findings.judged.items():
        arm = planned.get(name)
        complete = {fit.number for fit in fits}
        entries = [_complete_entry(fit, findings.valid[fit.model.name], measured) for fit in fits]
        entries += [
            _other_entry(run, seed_of(run.number)) for run in runs if run.arm == name and run.number not in complete
        ]
        found[name] = {
            "kind": arm.kind if arm else "baseline",
            "arm": arm.arm if arm else None,
            "trial": arm.trial if arm else None,
            "config": arm.config if arm else None,
            "fits": sorted(entries, key=lambda entry: entry["number"] or 0),
            "metrics": _metrics(findings.draws, name),
            "calibration": dict(findings.valid[best_fit(fits, findings.valid, metric).model.name].calibration),
        }
    return found


def _complete_entry(
    fit: Fit, valid: OnValid, measured: Mapping[int, Sequence[MeasurementRow]]
) -> dict[str, Any]:  # fmt: skip
    steps = measured[fit.number] if fit.number is not None else ()
    return {
        "number": fit.number,
        "seed": fit.seed,
        "state": "complete",
        "best_step": fit.run.best_step if fit.run else None,
        "n_steps": len(steps) if fit.run else None,
        "elapsed_s": steps[-1].elapsed_s if steps else None,
        **valid.as_entry(),
        "valid_feasible": valid.feasible,
        "failure": None,
        "checkpoint": fit.model.checksum,
        "calibrator": valid.calibrator.as_json(),
        "smearing": {task: dict(how) for task, how in valid.smearing.items()},
    }


def _other_entry(run: RunRow, seed: int) -> dict[str, Any]:
    """A fit that did not come to its end."""
    return {
        "number": run.number,
        "seed": seed,
        "state": "failed" if run.failure else "pruned" if run.ended_at is not None else "running",
        "best_step": run.best_step,
        "n_steps": None,
        "elapsed_s": None,
        **dict.fromkeys(f"valid_{metric}" for metric in LABELS),
        "valid_feasible": None,
        "failure": run.failure,
        "checkpoint": None,
        "calibrator": None,
        "smearing": {},
    }


def _metrics(draws: Draws, name: str) -> dict[str, Any]:
    """Every metric that the arm has: one without a task has none of its amounts."""
    return {
        metric: {
            **asdict(draws.interval(name, metric, CONFIDENCE)),
            "per_seed": draws.per_seed(name, metric).tolist(),
        }
        for metric in draws.metrics_of(name)
    }


# --- comparisons -----------------------------------------------------------------------------------------------


def _comparisons(findings: Findings, study: Study, plan: Plan, metric: Metric) -> list[dict[str, Any]]:
    """Every searched arm against the verdict's baseline arm, and the nominee's arm against each baseline model."""
    question, found = study.spec.compared, []
    if question is not None and question.baseline in findings.judged:
        searched = [arm.name for arm in plan.arms if arm.kind == "searched" and arm.name in findings.judged]
        for arm in searched:
            if arm != question.baseline:
                told = (question.min_gain, question.reading)
                found.append(_compare(findings, arm, question.baseline, *told, metric))
    winner = findings.nominees[0]["arm"]
    baselines = [name for name, fits in findings.judged.items() if fits[0].run is None]
    return found + [_compare(findings, winner, name, 0.0, "relative", metric) for name in baselines]


def _compare(
    findings: Findings, arm: str, against: str, min_gain: float, reading: str, metric: Metric
) -> dict[str, Any]:  # fmt: skip
    found = judge(
        findings.draws, arm, against, min_gain=min_gain, reading=reading, n_positive=findings.rows.n_positive,
        metric=metric,
    )  # fmt: skip
    return asdict(found)


def _verdict(comparisons: Sequence[dict[str, Any]], study: Study) -> dict[str, Any] | None:
    """The answer to the specification's question; None where it asks none, or one of its arms was left out."""
    if (question := study.spec.compared) is None:
        return None
    asked = (question.treatment, question.baseline)
    return next((one for one in comparisons if (one["arm"], one["against"]) == asked), None)


def _tuning_gain(findings: Findings, plan: Plan, metric: Metric) -> dict[str, Any] | None:
    """What the search has brought: the best found configuration of an arm against the arm's default one."""
    default = next((arm for arm in plan.arms if arm.kind == "default" and arm.name in findings.judged), None)
    if default is None:
        return None
    found = [arm for arm in plan.arms if arm.kind == "searched" and arm.arm == default.arm]
    best = next((arm.name for arm in sorted(found, key=lambda arm: arm.rank) if arm.name in findings.judged), None)
    if best is None:
        return None
    draws, pair = findings.draws, (best, default.name)
    return {
        "arm": best,
        "default": default.name,
        "difference": asdict(draws.difference(*pair, metric, CONFIDENCE)),
        "relative": asdict(draws.relative(*pair, metric, CONFIDENCE)),
        "fresh_probability": fresh_probability(draws, *pair, metric),
    }


# --- the nominee, training, cost -------------------------------------------------------------------------------


def _reliability(findings: Findings) -> dict[str, Any]:
    nominee = findings.nominees[0]
    numbers = [fit.number for fit in findings.judged[nominee["arm"]]]
    scores, rows = findings.scores[nominee["arm"]][numbers.index(nominee["number"])], findings.rows
    return {
        "arm": nominee["arm"],
        "number": nominee["number"],
        "role": rows.role,
        "raw": reliability(scores.raw, rows.labels, rows.unit),
        "calibrated": reliability(scores.calibrated, rows.labels, rows.unit),
    }


def training_curves(rows: Sequence[MeasurementRow], task: str) -> dict[str, Any]:
    """The curves of one fit: its steps, every task's training loss, the decision's metrics on valid."""
    losses: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "train" and parts[2] == "loss":
            losses[parts[1]] = [row.metrics.get(name) for row in rows]
    return {
        "steps": [row.step for row in rows],
        "loss": losses,
        **{f"valid_{metric}": [row.metrics.get(f"valid/{task}/{metric}") for row in rows] for metric in LABELS},
    }


def _gradient_cosine(
    findings: Findings, study: Study, measured: Mapping[int, Sequence[MeasurementRow]]
) -> dict[str, Any] | None:
    """Of the nominee's arm, else of the verdict's treatment, else of the first arm that trains several tasks."""
    question = study.spec.compared
    wanted = [findings.nominees[0]["arm"], *([question.treatment] if question else []), *findings.judged]
    for arm in wanted:
        rows = [row for fit in findings.judged.get(arm, ()) for row in measured.get(fit.number, ())]
        if (found := mean_cosines(rows)) is not None:
            return {"arm": arm, **found}
    return None


def mean_cosines(rows: Iterable[MeasurementRow]) -> dict[str, Any] | None:
    """Cosines between the tasks' gradients, the mean over all steps given; None where none were measured."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            parts = name.split("/")
            if len(parts) == 4 and parts[:2] == ["train", "cosine"]:
                found.setdefault((parts[2], parts[3]), []).append(value)
    if not found:
        return None
    tasks = list(dict.fromkeys([*(a for a, _ in found), *(b for _, b in found)]))
    matrix: list[list[float | None]] = [[1.0 if a == b else None for b in tasks] for a in tasks]
    for (a, b), values in found.items():
        i, j = tasks.index(a), tasks.index(b)
        matrix[i][j] = matrix[j][i] = float(np.mean(values))
    return {"tasks": tasks, "matrix": matrix}


def _cost(search: Sequence[AttemptRow], evaluation: Sequence[AttemptRow]) -> dict[str, float]:
    """Device seconds over all attempts that are over; `wall_s` from the first claim to the last release of each."""

    def held_s(attempts: Sequence[AttemptRow]) -> float:
        return float(sum(a.released_at - a.claimed_at for a in attempts if a.released_at is not None))

    def span_s(attempts: Sequence[AttemptRow]) -> float:
        ends = [a.released_at for a in attempts if a.released_at is not None]
        return float(max(ends) - min(a.claimed_at for a in attempts)) if ends else 0.0

    return {
        "search_device_s": held_s(search),
        "evaluation_device_s": held_s(evaluation),
        "wall_s": span_s(search) + span_s(evaluation),
    }


def _reproduce(study: Study, plan: Plan) -> list[str]:
    """The commands that lead here, on the same data, from the specification that a report has beside it."""
    spec, name = study.spec, study.name
    row = study.store.get_study(study.id)
    data = json.loads(row.data)
    given = "" if data["simulated"] else " --data PATH"
    called = "" if name == spec.study else f" --name {name}"
    top = max(arm.rank for arm in plan.arms if arm.kind == "searched")
    counts = f"--seeds {plan.seeds} --top {top} --nominees {plan.nominees} --replicates {plan.n_replicates}"
    return [
        f"tuner run --study {SPECIFICATION}{called} --n-trials {row.n_trials} --seed {spec.seed}{given}",
        f"tuner evaluate --study {name} {counts}{given}",
        f"tuner report --study {name}",
    ]
