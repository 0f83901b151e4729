"""The stock trainer: features against pandas, blocks against a model that is loaded again, and a bar to beat.

    python benchmarks/stock.py [--stocks 400] [--days 1264]
    python benchmarks/stock.py --data FOLDER [--study configs/stock.yaml] [--config BEST.json]

CPU time of one thread (set OMP_NUM_THREADS=1). Without data a random market of that size: all features of every bar
beside the sketch's nine as pandas' `groupby` and `rolling` make them; a block of 50 rounds at the start and at the
end of a chain of 1,000, beside a booster that is loaded and trained on.

With the study's data: what gradient boosting makes of 14 plain features of each bar's own stock, trained until
the end of 2021 and asked of the days after it, beside the configuration of `--config` (the output of `tuner best
--format json`; the study's default without) on several sets of features and the same days. Rounds are those that
were best on the last tenth of the training days; then it is trained again on all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost as xgb
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from models.stock import boosting, features
from models.stock.bars import Bars, read
from models.stock.data import StockData
from models.stock.labels import outcomes
from models.stock.trainer import BoosterConfig, StockConfig
from tuner.spec_checks import load_spec

FIRST_TEST_DAY = 20220101
ROUNDS = 50


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def random_market(n_stocks: int, n_days: int, seed: int = 0) -> Bars:
    """A bar for every stock and day; an index and industries of ten."""
    rng = np.random.default_rng(seed)
    shape = (n_stocks, n_days)
    change = 0.02 * rng.standard_normal(shape) + 0.008 * rng.standard_normal(n_days)
    close = 10.0 * np.exp(np.cumsum(change, axis=1))
    spread = np.exp(0.01 * np.abs(rng.standard_normal(shape)))
    prices = {"close": close, "high": close * spread, "low": close / spread, "open": close / np.sqrt(spread)}
    prices["pre_close"] = close / np.exp(change)
    prices["volume"] = rng.lognormal(10.0, 0.5, shape)
    prices["amount"] = prices["volume"] * close
    day = pd.bdate_range("2018-01-02", periods=n_days).strftime("%Y%m%d").astype(np.int32)
    return Bars(
        stocks=tuple(f"{i:06d}" for i in range(n_stocks)),
        dates=np.asarray(day, np.int32),
        stock=np.repeat(np.arange(n_stocks, dtype=np.int32), n_days),
        day=np.tile(np.arange(n_days, dtype=np.int32), n_stocks),
        industry=(np.arange(n_stocks) % max(n_stocks // 10, 1)).astype(np.int32),
        industries=tuple(f"industry {i}" for i in range(max(n_stocks // 10, 1))),
        market_close=3000.0 * np.exp(np.cumsum(change.mean(0))),
        facts={},
        **{name: values.ravel().astype(np.float32) for name, values in prices.items()},
    )


def pandas_nine(bars: Bars) -> pd.DataFrame:
    """The sketch's nine features as one writes them down in pandas."""
    close = pd.Series(bars.close.astype(np.float64)).groupby(bars.stock)
    volume = pd.Series(bars.volume.astype(np.float64)).groupby(bars.stock)
    last, change = close.obj, close.pct_change()
    gain, loss = change.clip(lower=0.0), -change.clip(upper=0.0)
    smooth = [x.groupby(bars.stock).transform(lambda s: s.ewm(alpha=1 / 14).mean()) for x in (gain, loss)]
    market = pd.Series(bars.market_close).pct_change()
    found = {"market_pct_chg": market.to_numpy()[bars.day]}
    found |= {f"ma{w}": last / close.transform(lambda s, w=w: s.rolling(w).mean()) - 1 for w in (5, 10, 20)}
    found |= {f"momentum_{w}": close.pct_change(w) for w in (5, 10)}
    found["volatility_10"] = change.groupby(bars.stock).transform(lambda s: s.rolling(10).std())
    found["volume_ratio"] = volume.obj / volume.transform(lambda s: s.shift(1).rolling(5).mean())
    found["rsi"] = 100.0 * smooth[0] / (smooth[0] + smooth[1])
    return pd.DataFrame(found).astype(np.float32)


