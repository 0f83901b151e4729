"""models/gift/table.py: any table as the specification describes it, and every way it can be wrong."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from models.gift import table
from models.gift.data import GiftData, RawTable
from models.trainer import InputError

HASH = {"by": "hash", "train": 0.7, "valid": 0.1, "calibrate": 0.05, "test": 0.15}
TASKS: dict[str, Any] = {
    "hours": {"kind": "regression", "column": "hours"},
    "pays": {"kind": "binary", "column": "paid", "above": 0},
    "rich": {"kind": "binary", "column": "income", "positive": "50000+."},
    "paid": {"kind": "regression", "column": "paid", "transform": "log1p", "conditional_on": "pays"},
}
ROWS = """age,city,hours,paid,income,when
31,Bern,40,0,- 50000.,2024-01-01
,Basel,0,12.5,50000+.,2024-01-02T06:00:00
64.5,,38,0,- 50000.,2024-01-03
"""


def options(**changed: Any) -> GiftData:
    given: dict[str, Any] = {
        "source": "table", "path": "t.csv", "numeric_columns": ["age"], "categorical_columns": ["city"],
        "tasks": TASKS, "split": HASH,
    }  # fmt: skip
    return GiftData(**{**given, **changed})


def one_task(**task: Any) -> GiftData:
    return options(tasks={"target": {"kind": "binary", **task}})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "t.csv"
        path.write_text(text)
        return path

    return write


def refused(path: Path, given: GiftData) -> str:
    with pytest.raises(InputError) as caught:
        table.read(path, given)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


# ------------------------------------------------------------------------------------------- what is read


def check_rows(raw: RawTable) -> None:
    np.testing.assert_array_equal(raw.numeric, np.array([[31], [np.nan], [64.5]], np.float32))
    assert raw.numeric.dtype == np.float32
    assert raw.categorical["city"].levels == ("Basel", "Bern")
    assert raw.categorical["city"].codes.tolist() == [1, 0, -1]
    assert set(raw.labels) == set(TASKS)
    np.testing.assert_array_equal(raw.labels["hours"], [40, 0, 38])
    np.testing.assert_array_equal(raw.labels["pays"], [0, 1, 0])
    np.testing.assert_array_equal(raw.labels["rich"], [0, 1, 0])
    np.testing.assert_array_equal(raw.labels["paid"], [0, 12.5, 0])
    assert raw.unit.tolist() == [0, 1, 2]


def test_reads_csv(write: Callable[[str], Path]) -> None:
    raw = table.read(write(ROWS), options())
    check_rows(raw)
    assert raw.facts["rows"] == {"table": 3}
    assert raw.order is None
    assert raw.split_key is None


def test_reads_gzipped_csv_with_other_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode()))
    check_rows(table.read(path, options()))


@pytest.mark.parametrize("city", ["object", "category"])
def test_reads_parquet(tmp_path: Path, city: str) -> None:
    frame = pd.DataFrame(
        {
            "age": [31, None, 64.5],
            "city": pd.Series(["Bern", "Basel", None], dtype=city),
            "hours": [40, 0, 38],
            "paid": [0.0, 12.5, 0.0],
            "income": pd.Categorical(["- 50000.", "50000+.", "- 50000."]),
            "not_named": ["anything", "at", "all"],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    check_rows(table.read(tmp_path / "t.parquet", options()))


def test_numbers_can_be_categories_and_codes_do_not_hang_on_row_order(write: Callable[[str], Path]) -> None:
    text = "a,code,y\n1,9,0\n2,10,1\n3,9,0\n"
    given = {
        "numeric_columns": ["a"],
        "categorical_columns": ["code"],
        "tasks": {"y": {"kind": "binary", "column": "y"}},
    }
    first = table.read(write(text), options(**given)).categorical["code"]
    header, *rows = text.splitlines()
    second = table.read(write("\n".join([header, *rows[::-1]])), options(**given)).categorical["code"]
    assert first.levels == second.levels == ("10", "9")
    assert first.codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["0", "1", ""], {}, [0, 1, np.nan]),
        (["true", "False", ""], {}, [1, 0, np.nan]),
        (["yes", "no", ""], {"positive": "yes"}, [1, 0, np.nan]),
        (["2", "3", ""], {"positive": 3}, [0, 1, np.nan]),
        (["true", "false", ""], {"positive": False}, [0, 1, np.nan]),
        (["2", "3.5", ""], {"above": 3}, [0, 1, np.nan]),
        (["3", "4", ""], {"above": 3}, [0, 1, np.nan]),
    ],
)
def test_binary_labels(
    write: Callable[[str], Path], values: list[str], task: dict[str, Any], expected: list[float]
) -> None:
    path = write("age,city,y\n" + "".join(f"1,a,{v}\n" for v in values))
    np.testing.assert_array_equal(table.read(path, one_task(column="y", **task)).labels["target"], expected)


def test_booleans_of_parquet_are_labels_and_features(tmp_path: Path) -> None:
    pd.DataFrame({"age": [True, False], "city": ["a", "b"], "y": [False, True]}).to_parquet(tmp_path / "t.parquet")
    raw = table.read(tmp_path / "t.parquet", one_task(column="y"))
    assert raw.labels["target"].tolist() == [0, 1]
    assert raw.numeric.tolist() == [[1], [0]]


def test_nan_is_as_missing_as_null_in_labels_and_categories(tmp_path: Path) -> None:
    numbers = pa.array([2.0, float("nan"), None, 1.0])  # pandas writes NaN as null, other writers keep it
    pa.parquet.write_table(pa.table({"age": numbers, "city": numbers, "y": numbers}), tmp_path / "t.parquet")
    raw = table.read(tmp_path / "t.parquet", one_task(column="y", positive=2))
    np.testing.assert_array_equal(raw.labels["target"], [1, np.nan, np.nan, 0])
    assert raw.categorical["city"].levels == ("1", "2")
    assert raw.categorical["city"].codes.tolist() == [1, -1, -1, 0]


def test_group_column_gives_units_and_one_key_per_group(write: Callable[[str], Path]) -> None:
    raw = table.read(
        write(ROWS + "5,Bern,1,0,50000+.,2024-01-03\n"), options(split={**HASH, "by": "group", "column": "income"})
    )
    assert raw.split_key is not None
    assert raw.split_key.dtype == np.uint64
    assert raw.unit.tolist() == [0, 1, 0, 1]
    assert raw.split_key[0] == raw.split_key[2] != raw.split_key[1]


def test_time_columns_are_ms_since_the_epoch(write: Callable[[str], Path], tmp_path: Path) -> None:
    given = options(split={**HASH, "by": "time", "column": "when"})
    raw = table.read(write(ROWS), given)
    expected = [
        int(pd.Timestamp(t, tz="UTC").timestamp() * 1000) for t in ("2024-01-01", "2024-01-02T06:00", "2024-01-03")
    ]
    assert raw.order is not None
    assert raw.order.tolist() == expected
    assert raw.facts["order_is_time"] is True
    frame = pd.read_csv(tmp_path / "t.csv", parse_dates=["when"], date_format="ISO8601")
    frame.to_parquet(tmp_path / "t.parquet")
    assert table.read(tmp_path / "t.parquet", given).order.tolist() == expected  # type: ignore[union-attr]
    by_number = table.read(tmp_path / "t.csv", options(split={**HASH, "by": "time", "column": "hours"}))
    assert by_number.order.tolist() == [40, 0, 38]  # type: ignore[union-attr]
    assert by_number.facts["order_is_time"] is False


# ------------------------------------------------------------------------------------------- the file


def test_a_folder_must_hold_exactly_one_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exactly one table file in the folder, got none"):
        table.table_file(tmp_path)
    (tmp_path / "README.md").write_text("no table")
    (tmp_path / "a.csv").write_text(ROWS)
    assert table.table_file(tmp_path) == table.table_file(tmp_path / "a.csv") == tmp_path / "a.csv"
    (tmp_path / "b.parquet").write_text("")
    with pytest.raises(InputError, match=r"got a\.csv, b\.parquet; name the file"):
        table.table_file(tmp_path)
    with pytest.raises(InputError, match=r"README\.md: expected a file ending in"):
        table.table_file(tmp_path / "README.md")
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        table.table_file(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_file(write: Callable[[str], Path], text: str) -> None:
    assert refused(write(text), options()) == "t.csv: expected a header line and rows, got an empty file"


def test_a_header_without_rows(write: Callable[[str], Path]) -> None:
    assert "expected a table with rows, got an empty one" in refused(write(ROWS.splitlines()[0] + "\n"), options())


def test_a_missing_column_names_the_nearest(write: Callable[[str], Path]) -> None:
    message = refused(write(ROWS.replace("hours", "hour").replace("age", "aged")), options())
    assert message.startswith("t.csv: expected column 'age', 'hours', got none such; the nearest are ")
    assert "aged" in message
    assert "hour" in message


def test_a_column_named_twice(write: Callable[[str], Path]) -> None:
    assert "t.csv:1: expected distinct column names, got age twice" in refused(
        write(ROWS.replace("when", "age")), options()
    )


def test_a_malformed_row_names_its_line(write: Callable[[str], Path]) -> None:
    assert refused(write(ROWS + "1,2\n"), options()) == "t.csv:5: expected 6 fields as in the header, got 2"


@pytest.mark.parametrize("name", ["t.csv.gz", "t.parquet"])
def test_a_torn_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("gz"):
        noise = "".join(f"{i},{i * i % 97},1,2,3,4\n" for i in range(2000))
        path.write_bytes(gzip.compress((ROWS + noise).encode())[:-4000])
    else:
        pd.DataFrame({"age": [1]}).to_parquet(path)
        path.write_bytes(path.read_bytes()[:-30])
    assert refused(path, options()).startswith(f"{name}: expected a ")


# ------------------------------------------------------------------------------------------- the values


def test_a_text_in_a_numeric_column_names_file_line_and_column(write: Callable[[str], Path]) -> None:
    message = refused(write(ROWS.replace("64.5", "old")), options())
    assert message.startswith(
        "t.csv:4: column age: expected a number, got 'old'; mend it, or list the column among"
    )


def test_lines_count_blank_lines_and_line_breaks_in_quotes(write: Callable[[str], Path]) -> None:
    text = ROWS.replace("Basel", '"Ba\nsel"').replace("\n64.5", "\n\nold")
    assert refused(write(text), options()).startswith("t.csv:6: column age")


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"age": ["1", "x"], "city": ["a", "b"], "y": [0, 1]}).to_parquet(path)
    assert refused(path, one_task(column="y")).startswith(
        "t.parquet: row 2: column age: expected a number, got 'x'"
    )
    pd.DataFrame({"age": pd.to_datetime(["2024-01-01"]), "city": ["a"], "y": [0]}).to_parquet(path)
    assert refused(path, one_task(column="y")).startswith("t.parquet: row 1: column age: expected a number")


@pytest.mark.parametrize(("value", "expected"), [("inf", "finite number, got inf"), ("1e39", "within")])
def test_numbers_that_float32_cannot_hold(write: Callable[[str], Path], value: str, expected: str) -> None:
    message = refused(write(ROWS.replace("64.5", value)), options())
    assert message.startswith("t.csv:4: column age: expected a ")
    assert expected in message


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["0", "2"], {}, "t.csv:3: column y: expected 0 or 1 for task target (or name `positive`), got 2"),
        (["no", "yes"], {}, "t.csv: column y: expected 0 or 1 for task target, got 'no', 'yes'; say which"),
        (["0", "yes"], {}, "t.csv:3: column y: expected a number, got 'yes'"),
        (["no", "yes"], {"positive": "Yes"}, "the positive value 'Yes' of task target, got only 'no', 'yes'"),
        (["1", "many"], {"above": 3}, "t.csv:3: column y: expected a number, got 'many'"),
        (
            ["1", "-1"],
            {"kind": "regression", "transform": "log1p"},
            "t.csv:3: column y: expected no negative value",
        ),
    ],
)
def test_labels_that_do_not_fit(
    write: Callable[[str], Path], values: list[str], task: dict[str, Any], expected: str
) -> None:
    path = write("age,city,y\n" + "".join(f"1,a,{v}\n" for v in values))
    assert expected in refused(path, one_task(column="y", **task))


def test_split_columns_must_be_complete_and_of_time(write: Callable[[str], Path]) -> None:
    by_time = options(split={**HASH, "by": "time", "column": "when"})
    assert (
        refused(write(ROWS.replace("2024-01-03", "")), by_time)
        == "t.csv:4: column when: expected a value, got none"
    )
    message = refused(write(ROWS.replace("2024-01-03", "tomorrow")), by_time)
    assert message.startswith("t.csv:4: column when: expected ms since the epoch or an ISO date")
    by_group = options(split={**HASH, "by": "group", "column": "city"})
    assert refused(write(ROWS), by_group) == "t.csv:4: column city: expected a value, got none"
