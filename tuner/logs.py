"""Log lines: one an event, with stable `action` names, and never a password.

Code logs by `log.info("trial claimed", extra={"action": "claim", "trial": 3})`. What holds for a whole stretch of
work (study, trial, attempt) is said once by `context`, what holds for the process (worker) by `set_default`.
"""

from __future__ import annotations

import contextvars
import heapq
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

# What every record has; the other attributes of one are the `extra` of whoever logged it.
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_LEADING = ("action", "study", "trial", "attempt", "worker")
# Whose progress is worth a line; of all other packages only warnings are.
_OURS = ("tuner", "storage", "models")

_SECRET_NAME = r"(?:password|passwd|secret_access_key|session_token)"
_IN_URL = re.compile(r"//([^\s:/@]*):\S*@")  # up to the last @: a password may have one
_QUOTED = r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.)*\""
_ASSIGNED = re.compile(
    rf"({_SECRET_NAME}\s*=\s*)(?:\*\*\*|{_QUOTED}|[^\s&]+)|({_SECRET_NAME}['\"]\s*:\s*)(?:{_QUOTED})", re.IGNORECASE
)
_EVENT_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z(?= )")

_default: dict[str, Any] = {}
_context: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("log_context", default={})  # noqa: B039


def masked(text: str) -> str:
    """The text with `***` for the password of every URL and of every `password=…` in it; safe to print."""
    return _ASSIGNED.sub(r"\1\2***", _IN_URL.sub(r"//\1:***@", text))


@contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Put fields on every event logged inside, by this thread; inner values go before outer ones."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def set_default(**fields: Any) -> None:
    """Put fields on every event of this process, whichever thread logs it; None takes one away."""
    _default.update(fields)
    for name in [name for name, value in _default.items() if value is None]:
        del _default[name]


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What is known of an event beside its text: defaults, context, and before these the record's own `extra`."""
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {**_default, **_context.get(), **extra}


class EventFormatter(logging.Formatter):
    """`<ISO time, UTC> <LEVEL> action=… study=… trial=… attempt=… worker=… msg="…" other=… traceback="…"`.

    A value is a JSON string where it could not stand alone. An event without an action, of another package, has
    `action=log` and says whose it is: `logger=…`.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        if "action" not in fields:
            fields |= {"action": "log", "logger": record.name}
        told = {name: fields.pop(name) for name in _LEADING if name in fields}
        told |= {"msg": _message(record), **fields}
        if trace := _trace(record):
            told["traceback"] = trace
        return " ".join([_iso(record.created), record.levelname, *(f"{n}={_value(n, v)}" for n, v in told.items())])


class ConsoleFormatter(logging.Formatter):
    """`LEVEL: text (study=… trial=…)` for a person; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        known = [f"{name}={_value(name, fields[name])}" for name in _LEADING[1:] if name in fields]
        line = f"{record.levelname}: {_message(record)}" + (f" ({' '.join(known)})" if known else "")
        trace = _trace(record)
        return f"{line}\n{trace}" if trace else line


def _message(record: logging.LogRecord) -> str:
    return masked(record.getMessage())


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return masked("".join(traceback.format_exception(*record.exc_info)).rstrip())


def _value(name: str, value: Any) -> str:
    if re.search(_SECRET_NAME, name, re.IGNORECASE):
        return "***"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = masked(str(value))
    if text.isprintable() and re.fullmatch(r'[^\s"=\\]+', text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _iso(epoch_s: float) -> str:
    milliseconds = round(epoch_s * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


# --- where they go -------------------------------------------------------------------------------------------


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at the time: a live display puts itself in its place."""

    def __init__(self, formatter: logging.Formatter) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(formatter)

    @property
    def stream(self) -> Any:
        return sys.stderr


def configure() -> None:
    """For a process without a person in front of it: every event is one line on stderr, Python's own warnings and
    the traceback of a bug included."""
    _install(EventFormatter(), logging.INFO)
    logging.captureWarnings(True)


def configure_console() -> None:
    """For a command: warnings and worse on stderr, readable on a terminal, elsewhere (a log file) as events.

    The traceback of a bug is printed as Python does, without the passwords in it.
    """
    _install(ConsoleFormatter() if sys.stderr.isatty() else EventFormatter(), logging.NOTSET)


def _install(formatter: logging.Formatter, level: int) -> None:
    """`level` is that of our own packages; NOTSET: warnings, as of all others."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _StderrHandler)]:
        root.removeHandler(handler)
    root.addHandler(_StderrHandler(formatter))
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    sys.excepthook = excepthook
    if threading.excepthook is threading.__excepthook__:  # else somebody watches threads already
        threading.excepthook = _thread_excepthook


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug, told like any other event; on a terminal as Python prints it, without the passwords."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, _StderrHandler)]
    if handlers and isinstance(handlers[0].formatter, EventFormatter):
        logging.getLogger("tuner").critical("bug: %s", error, exc_info=error, extra={"action": "bug"})
        return
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))


