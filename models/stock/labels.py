"""What became of a bar: did its stock rise enough within the horizon, and could it have been bought?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.stock.bars import Bars
from models.stock.data import Label, Universe

LABEL_VERSION = 1  # raise it with any change of a label


@dataclass(frozen=True)
class Outcome:
    """Shape: each [N].

    `label` float32: 1 or 0, NaN where the window is not over or holds no bar. `label_end` int32: the market day
    t + last, which may lie beyond the last one. `tradable` bool: the bar could be bought and has its history
    (`Universe`).
    """

    label: np.ndarray
    label_end: np.ndarray
    tradable: np.ndarray


def outcomes(bars: Bars, label: Label, universe: Universe) -> Outcome:
    raise NotImplementedError
