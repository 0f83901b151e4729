"""What a figure of a report shows, described once; `figures_png` and `figures_html` draw the same panels.

So the pictures in a paper and the interactive ones cannot tell different things. Colours are those of Okabe
and Ito, told apart by colour-blind people too; baselines are grey, a default configuration is a tint of its arm.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Number = float | None
Mark = Literal["fill", "line", "dash", "dot", "hollow", "interval"]

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
BASELINE_COLOURS = ("#B8BCC2", "#8A9099", "#5C636D")
INK, SOFT, GRID = "#1F2933", "#5C6670", "#E1E5EA"
BEFORE, AFTER = "#D55E00", "#0072B2"
# Heat: from opposed (vermillion) over nothing (white) to aligned (blue).
HEAT = ("#D55E00", "#FFFFFF", "#0072B2")


@dataclass(frozen=True)
class Reference:
    """A dashed line across a panel at `value` of the measured axis."""

    name: str
    value: float


@dataclass(frozen=True)
class Series:
    """Bars of one series, a value for each category of its panel; None where there is none.

    `low` and `high` are the ends of an interval, named `interval`; `points[i]` are single observations behind
    category i, named `point`. One colour, or one for each category.
    """

    name: str
    values: Sequence[Number]
    colours: str | Sequence[str]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    interval: str = ""
    points: Sequence[Sequence[float]] = ()
    point: str = "one seed"

    def colour(self, category: int) -> str:
        return self.colours if isinstance(self.colours, str) else self.colours[category]


@dataclass(frozen=True)
class Bars:
    """Bars by category: series stand side by side, or on each other where `stacked`.

    `label` names what the categories are, `measure` what the bars' length is.
    """

    title: str
    label: str
    measure: str
    categories: Sequence[str]
    series: Sequence[Series]
    horizontal: bool = False
    stacked: bool = False
    reference: Reference | None = None


@dataclass(frozen=True)
class Curve:
    """Points (x, y), joined by a line or not; None in `y` is a gap. `low` and `high` are ends of intervals."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    colour: str
    mark: Literal["line", "dash", "dot", "hollow", "line+dot"] = "line"
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    faint: bool = False
    hints: Sequence[str] = ()  # what is said of each point where a pointer rests


@dataclass(frozen=True)
class Curves:
    """Curves over a common x axis. `x_ticks` and `y_ticks` name places; `texts` are written at (x, y)."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_log: bool = False
    y_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_ticks: Mapping[float, str] | None = None
    y_ticks: Mapping[float, str] | None = None
    reference: Reference | None = None
    texts: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Heat:
    """A square of numbers between -1 and 1 with its labels on both sides."""

    title: str
    x_label: str
    y_label: str
    labels: Sequence[str]
    matrix: Sequence[Sequence[Number]]
    measure: str


Panel = Bars | Curves | Heat


@dataclass(frozen=True)
class Figure:
    """One figure: its file is `img/<study>_<key>.png`.

    `caption` says what is drawn, of how many, and what the intervals are; `observations` are sentences on what it
    shows, computed from the numbers.
    """

    key: str
    title: str
    caption: str
    observations: Sequence[str]
    panels: Sequence[Panel]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns: one panel, two beside each other, then two rows."""
        n = len(self.panels)
        return (1, n) if n <= 2 else (2, (n + 1) // 2)


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn of this study, and why."""

    key: str
    title: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One line of a legend."""

    name: str
    colour: str
    mark: Mark


def legend(figure: Figure) -> list[Entry]:
    """What the marks of a figure mean, each once, in the order of drawing."""
    entries = [entry for panel in figure.panels for entry in _entries(panel)]
    return list({entry.name: entry for entry in reversed(entries)}.values())[::-1]


def _entries(panel: Panel) -> Iterator[Entry]:
    if isinstance(panel, Heat):
        return
    if isinstance(panel, Bars):
        for series in panel.series:
            if series.name and isinstance(series.colours, str):
                yield Entry(series.name, series.colours, "fill")
            if any(series.points):
                yield Entry(series.point, INK, "hollow")
            if series.low is not None:
                yield Entry(series.interval, INK, "interval")
    else:
        for curve in panel.curves:
            if curve.name:
                yield Entry(curve.name, curve.colour, "dot" if curve.mark == "line+dot" else curve.mark)
    if panel.reference is not None:
        yield Entry(panel.reference.name, SOFT, "dash")


def arm_colours(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A colour for every arm of a document, the same in every figure."""
    colours: dict[str, str] = {}
    n_searched = n_baselines = 0
    for name, arm in arms.items():
        if arm["kind"] == "searched":
            colours[name] = ARM_COLOURS[n_searched % len(ARM_COLOURS)]
            n_searched += 1
    by_arm = {arms[name]["arm"]: colour for name, colour in reversed(colours.items())}
    for name, arm in arms.items():
        if arm["kind"] == "baseline":
            colours[name] = BASELINE_COLOURS[n_baselines % len(BASELINE_COLOURS)]
            n_baselines += 1
        elif arm["kind"] == "default":
            colours[name] = tint(by_arm.get(arm["arm"], ARM_COLOURS[-1]), 0.55)
    return colours


def tint(colour: str, share: float) -> str:
    """A colour with `share` of white in it."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)


def wrapped(name: str, width: int) -> str:
    """A long name on several lines, broken after underscores, slashes, dots and the like, else anywhere."""
    lines = [""]
    for part in re.findall(r"[^_/. -]*[_/. -]?", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line[i : i + width].strip() for line in lines for i in range(0, len(line), width)).strip()


def filled(text: str, width: int) -> str:
    """A title on as many lines as it needs."""
    return "\n".join(textwrap.wrap(text, width))


def cell(value: Number) -> str:
    """A number in a cell of a `Heat`."""
    # + 0.0 takes the sign off a zero that rounding made
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
