"""The trained model outside its study: predictions of a role, an exported folder, and new bars scored from it.

    <folder>/model.json    trainer, versions, configuration, features in order, how the source is read
    <folder>/model.ubj     the trees, a model that XGBoost itself loads

Damaged trees may end the whole process in XGBoost, so their SHA-256 stands in model.json and is asked first.

Nothing in the folder is a path, and nothing is unpickled. Everything is predicted on the CPU: a row has the same
margin, to the bit, in its study, from the folder and in any batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models import checkpoint as checkpoints
from models.exported import MODEL, read_content, reading, refuse_other_versions, refuse_used, write_content
from models.stock import bars as stock_bars
from models.stock import boosting, features, labels, matrices
from models.stock.data import TASK, StockData, StockDataset
from models.stock.fit import best_blocks
from models.stock.trainer import StockConfig
from models.trainer import Ablation, InputError, Predictions, Role, ScoredRows

FORMAT = 1
TREES = "model.ubj"


@dataclass(frozen=True)
class Stored:
    """The best step of a checkpoint: the blocks of every fold, and what they were trained with."""

    blocks: Sequence[Sequence[bytes]]
    config: StockConfig
    names: tuple[str, ...]

    @classmethod
    def of(cls, found: checkpoints.Checkpoint, data: StockDataset) -> Stored:
        """Raises InputError where the data are not those of the checkpoint."""
        names = tuple(found.state["features"])
        if found.state["data_hash"] != data.manifest.data_hash:
            raise InputError(
                f"{found.path}: expected a checkpoint of these data, got one of others; name the data it was "
                "trained on"
            )
        n_folds = found.state["n_folds"]
        if n_folds != data.options.split.folds:
            raise InputError(f"data.split.folds: expected the {n_folds} of {found.path}, got others; set them")
        return cls(best_blocks(found), StockConfig.model_validate(found.state["config"]), names)

    def margins(self, data: StockDataset, role: Role, numeric: np.ndarray) -> np.ndarray:
        """[N] float32 from the features [N, D] of a role: of valid by its folds, of another by the last."""
        if role != "valid":
            return boosting.chain(self.blocks[-1], numeric)
        parts = [fold.part for fold in matrices.folds(data)]
        scored = zip(self.blocks, parts, strict=True)
        return np.concatenate([boosting.chain(blocks, numeric[part]) for blocks, part in scored])


def predict(checkpoint: Path, data: StockDataset, role: Role) -> Predictions:
    """See `StockTrainer.predict`."""
    stored = Stored.of(checkpoints.load(checkpoint), data)
    numeric = matrices.columns(data, role, stored.names)
    return _predictions(stored.margins(data, role, numeric), stored.config)


def ablate(checkpoint: Path, data: StockDataset, role: Role) -> Iterator[Ablation]:
    """See `StockTrainer.ablate`. Holds one copy of the role's features. A mean and not a missing value stands for
    what is not known: where train had no gaps a missing value goes a way that means nothing."""
    stored = Stored.of(checkpoints.load(checkpoint), data)
    numeric = np.array(matrices.columns(data, role, stored.names))
    mean = dict(zip(data.feature_names, data.statistics["feature_mean"], strict=True))
    for group, members in features.GROUPS.items():
        places = [place for place, name in enumerate(stored.names) if name in members]
        if not places:
            continue
        kept = numeric[:, places]
        numeric[:, places] = np.array([mean[stored.names[place]] for place in places], np.float32)
        yield Ablation("group", group, stored.margins(data, role, numeric))
        numeric[:, places] = kept


def _predictions(margins: np.ndarray, config: StockConfig) -> Predictions:
    weight = config.booster.scale_pos_weight
    calibrated = {} if weight == 1.0 else {TASK: margins.astype(np.float64) - math.log(weight)}
    return Predictions({TASK: margins}, calibrated)


# ---------------------------------------------------------------------------------------------- the folder


def export(checkpoint: Path, data: StockDataset, folder: Path) -> None:
    """See `StockTrainer.export`.

    Raises:
        InputError: the checkpoint is damaged, or of other data; the folder is not an empty one.
    """
    refuse_used(folder)
    found = checkpoints.load(checkpoint)
    stored = Stored.of(found, data)
    trees = boosting.merge(stored.blocks[-1])
    content = {
        "format": FORMAT,
        "trainer": "stock",
        "data_hash": data.manifest.data_hash,
        "versions": _versions(),
        "step": found.best_step,
        "rounds": len(stored.blocks[-1]) * stored.config.training.checkpoint_every,
        "seed": found.state["seed"],
        "config": found.state["config"],
        "metrics": found.state["best_metrics"],
        "features": list(stored.names),
        "trees_sha256": hashlib.sha256(trees).hexdigest(),
        "data": data.options.model_dump(mode="json", exclude={"path"}),
    }
    (folder / TREES).write_bytes(trees)
    write_content(folder, content)


def _versions() -> dict[str, int]:
    """Versions of the rules that turn a bar into numbers."""
    return {
        "reader": stock_bars.READER_VERSION,
        "features": features.FEATURES_VERSION,
        "labels": labels.LABEL_VERSION,
    }


@dataclass(frozen=True)
class Exported:
    """A model folder, read. `trees` is UBJ; `places` [D] are the columns of its features among all features."""

    options: StockData
    config: StockConfig
    places: np.ndarray
    trees: bytes


def read_model(folder: Path) -> Exported:
    """The model in an exported folder.

    Raises:
        InputError: no such folder, a file is missing or damaged, or of another format, trainer or version.
    """
    content = read_content(folder, "stock", FORMAT)
    with reading(folder):
        refuse_other_versions(folder, content["versions"], _versions())
        known = features.names()
        return Exported(
            StockData.model_validate({**content["data"], "path": "."}),
            StockConfig.model_validate(content["config"]),
            np.array([known.index(name) for name in content["features"]]),
            _trees(folder / TREES, content["trees_sha256"]),
        )


def _trees(path: Path, sha256: str) -> bytes:
    try:
        trees = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected the trees of the model, got none; export it again") from error
    if sha256 != hashlib.sha256(trees).hexdigest():
        raise InputError(f"{path}: expected the trees of {MODEL}, got others; export the model again")
    return trees


# ---------------------------------------------------------------------------------------------- new bars


def score(folder: Path, source: Path, batch_rows: int) -> Iterator[ScoredRows]:
    """Batches of `batch_rows` scored bars (the last may be smaller) of all stocks, by day and then by stock.

    The source is read by the rules that are stored with the model, up to its last bar whatever `universe.end` said;
    no bar needs a label, so those of the last days are scored like all others. A feature may need the whole day of
    the market, so the source is read whole and memory grows with it. `tradable` among the keys says whether a bar
    could have been an entry.

    Raises:
        InputError: no model or source, or damaged, or bars that break the rules.
    """
    if batch_rows < 1:
        raise InputError(f"batch_rows: expected at least 1, got {batch_rows}")
    model = read_model(folder)
    return _score(model, source, batch_rows)


def _score(model: Exported, source: Path, batch_rows: int) -> Iterator[ScoredRows]:
    options = model.options
    universe = options.universe.model_copy(update={"end": None})
    bars = stock_bars.read(source, options.model_copy(update={"universe": universe}))
    tradable = labels.outcomes(bars, options.label, universe).tradable
    numeric, stocks = features.build(bars), np.array(bars.stocks)
    order = np.lexsort((bars.stock, bars.day))
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        block = np.ascontiguousarray(numeric[np.ix_(rows, model.places)])
        keys = {
            "symbol": stocks[bars.stock[rows]],
            "date": bars.dates[bars.day[rows]].astype(np.int64),
            "tradable": tradable[rows],
        }
        predictions = _predictions(boosting.advance(model.trees, block), model.config)
        yield ScoredRows(start, len(order), keys, predictions, time="date", eligible="tradable")
