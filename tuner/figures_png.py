"""Figures as PNG, by matplotlib: 300 dpi, 6 x 5 inches a panel, so a single one has 1800 x 1500 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tuner.figures import (
    GRID,
    HEAT,
    INK,
    SOFT,
    Bars,
    Curve,
    Curves,
    Entry,
    Figure,
    Heat,
    cell,
    filled,
    legend,
    wrapped,
)

DPI = 300
PANEL_INCHES = (6.0, 5.0)
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.6,
}


def draw_png(figure: Figure, path: Path) -> None:
    """Write one figure. Its size is that of its grid, whatever is drawn: nothing is cropped."""
    rows, columns = figure.grid
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), dpi=DPI, layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.05)
        canvas.suptitle(filled(figure.title, 56 * columns), fontsize=12.5, fontweight="bold")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for panel, ax in zip(figure.panels, axes, strict=False):
            _draw(panel, ax, alone=len(figure.panels) == 1)
        spare = axes[len(figure.panels) :]
        for ax in spare:
            ax.axis("off")
        _write_legend(canvas, spare, legend(figure), columns)
        # PNG counts whole pixels a metre: rounded up, so that readers see no less than 300 dpi.
        canvas.savefig(path, dpi=DPI, format="png", pil_kwargs={"dpi": (300.03, 300.03)})


def _draw(panel: Bars | Curves | Heat, ax: Axes, alone: bool) -> None:
    if not alone:
        ax.set_title(filled(panel.title, 60), fontweight="bold", color=INK)
    if isinstance(panel, Bars):
        _draw_bars(panel, ax)
    elif isinstance(panel, Curves):
        _draw_curves(panel, ax)
    else:
        _draw_heat(panel, ax)


def _write_legend(canvas: Canvas, spare: Sequence[Axes], entries: Sequence[Entry], columns: int) -> None:
    """In a cell that is left over, else below the panels; never on the data."""
    if not entries:
        return
    handles = [_handle(entry) for entry in entries]
    if len(spare):
        spare[0].legend(handles=handles, loc="center", fontsize=10)
        return
    longest = max(len(entry.name) for entry in entries)
    room = 78 * columns  # characters that stand beside each other
    canvas.legend(
        handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), room // (longest + 7)))
    )


def _handle(entry: Entry) -> Any:
    if entry.mark == "fill":
        return Patch(facecolor=entry.colour, label=entry.name)
    if entry.mark == "interval":
        return Line2D([], [], color=entry.colour, linewidth=1.2, marker="|", markersize=7, label=entry.name)
    if entry.mark in ("dot", "hollow"):
        face = "white" if entry.mark == "hollow" else entry.colour
        return Line2D(
            [], [], linestyle="", marker="o", markersize=4.5, color=entry.colour, markerfacecolor=face,
            label=entry.name,
        )  # fmt: skip
    style = "--" if entry.mark == "dash" else "-"
    return Line2D([], [], color=entry.colour, linestyle=style, linewidth=1.6, label=entry.name)


# --- bars ------------------------------------------------------------------------------------------------------


def _draw_bars(panel: Bars, ax: Axes) -> None:
    n, width = len(panel.categories), 0.8 / (1 if panel.stacked else len(panel.series))
    bottom = [0.0] * n
    for s, series in enumerate(panel.series):
        shift = 0.0 if panel.stacked else (s - (len(panel.series) - 1) / 2) * width
        for i, value in enumerate(series.values):
            if value is None:
                continue
            _bar(panel, ax, i + shift, value, bottom[i], width, series.colour(i))
            if panel.stacked:
                bottom[i] += value
            if series.low is not None and series.high is not None and series.low[i] is not None:
                _interval(panel, ax, i + shift, series.low[i], series.high[i])
            points = series.points[i] if i < len(series.points) else ()
            _points(panel, ax, i + shift, points, width)
    if panel.reference is not None:
        line = ax.axvline if panel.horizontal else ax.axhline
        line(panel.reference.value, color=SOFT, linestyle="--", linewidth=1.1, zorder=1.5)
    if panel.stacked:
        (ax.set_xlim if panel.horizontal else ax.set_ylim)(0, 1.06 * max(bottom))
    _name_categories(panel, ax)


def _bar(panel: Bars, ax: Axes, at: float, value: float, bottom: float, width: float, colour: str) -> None:
    if panel.horizontal:
        ax.barh(at, value, width * 0.92, left=bottom, color=colour)
    else:
        ax.bar(at, value, width * 0.92, bottom=bottom, color=colour)


def _interval(panel: Bars, ax: Axes, at: float, low: float, high: float) -> None:
    if panel.horizontal:
        ax.errorbar(
            [(low + high) / 2], [at], xerr=(high - low) / 2, color=INK, capsize=2.5, linewidth=1.1, zorder=3
        )
    else:
        ax.errorbar(
            [at], [(low + high) / 2], yerr=(high - low) / 2, color=INK, capsize=2.5, linewidth=1.1, zorder=3
        )


def _points(panel: Bars, ax: Axes, at: float, points: Sequence[float], width: float) -> None:
    """Beside the interval, so that neither hides the other."""
    places = [at + width * 0.24] * len(points)
    x, y = (points, places) if panel.horizontal else (places, points)
    ax.plot(x, y, linestyle="", marker="o", markersize=3.2, color=INK, markerfacecolor="white", zorder=4)


def _name_categories(panel: Bars, ax: Axes) -> None:
    places, n = range(len(panel.categories)), len(panel.categories)
    if panel.horizontal:
        ax.set_yticks(places, [wrapped(name, 26 if n <= 10 else 40) for name in panel.categories])
        ax.tick_params(axis="y", length=0, labelsize=8.5 if n <= 14 else 7.5)
        ax.invert_yaxis()
        ax.set(xlabel=panel.measure, ylabel=panel.label)
        ax.grid(axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(6))
        return
    if n <= 8:
        names = [wrapped(name, max(10, 62 // n)) for name in panel.categories]
        ax.set_xticks(places, names, fontsize=8.5 if n <= 5 else 7.0)
    else:
        ax.set_xticks(places, panel.categories, rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5)
    ax.tick_params(axis="x", length=0)
    ax.set(xlabel=panel.label, ylabel=panel.measure)
    ax.grid(axis="y")
    if n == 1:
        ax.set_xlim(-1, 1)


# --- curves ----------------------------------------------------------------------------------------------------


def _draw_curves(panel: Curves, ax: Axes) -> None:
    if panel.x_log:
        ax.set_xscale("log")
    if panel.y_log:
        ax.set_yscale("log")
    for order, curve in enumerate(panel.curves):
        _draw_curve(curve, ax, 2 + order * 0.01)
    if panel.reference is not None:
        ax.axhline(panel.reference.value, color=SOFT, linestyle="--", linewidth=1.1, zorder=1.5)
    if panel.x_range:
        ax.set_xlim(*panel.x_range)
    if panel.y_range:
        ax.set_ylim(*panel.y_range)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    ax.grid(which="major")
    if panel.x_ticks is not None:
        ax.set_xticks(
            list(panel.x_ticks),
            [wrapped(name, max(10, 62 // len(panel.x_ticks))) for name in panel.x_ticks.values()],
        )
        ax.tick_params(axis="x", labelsize=6.5 if len(panel.x_ticks) > 6 else 8)
    elif not panel.x_log and all(float(x).is_integer() for curve in panel.curves for x in curve.x):
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if panel.y_ticks is not None:
        ax.set_yticks(list(panel.y_ticks), list(panel.y_ticks.values()))
    for axis, log in ((ax.xaxis, panel.x_log), (ax.yaxis, panel.y_log)):
        if log:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(lambda *_: "")
    for x, y, text in panel.texts:
        ax.text(x, y, text, fontsize=7, ha="center", va="center", color=SOFT, zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})  # fmt: skip


def _draw_curve(curve: Curve, ax: Axes, order: float) -> None:
    y = [float("nan") if value is None else value for value in curve.y]
    alpha = 0.35 if curve.faint else 1.0
    if curve.low is not None and curve.high is not None:
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True):
            if low is not None and high is not None:
                ax.plot([x, x], [low, high], color=curve.colour, linewidth=1.0, alpha=0.65 * alpha, zorder=order)
    dots = curve.mark in ("dot", "hollow", "line+dot")
    ax.plot(
        curve.x, y,
        linestyle={"line": "-", "line+dot": "-", "dash": "--"}.get(curve.mark, ""),
        linewidth=0.8 if curve.faint else 1.6, color=curve.colour, alpha=alpha, zorder=order,
        marker="o" if dots else "", markersize=4.2,
        markerfacecolor="white" if curve.mark == "hollow" else curve.colour,
    )  # fmt: skip


# --- heat ------------------------------------------------------------------------------------------------------


def _draw_heat(panel: Heat, ax: Axes) -> None:
    colours = LinearSegmentedColormap.from_list("opposed to aligned", HEAT).with_extremes(bad="#F0F2F4")
    values = [[float("nan") if value is None else value for value in row] for row in panel.matrix]
    image = ax.imshow(values, cmap=colours, vmin=-1.0, vmax=1.0)
    places = range(len(panel.labels))
    names = [wrapped(name, 12) for name in panel.labels]
    ax.set_xticks(places, names)
    ax.set_yticks(places, names)
    ax.tick_params(length=0)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    for i, row in enumerate(panel.matrix):
        for j, value in enumerate(row):
            text = cell(value)
            dark = value is not None and abs(value) > 0.6
            ax.text(j, i, text, ha="center", va="center", color="white" if dark else INK)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=panel.measure).outline.set_visible(False)
