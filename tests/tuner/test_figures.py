"""What the figures of a report hold, and the PNGs they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tuner.verdict_document import (
    census_document,
    mvp13_document,
    roc_document,
    search_summary,
    without_verdict,
)
from tuner.figures import Bars, Curves, Figure, Heat, Missing, arm_colours, cell, legend, tint, wrapped
from tuner.figures_html import plot
from tuner.figures_png import draw_png
from tuner.figures_search import importances, search_figures
from tuner.figures_verdict import verdict_figures
from tuner.optuna_importance import MIN_TRIALS, parameter_importance
from tuner.space import Dimension
from tuner.spec import Objective


def drawn(document: Mapping[str, Any]) -> dict[str, Figure]:
    return {found.key: found for found in verdict_figures(document) if isinstance(found, Figure)}


def missing(document: Mapping[str, Any]) -> dict[str, Missing]:
    return {found.key: found for found in verdict_figures(document) if isinstance(found, Missing)}


def test_gains_are_drawn_in_the_reading_of_the_question() -> None:
    document = mvp13_document()
    (panel,) = drawn(document)["pr_auc_difference"].panels
    assert isinstance(panel, Curves)
    told = panel.curves[1]
    assert told.y[0] == pytest.approx(6.42)
    assert (told.low or [])[0] == pytest.approx(3.71)
    assert panel.reference is not None
    assert panel.reference.value == pytest.approx(3.0)
    document["verdict"] |= {"reading": "points", "min_gain": 0.001}
    (panel,) = drawn(document)["pr_auc_difference"].panels
    assert isinstance(panel, Curves)
    assert panel.curves[1].y[0] == pytest.approx(0.0036)
    assert panel.reference is not None
    assert panel.reference.value == 0.001


@pytest.mark.parametrize(
    ("key", "n_panels", "size"),
    [
        ("pr_auc_comparison", 1, (1800, 1500)),
        ("gradient_conflict", 1, (1800, 1500)),
        ("certificate", 1, (1800, 1500)),
        ("reliability", 2, (3600, 1500)),
        ("shared_repr_analysis", 2, (3600, 1500)),
        ("topk_capture", 3, (3600, 3000)),
        ("training_curves", 5, (5400, 3000)),
    ],
)
def test_a_png_has_the_size_of_its_grid_at_300_dpi(
    tmp_path: Path, key: str, n_panels: int, size: tuple[int, int]
) -> None:
    figure = drawn(mvp13_document())[key]
    assert len(figure.panels) == n_panels
    draw_png(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert image.size == size
        assert all(300 <= dpi < 300.1 for dpi in image.info["dpi"])
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    assert len(colours) > 50, "nothing is drawn"


def test_a_long_name_makes_no_other_size(tmp_path: Path) -> None:
    document = mvp13_document()
    document["arms"]["x" * 90] = document["arms"]["xgboost"]
    draw_png(drawn(document)["pr_auc_comparison"], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 1500)


def test_names_are_not_taken_for_mathematics(tmp_path: Path) -> None:
    document = mvp13_document()
    document["arms"]["a $\\broken{ name"] = document["arms"]["xgboost"]
    draw_png(drawn(document)["pr_auc_comparison"], tmp_path / "figure.png")  # matplotlib would raise


def test_every_figure_has_title_axes_and_legend() -> None:
    for document in (census_document(), mvp13_document(), roc_document(feasible=True), roc_document(False)):
        study = document["study"]
        found = [*drawn(document).values(), *search_figures(search_summary(study))]
        assert len(found) == 12
        for figure in found:
            assert isinstance(figure, Figure)
            assert figure.title.endswith(f"({study})")
            assert figure.caption
            assert all(figure.observations)
            assert legend(figure) or all(isinstance(panel, Heat) and panel.measure for panel in figure.panels)
            for panel in figure.panels:
                labels = (panel.label, panel.measure) if isinstance(panel, Bars) else (panel.x_label, panel.y_label)
                assert all(labels)


def test_bars_are_the_metrics_of_the_document() -> None:
    document = mvp13_document()
    (panel,) = drawn(document)["pr_auc_comparison"].panels
    assert isinstance(panel, Bars)
    (series,) = panel.series
    metrics = [document["arms"][name]["metrics"]["pr_auc"] for name in panel.categories]
    assert list(series.values) == [m["value"] for m in metrics]
    assert list(series.low or ()) == [m["low"] for m in metrics]
    assert list(series.high or ()) == [m["high"] for m in metrics]
    assert list(series.points[0]) == metrics[0]["per_seed"]
    assert list(series.points[-1]) == [], "a single seed is the bar itself"
    assert panel.reference is not None
    assert panel.reference.value == document["sample"]["base_rate"]


def test_figures_of_a_document_by_roc_auc_are_of_roc_auc() -> None:
    document = roc_document(feasible=True)
    figures, arms = drawn(document), document["arms"]
    (panel,) = figures["roc_auc_comparison"].panels
    assert isinstance(panel, Bars)
    assert list(panel.series[0].values) == [arm["metrics"]["roc_auc"]["value"] for arm in arms.values()]
    assert panel.reference is not None
    assert (panel.reference.name, panel.reference.value) == ("chance 0.5", 0.5)
    (panel,) = figures["roc_auc_difference"].panels
    assert isinstance(panel, Curves)
    assert panel.curves[1].y[0] == pytest.approx(100 * document["comparisons"][0]["relative"]["value"])
    valid = figures["training_curves"].panels[-1]
    assert isinstance(valid, Curves)
    assert (valid.y_label, valid.curves[0].y) == (
        "ROC-AUC (valid)", document["training"][valid.curves[0].name]["valid_roc_auc"],
    )  # fmt: skip
    named = [figure for figure in figures.values() if "PR-AUC" in str(figure)]
    assert not named


def test_a_caption_of_training_speaks_of_losses_only_where_there_are_some() -> None:
    document = roc_document(feasible=True)
    n = len(document["training"])
    assert drawn(document)["training_curves"].caption.startswith("Mean training loss per task and step")
    for curve in document["training"].values():
        curve["loss"] = {}
    assert drawn(document)["training_curves"].caption == (
        "ROC-AUC on valid after every step, of the seed of each arm with the highest ROC-AUC on valid "
        f"(n = {n} fits)."
    )


def test_a_caption_of_importance_speaks_of_units_only_where_there_are_some() -> None:
    document = mvp13_document()
    assert "and when one shared unit is set to its mean; " in drawn(document)["shared_repr_analysis"].caption
    document["importance"]["units"] = []
    caption = drawn(document)["shared_repr_analysis"].caption
    assert "is replaced by its mean, or unknown; multi_task_all, mean and standard deviation" in caption
    document["importance"] |= {"groups": [], "units": mvp13_document()["importance"]["units"]}
    caption = drawn(document)["shared_repr_analysis"].caption
    assert caption.startswith("Drop of the PR-AUC on valid when one shared unit is set to its mean; ")


def test_the_steps_of_training_are_called_steps() -> None:
    """A step is an epoch of one trainer and a block of trees of another."""
    figures = [*drawn(mvp13_document()).values(), *search_figures(search_summary("mvp13"))]
    told = repr([figure for figure in figures if isinstance(figure, Figure)]).lower()
    assert "epoch" not in told
    assert "best at step" in told


def test_without_money_only_positives_are_counted_at_the_top() -> None:
    assert [panel.title for panel in drawn(census_document())["topk_capture"].panels] == ["Recall"]
    panels = drawn(mvp13_document())["topk_capture"].panels
    assert [panel.title for panel in panels] == ["Recall", "Capture of the largest", "Revenue"]


def test_what_cannot_be_drawn_says_why() -> None:
    found = missing(without_verdict())
    assert "several tasks" in found["gradient_conflict"].reason
    assert "ablated" in found["shared_repr_analysis"].reason
    assert "measurements" in found["training_curves"].reason
    assert len(drawn(without_verdict())) == 4


def test_a_reliability_figure_is_logarithmic_only_where_bins_would_crowd() -> None:
    document = mvp13_document()
    assert all(panel.x_log for panel in drawn(document)["reliability"].panels if isinstance(panel, Curves))
    bins = [
        {"predicted": p, "observed": p, "low": p - 0.05, "high": p + 0.05, "count": 100} for p in (0.2, 0.5, 0.8)
    ]
    document["reliability"] |= {"raw": bins, "calibrated": bins}
    assert not any(panel.x_log for panel in drawn(document)["reliability"].panels if isinstance(panel, Curves))


def test_arms_keep_their_colours() -> None:
    arms = mvp13_document()["arms"]
    colours = arm_colours(arms)
    assert len(set(colours.values())) == len(arms)
    assert colours["multi_task_all/default"] == tint(colours["multi_task_all"], 0.55)


def test_a_failed_trial_and_a_pruned_one_are_told_apart() -> None:
    summary = search_summary("census")
    figures = {figure.key: figure for figure in search_figures(summary)}
    pruning = figures["pruning"]
    assert isinstance(pruning, Figure)
    bars = pruning.panels[0]
    assert isinstance(bars, Bars)
    assert {series.name: sum(v or 0 for v in series.values) for series in bars.series} == {
        state: n for state, n in summary.counts.items() if n
    }


def test_too_few_trials_have_no_importances() -> None:
    found = {figure.key: figure for figure in search_figures(search_summary("census", n_trials=4))}
    assert isinstance(found["importance"], Missing)
    assert str(MIN_TRIALS) in found["importance"].reason
    assert isinstance(found["optimisation_history"], Figure)


def test_importance_finds_what_matters() -> None:
    dimensions = [Dimension(path=name, kind="float", low=0.0, high=1.0) for name in ("matters", "noise")]
    trials = [({"matters": i / 59, "noise": (i * 37 % 60) / 59}, 1 - (i / 59 - 0.3) ** 2) for i in range(60)]
    shares = parameter_importance(trials, dimensions, Objective(metric="valid/a/b"))
    assert next(iter(shares)) == "matters"
    assert shares["matters"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (
        parameter_importance([(params, 1.0) for params, _ in trials], dimensions, Objective(metric="valid/a/b"))
        == {}
    )


def test_importances_of_a_search_with_conditional_settings_sum_to_one() -> None:
    assert sum(importances(search_summary("census")).values()) == pytest.approx(1.0)


def test_plots_are_plain_json_and_escape_names() -> None:
    document = mvp13_document()
    document["arms"]["<b>bold</b>&"] = document["arms"]["xgboost"]
    for figure in drawn(document).values():
        for panel in figure.panels:
            text = json.dumps(plot(panel), allow_nan=False)
            assert "<b>" not in text.replace('"meta": "<b>bold</b>&"', "")


@given(st.text(st.characters(codec="ascii", categories=("Ll", "Nd")) | st.sampled_from("_./- "), max_size=80),
       st.integers(5, 30))  # fmt: skip
def test_wrapping_keeps_every_letter_and_the_width(name: str, width: int) -> None:
    lines = wrapped(name, width).split("\n")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert all(len(line) <= width for line in lines)


def test_settings_are_called_important_only_where_their_importance_is_known() -> None:
    said = []
    for n_trials in (MIN_TRIALS - 2, 50):
        (found,) = (f for f in search_figures(search_summary("mvp13", n_trials)) if f.key == "parallel_coordinates")
        assert isinstance(found, Figure)
        (panel,) = found.panels
        assert isinstance(panel, Curves)
        said.append(("most important" in found.caption, "most important" in panel.x_label))
        assert n_trials == 50 or found.observations[0].startswith("In the best trial: ")
    assert said == [(False, False), (True, True)]


@pytest.mark.parametrize(("value", "told"), [(-0.001, "0.00"), (-0.126, "−0.13"), (1.0, "1.00"), (None, "–")])
def test_a_cell_has_no_negative_zero(value: float | None, told: str) -> None:
    assert cell(value) == told
