"""A report as Markdown; its figures are the PNGs beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tuner.figures import Missing
from tuner.report_page import Bullets, Code, Page, Paragraph, Table


def markdown_report(page: Page, study: str) -> str:
    """The whole file. Figures are expected as `img/<study>_<key>.png`."""
    lines = [f"# {_escape(page.title)}", "", _escape(" · ".join(page.facts)), ""]
    if page.simulated:
        lines += ["**Simulated data, not real.**", ""]
    lines += [f"**{_escape(page.conclusion)}**", ""]
    lines += _table(["Key number", "Value", ""], [[tile.name, tile.value, tile.note] for tile in page.tiles], 1)
    for section in page.sections:
        lines += ["", f"## {_escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, study), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _escape(text: str) -> str:
    """Text that Markdown, and the HTML it may hold, takes for nothing else."""
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", " ".join(str(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _block(block: Any, study: str) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield _escape(block.text)
    elif isinstance(block, Bullets):
        yield from (f"- {_escape(item)}" for item in block.items)
    elif isinstance(block, Table):
        yield from _table(block.columns, block.rows, block.n_names)
        yield ""
        yield f"*{_escape(block.caption)}*"
    elif isinstance(block, Code):
        if block.caption:
            yield from (_escape(block.caption), "")
        yield from (f"    {line}" for line in block.lines)
    elif isinstance(block, Missing):
        yield f"*{_escape(block.title)} is not drawn: {_escape(block.reason)}.*"
    else:
        yield from (
            f"### {_escape(block.title)}",
            "",
            f"![{_escape(block.title)}](img/{study}_{block.key}.png)",
            "",
        )
        if len(block.observations) <= 2:
            yield _escape(" ".join(block.observations))
        else:
            yield from (f"- {_escape(sentence)}" for sentence in block.observations)
        yield from ("", f"*{_escape(block.caption)}*")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], n_names: int) -> Iterator[str]:
    yield "| " + " | ".join(map(_escape, columns)) + " |"
    yield "|" + "|".join("---" if i < n_names else "---:" for i in range(len(columns))) + "|"
    for row in rows:
        yield "| " + " | ".join(map(_escape, row)) + " |"
