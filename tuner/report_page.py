"""What a report holds, section by section, as plain values; `report_html` and `report_markdown` write it down."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner import report_text as text
from tuner.figures import Figure, Missing
from tuner.figures_search import search_figures
from tuner.figures_verdict import interval_text, sample_text, verdict_figures
from tuner.formats import duration
from tuner.judged_metric import LABELS, label_of, metric_of, value_on_valid
from tuner.report_findings import (
    certified,
    counted,
    ends,
    figure,
    judged,
    metric,
    names_of,
    percent,
    registered,
    setting,
    spread,
)
from tuner.summary import StudySummary
from tuner.tree import find, leaves


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells are texts; columns from the first number on stand to the right. `folded`: shown when asked for."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    n_names: int = 1  # columns of text at the left
    folded: bool = False


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]
    caption: str = ""


Block = Paragraph | Bullets | Table | Code | Figure | Missing


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A key number: what it is, the number, what stands beside it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Page:
    title: str
    facts: Sequence[str]  # one line below the title
    simulated: bool
    outcome: str | None
    conclusion: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]


def make_page(document: Mapping[str, Any], summary: StudySummary) -> Page:
    """Everything that a report says, from the numbers alone."""
    drawn, by = {found.key: found for found in verdict_figures(document)}, metric_of(document)
    compared = [drawn[key] for key in (f"{by}_comparison", f"{by}_difference", "topk_capture")]
    why = [drawn[key] for key in ("training_curves", "gradient_conflict", "shared_repr_analysis")]
    sections = [
        Section("Verdict", [*map(Paragraph, text.verdict_lines(document)), *_comparisons(document)]),
        Section(
            "What follows for the design", [Bullets(text.implications(document) or ["Nothing beyond the verdict."])]
        ),
        Section(
            "How the models compare",
            [*compared, *_models(document, _RANKING, "Ranking"), *_amounts(document), *_left_out(document)],
        ),
        Section("Why", why),
        Section("Calibration", [drawn["reliability"], *_models(document, _PROBABILITIES, _PROBABILITIES_OF)]),
        Section("Certificate", [*_certificates(document, drawn["certificate"])]),
        Section("Looks at test and calibrate", list(_looks(document))),
        Section("Single features", list(_leak(document))),
        Section("Data", list(_data(document))),
        Section("Search history", [*_search_facts(summary), *search_figures(summary)]),
        Section("Configuration", list(_configurations(document, summary))),
        Section("Fits", list(_fits(document))),
        Section("Cost and versions", list(_cost(document))),
        Section(
            "How to reproduce",
            [
                Paragraph(
                    "specification.yaml, beside this report, is what ran, with every value that a flag has set."
                ),
                Code(document["reproduce"]),
            ],
        ),
    ]
    number = document["number"]
    finished = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(document["finished_at"] or 0.0))
    facts = [f"Evaluation {number} of study {document['study']}", f"finished {finished}"]
    facts.append(f"task {document['task']}")
    return Page(
        title=summary.spec.description or document["study"],
        facts=facts,
        simulated=bool(document["data"].get("simulated")),
        outcome=document["verdict"]["outcome"] if document["verdict"] else None,
        conclusion=text.conclusion(document),
        tiles=list(_tiles(document)),
        sections=[section for section in sections if section.blocks],
    )


def _tiles(document: Mapping[str, Any]) -> Iterator[Tile]:
    verdict, n_test = document["verdict"], document["looks"].get("test", {})
    if verdict is not None:
        gain, between = text.deciding_gain(verdict)
        yield Tile(f"Gain in {label_of(document)}", gain, f"{between}, {percent(document['confidence'])} interval")
        for arm in (verdict["arm"], verdict["against"]):
            yield _judged_tile(document, arm)
    elif document["nominees"]:
        yield _judged_tile(document, document["nominees"][0]["arm"])
    if document["nominees"]:
        issued = registered(document)["certificate"]
        if issued["status"] == "certified":
            note = f"confidence {percent(issued['confidence'])}, recall {percent(issued['recall'])}"
            yield Tile("Certified precision", f"≥ {figure(issued['target'])}", note)
        else:
            could = issued["certifiable_precision"]
            yield Tile(
                "Certificate", "infeasible", f"asked {figure(issued['target'])}, certifiable {figure(could)}"
            )
    if n_test:
        yield Tile(
            "Looks at test",
            f"{n_test['n_looks']:,}",
            f"{n_test['n_models']:,} models, {counted(n_test['repeated'], 'further look')} at them",
        )


def _judged_tile(document: Mapping[str, Any], arm: str) -> Tile:
    return Tile(f"{label_of(document)}, {arm}", *ends(judged(document, arm)))


# --- comparison ------------------------------------------------------------------------------------------------


def _comparisons(document: Mapping[str, Any]) -> Iterator[Block]:
    baselines = names_of(document, "baseline")
    rows = [
        [c["arm"], c["against"], spread(c["difference"], signed=True),
         spread(c["relative"], signed=True, share=True),
         c["outcome"] if c["against"] not in baselines else "–",
         "–" if c["positives_needed"] is None or c["against"] in baselines else f"{c['positives_needed']:,}"]
        for c in document["comparisons"]
    ]  # fmt: skip
    if rows:
        gain = f"Difference of {label_of(document)}"
        columns = ["Model", "Against", gain, "Relative", "Helps?", "More positives to decide"]
        yield Table(
            columns, rows, f"Differences with {interval_text(document)}; {sample_text(document)}.", n_names=2
        )


_RANKING = {
    **LABELS, "recall_at_1pct": "Recall at 1 %", "recall_at_10pct": "Recall at 10 %",
    "capture_at_1pct": "Capture at 1 %", "revenue_at_1pct": "Revenue at 1 %",
}  # fmt: skip
_PROBABILITIES = {
    "ece_raw": "ECE raw", "ece_calibrated": "ECE calibrated", "brier_raw": "Brier raw",
    "brier_calibrated": "Brier calibrated", "log_loss_raw": "Log loss raw",
    "log_loss_calibrated": "Log loss calibrated",
}  # fmt: skip
_PROBABILITIES_OF = "Probabilities (ECE: expected calibration error over 20 bins of equal mass)"


def _models(document: Mapping[str, Any], wanted: Mapping[str, str], what: str) -> Iterator[Block]:
    """Metrics of all models; those that no model has are left out."""
    names = [name for name in wanted if any(metric(document, arm, name) for arm in document["arms"])]
    rows = [
        [arm, found["kind"], *(spread(metric(document, arm, name)) for name in names)]
        for arm, found in document["arms"].items()
    ]
    if names:
        caption = f"{what} of all models on {sample_text(document)}; {interval_text(document)}."
        yield Table(["Model", "Kind", *(wanted[name] for name in names)], rows, caption, n_names=2)


def _amounts(document: Mapping[str, Any]) -> Iterator[Block]:
    """Errors of amounts; of those that smearing corrects also the errors before it."""
    columns = {"_mae": "MAE", "_rmse": "RMSE", "_bias": "Bias"}
    known = {name for arm in document["arms"].values() for name in arm["metrics"]}
    tasks = sorted(name.removesuffix("_mae") for name in known if name.endswith("_mae"))
    for task in tasks:
        arms = [arm for arm in document["arms"] if metric(document, arm, f"{task}_mae")]
        raw = any(_differ(document, arm, task + end) for arm in arms for end in columns)
        shown = {end + kind: name + kind.replace("_", " ") for end, name in columns.items()
                 for kind in (("_raw", "") if raw else ("",))}  # fmt: skip
        rows = [
            [arm, *(spread(metric(document, arm, task + end), signed="bias" in end) for end in shown)]
            for arm in arms
        ]
        corrected = ", raw and after the smearing correction fitted on valid" if raw else ""
        caption = f"Errors of {task} in its own unit{corrected}; {interval_text(document)}."
        yield Table(["Model", *shown.values()], rows, caption)


def _differ(document: Mapping[str, Any], arm: str, name: str) -> bool:
    """Whether smearing has changed an error of an amount."""
    raw, corrected = (metric(document, arm, end) for end in (f"{name}_raw", name))
    return raw is not None and (corrected is None or raw["value"] != corrected["value"])


def _left_out(document: Mapping[str, Any]) -> Iterator[Block]:
    if document["left_out"]:
        yield Paragraph("Left out of the comparison:")
        yield Bullets([f"{left['arm']}: {left['reason']}" for left in document["left_out"]])


# --- certificate, looks, leak ----------------------------------------------------------------------------------


def _certificates(document: Mapping[str, Any], drawn: Figure | Missing) -> Iterator[Block]:
    for nominee in document["nominees"]:
        issued = nominee["certificate"]
        yield Paragraph(certified(nominee))
        yield Paragraph(
            f"Nominated by valid alone: fit {nominee['number']} of {nominee['arm']} (seed {nominee['seed']}, "
            f"{label_of(document)} on valid {figure(value_on_valid(document, nominee))}). This is certificate "
            f"number {issued['number_on_set']} on this calibrate set; it spends "
            f"{figure(issued['delta_spent'])} of the risk, and it and those before it "
            f"hold together with confidence {percent(issued['joint_confidence'])}."
        )
    yield drawn
    for nominee in document["nominees"]:
        yield from _certificate_tables(nominee)


def _certificate_tables(nominee: Mapping[str, Any]) -> Iterator[Block]:
    issued = nominee["certificate"]
    if issued["assumptions"]:
        yield Paragraph(f"What is assumed of {nominee['arm']}:")
        yield Bullets(issued["assumptions"])
    alone = any(t.get("bound_rows") is not None for t in issued["tested"])
    rows = [
        [figure(t["threshold"]), f"{t['n_selected']:,}", f"{t['n_true']:,}",
         figure(t["n_true"] / t["n_selected"] if t["n_selected"] else None), figure(t["bound"]),
         *([figure(t.get("bound_rows"))] if alone else []), figure(t["p_value"]),
         "passed" if t["passed"] else "failed"]
        for t in issued["tested"]
    ]  # fmt: skip
    if rows:
        units = "" if issued["unit"] == "row" else f", {issued['n_units']:,} units ({issued['unit']})"
        if issued["n_effective"] is not None:
            units += f", effective sample size {figure(issued['n_effective'])}"
        caption = f"Cuts tested on calibrate, strict to loose: {issued['n_rows']:,} rows{units}."
        by_rows = ["By rows alone"] if alone else []
        caption += " The bound by rows alone is for comparison only." if alone else ""
        columns = ["Logit at least", "Selected", "True", "Precision", "Lower bound", *by_rows, "p", "Test"]
        yield Table(columns, rows, caption, folded=True)


def _looks(document: Mapping[str, Any]) -> Iterator[Block]:
    looks = document["looks"]
    test, calibrate = looks.get("test", {}), looks.get("calibrate", {})
    if test:
        again = (
            "no model was looked at twice"
            if not test["repeated"]
            else f"the same models had {counted(test['repeated'], 'further look')}, here or elsewhere"
        )
        yield Paragraph(
            f"Test was opened {counted(test['n_looks'], 'time')} in this evaluation, for "
            f"{counted(test['n_models'], 'model')}; "
            f"{again}. All evaluations of these data together have looked "
            f"{counted(test['all_on_this_set'], 'time')}. The "
            "more looks, the more the best of them flatters itself; the intervals do not know of them."
        )
    if calibrate:
        issued = max((n["certificate"]["number_on_set"] for n in document["nominees"]), default=0)
        every = calibrate.get("all_on_this_set")
        more = "" if every is None else f", {counted(every, 'time')} by all evaluations of these data"
        yield Paragraph(
            f"Calibrate was opened {counted(calibrate['n_looks'], 'time')} in this evaluation{more}; "
            f"{counted(issued, 'certificate')} {'stands' if issued == 1 else 'stand'} on it up to this one."
        )


def _leak(document: Mapping[str, Any]) -> Iterator[Block]:
    leak = document["leak"]
    if not leak or not leak["features"]:
        return
    whole = document["nominees"][0]["valid_pr_auc"] if document["nominees"] else None
    yield Paragraph(
        f"The best single feature, {leak['features'][0][0]}, reaches a PR-AUC of {figure(leak['best'])} on valid"
        + (f"; the nominee, with all of them, {figure(whole)}." if whole is not None else ".")
        + " A feature that alone comes near the whole model may know the answer, or the others add little to it."
    )
    rows = [[str(name), figure(value)] for name, value in leak["features"]]
    yield Table(["Feature", "PR-AUC alone (valid)"], rows, f"The {len(rows)} best single features.", folded=True)


# --- data, search, configuration -------------------------------------------------------------------------------


def _data(document: Mapping[str, Any]) -> Iterator[Block]:
    data = document["data"]
    kind = "simulated, not real" if data.get("simulated") else "real"
    yield Paragraph(f"{data['source']} ({kind}).")
    rows = [[role, f"{n:,}"] for role, n in data["rows"].items()]
    yield Table(["Role", "Rows"], rows, f"Rows of each role; data hash {data['data_hash']}.")
    files = data.get("files") or {}
    if files:
        rows = [[name, *_file(stamp)] for name, stamp in files.items()]
        yield Table(["File", "Bytes", "SHA-256"], rows, "Files that the data were made of.", folded=True)
    for name in ("preparation", "simulation"):
        if data.get(name):
            said = ", ".join(f"{key} {setting(value)}" for key, value in leaves(data[name]).items())
            yield Paragraph(f"{name.capitalize()}: {said}.")


def _file(stamp: Any) -> tuple[str, str]:
    if isinstance(stamp, Mapping):
        size = stamp.get("size_bytes", stamp.get("size"))
        return ("–" if size is None else f"{size:,}", str(stamp.get("sha256", "–")))
    return "–", str(stamp)


def _search_facts(summary: StudySummary) -> Iterator[Block]:
    counts, spec = summary.counts, summary.spec
    yield Paragraph(
        f"{counted(summary.n_ended, 'trial')} ended ({counts['complete']} complete, {counts['pruned']} pruned, "
        f"{counts['failed']} failed) over {counted(len(spec.arms), 'arm')} and "
        f"{counted(len(spec.space.dimensions), 'searched setting')}; sampler {spec.sampler.name}, pruner "
        f"{spec.pruner.name}, seed {spec.seed}. {summary.n_feasible} met the constraint on valid."
    )


def _configurations(document: Mapping[str, Any], summary: StudySummary) -> Iterator[Block]:
    arms = {name: arm for name, arm in document["arms"].items() if arm["config"] is not None}
    if not arms:
        return
    flat = {name: leaves(arm["config"]) for name, arm in arms.items()}
    paths = sorted({path for config in flat.values() for path in config})
    rows = [
        [path, *(setting(config[path]) if path in config else "–" for config in flat.values())] for path in paths
    ]
    searched = {dimension.path for dimension in summary.spec.space.dimensions}
    trials = ", ".join(f"{name}: trial {arm['trial']}" for name, arm in arms.items() if arm["trial"] is not None)
    yield Paragraph(
        f"The best configuration of each arm by valid, feasible or not ({trials}). "
        f"{counted(len(searched), 'setting')} "
        "were searched; a dash means that the arm goes without."
    )
    yield Table(["Setting", *flat], rows, "Configurations that were evaluated.", folded=len(rows) > 12)
    default = summary.spec.config
    nominee = document["nominees"][0]["arm"] if document["nominees"] else None
    if nominee in flat:
        changes = [
            f"{path}: {setting(find(default, path))} → {setting(value)}"
            for path, value in flat[nominee].items()
            if find(default, path) != value
        ]
        yield Paragraph(f"The nominee's arm, {nominee}, against the study's default configuration:")
        yield Bullets(changes or ["no difference"])


def _fits(document: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        [name, "–" if fit["number"] is None else str(fit["number"]), str(fit["seed"]), fit["state"],
         "–" if fit["best_step"] is None else str(fit["best_step"]),
         "–" if fit["n_steps"] is None else str(fit["n_steps"]),
         "–" if fit["elapsed_s"] is None else duration(fit["elapsed_s"]), figure(value_on_valid(document, fit)),
         {True: "yes", False: "no"}.get(fit["valid_feasible"], "–"), fit["failure"] or ""]
        for name, arm in document["arms"].items()
        for fit in arm["fits"]
    ]  # fmt: skip
    columns = [
        "Model",
        "Fit",
        "Seed",
        "State",
        "Best step",
        "Steps",
        "Time",
        f"{label_of(document)} (valid)",
        "Feasible",
        "Failure",
    ]
    n_failed = sum(fit["state"] != "complete" for arm in document["arms"].values() for fit in arm["fits"])
    failed = "" if not n_failed else f" Not complete, and counted nowhere: {n_failed}."
    yield Table(columns, rows, f"Every fit: {counted(len(rows), 'model')}.{failed}", folded=True)


def _cost(document: Mapping[str, Any]) -> Iterator[Block]:
    cost = document["cost"]
    search, evaluation = cost["search_device_s"] / 3600, cost["evaluation_device_s"] / 3600
    yield Paragraph(
        f"Cost: {search + evaluation:.2f} device hours, {search:.2f} for the search and {evaluation:.2f} for the "
        "evaluation; "
        f"{duration(cost['wall_s'])} from beginning to end."
    )
    model = document["model"]
    if model is not None:
        yield Paragraph(
            f"The nominee is stored as {model['name']}:{model['version']} (checksum {model['checksum']}, "
            f"{model['size_bytes'] / 1e6:.2f} MB)."
        )
    rows = [["tuner", document["package_version"]], *([name, str(v)] for name, v in document["versions"].items())]
    yield Table(["Package", "Version"], rows, "Versions of the evaluation.", n_names=2)
