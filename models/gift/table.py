"""Any parquet or CSV table as features and tasks, read as the specification names its columns.

Columns that the specification does not name are not read. Missing values of a CSV file are empty fields and
the usual spellings (NA, NaN, null, ...). Every fault names the file, and the line or row it lies in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from models.columns import (
    Place,
    csv_header,
    csv_options,
    float32_numbers,
    is_number,
    levels,
    numbers,
    read_columns,
    reading,
    refuse,
    refuse_absent,
    refuse_missing,
)
from models.gift.data import Categories, GiftData, RawTable, Task
from models.gift.split import level_hashes, local_days
from models.trainer import InputError

READER_VERSION = 2  # raise it with any change of a value read
SUFFIXES = (".parquet", ".csv", ".csv.gz")
_BUFFER_BYTES = 1 << 18  # of each column of a parquet file
_BLOCK_BYTES = 1 << 22  # of a CSV file
_PIECE_ROWS = 1 << 14
_NO_NUMBER = "mend it, or list the column among categorical_columns"
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
    table = read_columns(file, _wanted(options, tasks))
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
        refuse_missing(place, column, group.codes < 0)
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
    with reading(file):
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
        refuse_absent(file, names, source.schema_arrow.names)
        return source.metadata.num_rows, _parquet_pieces(source, names, min(batch_rows, _PIECE_ROWS))
    refuse_absent(file, names, csv_header(file))
    read_options = pa.csv.ReadOptions(block_size=_BLOCK_BYTES)
    return None, iter(pa.csv.open_csv(file, read_options, **csv_options(file, names)))


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


def _features(place: Place, table: pa.Table, options: GiftData) -> tuple[np.ndarray, dict[str, Categories]]:
    numeric = np.empty((table.num_rows, len(options.numeric_columns)), np.float32)
    for index, name in enumerate(options.numeric_columns):
        numeric[:, index] = float32_numbers(place, name, table[name], _NO_NUMBER)
    return numeric, {name: _categories(place, name, table[name]) for name in options.categorical_columns}


def _categories(place: Place, name: str, column: pa.ChunkedArray) -> Categories:
    return Categories(*levels(place, name, column))


def _label(place: Place, task: Task, table: pa.Table) -> np.ndarray:
    if task.positive is not None:
        return _is_positive(place, task, table[task.column])
    values = _numbers_of_label(place, task, table)
    if task.above is not None:
        return np.where(np.isnan(values), np.nan, values > task.above)
    if task.kind == "binary":
        wrong = ~np.isnan(values) & (values != 0) & (values != 1)
        refuse(place, task.column, values, wrong, f"expected 0 or 1 for task {task.name} (or name `positive`)")
    elif task.transform == "log1p":
        refuse(place, task.column, values, values < 0, f"expected no negative value under log1p ({task.name})")
    return values


def _numbers_of_label(place: Place, task: Task, table: pa.Table) -> np.ndarray:
    column = table[task.column]
    if task.kind == "binary" and task.above is None and not pa.types.is_boolean(column.type):
        found = _categories(place, task.column, column)
        if found.levels and not any(is_number(pa.scalar(level)) for level in found.levels):
            if not {level.strip().lower() for level in found.levels} <= {"true", "false"}:
                raise InputError(
                    f"{place.file}: column {task.column}: expected 0 or 1 for task {task.name}, got "
                    f"{_some(found.levels)}; say which one is positive: tasks.{task.name}.positive"
                )
            true = np.array([*(_same(level, True) for level in found.levels), False])
            return np.where(found.codes < 0, np.nan, true[found.codes])
    return numbers(place, task.column, column, _NO_NUMBER)


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
    refuse_missing(place, name, np.asarray(column.is_null()))
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
