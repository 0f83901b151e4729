"""A file that a command writes: whole and durable under its name or not there, over no other by accident; and how
far it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from models.trainer import InputError
from storage.artifacts import flush_folder
from tuner.snapshots import STALE_S, disk_errors

# Without a terminal a line is printed this often.
LINE_EVERY_S = 10.0

Progress = Callable[[int, int | None], None]

WAY_OUT = "make room, mend the folder's permissions, or name another --out"


def check_out(out: Path, force: bool) -> None:
    """What would fail at the end fails at the beginning. Raises InputError."""
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, got a folder; name a file with --out")
    if out.exists() and not force:
        raise InputError(f"{out}: expected no such file, got one; --force replaces it")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: expected a folder to write to, got none; make it, or name another --out")


@contextlib.contextmanager
def draft_of(out: Path, force: bool) -> Iterator[Path]:
    """A path in a hidden folder beside `out`, for a file that takes the name at the end, and goes on any error.

    Raises:
        InputError: without `force`, somebody has made `out` meanwhile. DiskError.
    """
    prefix = f".{out.name}.tmp-"
    with disk_errors(out, "it", WAY_OUT):
        _remove_stale(out.parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        draft = folder / out.name
        yield draft
        with disk_errors(out, "it", WAY_OUT):
            _publish(draft, out, force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(draft: Path, out: Path, force: bool) -> None:
    with draft.open("rb") as whole:
        os.fsync(whole.fileno())
    if force:
        draft.replace(out)
    else:
        _take_name(draft, out)
    flush_folder(out.parent)


def _take_name(draft: Path, out: Path) -> None:
    """Rename, but never over a file that came meanwhile."""
    try:
        os.link(draft, out)
    except FileExistsError:
        raise InputError(
            f"{out}: expected no such file, got one that somebody made meanwhile; --force replaces it"
        ) from None
    except OSError:  # a file system without links
        check_out(out, force=False)
        draft.replace(out)


def _remove_stale(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


@contextlib.contextmanager
def rows_done(verb: str) -> Iterator[Progress]:
    """Rows done of all (None: not known), on stderr: a bar on a terminal, elsewhere lines, the last at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    if sys.stderr.isatty():
        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(verb, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = told = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_EVERY_S or done == total:
            told = now
            of = "" if total is None else f" of {total}"
            click.echo(f"{done}{of} rows {verb}, {done / max(now - started, 1e-9):.0f} a second", err=True)

    yield tell
