"""optuna-dashboard on our storage: read-only, infeasible trials shown as such, the feasible best as the best.

The dashboard reads constraints in Optuna's old format only and takes the best trial without looking at them; both
are put right in the storage it is given, and nothing is written to the database.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import waitress
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi

from models.trainer import InputError
from storage.database import Database
from storage.runs import MeasurementRow, Store, StudyRow
from tuner.catalog import open_database
from tuner.optuna_storage import RetryingStorage
from tuner.spec import Spec
from tuner.study import violation_metric
from tuner.summary import UNCERTIFIED

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHOWN = ("precision", "precision_bound", "recall", "threshold")
_STUDY_DETAIL = re.compile(r"^/api/studies/(\d+)$")
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class DashboardStorage(_CachedStorage):
    """Optuna's cached storage with the trials as a person should see them.

    Every trial carries its true violation (at its best step) in the constraint format that the dashboard reads, and
    its decision as user attributes; every study the name of its objective, its data and its constraint.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(RetryingStorage(database))
        self._store = Store(database)
        self._decisions: dict[int, tuple[int, Mapping[int, Mapping[str, Any]]]] = {}
        self._decisions_lock = threading.Lock()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy=False, states=None)
        decisions = self._read_decisions(study_id, sum(trial.state.is_finished() for trial in trials))
        chosen = [trial for trial in trials if states is None or trial.state in states]
        return [_shown(trial, decisions.get(trial.number, {})) for trial in chosen]

    def get_all_studies(self) -> list[FrozenStudy]:
        rows = {row.name: row for row in self._store.studies()}
        studies = super().get_all_studies()
        for study in studies:
            if study.study_name in rows:
                shown, spec = _study_attributes(rows[study.study_name])
                study.user_attrs = {**study.user_attrs, **shown}
                study.system_attrs = {**study.system_attrs, "study:metric_names": [spec.objective.metric]}
        return studies

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The feasible best; where nothing is feasible, Optuna's best, which `_Guard` keeps from being shown."""
        return self.feasible_best(study_id) or super().get_best_trial(study_id)

    def feasible_best(self, study_id: int) -> FrozenTrial | None:
        complete = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        feasible = [t for t in complete if t.value is not None and all(v <= 0 for v in t.constraints.values())]
        maximise = self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE
        sign = 1.0 if maximise else -1.0
        return max(feasible, key=lambda t: (sign * (t.value or 0.0), -t.number), default=None)

    def _read_decisions(self, study_id: int, n_ended: int) -> Mapping[int, Mapping[str, Any]]:
        """Of every ended trial; what has ended does not change, so it is read again only when more have."""
        with self._decisions_lock:
            known = self._decisions.get(study_id)
            if known is not None and known[0] == n_ended:
                return known[1]
        row = self._store.find_study(self.get_study_name_from_id(study_id))
        if row is None:
            return {}  # a study that another program keeps in the same database
        spec = Spec.from_json(row.spec)
        found = {
            number: _decision(measurement, spec)
            for number, measurement in self._store.best_measurements(row.id).items()
        }
        with self._decisions_lock:
            self._decisions[study_id] = (n_ended, found)
        return found


def _study_attributes(row: StudyRow) -> tuple[dict[str, Any], Spec]:
    spec, data = Spec.from_json(row.spec), json.loads(row.data)
    decision = spec.decision
    constraint = f"{decision.task}: precision >= {decision.target_precision:g}, confidence {decision.confidence:g}"
    shown = {
        "data": f"{data['source']}{' (simulated, not real)' if data['simulated'] else ''}",
        "constraint": f"{constraint}, at least {decision.min_selected} rows",
        "thresholds": UNCERTIFIED,
        "total of trials": row.total,
        "arms": ", ".join(spec.arms),
    }
    return shown, spec


def _decision(measurement: MeasurementRow, spec: Spec) -> dict[str, Any]:
    metrics, prefix = measurement.metrics, f"valid/{spec.decision.task}/"
    violation = metrics[violation_metric(spec)]
    shown: dict[str, Any] = {"feasible": violation <= 0, "violation": violation, "best step": measurement.step}
    shown |= {name: metrics[prefix + name] for name in _SHOWN if prefix + name in metrics}
    error = metrics.get(f"{spec.objective.metric}_se")
    return shown if error is None else {**shown, "standard error": error}


def _shown(trial: FrozenTrial, decision: Mapping[str, Any]) -> FrozenTrial:
    """A copy (the cache's own objects stay as they are) with the constraint under its old name."""
    told = list(trial.constraints.values())
    true = [decision["violation"]] if "violation" in decision else told
    trial = copy.copy(trial)
    kept = {key: value for key, value in trial._system_attrs.items() if not key.startswith("constraints")}
    trial._system_attrs = {**kept, "constraints": true} if true else kept
    trial._user_attrs = {**trial._user_attrs, **decision}
    return trial


class _Guard:
    """Reading only, from this machine only; and no "best trial" where nothing is feasible."""

    def __init__(self, app: WsgiApp, storage: DashboardStorage) -> None:
        self._app = app
        self._storage = storage

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start_response, "this dashboard only shows: expected GET or HEAD")
        # A page of another site whose name was made to point here must not read it either.
        host = re.sub(r":\d+$", "", environ.get("HTTP_HOST", "")).strip("[]")
        if host not in LOOPBACK:
            return _refuse(start_response, f"expected this machine's own name (localhost), got {host!r}")
        detail = _STUDY_DETAIL.match(environ.get("PATH_INFO", "").rstrip("/"))
        if detail is None or environ["REQUEST_METHOD"] != "GET" or not self._hides_best(int(detail[1])):
            return self._app(environ, start_response)
        return self._without_best(environ, start_response)

    def _hides_best(self, study_id: int) -> bool:
        try:
            return self._storage.feasible_best(study_id) is None
        except KeyError:
            return False

    def _without_best(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer: list[Any] = []

        def capture(status: str, headers: Sequence[tuple[str, str]], exc_info: Any = None) -> None:
            answer[:] = [status, headers]

        body = b"".join(self._app(environ, capture))
        status, headers = answer
        if status.startswith("200"):
            body = json.dumps({**json.loads(body), "best_trials": []}).encode()
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(body)))])
        return [body]


def _refuse(start_response: Callable[..., Any], reason: str) -> Iterable[bytes]:
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("403 Forbidden", headers)
    return [body]


def dashboard_app(database: Database) -> WsgiApp:
    """The dashboard of every study in a database, as a WSGI application."""
    storage = DashboardStorage(database)
    return _Guard(wsgi(storage), storage)


def serve(url: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the dashboard until KeyboardInterrupt.

    Args:
        port: 0 takes a free one; `say` is told the address.

    Raises:
        InputError: a host that others could reach (there are no passwords), or a port that is taken.
        StorageError: no database there, or not ours.
    """
    if host not in LOOPBACK:
        raise InputError(
            f"--host: expected {' or '.join(LOOPBACK)} (the dashboard asks for no password), got {host!r}; "
            "from elsewhere use `ssh -L 8080:127.0.0.1:8080 MACHINE`"
        )
    database = open_database(url)
    try:
        server = waitress.create_server(dashboard_app(database), sockets=[_listen(host, port)], threads=4)
        try:
            say(f"http://{f'[{host}]' if ':' in host else host}:{server.effective_port}/dashboard")
            server.run()
        finally:
            server.close()
    finally:
        database.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"--port {port}: cannot be opened ({error.strerror}); choose another") from error