def compare_features(bars: Bars) -> None:
    ours, built = cpu_s(lambda: features.build(bars))
    theirs, nine = cpu_s(lambda: pandas_nine(bars))
    d = built.shape[1]
    print(f"features of {len(bars):,} bars: {ours:.2f} s for {d} ({len(bars) * d / ours / 1e6:.0f} M values/s);")
    ratio = theirs / nine.shape[1] / (ours / d)
    print(f"  pandas {theirs:.2f} s for {nine.shape[1]}: {ratio:.1f} times as long a feature")


def compare_blocks(bars: Bars) -> None:
    """CPU seconds of a block of ROUNDS at the 1st, 10th and 20th place, and the bytes that its bins hold."""
    built = features.build(bars)
    labels = (np.random.default_rng(1).random(len(bars)) < 0.27).astype(np.float32)
    told = boosting.parameters(BoosterConfig(learning_rate=0.05), 0.27, 1, "cpu")
    matrix = boosting.binned(built, labels, features.names(), told["max_bin"])
    margins, blocks = boosting.first_margins(told, len(labels)), []
    print(f"a block of {ROUNDS} rounds on {len(labels):,} rows x {built.shape[1]} features, CPU s:")
    print("  place, in a chain, loaded again")
    for place in range(1, 21):
        ours, (block, margins) = cpu_s(lambda m=margins: boosting.train_block(told, matrix, m, ROUNDS))
        if place in (1, 10, 20):
            theirs, _ = cpu_s(lambda: reloaded(told, matrix, blocks))
            print(f"  {place:2}: {ours:6.2f} {theirs:6.2f}  ({theirs / ours:.2f} times)")
        blocks.append(block)


def reloaded(told: dict[str, Any], matrix: xgb.QuantileDMatrix, blocks: list[bytes]) -> None:
    """The same block trained on from all trees so far."""
    matrix.set_base_margin(np.empty(0, np.float32))
    booster = xgb.Booster(told, cache=[matrix])
    if blocks:
        booster.load_model(bytearray(boosting.merge(blocks)))
        booster.set_param(told)
    for iteration in range(ROUNDS):
        booster.update(matrix, len(blocks) * ROUNDS + iteration)


# ---- the bar


def plain_14(bars: Bars) -> pd.DataFrame:
    """What anybody would begin with: the stock's own returns, averages, volatility, volume and range."""
    close = pd.Series(bars.close.astype(np.float64)).groupby(bars.stock)
    volume = pd.Series(bars.volume.astype(np.float64)).groupby(bars.stock)
    last, change = close.obj, close.pct_change()
    found = {f"return_{w}": close.pct_change(w) for w in (1, 3, 5, 10, 20)}
    found |= {f"ma_{w}": last / close.transform(lambda s, w=w: s.rolling(w).mean()) - 1 for w in (5, 10, 20, 60)}
    found |= {f"std_{w}": change.groupby(bars.stock).transform(lambda s, w=w: s.rolling(w).std()) for w in (5, 20)}
    found["volume_ratio"] = volume.obj / volume.transform(lambda s: s.rolling(20).mean())
    found["range"] = (bars.high - bars.low) / bars.close
    found["place"] = (bars.close - bars.low) / np.maximum(bars.high - bars.low, 1e-9)
    return pd.DataFrame(found).astype(np.float32)


