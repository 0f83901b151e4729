"""What the folders of exported models have in common: a `model.json` that says whose it is and by which rules."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.trainer import InputError

MODEL = "model.json"


def refuse_used(folder: Path) -> None:
    """Raises InputError unless the folder is an empty one."""
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(f"{folder}: expected an empty folder to export to, got another; name a new one")


def write_content(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `model.json`: `content` has `format`, `trainer` and `versions` among others; numbers are finite."""
    (folder / MODEL).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_content(folder: Path, trainer: str, format_: int) -> dict[str, Any]:
    """What `model.json` holds. Raises InputError: missing, damaged, of another trainer or format."""
    path = folder / MODEL
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: expected an exported model, got none; check the path of the model") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got a damaged file; export the model again") from error
    if not isinstance(content, dict) or content.get("trainer") != trainer:
        raise InputError(
            f"{path}: expected a model of the trainer {trainer}, got another; check the path of the model"
        )
    if content.get("format") != format_:
        found = content.get("format")
        raise InputError(f"{path}: expected model format {format_}, got {found!r}; export the model again")
    return content


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns what reading a damaged folder raises into an InputError about it."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{folder}: expected a whole exported model, got a damaged one ({reason})") from error


def refuse_other_versions(folder: Path, found: Any, versions: Mapping[str, int]) -> None:
    """Raises InputError where a model was made by other rules than `versions`, those of this package."""
    if found != versions:
        raise InputError(
            f"{folder}: expected a model of the rules {_told(versions)}, got {_told(found)}; "
            "score with the package that exported it"
        )


def _told(versions: Any) -> str:
    if not isinstance(versions, Mapping):
        return repr(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items())
