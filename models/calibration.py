"""From the output of a model trained with focal loss back to probabilities, in closed form.

Focal loss is classification-calibrated but not proper: the score that minimises its risk is a known,
strictly increasing function of the true probability. The inverse leaves every ranking as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.trainer import InputError


@dataclass(frozen=True)
class FocalInverse:
    """Maps logits of a binary focal loss to calibrated probabilities; callable, for `Ranking.metrics`.

    The loss is -alpha (1 - p)^gamma ln p for positives and -(1 - alpha) p^gamma ln(1 - p) for negatives, p the
    sigmoid of the logit. gamma = 0 leaves the shift of a prior weighted by alpha; alpha = 0.5 weighs both
    alike.

    Raises:
        InputError: alpha outside (0, 1), gamma negative or not finite.

    Source: stationarity of the pointwise risk, odds = -((1 - alpha) / alpha) d0 / d1 with d1 and d0 the
    derivatives of the two terms in p; Charoenphakdee et al., CVPR 2021, section 4 has it without alpha.

    Example:
        >>> round(FocalInverse(alpha=0.25, gamma=2.0)(torch.tensor([-1.9627])).item(), 4)
        0.0148
    """

    alpha: float
    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise InputError(f"focal alpha: expected a number inside (0, 1), got {self.alpha}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0.0):
            raise InputError(f"focal gamma: expected a finite number >= 0, got {self.gamma}")

    def logits(self, scores: Tensor) -> Tensor:
        """Calibrated logits (float64) of raw logits, any shape. Strictly increasing in exact arithmetic, at
        slope between 1 and 1 + gamma, and finite for every finite float32 score.

        With s the raw logit the odds above come to
            ln odds = ln((1 - alpha) / alpha) + (1 + gamma) s + ln(1 + gamma u(s)) - ln(1 + gamma u(-s)),
            u(s) = exp(-s) ln(1 + exp(s)),
        which is odd in s but for the constant; with x = exp(-|s|) no term overflows.
        """
        scores = scores.detach().to(torch.float64)
        size = scores.abs()
        x = size.neg().exp_().clamp_(min=1e-300)  # below, u(-|s|) is 1 to the last bit; avoids 0 / 0
        log1p = torch.log1p(x)
        lower = (log1p / x).mul_(self.gamma).add_(1.0)
        ratio = size.add_(log1p).mul_(x).mul_(self.gamma).add_(1.0).div_(lower)  # in place: memory is the cost
        shift = math.log1p(-self.alpha) - math.log(self.alpha)
        return (scores * (1.0 + self.gamma)).addcmul_(torch.sign(scores), ratio.log_()).add_(shift)

    def __call__(self, scores: Tensor) -> Tensor:
        """Calibrated probabilities (float64) of raw logits, any shape."""
        return self.logits(scores).sigmoid_()
