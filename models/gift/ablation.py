"""What a model scores without a part of what it sees: a group of features, or one unit of its shared layer.

A numeric column is replaced by its mean on train and a categorical one by the code of unknown levels; a unit by its
mean on the rows scored. So nothing is drawn at random, and the same part is gone from every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.gift import features
from models.gift import model as models_of
from models.gift.data import GiftDataset
from models.gift.model import CHUNK_ROWS, Model, filled
from models.gift.tensors import RoleTensors, on_device
from models.trainer import Ablation, Role

MISSING = "__missing"  # ends the names of indicator columns


def ablate(checkpoint: Path, data: GiftDataset, role: Role, task: str, device: str) -> Iterator[Ablation]:
    """See `GiftTrainer.ablate`. Beside the data one shared representation of all rows is held in memory."""
    model = models_of.load(checkpoint, data, device)
    head = model.head(task)
    rows = on_device(data, role, torch.device(device))
    fill = torch.from_numpy(_means(data)).to(device)
    for name, (numeric, categorical) in groups(data).items():
        yield Ablation("group", name, _without_group(model, rows, head, fill, numeric, categorical))
    yield from _without_units(model, rows, head)


def groups(data: GiftDataset) -> dict[str, tuple[list[int], list[int]]]:
    """Group -> its numeric and its categorical columns. An indicator belongs to the column it tells of."""
    of_family = {name: family for family, names in features.families().items() for name in names}
    is_table = data.options.source == "table"
    n_raw = len(data.statistics["numeric"]["mean"])
    found: dict[str, tuple[list[int], list[int]]] = {}
    for kind, names in enumerate((data.numeric_names, data.categorical_names)):
        for column, name in enumerate(names):
            is_indicator = kind == 0 and column >= n_raw
            raw = name.removesuffix(MISSING) if is_indicator else name
            group = raw if is_table else of_family[raw]
            found.setdefault(group, ([], []))[kind].append(column)
    return found


def _means(data: GiftDataset) -> np.ndarray:
    """[D'] float32 mean of each numeric column on train: 0 where standardised, its share for an indicator."""
    means = np.zeros(len(data.numeric_names), np.float32)
    n_raw = len(data.statistics["numeric"]["mean"])
    means[n_raw:] = data.quantiles[:, n_raw:].mean(axis=0)  # of 0s and 1s, to one in 256
    return means


@torch.inference_mode()
def _without_group(
    model: Model, rows: RoleTensors, head: int, fill: Tensor, numeric: list[int], categorical: list[int]
) -> np.ndarray:
    found = []
    for x, codes in zip(rows.numeric.split(CHUNK_ROWS), rows.codes.split(CHUNK_ROWS), strict=True):
        x, codes = x.clone(), codes.clone()
        x[:, numeric] = fill[numeric]
        codes[:, categorical] = 0
        found.append(model.network(filled(x), filled(codes))[: len(x), head])
    return torch.cat(found).cpu().numpy()


@torch.inference_mode()
def _without_units(model: Model, rows: RoleTensors, head: int) -> Iterator[Ablation]:
    network = model.network
    shared = torch.cat(
        [
            network.features(filled(x), filled(codes))[: len(x)]
            for x, codes in zip(rows.numeric.split(CHUNK_ROWS), rows.codes.split(CHUNK_ROWS), strict=True)
        ]
    )
    mean = shared.double().mean(dim=0).float() if len(shared) else shared.new_zeros(shared.shape[1])
    # A unit enters the head's hidden layer through one column of its weights: what it adds there is exchanged.
    width = network.head_weight.shape[1]
    block = slice(head * width, (head + 1) * width)
    weight, bias = network.head_hidden.weight[block], network.head_hidden.bias[block]
    hidden = torch.cat([part @ weight.T for part in shared.split(CHUNK_ROWS)]) + bias
    for unit in range(shared.shape[1]):
        scores = [
            torch.addcmul(h, (mean[unit] - z[:, unit, None]), weight[:, unit]).relu_() @ network.head_weight[head]
            for h, z in zip(hidden.split(CHUNK_ROWS), shared.split(CHUNK_ROWS), strict=True)
        ]
        scores = torch.cat(scores) + network.head_bias[head]
        yield Ablation("unit", str(unit), scores.cpu().numpy())
