"""The service with real processes, real signals and a real PostgreSQL: nothing is lost, nothing counted twice."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter

import psutil
import yaml

from storage.tables import SCHEMA_VERSION
from tests.e2e.postgresql import PostgresqlServer
from tests.e2e.service import Service
from tests.storage.old_databases import load_schema_1

OUTAGE_S = 60.0


def test_eight_workers_on_two_machines_end_200_trials_exactly(service: Service) -> None:
    service.submit(
        "many", 200, sampler={"name": "tpe", "n_startup_trials": 20},
        config={"x": 0.5, "y": 0.5, "n_steps": 4, "step_s": 0.0},
        pruner={"name": "median", "min_completed": 5, "warmup_steps": 1},
    )  # fmt: skip
    machines = [service.machine("one"), service.machine("two")]
    for machine in machines:
        machine.start(4)
    service.wait_for_end("many", 200)
    # Nothing is begun beyond the total, though eight workers go on asking.
    for machine in machines:
        machine.stop()
    service.check_whole("many", 200)
    assert {attempt.attempt for attempt in service.attempts("many")} == {1}
    assert len({attempt.worker_id for attempt in service.attempts("many")}) == 8
    assert all(worker.ended_at for worker in service.store.workers())


def test_fifty_workers_killed_while_100_trials_run(service: Service) -> None:
    service.submit("killed", 100, config={"x": 0.5, "y": 0.5, "n_steps": 10, "step_s": 0.1})
    machine = service.machine("one")
    machine.start(4)
    chance = random.Random(0)
    for _ in range(50):
        # One that holds a trial, some time after anything was measured: a random moment of a step.
        service.wait_for_count("killed", service.count("killed") + 1)
        time.sleep(chance.uniform(0.0, 0.2))
        kill_a_holder(service, chance)
    service.wait_for_end("killed", 100)
    machine.stop()
    # Trained once: every trial whose worker was killed went on after its newest checkpoint.
    service.check_whole("killed", 100)
    outcomes = Counter(attempt.outcome for attempt in service.attempts("killed"))
    assert outcomes["complete"] == 100
    # Some of the killed had just ended their trial or not yet begun another one.
    assert 35 <= outcomes["crashed"] <= 50
    assert set(outcomes) == {"complete", "crashed"}


def test_workers_with_several_slots_killed_while_40_trials_run(service: Service) -> None:
    service.submit("killed", 40, config={"x": 0.5, "y": 0.5, "n_steps": 8, "step_s": 0.03})
    machine = service.machine("one")
    machine.start(2, "--slots", "4")
    service.wait(lambda: any(len(held) == 4 for held in service.held("killed").values()), "four trials of a worker")
    chance = random.Random(1)
    for _ in range(8):
        service.wait_for_count("killed", service.count("killed") + 3)
        time.sleep(chance.uniform(0.0, 0.2))
        kill_a_holder(service, chance)
    service.wait_for_end("killed", 40)
    machine.stop()
    service.check_whole("killed", 40)
    outcomes = Counter(attempt.outcome for attempt in service.attempts("killed"))
    assert outcomes["complete"] == 40
    assert 8 < outcomes["crashed"] <= 32  # several at once
    assert set(outcomes) == {"complete", "crashed"}


def kill_a_holder(service: Service, chance: random.Random) -> None:
    """kill -9 of a worker with a trial, unless it would be the third in a row without a checkpoint: a poison."""

    def victims() -> list[int]:
        crashes = service.most_barren_crashes("killed")
        pids = {worker.identity.pid for worker in service.store.workers() if crashes.get(worker.id, 2) < 2}
        return sorted(pids & {process.pid for process in service.machines[0].workers()})

    pids = service.wait(victims, "a worker that holds a trial")
    psutil.Process(chance.choice(pids)).kill()


def test_the_database_away_for_a_minute_then_killed(service: Service, server: PostgresqlServer) -> None:
    # Each worker is in the midst of a trial for longer than the outage.
    service.submit(
        "long", 4, config={"x": 0.5, "y": 0.5, "n_steps": 45, "step_s": 1.5},
        pruner={"name": "median", "min_completed": 1, "warmup_steps": 60},
    )  # fmt: skip
    machine = service.machine("one")
    machine.start(4)
    service.wait_for_count("long", 4)
    attempts = service.wait(lambda: len(service.attempts("long")) == 4 and service.attempts("long"), "four trials")
    server.stop()
    before = [n_trained(service, "long", number) for number in range(4)]
    time.sleep(OUTAGE_S)
    during = [n_trained(service, "long", number) for number in range(4)]
    server.start()
    # Nobody waited for it; unhurried, that would be 40 epochs each.
    assert all(after >= first + 20 for first, after in zip(before, during, strict=True)), (before, during)
    service.wait(lambda: service.count("long") >= sum(during), "the measurements of the outage", 30.0)
    assert len(service.attempts("long")) == len(attempts)
    service.wait_for_end("long", 4)
    service.check_whole("long", 4)
    assert [attempt.outcome for attempt in service.attempts("long")] == ["complete"] * 4
    assert machine.logged("outage")

    service.submit("short", 60, config={"x": 0.5, "y": 0.5, "n_steps": 8, "step_s": 0.1})
    for n_measurements in (40, 160, 320):
        service.wait_for_count("short", n_measurements)
        server.kill()
        server.start()
    service.wait_for_end("short", 60)
    machine.stop()
    service.check_whole("short", 60)
    assert {attempt.outcome for attempt in service.attempts("short")} <= {"complete", "lost"}


def test_a_database_away_for_too_long_stops_the_machine_and_leaves_what_can_go_on(
    service: Service, server: PostgresqlServer
) -> None:
    service.submit("away", 2, config={"x": 0.5, "y": 0.5, "n_steps": 60, "step_s": 0.4})
    machine = service.machine("one")
    machine.start(2, TUNER_OUTAGE="4")
    service.wait_for_count("away", 4)
    server.stop()
    went_away = time.monotonic()
    machine.finish(code=1)
    assert n_trained(service, "away", 0) + n_trained(service, "away", 1) < 110  # in the midst of both trials
    assert time.monotonic() - went_away < 40.0
    assert "Connection refused" in machine.last_said.splitlines()[-1]
    assert "Traceback" not in machine.said
    server.start()
    machine.start(2)
    service.wait_for_end("away", 2)
    machine.stop()
    service.check_whole("away", 2)
    assert [attempt.attempt for attempt in service.attempts("away")] == [1, 2] * 2


def n_trained(service: Service, name: str, number: int) -> int:
    return len(service.checkpoints(name, number))


def test_the_poison_rule_both_ways(service: Service) -> None:
    service.submit(
        "poison", 6, config={"x": 0.5, "y": 0.5, "n_steps": 10, "step_s": 0.02},
        # The innocent one is killed in each of its first five attempts, each time one checkpoint further.
        arms={
            "good": {},
            "crasher": {"fault": "exit", "fault_step": 2},
            "innocent": {"fault": "kill", "fault_step": 1, "fault_attempts": 5, "fault_stride": 1},
        },
    )  # fmt: skip
    machine = service.machine("one")
    machine.start(3)
    service.wait_for_end("poison", 6)
    machine.stop()
    service.check_whole("poison", 6, failed=(1, 4))
    outcomes: dict[int, list[str | None]] = {}
    for attempt in service.attempts("poison"):
        outcomes.setdefault(attempt.number, []).append(attempt.outcome)
    assert outcomes[0] == outcomes[3] == ["complete"]
    assert outcomes[2] == outcomes[5] == ["crashed"] * 5 + ["complete"]
    # The first attempt measured two steps; three that advanced nothing end it.
    assert outcomes[1] == outcomes[4] == ["crashed"] * 4
    failures = [run.failure for run in service.runs("poison") if run.failure]
    assert failures == ["its worker process died 3 times in a row without a new checkpoint"] * 2


def test_a_second_signal_stops_at_once(service: Service) -> None:
    service.submit("slow", 2, config={"x": 0.5, "y": 0.5, "n_steps": 3, "step_s": 60.0})
    machine = service.machine("one")
    machine.start(2)
    service.wait(lambda: len(service.held("slow")) == 2, "two trials")
    machine.send(signal.SIGTERM)
    service.wait(lambda: "interrupted" in machine.said, "that it heard")
    machine.send(signal.SIGTERM)
    machine.finish()
    assert service.n_ended("slow") == 0


def test_a_database_of_the_first_release_is_upgraded_and_served(service: Service, server: PostgresqlServer) -> None:
    load_schema_1(server.url)
    machine = service.machine("one")
    spec = {
        "study": "toy", "trainer": "tests.toy:ToyTrainer", "data": {"content": "toy"}, "seed": 6, "n_trials": 12,
        "decision": {"task": "toy", "target_precision": 0.4, "confidence": 0.9, "min_selected": 30},
        "objective": {"metric": "valid/toy/pr_auc"},
        "config": {"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "none"},
        "arms": {"a": {}, "b": {"shape": "b", "speed": 0.3}},
        "space": {
            "fault": {"choices": ["none", "other", "raise"]},
            "x": {"low": 0.0, "high": 1.0},
            "y": {"low": 0.01, "high": 1.0, "log": True},
        },
        "sampler": {"name": "tpe", "n_startup_trials": 4},
        "pruner": {"name": "median", "min_completed": 2, "warmup_steps": 2},
    }  # fmt: skip
    (machine.folder / "toy.yaml").write_text(yaml.safe_dump(spec))
    for command in (["worker", "--devices", "cpu"], ["submit", "--study", "toy.yaml"], ["db", "check"]):
        assert "tuner db upgrade" in machine.tuner(*command, code=2)
    machine.tuner("db", "upgrade")
    assert f"schema {SCHEMA_VERSION}" in machine.tuner("db", "check")
    old = service.attempts("toy")
    assert service.n_ended("toy") == 9

    assert "queued, 12 trials" in machine.tuner("submit", "--study", "toy.yaml")
    machine.start(2)
    service.wait_for_end("toy", 12)
    machine.stop()
    failed = [run.number for run in service.runs("toy") if run.failure]
    assert failed[:4] == [2, 6, 7, 8]
    # The checkpoints of the first nine are on the machine that trained them.
    service.check_whole("toy", 12, failed=failed, first_here=9)
    new = [attempt for attempt in service.attempts("toy") if attempt.claimed_at > max(a.claimed_at for a in old)]
    assert sorted({attempt.number for attempt in new}) == [9, 10, 11]
    assert len(old) + len(new) == len(service.attempts("toy"))


def test_a_study_is_stopped_at_once_then_drained(service: Service) -> None:
    long, short = {"n_steps": 70}, {"n_steps": 4}
    study = {
        "config": {"x": 0.5, "y": 0.5, "step_s": 0.25},
        "arms": {"a": long, "b": long, "c": short, "d": short, "e": short, "f": short},
    }
    service.submit("stopped", 6, **study)
    machine = service.machine("one")
    machine.start(2)
    service.wait(lambda: len(service.held("stopped")) == 2, "two trials")
    machine.tuner("stop", "--study", "stopped", "--now")
    service.wait(lambda: not service.held("stopped"), "that they are put back")
    assert [attempt.outcome for attempt in service.attempts("stopped")] == ["stopped"] * 2
    status = json.loads(machine.tuner("status", "--format", "json"))
    assert '"stopped"' in json.dumps(status)

    service.submit("stopped", 6, **study)
    service.wait(lambda: len(service.held("stopped")) == 2, "two trials")
    machine.tuner("stop", "--study", "stopped")
    service.wait(lambda: not service.held("stopped"), "that they are finished")
    assert [attempt.outcome for attempt in service.attempts("stopped")] == ["stopped", "complete"] * 2

    service.submit("stopped", 6, **study)
    service.wait_for_end("stopped", 6)
    machine.stop()
    service.check_whole("stopped", 6)
