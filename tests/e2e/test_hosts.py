"""The service on several hosts: names, networks and disks of their own, one database, one artifact store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.e2e.service import Machine, Service
from tests.hosts import Host, Network

# Holds the lock of a study, from a connection that stays open.
HOLD_LOCK = """
import sys, time
from storage.database import Database
from tuner.study import Study
with Study.open(Database(sys.argv[1]), "locked").lock():
    open(sys.argv[2], "w").close()
    time.sleep(3600.0)
"""


def test_everything_is_stopped_then_resumed_elsewhere(spread_service: Service, network: Network) -> None:
    service = spread_service
    service.submit("moved", 8, config={"x": 0.5, "y": 0.5, "n_steps": 10, "step_s": 0.2})
    here = service.machine("here", network.host("here"))
    # So that nothing but the orderly stop itself brings the checkpoints to where others find them.
    here.start(3, TUNER_UPLOAD_EVERY="3600")
    service.wait_for_count("moved", 9)
    here.stop()
    stopped = {a.number: a for a in service.attempts("moved") if a.outcome == "stopped"}
    assert len(stopped) == 3
    assert not service.held("moved")
    left_at = {run.number: run.uploaded_step for run in service.runs("moved") if run.number in stopped}
    assert all(run.uploaded_step == run.checkpoint_step for run in service.runs("moved"))

    there = service.machine("there", network.host("there"))
    there.start(3)
    service.wait_for_end("moved", 8)
    there.stop()
    service.check_whole("moved", 8)
    hosts = {worker.id: worker.identity.host for worker in service.store.workers()}
    for number, step in left_at.items():
        attempts = [a for a in service.attempts("moved") if a.number == number]
        assert [hosts[a.worker_id] for a in attempts] == ["here", "there"]
        assert steps_on(there, "moved", number, attempt=2)[0] == step + 1


def test_a_machine_is_lost_with_a_damaged_upload(spread_service: Service, network: Network) -> None:
    service = spread_service
    service.submit("lost", 3, config={"x": 0.5, "y": 0.5, "n_steps": 40, "step_s": 0.15})
    gone = service.machine("gone", network.host("gone"))
    gone.start(1, TUNER_UPLOAD_EVERY="1")
    service.wait(lambda: len(manifests(service, "lost", 0)) >= 2 and service.count("lost") >= 12, "two uploads")
    gone.kill()
    last_measured = service.count("lost") - 1
    uploaded = manifests(service, "lost", 0)
    while int(uploaded[-1].stem[5:]) > (service.runs("lost")[0].uploaded_step or 0):
        del uploaded[-1]  # killed before the database heard of it
    uploaded[-1].write_bytes(uploaded[-1].read_bytes()[:-20])

    heir = service.machine("heir", network.host("heir"))
    heir.start(2, TUNER_LEASE_GRACE="4")
    service.wait_for_end("lost", 3)
    heir.stop()
    service.check_whole("lost", 3, trained_once=False)
    # It went on after the newest upload that was whole; what had been measured beyond belongs to the heir now.
    step = int(uploaded[-2].stem[5:])
    assert step < last_measured
    study_id = service.study_id("lost")
    owners = [row.attempt for row in service.store.measurements(study_id, [0])[0]]
    assert owners == [1] * (step + 1) + [2] * (39 - step)
    assert [a.outcome for a in service.attempts("lost") if a.number == 0] == ["lost", "complete"]
    assert any(uploaded[-1].name in line for line in heir.logged("snapshot_skipped"))


def test_disks_full_and_read_only(spread_service: Service, network: Network) -> None:
    service = spread_service
    host = network.host("small")
    machine = service.machine("small", host)
    store = service.folder / "store"
    machine.runs.mkdir()
    for folder in (machine.runs, store):
        host.mount(folder, "2m")
    machine.seen_runs = host.seen(machine.runs)
    service.seen_artifacts = f"file://{host.seen(store)}"
    service.submit("disks", 6, config={"x": 0.5, "y": 0.5, "n_steps": 12, "step_s": 0.15})

    def refused(reason: str, where: Path) -> None:
        """It works, then it stops by itself, says why in one line and leaves a study that can go on."""
        machine.finish(code=2)
        told = machine.last_said.strip().splitlines()[-1]
        assert reason in told, machine.last_said
        assert str(where) in told, machine.last_said
        assert "Traceback" not in machine.last_said
        assert not service.held("disks")
        assert not any(run.failure for run in service.runs("disks"))

    machine.start(2)
    service.wait_for_count("disks", 5)
    fill(host, machine.runs)
    refused("No space left on device", machine.runs)
    empty(host, machine.runs)

    machine.start(2)
    service.wait_for_count("disks", service.count("disks") + 3)
    fill(host, store)
    refused("No space left on device", store)
    empty(host, store)

    host.remount(store, "ro")
    machine.start(2)
    refused("Read-only file system", store)
    host.remount(store, "rw")

    machine.start(2)
    service.wait_for_end("disks", 6)
    machine.stop()
    service.check_whole("disks", 6)
    outcomes = Counter(attempt.outcome for attempt in service.attempts("disks"))
    assert set(outcomes) == {"stopped", "complete"}
    assert outcomes["complete"] == 6


def test_a_host_is_cut_off_and_joined_again(spread_service: Service, network: Network) -> None:
    service = spread_service
    service.submit(
        "cut",
        2,
        config={"x": 0.5, "y": 0.5, "n_steps": 40, "step_s": 0.4},
        arms={"long": {}, "short": {"n_steps": 3}},
    )
    zombie = service.machine("zombie", network.host("zombie"))
    zombie.start(1)
    service.wait(lambda: manifests(service, "cut", 0) and service.count("cut") >= 6, "an upload")
    zombie.host.cut_off()
    stored = service.count("cut")
    heir = service.machine("heir", network.host("heir"))
    heir.start(1, TUNER_LEASE_GRACE="5")
    service.wait(lambda: len([a for a in service.attempts("cut") if a.number == 0]) == 2, "an heir")
    study_id = service.study_id("cut")

    def owners() -> list[int]:
        return [row.attempt for row in service.store.measurements(study_id, [0])[0]]

    service.wait(lambda: owners().count(2) >= 3, "what the heir measured")
    # It went on training, and nobody heard of it.
    assert steps_on(zombie, "cut", 0, attempt=1)[-1] >= stored
    zombie.host.join()
    service.wait(lambda: zombie.logged("fenced"), "the zombie's refusal")
    service.wait_for_end("cut", 2)
    for machine in (zombie, heir):
        machine.stop()

    service.check_whole("cut", 2, trained_once=False)
    assert owners() == sorted(owners())
    assert owners().count(1) <= stored
    assert [(a.attempt, a.outcome) for a in service.attempts("cut") if a.number == 0] == [
        (1, "lost"),
        (2, "complete"),
    ]
    run = service.runs("cut")[0]
    assert (run.attempt, run.checkpoint_attempt, run.uploaded_attempt) == (2, 2, 2)
    assert len(zombie.logged("fenced")) == 1


def test_a_host_cut_off_with_the_lock_in_its_hand_stops_nobody(spread_service: Service, network: Network) -> None:
    service = spread_service
    service.submit("locked", 4, config={"x": 0.5, "y": 0.5, "n_steps": 3, "step_s": 0.02})
    holder = service.machine("holder", network.host("holder"))
    held = holder.folder / "held"
    holder.start_script(HOLD_LOCK, service.server.url, str(held))
    service.wait(held.exists, "the lock")
    holder.host.cut_off()
    other = service.machine("other", network.host("other"))
    other.start(1)
    # The server's end of the connection notices within half a minute.
    service.wait_for_end("locked", 4)
    other.stop()
    service.check_whole("locked", 4)


def fill(host: Host, folder: Path) -> None:
    host.run("sh", "-c", f"! cat /dev/zero > {folder}/filler 2> /dev/null")


def empty(host: Host, folder: Path) -> None:
    host.run("rm", str(folder / "filler"))


def manifests(service: Service, name: str, number: int) -> list[Path]:
    """What the artifact store lists as whole snapshots of a run, the newest last."""
    return sorted((service.folder / "store").glob(f"{name}/trials/{number:05d}/attempt-*/step-*.json"))


def steps_on(machine: Machine, name: str, number: int, attempt: int) -> list[int]:
    """The steps that an attempt trained on a machine."""
    folder = machine.seen_runs / name / "trials" / f"{number:05d}" / f"attempt-{attempt}"
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))
