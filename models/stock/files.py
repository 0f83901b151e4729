"""The files of daily bars: which they are, and their columns as arrays."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.columns import Place, float32_numbers, levels, numbers, read_columns, refuse, refuse_missing
from models.stock.data import BarColumns, Listing, Market, StockData
from models.trainer import InputError

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
_NO_INDEX = "or leave data.index out: the equal-weighted mean of all stocks is the market then"
_NO_LISTING = "or leave data.listing out: no industry is known then"


@dataclass(frozen=True)
class BarFiles:
    """The files that options name, all below `folder`."""

    folder: Path
    bars: tuple[Path, ...]
    index: Path | None
    listing: Path | None

    def named(self) -> dict[str, Path]:
        """File by what it is for. A single file of bars has the same name whatever it is called."""
        named = {f"bars/{file.name}": file for file in self.bars} if len(self.bars) > 1 else {"bars": self.bars[0]}
        named |= {"index": self.index} if self.index is not None else {}
        return named | ({"listing": self.listing} if self.listing is not None else {})

    def shown(self) -> Path:
        """The file of the bars, or their folder."""
        return self.bars[0] if len(self.bars) == 1 else self.bars[0].parent


def find_files(path: Path, options: StockData) -> BarFiles:
    """The files of `options` in the folder `path`, which may also be the file of the bars; the others are then
    looked for beside it. Raises InputError where one is missing."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check data.path, or name it with --data")
    folder = path.parent if path.is_file() else path
    bars = path if path.is_file() else _existing(path / options.bars, "data.bars", "or name the folder with --data")
    index = options.index and _existing(folder / options.index.file, "data.index.file", _NO_INDEX)
    listing = options.listing and _existing(folder / options.listing.file, "data.listing.file", _NO_LISTING)
    if not bars.is_dir():
        return BarFiles(folder, (bars,), index, listing)
    files = sorted(file for file in bars.iterdir() if file.name.endswith(SUFFIXES[1:]) and file.is_file())
    if not files:
        raise InputError(f"{bars}: expected a CSV file a stock in this folder, got none; check data.bars")
    return BarFiles(folder, tuple(files), index, listing)


def _existing(file: Path, option: str, way_out: str) -> Path:
    if not file.exists():
        beside = sorted(other.name for other in file.parent.iterdir()) if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, 3, 0.5) or beside[:5]
        found = f"; {file.parent} has {', '.join(near)}" if near else ""
        raise InputError(
            f"{file}: expected the file that {option} names, got none{found}; "
            f"put it there, mend {option}, {way_out}"
        )
    if file.is_file() and not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: expected a file ending in {', '.join(SUFFIXES)}, got {file.name!r}")
    return file


@dataclass(frozen=True)
class RawBars:
    """What the files of bars say, row for row, unsorted and unchecked.

    Shape: `symbol` [N] int32, an index into `symbols`, which are sorted; `date` [N] int32 as 20180102;
    `values[name]` [N] float32 by the names of `BarColumns`, NaN where missing. `starts` is each file's first row.
    """

    files: tuple[Path, ...]
    starts: np.ndarray
    symbols: tuple[str, ...]
    symbol: np.ndarray
    date: np.ndarray
    values: Mapping[str, np.ndarray]

    def of_row(self, row: int) -> str:
        """Where the row lies."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return Place(self.files[file]).of_row(row - int(self.starts[file]))


def read_bars(files: Sequence[Path], columns: BarColumns) -> RawBars:
    """Raises InputError: an empty or malformed file, a missing column, a value that is none of its column's."""
    if columns.symbol is None and len(files) == 1:
        raise InputError(
            f"{files[0]}: expected a column of symbols in a single file, got columns.symbol: null; name the column"
        )
    code: dict[str, int] = {}
    tables = [_read_file(file, columns, code) for file in files]
    starts = np.cumsum([0, *(len(table["date"]) for table in tables)])
    joined = {name: np.concatenate([table.pop(name) for table in tables]) for name in tuple(tables[0])}
    symbols = sorted(code)
    rank = np.empty(len(code), np.int32)
    rank[[code[symbol] for symbol in symbols]] = np.arange(len(code))
    symbol = rank[joined.pop("symbol")]
    return RawBars(tuple(files), starts[:-1], tuple(symbols), symbol, joined.pop("date"), joined)


