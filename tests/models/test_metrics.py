from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss
from torch.utils._python_dispatch import TorchDispatchMode

from models import metrics
from models.calibration import FocalInverse
from models.decision import decide
from models.metrics import Ranking, Truth, read
from models.trainer import Decision, InputError


def ranked(scores: object, labels: object, amounts: object = None, n_bins: int = 20) -> Ranking:
    money = None if amounts is None else torch.as_tensor(np.asarray(amounts))
    truth = Truth.of(torch.as_tensor(np.asarray(labels)), money, name="valid/gift", n_bins=n_bins)
    return Ranking.of(torch.as_tensor(np.asarray(scores, dtype=np.float32)), truth)


def measured(scores: object, labels: object, amounts: object = None) -> dict[str, float]:
    return read(ranked(scores, labels, amounts).metrics())


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many or few ties, labels, and amounts: some positives have none, some negatives have some."""
    n = draw(st.integers(2, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    scores = (rng.integers(0, levels, n) - levels / 2.0).astype(np.float32) * 8.0 / levels
    labels = (rng.random(n) < draw(st.sampled_from([0.05, 0.3, 0.9]))).astype(np.float32)
    assume(0 < labels.sum() < n)
    amounts = rng.integers(0, 4, n) * (labels if draw(st.booleans()) else 1.0)
    return scores, labels, amounts


@settings(max_examples=200, deadline=None)
@given(rows())
def test_equal_to_scikit_learn(data: tuple) -> None:
    scores, labels, _ = data
    found = measured(scores, labels)
    assert found["pr_auc"] == pytest.approx(average_precision_score(labels, scores), rel=1e-12)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    probabilities = 1.0 / (1.0 + np.exp(-scores.astype(np.float64)))
    assert found["log_loss"] == pytest.approx(sklearn_log_loss(labels, probabilities), rel=1e-6)
    precision = found["pr_auc"]
    assert found["pr_auc_se"] == pytest.approx(math.sqrt(max(precision * (1 - precision), 0) / labels.sum()))


def delong_se(scores: np.ndarray, labels: np.ndarray) -> float:
    """The variance of DeLong et al. 1988 by its definition, with the number of rows for its degrees of freedom."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    by_positive, by_negative = wins.mean(1), wins.mean(0)
    variance = by_positive.var() / len(positive) + by_negative.var() / len(negative)
    return math.sqrt(variance * len(scores) / (len(scores) - 1))


@settings(max_examples=100, deadline=None)
@given(rows())
def test_the_error_of_the_roc_is_delongs(data: tuple) -> None:
    scores, labels, _ = data
    assert ranked(scores, labels).roc_auc_se().item() == pytest.approx(delong_se(scores, labels), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows(), st.integers(2, 4))
def test_copies_of_a_row_in_one_unit_add_nothing_to_what_is_known_of_the_roc(data: tuple, copies: int) -> None:
    scores, labels, _ = data
    unit = torch.from_numpy(np.tile(np.arange(len(labels)), copies) * 7 - 3)
    copied = ranked(np.tile(scores, copies), np.tile(labels, copies))
    assert copied.roc_auc_se(unit).item() == pytest.approx(delong_se(scores, labels), abs=1e-12)


def test_the_error_of_the_roc_by_units_is_the_spread_of_fresh_samples() -> None:
    """60 days of 30 rows whose labels and scores hang together; by rows it would be far too small."""
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(60), 30)
    found, by_unit, by_row = [], [], []
    for _ in range(400):
        level = rng.normal(size=60)[day]
        labels = (rng.normal(size=len(day)) + 0.7 * level > 0.5).astype(np.float32)
        ranking = ranked(0.7 * level + labels + rng.normal(size=len(day)), labels)
        found.append(ranking.roc_auc().item())
        by_unit.append(ranking.roc_auc_se(torch.from_numpy(day)).item())
        by_row.append(ranking.roc_auc_se().item())
    assert np.mean(by_unit) == pytest.approx(np.std(found), rel=0.1)
    assert np.mean(by_row) < 0.8 * np.std(found)


