"""Features of daily bars: each of a bar's stock, industry and market up to and including its day."""

from __future__ import annotations

import numpy as np

from models.stock.bars import Bars

FEATURES_VERSION = 1  # raise it with any change of a feature's value

# The nine of the first sketch of this study, in its order.
SEED: tuple[str, ...] = (
    "market_pct_chg", "ma5", "ma10", "ma20", "momentum_5", "momentum_10", "volatility_10", "volume_ratio", "rsi",
)  # fmt: skip


def names() -> tuple[str, ...]:
    """All features in the order of `build`'s columns: `SEED` first."""
    raise NotImplementedError


def build(bars: Bars) -> np.ndarray:
    """All features of all bars, [N, D] float32, NaN where a stock's history is too short or a value is unknown."""
    raise NotImplementedError
