"""optuna-dashboard on our storage, beside our pages: infeasible trials shown as such, the feasible best as best.

The dashboard reads constraints in Optuna's old format only and takes the best trial without looking at them; both
are put right in the storage it is given. Nothing is written to the database, unless editing is allowed; and then
nothing that would part Optuna's table from ours.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import waitress
from bottle import HTTPResponse
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi

from models.trainer import InputError
from storage.database import Database
from storage.runs import MeasurementRow, Store, StudyRow
from tuner.catalog import is_alive, open_database
from tuner.optuna_storage import RetryingStorage
from tuner.pages import pages_app
from tuner.spec import Spec
from tuner.study import best_row, violation_metric
from tuner.summary import UNCERTIFIED
from tuner.web import LOOPBACK, Gate, WsgiApp, refusal, send

# A browser asks again by itself: while the database is away, a request is not to hold a thread for long.
PATIENCE_S = 5.0
THREADS = 8
PACK_BYTES = 100_000
# A body is taken in before anybody is asked for a password; notes are short.
MAX_BODY_BYTES = 1_000_000
# More new trials than this are read all at once.
MANY = 200
_SHOWN = ("precision", "precision_bound", "recall", "threshold")
_STUDY = re.compile(r"/api/studies/(\d+)(/rename)?")
_IMPORTANCES = re.compile(r"/api/studies/(\d+)/param_importances")
_TELL = re.compile(r"/api/trials/(\d+)/tell")


@dataclass
class _Seen:
    """A study's ended trials as they are shown; what has ended does not change."""

    trials: dict[int, FrozenTrial] = field(default_factory=dict)
    best: tuple[int, FrozenTrial | None] = (0, None)  # of so many ended trials


