"""What a browser's poll costs the dashboard: CPU time and bytes, optuna-dashboard's study API and our own JSON.

A study of finished trials with 20 measurements each, and a few more that run and measure a step between two polls.
Every poll is answered from the database anew: what either side keeps for some seconds is forgotten before.

    python -m benchmarks.dashboard [--stored 100,1000,5000] [--running 8] [--polls 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna_dashboard import wsgi

from benchmarks.service import METRIC, N_STEPS, VIOLATION, fill_optuna, fill_ours, make_spec
from storage.database import Database
from storage.leases import ProcessIdentity
from storage.runs import MeasurementRow, Store
from storage.tables import create_schema
from tuner.optuna_dashboard import DashboardStorage
from tuner.optuna_study import Search, create_optuna_schema
from tuner.pages_feed import Feed
from tuner.study import Claim, Study


class Served:
    """A study with `n_stored` ended trials and `n_running` that go on, as the dashboard serves it."""

    def __init__(self, folder: Path, n_stored: int, n_running: int) -> None:
        self.database = Database(f"sqlite:///{folder}/tuner.db")
        create_schema(self.database)
        create_optuna_schema(self.database)
        spec = make_spec("tpe")
        search = Search(self.database, spec, "ours", create=True)
        data = json.dumps({"data_hash": "x", "source": "formula", "simulated": True})
        self.store = Store(self.database)
        row = self.store.create_study("ours", spec.to_json(), data, "0", n_stored + n_running)
        worker = self.store.register_worker(row.id, ProcessIdentity.current(), "cpu")
        fill_optuna(self.database, n_stored)
        fill_ours(self.database, row.id, worker, n_stored)
        self.study = Study(self.database, row, spec, search)
        self.claims = [self._claim() for _ in range(n_running)]
        self.n_stored, self.n_measured = n_stored, 0

    def _claim(self) -> Claim:
        worker = self.store.register_worker(self.study.id, ProcessIdentity.current(), "cpu")
        claim = self.study.claim(worker)
        assert claim is not None
        return claim

    def measure(self) -> None:
        """Every running trial goes a step on."""
        for claim in self.claims:
            row = MeasurementRow(self.n_measured, {METRIC: 0.5, VIOLATION: -0.1}, 1.0)
            self.store.record(self.study.id, claim.number, claim.attempt, [row])
            self.study.search.report(claim.trial, self.n_measured, 0.5)
        self.n_measured += 1


def get(app: Any, path: str, query: str = "") -> bytes:
    answer: list[Any] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query, "SERVER_NAME": "localhost",
        "SERVER_PORT": "80", "wsgi.url_scheme": "http",
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, headers, exc_info=None: answer.append(status)))
    assert answer[0].startswith("200"), (answer, body[:200])
    return body


def measure(n_stored: int, n_running: int, n_polls: int, folder: Path) -> list[dict[str, Any]]:
    served = Served(folder, n_stored, n_running)
    storage = DashboardStorage(served.database)
    app, feed = wsgi(storage), Feed(served.database)
    optuna_id = storage.ids()["ours"]
    version = ""

    def theirs(after: int) -> bytes:
        app._inmemory_cache._trials_last_fetched_at.clear()
        return get(app, f"/api/studies/{optuna_id}", f"after={after}")

    def ours(whole: bool) -> bytes:
        nonlocal version
        for known in feed._known.values():
            known.looked_at = float("-inf")
        answer = feed.study("ours", "" if whole else version)
        assert answer is not None
        version = answer["version"]
        return json.dumps(answer, separators=(",", ":")).encode()

    kinds: dict[str, Callable[[], bytes]] = {
        "optuna-dashboard, first": lambda: theirs(0),
        "optuna-dashboard, full": lambda: theirs(0),
        "optuna-dashboard, incremental": lambda: theirs(n_stored),
        "ours, first": lambda: ours(True),
        "ours, full": lambda: ours(True),
        "ours, incremental": lambda: ours(False),
        "service": lambda: json.dumps(feed.service()).encode(),
    }
    found = []
    for kind, poll in kinds.items():
        spent = []
        for _ in range(1 if kind.endswith("first") else n_polls):
            served.measure()
            start = time.process_time()
            body = poll()
            spent.append(1000 * (time.process_time() - start))
        found.append({
            "trials": n_stored, "poll": kind, "cpu_ms": round(statistics.median(spent), 1), "kB": len(body) // 1000,
        })  # fmt: skip
    served.database.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", default="100,1000,5000")
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--polls", type=int, default=5)
    options = parser.parse_args()
    print(f"{'trials':>7} {'poll':<30} {'CPU ms':>8} {'kB':>8}   ({N_STEPS} measurements a trial)")
    for n_stored in map(int, options.stored.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(n_stored, options.running, options.polls, Path(folder)):
                print(f"{row['trials']:>7} {row['poll']:<30} {row['cpu_ms']:>8.1f} {row['kB']:>8}")


if __name__ == "__main__":
    main()
