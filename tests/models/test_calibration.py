from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit

from models.calibration import FocalInverse
from models.trainer import InputError

LOSSES = [(0.25, 2.0), (0.5, 2.0), (0.75, 2.0), (0.05, 5.0), (0.99, 0.5), (0.3, 1.0), (0.7, 0.0)]


def focal_risk(score: float, eta: float, alpha: float, gamma: float) -> float:
    """Expected focal loss of a logit where the true probability is `eta`; written from the loss's definition."""
    log_p, log_q = log_expit(score), log_expit(-score)
    positive = -alpha * math.exp(gamma * log_q) * log_p
    negative = -(1.0 - alpha) * math.exp(gamma * log_p) * log_q
    return eta * positive + (1.0 - eta) * negative


def best_score(eta: float, alpha: float, gamma: float) -> float:
    grid = np.linspace(-25.0, 25.0, 1001)
    start = grid[np.argmin([focal_risk(s, eta, alpha, gamma) for s in grid])]
    bounds = (start - 0.1, start + 0.1)
    found = minimize_scalar(
        focal_risk, bounds=bounds, args=(eta, alpha, gamma), method="bounded", options={"xatol": 1e-9}
    )
    return float(found.x)


@pytest.mark.parametrize(("alpha", "gamma"), LOSSES)
@pytest.mark.parametrize("eta", [0.0005, 0.0148, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_it_inverts_the_minimiser_of_the_focal_risk(alpha: float, gamma: float, eta: float) -> None:
    score = torch.tensor(best_score(eta, alpha, gamma), dtype=torch.float64)
    assert FocalInverse(alpha, gamma)(score).item() == pytest.approx(eta, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "eta", "output"),
    [
        (0.25, 0.0148, 0.123),
        (0.5, 0.0148, 0.174),
        (0.75, 0.0148, 0.240),
        (0.25, 0.05, 0.18),
        (0.5, 0.05, 0.25),
        (0.75, 0.05, 0.33),
        (0.25, 0.5, 0.40),
        (0.5, 0.5, 0.50),
        (0.75, 0.5, 0.60),
    ],
)
def test_published_outputs_of_a_perfect_model(alpha: float, eta: float, output: float) -> None:
    decimals = 0.0005 if eta == 0.0148 else 0.005
    low, high = FocalInverse(alpha, 2.0)(torch.tensor(logit([output - 1.05 * decimals, output + 1.05 * decimals])))
    assert low < eta < high


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9])
def test_without_gamma_it_is_the_shift_of_the_prior(alpha: float) -> None:
    scores = np.linspace(-30.0, 30.0, 61)
    expected = expit(scores + math.log((1.0 - alpha) / alpha))
    assert FocalInverse(alpha, 0.0)(torch.tensor(scores)).numpy() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(-60.0, 60.0, width=32), min_size=2, max_size=30, unique=True),
    alpha=st.floats(0.05, 0.99),
    gamma=st.floats(0.0, 5.0),
)
def test_strictly_increasing_with_the_stated_slope(scores: list[float], alpha: float, gamma: float) -> None:
    ordered = torch.tensor(sorted(scores), dtype=torch.float64)
    rise, run = torch.diff(FocalInverse(alpha, gamma).logits(ordered)), torch.diff(ordered)
    rounding = 1e-12 * (1.0 + gamma) * 60.0
    assert bool((rise >= run - rounding).all())
    assert bool((rise <= (1.0 + gamma) * run + rounding).all())
    assert bool((rise[run > 1e-9] > 0.0).all())


@pytest.mark.parametrize(("alpha", "gamma"), LOSSES)
def test_extreme_logits_stay_finite_and_follow_the_asymptote(alpha: float, gamma: float) -> None:
    scores = torch.tensor([-3.4e38, -1e4, -745.0, -100.0, 100.0, 745.0, 1e4, 3.4e38])
    calibrated = FocalInverse(alpha, gamma).logits(scores)
    assert bool(torch.isfinite(calibrated).all())
    shift = math.log((1.0 - alpha) / alpha) - torch.sign(scores.double()) * math.log1p(gamma)
    expected = (1.0 + gamma) * scores.double() + shift
    assert calibrated.numpy() == pytest.approx(expected.numpy(), rel=1e-12)
    probabilities = FocalInverse(alpha, gamma)(scores)
    assert probabilities[0] == 0.0
    assert probabilities[-1] == 1.0


def test_the_centre_is_smooth() -> None:
    near = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    calibrated = FocalInverse(0.25, 2.0).logits(near)
    assert calibrated[1].item() == pytest.approx(math.log(3.0), rel=1e-15)
    assert torch.diff(calibrated).tolist() == pytest.approx([2.676e-9] * 2, rel=1e-3)


def test_its_input_is_left_alone_and_any_shape_is_taken() -> None:
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    before = scores.detach().clone()
    calibrated = FocalInverse(0.25, 2.0)(scores)
    assert calibrated.shape == (2, 3)
    assert not calibrated.requires_grad
    assert scores.detach().equal(before)


@pytest.mark.parametrize(
    ("alpha", "gamma", "message"),
    [
        (0.0, 2.0, "focal alpha"),
        (1.0, 2.0, "focal alpha"),
        (math.nan, 2.0, "focal alpha"),
        (0.25, -0.1, "focal gamma"),
        (0.25, math.inf, "focal gamma"),
        (0.25, math.nan, "focal gamma"),
    ],
)
def test_bad_parameters_are_refused(alpha: float, gamma: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FocalInverse(alpha, gamma)
