"""Our pages, under /tuner/ of the dashboard's server: the service, a study's arms, a trial's curves.

HTML, style and scripts lie in `browser/`; everything they show comes as JSON from `Feed` and is asked for again
every few seconds. Nothing is loaded from elsewhere: plotly.js comes out of the plotly package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from bottle import Bottle, HTTPResponse, SimpleTemplate, request

from storage.database import Database, Unavailable
from tuner.pages_feed import Feed
from tuner.web import FORM_TOKEN, LOGOUT, refusal

_TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_SCRIPTS = ("live.js", "plots.js", "service.js", "study.js", "trial.js", "bridge.js")


def pages_app(database: Database, dashboard_ids: Callable[[], Mapping[str, int]]) -> Bottle:
    """Our pages as a WSGI application.

    Args:
        dashboard_ids: optuna-dashboard's number of each study, by name, for links to it and from it.
    """
    app, feed = Bottle(), Feed(database)
    page = SimpleTemplate((files("tuner") / "browser" / "page.html").read_text())

    def show(kind: str, title: str, **about: Any) -> HTTPResponse:
        body = page.render(
            kind=kind, title=title, about=about, logout=LOGOUT, token=request.environ.get(FORM_TOKEN, "")
        )
        return HTTPResponse(body.encode(), 200, {"Content-Type": "text/html; charset=utf-8"})

    @app.get("/tuner")
    def without_slash() -> HTTPResponse:
        return HTTPResponse(b"", 302, {"Location": "/tuner/"})

    @app.get("/tuner/")
    def service_page() -> HTTPResponse:
        return show("service", "Service")

    @app.get("/tuner/studies/<name>")
    def study_page(name: str) -> HTTPResponse:
        return show("study", name, study=name)

    @app.get("/tuner/studies/<name>/trials/<number:int>")
    def trial_page(name: str, number: int) -> HTTPResponse:
        return show("trial", f"{name} trial {number}", study=name, number=number)

    @app.get("/tuner/dashboard/<study_id:int>")
    @app.get("/tuner/dashboard/<study_id:int>/<number:int>")
    def from_dashboard(study_id: int, number: int | None = None) -> HTTPResponse:
        """Where a page of optuna-dashboard finds its study or trial here."""
        name = next((name for name, found in dashboard_ids().items() if found == study_id), None)
        if name is None:
            return refusal(404, f"expected a study of the dashboard, got {study_id}")
        trial = "" if number is None else f"/trials/{number}"
        return HTTPResponse(b"", 303, {"Location": f"/tuner/studies/{name}{trial}"})

    @app.get("/tuner/api/service")
    def service() -> HTTPResponse:
        return answer({**feed.service(), "dashboard_ids": dict(dashboard_ids())})

    @app.get("/tuner/api/studies/<name>")
    def study(name: str) -> HTTPResponse:
        found = feed.study(name, request.query.get("since", ""))
        if found is None:
            return refusal(404, f"expected a study, got {name!r}")
        return answer({**found, "dashboard_id": dashboard_ids().get(name)})

    @app.get("/tuner/api/studies/<name>/trials/<number:int>")
    def trial(name: str, number: int) -> HTTPResponse:
        found = feed.trial(name, number, request.get_header("If-None-Match", ""))
        if found is None:
            return refusal(404, f"expected a trial of study {name!r}, got {number}")
        version, shown = found
        if shown is None:
            return HTTPResponse(b"", 304, {"ETag": version})
        return answer({**shown, "dashboard_id": dashboard_ids().get(name)}, ETag=version)

    @app.get("/tuner/static/<name>")
    def static(name: str) -> HTTPResponse:
        if name not in (*_SCRIPTS, "style.css", "plotly.js"):
            return refusal(404, f"expected a file of these pages, got {name!r}")
        tag, packed = _static(name)
        headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
        if request.get_header("If-None-Match") == tag:
            return HTTPResponse(b"", 304, headers)
        return _packed(packed, {**headers, "Content-Type": _TYPES[name.rpartition(".")[2]]})

    def guarded(callback: Callable[..., HTTPResponse]) -> Callable[..., HTTPResponse]:
        """The database may be away for a while: the page keeps what it shows, and says so."""

        def called(*args: Any, **kwargs: Any) -> HTTPResponse:
            try:
                return callback(*args, **kwargs)
            except Unavailable as error:
                return refusal(503, str(error))

        return called

    app.install(guarded)
    return app


def answer(content: Mapping[str, Any], **headers: str) -> HTTPResponse:
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **headers}
    if len(body) < 1000:
        return HTTPResponse(body, 200, headers)
    return _packed(gzip.compress(body, 1), headers)


def _packed(packed: bytes, headers: Mapping[str, str]) -> HTTPResponse:
    if "gzip" in request.get_header("Accept-Encoding", ""):
        return HTTPResponse(packed, 200, {**headers, "Content-Encoding": "gzip"})
    return HTTPResponse(gzip.decompress(packed), 200, dict(headers))


@cache
def _static(name: str) -> tuple[str, bytes]:
    """(entity tag, content packed by gzip) of a file that does not change while we live."""
    if name == "plotly.js":
        content = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    else:
        content = (files("tuner") / "browser" / name).read_bytes()
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"', gzip.compress(content, 6)
