"""Documents of evaluations as `tuner evaluate` stores them, and the searches that led there: made up, but in the
proportions of the real ones. For the tests of the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.rows import StudyRow
from tuner.spec_checks import load_spec
from tuner.summary import STATES, StudySummary, TrialSummary

CENSUS_ARMS = {
    "single_task_income": 0.5655, "multi_task_all": 0.5712, "multi_task_no_amount": 0.5724,
    "multi_task_gradient_blend": 0.5593,
}  # fmt: skip
MVP13_ARMS = {
    "single_task_gift": 0.0561, "multi_task_all": 0.0597, "multi_task_no_amount": 0.0588,
    "multi_task_gradient_blend": 0.0571,
}  # fmt: skip
_TASKS = {
    "census": ["weeks_worked", "has_dividends", "income_50k", "dividend_amount"],
    "mvp13": ["watch_time", "has_comment", "has_gift", "gift_amount"],
}


def census_document() -> dict[str, Any]:
    """Rows are exchangeable, no money, a certificate that test keeps; the question stays undecided."""
    document = _document("census", CENSUS_ARMS, "income_50k", 0.0621, (199_523, 29_934), unit="row", n_units=29_934)
    arms = document["arms"]
    arms["base_rate"] = _arm("baseline", 0.0621, 0.0, document, n_seeds=1)
    arms["logistic_regression"] = _arm("baseline", 0.5214, 0.01, document, n_seeds=1)
    arms["xgboost"] = _arm("baseline", 0.5931, 0.01, document, n_seeds=1)
    document["comparisons"] = [
        _compared(document, name, "single_task_income", 0.008, *(("undecided", 1800) if i else ("does not", None)))
        for i, name in enumerate(reversed(list(CENSUS_ARMS)[1:]))
    ] + [_compared(document, "multi_task_no_amount", b, 0.011, "does not", None) for b in
         ("base_rate", "logistic_regression", "xgboost")]  # fmt: skip
    document["verdict"] = _verdict(document, "multi_task_all")
    document["nominees"] = [_nominee("multi_task_no_amount", 22, 0.60, 9976, 620, 1)]
    document["data"] |= {"source": "census.parquet", "simulated": False, "simulation": None}
    document["data"]["files"] = {"census.parquet": {"size_bytes": 4_120_338, "sha256": "5f" * 32}}
    groups = ["education", "det_occ_code", "age", "capital_gains", "sex", "weeks", "num_emp", "tax_filer_stat"]
    groups += [f"{name}_of_the_household" for name in ("region", "state", "union", "citizenship", "vet_benefits")]
    groups += [f"column_{i}" for i in range(14)]
    document["importance"] = _importance("multi_task_no_amount", groups, 0.11)
    document["model"] = {"name": "census", "version": 3, "checksum": "ab" * 32, "size_bytes": 812_340}
    return document


def mvp13_document() -> dict[str, Any]:
    """Users are the unit, gifts have amounts, joint training helps; nothing can be certified."""
    document = _document("mvp13", MVP13_ARMS, "has_gift", 0.0165, (98_190, 11_358), unit="user_id", n_units=412)
    for name in document["arms"]:
        _add_money(document, name)
    arms = document["arms"]
    for name, value in (("base_rate", 0.0165), ("logistic_regression", 0.0488), ("xgboost", 0.0569)):
        arms[name] = _arm("baseline", value, 0.0 if name == "base_rate" else 0.003, document, n_seeds=1)
        _add_money(document, name)
    document["comparisons"] = [
        _compared(document, "multi_task_all", "single_task_gift", 0.0015, "helps", None),
        _compared(document, "multi_task_no_amount", "single_task_gift", 0.002, "undecided", 730),
        _compared(document, "multi_task_gradient_blend", "single_task_gift", 0.002, "undecided", 4100),
        *(_compared(document, "multi_task_all", b, 0.004, "does not", None) for b in
          ("base_rate", "logistic_regression", "xgboost")),
    ]  # fmt: skip
    for comparison in document["comparisons"][:1]:
        comparison["relative"] = {"value": 0.0642, "low": 0.0371, "high": 0.0913}
    document["verdict"] = _verdict(document, "multi_task_all")
    document["nominees"] = [_infeasible("multi_task_all", 17)]
    groups = [
        "pair history",
        "user history",
        "streamer history",
        "time",
        "user profile",
        "streamer profile",
        "room",
    ]
    document["importance"] = _importance("multi_task_all", groups, 0.018)
    arm = document["arms"]["multi_task_gradient_blend"]["fits"][2]
    arm |= {"state": "failed", "valid_pr_auc": None, "best_step": 3, "failure": "train/has_gift/loss: got nan"}
    return document


def roc_document(feasible: bool) -> dict[str, Any]:
    """The census judged by ROC-AUC, its rows of days and users: with a certificate, or with what the threshold of
    the search would have done. The other documents are older and say nothing of a metric."""
    document = census_document()
    document["metric"] = "roc_auc"
    document["sample"] |= {"unit": "day", "n_units": 60}
    for part in ("value", "low", "high"):  # the highest PR-AUC and not the highest ROC-AUC
        document["arms"]["xgboost"]["metrics"]["roc_auc"][part] -= 0.02
    for arm in document["arms"].values():
        value = arm["metrics"]["roc_auc"]["value"]
        for i, fit in enumerate(arm["fits"]):
            fit["valid_roc_auc"] = value + 0.01 + i / 500
    for name, curve in document["training"].items():
        top = document["arms"][name]["metrics"]["roc_auc"]["value"]
        curve["valid_roc_auc"] = [top - 0.2 * math.exp(-step / 4) for step in curve["steps"]]
    document["comparisons"] = [
        _compared(document, c["arm"], c["against"], 0.008, c["outcome"], c["positives_needed"])
        for c in document["comparisons"]
    ]
    document["verdict"] = _verdict(document, document["verdict"]["arm"])
    (nominee,) = document["nominees"]
    nominee["valid_roc_auc"] = 0.9061
    nominee["certificate"] |= {
        "unit": "day", "n_units": 80, "bound_rows": 0.6512,
        "groups": {"day": {"n_selected": 41, "n": 80}, "user": {"n_selected": 301, "n": 400}},
    }  # fmt: skip
    for i, test in enumerate(nominee["certificate"]["tested"]):
        test["bound_rows"] = test["bound"] + 0.03 + i / 1000
    test = nominee["check"] | {
        "low_rows": 0.6551, "high_rows": 0.6872, "recall_low": 0.391, "recall_high": 0.478, "f1": 0.528,
        "f1_low": 0.481, "f1_high": 0.574,
        "groups": {"day": {"n_selected": 33, "n": 60}, "user": {"n_selected": 1, "n": 400}},
    }  # fmt: skip
    nominee["check"], nominee["not_issued"] = test, None
    if not feasible:
        failed = _infeasible(nominee["arm"], 22)["certificate"] | {"unit": "day", "n_units": 80, "target": 0.6}
        failed["tested"][0]["bound_rows"] = 0.1071
        failed["groups"] = {name: {"n_selected": 0, "n": group["n"]} for name, group in test["groups"].items()}
        valid = {"threshold": 0.4, "precision": 0.6215, "recall": 0.11, "precision_bound": 0.6004,
                 "violation": -4e-4, "n_selected": 412.0, "n_units": 35.0, "precision_bound_rows": 0.6}  # fmt: skip
        missed = test | {"precision": 0.5312, "low": 0.4411, "high": 0.6192, "kept": False, "refuted": False}
        nominee |= {"certificate": failed, "check": None, "not_issued": {"valid": valid, "test": missed}}
    return document


def without_verdict() -> dict[str, Any]:
    """One arm of one task: nothing to compare, no gradients, no amounts, nothing ablated, no fit measured."""
    document = census_document()
    kept = ("single_task_income", "base_rate", "xgboost")
    document["arms"] = {name: document["arms"][name] for name in kept}
    document["comparisons"] = [_compared(document, "single_task_income", "xgboost", 0.01, "does not", None)]
    document["nominees"] = [_nominee("single_task_income", 0, 0.60, 9976, 600, 1)]
    document["reliability"]["arm"] = "single_task_income"
    document |= {"verdict": None, "gradient_cosine": None, "importance": None, "tuning_gain": None, "model": None}
    document["training"] = {"single_task_income": {"steps": [], "loss": {}, "valid_pr_auc": []}}
    document["left_out"] = [{"arm": "multi_task_all", "reason": "no trial of it is complete"}]
    return document


# --- parts -----------------------------------------------------------------------------------------------------


def _document(
    study: str, arms: Mapping[str, float], task: str, base: float, rows: tuple[int, int], unit: str, n_units: int
) -> dict[str, Any]:
    n, n_test = rows
    spec = load_spec(study)
    document: dict[str, Any] = {
        "format": 1, "study": study, "evaluation": f"{study}.evaluation-1", "number": 1,
        "finished_at": 1_795_267_200.0, "package_version": "0.3.0",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.1", "xgboost": "3.2.0",
                     "optuna": "5.0.0"},
        "data": {
            "data_hash": "39" * 32, "source": "simulated KuaiLive, scale 0.02, seed 42, simulator version 1",
            "simulated": True,
            "rows": {"train": int(0.7 * n), "valid": int(0.1 * n), "calibrate": int(0.05 * n), "test": n_test},
            "files": {}, "preparation": {"preparation": 1, "labels": 1, "features": 1},
            "simulation": {"simulator": 1, "scale": 0.02, "seed": 42},
        },
        "task": task, "decision": spec.decision.model_dump(mode="json"), "confidence": 0.95, "n_replicates": 2000,
        "seeds": 5,
        "sample": {"role": "test", "n_rows": n_test, "n_positive": round(base * n_test), "n_units": n_units,
                   "unit": unit, "base_rate": base},
        "looks": {
            "test": {"n_models": 28, "n_looks": 28, "repeated": 0, "all_on_this_set": 56},
            "calibrate": {"n_models": 1, "n_looks": 1, "repeated": 0, "all_on_this_set": 2},
        },
        "arms": {}, "left_out": [],
    }  # fmt: skip
    for i, (name, value) in enumerate(arms.items()):
        document["arms"][name] = _arm(
            "searched", value, 0.008 * value / 0.5 + 0.002, document, i, spec=spec, arm=name
        )
    winner = "multi_task_all"
    document["arms"][f"{winner}/default"] = _arm(
        "default", 0.94 * arms[winner], 0.008, document, 4, spec=spec, arm=winner
    )
    gain = arms[winner] * 0.06
    document |= {
        "tuning_gain": {
            "arm": winner, "default": f"{winner}/default",
            "difference": {"value": gain, "low": 0.4 * gain, "high": 1.6 * gain},
            "relative": {"value": 0.064, "low": 0.026, "high": 0.101}, "fresh_probability": 0.981,
        },
        "reliability": _reliability(winner, base, n_test),
        "leak": {"features": [[f"feature_{i}", 0.5 * arms[winner] / (1 + i / 3)] for i in range(20)],
                 "best": 0.5 * arms[winner]},
        "gradient_cosine": _cosines(_TASKS[study], winner),
        "training": {n: _training(i, v, task, _TASKS[study]) for i, (n, v) in enumerate(arms.items())},
        "cost": {"search_device_s": 7312.0, "evaluation_device_s": 2845.0, "wall_s": 6120.0},
        "reproduce": [f"tuner run --study {study} --n-trials 50 --seed 42", f"tuner evaluate --study {study} "
        "--seeds 5",
                      f"tuner report --study {study}"],
        "model": None,
    }  # fmt: skip
    return document


def _interval(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - half), "high": value + 1.1 * half}


def _arm(
    kind: str, value: float, half: float, document: Mapping[str, Any], place: int = 0, n_seeds: int = 5,
    spec: Any = None, arm: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    def metric(value: float, half: float) -> dict[str, Any]:
        seeds = (
            [value + half * shift for shift in (-0.45, 0.2, 0.05, 0.5, -0.3)[:n_seeds]] if n_seeds > 1 else [value]
        )
        return {**_interval(value, half), "per_seed": seeds}

    base, top = document["sample"]["base_rate"], min(1.0, 0.12 + 0.2 * value)
    found = {"pr_auc": metric(value, half), "roc_auc": metric(0.5 if half == 0 else 0.62 + 0.5 * value, 0.4 * half)}
    for percent, share in ((1, top), (5, min(1.0, 2.4 * top)), (10, min(1.0, 3.1 * top))):
        share = percent / 100 if half == 0 else share
        found[f"recall_at_{percent}pct"] = metric(share, 0.08 * share)
    for name, raw in (("ece", 0.12 + place / 100), ("brier", base * 1.6), ("log_loss", base * 5)):
        found[f"{name}_raw"] = metric(raw, raw / 20)
        found[f"{name}_calibrated"] = metric(raw / 8 if name == "ece" else raw / 2, raw / 60)
    trial = None if spec is None else 4 * 9 + place % 4 if kind == "searched" else place % 4
    return {
        "kind": kind, "arm": arm, "trial": trial,
        "config": None if spec is None else _config(spec, arm, kind),
        "fits": [
            {"number": None if kind == "baseline" else place + 5 * s, "seed": 1000 + s, "state": "complete",
             "best_step": None if kind == "baseline" else 11 + s, "n_steps": None if kind == "baseline" else 22 + s,
             "elapsed_s": None if kind == "baseline" else 61.5 + 7 * s, "valid_pr_auc": value * (1.01 + s / 500),
             "valid_feasible": value > 0.1, "failure": None}
            for s in range(n_seeds)
        ],
        "metrics": found,
        "calibration": {"chosen": "isotonic", "log_loss": {"identity": 0.2, "platt": 0.16, "isotonic": 0.15}},
    }  # fmt: skip


def _config(spec: Any, arm: str | None, kind: str) -> dict[str, Any]:
    from tuner.tree import merge

    config = merge(spec.config, spec.arms[arm])
    if kind == "searched":
        config["optimizer"] = {**config["optimizer"], "lr": 0.00234, "batch_size": 2048}
    return config


def _add_money(document: Mapping[str, Any], name: str) -> None:
    metrics = document["arms"][name]["metrics"]
    for percent in (1, 5, 10):
        recall = metrics[f"recall_at_{percent}pct"]
        for kind, factor in (("capture", 1.3), ("revenue", 1.9)):
            scaled = {end: min(1.0, recall[end] * factor) for end in ("value", "low", "high")}
            metrics[f"{kind}_at_{percent}pct"] = {
                **scaled, "per_seed": [min(1.0, seed * factor) for seed in recall["per_seed"]]
            }  # fmt: skip
    if document["arms"][name]["arm"] in (None, "multi_task_all", "multi_task_gradient_blend"):
        for end, value in (("mae", 71.2), ("rmse", 612.0), ("bias", -4.3)):
            for kind, factor in (("_raw", 1.15), ("", 1.0)):
                metrics[f"gift_amount_{end}{kind}"] = {
                    "value": value * factor, "low": value * factor - 9.0, "high": value * factor + 12.0,
                    "per_seed": [value * factor] * 5,
                }  # fmt: skip


def _compared(
    document: Mapping[str, Any], arm: str, against: str, half: float, outcome: str, needed: int | None
) -> dict[str, Any]:
    by = document.get("metric", "pr_auc")
    ours, theirs = (document["arms"][name]["metrics"][by]["value"] for name in (arm, against))
    value = ours - theirs
    return {
        "arm": arm, "against": against, "metric": by, "min_gain": 0.03, "reading": "relative",
        "difference": {"value": value, "low": value - half, "high": value + half},
        "relative": {"value": value / theirs, "low": (value - half) / theirs, "high": (value + half) / theirs},
        "outcome": outcome, "positives_needed": needed,
    }  # fmt: skip


def _verdict(document: Mapping[str, Any], arm: str) -> dict[str, Any]:
    found = next(c for c in document["comparisons"] if c["arm"] == arm)
    return {**found, "min_gain": 0.03, "reading": "relative", "n_positive": document["sample"]["n_positive"]}


def _nominee(arm: str, number: int, target: float, n_rows: int, n_positive: int, on_set: int) -> dict[str, Any]:
    counts = [30, 45, 66, 99, 146, 217, 321, 400, 476, 540]
    tested = []
    for i, n in enumerate(counts):
        true = round(n * (0.87 - 0.024 * i))
        bound = true / n - 1.1 * math.sqrt(0.2 / n)
        tested.append({"threshold": 2.1 - 0.24 * i, "n_selected": n, "n_true": true, "bound": bound,
                       "p_value": 0.001 * 1.9**i, "passed": bound >= target})  # fmt: skip
    tested = tested[: next((i for i, t in enumerate(tested) if not t["passed"]), len(tested)) + 1]
    chosen = [t for t in tested if t["passed"]][-1]
    certificate = {
        "status": "certified", "target": target, "confidence": 0.9, "threshold": chosen["threshold"],
        "n_rows": n_rows, "n_selected": chosen["n_selected"], "n_true": chosen["n_true"],
        "precision": chosen["n_true"] / chosen["n_selected"], "bound": chosen["bound"],
        "recall": chosen["n_true"] / n_positive, "unit": "row", "n_units": n_rows, "n_effective": None,
        "certifiable_precision": 0.78, "tested": tested,
        "assumptions": ["Rows of calibrate and of later use are drawn alike.",
                        "The model, and the order of the cuts, were fixed before a label of calibrate was seen."],
        "number_on_set": on_set, "delta_spent": 0.1, "joint_confidence": 0.9,
    }  # fmt: skip
    check = {"n_rows": 29_934, "n_selected": 1204, "n_true": 808, "precision": 808 / 1204,
             "low": 0.644, "high": 0.698,
             "recall": 0.435, "kept": True, "refuted": False}  # fmt: skip
    return {
        "arm": arm, "number": number, "seed": 1002, "checkpoint": "cd" * 32, "valid_pr_auc": 0.5787,
        "sequence": {"thresholds": [t["threshold"] for t in tested], "n_selected": counts},
        "certificate": certificate, "check": check,
    }  # fmt: skip


def _infeasible(arm: str, number: int) -> dict[str, Any]:
    nominee = _nominee(arm, number, 0.60, 3839, 63, 2)
    certificate = nominee["certificate"]
    first = {"threshold": -1.2, "n_selected": 40, "n_true": 5, "bound": 0.0621, "p_value": 0.31, "passed": False}
    certificate |= {
        "status": "infeasible", "target": 0.10, "threshold": None, "n_selected": 0, "n_true": 0, "precision": None,
        "bound": None, "recall": None, "unit": "user_id", "n_units": 377, "n_effective": 34.1,
        "certifiable_precision": 0.0621, "tested": [first], "delta_spent": 0.05, "joint_confidence": 0.85,
    }  # fmt: skip
    return {**nominee, "check": None, "valid_pr_auc": 0.0608}


def _reliability(arm: str, base: float, n: int) -> dict[str, Any]:
    masses = base * np.exp(np.linspace(-3.2, 2.6, 20))
    masses *= base / masses.mean()
    kinds: dict[str, list[dict[str, Any]]] = {"raw": [], "calibrated": []}
    for i, observed in enumerate(np.minimum(masses, 0.97)):
        count = n // 20
        true = 0 if i == 0 else round(float(observed) * count)
        rate, half = true / count, 1.96 * math.sqrt(max(float(observed), 1e-4) / count)
        for kind, predicted in (
            ("raw", min(0.9, float(observed) * 3 + 0.05)),
            ("calibrated", float(observed) * 1.02),
        ):
            kinds[kind].append({"predicted": predicted, "observed": rate, "low": max(0.0, rate - half),
                                "high": min(1.0, rate + half + 3 / count), "count": count})  # fmt: skip
    return {"arm": arm, "number": 17, "role": "test", **kinds}


def _cosines(tasks: list[str], arm: str) -> dict[str, Any]:
    values = {(0, 1): 0.213, (0, 2): -0.118, (0, 3): None, (1, 2): 0.341, (1, 3): -0.021, (2, 3): 0.674}
    matrix: list[list[float | None]] = [[1.0 if i == j else None for j in range(4)] for i in range(4)]
    for (i, j), value in values.items():
        matrix[i][j] = matrix[j][i] = value
    return {"arm": arm, "tasks": list(tasks), "matrix": matrix}


def _training(place: int, value: float, task: str, tasks: list[str]) -> dict[str, Any]:
    n = 18 + 3 * place
    steps = list(range(n))
    trained = [task] if place == 0 else tasks[:3] if place == 2 else tasks
    scale = {tasks[0]: 1.1, tasks[1]: 0.19, tasks[2]: 0.006, tasks[3]: 2.3}
    loss = {t: [scale[t] * (0.5 + 0.5 * math.exp(-s / (3 + place))) for s in steps] for t in trained}
    valid = [value * (1 - math.exp(-(s + 1) / 4)) - 0.003 * value * max(0, s - n + 10) for s in steps]
    return {"steps": steps, "loss": loss, "valid_pr_auc": valid}


def _importance(arm: str, groups: list[str], largest: float) -> dict[str, Any]:
    def part(name: str, drop: float) -> dict[str, Any]:
        return {
            "name": name,
            "drop": drop,
            "sd": 0.06 * largest,
            "per_seed": [drop * f for f in (0.9, 1.1, 1, 0.95, 1.05)],
        }

    units = [part(str((7 * i) % 64), 0.2 * largest * math.exp(-i / 6) - 0.002 * largest) for i in range(64)]
    found = [part(name, largest * math.exp(-i / 2.2) - 0.01 * largest) for i, name in enumerate(groups)]
    return {"arm": arm, "role": "valid", "groups": found, "units": units}


# --- the search that led there ---------------------------------------------------------------------------------


def search_summary(study: str, n_trials: int = 50, n_feasible: int = 12) -> StudySummary:
    """A finished search of a study of `configs/`, its trials drawn from its space."""
    spec = load_spec(study)
    rng = np.random.default_rng(3)
    arms = list(spec.arms)
    trials = [_trial(spec, number, arms[number % len(arms)], rng) for number in range(n_trials)]
    complete = [trial for trial in trials if trial.state == "complete"]
    chosen = sorted(complete, key=lambda t: -t.value)[:n_feasible]
    trials = [dataclasses.replace(t, feasible=t in chosen, violation=-0.1 if t in chosen else 0.1) for t in trials]
    counts = Counter(trial.state for trial in trials)
    data = census_document()["data"]
    row = StudyRow(1, study, spec.to_json(), json.dumps(data), "0.3.0", n_trials, 0, 0.0, 0.0, None, None)
    feasible = [trial for trial in trials if trial.feasible]
    return StudySummary(
        name=study, spec=spec, row=row, data=data, counts={state: counts[state] for state in STATES},
        n_feasible=len(feasible), trials=trials, attempts=[], workers=[],
        best=max(feasible, key=lambda t: t.value, default=None), nearest=None,
        defaults={t.arm: t for t in trials[: len(arms)]},
    )  # fmt: skip


def _trial(spec: Any, number: int, arm: str, rng: np.random.Generator) -> TrialSummary:
    params: dict[str, Any] = {}
    for d in spec.space.dimensions:
        if rng.random() < 0.15 and d.when:
            continue
        if d.kind == "categorical":
            params[d.path] = d.choices[int(rng.integers(len(d.choices)))]
        else:
            low, high = (math.log(d.low), math.log(d.high)) if d.log else (d.low, d.high)
            value = float(rng.uniform(low, high))
            value = math.exp(value) if d.log else value
            params[d.path] = round(value) if d.kind == "int" else value
    lr = math.log10(params["optimizer.lr"])
    value = 0.56 - 0.03 * (lr + 2.7) ** 2 - 0.02 * params["network.dropout"] + 0.01 * float(rng.normal())
    state = "failed" if number == 23 else "pruned" if number > 11 and value < 0.53 else "complete"
    n_steps = int(rng.integers(5, 12)) if state == "pruned" else int(rng.integers(16, 40))
    return TrialSummary(
        number=number, arm=arm, state=state, value=None if state == "failed" else value, value_se=0.01,
        step=n_steps // 2, last_step=n_steps - 1, feasible=None, violation=None, threshold=0.3, precision=0.7,
        precision_bound=0.62, recall=0.4, attempts=1, devices=("cpu",), elapsed_s=3.0 * n_steps,
        failure="train/has_gift/loss: got nan" if state == "failed" else None, config=None, params=params,
        metrics={}, checkpoint=None,
    )  # fmt: skip


def renamed(document: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The document with one name changed wherever it stands."""
    text = json.dumps(document).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    return copy.deepcopy(json.loads(text))
