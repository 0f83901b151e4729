"""Checkpoints on their way to the artifact store and back: a trial can go on where its files have never been.

The trainer drops old steps while an upload is under way; what is uploaded is therefore linked away first, in the
trainer's own thread, and goes up in another one. `tuner.snapshots` says what goes, and how it lies there.
"""

from __future__ import annotations

import contextvars
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from storage.artifacts import ArtifactMissing, ArtifactStore, ArtifactUnavailable
from storage.database import Unavailable
from storage.runs import Fenced
from tuner.snapshots import (
    Damaged,
    Shelf,
    Staged,
    bring,
    disk_errors,
    newest_step,
    prepare,
    stage,
    stored_snapshots,
)

log = logging.getLogger("tuner")

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
# How long leaving a run waits for an upload that is under way; on its own it ends with the process.
CLOSE_S = 5.0


class Uploads:
    """The part of an artifact store that belongs to one study.

    Args:
        every_s: a run uploads at most this often while it trains.
    """

    def __init__(self, store: ArtifactStore, study: str, every_s: float = 30.0) -> None:
        self.store = store
        self.study = study
        self.every_s = every_s

    def has_study(self) -> bool:
        """Whether anything of the study is stored."""
        return bool(self.store.names(self.study))

    def delete_study(self) -> None:
        """Delete everything of the study; nothing may be there."""
        self.store.delete(self.study)

    def open(self, number: int, attempt: int, directory: Path, name: Callable[[int], None]) -> RunUploads:
        """The way up for one attempt, to be used as a context.

        Args:
            directory: of the run.
            name: called with a step, in a thread of the uploads, once its snapshot is stored: it names it in the
                database, and may raise Fenced. On DatabaseUnavailable it is called again.
        """
        return RunUploads(self, number, attempt, directory, name)

    def restore(self, number: int, directory: Path, named: tuple[int, int] | None) -> tuple[int, int] | None:
        """Bring the newest good snapshot into the run's directory, where that holds nothing as new.

        A damaged one is named in the log, and the one before it used. Where all are, or none is named, nothing is
        brought.

        Args:
            named: (attempt, step) of the newest snapshot that the database knows.

        Returns:
            (attempt, step) of what was brought: `attempt-<attempt>/step-<step>` is there now; else None.

        Guarantees:
            The step appears in one move, after everything it needs.

        Raises:
            ArtifactError: ArtifactUnavailable where asking again can help.
            DiskError: the run's disk is full or read-only.
        """
        here = newest_step(directory)
        if named is None or (here is not None and here >= named):
            return None
        prepare(directory, 0)
        for attempt, step, key in stored_snapshots(self.store, self._trial(number), named):
            if here is not None and here >= (attempt, step):
                return None
            try:
                with disk_errors(directory):
                    bring(self.store, key, directory)
            except (Damaged, ArtifactMissing) as error:
                log.warning("%s", error, extra={"action": "snapshot_skipped", "key": key})
                continue
            log.info("checkpoint restored", extra={"action": "restore", "step": step, "of_attempt": attempt})
            return attempt, step
        log.warning(
            "no whole snapshot up to step %d of attempt %d is stored: the trial goes on from what is here",
            named[1], named[0], extra={"action": "snapshot_missing"},
        )  # fmt: skip
        return None

    def _trial(self, number: int) -> str:
        return f"{self.study}/trials/{number:05d}"


