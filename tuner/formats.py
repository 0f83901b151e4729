"""Tables and values as text: for a terminal, as strict JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Format = Literal["table", "json", "csv"]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], form: Format) -> None:
    """One table on stdout in any format."""
    if form == "json":
        print(to_json([dict(zip(columns, row, strict=True)) for row in rows]))
    elif form == "csv":
        print(to_csv(columns, rows), end="")
    else:
        print_parts([table(title, columns, rows)])


def print_parts(parts: Iterable[str | Table]) -> None:
    """Text and tables on stdout; into a file or pipe nothing is cut off."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    for part in parts:
        if isinstance(part, str):
            print(part, flush=True)
        else:
            console.print(part)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    drawn = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, title_style="")
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], (int, float)) for row in rows)
        drawn.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(number(value)) for value in row))
    return drawn


def to_json(value: Any) -> str:
    """Strict JSON: what is not finite becomes null, dates and times ISO text."""
    return json.dumps(_strict(value), indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(below) for below in value]
    if isinstance(value, date):
        return value.isoformat()
    return value


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy's."""
    return value.item() if hasattr(value, "item") else value


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def number(value: Any) -> str:
    """A table's cell: four digits of a float, all of a whole number, nothing for None."""
    if value is None:
        return ""
    value = _plain(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """`42 s`, `3.5 min`, `2.1 h`; `?` where it is not known."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock(epoch_s: float | None) -> str:
    """Local date and time; empty for None."""
    return "" if epoch_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_s))
