"""Any parquet or CSV table as features and tasks, read as the specification names its columns.

Columns that the specification does not name are not read. Missing values of a CSV file are empty fields and
the usual spellings (NA, NaN, null, ...). Every fault names the file, and the line or row it lies in.
"""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from models.gift.data import Categories, GiftData, RawTable, Task
from models.gift.split import level_hashes, local_days
from models.trainer import InputError

READER_VERSION = 2  # raise it with any change of a value read
SUFFIXES = (".parquet", ".csv", ".csv.gz")
_BUFFER_BYTES = 1 << 18  # of each column of a parquet file
_BLOCK_BYTES = 1 << 22  # of a CSV file
_PIECE_ROWS = 1 << 14
_FIRST_MS, _LAST_MS = 10**11, 253_402_128_000_000  # whole numbers between them can be ms since the epoch


def table_file(path: Path) -> Path:
    """The table at `path`: the file itself, or the only table file of a folder. Raises InputError."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, got {path.name!r}")
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; check data.path, or name it with --data")
    found = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:5]) or "none"
        raise InputError(f"{path}: expected exactly one table file in the folder, got {names}; name the file")
    return found[0]


@dataclass(frozen=True)
class Place:
    """Where rows lie: from data row `first` (from 0) of `file` on."""

    file: Path
    first: int = 0

    def of_row(self, row: int) -> str:
        """The line of a text file, else the row's number. `row` counts from `first`."""
        number = self.first + row
        if not self.file.name.endswith(".parquet"):
            for index, (line, _fields) in enumerate(_csv_lines(self.file)):
                if index == number + 1:
                    return f"{self.file}:{line}"
        return f"{self.file}: row {number + 1}"

    def refuse(self, row: int, column: str, expected: str, got: str) -> NoReturn:
        """Raises InputError about one value."""
        raise InputError(f"{self.of_row(row)}: column {column}: {expected}, got {got}")


@dataclass(frozen=True)
class FeatureBatch:
    """Some rows of a table, encoded by nothing yet. `n_rows` is that of the whole table, None where not known.

    Shape: numeric [n, D] float32, NaN where missing; categorical: column -> n codes.
    """

    place: Place
    n_rows: int | None
    numeric: np.ndarray
    categorical: dict[str, Categories]


def read(file: Path, options: GiftData) -> RawTable:
    """Reads the columns that `options` names.

    Labels come by task name, 0/1 where binary. `unit` is the group where the split is by group, the local day where
    it is by day or time, else the row.

    Raises:
        InputError: an empty or malformed file, a missing column, a value that is no number where one is
            expected, a label outside {0, 1}, a negative target under log1p.
    """
    tasks = options.task_list()
    table = _read_columns(file, _wanted(options, tasks))
    if not table.num_rows:
        raise InputError(f"{file}: expected a table with rows, got an empty one")
    place = Place(file)
    numeric, categorical = _features(place, table, options)
    labels = {task.name: _label(place, task, table) for task in tasks}
    by, column = options.split.by, options.split.column
    order = key = None
    unit = np.arange(table.num_rows, dtype=np.int64)
    facts: dict[str, Any] = {"rows": {"table": table.num_rows}, "files": {"table": file.name}}
    if by == "group" and column is not None:
        group = _categories(place, column, table[column])
        _refuse_missing(place, column, group.codes < 0)
        key, unit = level_hashes(group.levels)[group.codes], group.codes.astype(np.int64)
    elif by in ("day", "time") and column is not None:
        order, facts["order_is_time"] = _times(place, column, table)
        if facts["order_is_time"]:
            unit = local_days(order, options.split.timezone)
    return RawTable(numeric, options.numeric_columns, categorical, labels, unit, order, key, facts)


def stream_features(file: Path, options: GiftData, batch_rows: int) -> Iterator[FeatureBatch]:
    """The feature columns as `read` has them, `batch_rows` rows at a time (the last batch may be smaller).

    Memory is that of some batches however long the table is. No other column is read, or has to be there.

    Raises:
        InputError: as `read`, as far as it goes for features.
    """
    names = [*options.numeric_columns, *options.categorical_columns]
    first = 0
    with _reading(file):
        n_rows, batches = _opened(file, names, batch_rows)
        for table in _regrouped(batches, batch_rows):
            place = Place(file, first)
            yield FeatureBatch(place, n_rows, *_features(place, table, options))
            first += table.num_rows
    if not first:
        raise InputError(f"{file}: expected a table with rows, got an empty one")


def _opened(file: Path, names: list[str], batch_rows: int) -> tuple[int | None, Iterator[pa.RecordBatch]]:
    """Rows in all, where the file says it, and the columns `names` piece by piece."""
    if file.name.endswith(".parquet"):
        # Buffered: a column of a row group is otherwise read as a whole, and one group may be the whole file.
        source = pa.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        _refuse_absent(file, names, source.schema_arrow.names)
        return source.metadata.num_rows, _parquet_pieces(source, names, min(batch_rows, _PIECE_ROWS))
    _refuse_absent(file, names, _csv_header(file))
    read_options = pa.csv.ReadOptions(block_size=_BLOCK_BYTES)
    return None, iter(pa.csv.open_csv(file, read_options, **_csv_options(names)))


