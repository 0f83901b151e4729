"""What stands before the dashboard: one password, sessions, and what every answer carries.

Plain WSGI: the gate knows nothing of what it guards. A session is a random cookie, kept here as its hash and gone
with the process; log-ins are throttled; a write has to come from a page of this very server.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from bottle import BaseRequest, HTTPResponse, SimpleTemplate

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SESSION_S = 12 * 3600.0
MAX_SESSIONS = 1000
LOGIN, LOGOUT = "/tuner/login", "/tuner/logout"
FORM_TOKEN = "tuner.form_token"  # in the WSGI environment: what a form of this session has to carry
_SESSION_COOKIE, _FORM_COOKIE = "tuner_session", "tuner_login"
_MAX_FORM_BYTES = 10_000
_PAGE = re.compile(r"/((dashboard|tuner)(/[^\\\s]*)?(\?[^\\\s]*)?)?")

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'"
)
_FRAMES = "form-action 'self'; frame-ancestors 'none'"
_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
)

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Clock = Callable[[], float]


class Throttle:
    """How many log-ins may fail: a bucket of tokens for each client, and one for all of them.

    A client has `burst` tries, and one more every `every_s`; all together ten times as much, so that a password is
    not guessed from many addresses either. Whoever empties the common bucket keeps others from logging in, but
    ends no session.
    """

    MAX_CLIENTS = 10_000

    def __init__(self, burst: int = 5, every_s: float = 30.0, clock: Clock = time.monotonic) -> None:
        self._burst, self._every_s, self._clock = burst, every_s, clock
        self._spent: dict[str, tuple[float, float]] = {}  # client -> (tokens spent, at)
        self._lock = threading.Lock()

    def take(self, client: str) -> float:
        """Spend a token; returns 0, or how many seconds to wait for one."""
        now = self._clock()
        limits = ((client, self._burst, self._every_s), ("", 10 * self._burst, self._every_s / 10))
        with self._lock:
            spent = {name: self._left(name, every_s, now) for name, _, every_s in limits}
            wait_s = max((spent[name] + 1 - burst) * every_s for name, burst, every_s in limits)
            if wait_s > 0:
                return wait_s
            for name in spent:
                self._spent.pop(name, None)  # the newest last
                self._spent[name] = (spent[name] + 1, now)
            while len(self._spent) > self.MAX_CLIENTS:
                del self._spent[next(iter(self._spent))]
        return 0.0

    def give_back(self, client: str) -> None:
        """The log-in was right: it costs nothing."""
        with self._lock:
            for name in (client, ""):
                spent, at = self._spent.get(name, (0.0, 0.0))
                self._spent[name] = (max(0.0, spent - 1), at)

    def _left(self, name: str, every_s: float, now: float) -> float:
        spent, at = self._spent.get(name, (0.0, now))
        return max(0.0, spent - (now - at) / every_s)


class Sessions:
    """Who is logged in: hashes of random tokens, each good for SESSION_S. They end with the process."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._ends: dict[str, float] = {}
        self._lock = threading.Lock()

    def open(self) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._ends[_digest(token)] = self._clock() + SESSION_S
            while len(self._ends) > MAX_SESSIONS:
                del self._ends[next(iter(self._ends))]  # the oldest
        return token

    def holds(self, token: str) -> bool:
        with self._lock:
            return self._ends.get(_digest(token), 0.0) > self._clock()

    def close(self, token: str) -> None:
        with self._lock:
            self._ends.pop(_digest(token), None)


