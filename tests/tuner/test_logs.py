"""Log lines: their form, what they know, what they hide, and how they are read again."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from types import SimpleNamespace

import pytest

from models.trainer import InputError
from tuner import logs

URL = "postgresql://ann:s3cret@db:5432/tuner"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leave logging and its hooks as they were."""
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in (None, "tuner", "storage", "models")}
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    for handler in [handler for handler in root.handlers if isinstance(handler, logs._StderrHandler)]:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logs.set_default(worker=None)


def event(text: str = "trial claimed", *args: object, error: BaseException | None = None, **extra: object) -> str:
    """The line of one event."""
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("tuner", logging.INFO, __file__, 1, text, args, info)  # type: ignore[arg-type]
    vars(record).update(extra)
    record.created = 1_700_000_000.9876
    return logs.EventFormatter().format(record)


def fields(line: str) -> dict[str, str]:
    """What an independent reader makes of a line: `name=value`, values plain or JSON strings."""
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


# --- the form ------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_in_a_fixed_order() -> None:
    line = event(msg_count=3, arm="wide net", worker=7, trial=12, action="claim", attempt=2, study="mvp13")
    assert line == (
        "2023-11-14T22:13:20.988Z INFO action=claim study=mvp13 trial=12 attempt=2 worker=7 "
        'msg="trial claimed" msg_count=3 arm="wide net"'
    )


@pytest.mark.parametrize(
    "text",
    ["", " ", "a b", 'say "no"', "a=b", "back\\slash", "two\nlines", "\x1b[31mred", "line\u2028separator", "±0.1",
     "\udcff", "-", "plain", "\x85next"],
)  # fmt: skip
def test_every_value_survives_on_one_line(text: str) -> None:
    line = event(action="x", value=text)
    assert len(line.splitlines()) == 1
    assert line.encode().isascii() or "±" in text
    assert "\x1b" not in line
    assert fields(line)["value"] == text


def test_plain_values_of_every_kind() -> None:
    told = fields(event(action="x", a=None, b=True, c=0.25, d=float("nan"), e=Path("/a/b"), f=[1, 2]))
    assert (told["a"], told["b"], told["c"], told["d"], told["e"]) == ("null", "true", "0.25", "nan", "/a/b")
    assert told["f"] == "[1, 2]"


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        line = event("trial failed", error=error, action="fail")
    assert len(line.splitlines()) == 1
    trace = fields(line)["traceback"]
    assert trace.startswith("Traceback (most recent call last):\n")
    assert trace.endswith("ValueError: first\nsecond")


def test_an_event_of_another_package_says_whose_it_is() -> None:
    told = fields(logs.EventFormatter().format(logging.makeLogRecord({"name": "botocore", "msg": "slow"})))
    assert (told["action"], told["logger"], told["msg"]) == ("log", "botocore", "slow")


def test_lines_split_like_a_shell_would() -> None:
    assert shlex.split(event(action="x", where="a b"))[-1] == "where=a b"


# --- context -------------------------------------------------------------------------------------------------


def test_context_is_nested_and_ends() -> None:
    with logs.context(study="s", trial=1):
        with logs.context(trial=2, attempt=5):
            assert fields(event(action="x")).items() >= {"study": "s", "trial": "2", "attempt": "5"}.items()
        assert fields(event(action="x"))["trial"] == "1"
        assert fields(event(action="x", trial=9))["trial"] == "9"
    assert "study" not in fields(event(action="x"))


def test_context_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), logs.context(study="s"):
        raise KeyError
    assert "study" not in fields(event(action="x"))


def test_the_default_is_for_every_thread_and_context_for_its_own() -> None:
    told: list[dict[str, str]] = []
    logs.set_default(worker=3)
    with logs.context(study="s"):
        thread = threading.Thread(target=lambda: told.append(fields(event(action="x"))))
        thread.start()
        thread.join()
    assert told[0]["worker"] == "3"
    assert "study" not in told[0]
    logs.set_default(worker=None)
    assert "worker" not in fields(event(action="x"))


# --- passwords -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"cannot reach {URL}, again", "cannot reach postgresql://ann:***@db:5432/tuner, again"),
        ("postgresql+psycopg://ann:p@ss:w/rd@db/x", "postgresql+psycopg://ann:***@db/x"),
        ("redis://:pw@host", "redis://:***@host"),
        ("a://u:one@h and b://u:two@h", "a://u:***@h and b://u:***@h"),
        ("host=db password=s3cret dbname=x", "host=db password=*** dbname=x"),
        ("password='two words' user=a", "password=*** user=a"),
        (r"password='it\'s one' user=a", "password=*** user=a"),
        ("{'user': 'ann', 'password': 's3cret'}", "{'user': 'ann', 'password': ***}"),
        ('{"password": "s3cret"}', '{"password": ***}'),
        ("postgresql://db/x?password=s3cret&sslmode=require", "postgresql://db/x?password=***&sslmode=require"),
        ("TUNER_DASHBOARD_PASSWORD=s3cret PGPASSWORD = s3cret", "TUNER_DASHBOARD_PASSWORD=*** PGPASSWORD = ***"),
        ("AWS_SECRET_ACCESS_KEY=s3cret&aws_session_token=x", "AWS_SECRET_ACCESS_KEY=***&aws_session_token=***"),
    ],
)  # fmt: skip
def test_passwords_are_masked(text: str, safe: str) -> None:
    assert logs.masked(text) == safe
    assert logs.masked(safe) == safe