@settings(max_examples=60, deadline=None)
@given(rows())
def test_the_error_of_the_average_precision_is_that_of_its_derivatives(data: tuple) -> None:
    """Against differences of scikit-learn's average precision with one row's weight changed."""
    scores, labels, _ = data
    step, moved = 1e-5, []
    for row in range(len(labels)):
        ends = []
        for sign in (1.0, -1.0):
            weights = np.ones(len(labels))
            weights[row] += sign * step
            ends.append(average_precision_score(labels, scores, sample_weight=weights))
        moved.append((ends[0] - ends[1]) / (2 * step))
    by_row = math.sqrt(np.square(moved).sum() * len(moved) / (len(moved) - 1))
    assert ranked(scores, labels).average_precision_se().item() == pytest.approx(by_row, abs=1e-8)
    unit = np.arange(len(labels)) % max(len(labels) // 3, 2)
    by_unit = np.bincount(unit, moved)
    expected = math.sqrt(np.square(by_unit).sum() * len(by_unit) / (len(by_unit) - 1))
    found = ranked(scores, labels).average_precision_se(torch.from_numpy(unit) * 5 - 2).item()
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("decimals", [0, 2, 7])
def test_equal_to_scikit_learn_on_many_rows(decimals: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(50_000) < 0.0165
    scores = (rng.normal(size=50_000) + 1.2 * labels).round(decimals).astype(np.float32)
    found = measured(scores, labels)
    assert found["pr_auc"] == pytest.approx(average_precision_score(labels, scores), rel=1e-13)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-13)


def test_a_constant_score_gets_the_base_rate_and_no_more() -> None:
    labels = np.arange(1000) % 50 == 0
    found = measured(np.full(1000, -1.0), labels, labels * 7.0)
    assert found["pr_auc"] == pytest.approx(0.02, rel=1e-14)
    assert found["roc_auc"] == 0.5
    assert found["ece"] == pytest.approx(1.0 / (1.0 + math.e) - 0.02, rel=1e-6)
    for percent in (1, 5, 10):
        assert found[f"recall_at_{percent}pct"] == pytest.approx(percent / 100)
        assert found[f"revenue_at_{percent}pct"] == pytest.approx(percent / 100)
        assert found[f"capture_at_{percent}pct"] == pytest.approx(percent / 100)


def test_a_perfect_ranking_gets_everything() -> None:
    labels = np.arange(1000) < 10
    found = measured(-np.arange(1000), labels, labels * np.arange(1000, 0, -1))
    for name in ("pr_auc", "roc_auc", "recall_at_1pct", "capture_at_1pct", "revenue_at_1pct"):
        assert found[name] == 1.0
    # beyond the payers the true top holds nobody else
    assert found["capture_at_5pct"] == found["capture_at_10pct"] == found["recall_at_10pct"] == 1.0
    assert found["pr_auc_se"] == 0.0


def test_saturated_probabilities_do_not_tie_the_logits() -> None:
    """sigmoid in float32 is 1 above a logit of about 17: probabilities would lose the order at the top."""
    labels = np.r_[np.ones(50), np.zeros(950)]
    scores = np.linspace(60.0, 17.5, 1000).astype(np.float32)
    assert measured(scores, labels)["pr_auc"] == 1.0
    saturated = torch.sigmoid(torch.tensor(scores)).numpy()
    assert average_precision_score(labels, saturated) == pytest.approx(0.05)


@settings(deadline=None)
@given(data=rows(), seed=st.integers(0, 2**32))
def test_the_order_of_the_rows_does_not_matter(data: tuple, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(data[0]))
    straight, shuffled = measured(*data), measured(*(column[order] for column in data))
    loose = shuffled.pop("log_loss"), straight.pop("log_loss")  # its terms are float32
    assert loose[0] == pytest.approx(loose[1], rel=1e-7)
    assert shuffled == pytest.approx(straight, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(rows())
def test_only_the_order_of_the_scores_matters_to_ranks(data: tuple) -> None:
    scores, labels, amounts = data
    straight, bent = measured(scores, labels, amounts), measured(scores**3 / 4.0 + 1.0, labels, amounts)
    for name in straight.keys() - {"log_loss", "ece"}:
        assert bent[name] == straight[name]


@settings(deadline=None)
@given(rows())
def test_mirrored_scores_mirror_the_roc(data: tuple) -> None:
    scores, labels, _ = data
    assert measured(-scores, labels)["roc_auc"] == pytest.approx(1.0 - measured(scores, labels)["roc_auc"])


def every_order(keys: np.ndarray) -> list[list[int]]:
    """All orders of the rows by descending key, one for each way to break the ties."""
    groups = [np.flatnonzero(keys == key) for key in np.unique(keys)[::-1]]
    choices = itertools.product(*(itertools.permutations(group) for group in groups))
    return [list(itertools.chain(*choice)) for choice in choices]


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    amounts=st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 5.0]), min_size=5, max_size=5),
    labels=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_ties_count_as_the_mean_over_all_orders(scores: list, amounts: list, labels: list) -> None:
    assume(any(labels))
    key, money, positive = np.array(scores), np.array(amounts), np.array(labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PERCENTS", (20, 40, 80))  # k = 1, 2, 4 of five rows
        found = measured(key, positive, money)
    predicted = every_order(key)
    true = [[row for row in order if money[row] > 0] for order in every_order(money)]
    for percent, k in ((20, 1), (40, 2), (80, 4)):
        recalls = [positive[order[:k]].sum() / positive.sum() for order in predicted]
        assert found[f"recall_at_{percent}pct"] == pytest.approx(np.mean(recalls))
        if money.sum() == 0:
            assert f"capture_at_{percent}pct" not in found
            continue
        revenues = [money[order[:k]].sum() / money.sum() for order in predicted]
        assert found[f"revenue_at_{percent}pct"] == pytest.approx(np.mean(revenues))
        shares = [len({*p[:k]} & {*t[:k]}) / len(t[:k]) for p in predicted for t in true]
        assert found[f"capture_at_{percent}pct"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("n_rows", [1, 99, 100, 101, 700, 1000])
def test_k_is_the_ceiling_of_the_exact_share(n_rows: int) -> None:
    """0.01 * 700 is 7.000000000000001 in floats, its ceiling 8."""
    truth = Truth.of(torch.ones(n_rows), name="valid/gift")
    exact = [n_rows // 100 + (n_rows % 100 > 0), n_rows // 20 + (n_rows % 20 > 0), n_rows // 10 + (n_rows % 10 > 0)]
    assert truth.depths.tolist() == exact


@settings(max_examples=60, deadline=None)
@given(data=rows(), n_bins=st.sampled_from([1, 2, 3, 15, 20]))
def test_calibration_error_by_the_definition(data: tuple, n_bins: int) -> None:
    scores, labels, _ = data
    order = np.argsort(-scores, kind="stable")
    probability = 1.0 / (1.0 + np.exp(-scores[order].astype(np.float64)))
    share = np.array([labels[scores == score].mean() for score in scores[order]])
    n, expected = len(scores), 0.0
    for b in range(n_bins):
        inside = slice(n * b // n_bins, n * (b + 1) // n_bins)
        expected += abs(probability[inside].sum() - share[inside].sum()) / n
    found = ranked(scores, labels, n_bins=n_bins).calibration_error()
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_calibrated_error_uses_the_given_map() -> None:
    rng = np.random.default_rng(0)
    inverse, n = FocalInverse(0.25, 2.0), 200_000
    scores = rng.normal(-1.9, 0.5, n).astype(np.float32)
    labels = rng.random(n) < inverse(torch.tensor(scores)).numpy()
    found = read(ranked(scores, labels).metrics(inverse))
    assert found["ece"] > 0.08
    assert found["ece_calibrated"] < 0.002
    assert "ece_calibrated" not in measured(scores, labels)


def test_log_loss_of_sure_and_extreme_logits() -> None:
    assert measured([30.0, -30.0], [1, 0])["log_loss"] == pytest.approx(math.exp(-30.0), rel=1e-5)
    assert measured([-200.0, 200.0], [1, 0])["log_loss"] == 200.0


def test_what_is_undefined_is_left_out() -> None:
    found = measured([0.0, 1.0], [1, 1], [0.0, 0.0])
    assert "roc_auc" not in found
    assert not [name for name in found if name.startswith(("capture", "revenue"))]
    assert found["pr_auc"] == 1.0
    assert read({}) == {}


def test_counts_stay_exact_over_millions_of_rows() -> None:
    """float32 cannot count single rows above 2^24."""
    n = 2**24 + 3
    labels = torch.zeros(n, dtype=torch.bool)
    labels[-1] = True
    scores = torch.zeros(n)
    scores[-1] = -1.0
    ranking = Ranking.of(scores, Truth.of(labels, name="valid/gift"))
    assert (ranking.start.item(), ranking.end.item()) == (n - 1, n)
    assert ranking.average_precision().item() == 1.0 / n
    assert ranking.roc_auc().item() == 0.0
    assert ranking.true_positives.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_graphs_are_taken(dtype: torch.dtype) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=dtype, requires_grad=True)
    ranking = Ranking.of(logits, Truth.of(torch.tensor([0, 1, 0]), name="valid/gift"))
    assert ranking.average_precision().item() == 0.5
    assert not ranking.logits.requires_grad


@pytest.mark.parametrize(
    ("labels", "amounts", "message"),
    [
        ([0, 0, 0], None, "valid/gift: no positives among 3 rows"),
        ([], None, "valid/gift: no positives among 0 rows"),
        ([0.0, 1.0, math.nan], None, "expected labels 0 or 1, got nan"),
        ([0, 2, 1], None, "expected labels 0 or 1, got 2"),
        ([0, 1, 1], [0.0, math.nan, 1.0], "expected amounts >= 0, got nan"),
        ([0, 1, 1], [0.0, -3.0, 1.0], "expected amounts >= 0, got -3"),
    ],
)
def test_bad_truth_is_refused(labels: list, amounts: list | None, message: str) -> None:
    money = None if amounts is None else torch.tensor(amounts)
    with pytest.raises(InputError, match=message):
        Truth.of(torch.tensor(labels), money, name="valid/gift")


def test_a_diverged_model_is_an_error_not_a_number() -> None:
    for labels in ([1, 0, 1], [0, 0, 1]):
        found = ranked([math.nan, 1.0, 0.0], labels).metrics()
        with pytest.raises(FloatingPointError, match=r"valid/gift/\w+: expected a finite number, got nan"):
            read(found, "valid/gift")


def test_a_wrong_number_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \[2\], got \[3\]"):
        ranked([1.0, 2.0, 3.0], [0, 1])


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = str(func)
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
        boolean_index = "index.Tensor" in name and any(i is not None and i.dtype == torch.bool for i in args[1])
        if any(wait in name for wait in waits) or boolean_index:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_an_epoch_reads_nothing_back_before_the_end() -> None:
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.random(500) < 0.2)
    logits = torch.tensor(rng.normal(size=500) + labels.numpy() * 2.0)
    truth = Truth.of(labels, labels * 3.0, name="valid/gift")
    with HostReads() as reads:
        ranking = Ranking.of(logits, truth)
        ranking.metrics(FocalInverse(0.25, 2.0))
    assert reads.names == []
    with HostReads() as reads:
        decide(ranking, Decision(task="gift", target_precision=0.3))
    assert reads.names == []  # its one read is `tolist`
