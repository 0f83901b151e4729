"""The data of the stock model: what the specification says, and what the trainer gets.

Nothing here imports torch or xgboost: the coordinator of a search runs this code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from models import prepared
from models.trainer import ROLES, DataSpec, FrozenModel, InputError, Manifest, Role

if TYPE_CHECKING:
    from models.stock.origin import Origin

log = logging.getLogger(__name__)

TASK = "rise"  # the one task: does the stock rise enough within the horizon?

Column = Annotated[str, Field(min_length=1)]
Limit = float | None | dict[date, float | None]


class BarColumns(FrozenModel):
    """What the columns of the bars are called; Tushare's names by default.

    Optional ones are null where the files have none: `symbol` in a folder with a CSV file a stock, whose names then
    are the symbols. With `adjusted_close` all prices of a bar are multiplied by
    adjusted_close / close.
    """

    symbol: Column | None = "ts_code"
    date: Column = "trade_date"
    open: Column = "open"
    high: Column = "high"
    low: Column = "low"
    close: Column = "close"
    volume: Column = "vol"
    pre_close: Column | None = "pre_close"
    amount: Column | None = "amount"
    adjusted_close: Column | None = None

    @model_validator(mode="after")
    def _distinct(self) -> BarColumns:
        columns = list(self.given().values())
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise ValueError(f"expected a column of its own for each, got {', '.join(twice)} twice")
        return self

    def given(self) -> dict[str, str]:
        """What is read -> the column that holds it, without what the files have not."""
        return {name: column for name, column in self.model_dump().items() if column is not None}


class Market(FrozenModel):
    """The file of the market's index and its columns."""

    file: Column
    date: Column = "date"
    close: Column = "close"


class Listing(FrozenModel):
    """The table of stocks: which industry each is of.

    `prefix` is what stands before a symbol in this table and not in the bars (`$XOM`).
    """

    file: Column
    symbol: Column = "ts_code"
    industry: Column = "industry"
    prefix: str = ""


class Label(FrozenModel):
    """What a rise is: the best `exit` price of the market days t + first .. t + last is at least `min_return` above
    the entry price, the close of t or the open of t + 1."""

    entry: Literal["close", "next_open"] = "close"
    exit: Literal["close", "high"] = "close"
    first: int = Field(default=3, ge=1)
    last: int = Field(default=5, ge=1, le=60)
    min_return: float = Field(default=0.04, gt=0.0, lt=10.0)

    @model_validator(mode="after")
    def _ordered(self) -> Label:
        if self.first > self.last:
            raise ValueError(f"first: expected at most last ({self.last}), got {self.first}")
        return self


class Universe(FrozenModel):
    """Which bars may be entries.

    Args:
        n_stocks: of the stocks that have a bar in the first year, at most so many, drawn by a hash of symbol and
            `seed`, which knows nothing of their future; null for all stocks.
        min_history: bars of a stock before one that counts, and so without its first days of listing.
        start, end: bars outside are not read; null for all.
        limit_up: a bar that closes at its high with a rise of at least this share could not be bought, nor one that
            opens with it where the entry is the next open; by prefix of the symbol, `default` for all others, null
            where there is no limit. One that changed is a limit by its first day.
    """

    n_stocks: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)
    min_history: int = Field(default=60, ge=20)
    start: date | None = None
    end: date | None = None
    limit_up: dict[str, Limit] = Field(default_factory=lambda: {"default": None})

    @model_validator(mode="after")
    def _consistent(self) -> Universe:
        if self.start is not None and self.end is not None and self.start > self.end:
            raise ValueError(f"start: expected a day up to end ({self.end}), got {self.start}")
        if "default" not in self.limit_up:
            raise ValueError("limit_up: expected an entry `default` (null: no limit), got none")
        for key, limit in self.limit_up.items():
            for share in limit.values() if isinstance(limit, Mapping) else [limit]:
                if share is not None and not 0 < share < 1:
                    raise ValueError(
                        f"limit_up.{key}: expected a share between 0 and 1 such as 0.10, or null, got {share:g}"
                    )
        return self


