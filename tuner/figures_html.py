"""Figures as plotly's JSON, one plot a panel, for browsers; nothing here needs the plotly package.

Plotly reads a small HTML of its own in names and labels, so every text from outside is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.figures import GRID, HEAT, INK, SOFT, Bars, Curve, Curves, Heat, Panel, cell, wrapped

_AXIS = {
    "gridcolor": GRID, "linecolor": "#C3C9D0", "zerolinecolor": "#C3C9D0", "ticks": "", "automargin": True,
    "tickfont": {"size": 11}, "fixedrange": False,
}  # fmt: skip
_HEIGHT, _BAR_HEIGHT = 340, 26


def plot(panel: Panel) -> dict[str, Any]:
    """`data` and `layout` of one panel, and the `height` that it wants in pixels."""
    if isinstance(panel, Bars):
        return _bars(panel)
    return _curves(panel) if isinstance(panel, Curves) else _heat(panel)


def _text(text: str, width: int = 0) -> str:
    """Escaped, on several lines where it is wider than `width` characters."""
    lines = (wrapped(text, width) if width else text).split("\n")
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _layout(height: int, x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "showlegend": False,
        "hoverlabel": {"font": {"size": 12}, "namelength": -1},
        "hovermode": "closest",
        "xaxis": {**_AXIS, **x},
        "yaxis": {**_AXIS, **y},
        **more,
    }


def _title(text: str) -> dict[str, Any]:
    return {"text": _text(text), "font": {"size": 12, "color": SOFT}, "standoff": 8}


def _bars(panel: Bars) -> dict[str, Any]:
    """A single series of many categories lies on its side: names stay readable on a phone."""
    lying = panel.horizontal or (len(panel.series) == 1 and len(panel.categories) > 3) or panel.stacked
    data: list[dict[str, Any]] = []
    names = [_text(name, 24 if lying else 14) for name in panel.categories]
    places = list(range(len(names)))
    width = 0.8 if panel.stacked else 0.8 / len(panel.series)
    for s, series in enumerate(panel.series):
        shift = 0.0 if panel.stacked else (s - (len(panel.series) - 1) / 2) * width
        data.append(
            {
                "type": "bar", "orientation": "h" if lying else "v",
                **_xy(lying, [p + shift for p in places], series.values), "width": width * 0.94,
                "name": _text(series.name), "meta": series.name,
                "marker": {"color": [series.colour(i) for i in places]},
                "error_" + ("x" if lying else "y"): _error(series.values, series.low, series.high),
                "text": [_hint(series.name, name, i, series) for i, name in enumerate(panel.categories)],
                "hoverinfo": "text", "textposition": "none",
            }
        )  # fmt: skip
        spots = [(i + shift + width * 0.26, value) for i, group in enumerate(series.points) for value in group]
        if spots:
            where, values = zip(*spots, strict=True)
            data.append(
                {
                    "type": "scatter", "mode": "markers", **_xy(lying, where, values), "meta": series.point,
                    "marker": {"size": 6, "color": "#fff", "line": {"color": INK, "width": 1}},
                    "hovertemplate": f"{_text(series.point)}: %{{{'x' if lying else 'y'}:.4g}}<extra></extra>",
                }
            )  # fmt: skip
    category = {
        "tickvals": places,
        "ticktext": names,
        "showgrid": False,
        "zeroline": False,
        "title": _title(panel.label),
    }
    measured: dict[str, Any] = {"title": _title(panel.measure)}
    more: dict[str, Any] = {"barmode": "stack" if panel.stacked else "overlay"}
    if panel.reference is not None:
        more["shapes"] = [_line(panel.reference.value, lying)]
    if lying:
        category |= {"autorange": "reversed", "title": {"text": ""}}
        return {"data": data, "layout": _layout(80 + _BAR_HEIGHT * (len(names) + 1), measured, category, **more)}
    return {"data": data, "layout": _layout(_HEIGHT, category, measured, **more)}


def _xy(lying: bool, places: Sequence[float], values: Sequence[Any]) -> dict[str, Any]:
    return {"x": list(values), "y": list(places)} if lying else {"x": list(places), "y": list(values)}


def _error(values: Sequence[Any], low: Any, high: Any) -> dict[str, Any]:
    if low is None or high is None:
        return {"visible": False}
    up = [0 if v is None or h is None else max(0.0, h - v) for v, h in zip(values, high, strict=True)]
    down = [0 if v is None or low_ is None else max(0.0, v - low_) for v, low_ in zip(values, low, strict=True)]
    return {"array": up, "arrayminus": down, "symmetric": False, "color": INK, "thickness": 1.3, "width": 3}


def _hint(name: str, category: str, i: int, series: Any) -> str:
    value = series.values[i]
    text = f"{name}, {category}" if name else category
    if value is None:
        return _text(text)
    text += f": {value:.4g}"
    if series.low is not None and series.low[i] is not None and series.high[i] is not None:
        text += f" ({series.low[i]:.4g} to {series.high[i]:.4g})"
    return _text(text)


def _line(value: float, upright: bool) -> dict[str, Any]:
    along, across = ("y", "x") if upright else ("x", "y")
    return {
        "type": "line", f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1,
        f"{across}0": value, f"{across}1": value,
        "line": {"color": SOFT, "width": 1.2, "dash": "dash"},
    }  # fmt: skip


def _curves(panel: Curves) -> dict[str, Any]:
    x: dict[str, Any] = {"title": _title(panel.x_label), "zeroline": False}
    y: dict[str, Any] = {"title": _title(panel.y_label), "zeroline": False}
    for axis, log, limits in ((x, panel.x_log, panel.x_range), (y, panel.y_log, panel.y_range)):
        if log:
            axis |= {"type": "log", "dtick": 1}
        if limits is not None:
            axis["range"] = [_log10(end) if log else end for end in limits]
    many = len(panel.x_ticks or ()) > 6
    for axis, ticks in ((x, panel.x_ticks), (y, panel.y_ticks)):
        if ticks is not None:
            axis |= {
                "tickvals": list(ticks),
                "ticktext": [_text(name, 14) for name in ticks.values()],
                "tickangle": 0,
            }
            axis["tickfont"] = {"size": 10}
    more: dict[str, Any] = {}
    if panel.reference is not None:
        more["shapes"] = [_line(panel.reference.value, upright=False)]
    if panel.texts:
        more["annotations"] = [
            {"x": a, "y": b, "text": _text(text), "showarrow": False, "font": {"size": 10, "color": SOFT},
             "bgcolor": "rgba(255,255,255,.8)"}
            for a, b, text in panel.texts
        ]  # fmt: skip
    data = [_curve(curve) for curve in panel.curves]
    return {"data": data, "layout": _layout(_HEIGHT + 60 * many, x, y, **more), "wide": many}


def _log10(value: float) -> float:
    return math.log10(value)


def _curve(curve: Curve) -> dict[str, Any]:
    dots = curve.mark in ("dot", "hollow")
    both = curve.mark == "line+dot"
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "markers" if dots else "lines+markers" if both else "lines",
        "x": list(curve.x), "y": list(curve.y), "name": _text(curve.name), "meta": curve.name,
        "line": {"color": curve.colour, "width": 1 if curve.faint else 2,
                 "dash": "dash" if curve.mark == "dash" else "solid"},
        "marker": {"color": "#fff" if curve.mark == "hollow" else curve.colour, "size": 7,
                   "line": {"color": curve.colour, "width": 1.4 if curve.mark == "hollow" else 0}},
        "opacity": 0.35 if curve.faint else 1.0, "connectgaps": False,
        "hovertemplate": "%{y:.4g} at %{x:.4g}<extra>%{fullData.name}</extra>",
    }  # fmt: skip
    if curve.hints:
        trace["text"] = [_text(hint) for hint in curve.hints]
        trace["hovertemplate"] = "%{y:.4g} at %{x:.4g}<br>%{text}<extra>%{fullData.name}</extra>"
    if curve.low is not None and curve.high is not None:
        trace["error_y"] = {**_error(curve.y, curve.low, curve.high), "color": curve.colour, "width": 0}
    return trace


def _heat(panel: Heat) -> dict[str, Any]:
    names = [_text(name, 12) for name in panel.labels]
    places = list(range(len(names)))
    scale = [[0.0, HEAT[0]], [0.5, HEAT[1]], [1.0, HEAT[2]]]
    data = [
        {
            "type": "heatmap", "z": [list(row) for row in panel.matrix], "x": places, "y": places,
            "zmin": -1, "zmax": 1,
            "colorscale": scale, "xgap": 2, "ygap": 2, "hoverongaps": False,
            "hovertemplate": "%{z:.3f}<extra></extra>",
            "colorbar": {"title": {"text": _text(panel.measure), "side": "right", "font": {"size": 11}},
                         "thickness": 12, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]},
        }
    ]  # fmt: skip
    texts = [
        {"x": j, "y": i, "text": cell(value), "showarrow": False,
         "font": {"size": 12, "color": "#fff" if value is not None and abs(value) > 0.6 else INK}}
        for i, row in enumerate(panel.matrix) for j, value in enumerate(row)
    ]  # fmt: skip
    ticks = {"tickvals": places, "ticktext": names, "showgrid": False, "zeroline": False}
    y = {**ticks, "autorange": "reversed", "title": _title(panel.y_label)}
    layout = _layout(_HEIGHT + 60, {**ticks, "title": _title(panel.x_label)}, y, annotations=texts)
    return {"data": data, "layout": layout}