def _thread_excepthook(told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None:
        excepthook(told.exc_type, told.exc_value, told.exc_traceback)


# --- reading them --------------------------------------------------------------------------------------------


def merged(folder: Path, follow: bool = False, poll_s: float = 0.5) -> Iterator[str]:
    """The lines of every `*.log` of a folder by time; with `follow` then those that come, for ever.

    A line that is no event stays behind the event before it in its file, and at the head of a file before the
    first one; a file without any event has the time of its last change. Files may be truncated, replaced, added
    and removed meanwhile. An unfinished line waits for its end, while following.

    Raises:
        InputError: a file cannot be read.
    """
    tails: dict[Path, _Tail] = {}
    try:
        yield from _in_order(_renewed(tails, folder))
        while follow:
            time.sleep(poll_s)
            yield from _in_order(_renewed(tails, folder))
        for tail in tails.values():
            yield from tail.rest()
    finally:
        for tail in tails.values():
            tail.close()


def _renewed(tails: dict[Path, _Tail], folder: Path) -> list[_Tail]:
    """All tails, among them new ones for new files; those whose file is gone for good are dropped."""
    for path in sorted(folder.glob("*.log")):
        tails.setdefault(path, _Tail(path))
    for path in [path for path, tail in tails.items() if tail.gone]:
        tails.pop(path).close()
    return list(tails.values())


def _in_order(tails: Iterable[_Tail]) -> Iterator[str]:
    for _, line in heapq.merge(*(tail.read() for tail in tails), key=lambda timed: timed[0]):
        # An event was masked when it was written; what a library printed was not.
        yield line if _EVENT_TIME.match(line) else masked(line)


class _Tail:
    """One log file, read from where the last reading ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._partial = b""
        self._time = ""
        self.gone = False

    def read(self) -> Iterator[tuple[str, str]]:
        """(time, line) of every whole line since, in the order of the file and of time."""
        head: list[str] = []
        for line in self._lines():
            found = _EVENT_TIME.match(line)
            if found is None and not self._time:
                head.append(line)
                continue
            if found is not None:
                self._time = found[0]
                yield from ((self._time, earlier) for earlier in head)
                head = []
            yield self._time, line
        if head:
            changed = os.fstat(self._file.fileno()).st_mtime if self._file else time.time()
            yield from ((_iso(changed), line) for line in head)

    def rest(self) -> Iterator[str]:
        """The unfinished line at the end."""
        if self._partial:
            yield masked(_decoded(self._partial))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> Iterator[str]:
        """New lines of the file we have open, then of the one that has taken its place."""
        if self._file is not None:
            yield from self._more()
            if not self._replaced():
                return
            self.close()
            if self._partial:
                yield _decoded(self._partial)
                self._partial = b""
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            self.gone = True
            return
        except OSError as error:
            from models.trainer import InputError  # which would make `tuner --help` wait

            raise InputError(f"{self._path}: cannot be read ({error.strerror}); mend its permissions") from error
        yield from self._more()

    def _more(self) -> Iterator[str]:
        assert self._file is not None
        while block := self._file.read(1 << 16):
            *whole, self._partial = (self._partial + block).split(b"\n")
            yield from map(_decoded, whole)

    def _replaced(self) -> bool:
        """Whether the path names another file by now, or this one was cut short."""
        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino) or there.st_size < self._file.tell()


def _decoded(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
