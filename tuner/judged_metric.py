"""What models are judged by: the study's own metric of the decision's task, PR-AUC or ROC-AUC.

An evaluation's document and a registered model's metrics name theirs as `metric`. Those without one were written
when there was but PR-AUC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models import Metric
from models.trainer import Objective

LABELS: Mapping[Metric, str] = {"pr_auc": "PR-AUC", "roc_auc": "ROC-AUC"}


def metric_of_study(objective: Objective, task: str) -> Metric:
    """ROC-AUC where the search improves just that, else PR-AUC."""
    return "roc_auc" if objective.metric == f"valid/{task}/roc_auc" else "pr_auc"


def metric_of(judged: Mapping[str, Any]) -> Metric:
    return judged.get("metric", "pr_auc")


def label_of(judged: Mapping[str, Any]) -> str:
    return LABELS[metric_of(judged)]


def value_on_valid(judged: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
    """What a fit, a nominee or a training curve of a document has on valid, by the document's metric.

    Each has `valid_pr_auc` and, if not older than the choice, `valid_roc_auc`. None where it was not measured.
    """
    return entry.get(f"valid_{metric_of(judged)}")


def chance(document: Mapping[str, Any]) -> float:
    """What scores that know nothing reach on the sample."""
    return 0.5 if metric_of(document) == "roc_auc" else document["sample"]["base_rate"]
