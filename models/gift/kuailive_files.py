"""The seven KuaiLive files as named columns: CSV (plain or gzip) and parquet, errors with file and line."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from models.trainer import InputError

FILES = ("click", "comment", "like", "gift", "user", "streamer", "room")
SUFFIXES = (".csv", ".csv.gz", ".parquet")
SENTINEL = -124  # KuaiLive's "missing"
MAY_HAVE_NO_ROWS = ("comment", "like", "room")  # optional behaviour; without the others nothing can be learnt

_EVENT = ("user_id", "live_id", "streamer_id", "timestamp")
INTEGERS = {
    "click": (*_EVENT, "watch_live_time"),
    "comment": _EVENT,
    "like": _EVENT,
    "gift": (*_EVENT, "gift_price"),
    "user": ("user_id",),
    "streamer": ("streamer_id",),
    "room": ("live_id", "start_timestamp"),
}
_MAY_BE_MISSING = ("watch_live_time", "start_timestamp")  # the sentinel or an empty cell
_UNIX_MS = (946_684_800_000, 4_102_444_800_000, "Unix milliseconds of the years 2000 to 2099")
_AMOUNT = (0, 10**12, "an integer >= 0")
_RANGES = {  # column -> lowest, below, in words
    "timestamp": _UNIX_MS,
    "start_timestamp": _UNIX_MS,
    "watch_live_time": _AMOUNT,
    "gift_price": _AMOUNT,
}
_ANY_INTEGER = (-(2**63), 2**63, "an integer")
_TEXT = pa.dictionary(pa.int32(), pa.string())
_UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, StopIteration)
_OTHER_NAMES = {  # the official preprocessing and home page use these
    "streamer_id": ("author_id",),
    "is_live_streamer": ("is_live_author",),
    "is_photo_author": ("is_video_author",),
    "fans_user_num": ("fans_num",),
    "fans_group_fans_num": ("fans_group_num",),
}


def find_files(folder: Path) -> dict[str, Path]:
    """The seven files of `folder` by logical name, each as .csv, .csv.gz or .parquet.

    Raises:
        InputError: no such folder, a file is missing, or there in two formats.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with the KuaiLive files, got none; check the data path")
    found = {}
    for name in FILES:
        paths = [folder / (name + suffix) for suffix in SUFFIXES if (folder / (name + suffix)).is_file()]
        if not paths:
            raise InputError(f"{folder}: expected {name}.csv, {name}.csv.gz or {name}.parquet, got none")
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"{folder}: expected one file of {name}, got {names}; remove one")
        found[name] = paths[0]
    return found


@dataclass(frozen=True)
class _Columns:
    """Where the wanted columns lie in a file: canonical name -> name in the file."""

    integers: dict[str, str]
    texts: dict[str, str]


def read_table(path: Path, name: str, texts: tuple[str, ...]) -> pa.Table:
    """The wanted columns of `path`, the file of logical name `name`, by their canonical names.

    Returns: ids, times and amounts as int64 (SENTINEL where a watch or start time is missing), then the columns
        `texts` as dictionaries of strings, exactly as written.

    Raises:
        InputError: a missing column, a malformed row (with its line), no rows, or a file that cannot be read.
    """
    parquet = path.suffix == ".parquet"
    columns = _resolve(path, _parquet_names(path) if parquet else _csv_names(path), INTEGERS[name], texts)
    table = _read_parquet(path, columns) if parquet else _read_csv(path, columns)
    if table.num_rows == 0 and name not in MAY_HAVE_NO_ROWS:
        raise InputError(f"{path}: expected rows, got a header alone; is the file complete?")
    return table


