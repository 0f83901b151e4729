"""What `Trainer.describe` is made of, whichever the trainer: tables, checks, and the check all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from models.trainer import ROLES, InputError


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def usable_check(refuse: Callable[[], None]) -> dict[str, Any]:
    """Whether `refuse`, which raises InputError about a role that is of no use, has nothing to say."""
    name = "every role has rows, positives and negatives"
    try:
        refuse()
    except InputError as error:
        return check(name, False, str(error))
    return check(name, True, f"{len(ROLES)} roles")
