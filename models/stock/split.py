"""Which bar belongs to which role: by market days, so that no label of a role knows of a day of the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.prepared import digest
from models.stock.bars import Bars
from models.stock.data import Part, Split, Universe
from models.stock.labels import Outcome
from models.trainer import ROLES, InputError

FIRST_YEAR = 250  # market days

# What becomes of a bar: its role, or the first reason why it has none.
FATES = (*ROLES, "outside_universe", "short_history", "limit_up", "label_unknown", "purged")


def fates(bars: Bars, outcome: Outcome, universe: Universe, split: Split) -> np.ndarray:
    """[N] int8, an index into `FATES`."""
    starts = np.array(first_days(bars.dates, split))
    role = np.searchsorted(starts, bars.day, side="right")
    next_start = np.append(starts, np.iinfo(np.int32).max)[role]  # nothing comes after test
    fate = np.where(outcome.label_end + split.embargo < next_start, role, FATES.index("purged"))
    fate[np.isnan(outcome.label)] = FATES.index("label_unknown")
    fate[~outcome.tradable] = FATES.index("limit_up")
    bars_before = np.arange(len(bars)) - np.searchsorted(bars.stock, bars.stock)
    fate[bars_before < universe.min_history] = FATES.index("short_history")
    fate[~in_universe(bars, universe)[bars.stock]] = FATES.index("outside_universe")
    return fate.astype(np.int8)


def first_days(dates: np.ndarray, split: Split) -> tuple[int, int, int]:
    """The market days on which valid, calibrate and test begin; `dates` [T] are all market days as 20180102.

    A first day that is no market day stands for the next one.
    """
    if split.train is not None:
        shares = np.cumsum([split.train, split.valid, split.calibrate])
        return tuple(round(float(share) * len(dates)) for share in shares)
    days = [int(f"{day:%Y%m%d}") for day in (split.valid, split.calibrate, split.test)]
    return tuple(int(day) for day in np.searchsorted(dates, days))


def in_universe(bars: Bars, universe: Universe) -> np.ndarray:
    """[S] bool: the stocks whose bars may have a role."""
    if universe.n_stocks is None:
        return np.ones(len(bars.stocks), bool)
    early = np.unique(bars.stock[bars.day < FIRST_YEAR])
    drawn = sorted(early, key=lambda stock: digest([universe.seed, bars.stocks[stock]]))[: universe.n_stocks]
    return np.isin(np.arange(len(bars.stocks)), drawn)


@dataclass(frozen=True)
class Fold:
    """One model's rows: it is trained on train and the rows `before` [n] of valid, and measured on `part` of valid,
    whose first market day is `first_day`."""

    before: np.ndarray
    part: slice
    first_day: int


def folds(valid: Part, dates: np.ndarray, split: Split) -> list[Fold]:
    """Valid in `split.folds` parts of equally many days, and what lies before each: rows whose label's window, and
    the embargo, is over before the part begins. `dates` [T] are all market days.

    Raises:
        InputError: more folds than days, or a part without both values of the label.
    """
    days = np.unique(valid.day)
    if len(days) < split.folds:
        raise InputError(f"data.split.folds: expected at most the {len(days)} days of valid, got {split.folds}")
    first_days = [int(part[0]) for part in np.array_split(days, split.folds)]
    edges = [*np.searchsorted(valid.day, first_days).tolist(), len(valid)]
    found = []
    for number, (first_day, start, end) in enumerate(zip(first_days, edges, edges[1:], strict=False), 1):
        if len(np.unique(valid.labels[start:end])) < 2:
            period = f"{dates[first_day]} .. {dates[valid.day[end - 1]]}"
            raise InputError(
                "data.split.folds: expected both values of the label in every part of valid, got one in part "
                f"{number} of {split.folds} ({period}); use fewer folds or a longer valid"
            )
        before = np.flatnonzero(valid.label_end[:start] + split.embargo < first_day)
        found.append(Fold(before, slice(start, end), first_day))
    return found
