"""Worker processes under a supervisor: what becomes of those that end; workers are small scripts here."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.trainer import InputError
from storage.database import DatabaseUnavailable
from tuner import crew as crews
from tuner.crew import MAX_BARREN_DEATHS, Crew, RunFailed, choose_devices, device_environment
from tuner.worker import WorkerOptions

OK = """echo '{"reason": null, "serve_s": 2.0, "fit_s": 1.5}'"""


class TestDevices:
    def test_one_worker_a_core_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("models.cuda_devices", list)
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2})
        assert choose_devices("auto", None) == ["cpu"] * 3
        assert choose_devices("cpu", None) == ["cpu"] * 3
        assert choose_devices("auto", 5) == ["cpu"] * 5

    def test_one_worker_a_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("models.cuda_devices", lambda: ["cuda:0", "cuda:1"])
        assert choose_devices("auto", None) == ["cuda:0", "cuda:1"]
        assert choose_devices("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
        assert choose_devices("cuda:1", None) == ["cuda:1"]
        assert choose_devices("cuda:1, cpu", 3) == ["cuda:1", "cpu", "cuda:1"]

    @pytest.mark.parametrize(("devices", "workers"), [("cuda:7", None), ("gpu", None), ("cpu", 0), ("cpu", -1)])
    def test_others_are_refused(self, devices: str, workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("models.cuda_devices", lambda: ["cuda:0"])
        with pytest.raises(InputError, match=r"(device|--workers): expected"):
            choose_devices(devices, workers)


class TestIsolation:
    def test_a_cpu_worker_sees_no_card_and_uses_one_thread(self) -> None:
        shown = device_environment("cpu", {"CUDA_VISIBLE_DEVICES": "0,1"})
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        kept = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "1073741824")
        assert shown == alone | kept
        mine = device_environment("cpu", {"MALLOC_TRIM_THRESHOLD_": "1"})
        assert mine == alone | {"MALLOC_MMAP_THRESHOLD_": "1073741824"}

    @pytest.mark.parametrize(
        ("device", "visible", "shown"),
        [
            ("cuda:0", None, "0"), ("cuda:1", None, "1"), ("cuda:1", "", "1"), ("cuda:1", "3,5", "5"),
            ("cuda:0", "GPU-8a,GPU-9b", "GPU-8a"),
        ],
    )  # fmt: skip
    def test_a_card_is_the_only_one(self, device: str, visible: str | None, shown: str) -> None:
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        assert device_environment(device, environment) == {"CUDA_VISIBLE_DEVICES": shown}

    def test_the_process_calls_its_only_card_the_first(self) -> None:
        assert WorkerOptions("cuda:3", "runs", "cache").torch_device == "cuda:0"
        assert WorkerOptions("cpu", "runs", "cache").torch_device == "cpu"


class Scripts:
    """Crews whose workers are the given shell scripts, in the order in which they are started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.started: list[WorkerOptions] = []
        self.deaths = self.crashes = 0
        self.said: list[str] = []
        self.measured: Callable[[], int] = lambda: 0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(crews, "POLL_S", 0.01)

    def __call__(self, *scripts: str, stop_grace_s: float = 100.0, stay: bool = False) -> Crew:
        left = iter(scripts)

        def arguments(options: WorkerOptions) -> list[str]:
            self.started.append(options)
            return ["sh", "-c", next(left)]

        self._monkeypatch.setattr(crews, "arguments", arguments)
        worker = WorkerOptions("", "runs", "cache", stop_grace_s=stop_grace_s, stay=stay)
        return Crew(
            ["cpu"] * min(2, len(scripts)), worker, "sqlite:///x.db", self.folder, self.said.append, self.died
        )

    def died(self, crashed: bool) -> int:
        self.deaths += 1
        self.crashes += crashed
        return self.measured()


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    return Scripts(tmp_path / "logs", monkeypatch)  # type: ignore[return-value]


