"""models/columns.py: columns of files of several kinds; the faults of tables are tested with their readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from models.columns import Place, float32_numbers, levels, numbers, read_columns
from models.trainer import InputError

TABLE = pd.DataFrame({"name": ["b", "a", None, "b"], "value": [1.5, np.nan, 3.0, -4.0], "rest": range(4)})


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.csv.gz", "t.tsv.gz"])
def test_every_kind_of_file_gives_the_same_columns(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        TABLE.to_parquet(file)
    else:
        TABLE.to_csv(file, index=False, sep="\t" if ".tsv" in name else ",")
    table = read_columns(file, ["value", "name"])
    assert table.column_names == ["value", "name"]
    np.testing.assert_array_equal(numbers(Place(file), "value", table["value"]), TABLE["value"])
    codes, names = levels(Place(file), "name", table["name"])
    assert (codes.tolist(), names) == ([1, 0, -1, 1], ("a", "b"))


def test_a_fault_of_a_tab_separated_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_text("name\tvalue\na,b\t1\n\nc\ttwo\n")
    with pytest.raises(InputError) as caught:
        numbers(Place(file), "value", read_columns(file, ["value"])["value"])
    assert str(caught.value) == f"{file}:4: column value: expected a number, got 'two'; mend it"


def test_an_absent_column_is_told_with_the_way_out(tmp_path: Path) -> None:
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        InputError, match=r"expected column 'valeu', got none such; the nearest are value; rename it$"
    ):
        read_columns(tmp_path / "t.csv", ["valeu"], "; rename it")


def test_float32_numbers_fit_their_type(tmp_path: Path) -> None:
    column = pa.chunked_array([[1.0, None, 3e38]])
    found = float32_numbers(Place(tmp_path / "t.parquet"), "x", column)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([1.0, np.nan, 3e38], np.float32))
    with pytest.raises(InputError, match=r"row 1: column x: expected a number within \+-3.4e\+38, got -4e\+38"):
        float32_numbers(Place(tmp_path / "t.parquet"), "x", pa.chunked_array([[-4e38]]))