class DashboardStorage(_CachedStorage):
    """Optuna's cached storage with the trials as a person should see them.

    Every trial carries its true violation (at its best step) in the constraint format that the dashboard reads, and
    its decision as user attributes; every study the name of its objective, its data and its constraint.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(RetryingStorage(database, PATIENCE_S))
        self._database = database
        self._store = Store(database)
        self._rows: dict[int, StudyRow | None] = {}  # by Optuna's number of the study
        self._seen: dict[int, _Seen] = {}
        self._seen_lock = threading.Lock()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy=False, states=None)
        row = self.row(study_id)
        with self._seen_lock:
            seen = self._seen.setdefault(study_id, _Seen())
            new = [t for t in trials if t.state.is_finished() and t.number not in seen.trials]
            decisions = {} if row is None else self._decisions(row, [t.number for t in new])
            seen.trials |= {t.number: _shown(t, decisions.get(t.number, {})) for t in new}
            shown = [seen.trials.get(t.number) or _shown(t, {}) for t in trials]
        return [trial for trial in shown if states is None or trial.state in states]

    def get_all_studies(self) -> list[FrozenStudy]:
        rows = {row.name: row for row in self._store.studies()}
        studies = super().get_all_studies()
        for study in studies:
            row = rows.get(study.study_name)
            self._recognise(study._study_id, row)
            if row is not None:
                shown, spec = _study_attributes(row)
                study.user_attrs = {**study.user_attrs, **shown}
                study.system_attrs = {**study.system_attrs, "study:metric_names": [spec.objective.metric]}
        return studies

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The feasible best; where nothing is feasible, Optuna's best, which `_Shown` keeps from being seen."""
        return self.feasible_best(study_id) or super().get_best_trial(study_id)

    def feasible_best(self, study_id: int) -> FrozenTrial | None:
        trials = self.get_all_trials(study_id, deepcopy=False)
        n_ended = sum(trial.state.is_finished() for trial in trials)
        seen = self._seen[study_id]
        if seen.best[0] != n_ended:
            maximise = self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE
            sign = 1.0 if maximise else -1.0
            complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
            feasible = [t for t in complete if all(v <= 0 for v in t._system_attrs.get("constraints", ()))]
            best = max(feasible, key=lambda t: (sign * (t.value or 0.0), -t.number), default=None)
            seen.best = (n_ended, best)
        return seen.best[1]

    def delete_study(self, study_id: int) -> None:
        """Both sides of a study; the files of its runs stay, and keep its name from being used again."""
        row = self.row(study_id)
        if row is None:
            super().delete_study(study_id)
            return
        with self._database.exclusive(f"study:{row.id}"):
            super().delete_study(study_id)
            self._store.delete_study(row.id)
        self._recognise(study_id, None)

    # --- what is ours ----------------------------------------------------------------------------------------

    def row(self, study_id: int) -> StudyRow | None:
        """Our row of a study; None for one that another program keeps in the same database."""
        if study_id not in self._rows:
            self._recognise(study_id, self._store.find_study(self.get_study_name_from_id(study_id)))
        return self._rows[study_id]

    def ids(self) -> dict[str, int]:
        """Optuna's number of every study, by name."""
        return {study.study_name: study._study_id for study in super().get_all_studies()}

    def has_trial(self, trial_id: int) -> bool:
        """Whether a trial is of a study of ours."""
        ours = [study_id for study_id in self.ids().values() if self.row(study_id) is not None]
        return any(t._trial_id == trial_id for study_id in ours for t in self.get_all_trials(study_id))

    def workers_on(self, row: StudyRow) -> list[str]:
        """The living workers that serve a study, or hold a trial of it."""
        held = {id for id, of in self._store.holdings().items() if any(one.study_name == row.name for one in of)}
        return [
            f"{worker.identity.host} pid {worker.identity.pid}"
            for worker in self._store.workers(row.id)
            if is_alive(worker) and (worker.study_id == row.id or worker.id in held)
        ]

    def _recognise(self, study_id: int, row: StudyRow | None) -> None:
        """Forget what was cached under a number that is another study's by now: the first was deleted elsewhere."""
        known = self._rows.get(study_id)
        if known is not None and (row is None or (known.id, known.created_at) != (row.id, row.created_at)):
            with self._lock, self._seen_lock:
                self._studies.pop(study_id, None)
                self._seen.pop(study_id, None)
        self._rows[study_id] = row

    def _decisions(self, row: StudyRow, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Of some ended trials, from the measurement at the best step of each that has one."""
        if not numbers:
            return {}
        spec = Spec.from_json(row.spec)
        found = self._store.best_measurements(row.id) if len(numbers) > MANY else {}
        rest = [number for number in numbers if number not in found]
        for number, rows in self._store.measurements(row.id, rest).items():
            if rows:
                found[number] = best_row(rows, spec.objective)
        return {number: _decision(measurement, spec) for number, measurement in found.items()}


def _study_attributes(row: StudyRow) -> tuple[dict[str, Any], Spec]:
    spec, data = Spec.from_json(row.spec), json.loads(row.data)
    decision = spec.decision
    constraint = f"{decision.task}: precision >= {decision.target_precision:g}, confidence {decision.confidence:g}"
    shown = {
        "data": f"{data['source']}{' (simulated, not real)' if data.get('simulated') else ''}",
        "constraint": f"{constraint}, unit {decision.unit}, at least {decision.min_selected} rows",
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


class _Shown:
    """optuna-dashboard with a link to our pages, no "best trial" where nothing is feasible, and no edit that would
    part its table from ours."""

    def __init__(self, app: WsgiApp, storage: DashboardStorage) -> None:
        self._app = app
        self._storage = storage

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # As bottle finds its way: no bytes that are not UTF-8, and one line break at the end is none.
        path = environ.get("PATH_INFO", "").encode("latin1").decode("utf8", "ignore").rstrip("/\n")
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            reason = self._parts(method, path)
            if reason is not None:
                return send(refusal(409, reason), start_response)
        elif path == "":
            return send(HTTPResponse(b"", 302, {"Location": "/dashboard"}), start_response)
        elif method == "GET" and re.match(r"/dashboard(/|$)", path):
            return self._changed(environ, start_response, _with_bridge)
        elif method == "GET" and (study := _STUDY.fullmatch(path)):
            change = _without_best if self._hides_best(int(study[1])) else bytes
            return self._changed(environ, start_response, change)
        elif method == "GET" and (study := _IMPORTANCES.fullmatch(path)) and self._searches_nothing(int(study[1])):
            # An evaluation's fits; optuna-dashboard would divide by the number of searched values.
            answer = HTTPResponse(b'{"param_importances": [[]]}', 200, {"Content-Type": "application/json"})
            return send(answer, start_response)
        return self._app(environ, start_response)

    def _hides_best(self, study_id: int) -> bool:
        try:
            single = len(self._storage.get_study_directions(study_id)) == 1
            return single and self._storage.feasible_best(study_id) is None
        except KeyError:
            return False

    def _searches_nothing(self, study_id: int) -> bool:
        try:
            return not any(trial.params for trial in self._storage.get_all_trials(study_id, deepcopy=False))
        except KeyError:  # no such study: optuna-dashboard says so
            return False

    def _parts(self, method: str, path: str) -> str | None:
        """Why an edit is refused; None where it is harmless."""
        tell, study = _TELL.fullmatch(path), _STUDY.fullmatch(path)
        if tell:
            ours = self._storage.has_trial(int(tell[1]))
            return "expected a trial of another program: of this one its worker tells the end" if ours else None
        try:
            row = self._storage.row(int(study[1])) if study else None
        except KeyError:  # no such study: optuna-dashboard says so
            return None
        if study is None or row is None:
            return None
        if study[2]:
            return f"study {row.name}: expected to keep its name, by which its measurements and files are found"
        workers = self._storage.workers_on(row) if method == "DELETE" else []
        if not workers:
            return None
        return f"study {row.name}: expected no worker, got {', '.join(workers)} at work; stop them first"

    def _changed(
        self, environ: dict[str, Any], start_response: Callable[..., Any], change: Callable[[bytes], bytes]
    ) -> Iterable[bytes]:
        """The answer with another body, packed where it is long (a study of 5,000 trials has 18 MB).

        A page is never answered by "not modified", as its file alone would be.
        """
        answer: list[Any] = []

        def capture(status: str, headers: Sequence[tuple[str, str]], exc_info: Any = None) -> None:
            answer[:] = [status, headers]

        kept_out = ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE")
        asked = {name: value for name, value in environ.items() if name not in kept_out}
        content = self._app(asked, capture)
        try:
            body = b"".join(content)
        finally:
            if hasattr(content, "close"):  # a file that is served
                content.close()
        status, headers = answer
        if status.startswith("200"):
            body = change(body)
        dropped = ("content-length", "last-modified", "etag", "accept-ranges")
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        if len(body) > PACK_BYTES and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body, kept = gzip.compress(body, 1), [*kept, ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
        start_response(status, [*kept, ("Content-Length", str(len(body)))])
        return [body]


def _with_bridge(page: bytes) -> bytes:
    return page.replace(b"</head>", b'<script defer src="/tuner/static/bridge.js"></script></head>', 1)


def _without_best(study: bytes) -> bytes:
    return json.dumps({**json.loads(study), "best_trials": []}).encode()


def dashboard_app(database: Database, password: str | None = None, allow_edit: bool = False) -> WsgiApp:
    """optuna-dashboard and our pages for every study of a database, as a WSGI application.

    Args:
        password: None: whoever reaches it under a loopback name may read.
        allow_edit: optuna-dashboard may write; the database has to be open for it.
    """
    storage = DashboardStorage(database)
    dashboard, pages = _Shown(wsgi(storage), storage), pages_app(database, storage.ids)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        ours = re.match(r"/tuner(/|$)", environ.get("PATH_INFO", ""))
        return (pages if ours else dashboard)(environ, start_response)

    return Gate(app, password, allow_edit)


def serve(
    url: str,
    host: str,
    port: int,
    say: Callable[[str], None],
    allow_edit: bool = False,
    password: str | None = None,
) -> None:
    """Serve the dashboard until KeyboardInterrupt.

    Args:
        port: 0 takes a free one; `say` is told the address.
        allow_edit: let browsers change and delete.
        password: asked for in the browser; None or empty: nobody is asked, which takes a loopback `host`.

    Raises:
        InputError: a host that others could reach, without a password; or a port that is taken.
        StorageError: no database there, or not ours.
    """
    if password is not None and not password.isprintable():  # what is no UTF-8 is not, either
        raise InputError("TUNER_DASHBOARD_PASSWORD: expected printable text in UTF-8, got something else")
    if host not in LOOPBACK and not (password or "").strip():
        raise InputError(
            f"--host: expected a password in TUNER_DASHBOARD_PASSWORD, as others can reach {host!r}, got none; "
            "set one, or listen on 127.0.0.1 and use `ssh -L 8080:127.0.0.1:8080 MACHINE` from elsewhere"
        )
    database = open_database(url, read_only=not allow_edit)
    try:
        app = dashboard_app(database, password or None, allow_edit)
        server = waitress.create_server(
            app, sockets=[_listen(host, port)], threads=THREADS, ident=None, max_request_body_size=MAX_BODY_BYTES
        )
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
