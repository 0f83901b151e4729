"""The gate: who may read, who may write, what every answer carries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.tuner.wsgi import Browser
from tuner.web import FORM_TOKEN, MAX_SESSIONS, SESSION_S, Gate, Sessions, Throttle

PASSWORD = "correct horse"
PATHS = (
    "/", "/dashboard", "/dashboard/studies/1", "/tuner/", "/tuner/studies/toy", "/api/studies", "/api/meta",
    "/static/bundle.js", "/csv/1", "/artifacts/1/ab", "/favicon.ico", "/tuner/api/service",
    "/tuner/static/style.css", "/tuner/static/plotly.js", "/tuner/logout", "/anything",
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def inner(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """What is guarded: says that it was reached, and what for."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Server", "inner")])
    return [f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get(FORM_TOKEN, '')}".encode()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def browser(clock: Clock) -> Browser:
    return Browser(Gate(inner, PASSWORD, clock=clock))


def reached(browser: Browser, path: str = "/api/studies") -> bool:
    return browser.ask(path).body.startswith(b"GET")


# --- log-in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_is_readable_without_a_session(browser: Browser, path: str, method: str) -> None:
    answer = browser.ask(path, method)
    page = path.startswith(("/dashboard", "/tuner/")) or path == "/"
    expected = (401, 303) if page and method in ("GET", "HEAD") else (401,)
    assert answer.status in expected
    assert method.encode() not in answer.body


def test_a_page_leads_to_the_form_and_back(browser: Browser) -> None:
    answer = browser.ask("/dashboard/studies/1?x=2")
    assert answer.status == 303
    assert answer.headers["location"] == "/tuner/login?next=%2Fdashboard%2Fstudies%2F1%3Fx%3D2"
    assert 'value="/dashboard/studies/1?x=2"' in browser.ask(answer.headers["location"]).text
    answer = browser.log_in(PASSWORD, "/dashboard/studies/1?x=2")
    assert (answer.status, answer.headers["location"]) == (303, "/dashboard/studies/1?x=2")
    assert reached(browser)


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/tuner/\r\nX: y", ""],
)
def test_the_way_back_leads_nowhere_else(browser: Browser, target: str) -> None:
    assert browser.log_in(PASSWORD, target).headers["location"] == "/tuner/"


def test_what_the_form_is_told_is_escaped(browser: Browser) -> None:
    page = browser.ask('/tuner/login?next="><script>alert(1)</script>').text
    assert "<script>" not in page


@pytest.mark.parametrize("wrong", ["", "correct", "correct horse ", "CORRECT HORSE", "ü€"])
def test_a_wrong_password(browser: Browser, wrong: str) -> None:
    answer = browser.log_in(wrong)
    assert answer.status == 401
    assert "Wrong password" in answer.text
    assert not reached(browser)


def test_a_password_beyond_ascii() -> None:
    browser = Browser(Gate(inner, "pässwort €"))
    browser.log_in("pässwort €")
    assert reached(browser)