def bar(folder: Path, study: str, best: Path | None) -> None:
    spec = load_spec(study)
    options = StockData.model_validate({**spec.data, "path": folder})
    default = tuned = StockConfig.model_validate(spec.config)
    if best is not None:
        tuned = StockConfig.model_validate(json.loads(best.read_text())["trial"]["config"])
    bars = read(folder, options)
    outcome = outcomes(bars, options.label, options.universe)
    known = np.isfinite(outcome.label) & outcome.tradable
    first_day = int(np.searchsorted(bars.dates, FIRST_TEST_DAY))
    train, test = known & (outcome.label_end < first_day), known & (bars.day >= first_day)
    early, late = known & (outcome.label_end < first_day * 9 // 10), train & (bars.day >= first_day * 9 // 10)
    y = outcome.label
    print(f"train {train.sum():,} rows until 2021, test {test.sum():,} rows, {y[test].mean():.3f} of them rise")
    print("ROC-AUC on test (95 %, over days), its mean within days, precision of the best 1 %, their days")
    naive, built = plain_14(bars).to_numpy(), features.build(bars)
    model = HistGradientBoostingClassifier(random_state=0).fit(naive[train], y[train])
    tell("14 plain, scikit-learn", y[test], model.predict_proba(naive[test])[:, 1], bars.day[test])
    everywhere = {name for group in features.EVERYWHERE for name in features.GROUPS[group]}
    own = [column for column, name in enumerate(features.names()) if name not in everywhere]
    asked = {
        "14 plain, tuned": (naive, tuned),
        "9 of the sketch, tuned": (np.ascontiguousarray(built[:, : len(features.SEED)]), tuned),
        f"{built.shape[1]}, default": (built, default),
        f"{built.shape[1]}, tuned": (built, tuned),
        f"{len(own)} within a day, tuned": (np.ascontiguousarray(built[:, own]), tuned),
    }
    for name, (x, config) in asked.items():
        n_blocks = best_blocks(config, x, y, early, late)
        margins = chained(config, x[train], y[train], x[test], n_blocks)[-1]
        tell(f"{name}, {n_blocks * config.training.checkpoint_every} rounds", y[test], margins, bars.day[test])


def best_blocks(config: StockConfig, built: np.ndarray, y: np.ndarray, train: np.ndarray, valid: np.ndarray) -> int:
    every = -(-config.training.max_rounds // config.training.checkpoint_every)
    found = chained(config, built[train], y[train], built[valid], every)
    return int(np.argmax([roc_auc_score(y[valid], margins) for margins in found])) + 1


def chained(
    config: StockConfig, x: np.ndarray, y: np.ndarray, asked: np.ndarray, n_blocks: int
) -> list[np.ndarray]:
    """Margins of `asked` after every block of a chain trained on `x`."""
    names = [str(i) for i in range(x.shape[1])]
    matrix, rate = boosting.binned(x, y, names, config.booster.max_bin), float(y.mean(dtype=np.float64))
    found, margins, after = [], None, None
    for i in range(n_blocks):
        told = boosting.parameters(config.booster, rate, boosting.block_seed(42, 0, i), "cpu")
        margins = boosting.first_margins(told, len(x)) if margins is None else margins
        block, margins = boosting.train_block(told, matrix, margins, config.training.checkpoint_every)
        after = boosting.advance(block, asked, after)
        found.append(after)
    return found


def tell(name: str, y: np.ndarray, scores: np.ndarray, day: np.ndarray) -> None:
    """One line of the table; the interval is that of a bootstrap over days."""
    rng, days = np.random.default_rng(0), np.unique(day)
    rows = [np.flatnonzero(day == d) for d in days]
    drawn = (np.concatenate([rows[i] for i in rng.integers(0, len(days), len(days))]) for _ in range(200))
    low, high = np.quantile([roc_auc_score(y[r], scores[r]) for r in drawn], [0.025, 0.975])
    within = np.mean([roc_auc_score(y[r], scores[r]) for r in rows if 0 < y[r].sum() < len(r)])
    best = np.argsort(-scores, kind="stable")[: len(scores) // 100]
    print(f"  {name:44} {roc_auc_score(y, scores):.4f} ({low:.4f} to {high:.4f})  {within:.4f}  "
          f"{y[best].mean():.3f} {len(np.unique(day[best])):4}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stocks", type=int, default=400)
    parser.add_argument("--days", type=int, default=1264)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--study", default="configs/stock.yaml")
    parser.add_argument("--config", type=Path)
    given = parser.parse_args()
    if given.data is not None:
        bar(given.data, given.study, given.config)
        return
    bars = random_market(given.stocks, given.days)
    compare_features(bars)
    compare_blocks(bars)


if __name__ == "__main__":
    main()
