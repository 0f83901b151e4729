"""A worker: takes trials of a study, trains as many at once as it has slots for on one device, in rounds."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from models.trainer import DiskError, InputError, Measurement
from storage.database import DatabaseUnavailable, StorageError, Unavailable, retry
from storage.leases import GRACE_S, RENEW_EVERY_S
from storage.runs import Fenced
from tuner import logs
from tuner.course import Course, Outage, is_device_fault, reason_of
from tuner.study import Claim, Study
from tuner.uploads import Uploads

log = logging.getLogger("tuner")

# How long a claim, a stop or an end waits for a database or an artifact store that is away.
OUTAGE_S = 900.0
# How long a worker that is told to stop waits for its next measurement.
STOP_GRACE_S = 100.0
UPLOAD_EVERY_S = 30.0
IDLE_POLL_S = 0.5
# Who has trials in hand and found no other one asks again after this time.
LOOK_AGAIN_S = 5.0
# The most trials at once that a worker chooses for itself. With many in flight a sampler that learns from ended
# trials has little to learn from, and comes down to random search.
MOST_SLOTS, MOST_LEARNING_SLOTS = 32, 8
LEARNING_SAMPLERS = frozenset({"tpe", "gp", "cmaes"})
AUTO: Literal["auto"] = "auto"


class DeviceFault(Exception):
    """The device failed under a trial: nothing works on it any more in this process, but in a new one it may.

    Args:
        shared: several trials were under way, and nobody knows whose fault it was. They are still in hand, and the
            end of the process counts as a crash of each.
    """

    def __init__(self, reason: str, shared: bool = False) -> None:
        super().__init__(reason)
        self.shared = shared


@dataclass(frozen=True)
class WorkerOptions:
    """What a supervisor tells a worker process, as JSON in its arguments; the database URL comes by TUNER_STORAGE.

    Args:
        studies: serve these alone; none: whatever is queued.
        data_path: the data of `tuner run`; None: they are found below `roots`, by their hashes.
        stay: wait for more when nothing is left to do.
        slots: how many trials are trained at once; `auto`: as many as the trainer finds best, on a CPU one.

    Raises:
        InputError: `slots` is something else.
    """

    device: str
    runs: str
    cache: str
    studies: tuple[str, ...] = ()
    data_path: str | None = None
    data_path_given: bool = False
    roots: tuple[str, ...] = ()
    artifacts: str | None = None
    upload_every_s: float = UPLOAD_EVERY_S
    stay: bool = False
    slots: int | Literal["auto"] = AUTO
    stop_grace_s: float = STOP_GRACE_S
    outage_s: float = OUTAGE_S
    renew_every_s: float = RENEW_EVERY_S
    grace_s: float = GRACE_S

    def __post_init__(self) -> None:
        if self.slots != AUTO and (type(self.slots) is not int or self.slots < 1):
            raise InputError(f"--slots: expected auto or a number from 1, got {self.slots!r}")

    @classmethod
    def from_json(cls, text: str) -> WorkerOptions:
        tree = json.loads(text)
        return cls(**{**tree, "studies": tuple(tree["studies"]), "roots": tuple(tree["roots"])})

    @property
    def torch_device(self) -> str:
        """The device as the process sees it, to which its supervisor has shown no other one."""
        return "cuda:0" if self.device.startswith("cuda") else self.device


class Worker:
    """Serves one study on one device.

    It has a number of slots, each for one trial, and works in rounds: free slots are filled, every trial in hand is
    brought to its next measurement (`Trainer.advance`), then each is handled in the order of slots. What is begun
    and ended in which order depends on the number of slots, and on nothing else in this process.

    Args:
        data: what the trainer's `load` returned; train and valid alone.
        stop: set from outside to stop at the next measurement.
        steady: whether leases of other hosts may be judged (LeaseThread.steady).
        uploads: the study's part of the artifact store; None: checkpoints stay in the folder of runs.
    """

    def __init__(
        self, study: Study, trainer: Any, data: Any, worker_id: int, options: WorkerOptions, stop: threading.Event,
        steady: Callable[[], bool] = lambda: False, uploads: Uploads | None = None,
    ) -> None:  # fmt: skip
        self.study = study
        self.trainer = trainer
        self.data = data
        self.worker_id = worker_id
        self.options = options
        self.stop = stop
        self.steady = steady
        self.uploads = uploads
        self.n_slots = 1
        self.fit_s = 0.0  # time spent inside the trainer, for the share of everything else
        self.outage, self.store_outage = Outage(), Outage()  # of the database, of the artifact store
        self._courses: dict[int, Course] = {}  # the trials in hand, by slot
        self._most = 0  # of how many the number of slots was chosen
        self.leave_by: float | None = None  # what is in hand is being put back, and waits for no upload after this
        self._look_again = 0.0

    def serve(self) -> None:
        """Take trials until every trial of the study's total has ended, the study or this worker is stopped.

        Raises:
            TooManyFailures, DiskError, DeviceFault, StorageError, InputError.
        """
        while not self.stop.is_set():
            if self.work():
                continue
            if self._patiently(self.study.is_over, "count"):
                return
            # Somebody else's trial may yet come back to the queue.
            held = True
            while held and not self.stop.wait(IDLE_POLL_S):
                held = self._patiently(lambda: self.study.is_held(self.steady(), self.options.grace_s), "wait")

    def work(self, more: Callable[[], bool] = lambda: True) -> bool:
        """Take as many trials as there are slots, if there are any, and see them to their ends.

        Args:
            more: whether a slot that becomes free meanwhile is filled again, while others are in hand. May raise
                DatabaseUnavailable, which means not now.

        Returns:
            False when there was none.

        Raises:
            As `serve`. What is in hand then is put back in the queue, at its newest checkpoint.
        """
        self._choose_slots()
        self._look_again = 0.0
        try:
            taken = self._fill(lambda: True)
            while self._courses:
                self._round()
                if self._courses:
                    self._fill(more)
            return taken
        except Exception as error:
            self._leave(error)
            raise
        finally:
            for course in self._in_hand():
                with suppress(Exception):  # on a device that failed nothing is let go in order
                    course.close()
            self._courses.clear()
            self.leave_by = None

    def abandon(self) -> None:
        """Put what is in hand back in the queue at its newest checkpoint, from another thread; the process ends
        right after."""
        in_hand = self._in_hand()
        deadline = time.monotonic() + 5.0
        for act in (lambda uploads: uploads.hurry(), lambda uploads: uploads.finish(deadline - time.monotonic())):
            for course in in_hand:
                try:
                    if course.uploads is not None:
                        act(course.uploads)
                except Exception as error:
                    log.warning("newest checkpoint not uploaded: %s", error, extra={"action": "upload_late"})
        for course in in_hand:
            with suppress(StorageError, Fenced):
                self.study.stop(course.claim)

    @property
    def is_training(self) -> bool:
        """Whether a trial in hand waits for its next measurement and for nothing else."""
        return self.leave_by is None and any(course.fit is not None for course in self._in_hand())

    def _in_hand(self) -> list[Course]:
        return [course for _, course in sorted(self._courses.items())]

    # --- rounds ------------------------------------------------------------------------------------------------

    def _fill(self, more: Callable[[], bool]) -> bool:
        """Begin a trial in every free slot, as far as there are some; whether one was taken."""
        taken = False
        for slot in range(self.n_slots):
            if slot in self._courses:
                continue
            if self.stop.is_set() or any(course.alone for course in self._in_hand()):
                break
            claim = self._claim(more)
            if claim is None:
                break
            taken = True
            self._courses[slot] = Course(self, slot, claim)
            self._go_on(self._courses[slot], None)
        return taken

    def _claim(self, more: Callable[[], bool]) -> Claim | None:
        """A trial, if there is one. With others in hand the database is not waited for."""

        def claim() -> Claim | None:
            numbers = [course.claim.number for course in self._in_hand()]
            return self.study.claim(self.worker_id, self.steady(), self.options.grace_s, numbers)

        if not self._courses:
            return self._patiently(claim, "claim")
        began = time.monotonic()
        if began < self._look_again or self.outage.is_waiting:
            return None
        try:
            with self.study.search.without_patience():
                found = retry(claim, 0.0, "claim") if more() else None
        except DatabaseUnavailable as error:
            self.outage.lasted_s(began)
            log.warning("nothing claimed, training goes on: %s", error, extra={"action": "outage"})
            return None
        if found is None:
            self._look_again = time.monotonic() + LOOK_AGAIN_S
        return found

    def _round(self) -> None:
        in_hand = self._in_hand()
        asking = [course for course in in_hand if course.fit is not None]
        # One after the other: all that may have brought a process down have to show that it was not them.
        asking = next(([course] for course in asking if course.alone), asking)
        results = dict(zip([course.slot for course in asking], self._advance(asking), strict=True))
        error: Exception | None = None
        for course in in_hand:
            try:
                if course.slot in results or course.fit is None:
                    self._go_on(course, results.get(course.slot))
            except Exception as met:  # what the others have measured is recorded first
                error = error or met
        if error is not None:
            raise error

    def _advance(self, asking: list[Course]) -> list[Measurement | Exception | None]:
        """What the trainer makes of them. Raises DeviceFault where it may be the fault of any of several."""
        if not asking:
            return []
        fits = [course.fit for course in asking]
        started = time.monotonic()
        # What is logged of one is its own; of several nobody knows whose it is.
        with asking[0].context() if len(asking) == 1 else logs.context(study=self.study.name):
            try:
                found = self.trainer.advance(fits)
            except Exception as error:
                found = [error] * len(asking)
            finally:
                self.fit_s += time.monotonic() - started
        faults = [one for one in found if isinstance(one, Exception) and is_device_fault(one)]
        if faults and len(asking) > 1:
            numbers = ", ".join(str(course.claim.number) for course in asking)
            raise DeviceFault(f"{reason_of(faults[0])} (in hand: trials {numbers})", shared=True) from faults[0]
        return found

    def _go_on(self, course: Course, result: Measurement | Exception | None) -> None:
        goes_on = False
        try:
            goes_on = course.go_on(result)
        finally:
            if not goes_on:
                del self._courses[course.slot]
        if course.fault is not None:
            raise DeviceFault(course.fault)

    def _leave(self, error: Exception) -> None:
        """Put back what is in hand, for this reason; where the database is away the end of the lease does it."""
        if isinstance(error, DatabaseUnavailable) or (isinstance(error, DeviceFault) and error.shared):
            return
        self.leave_by = time.monotonic() + self.options.stop_grace_s / 4
        for act in (_hurry, Course.leave):
            for course in self._in_hand():
                try:
                    act(course)
                except Unavailable as away:
                    log.warning("trials not put back: %s", away, extra={"action": "outage"})
                    return
                except Exception as failed:
                    with course.context():
                        log.warning("trial not put back: %s", failed, extra={"action": "outage"})

    # --- how many ----------------------------------------------------------------------------------------------

    def _choose_slots(self) -> None:
        """As many as asked for; else as many as the trainer finds best here, of what is sensible for the search.
        It is asked again when all of few trials were best, and there are more now."""
        asked, device, study = self.options.slots, self.options.torch_device, self.study
        if asked != AUTO or device == "cpu":
            self.n_slots = 1 if asked == AUTO else asked
            return
        spec = study.spec
        cap = MOST_LEARNING_SLOTS if spec.sampler.name in LEARNING_SAMPLERS else MOST_SLOTS
        if self._most == cap or self.n_slots < self._most:
            return
        progress = next(iter(self._patiently(lambda: study.store.progress(study.id), "count")), None)
        most = min(cap, 1 if progress is None else progress.row.total - progress.n_ended)
        if most <= max(self._most, 1):
            return
        default, _ = spec.space.for_arm(spec.config, next(iter(spec.arms.values())))
        try:
            found = self.trainer.slots(self.trainer.Config.model_validate(default), self.data, device, most)
            if not 1 <= found <= most:
                raise ValueError(f"{found} of at most {most}")
        except (DiskError, StorageError):
            raise
        except Exception as error:
            if is_device_fault(error):
                raise DeviceFault(reason_of(error)) from error
            log.error("slots not found out", exc_info=error, extra={"action": "fail", "study": study.name})
            raise InputError(
                f"--slots auto: expected the trainer to find how many trials {device} takes at once, got "
                f"{reason_of(error)}; name a number"
            ) from error
        log.info(
            "%d trials at once", found,
            extra={"action": "slots", "study": study.name, "slots": found, "most": most, "device": device},
        )  # fmt: skip
        self.n_slots, self._most = found, most

    def _patiently(self, call: Callable[[], Any], what: str) -> Any:
        return retry(call, self.options.outage_s, what)


def _hurry(course: Course) -> None:
    if course.uploads is not None:
        course.uploads.hurry()


def arguments(options: WorkerOptions) -> list[str]:
    """The command line of a worker process."""
    return [sys.executable, "-m", "tuner.worker_process", json.dumps(asdict(options))]