@pytest.mark.parametrize(
    "text",
    ["postgresql://ann@db:5432/tuner", "http://127.0.0.1:9000/bucket", "s3://bucket/prefix?endpoint_url=http://h:1",
     "password authentication failed for user ann", "sqlite:///runs/tuner.db", "mail ann@example.org at 10:30",
     'note="password=***" trial=3',
     "http://127.0.0.1:9000/ and ann@example.org"],
)  # fmt: skip
def test_what_is_no_password_stays(text: str) -> None:
    assert logs.masked(text) == text


def test_nothing_of_an_event_shows_a_password() -> None:
    try:
        raise RuntimeError(f"no answer from {URL}")
    except RuntimeError as error:
        told = {"action": "x", "url": URL, "password": "s3cret", "dsn": "password='s3cret'"}
        line = event("connecting to %s", URL, error=error, **told)
    assert "s3cret" not in line
    assert line.count("ann:***@db") == 3


def test_the_console_shows_none_either() -> None:
    try:
        raise RuntimeError(f"no answer from {URL}")
    except RuntimeError as error:
        record = logging.LogRecord("tuner", logging.WARNING, "", 1, "lost %s", (URL,), (type(error), error, None))
    record.trial = 3
    text = logs.ConsoleFormatter().format(record)
    assert text == (
        "WARNING: lost postgresql://ann:***@db:5432/tuner (trial=3)\n"
        "RuntimeError: no answer from postgresql://ann:***@db:5432/tuner"
    )


# --- where lines go ------------------------------------------------------------------------------------------


def stderr_of(script: str) -> tuple[int, list[str]]:
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return process.returncode, process.stderr.splitlines()


def test_a_worker_process_writes_nothing_but_events() -> None:
    code, lines = stderr_of(
        "import logging, threading, warnings\n"
        "from tuner import logs\n"
        "logs.configure()\n"
        "logs.set_default(worker=4)\n"
        "logging.getLogger('models.gift').info('prepared', extra={'action': 'prepared'})\n"
        "logging.getLogger('botocore').info('chatter')\n"
        "warnings.warn(f'old {\"password=s3cret\"}')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='upload')\n"
        "thread.start(); thread.join()\n"
        f"raise RuntimeError({URL!r})\n"
    )
    assert code == 1
    told = [fields(line) for line in lines]
    assert [t["action"] for t in told] == ["prepared", "log", "bug", "bug"]
    assert all(t["worker"] == "4" for t in told)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ action=", line) for line in lines)
    assert "ZeroDivisionError" in told[2]["traceback"]
    assert "ann:***@db" in told[3]["traceback"]
    assert not any("s3cret" in line for line in lines)


def test_a_command_prints_a_bug_without_passwords_and_no_chatter(tmp_path: Path) -> None:
    code, lines = stderr_of(
        "import logging\n"
        "from tuner import logs\n"
        "logs.configure_console()\n"
        "logging.getLogger('tuner').info('chatter')\n"
        "logging.getLogger('tuner').warning('database away', extra={'action': 'outage'})\n"
        "open('/nowhere/password=s3cret')\n"
    )
    assert code == 1
    assert [fields(line)["action"] for line in lines] == ["outage", "bug"]
    assert "s3cret" not in "\n".join(lines)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_events_are_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    logs.configure_console()
    logging.getLogger("tuner").warning("trial re-queued", extra={"action": "requeue", "study": "s", "trial": 3})
    try:
        raise RuntimeError(URL)
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert screen.getvalue().startswith("WARNING: trial re-queued (study=s trial=3)\nTraceback (most recent")
    assert screen.getvalue().endswith("RuntimeError: postgresql://ann:***@db:5432/tuner\n")


def test_a_live_display_that_takes_over_stderr_gets_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure_console()
    display = io.StringIO()
    monkeypatch.setattr(sys, "stderr", display)
    logging.getLogger("storage").warning("away", extra={"action": "retry"})
    assert "action=retry" in display.getvalue()


def test_configured_twice_an_event_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_console()
    logs.configure()
    logging.getLogger("tuner").warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_who_watches_threads_already_goes_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def watching(_: object) -> None: ...

    monkeypatch.setattr(threading, "excepthook", watching)
    logs.configure()
    assert threading.excepthook is watching


def test_ctrl_c_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logs.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "action=bug" not in capsys.readouterr().err


# --- reading -------------------------------------------------------------------------------------------------