def test_the_session_cookie(browser: Browser) -> None:
    (session,) = [c for c in browser.log_in(PASSWORD).set_cookies if c.startswith("tuner_session=")]
    attributes = {part.strip().lower() for part in session.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert "secure" not in attributes
    assert len(browser.cookies["tuner_session"]) >= 43  # 256 bits


def test_the_session_cookie_behind_https(browser: Browser) -> None:
    browser.origin = "https://localhost:8080"
    (session,) = [c for c in browser.log_in(PASSWORD).set_cookies if c.startswith("tuner_session=")]
    assert "secure" in session.lower()


def test_only_the_hash_of_a_session_is_kept() -> None:
    sessions = Sessions()
    token = sessions.open()
    assert list(sessions._ends) == [hashlib.sha256(token.encode()).hexdigest()]
    assert sessions.holds(token)
    assert not sessions.holds(hashlib.sha256(token.encode()).hexdigest())


@pytest.mark.parametrize("cookie", ["", "x", "tuner_session", "A" * 43])
def test_a_made_up_session(browser: Browser, cookie: str) -> None:
    browser.cookies["tuner_session"] = cookie
    assert browser.ask("/api/studies").status == 401


def test_a_session_ends(browser: Browser, clock: Clock) -> None:
    browser.log_in(PASSWORD)
    clock.now += SESSION_S - 1
    assert reached(browser)
    clock.now += 2
    assert browser.ask("/api/studies").status == 401


def test_sessions_are_bounded() -> None:
    sessions = Sessions()
    first = sessions.open()
    tokens = [sessions.open() for _ in range(MAX_SESSIONS)]
    assert not sessions.holds(first)
    assert all(map(sessions.holds, tokens))


def test_logging_out_ends_the_session_here(browser: Browser) -> None:
    browser.log_in(PASSWORD)
    token = browser.ask("/tuner/").text.split()[-1]
    kept = dict(browser.cookies)
    answer = browser.ask("/tuner/logout", "POST", {"token": token})
    assert (answer.status, answer.headers["location"]) == (303, "/tuner/login")
    browser.cookies = kept
    assert browser.ask("/api/studies").status == 401


def test_every_start_has_its_own_key(browser: Browser) -> None:
    browser.log_in(PASSWORD)
    browser.app = Gate(inner, PASSWORD)
    assert browser.ask("/api/studies").status == 401


# --- forgery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "0" * 64, "ü"])
def test_the_log_in_form_carries_a_token(browser: Browser, token: str) -> None:
    assert browser.log_in(PASSWORD, token=token).status == 403
    assert not reached(browser)


def test_the_token_belongs_to_the_browser_that_got_the_form(browser: Browser) -> None:
    page = browser.ask("/tuner/login").text
    token = page.split('name="token" value="')[1].split('"')[0]
    other = Browser(browser.app)
    other.ask("/tuner/login")
    assert other.ask("/tuner/login", "POST", {"password": PASSWORD, "token": token}).status == 403
    other.cookies.clear()
    assert other.ask("/tuner/login", "POST", {"password": PASSWORD, "token": token}).status == 403


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://localhost:9999", "https://localhost", "http://["]
)
def test_a_log_in_from_another_site(browser: Browser, origin: str | None) -> None:
    browser.origin = origin
    assert browser.log_in(PASSWORD).status == 403


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_logging_out_takes_the_token(browser: Browser, token: str | None) -> None:
    browser.log_in(PASSWORD)
    assert browser.ask("/tuner/logout", "POST", {} if token is None else {"token": token}).status == 403
    assert reached(browser)


def test_reading_logs_nobody_out(browser: Browser) -> None:
    browser.log_in(PASSWORD)
    browser.ask("/tuner/logout")
    assert reached(browser)


def test_a_long_form_is_not_read(browser: Browser) -> None:
    assert browser.ask("/tuner/login", "POST", {"password": "x" * 20_000}).status == 400


# --- throttle ------------------------------------------------------------------------------------------------


def test_guessing_is_slowed_down(browser: Browser, clock: Clock) -> None:
    for _ in range(5):
        assert browser.log_in("guess").status == 401
    answer = browser.log_in(PASSWORD)
    assert answer.status == 429  # also for the right one: nobody is told which it was
    assert answer.headers["retry-after"] == "30"
    clock.now += 31
    assert browser.log_in("guess").status == 401
    assert browser.log_in("guess").status == 429
    clock.now += 31
    assert browser.log_in(PASSWORD).status == 303


def test_another_client_may_still_log_in(browser: Browser) -> None:
    for _ in range(6):
        browser.log_in("guess")
    assert Browser(browser.app, address="192.0.2.2").log_in(PASSWORD).status == 303


def test_right_passwords_cost_nothing(browser: Browser) -> None:
    for _ in range(50):
        assert browser.log_in(PASSWORD).status == 303


