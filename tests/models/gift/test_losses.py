from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch.nn import functional as F  # noqa: N812

from models.gift.losses import MultiTaskLoss, binary_losses, loss_order, regression_losses
from models.gift.trainer import TaskConfig

NAN = float("nan")


def focal(logits, targets, alpha, gamma):
    pair = torch.tensor([[1 - alpha], [alpha]])
    return binary_losses(logits.view(-1, 1), targets.view(-1, 1), pair, torch.tensor([gamma])).flatten()


@settings(max_examples=60, deadline=None)
@given(st.floats(-12, 12), st.booleans(), st.floats(0.05, 0.99), st.floats(0, 5))
def test_focal_equals_its_definition(logit, positive, alpha, gamma):
    p_t = expit(logit) if positive else expit(-logit)
    alpha_t = alpha if positive else 1 - alpha
    expected = -alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    got = focal(torch.tensor([logit], dtype=torch.float64), torch.tensor([float(positive)]), alpha, gamma)
    assert got.item() == pytest.approx(expected, rel=2e-5, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, 8), st.booleans(), st.floats(0.05, 0.99), st.floats(0, 5))
def test_focal_gradient_equals_finite_differences(logit, positive, alpha, gamma):
    target = torch.tensor([float(positive)], dtype=torch.float64)
    x = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    focal(x, target, alpha, gamma).sum().backward()
    h = 1e-5
    up, down = (focal(torch.tensor([logit + d], dtype=torch.float64), target, alpha, gamma) for d in (h, -h))
    assert x.grad.item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("logit", [-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, 1e30])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_is_finite_at_extreme_logits(gamma, logit, target):
    x = torch.tensor([logit], requires_grad=True)
    loss = focal(x, torch.tensor([target]), 0.25, gamma)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(x.grad).all()
    assert loss.item() >= 0


def test_gamma_zero_and_bce_equal_torch():
    logits = torch.linspace(-20, 20, 81)
    targets = (torch.arange(81) % 2).float()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(2 * focal(logits, targets, 0.5, 0.0), expected)
    loss = MultiTaskLoss([TaskConfig(loss="bce", alpha=0.1, gamma=5.0)], "cpu")  # alpha, gamma: without effect
    got, _ = loss(logits.view(-1, 1), targets.view(-1, 1))
    torch.testing.assert_close(got, expected.mean().view(1))


def test_regression_losses_equal_torch():
    outputs, targets = torch.randn(50, 2) * 3, torch.randn(50, 2)
    got = regression_losses(outputs, targets, torch.tensor([False, True]))
    torch.testing.assert_close(got[:, 0], F.mse_loss(outputs[:, 0], targets[:, 0], reduction="none"))
    torch.testing.assert_close(got[:, 1], F.huber_loss(outputs[:, 1], targets[:, 1], reduction="none"))


TASKS = [
    TaskConfig(loss="mse"),
    TaskConfig(loss="huber"),
    TaskConfig(loss="bce"),
    TaskConfig(loss="focal", alpha=0.75, gamma=2.0),
]


def mixed_batch(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    targets = np.c_[rng.normal(size=(n, 2)), rng.integers(0, 2, (n, 2))].astype(np.float32)
    targets[rng.random((n, 4)) < 0.4] = NAN
    return torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)), torch.from_numpy(targets)


def test_each_task_averages_over_its_own_rows():
    outputs, targets = mixed_batch()
    losses, present = MultiTaskLoss(TASKS, "cpu")(outputs, targets)
    assert present.all()
    for k, task in enumerate(TASKS):
        rows = ~targets[:, k].isnan()
        alone, _ = MultiTaskLoss([task], "cpu")(outputs[rows, k : k + 1], targets[rows, k : k + 1])
        torch.testing.assert_close(losses[k], alone[0])


@pytest.mark.parametrize("output", [0.0, 1e30, float("inf"), NAN])
def test_a_task_without_rows_adds_exactly_nothing(output):
    outputs, targets = mixed_batch()
    for k in range(4):
        alone, empty = outputs.clone(), targets.clone()
        empty[:, k] = NAN
        alone[:, k] = output
        alone.requires_grad_()
        losses, present = MultiTaskLoss(TASKS, "cpu")(alone, empty)
        losses.sum().backward()
        assert losses[k].item() == 0.0
        assert present.tolist() == [j != k for j in range(4)]
        assert torch.equal(alone.grad[:, k], torch.zeros(len(outputs)))
        assert torch.isfinite(alone.grad).all()
        others = [j for j in range(4) if j != k]
        full, _ = MultiTaskLoss(TASKS, "cpu")(outputs, targets)
        assert torch.equal(losses[others], full[others])


def test_rows_that_do_not_count_get_no_gradient():
    outputs, targets = mixed_batch()
    outputs.requires_grad_()
    MultiTaskLoss(TASKS, "cpu")(outputs, targets)[0].sum().backward()
    assert (outputs.grad[targets.isnan()] == 0).all()
    assert (outputs.grad[~targets.isnan()] != 0).all()


def test_order_is_regression_first_and_stable():
    assert loss_order(["bce", "mse", "focal", "huber"]) == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="regression tasks come before"):
        MultiTaskLoss([TASKS[2], TASKS[0]], "cpu")
