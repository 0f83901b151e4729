"""Columns of parquet and CSV files. Every fault names the file, and the line or row it lies in.

Missing values of a CSV file are empty fields and the usual spellings (NA, NaN, null, ...). Its columns are read as
text, so that a value that is none of its column's can be shown as it stands.
"""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from models.trainer import InputError


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


def read_columns(file: Path, names: list[str], way_out: str = "") -> pa.Table:
    """The columns `names` of a .parquet, .csv or .tsv file (.gz too), of text where the file is text.

    Raises InputError: a missing or damaged file, an absent column (`way_out` ends the message).
    """
    with reading(file):
        if file.name.endswith(".parquet"):
            with pa.parquet.ParquetFile(file) as source:
                refuse_absent(file, names, source.schema_arrow.names, way_out)
                return source.read(columns=names)
        refuse_absent(file, names, csv_header(file), way_out)
        return pa.csv.read_csv(file, **csv_options(file, names))


def csv_options(file: Path, names: list[str]) -> dict[str, Any]:
    """What pyarrow's readers of CSV files take to read the columns `names` as text."""
    return {
        "parse_options": pa.csv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=names,
            column_types={name: pa.string() for name in names},
            strings_can_be_null=True,
        ),
    }


def _delimiter(file: Path) -> str:
    return "\t" if file.name.endswith((".tsv", ".tsv.gz")) else ","


@contextmanager
def reading(file: Path) -> Iterator[None]:
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
        reader = csv.reader(text, delimiter=_delimiter(file))
        for fields in reader:
            if fields:
                yield reader.line_num, fields


def csv_header(file: Path) -> list[str]:
    """The names of a CSV file's columns. Raises InputError where there are none, or one twice."""
    header = next(_csv_lines(file), None)
    if header is None:
        raise InputError(f"{file}: expected a header line and rows, got an empty file")
    twice = {name for name in header[1] if header[1].count(name) > 1}
    if twice:
        raise InputError(f"{file}:1: expected distinct column names, got {', '.join(sorted(twice))} twice")
    return header[1]


def _malformed(file: Path, error: Exception) -> str:
    if not file.name.endswith(".parquet"):
        width = len(csv_header(file))
        for line, fields in _csv_lines(file):
            if len(fields) != width:
                return f"{file}:{line}: expected {width} fields as in the header, got {len(fields)}"
    return f"{file}: expected a readable table, got: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def refuse_absent(file: Path, names: list[str], present: Sequence[str], way_out: str = "") -> None:
    """Raises InputError where one of `names` is not `present`; shows those that look like it."""
    absent = [name for name in names if name not in present]
    if absent:
        near = list(dict.fromkeys(m for n in absent for m in difflib.get_close_matches(n, present, 3, 0.5)))
        hint = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(list(present)[:8])}"
        raise InputError(f"{file}: expected column {', '.join(map(repr, absent))}, got none such; {hint}{way_out}")


def refuse_missing(place: Place, column: str, missing: np.ndarray) -> None:
    """Raises InputError about the first value that is `missing`, if any is."""
    if missing.any():
        place.refuse(int(np.argmax(missing)), column, "expected a value", "none")


def numbers(place: Place, name: str, column: pa.ChunkedArray, way_out: str = "mend it") -> np.ndarray:
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
        row = next((i for i, value in enumerate(column) if value.is_valid and not is_number(value)), 0)
        raise InputError(
            f"{place.of_row(row)}: column {name}: expected a number, got {str(column[row])[:60]!r}; {way_out}"
        ) from error
    values = np.array(values, np.float64)
    refuse(place, name, values, np.isinf(values), "expected a finite number")
    return values


def is_number(value: pa.Scalar) -> bool:
    try:
        value.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def refuse(place: Place, name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    """Raises InputError about the first of the `values` that is `wrong`, if any is."""
    if wrong.any():
        row = int(np.argmax(wrong))
        place.refuse(row, name, expected, f"{values[row]:g}")


def float32_numbers(place: Place, name: str, column: pa.ChunkedArray, way_out: str = "mend it") -> np.ndarray:
    """As `numbers`, [N] float32: a value beyond its range is refused too."""
    values = numbers(place, name, column, way_out)
    limit = float(np.finfo(np.float32).max)
    refuse(place, name, values, np.abs(values) > limit, f"expected a number within +-{limit:.3g}")
    return values.astype(np.float32)


def levels(place: Place, name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """[N] int32 codes, -1 where missing, and the distinct values as text.

    These are sorted, so that codes do not hang on the order of rows. Raises InputError: a column of another kind.
    """
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
    values = encoded.dictionary.to_pylist()
    ranked = sorted(range(len(values)), key=values.__getitem__)
    rank = np.full(len(values) + 1, -1, np.int32)
    rank[ranked] = np.arange(len(values), dtype=np.int32)
    codes = rank[np.asarray(encoded.indices.fill_null(len(values)))]
    return codes, tuple(values[index] for index in ranked)