def test_many_addresses_guess_no_faster() -> None:
    clock = Clock()
    throttle = Throttle(burst=5, every_s=30, clock=clock)
    allowed = sum(throttle.take(f"client {i}") == 0 for i in range(1000))
    assert allowed == 50
    clock.now += 300
    assert sum(throttle.take(f"other {i}") == 0 for i in range(1000)) == 50


def test_one_network_is_one_client(browser: Browser) -> None:
    for i in range(5):
        Browser(browser.app, address=f"2001:db8::{i}").log_in("guess")
    assert Browser(browser.app, address="2001:db8::ffff").log_in(PASSWORD).status == 429
    assert Browser(browser.app, address="2001:db8:1::1").log_in(PASSWORD).status == 303


def test_clients_are_forgotten_in_time() -> None:
    clock = Clock()
    throttle = Throttle(clock=clock)
    for i in range(Throttle.MAX_CLIENTS + 100):
        clock.now += 10
        assert throttle.take(f"client {i}") == 0
    assert len(throttle._spent) == Throttle.MAX_CLIENTS
    assert "" in throttle._spent


# --- writing, names and headers --------------------------------------------------------------------------------


def test_with_a_session_only_reading(browser: Browser) -> None:
    browser.log_in(PASSWORD)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = browser.ask("/api/studies/1", method)
        assert answer.status == 403
        assert "GET or HEAD" in answer.json["reason"]


@pytest.mark.parametrize("password", [None, PASSWORD])
def test_editing_takes_a_page_of_this_server(password: str | None) -> None:
    browser = Browser(Gate(inner, password, allow_edit=True))
    if password:
        browser.log_in(password)
    assert browser.ask("/api/studies/1", "DELETE").text.startswith("DELETE /api/studies/1")
    for origin in (None, "null", "http://evil.example"):
        browser.origin = origin
        assert browser.ask("/api/studies/1", "DELETE").status == 403
    referred = {"Referer": "http://localhost:8080/dashboard"}
    assert browser.ask("/api/studies/1", "DELETE", headers=referred).status == 403  # the origin goes before it
    browser.origin = None
    assert browser.ask("/api/studies/1", "DELETE", headers=referred).status == 200
    browser.origin = "http://localhost:8080"
    assert browser.ask("/api/studies/1", "DELETE", headers={"Sec-Fetch-Site": "cross-site"}).status == 403


def test_without_a_password_only_this_machines_names() -> None:
    browser = Browser(Gate(inner))
    for name in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
        browser.host = name
        assert reached(browser)
    for name in ("evil.example", "evil.example:8080", "", "localhost.evil.example", "0.0.0.0"):
        browser.host = name
        assert browser.ask("/api/studies").status == 403


def test_with_a_password_any_name(browser: Browser) -> None:
    browser.host, browser.origin = "tuner.example", "https://tuner.example"
    browser.log_in(PASSWORD)
    assert reached(browser)


@pytest.mark.parametrize("path", ["/tuner/login", "/dashboard", "/api/studies", "/static/bundle.js"])
@pytest.mark.parametrize("logged_in", [False, True])
def test_headers_of_every_answer(browser: Browser, path: str, logged_in: bool) -> None:
    if logged_in:
        browser.log_in(PASSWORD)
    headers = browser.ask(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self'" in policy
    assert "unsafe-eval" not in policy
    assert headers["cache-control"] == ("private, no-cache" if path.startswith("/static/") else "no-store")
    assert "server" not in headers


def test_a_policy_of_its_own_is_kept_and_sharpened() -> None:
    def own(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Security-Policy", "script-src 'self' 'unsafe-eval'")])
        return [b""]

    policy = Browser(Gate(own)).ask("/dashboard").headers["content-security-policy"]
    assert policy == "script-src 'self' 'unsafe-eval'; form-action 'self'; frame-ancestors 'none'"
