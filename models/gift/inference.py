"""The trained model outside its study: predictions of a role, an exported folder, and new rows scored from it.

    <folder>/model.json             trainer, configuration, columns, encoders, scale of the targets
    <folder>/weights.safetensors    the network, and the quantiles that its piecewise-linear bins come from

Nothing in the folder is a path, and nothing is unpickled. A row is encoded by what train knew: a missing number is
train's mean (with the column's indicator set where train had gaps), and a level that is missing, or that train had
not or hardly seen, is the unknown one. Numbers that are none, or infinite, are refused by file, row and column.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from models import checkpoint as checkpoints
from models.exported import read_content, reading, refuse_other_versions, refuse_used, write_content
from models.gift import features, kuailive, table
from models.gift import model as models_of
from models.gift.ablation import MISSING
from models.gift.data import Categories, GiftData, GiftDataset
from models.gift.model import WEIGHTS, Model, below, outputs
from models.gift.preparation import PREPARATION_VERSION, NumericEncoder
from models.gift.tensors import on_device
from models.gift.trainer import GiftConfig
from models.trainer import InputError, Predictions, Role, ScoredRows

FORMAT = 1
TENSORS = "weights.safetensors"
KEYS = ("user_id", "live_id", "streamer_id", "timestamp")  # of a KuaiLive click
_QUANTILES = "quantiles"
_log = logging.getLogger("models.gift")


def predict(checkpoint: Path, data: GiftDataset, role: Role, device: str) -> Predictions:
    """See `GiftTrainer.predict`."""
    model = models_of.load(checkpoint, data, device)
    rows = on_device(data, role, torch.device(device))
    return model.predictions(outputs(model.network, rows.numeric, rows.codes))


# ---------------------------------------------------------------------------------------------- the folder


def export(checkpoint: Path, data: GiftDataset, folder: Path) -> None:
    """See `GiftTrainer.export`.

    Raises:
        InputError: the checkpoint is damaged, or of other tasks than the data; the folder is not an empty one.
    """
    refuse_used(folder)
    found = checkpoints.load(checkpoint)
    statistics = data.statistics
    content = {
        "format": FORMAT,
        "trainer": "gift",
        "data_hash": data.manifest.data_hash,
        "versions": _versions(data.options),
        "step": found.best_step,
        "config": found.state["config"],
        "data": data.options.model_dump(mode="json", exclude={"path", "simulate"}),
        "numeric": statistics["numeric"] | {"names": list(data.numeric_names)},
        "levels": statistics["levels"],
        "target_mean": dict(data.target_mean),
        "target_std": dict(data.target_std),
    }
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in below(WEIGHTS, found.load_best()).items()}
    tensors[_QUANTILES] = torch.from_numpy(np.array(data.quantiles, np.float32))
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    write_content(folder, content)


def _versions(options: GiftData) -> dict[str, int]:
    """Versions of the rules that turn a row into numbers."""
    if options.source == "table":
        return {"preparation": PREPARATION_VERSION, "reader": table.READER_VERSION}
    return {"preparation": PREPARATION_VERSION, "features": features.FEATURES_VERSION}


@dataclass(frozen=True)
class Exported:
    """A model folder, read: the options that name its columns, its encoders and the model itself."""

    folder: Path
    options: GiftData
    numeric_names: tuple[str, ...]
    numeric: NumericEncoder
    levels: Mapping[str, Mapping[str, int]]
    model: Model

    def lookups(self, categorical: Mapping[str, Categories]) -> dict[str, np.ndarray]:
        """Column -> [L + 1] int32: the code of each level, with that of a missing one (-1) at the end."""
        return {
            name: np.array([*(known.get(level, 0) for level in categorical[name].levels), 0], np.int32)
            for name, known in self.levels.items()
        }

    def encoded(self, numeric: np.ndarray) -> np.ndarray:
        """[n, D] raw -> [n, D'] as in training; not finite where a number is too large for train's scale."""
        return self.numeric(numeric)

    def predictions(self, numeric: np.ndarray, codes: np.ndarray) -> Predictions:
        """Scores of encoded rows."""
        device = self.model.device
        rows = torch.from_numpy(numeric).to(device), torch.from_numpy(codes).to(device)
        return self.model.predictions(outputs(self.model.network, *rows))


def read_model(folder: Path, device: str) -> Exported:
    """The model in an exported folder.

    Raises:
        InputError: no such folder, a file is missing or damaged, or of another format, trainer or version.
    """
    content = read_content(folder, "gift", FORMAT)
    with reading(folder):
        options = GiftData.model_validate({**content["data"], "path": "."})
        config = GiftConfig.model_validate(content["config"])
        refuse_other_versions(folder, content["versions"], _versions(options))
        numeric = content["numeric"]
        names = tuple(numeric["names"])
        encoder = _encoder(numeric, names)
        levels = {name: {level: i for i, level in enumerate(kept, 1)} for name, kept in content["levels"].items()}
        targets = content["target_mean"], content["target_std"]
        tensors = _tensors(folder / TENSORS)
        cardinalities = [len(known) + 1 for known in levels.values()]
        quantiles = tensors[_QUANTILES].numpy()
        model = models_of.build(config, options.task_list(), cardinalities, quantiles, targets, tensors, "cpu")
    model.network.to(device)
    return Exported(folder, options, names[: len(encoder.mean)], encoder, levels, model)


def _encoder(numeric: Mapping[str, Any], names: tuple[str, ...]) -> NumericEncoder:
    mean = np.array(numeric["mean"], np.float64)
    raw, indicators = names[: len(mean)], names[len(mean) :]
    return NumericEncoder(
        compressed=np.array(numeric["compressed"], bool),
        mean=mean,
        inverse_std=np.array(numeric["inverse_std"], np.float64),
        indicators=np.array([raw.index(name.removesuffix(MISSING)) for name in indicators], np.int64),
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected the weights of the model, got none; export the model again") from error
    except SafetensorError as error:
        raise InputError(f"{path}: expected safetensors, got a damaged file; export the model again") from error


# ---------------------------------------------------------------------------------------------- new rows


def score(folder: Path, source: Path, device: str, batch_rows: int) -> Iterator[ScoredRows]:
    """Batches of `batch_rows` scored rows (the last may be smaller), in the order of a table; a row has the same
    scores, to the bit, whatever its batch.

    A table needs the feature columns alone, and memory is that of some batches however long it is; it has no keys.
    Of KuaiLive the whole folder is read, since the features of a click are the past of all others, and memory is
    that of preparing it; rows come in the order of (timestamp, user, live, streamer), which are their keys. Levels
    unknown to the model are counted in one line of the log at the end.

    Raises:
        InputError: no model or source, or damaged; a missing column; a value that is no finite number where one is
            expected (with file, row and column); a table without rows.
    """
    if batch_rows < 1:
        raise InputError(f"batch_rows: expected at least 1, got {batch_rows}")
    model = read_model(folder, device)
    if model.options.source == "table":
        return _score_table(model, table.table_file(source), batch_rows)
    return _score_kuailive(model, source, batch_rows)


def _score_table(model: Exported, file: Path, batch_rows: int) -> Iterator[ScoredRows]:
    unknown: Counter[str] = Counter()
    n_scored = 0
    for batch in table.stream_features(file, model.options, batch_rows):
        numeric = model.encoded(batch.numeric)
        if not np.isfinite(numeric).all():
            row, column = np.argwhere(~np.isfinite(numeric))[0]
            batch.place.refuse(int(row), model.numeric_names[column], "expected a number of train's magnitude",
                               f"{batch.numeric[row, column]:g}")  # fmt: skip
        codes = _codes(model.lookups(batch.categorical), batch.categorical, slice(None), len(numeric), unknown)
        yield ScoredRows(n_scored, batch.n_rows, {}, model.predictions(numeric, codes))
        n_scored += len(numeric)
    _tell(file, n_scored, unknown)


def _score_kuailive(model: Exported, source: Path, batch_rows: int) -> Iterator[ScoredRows]:
    snapshot = model.options.snapshot_features
    frames, _ = kuailive.read_frames(source, snapshot)
    numeric, names, categorical = features.build(frames, snapshot)
    lookups = model.lookups(categorical)
    keys = {name: frames["click"][name].to_numpy() for name in KEYS}
    del frames
    unknown: Counter[str] = Counter()
    n_rows = len(numeric)
    for start in range(0, n_rows, batch_rows):
        rows = slice(start, min(start + batch_rows, n_rows))
        block = model.encoded(numeric[rows])
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise InputError(
                f"{source}: feature {names[column]} of row {start + row + 1}: expected a number of train's "
                f"magnitude, got {numeric[start + row, column]:g}"
            )
        codes = _codes(lookups, categorical, rows, len(block), unknown)
        found = {name: values[rows] for name, values in keys.items()}
        yield ScoredRows(start, n_rows, found, model.predictions(block, codes))
    _tell(source, n_rows, unknown)


def _codes(
    lookups: Mapping[str, np.ndarray],
    categorical: Mapping[str, Categories],
    rows: slice,
    n_rows: int,
    unknown: Counter[str],
) -> np.ndarray:
    """[n, C] int32; adds to `unknown` how many rows have a level that is there but not known."""
    found = np.empty((n_rows, len(lookups)), np.int32)
    for column, (name, lookup) in enumerate(lookups.items()):
        raw = categorical[name].codes[rows]
        found[:, column] = lookup[raw]
        unknown[name] += int(((found[:, column] == 0) & (raw >= 0)).sum())
    return found


def _tell(source: Path, n_rows: int, unknown: Counter[str]) -> None:
    told = ", ".join(f"{name} {count}" for name, count in unknown.most_common() if count) or "none"
    _log.info(
        "%s: %d rows scored; levels unknown to the model: %s", source.name, n_rows, told,
        extra={"action": "scored", "path": str(source)},
    )  # fmt: skip
