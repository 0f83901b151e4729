"""What `tuner report` writes of an evaluation: results.json, figures, the report in Markdown and in HTML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.trainer import DiskError, InputError
from tuner.formats import to_json
from tuner.judged_metric import metric_of
from tuner.spec import STUDY_NAME
from tuner.summary import StudySummary, as_json

FORMAT = 1  # of an evaluation's document
SPECIFICATION = "specification.yaml"  # what ran, beside the report
_RESERVED = frozenset({"single_task", "delta", "top_k_is", "evaluation", "search"})


def write_report(document: Mapping[str, Any], summary: StudySummary, out: Path) -> list[Path]:
    """Write the report of an evaluation into the folder `out`, over an older one of the same study.

    `report.html` needs no other file and no network. Each file appears whole or not at all. Every text that comes
    from the document is escaped.

    Args:
        document: what `tuner evaluate` has found, as it is stored.
        summary: the study that was searched.

    Returns:
        The files: results.json, report.md, report.html, specification.yaml, then the figures.

    Raises:
        InputError: the document has another format.
        DiskError: a file cannot be written.
    """
    if document.get("format") != FORMAT or not re.fullmatch(STUDY_NAME, str(document.get("study"))):
        raise InputError(
            f"report: expected an evaluation's document of format {FORMAT}, got format {document.get('format')!r}; "
            "evaluate the study again with this version"
        )
    # Drawing is dear to import, and the command line imports this module for its words.
    from tuner.figures_png import draw_png
    from tuner.report_html import html_report
    from tuner.report_markdown import markdown_report
    from tuner.report_page import make_page

    study, page = document["study"], make_page(document, summary)
    files = [out / name for name in ("results.json", "report.md", "report.html", SPECIFICATION)]
    texts = [to_json(results(document, summary)) + "\n", markdown_report(page, study), html_report(page)]
    texts.append(summary.spec.to_yaml())
    try:
        (out / "img").mkdir(parents=True, exist_ok=True)
        for figure in page.figures:
            path = out / "img" / f"{study}_{figure.key}.png"
            temporary = _beside(path)
            draw_png(figure, temporary)
            os.replace(temporary, path)
            files.append(path)
        for path, text in zip(files, texts, strict=False):
            temporary = _beside(path)
            temporary.write_text(text, "utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise DiskError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    return files


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def results(document: Mapping[str, Any], summary: StudySummary) -> dict[str, Any]:
    """results.json: the experiment's own shape first, then everything.

    `single_task` is the verdict's baseline arm, every other model stands under its own name, and `delta` is the
    verdict's treatment minus its baseline (null without a verdict). `top_1pct`, ... are the share of the largest
    amounts found there, of the positives where there is no money (`top_k_is` says which). A name that means
    something else here is preceded by `arm:`.
    """
    verdict, arms = document["verdict"], document["arms"]
    money = any("capture_at_1pct" in arm["metrics"] for arm in arms.values())
    kind = "capture" if money else "recall"
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        baseline = verdict is not None and name == verdict["against"]
        key = "single_task" if baseline else f"arm:{name}" if name in _RESERVED else name
        found[key] = {"arm": name, **_numbers(arm["metrics"], kind)}
    delta = None
    if verdict is not None:
        ours, theirs = (_numbers(arms[verdict[side]]["metrics"], kind) for side in ("arm", "against"))
        delta = {"arm": verdict["arm"], "against": verdict["against"]} | {
            name: value - theirs[name]
            for name, value in ours.items()
            if isinstance(value, float) and isinstance(theirs.get(name), float)
        }
        by, relative = metric_of(document), verdict["relative"]
        delta |= {f"{by}_interval": _ends(verdict["difference"]), f"{by}_relative": relative["value"]}
        delta |= {f"{by}_relative_interval": _ends(relative), "outcome": verdict["outcome"]}
    first = {"single_task": found.pop("single_task")} if "single_task" in found else {}
    return first | found | {
        "delta": delta, "top_k_is": kind, "evaluation": dict(document), "search": as_json(summary)
    }  # fmt: skip


def _numbers(metrics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The values of a model by name, the seed's own names first, and the ends of their intervals."""
    values = {name: float(m["value"]) for name, m in metrics.items() if m.get("value") is not None}
    named = {"pr_auc": "pr_auc"} | {f"top_{k}pct": f"{kind}_at_{k}pct" for k in (1, 5, 10)}
    named |= {"ece": "ece_calibrated"}
    chosen = {short: values[name] for short, name in named.items() if name in values}
    intervals = {name: _ends(m) for name, m in metrics.items() if m.get("low") is not None}
    return chosen | values | {"intervals": intervals}


def _ends(interval: Mapping[str, Any]) -> list[float]:
    return [interval["low"], interval["high"]]