class RunUploads:
    """One attempt's uploads: `offer` each step, the newest goes up in the background; `finish` sees it through.

    As a context it owns a thread and a hidden folder in the run's directory; both end with it.
    """

    def __init__(
        self, uploads: Uploads, number: int, attempt: int, directory: Path, name: Callable[[int], None]
    ) -> None:
        self._store = uploads.store
        self._every_s = uploads.every_s
        self._trial = uploads._trial(number)
        self._attempt = attempt
        self._directory = directory
        self._name = name
        self._shelf = Shelf(uploads.store, self._trial, attempt)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # What follows is guarded by `_changed`.
        self._pending: Staged | None = None  # newest step that was offered and is not stored
        self._unnamed: int | None = None  # newest step that is stored and not named
        self._offered = self._named = -1
        self._due = time.monotonic() + self._every_s  # for the next upload
        self._not_before = 0.0  # for the next try after a transient error
        self._trouble: Exception | None = None  # the newest transient error
        self._error: BaseException | None = None  # ended the thread
        self._finishing = 0
        self._closed = False

    def __enter__(self) -> RunUploads:
        prepare(self._directory, self._attempt)
        # A copy of the context: the log names the trial in the thread's lines too.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._work,), name=f"uploads {self._trial}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            staged, self._pending = self._pending, None
            self._changed.notify_all()
        if staged is not None:
            staged.remove()
        assert self._thread is not None
        self._thread.join(CLOSE_S)

    def offer(self, step: int) -> None:
        """A step's checkpoint is durable: it may go up now, in its turn, or be overtaken by a newer one.

        Costs some hard links. Called by the thread that runs the trainer, between two steps.

        Raises:
            ArtifactError, Fenced: met in the background; nothing goes up any more.
            DiskError: the run's disk is full or read-only.
        """
        with self._changed:
            self._check()
        staged = stage(self._directory, self._attempt, step)
        with self._changed:
            overtaken, self._pending = self._pending, staged
            self._offered = step
            self._changed.notify_all()
        if overtaken is not None:
            overtaken.remove()

    def hurry(self) -> None:
        """From now on nothing waits for its turn: the run is being left."""
        with self._changed:
            self._finishing += 1
            self._not_before = 0.0
            self._changed.notify_all()

    @property
    def is_up(self) -> bool:
        """Whether the newest offered step is stored and named. Raises as `finish` where it never will be."""
        with self._changed:
            if self._named < self._offered:
                self._check()
            return self._named >= self._offered

    def finish(self, patience_s: float) -> None:
        """Wait until the newest offered step is stored and named, without waiting for its turn.

        Raises:
            ArtifactUnavailable, DatabaseUnavailable: not within `patience_s`.
            ArtifactError, Fenced: it never will be.
        """
        deadline = time.monotonic() + patience_s
        self.hurry()
        with self._changed:
            try:
                while self._named < self._offered:
                    self._check()
                    rest_s = deadline - time.monotonic()
                    if rest_s <= 0:
                        raise self._trouble or ArtifactUnavailable(
                            f"artifacts: {self._store.url}: step {self._offered} of {self._trial} is not stored "
                            f"after {patience_s:g} s"
                        )
                    self._changed.wait(rest_s)
            finally:
                self._finishing -= 1

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the background thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        delay_s = FIRST_DELAY_S
        try:
            while self._wait():
                if (trouble := self._advance()) is None:
                    delay_s = FIRST_DELAY_S
                else:
                    self._put_off(trouble, delay_s * random.uniform(0.5, 1.0))
                    delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        except BaseException as error:
            if not isinstance(error, Fenced):
                log.error("no more uploads: %s", error, extra={"action": "upload_failed"})
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _advance(self) -> Unavailable | None:
        """Store and name what is ready; one does not wait for the other's server to come back."""
        trouble = None
        for act in (self._store_pending, self._name_stored):
            try:
                act()
            except Unavailable as error:
                trouble = error
        return trouble

    def _wait(self) -> bool:
        """Until there is something to do; False: nothing any more."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                ready = []
                if self._pending is not None:
                    ready.append(self._not_before if self._finishing else max(self._due, self._not_before))
                if self._unnamed is not None:
                    ready.append(self._not_before)
                if ready and min(ready) <= now:
                    return True
                self._changed.wait(min(ready) - now if ready else None)
        return False

    def _store_pending(self) -> None:
        started = time.monotonic()
        with self._changed:
            if self._pending is None or (started < self._due and not self._finishing):
                return
            staged, self._pending = self._pending, None
        try:
            size_bytes = self._shelf.add(staged)
        except Unavailable:
            with self._changed:
                if self._pending is None and not self._closed:
                    self._pending, staged = staged, None  # once more, unless a newer one has come
            raise
        finally:
            if staged is not None:
                staged.remove()
        elapsed_s = time.monotonic() - started
        log.info(
            "checkpoint uploaded",
            extra={
                "action": "upload", "step": staged.step, "size_bytes": size_bytes,
                "elapsed_s": round(elapsed_s, 3),
            },
        )  # fmt: skip
        with self._changed:
            self._due = started + self._every_s
            self._unnamed = staged.step

    def _name_stored(self) -> None:
        with self._changed:
            step = self._unnamed
        if step is None:
            return
        self._name(step)
        with self._changed:
            self._unnamed = None
            self._named = step
            self._trouble = None
            self._changed.notify_all()
        self._shelf.tidy()

    def _put_off(self, error: Exception, delay_s: float) -> None:
        log.warning(
            "upload put off: %s", error, extra={"action": "upload_retry", "delay_s": round(delay_s, 1)}
        )  # fmt: skip
        with self._changed:
            self._trouble = error
            self._not_before = time.monotonic() + delay_s
