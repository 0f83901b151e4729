"""The page of the study names every feature, with its meaning."""

from __future__ import annotations

from pathlib import Path

from models.gift.features import categorical_meanings, numeric_meanings

PAGE = Path(__file__).parents[3] / "docs" / "mvp13.md"


def test_the_page_lists_every_feature():
    lines = set(PAGE.read_text().splitlines())
    meanings = {**numeric_meanings(), **categorical_meanings(True)}
    assert {name for name, meaning in meanings.items() if f"| `{name}` | {meaning} |" not in lines} == set()
