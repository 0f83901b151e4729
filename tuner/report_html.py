"""A report as one HTML file that needs nothing else: style, scripts, plotly and data are inside.

All text is escaped, the data for the plots too; a policy in the head forbids the page to ask a network.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from tuner.figures import Entry, Figure, Missing, legend
from tuner.figures_html import plot
from tuner.report_page import Bullets, Code, Page, Paragraph, Section, Table, Tile

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_OUTCOMES = {"helps": "helps", "does not": "does not help enough", "undecided": "undecided with these data"}


def html_report(page: Page) -> str:
    """The whole file."""
    plots: list[dict[str, Any]] = []
    body = "\n".join(_section(number, section, plots) for number, section in enumerate(page.sections, 1))
    browser = files("tuner") / "browser"
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escape(page.title)}</title>",
            f"<style>\n{(browser / 'report.css').read_text('utf-8')}</style>\n</head>\n<body>\n<main>",
            _head(page),
            _contents(page.sections),
            body,
            "</main>",
            f'<script id="plots" type="application/json">{_embedded(plots)}</script>',
            "<script>" + plotly.replace("</script", "<\\/script") + "</script>",
            f"<script>\n{(browser / 'report.js').read_text('utf-8')}</script>\n</body>\n</html>\n",
        ]
    )


def _escape(text: str) -> str:
    """What stands before a per cent sign stays on its line."""
    return html.escape(re.sub(r"(?<=\d) %", "\u00a0%", str(text)), quote=True)


def _embedded(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _head(page: Page) -> str:
    badge = '<p class="badge simulated">Simulated data, not real</p>' if page.simulated else ""
    outcome = ""
    if page.outcome is not None:
        kind = page.outcome.replace(" ", "-")
        outcome = f'<p class="badge {kind}">{_escape(_OUTCOMES.get(page.outcome, page.outcome))}</p>'
    tiles = "".join(_tile(tile) for tile in page.tiles)
    facts = " · ".join(map(_escape, page.facts))
    return (
        f'<header>\n<div class="badges">{outcome}{badge}</div>\n<h1>{_escape(page.title)}</h1>\n'
        f'<p class="facts">{facts}</p>\n<p class="conclusion">{_escape(page.conclusion)}</p>\n'
        f'<dl class="tiles">{tiles}</dl>\n</header>'
    )


def _tile(tile: Tile) -> str:
    value = f"<b>{_escape(tile.value)}</b><span>{_escape(tile.note)}</span>"
    return f"<div><dt>{_broken(tile.name)}</dt><dd>{value}</dd></div>"


def _broken(name: str) -> str:
    """A name that may be broken after an underscore or a dot."""
    return _escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>").replace("/", "/<wbr>")


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#s{n}">{_escape(s.title)}</a></li>' for n, s in enumerate(sections, 1))
    return f'<nav aria-label="Contents"><ol>{links}</ol></nav>'


def _section(number: int, section: Section, plots: list[dict[str, Any]]) -> str:
    blocks = "\n".join(_block(block, plots) for block in section.blocks)
    return f'<section id="s{number}">\n<h2>{_escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Any, plots: list[dict[str, Any]]) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_escape(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        caption = f"<p>{_escape(block.caption)}</p>" if block.caption else ""
        return caption + "<pre>" + "\n".join(_escape(line) for line in block.lines) + "</pre>"
    if isinstance(block, Missing):
        return f'<p class="missing"><b>{_escape(block.title)}</b> is not drawn: {_escape(block.reason)}.</p>'
    return _figure(block, plots)


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> Iterator[str]:
        for index, cell in enumerate(cells):
            kind = ' class="name"' if index < table.n_names else ""
            content = _broken(cell) if index < table.n_names else _cell(cell)
            yield f"<{tag}{kind}>{content}</{tag}>"

    narrow = ' class="narrow"' if len(table.columns) <= 3 else ""
    head = "".join(row(table.columns, "th"))
    body = "".join(f"<tr>{''.join(row(cells, 'td'))}</tr>" for cells in table.rows)
    drawn = f'<div class="scroll"><table{narrow}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if table.folded:
        return f"<details><summary>{_escape(table.caption)}</summary>{drawn}</details>"
    return f'<figure class="table">{drawn}<figcaption>{_escape(table.caption)}</figcaption></figure>'


def _cell(text: str) -> str:
    """An interval stands below its value."""
    value, found, between = text.partition(" (")
    if not found or " to " not in between:
        return _escape(text)
    return f"{_escape(value)}<small>{_escape(between.removesuffix(')'))}</small>"


def _figure(figure: Figure, plots: list[dict[str, Any]]) -> str:
    panels = []
    for panel in figure.panels:
        drawn: Mapping[str, Any] = plot(panel)
        title = f"<h4>{_escape(panel.title)}</h4>" if len(figure.panels) > 1 else ""
        wide = " wide" if drawn.get("wide") else ""
        style = f'style="min-height:{drawn["layout"]["height"]}px"'
        label = _escape(f"{figure.title}: {panel.title}")
        panels.append(
            f'<div class="panel{wide}">{title}<div class="plot" data-plot="{len(plots)}" role="img" '
            f'aria-label="{label}" {style}></div></div>'
        )
        plots.append({"data": drawn["data"], "layout": drawn["layout"]})
    entries = "".join(_entry(entry) for entry in legend(figure))
    several = " several" if len(figure.panels) > 1 else ""
    return (
        f'<figure class="drawn" id="{_escape(figure.key)}">\n<h3>{_escape(figure.title)}</h3>\n'
        f'{_observations(figure.observations)}\n<div class="legend">{entries}</div>\n'
        f'<div class="panels{several}">{"".join(panels)}</div>\n'
        f"<figcaption>{_escape(figure.caption)}</figcaption>\n</figure>"
    )


def _observations(sentences: Sequence[str]) -> str:
    """A few as a paragraph, more as a list."""
    if len(sentences) <= 2:
        return f'<p class="observation">{_escape(" ".join(sentences))}</p>'
    return f'<ul class="observation">{"".join(f"<li>{_escape(sentence)}</li>" for sentence in sentences)}</ul>'


def _entry(entry: Entry) -> str:
    """A line of a legend; its marks are hidden and shown again by a click."""
    return (
        f'<button type="button" data-name="{_escape(entry.name)}" aria-pressed="true"><i class="{entry.mark}" '
        f'style="--colour:{entry.colour}"></i>{_broken(entry.name)}</button>'
    )