def line(second: int, text: str) -> str:
    return f"2026-11-21T10:00:{second:02d}.000Z INFO action={text}"


def write(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(f"{text}\n" for text in lines))


def test_files_are_merged_by_time(tmp_path: Path) -> None:
    write(tmp_path / "a.log", line(1, "a1"), line(3, "a3"), line(3, "a3b"))
    write(tmp_path / "b.log", line(2, "b2"), line(4, "b4"))
    write(tmp_path / "other.txt", line(0, "no"))
    told = [text.rpartition("=")[2] for text in logs.merged(tmp_path)]
    assert told == ["a1", "b2", "a3", "a3b", "b4"]


def test_other_lines_stay_with_the_events_around_them(tmp_path: Path) -> None:
    write(tmp_path / "a.log", "head", line(2, "a2"), "Fatal Python error", "  more", line(5, "a5"))
    write(tmp_path / "b.log", line(1, "b1"), line(3, "b3"))
    told = [text.rpartition("=")[2] for text in logs.merged(tmp_path)]
    assert told == ["b1", "head", "a2", "Fatal Python error", "  more", "b3", "a5"]


def test_a_file_without_events_has_the_time_of_its_last_change(tmp_path: Path) -> None:
    write(tmp_path / "a.log", "progress")
    write(tmp_path / "b.log", line(1, "b1"), line(3, "b3"))
    moment = 1795255202  # 2026-11-21T10:00:02Z
    os.utime(tmp_path / "a.log", (moment, moment))
    assert [text[-8:] for text in logs.merged(tmp_path)] == ["ction=b1", "progress", "ction=b3"]


def test_a_clock_that_was_set_back_changes_no_order_within_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.log", line(9, "a9"), line(1, "a1"))
    write(tmp_path / "b.log", line(5, "b5"))
    assert [text.rpartition("=")[2] for text in logs.merged(tmp_path)] == ["b5", "a9", "a1"]


def test_what_others_wrote_is_masked_and_readable(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"could not reach " + URL.encode() + b"\r\n\xff\xfe\nunfinished")
    assert list(logs.merged(tmp_path)) == [
        "could not reach postgresql://ann:***@db:5432/tuner", "��", "unfinished",
    ]  # fmt: skip


def test_an_event_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = event("connecting", action="x", note=f"{URL}\nat@home")
    assert logs.masked(written) != written
    write(tmp_path / "a.log", written)
    assert list(logs.merged(tmp_path)) == [written]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.log").mkdir()
    with pytest.raises(InputError, match=r"a\.log: cannot be read \(Is a directory\)"):
        list(logs.merged(tmp_path))


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue[str]]:
    """The lines that come while the folder is followed."""
    came: Queue[str] = Queue()
    ended = threading.Event()

    class Ended(Exception): ...

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):
            raise Ended

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=sleep, time=time.time, strftime=time.strftime,
                                                      gmtime=time.gmtime))  # fmt: skip

    def follow() -> None:
        try:
            for text in logs.merged(tmp_path, follow=True, poll_s=0.01):
                came.put(text.rpartition("=")[2])
        except Ended:
            pass

    thread = threading.Thread(target=follow)
    thread.start()
    yield came
    ended.set()
    thread.join(10)
    assert not thread.is_alive()


def next_lines(came: Queue[str], n: int) -> list[str]:
    return [came.get(timeout=20) for _ in range(n)]


def nothing_comes(came: Queue[str]) -> bool:
    with pytest.raises(Empty):
        came.get(timeout=0.2)
    return True


def test_following_waits_for_the_end_of_a_line_and_for_new_files(tmp_path: Path, following: Queue[str]) -> None:
    write(tmp_path / "a.log", line(1, "a1"))
    assert next_lines(following, 1) == ["a1"]
    with (tmp_path / "a.log").open("a") as file:
        file.write(line(2, "a")[:-1])
        file.flush()
        assert nothing_comes(following)
        file.write("=a2\n")
    assert next_lines(following, 1) == ["a2"]
    write(tmp_path / "b.log", line(3, "b3"))
    assert next_lines(following, 1) == ["b3"]


def test_following_survives_truncation_rotation_and_removal(tmp_path: Path, following: Queue[str]) -> None:
    path = tmp_path / "a.log"
    write(path, line(1, "one"), line(2, "two"))
    assert next_lines(following, 2) == ["one", "two"]
    os.truncate(path, 0)
    time.sleep(0.2)
    write(path, line(3, "three"))
    assert next_lines(following, 1) == ["three"]
    os.rename(path, tmp_path / "a.log.1")
    write(tmp_path / "a.log.1", line(4, "late"))
    write(path, *(line(5, word) for word in ("five", "a", "b", "c")))  # longer than the one before
    assert next_lines(following, 5) == ["late", "five", "a", "b", "c"]
    path.unlink()
    time.sleep(0.2)
    write(path, line(6, "six"))
    assert next_lines(following, 1) == ["six"]
    assert nothing_comes(following)