class Gate:
    """WSGI middleware that lets through who may read, and what may be written.

    Args:
        password: None: nobody is asked for one, and only loopback names are answered, so that a page of another
            site whose name was made to point here reads nothing.
        allow_edit: let requests other than GET and HEAD through, where they come from a page of this server.
    """

    def __init__(
        self, app: WsgiApp, password: str | None = None, allow_edit: bool = False, clock: Clock = time.monotonic
    ) -> None:
        self._app = app
        self._allow_edit = allow_edit
        self._key = secrets.token_bytes(32)
        self._password = None if password is None else self._sign(password)
        self._sessions = Sessions(clock)
        self._throttle = Throttle(clock=clock)
        self._login_page = SimpleTemplate((files("tuner") / "browser" / "login.html").read_text())
        self._style = (files("tuner") / "browser" / "style.css").read_text()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = BaseRequest(environ)
        start = self._secured(request, start_response)
        answer = self._answer(request)
        if answer is None:
            return self._app(environ, start)
        return send(answer, start, request.method)

    def _answer(self, request: BaseRequest) -> HTTPResponse | None:
        """What the gate itself answers; None: the request passes."""
        reads = request.method in ("GET", "HEAD")
        if self._password is None:
            host = re.sub(r":\d+$", "", request.get_header("Host", "")).strip("[]")
            if host not in LOOPBACK:
                return refusal(403, f"expected this machine's own name (localhost), got {host!r}")
        elif request.path == LOGIN:
            return self._log_in(request)
        else:
            token = request.get_cookie(_SESSION_COOKIE, "")
            if not self._sessions.holds(token):
                return self._ask(request)
            request.environ[FORM_TOKEN] = self._sign(token)
            if request.path == LOGOUT and not reads:
                return self._log_out(request, token)
        if not reads and not self._allow_edit:
            return refusal(403, "this dashboard only shows: expected GET or HEAD; --allow-edit lets it write")
        if not reads and not is_same_origin(request):
            return refusal(403, "expected a request of this dashboard's own pages")
        return None

    # --- sessions --------------------------------------------------------------------------------------------

    def _ask(self, request: BaseRequest) -> HTTPResponse:
        wanted = request.path + (f"?{request.query_string}" if request.query_string else "")
        if request.method not in ("GET", "HEAD") or not _PAGE.fullmatch(wanted) or "/api/" in request.path:
            return refusal(401, f"expected a session; log in at {LOGIN}")
        return _redirect(f"{LOGIN}?next={quote(wanted, safe='')}")

    def _log_in(self, request: BaseRequest) -> HTTPResponse:
        if request.method in ("GET", "HEAD"):
            return self._login_form(request, 200, "", request.query.getunicode("next", ""))
        if request.method != "POST" or not 0 <= request.content_length <= _MAX_FORM_BYTES:
            return refusal(400, "expected the log-in form")
        given, nonce = request.forms, request.get_cookie(_FORM_COOKIE, "")
        target = given.getunicode("next", "")
        if not is_same_origin(request) or not nonce or not self._fits(given.get("token", ""), nonce):
            return self._login_form(request, 403, "This form is not of this server, or too old. Try again.", target)
        client = _client(request)
        wait_s = self._throttle.take(client)
        if wait_s > 0:
            text = f"Too many tries. Wait {max(1, round(wait_s))} seconds."
            answer = self._login_form(request, 429, text, target)
            answer.set_header("Retry-After", str(max(1, round(wait_s))))
            return answer
        if not hmac.compare_digest(self._sign(given.getunicode("password", "")), self._password or ""):
            return self._login_form(request, 401, "Wrong password.", target)
        self._throttle.give_back(client)
        answer = _redirect(target if _PAGE.fullmatch(target) else "/tuner/")
        _set_cookie(request, answer, _SESSION_COOKIE, self._sessions.open(), SESSION_S)
        _set_cookie(request, answer, _FORM_COOKIE, "", 0)
        return answer

    def _log_out(self, request: BaseRequest, token: str) -> HTTPResponse:
        small = 0 <= request.content_length <= _MAX_FORM_BYTES
        if not small or not is_same_origin(request) or not self._fits(request.forms.get("token", ""), token):
            return refusal(403, "expected the log-out form of this session")
        self._sessions.close(token)
        answer = _redirect(LOGIN)
        _set_cookie(request, answer, _SESSION_COOKIE, "", 0)
        return answer

    def _login_form(self, request: BaseRequest, status: int, problem: str, target: str) -> HTTPResponse:
        nonce = request.get_cookie(_FORM_COOKIE, "") or secrets.token_urlsafe(16)
        body = self._login_page.render(
            style=self._style, problem=problem, target=target, token=self._sign(nonce), action=LOGIN
        )
        answer = HTTPResponse(body.encode(), status, {"Content-Type": "text/html; charset=utf-8"})
        _set_cookie(request, answer, _FORM_COOKIE, nonce, 3600)
        return answer

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _fits(self, form_token: str, cookie: str) -> bool:
        return hmac.compare_digest(form_token.encode(), self._sign(cookie).encode())

    # --- headers ---------------------------------------------------------------------------------------------

    def _secured(self, request: BaseRequest, start_response: Callable[..., Any]) -> Callable[..., Any]:
        def start(status: str, headers: Sequence[tuple[str, str]], exc_info: Any = None) -> Any:
            found = {name.lower(): value for name, value in headers}
            policy = found.get("content-security-policy", POLICY).rstrip("; ")
            kept = [(n, v) for n, v in headers if n.lower() not in ("content-security-policy", "server")]
            added = [*_HEADERS, ("Content-Security-Policy", f"{policy}; {_FRAMES}")]
            if "cache-control" not in found:
                static = re.match(r"/(tuner/)?static/", request.path)
                added.append(("Cache-Control", "private, no-cache" if static else "no-store"))
            return start_response(status, [*kept, *added], *([exc_info] if exc_info else []))

        return start


def is_same_origin(request: BaseRequest) -> bool:
    """Whether a browser says that the request came from a page of this server; without a word it did not."""
    if request.get_header("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.get_header("Origin") or request.get_header("Referer") or ""
    return bool(origin) and _split(origin).netloc == request.get_header("Host", "")


def send(answer: HTTPResponse, start_response: Callable[..., Any], method: str = "GET") -> Iterable[bytes]:
    """Answer a WSGI request; the body is bytes."""
    start_response(answer.status_line, [*answer.headerlist, ("Content-Length", str(len(answer.body)))])
    return [] if method == "HEAD" else [answer.body]


def refusal(status: int, reason: str) -> HTTPResponse:
    return HTTPResponse(json.dumps({"reason": reason}).encode(), status, {"Content-Type": "application/json"})


def _redirect(target: str) -> HTTPResponse:
    return HTTPResponse(b"", 303, {"Location": target})  # relative: a proxy may have another name and scheme


def _set_cookie(request: BaseRequest, answer: HTTPResponse, name: str, value: str, age_s: float) -> None:
    # The form's own origin knows whether a proxy in front speaks https; we only ever hear http.
    secure = (
        _split(request.get_header("Origin", "")).scheme == "https" or request.environ["wsgi.url_scheme"] == "https"
    )
    answer.set_cookie(name, value, path="/", max_age=int(age_s), httponly=True, samesite="strict", secure=secure)


def _client(request: BaseRequest) -> str:
    """The address that tries; of IPv6 the network, as one client has the whole of it."""
    address = request.environ.get("REMOTE_ADDR", "")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, 64), strict=False))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _split(url: str) -> SplitResult:
    """Its parts; none where it is no URL."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")