class Split(FrozenModel):
    """How market days get their role: by shares of the days, or by the first day of each role but train.

    A bar whose label's window, and `embargo` days more, is not over before the next role begins has no role: so no
    label knows of a day that another role is about. With `folds` > 1 valid is cut into so many parts of
    equal length; the model of fold i is trained on train and the parts before it, purged alike, and measured on
    part i. The last fold's model is the one that goes on to calibrate and test.
    """

    train: float | None = 0.60
    valid: float | date = 0.10
    calibrate: float | date = 0.10
    test: float | date = 0.20
    embargo: int = Field(default=0, ge=0, le=250)
    folds: int = Field(default=1, ge=1, le=20)

    @model_validator(mode="before")
    @classmethod
    def _train_is_what_lies_before(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "train" not in values:
            later = [values.get(role) for role in ROLES[1:]]
            return {**values, "train": None} if any(isinstance(day, str | date) for day in later) else values
        return values

    @model_validator(mode="after")
    def _one_form(self) -> Split:
        given = {role: getattr(self, role) for role in ROLES}
        days = {role: day for role, day in given.items() if isinstance(day, date)}
        shares = {role: share for role, share in given.items() if isinstance(share, float)}
        wrong = {role: share for role, share in shares.items() if not 0.0 < share < 1.0}
        if wrong:
            role, share = next(iter(wrong.items()))
            raise ValueError(f"{role}: expected a share between 0 and 1 or a day such as 2021-01-04, got {share:g}")
        if days and (shares or len(days) < 3):
            raise ValueError(
                "expected shares of all four roles, or the first days of valid, calibrate and test and no share, "
                f"got first days of {', '.join(days)} and shares of {', '.join(shares) or 'none'}"
            )
        if days and not days["valid"] < days["calibrate"] < days["test"]:
            shown = ", ".join(map(str, days.values()))
            raise ValueError(f"expected first days of valid, calibrate and test in their order, got {shown}")
        if not days and abs(sum(shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"train + valid + calibrate + test: expected 1, got {sum(shares.values()):g}")
        return self


class StockData(FrozenModel):
    """The `data` section of a specification.

    `bars` is a parquet or CSV file in the folder, or a sub-folder with a CSV file a stock. Without an `index` the
    equal-weighted mean of all stocks is the market.
    """

    path: Path
    bars: Column = "daily.parquet"
    columns: BarColumns = BarColumns()
    index: Market | None = None
    listing: Listing | None = None
    label: Label = Label()
    universe: Universe = Universe()
    split: Split = Split()

    @model_validator(mode="after")
    def _inside_the_folder(self) -> StockData:
        files = {"bars": self.bars, "index.file": self.index and self.index.file}
        files |= {"listing.file": self.listing and self.listing.file}
        for name, file in files.items():
            if file is not None and (Path(file).is_absolute() or ".." in Path(file).parts):
                raise ValueError(f"{name}: expected a name inside data.path, got {file!r}")
        return self


@dataclass(frozen=True)
class Part:
    """One opened role, memory-mapped read-only, sorted by (day, stock).

    Shape:
        features: [N, D] float32, NaN where unknown. labels: [N] float32, 0 or 1, all known.
        day, stock: [N] int32, indexes into the dataset's `dates` and `stocks`.
        label_end: [N] int32, the last day of the label's window. row: [N] int64, the row's number in `score`.
    """

    features: np.ndarray
    labels: np.ndarray
    day: np.ndarray
    stock: np.ndarray
    label_end: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class StockDataset:
    """A prepared dataset with some roles opened.

    `statistics` is all that preparation found out, as JSON; of it `feature_mean` and `feature_std` [D] are those of
    train, `base_rate` its share of positives, `roles` counts and days by role.
    """

    manifest: Manifest
    options: StockData
    statistics: Mapping[str, Any]
    feature_names: tuple[str, ...]
    dates: np.ndarray
    stocks: tuple[str, ...]
    parts: Mapping[Role, Part]

    def part(self, role: Role) -> Part:
        """The arrays of `role`. Raises KeyError where it was not asked for when the dataset was loaded."""
        if role not in self.parts:
            raise KeyError(f"role {role} was not opened (opened: {', '.join(self.parts)})")
        return self.parts[role]


def load(data: DataSpec, roles: frozenset[Role]) -> StockDataset:
    """Prepares the data once (content-addressed, under a lock) and opens only `roles`.

    Raises:
        InputError: missing or malformed input; a role of `roles`, or a fold of an opened valid, without rows or
            without both values of the label.
        DiskError: the cache's disk is full or read-only.
    """
    from models.stock.origin import find_origin  # it and what it knows import this module's types

    return open_roles(data, find_origin(data), roles)


def open_roles(data: DataSpec, origin: Origin, roles: frozenset[Role]) -> StockDataset:
    """As `load`, of data identified before."""
    from models.stock.origin import VERSIONS
    from models.stock.split import folds

    folder = prepare(data, origin, roles, usable=roles)
    statistics = read_statistics(folder)
    refuse_unusable(statistics["roles"], roles)
    found = StockDataset(
        manifest=Manifest(
            data_hash=origin.data_hash,
            source=origin.source,
            simulated=False,
            rows={role: statistics["roles"][role]["rows"] for role in ROLES},
            files=origin.stamps,
            preparation=VERSIONS,
        ),
        options=data.options,
        statistics=statistics,
        feature_names=tuple(statistics["feature_names"]),
        dates=np.load(folder / "dates.npy", allow_pickle=False),
        stocks=tuple(statistics["stocks"]),
        parts={role: open_part(folder / role) for role in ROLES if role in roles},
    )
    if "valid" in roles:
        folds(found.part("valid"), found.dates, data.options.split)
    return found


def prepare(data: DataSpec, origin: Origin, roles: frozenset[Role], usable: frozenset[Role]) -> Path:
    """The prepared folder of `origin`, complete for `roles`. Nothing is kept where one of `usable` is not."""
    return prepared.prepare(data.cache, origin.data_hash[:16], partial(_build, data, origin, usable), roles)


def _build(data: DataSpec, origin: Origin, usable: frozenset[Role], folder: Path) -> None:
    from models.stock import bars, preparation
    from models.stock.origin import find_origin

    read = bars.read(origin.path, data.options)
    log.info(
        "%s: %d bars of %d stocks over %d days", origin.source, len(read), len(read.stocks), len(read.dates),
        extra={"action": "bars_read"},
    )  # fmt: skip
    preparation.write(folder, read, data.options)
    refuse_unusable(read_statistics(folder)["roles"], usable)
    prepared.refuse_changed(origin.path, origin.data_hash, find_origin(data).data_hash)
    log.info("data prepared: %s", origin.source, extra={"action": "prepared", "key": origin.data_hash[:16]})


def describe(data: DataSpec) -> dict[str, Any]:
    """Facts and checks about the data, as `{"tables": {...}, "checks": [...]}`. Opens every role."""
    from models.stock.description import describe as describe_all

    return describe_all(data)


def read_statistics(folder: Path) -> dict[str, Any]:
    """What preparation found out (`models.stock.preparation`)."""
    return json.loads((folder / "statistics.json").read_text())


def refuse_unusable(counts: Mapping[str, Any], roles: frozenset[Role]) -> None:
    """Raises InputError where one of `roles` has no rows, or lacks one of the label's values."""
    for role in (role for role in ROLES if role in roles):
        rows, positives = counts[role]["rows"], counts[role]["positives"]
        if not 0 < positives < rows:
            got = f"{positives} of {rows} rows positive" if rows else "no row"
            raise InputError(
                f"data.split: expected rows of both labels in role {role}, got {got}; change data.split, "
                "data.label.min_return or data.universe, or give more data"
            )


def open_part(folder: Path) -> Part:
    """The arrays in the folder of a role."""
    names = ("features", "labels", "day", "stock", "label_end", "row")
    return Part(**{name: prepared.open_array(folder / f"{name}.npy") for name in names})