def _read_file(file: Path, columns: BarColumns, code: dict[str, int]) -> dict[str, np.ndarray]:
    """The columns of one file; symbols that `code` does not know are added to it."""
    given = columns.given()
    table = read_columns(
        file, list(given.values()), "; data.columns says what they are called, null where there are none"
    )
    if not table.num_rows:
        raise InputError(f"{file}: expected daily bars, got an empty file; drop it, or give one with rows")
    place = Place(file)
    if columns.symbol is None:
        codes, symbols = np.zeros(table.num_rows, np.int32), (file.name.partition(".csv")[0].partition(".tsv")[0],)
    else:
        codes, symbols = _names(place, columns.symbol, table[columns.symbol])
        refuse_missing(place, columns.symbol, codes < 0)
    local = np.array([code.setdefault(symbol, len(code)) for symbol in symbols], np.int32)
    return {
        "symbol": local[codes],
        "date": _dates(place, columns.date, table[columns.date]),
        **{
            name: float32_numbers(place, column, table[column])
            for name, column in given.items()
            if name not in ("symbol", "date")
        },
    }


def read_index(file: Path, market: Market) -> tuple[np.ndarray, np.ndarray, int]:
    """Dates [T] int32, ascending, the index's close [T] float64 above 0, and how many rows were out of order.

    Raises InputError: as `read_bars`; a day twice, a close that is missing or not above 0.
    """
    table = read_columns(file, [market.date, market.close], "; data.index says what they are called")
    place = Place(file)
    date = _dates(place, market.date, table[market.date])
    close = numbers(place, market.close, table[market.close])
    refuse_missing(place, market.close, np.isnan(close))
    refuse(place, market.close, close, close <= 0, "expected a close above 0")
    order = np.argsort(date, kind="stable")
    twice = np.flatnonzero(np.diff(date[order]) == 0)
    if len(twice):
        first, again = order[twice[0]], order[twice[0] + 1]
        raise InputError(
            f"{place.of_row(int(again))}: expected a row a day, got {date[first]} again (before: "
            f"{place.of_row(int(first))}); drop one of them"
        )
    return date[order], close[order], int((np.diff(date) < 0).sum())


def read_listing(file: Path, listing: Listing) -> dict[str, str | None]:
    """Symbol as in the bars -> industry, None where unknown.

    Raises InputError: as `read_bars`; a stock twice.
    """
    table = read_columns(file, [listing.symbol, listing.industry], "; data.listing says what they are called")
    place = Place(file)
    codes, symbols = _names(place, listing.symbol, table[listing.symbol])
    refuse_missing(place, listing.symbol, codes < 0)
    industry, industries = _names(place, listing.industry, table[listing.industry])
    found: dict[str, str | None] = {}
    for row, code in enumerate(codes.tolist()):
        symbol = symbols[code].removeprefix(listing.prefix)
        if symbol in found:
            raise InputError(f"{place.of_row(row)}: expected a row a stock, got {symbol} again; drop one of them")
        found[symbol] = industries[industry[row]] if industry[row] >= 0 else None
    return found


def _names(place: Place, name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """As `levels`, without space around them; what is empty then is missing."""
    codes, found = levels(place, name, column)
    stripped = sorted({text.strip() for text in found} - {""})
    rank = {text: code for code, text in enumerate(stripped)}
    lookup = np.array([*(rank.get(text.strip(), -1) for text in found), -1], np.int32)
    return lookup[codes], tuple(stripped)


def _dates(place: Place, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """[N] int32 as 20180102, of such numbers, ISO dates or times of the day (the day is that of their own zone)."""
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        column = pc.local_timestamp(column)
    codes, found = levels(place, name, column)
    refuse_missing(place, name, codes < 0)
    lookup = np.array([_date(text) for text in found], np.int32)
    wrong = lookup[codes] < 0
    if wrong.any():
        row = int(np.argmax(wrong))
        place.refuse(row, name, "expected a date such as 20180102 or 2018-01-02", repr(found[codes[row]][:60]))
    return lookup[codes]


def _date(text: str) -> int:
    """The number of a date; -1 where the text is none."""
    try:
        day = datetime.fromisoformat(text.strip().removesuffix(".0").replace("/", "-"))
    except ValueError:
        return -1
    return day.year * 10000 + day.month * 100 + day.day