class TestCrew:
    def test_time_is_added_up(self, scripts: Scripts) -> None:
        crew = scripts(OK, OK)
        assert crew.see_through() == 0
        assert crew.time_s == {"serve_s": 4.0, "fit_s": 3.0}
        assert scripts.deaths == 0

    def test_the_memory_of_the_largest_is_known(self, scripts: Scripts) -> None:
        small, large = (OK.replace("}", f', "peak_bytes": {peak}}}') for peak in (10, 30))
        crew = scripts(small, large)
        crew.see_through()
        assert crew.peak_bytes == 30

    def test_the_memory_of_one_that_was_refused_is_known_of_one_that_died_not(self, scripts: Scripts) -> None:
        crew = scripts("kill -9 $$", """echo '{"reason": "the disk is full", "peak_bytes": 20}'; exit 2""", OK)
        with pytest.raises(InputError):
            crew.see_through()
        assert crew.peak_bytes == 20

    def test_each_is_told_its_device_and_the_database(self, scripts: Scripts) -> None:
        write = f"echo $TUNER_STORAGE/$CUDA_VISIBLE_DEVICES/$OMP_NUM_THREADS >&2; {OK}"
        scripts(write, write).see_through()
        assert [options.device for options in scripts.started] == ["cpu", "cpu"]
        for slot in range(2):
            assert (scripts.folder / f"worker-{slot}.log").read_text() == "sqlite:///x.db//1\n"

    def test_a_dead_one_is_replaced(self, scripts: Scripts) -> None:
        assert scripts(OK, "kill -9 $$", "exit 1", OK).see_through() == 0
        assert len(scripts.started) == 4
        assert scripts.deaths == 2

    def test_one_that_was_told_twice_to_stop_has_not_crashed(self, scripts: Scripts) -> None:
        """Whoever signals the workers too (a service manager does) must not end their trials as poison."""
        assert scripts(OK, "exit 130", "kill -9 $$", OK).see_through() == 0
        assert (scripts.deaths, scripts.crashes) == (2, 1)

    def test_those_that_keep_dying_are_not(self, scripts: Scripts) -> None:
        with pytest.raises(RunFailed, match=r"keep dying \(exit 7\); see .*logs"):
            scripts(*["exit 7"] * 40).see_through()
        assert MAX_BARREN_DEATHS <= len(scripts.started) <= MAX_BARREN_DEATHS + 1  # two at once

    def test_those_of_a_service_are_more_and_more_slowly(
        self, scripts: Scripts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(crews, "LONGEST_PAUSE_S", 0.02)
        assert scripts(*["exit 7"] * 10, OK, OK, stay=True).see_through() == 0
        assert len(scripts.started) == 12
        pauses = [record.pause_s for record in caplog.records if getattr(record, "action", "") == "pause"]
        assert pauses == [0.02] * 5

    def test_one_that_waits_for_its_place_holds_no_stop_up(
        self, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = time.monotonic()
        assert scripts(*["exit 7"] * 20, stay=True).see_through(timeout_s=1.0) == 0
        assert time.monotonic() - started < 20

    def test_those_that_die_but_come_forward_are(self, scripts: Scripts) -> None:
        scripts.measured = lambda: scripts.deaths
        assert scripts(*["exit 7"] * 20, OK, OK).see_through() == 0
        assert scripts.deaths == 20

    def test_a_death_while_the_database_is_away_is_no_judgement(self, scripts: Scripts) -> None:
        def away() -> int:
            raise DatabaseUnavailable("away")

        scripts.measured = away
        assert scripts(*["exit 7"] * 20, OK, OK).see_through() == 0

    def test_bad_input_stops_everybody(self, scripts: Scripts) -> None:
        refused = """echo '{"reason": "the disk is full"}'; exit 2"""
        with pytest.raises(InputError, match="the disk is full"):
            scripts(refused, f"cat; {OK}").see_through()  # cat ends with its standard input
        assert len(scripts.started) == 2

    def test_the_first_reason_counts_with_its_kind(self, scripts: Scripts) -> None:
        failed = """echo '{"reason": "three failed"}'; exit 1"""
        later = """cat; echo '{"reason": "something else"}'; exit 2"""
        with pytest.raises(RunFailed, match="three failed"):
            scripts(failed, later).see_through()

    def test_a_child_that_outlives_its_worker_holds_nobody_up(self, scripts: Scripts) -> None:
        crew = scripts(f"sleep 60 & echo $! >&2; {OK}")
        crew.see_through()
        os.kill(int((scripts.folder / "worker-0.log").read_text()), signal.SIGKILL)  # it lives still
        assert crew.time_s["serve_s"] == 2.0

    def test_the_time_is_up(self, scripts: Scripts) -> None:
        assert scripts(f"cat; {OK}", f"cat; {OK}").see_through(timeout_s=0.05) == 0

    def test_one_that_dies_while_all_stop_is_neither_replaced_nor_a_fault(self, scripts: Scripts) -> None:
        assert scripts("cat; kill -9 $$", f"cat; {OK}").see_through(timeout_s=0.05) == 0
        assert len(scripts.started) == 2

    def test_it_can_be_stopped_from_another_thread(self, scripts: Scripts) -> None:
        crew = scripts(f"cat; {OK}", f"cat; {OK}")
        ticks: list[dict[int, int]] = []

        def tick() -> None:
            ticks.append(crew.pids)
            crew.stop()

        interrupts: list[int] = []
        thread = threading.Thread(target=lambda: interrupts.append(crew.see_through(tick)))
        thread.start()
        thread.join(20)
        assert interrupts == [0]
        assert set(ticks[0]) == {0, 1}
        assert crew.time_s["serve_s"] == 4.0

    def test_who_does_not_leave_in_time_is_killed(self, scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(crews, "LEAVING_S", 0.1)
        started = time.monotonic()
        crew = scripts("exec sleep 60", "exec sleep 60", stop_grace_s=0.1)
        pids: list[int] = []
        crew.see_through(lambda: pids.extend(crew.pids.values()), timeout_s=0.05)
        assert time.monotonic() - started < 20
        for pid in set(pids):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "flat").write_text("")
        options: Any = WorkerOptions("", "runs", "cache")
        with pytest.raises(InputError, match="expected a folder to write to"):
            Crew(["cpu"], options, "sqlite:///x.db", tmp_path / "flat" / "logs", print, lambda _: 0)
