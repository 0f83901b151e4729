"""What a report says, and that its files stand for themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.trainer import InputError
from tests.tuner.verdict_document import (
    census_document,
    mvp13_document,
    renamed,
    roc_document,
    search_summary,
    without_verdict,
)
from tuner import figures_png
from tuner.report import results, write_report
from tuner.report_findings import certified, figure, on_comparison, on_gradients, on_importance, percent, spread
from tuner.report_html import html_report
from tuner.report_markdown import markdown_report
from tuner.report_page import make_page
from tuner.report_text import conclusion, implications, verdict_lines
from tuner.spec_checks import load_spec

NAMES = (
    *(
        "pr_auc_comparison",
        "pr_auc_difference",
        "training_curves",
        "topk_capture",
        "gradient_conflict",
        "shared_repr_analysis",
    ),
    *("reliability", "certificate", "optimisation_history", "importance", "parallel_coordinates", "pruning"),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Path]]]:
    out = tmp_path_factory.mktemp("report") / "deep" / "er"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures_png, "DPI", 30)  # the size at 300 has its own tests
        yield out, write_report(mvp13_document(), search_summary("mvp13"), out)


def test_every_file_is_there_and_no_other(written: tuple[Path, list[Path]]) -> None:
    out, files = written
    texts = ["results.json", "report.md", "report.html", "specification.yaml"]
    expected = [*texts, *(f"img/mvp13_{name}.png" for name in NAMES)]
    assert sorted(str(path.relative_to(out)) for path in files) == sorted(expected)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(files)


def test_markdown_shows_every_figure_that_was_written(written: tuple[Path, list[Path]]) -> None:
    out, _ = written
    shown = re.findall(r"!\[.*\]\((.*)\)", (out / "report.md").read_text())
    assert sorted(shown) == sorted(f"img/mvp13_{name}.png" for name in NAMES)
    for name in shown:
        with Image.open(out / name) as image:
            image.verify()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.plots = ""
        self.text = ""
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "plots" if dict(attrs).get("id") == "plots" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "plots":
            self.plots += data
        elif self._inside not in ("script", "style"):
            self.text += data


def parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


def test_the_page_needs_no_other_file_and_no_network(written: tuple[Path, list[Path]]) -> None:
    page = parsed((written[0] / "report.html").read_text())
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [attrs for _, attrs in page.tags if "src" in attrs or not (attrs.get("href") or "#").startswith("#")]
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")
    n_plots = len([attrs for _, attrs in page.tags if "data-plot" in attrs])
    assert n_plots == len(json.loads(page.plots)) == 21


def test_everything_from_the_document_is_escaped() -> None:
    evil = '</script><img src=x onerror="alert(1)">|`*'
    document = renamed(mvp13_document(), "multi_task_no_amount", evil)
    document["left_out"] = [{"arm": evil, "reason": evil}]
    document["data"]["source"] = document["nominees"][0]["certificate"]["assumptions"][0] = evil
    document["reproduce"] = [evil]
    page = make_page(document, search_summary("mvp13"))
    found = parsed(html_report(page))
    assert not [attrs for tag, attrs in found.tags if tag == "img" or "onerror" in attrs]
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 3
    assert evil in found.text
    json.loads(found.plots)
    assert "<" not in found.plots
    markdown = markdown_report(page, "mvp13")
    outside_code = "\n".join(line for line in markdown.split("\n") if not line.startswith("    "))
    assert "<img" not in outside_code
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", row)) - 2 in range(2, 12) for row in rows)


def test_the_conclusion_comes_first_in_both(written: tuple[Path, list[Path]]) -> None:
    said = conclusion(mvp13_document())
    html, markdown = ((written[0] / name).read_text() for name in ("report.html", "report.md"))
    assert html.index('class="conclusion"') < html.index("<section")
    assert markdown.index("**On simulated data") < markdown.index("## Verdict")
    assert "Simulated data, not real" in html
    assert said.count(". ") == 0, "one sentence"


def test_the_conclusion_has_the_key_numbers() -> None:
    said = conclusion(mvp13_document()).replace("\u00a0", " ")
    for part in ("multi_task_all helps", "0.0597 against 0.0561", "+6.4 %", "+3.7 % to +9.1 %",
                 "at least +3 % relative",
                 "can be certified at a precision of 0.1 with confidence 90 % (0.0621 could be)"):  # fmt: skip
        assert part in said
    said = conclusion(census_document()).replace("\u00a0", " ")
    assert said.startswith("It is undecided whether training as multi_task_all helps")
    assert "precision 0.6 is certified with confidence 90 %" in said
    assert said.endswith("a promise kept on test.")


def test_a_gain_is_told_in_the_reading_that_decides() -> None:
    document = mvp13_document()
    document["verdict"] |= {"reading": "points", "min_gain": 0.001}
    said = conclusion(document)
    assert "of single_task_gift, +0.0036 (95\u00a0% interval +0.0021 to +0.0051), where at least +0.001 in" in said
    assert "+6.4" not in said
    (gain, *_) = make_page(document, search_summary("mvp13")).tiles
    assert (gain.value, gain.note.partition(",")[0]) == ("+0.0036", "+0.0021 to +0.0051")
    advice = "Train as multi_task_all: the gain over single_task_gift is at least +0.0021."
    assert advice in implications(document)


@pytest.mark.parametrize(
    ("outcome", "advice"),
    [
        ("helps", "Train as multi_task_all: the gain over single_task_gift is at least +3.7"),
        ("does not", "Stay with single_task_gift: multi_task_all gains at most +9.1"),
        ("undecided", "Stay with single_task_gift until more data decide"),
    ],
)
def test_advice_follows_the_outcome(outcome: str, advice: str) -> None:
    document = mvp13_document()
    document["verdict"]["outcome"] = outcome
    assert any(line.startswith(advice) for line in implications(document))


def test_a_broken_promise_is_told_wherever_the_certificate_is() -> None:
    document = census_document()
    document["nominees"][0]["check"] |= {"kept": False, "refuted": False}
    assert conclusion(document).endswith("a promise broken (by no more than chance could explain) on test.")
    document["nominees"][0]["check"] |= {"kept": None}
    assert conclusion(document).endswith("a promise not tried (nothing is selected) on test.")
    document["nominees"][0]["check"] |= {"kept": False, "refuted": True}
    assert conclusion(document).endswith("a promise broken on test.")
    assert any(line.startswith("Do not rely on the certificate") for line in implications(document))
    assert "the promise is broken: 808 of 1,204 selected rows" in markdown_report(
        make_page(document, search_summary("census")), "census"
    )


def test_an_arm_keeps_its_name_where_the_conclusion_begins_with_it() -> None:
    assert conclusion(without_verdict()).startswith("The arm single_task_income reaches a PR-AUC of ")


def test_of_several_nominees_the_conclusion_is_about_the_one_that_is_registered() -> None:
    document = census_document()
    (issued,) = document["nominees"]
    failed = mvp13_document()["nominees"][0]
    document["nominees"] = [{**failed, "arm": "single_task_income"}, issued]
    said = conclusion(document).replace("\u00a0", " ")
    assert "precision 0.6 of multi_task_no_amount is certified with confidence 90 %" in said
    assert "no decisions" not in said
    tiles = {tile.name: tile.value for tile in make_page(document, search_summary("census")).tiles}
    assert tiles["Certified precision"] == "≥ 0.6"


def test_more_positives_are_named_where_they_would_decide() -> None:
    document = census_document()
    n_positive = document["verdict"]["n_positive"]
    needed = f"About 1,800 positives more than the {n_positive:,} of test would decide it"
    assert any(line.startswith(needed) for line in verdict_lines(document))
    document["verdict"]["positives_needed"] = None
    assert any("the seeds lie too far apart" in line for line in verdict_lines(document))


def test_the_answer_is_given_once() -> None:
    document = mvp13_document()
    said = [conclusion(document), *verdict_lines(document)]
    assert sum("helps" in line for line in said) == 1
    assert sum("against 0.0561 of single_task_gift" in line for line in said) == 1


def test_one_seed_is_told_where_it_is_all() -> None:
    document = mvp13_document()
    assert not any("one seed" in line for line in verdict_lines(document))
    for fit in document["arms"]["single_task_gift"]["fits"][1:]:
        fit["state"] = "failed"
    assert "Trained with one seed, so that other seeds are not in the interval: single_task_gift." in verdict_lines(
        document
    )


def test_a_feature_that_knows_the_answer_is_pointed_at() -> None:
    document = census_document()
    assert not any(line.startswith("Look at") for line in implications(document))
    document["leak"]["features"][0][1] = 0.56
    (line,) = (line for line in implications(document) if line.startswith("Look at feature_0 before"))
    assert line.endswith("; it may know the answer, or the others add little to it.")


def test_tasks_that_pull_against_each_other_are_found() -> None:
    document = mvp13_document()
    first, second, third = on_gradients(document)
    assert first == "watch_time and has_gift (−0.118) pull against each other."
    assert second.startswith("has_gift and gift_amount (0.674), has_comment and has_gift (0.341) and")
    assert third == "1 pair of 5 is nearly unrelated."
    document["gradient_cosine"]["matrix"] = [[1.0 if i == j else 0.2 for j in range(4)] for i in range(4)]
    assert on_gradients(document)[0].startswith("No two tasks pull against each other: the lowest cosine is 0.2")


def test_what_is_lost_without_a_group_is_told_against_the_whole() -> None:
    document = mvp13_document()
    document["importance"]["groups"] = [
        {"name": "a", "drop": 0.012, "sd": 0.001, "per_seed": [0.012]},
        {"name": "b", "drop": 0.0005, "sd": 0.001, "per_seed": [0.0005]},
    ]
    document["importance"]["units"] = []
    for fit in document["arms"]["multi_task_all"]["fits"]:
        fit["valid_pr_auc"] = 0.06
    said = on_importance(document)[0].replace("\u00a0", " ")
    assert said.startswith("Without a 0.012 of PR-AUC is lost, 20 % of the whole, next b with 0.0005")
    assert "1 of 2 groups" in said


def test_a_study_without_a_comparison_has_a_report_too() -> None:
    document = without_verdict()
    page = make_page(document, search_summary("census"))
    text = markdown_report(page, "census")
    assert page.outcome is None
    assert "No verdict: the study names no two arms to compare" in text
    assert "Do the tasks' gradients agree? (census) is not drawn: no evaluated arm" in text
    assert "multi\\_task\\_all: no trial of it is complete" in text
    assert "On simulated data" not in text


def test_looks_and_certificates_are_counted() -> None:
    text = markdown_report(make_page(mvp13_document(), search_summary("mvp13")), "mvp13")
    assert "Test was opened 28 times in this evaluation, for 28 models; no model was looked at twice" in text
    assert "certificate number 2 on this calibrate set" in text
    document = mvp13_document()
    document["looks"]["test"]["repeated"] = 3
    assert "the same models had 3 further looks, here or elsewhere" in markdown_report(
        make_page(document, search_summary("mvp13")), "mvp13"
    )


# --- the metric that models are judged by ----------------------------------------------------------------------


def test_a_report_by_roc_auc_speaks_of_pr_auc_only_where_that_is_meant() -> None:
    document = roc_document(feasible=False)
    text = markdown_report(make_page(document, search_summary("census")), "census").replace("\u00a0", " ")
    for part in ("ROC-AUC 0.9056 against 0.9027 of single_task_income", "| ROC-AUC, multi", "| Gain in ROC-AUC |",
                 "| Difference of ROC-AUC |", "Gain in ROC-AUC over the baseline arm", "ROC-AUC of every model",
                 "ROC-AUC on valid 0.9061)", "| ROC-AUC (valid) |", "Drop of the ROC-AUC on valid",
                 "of ROC-AUC is lost", "img/census_roc_auc_comparison.png", "img/census_roc_auc_difference.png",
                 "of what is above chance", "Without it ROC-AUC falls", "ROC-AUC over the default"):  # fmt: skip
        assert part in re.sub(r"\\(.)", r"\1", text), part
    left = [line[:24].strip() for line in text.splitlines() if "PR-AUC" in line]
    assert left == ["| Model | Kind | PR-AUC", "The best single feature,", "| Feature | PR-AUC alone"]


def test_a_leak_is_told_against_the_pr_auc_of_the_whole_model() -> None:
    document = roc_document(feasible=False)
    document["leak"] |= {"features": [["feature_0", 0.56]], "best": 0.56}
    assert any("alone it reaches a PR-AUC of 0.56 on valid, the whole model 0.5787;" in line
               for line in implications(document))  # fmt: skip


def test_roc_auc_is_held_against_chance_and_pr_auc_against_the_base_rate() -> None:
    assert on_comparison(census_document())[0].endswith("times the base rate.")
    assert on_comparison(roc_document(feasible=True))[0].endswith("above chance.")


def test_differences_in_results_are_named_by_their_metric() -> None:
    document = roc_document(feasible=True)
    delta = results(document, search_summary("census"))["delta"]
    assert delta["roc_auc_interval"] == [document["verdict"]["difference"][end] for end in ("low", "high")]
    assert delta["roc_auc_relative"] == document["verdict"]["relative"]["value"]
    assert "pr_auc_interval" not in delta


# --- whether the target was reachable, and kept ----------------------------------------------------------------


def test_a_target_that_was_reachable_is_told_with_days_rows_and_what_became_of_it() -> None:
    (nominee,) = roc_document(feasible=True)["nominees"]
    said = certified(nominee).replace("\u00a0", " ")
    for part in (
        "a precision of 0.6 was reachable on calibrate with confidence 90 %",
        "selected rows on 41 of 80 days and 301 of 400 users are true, precision 0.",
        " [by rows alone 0.6512, for comparison only]",
        "On test the promise is kept: 808 of 1,204 selected rows on 33 of 60 days and 1 of 400 users are true",
        "precision 0.671 (0.644 to 0.698) [by rows alone 0.6551 to 0.6872, for comparison only]",
        "recall 0.435 (0.391 to 0.478), F1 0.528 (0.481 to 0.574).",
    ):
        assert part in said, part
    assert "not issued" not in said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "of 400 users: the target is broken (by no more than chance could explain) there."),
        ({"refuted": True}, "of 400 users: the target is broken there."),
        ({"kept": True}, "of 400 users: the target is kept there."),
    ],
)
def test_a_target_out_of_reach_is_told_with_what_the_search_had_found(change: dict[str, Any], told: str) -> None:
    (nominee,) = roc_document(feasible=False)["nominees"]
    nominee["not_issued"]["test"] |= change
    said = certified(nominee).replace("\u00a0", " ")
    assert said.startswith("A precision of 0.6 was not reachable for multi_task_no_amount on calibrate with ")
    for part in (
        ": the most that could be certified is 0.0621 [by rows alone 0.1071, for comparison only].",
        "Nothing is selected.",
        "The threshold of the search, not issued, had a precision of 0.6215 on valid (412 rows); on test it has ",
        "0.531 (0.441 to 0.619) [by rows alone 0.6551 to 0.6872, for comparison only], 808 of 1,204 rows on 33 ",
    ):
        assert part in said, part
    assert said.endswith(told)


def test_of_a_search_without_a_threshold_or_without_rows_on_test_that_is_told() -> None:
    (nominee,) = roc_document(feasible=False)["nominees"]
    nominee["not_issued"]["test"] |= {"kept": None, "precision": None}
    assert certified(nominee).endswith("on valid (412 rows) and selects nothing on test.")
    nominee["not_issued"] = None
    assert certified(nominee).endswith("Nothing is selected. The search had no threshold either.")
    del nominee["not_issued"]  # as older documents
    assert certified(nominee).endswith("Nothing is selected.")


def test_the_cuts_have_a_column_of_bounds_by_rows_where_rows_are_not_the_unit() -> None:
    for document, shown in ((roc_document(feasible=True), True), (census_document(), False)):
        text = markdown_report(make_page(document, search_summary("census")), "census")
        assert ("| Lower bound | By rows alone | p | Test |" in text) == shown
        assert ("The bound by rows alone is for comparison only" in text) == shown


# --- results.json ----------------------------------------------------------------------------------------------


def test_results_have_the_shape_of_the_experiment(written: tuple[Path, list[Path]]) -> None:
    found = json.loads((written[0] / "results.json").read_text())
    document = mvp13_document()
    metrics = {name: document["arms"][name]["metrics"] for name in ("single_task_gift", "multi_task_all")}
    for key, name in (("single_task", "single_task_gift"), ("multi_task_all", "multi_task_all")):
        assert found[key]["arm"] == name
        assert found[key]["pr_auc"] == metrics[name]["pr_auc"]["value"]
        assert found[key]["top_1pct"] == metrics[name]["capture_at_1pct"]["value"]
        assert found[key]["top_5pct"] == metrics[name]["capture_at_5pct"]["value"]
    for short, metric in (("pr_auc", "pr_auc"), ("top_1pct", "capture_at_1pct")):
        expected = metrics["multi_task_all"][metric]["value"] - metrics["single_task_gift"][metric]["value"]
        assert found["delta"][short] == pytest.approx(expected, abs=1e-12)
    assert found["evaluation"] == json.loads(json.dumps(document))
    assert found["search"]["n_ended"] == 50
    assert "single_task_gift" not in found
    assert next(iter(found)) == "single_task"


def test_without_money_the_top_counts_positives() -> None:
    found = results(census_document(), search_summary("census"))
    assert found["top_k_is"] == "recall"
    recall = census_document()["arms"]["multi_task_all"]["metrics"]["recall_at_1pct"]["value"]
    assert found["multi_task_all"]["top_1pct"] == recall


def test_without_a_verdict_nothing_is_subtracted() -> None:
    found = results(without_verdict(), search_summary("census"))
    assert found["delta"] is None
    assert "single_task" not in found
    assert found["single_task_income"]["pr_auc"] == pytest.approx(0.5655)


def test_an_arm_may_be_called_like_a_part_of_the_file() -> None:
    found = results(renamed(mvp13_document(), "multi_task_no_amount", "delta"), search_summary("mvp13"))
    assert found["arm:delta"]["arm"] == "delta"
    assert found["delta"]["arm"] == "multi_task_all"


# --- files -----------------------------------------------------------------------------------------------------


def test_another_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for change in ({"format": 2}, {"study": "../elsewhere"}):
        with pytest.raises(InputError, match="format"):
            write_report({**mvp13_document(), **change}, search_summary("mvp13"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out .*cannot be written"):
        write_report(mvp13_document(), search_summary("mvp13"), tmp_path / "file")


def test_numbers_are_written_for_readers() -> None:
    assert figure(-0.00123456) == "−0.001235"
    assert percent(0.0312, signed=True) == "+3.1\u00a0%"
    interval: dict[str, Any] = {"value": 0.05973, "low": 0.05674, "high": 0.06295}
    assert spread(interval) == "0.0597 (0.0567 to 0.0630)"
    assert spread({"value": 612.3, "low": 540.0, "high": 700.9}) == "612 (540 to 701)"
    assert spread(interval, signed=True, share=True) == "+5.97\u00a0% (+5.67\u00a0% to +6.30\u00a0%)"
    assert spread({"value": 0.5, "low": 0.5, "high": 0.5}) == "0.5000 (0.5000 to 0.5000)"
    assert spread({"value": 0.01, "low": 0.01, "high": 0.01 + 1e-12}) == "0.0100 (0.0100 to 0.0100)"
    assert spread({"value": 0.0, "low": 0.0, "high": 1e-17}) == "0.0000 (0.0000 to 0.0000)"
    assert spread(None) == "–"


def test_no_field_of_a_sentence_is_left_unfilled() -> None:
    roc = (roc_document(feasible=True), roc_document(feasible=False))
    for document in (mvp13_document(), census_document(), without_verdict(), *roc):
        for outcome in ("helps", "does not", "undecided"):
            if document["verdict"]:
                document["verdict"]["outcome"] = outcome
            text = markdown_report(make_page(document, search_summary(document["study"])), document["study"])
            assert "{" not in text
            assert "None" not in text
            assert "nan" not in re.sub(r"got nan|n_?ominan|financ|nancy", "", text.lower())


def test_the_specification_beside_the_report_is_the_one_that_ran(written: tuple[Path, list[Path]]) -> None:
    assert load_spec(str(written[0] / "specification.yaml")).to_json() == search_summary("mvp13").spec.to_json()


def test_errors_before_smearing_are_shown_where_it_has_changed_them() -> None:
    document = mvp13_document()
    for changed in (True, False):
        if not changed:
            for arm in document["arms"].values():
                for name in [name for name in arm["metrics"] if name.endswith("_raw") and "gift_amount" in name]:
                    arm["metrics"][name] = arm["metrics"][name.removesuffix("_raw")]
        markdown = markdown_report(make_page(document, search_summary("mvp13")), "mvp13")
        assert ("| Model | MAE raw | MAE | RMSE raw | RMSE | Bias raw | Bias |" in markdown) == changed
        assert ("| Model | MAE | RMSE | Bias |" in markdown) != changed
        assert ("smearing correction fitted on valid" in markdown) == changed