def _parquet_pieces(source: pa.parquet.ParquetFile, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
    with source:
        for group in range(source.num_row_groups):  # one iterator for all keeps what it read of each until its end
            yield from source.iter_batches(size, row_groups=[group], columns=names)


def _regrouped(pieces: Iterable[pa.RecordBatch], batch_rows: int) -> Iterator[pa.Table]:
    """The same rows in batches of `batch_rows` but for the last."""
    held: list[pa.RecordBatch] = []
    missing = batch_rows
    for piece in pieces:
        while piece.num_rows >= missing:
            yield pa.Table.from_batches([*held, piece.slice(0, missing)])
            piece = piece.slice(missing)
            held, missing = [], batch_rows
        if piece.num_rows:
            held.append(piece)
            missing -= piece.num_rows
    if held:
        yield pa.Table.from_batches(held)


def _wanted(options: GiftData, tasks: Sequence[Task]) -> list[str]:
    names = [*options.numeric_columns, *options.categorical_columns, *(task.column for task in tasks)]
    names += [options.split.column] if options.split.column is not None else []
    return list(dict.fromkeys(names))


def _read_columns(file: Path, names: list[str]) -> pa.Table:
    with _reading(file):
        if file.name.endswith(".parquet"):
            with pa.parquet.ParquetFile(file) as source:
                _refuse_absent(file, names, source.schema_arrow.names)
                return source.read(columns=names)
        _refuse_absent(file, names, _csv_header(file))
        return pa.csv.read_csv(file, **_csv_options(names))


def _csv_options(names: list[str]) -> dict[str, Any]:
    return {
        "parse_options": pa.csv.ParseOptions(newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=names,
            column_types={name: pa.string() for name in names},
            strings_can_be_null=True,
        ),
    }


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what cannot be read into an InputError about `file`."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise InputError(_malformed(file, error)) from error
    except (gzip.BadGzipFile, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        raise InputError(f"{file}: expected a whole table file, got: {_one_line(error)}") from error


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each record that is not blank."""
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as text:
        reader = csv.reader(text)
        for fields in reader:
            if fields:
                yield reader.line_num, fields


def _csv_header(file: Path) -> list[str]:
    header = next(_csv_lines(file), None)
    if header is None:
        raise InputError(f"{file}: expected a header line and rows, got an empty file")
    twice = {name for name in header[1] if header[1].count(name) > 1}
    if twice:
        raise InputError(f"{file}:1: expected distinct column names, got {', '.join(sorted(twice))} twice")
    return header[1]


def _malformed(file: Path, error: Exception) -> str:
    if not file.name.endswith(".parquet"):
        width = len(_csv_header(file))
        for line, fields in _csv_lines(file):
            if len(fields) != width:
                return f"{file}:{line}: expected {width} fields as in the header, got {len(fields)}"
    return f"{file}: expected a readable table, got: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _refuse_absent(file: Path, names: list[str], present: Sequence[str]) -> None:
    absent = [name for name in names if name not in present]
    if absent:
        near = list(dict.fromkeys(m for n in absent for m in difflib.get_close_matches(n, present, 3, 0.5)))
        hint = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(list(present)[:8])}"
        raise InputError(f"{file}: expected column {', '.join(map(repr, absent))}, got none such; {hint}")


def _refuse_missing(place: Place, column: str, missing: np.ndarray) -> None:
    if missing.any():
        place.refuse(int(np.argmax(missing)), column, "expected a value", "none")


def _numbers(place: Place, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """[N] float64, NaN where missing. Raises InputError with the first value that is no finite number."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    try:
        if pa.types.is_temporal(column.type):
            raise pa.ArrowInvalid("a time is no number")
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False) if len(column) else np.zeros(0)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        row = next((i for i, value in enumerate(column) if value.is_valid and not _is_number(value)), 0)
        raise InputError(
            f"{place.of_row(row)}: column {name}: expected a number, got {str(column[row])[:60]!r}; "
            "mend it, or list the column among categorical_columns"
        ) from error
    values = np.array(values, np.float64)
    _refuse(place, name, values, np.isinf(values), "expected a finite number")
    return values


def _is_number(value: pa.Scalar) -> bool:
    try:
        value.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _refuse(place: Place, name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        place.refuse(row, name, expected, f"{values[row]:g}")


def _features(place: Place, table: pa.Table, options: GiftData) -> tuple[np.ndarray, dict[str, Categories]]:
    numeric = np.empty((table.num_rows, len(options.numeric_columns)), np.float32)
    for index, name in enumerate(options.numeric_columns):
        numeric[:, index] = _feature(place, name, table)
    return numeric, {name: _categories(place, name, table[name]) for name in options.categorical_columns}


def _feature(place: Place, name: str, table: pa.Table) -> np.ndarray:
    values = _numbers(place, name, table[name])
    limit = float(np.finfo(np.float32).max)
    _refuse(place, name, values, np.abs(values) > limit, f"expected a number within +-{limit:.3g}")
    return values


def _categories(place: Place, name: str, column: pa.ChunkedArray) -> Categories:
    """Levels as text, sorted, so that codes do not hang on the order of rows."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # parquet knows NaN beside null: as text it would be a level of its own
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if not pa.types.is_string(column.type):
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{place.file}: column {name}: expected texts, numbers or dates, got {column.type}; convert it"
            ) from error
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    levels = encoded.dictionary.to_pylist()
    ranked = sorted(range(len(levels)), key=levels.__getitem__)
    rank = np.full(len(levels) + 1, -1, np.int32)
    rank[ranked] = np.arange(len(levels), dtype=np.int32)
    codes = rank[np.asarray(encoded.indices.fill_null(len(levels)))]
    return Categories(codes, tuple(levels[index] for index in ranked))


def _label(place: Place, task: Task, table: pa.Table) -> np.ndarray:
    if task.positive is not None:
        return _is_positive(place, task, table[task.column])
    values = _numbers_of_label(place, task, table)
    if task.above is not None:
        return np.where(np.isnan(values), np.nan, values > task.above)
    if task.kind == "binary":
        wrong = ~np.isnan(values) & (values != 0) & (values != 1)
        _refuse(place, task.column, values, wrong, f"expected 0 or 1 for task {task.name} (or name `positive`)")
    elif task.transform == "log1p":
        _refuse(place, task.column, values, values < 0, f"expected no negative value under log1p ({task.name})")
    return values


def _numbers_of_label(place: Place, task: Task, table: pa.Table) -> np.ndarray:
    column = table[task.column]
    if task.kind == "binary" and task.above is None and not pa.types.is_boolean(column.type):
        found = _categories(place, task.column, column)
        if found.levels and not any(_is_number(pa.scalar(level)) for level in found.levels):
            if not {level.strip().lower() for level in found.levels} <= {"true", "false"}:
                raise InputError(
                    f"{place.file}: column {task.column}: expected 0 or 1 for task {task.name}, got "
                    f"{_some(found.levels)}; say which one is positive: tasks.{task.name}.positive"
                )
            true = np.array([*(_same(level, True) for level in found.levels), False])
            return np.where(found.codes < 0, np.nan, true[found.codes])
    return _numbers(place, task.column, column)


def _is_positive(place: Place, task: Task, column: pa.ChunkedArray) -> np.ndarray:
    found = _categories(place, task.column, column)
    matches = np.array([_same(level, task.positive) for level in found.levels] + [False])
    if not matches.any():
        raise InputError(
            f"{place.file}: column {task.column}: expected the positive value {task.positive!r} of task "
            f"{task.name}, got only {_some(found.levels)}"
        )
    return np.where(found.codes < 0, np.nan, matches[found.codes])


def _same(level: str, positive: bool | int | float | str | None) -> bool:
    if isinstance(positive, bool):
        return level.strip().lower() == str(positive).lower()
    if isinstance(positive, str):
        return level == positive
    try:
        return float(level) == positive
    except ValueError:
        return False


def _some(levels: Sequence[str]) -> str:
    return ", ".join(map(repr, levels[:5])) + (", ..." if len(levels) > 5 else "")


def _times(place: Place, name: str, table: pa.Table) -> tuple[np.ndarray, bool]:
    """[N] int64, and whether these are ms since the epoch: dates are (without a zone: UTC); whole numbers are
    taken as they stand, and said to be times only where they can be ms of the years 1973 to 9999."""
    column = table[name]
    _refuse_missing(place, name, np.asarray(column.is_null()))
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_temporal(column.type):
        return np.asarray(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())), True
    for kind in (pa.int64(), pa.timestamp("ms"), pa.timestamp("ms", tz="UTC")):
        try:
            values = np.asarray(column.cast(kind).cast(pa.int64()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
        return values, pa.types.is_temporal(kind) or _FIRST_MS < int(values.min()) <= int(values.max()) < _LAST_MS
    row = next((i for i, value in enumerate(column) if not _is_moment(value)), 0)
    raise InputError(
        f"{place.of_row(row)}: column {name}: expected ms since the epoch or an ISO date (all with a time zone "
        f"or none), got {str(column[row])[:60]!r}"
    )


def _is_moment(value: pa.Scalar) -> bool:
    for kind in (pa.int64(), pa.timestamp("ms"), pa.timestamp("ms", tz="UTC")):
        try:
            value.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
        return True
    return False