def _resolve(path: Path, header: list[str], integers: tuple[str, ...], texts: tuple[str, ...]) -> _Columns:
    if not header:
        raise InputError(f"{path}: expected a header line, got an empty file; is the file complete?")

    def position(column: str) -> str:
        names = [n for n in (column, *_OTHER_NAMES.get(column, ())) if n in header]
        if not names:
            wanted = " or ".join((column, *_OTHER_NAMES.get(column, ())))
            raise InputError(f"{path}: expected a column {wanted}, got {', '.join(header)}")
        if header.count(names[0]) > 1:
            raise InputError(f"{path}: expected one column {names[0]}, got {header.count(names[0])}")
        return names[0]

    return _Columns({c: position(c) for c in integers}, {c: position(c) for c in texts})


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv_names(path: Path) -> list[str]:
    try:
        with _open_text(path) as file:
            return next(csv.reader(file), [])
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _parquet_names(path: Path) -> list[str]:
    try:
        return pyarrow.parquet.read_schema(path).names
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read_csv(path: Path, columns: _Columns) -> pa.Table:
    types = dict.fromkeys(columns.integers.values(), pa.int64())
    types |= dict.fromkeys(columns.texts.values(), _TEXT)
    options = pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types, null_values=[""])
    try:
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except _UNREADABLE as error:
        raise _first_malformed_row(path, columns, error) from error
    table = table.rename_columns([*columns.integers, *columns.texts])
    for name in columns.integers:
        if _first_bad_row(table[name], name) is not None:
            raise _first_malformed_row(path, columns, ValueError(f"a bad {name}"))
    return _fill_missing(table, columns)


def _read_parquet(path: Path, columns: _Columns) -> pa.Table:
    try:
        table = pyarrow.parquet.read_table(path, columns=[*columns.integers.values(), *columns.texts.values()])
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    arrays = {}
    for name, source in (columns.integers | columns.texts).items():
        whole = name in columns.integers
        try:
            arrays[name] = table[source].cast(pa.int64() if whole else pa.string())
        except pa.ArrowException as error:
            kind = "integers" if whole else "texts"
            raise InputError(f"{path}: {source}: expected {kind}, got others ({_line(error)})") from error
        if not whole:
            arrays[name] = arrays[name].cast(_TEXT)
        elif (bad := _first_bad_row(arrays[name], name)) is not None:
            got = f"{_expected(name, source)}, got {arrays[name][bad].as_py()}"
            raise InputError(f"{path}: row {bad + 1}: {got}; correct or remove the row")
    return _fill_missing(pa.table(arrays), columns)


def _first_bad_row(column: pa.ChunkedArray, name: str) -> int | None:
    """The first row, from 0, with a value that `name` cannot have."""
    bad = pc.is_null(column)
    if name in _RANGES:
        low, below, _ = _RANGES[name]
        bad = pc.or_kleene(bad, pc.or_(pc.less(column, low), pc.greater_equal(column, below)))
    if name in _MAY_BE_MISSING:
        bad = pc.and_(bad, pc.fill_null(pc.not_equal(column, SENTINEL), False))
    return pc.index(bad, True).as_py() if pc.any(bad).as_py() else None


def _fill_missing(table: pa.Table, columns: _Columns) -> pa.Table:
    for name in columns.integers:
        if name in _MAY_BE_MISSING and table[name].null_count:
            table = table.set_column(table.column_names.index(name), name, table[name].fill_null(SENTINEL))
    return table


def _first_malformed_row(path: Path, columns: _Columns, refusal: Exception) -> InputError:
    """Reads a CSV file a second time, slowly, to name the line that the fast reader refused."""
    try:
        with _open_text(path) as file:
            rows = csv.reader(file)
            header = next(rows)
            places = [(name, source, header.index(source)) for name, source in columns.integers.items()]
            for row in filter(None, rows):  # blank lines are no rows
                fault = _fault(row, len(header), places)
                if fault is not None:
                    return InputError(f"{path}:{rows.line_num}: {fault}; correct or remove the line")
    except _UNREADABLE as error:
        refusal = error
    return _unreadable(path, refusal)


def _fault(row: list[str], n_fields: int, places: list[tuple[str, str, int]]) -> str | None:
    if len(row) != n_fields:
        return f"expected {n_fields} fields, got {len(row)}"
    for name, source, place in places:
        if not _is_valid(row[place], name):
            return f"{_expected(name, source)}, got {row[place]!r}"
    return None


def _is_valid(text: str, name: str) -> bool:
    text = text.strip()
    if not text:
        return name in _MAY_BE_MISSING
    if re.fullmatch(r"-?\d{1,19}", text) is None:
        return False
    low, below, _ = _RANGES.get(name, _ANY_INTEGER)
    return low <= int(text) < below or (name in _MAY_BE_MISSING and int(text) == SENTINEL)


def _expected(name: str, source: str) -> str:
    return f"{source}: expected {_RANGES.get(name, _ANY_INTEGER)[2]}"


def _unreadable(path: Path, error: Exception) -> InputError:
    kind = "parquet" if path.suffix == ".parquet" else "CSV"
    return InputError(f"{path}: expected a {kind} file, got one that cannot be read ({_line(error)})")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
