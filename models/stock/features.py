"""Features of daily bars: each of a bar's stock, industry and market up to and including its day.

A window of w days is the last w bars of the stock, so days on which it was suspended are not among them; for the
market it is the last w market days. The return of a bar is close / pre_close - 1. Unknown is NaN: a history too
short, a quotient with denominator 0, no other stock to compare with. Nothing depends on the level of a stock's
prices. docs/stock-features.md is the list for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from models.stock.bars import Bars
from models.stock.crosssection import CrossSection, ratio
from models.stock.rolling import Rolling
from models.trainer import InputError

FEATURES_VERSION = 1  # raise it with any change of a feature's value

# The nine of the first sketch of this study, in its order.
SEED: tuple[str, ...] = (
    "market_pct_chg", "ma5", "ma10", "ma20", "momentum_5", "momentum_10", "volatility_10", "volume_ratio", "rsi",
)  # fmt: skip

_RSI_PERIOD = 14


def names() -> tuple[str, ...]:
    """All features in the order of `build`'s columns: `SEED` first."""
    return (*SEED, *(name for group in GROUPS.values() for name in group if name not in SEED))


def build(bars: Bars) -> np.ndarray:
    """All features of all bars, [N, D] float32, NaN where a stock's history is too short or a value is unknown.

    Raises:
        InputError: a market day without its value of the index.
    """
    panel = _Panel(bars)
    formulas = {name: formula for group in _FORMULAS.values() for name, formula in group.items()}
    out = np.empty((len(bars), len(formulas)), dtype=np.float32)
    for column, name in enumerate(names()):
        out[:, column] = formulas[name](panel)
    return out


class _Line:
    """A price's course in windows: of every stock, or of the market as if it were one."""

    def __init__(self, roll: Rolling, close: np.ndarray, change: np.ndarray):
        self.roll, self.close, self.change = roll, close, change

    def momentum(self, days: int) -> np.ndarray:
        return self.close / self.roll.before(self.close, days) - 1

    def ma(self, days: int) -> np.ndarray:
        """The close against its moving average."""
        return self.close / self.roll.mean(self.close, days) - 1

    def volatility(self, days: int) -> np.ndarray:
        return self.roll.std(self.change, days)


class _Panel(_Line):
    """The columns of bars as [N] float64, and what the formulas are made of."""

    def __init__(self, bars: Bars):
        columns = (bars.high, bars.low, bars.close, bars.pre_close, bars.volume)
        self.high, self.low, close, self.pre_close, self.volume = (x.astype(np.float64) for x in columns)
        super().__init__(Rolling(bars.stock), close, close / self.pre_close - 1)
        self._day, self._industry = bars.day, bars.industry
        self.across = CrossSection(bars.stock, bars.day, len(bars.stocks), len(bars.dates))
        self.index = _index(bars, self.across.mean(self.change))

    def market(self, values: np.ndarray) -> np.ndarray:
        """[N] from [T], a value a market day."""
        return values[self._day]

    def others(self, x: np.ndarray) -> np.ndarray:
        """The mean over the other stocks of the industry that day."""
        return self.across.others_mean(x, self._industry)

    def surge(self, days: int) -> np.ndarray:
        """The volume against its mean of the days before."""
        return ratio(self.volume, self.roll.before(self.roll.mean(self.volume, days), 1))

    def position(self, days: int) -> np.ndarray:
        """Where between low and high the close is."""
        low, high = self.roll.min(self.low, days), self.roll.max(self.high, days)
        return ratio(self.close - low, high - low)

    def true_range(self) -> np.ndarray:
        """Wilder's, over the close before; where that is not known, of the day alone."""
        top, bottom = np.fmax(self.high, self.pre_close), np.fmin(self.low, self.pre_close)
        return top / bottom - 1


def _is_up(x: np.ndarray) -> np.ndarray:
    """1 above 0, else 0; NaN where unknown."""
    return np.where(np.isnan(x), np.nan, x > 0)


def _index(bars: Bars, mean_change: np.ndarray) -> _Line:
    """The market's course [T]: the index, else the stocks' equal-weighted mean."""
    roll = Rolling(np.zeros(len(bars.dates), np.int32))
    if bars.market_close is None:
        return _Line(roll, np.cumprod(1 + np.nan_to_num(mean_change)), mean_change)
    close = np.asarray(bars.market_close, dtype=np.float64)
    if close.shape != bars.dates.shape:
        raise InputError(f"index: expected a value for each of {len(bars.dates)} market days, got {len(close)}")
    missing = np.flatnonzero(~np.isfinite(close))
    if len(missing):
        raise InputError(
            f"index: expected a value for every market day, got none on {len(missing)}, the first "
            f"{bars.dates[missing[0]]}; complete the file, or leave `index` out for the mean of all stocks"
        )
    return _Line(roll, close, close / roll.before(close, 1) - 1)


_FORMULAS: dict[str, dict[str, Callable[[_Panel], np.ndarray]]] = {
    "trend": {
        "ma5": lambda p: p.ma(5),
        "ma10": lambda p: p.ma(10),
        "ma20": lambda p: p.ma(20),
    },
    "momentum": {
        "momentum_5": lambda p: p.momentum(5),
        "momentum_10": lambda p: p.momentum(10),
        "momentum_20": lambda p: p.momentum(20),
        "momentum_60": lambda p: p.momentum(60),
        "rsi": lambda p: p.roll.rsi(p.close, _RSI_PERIOD),
    },
    "volatility": {
        "volatility_10": lambda p: p.volatility(10),
        "volatility_20": lambda p: p.volatility(20),
    },
    "volume": {
        "volume_ratio": lambda p: p.surge(5),
        "volume_ratio_20": lambda p: p.surge(20),
        "volume_trend": lambda p: ratio(p.roll.mean(p.volume, 5), p.roll.mean(p.volume, 60)),
        "price_volume_20": lambda p: p.roll.correlation(p.close, p.volume, 20),
    },
    "range": {
        "true_range_14": lambda p: p.roll.mean(p.true_range(), 14),
        "position_20": lambda p: p.position(20),
    },
    "market": {
        "market_pct_chg": lambda p: p.market(p.index.change),
        "market_ma20": lambda p: p.market(p.index.ma(20)),
    },
    "breadth": {
        "breadth_ma20": lambda p: p.market(p.across.mean(_is_up(p.ma(20)))),
        "breadth_return_5": lambda p: p.market(p.index.roll.mean(p.across.mean(p.change), 5)),
    },
    "industry": {
        "industry_momentum_1": lambda p: p.others(p.change),
        "industry_excess_20": lambda p: p.momentum(20) - p.others(p.momentum(20)),
    },
    "rank": {
        "rank_momentum_1": lambda p: p.across.rank(p.change),
        "rank_momentum_5": lambda p: p.across.rank(p.momentum(5)),
        "rank_volatility_60": lambda p: p.across.rank(p.volatility(60)),
        "rank_volume_ratio": lambda p: p.across.rank(p.surge(20)),
    },
}
# What the features tell of, for experiments that leave a group out; every feature is in exactly one.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({group: tuple(of) for group, of in _FORMULAS.items()})
# Groups whose features are the same for all stocks of a day.
EVERYWHERE: tuple[str, ...] = ("market", "breadth")
