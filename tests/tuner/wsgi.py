"""A browser for tests: asks a WSGI application in this process, keeps cookies, sends what a browser sends."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlencode, urlsplit


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    set_cookies: list[str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Browser:
    app: Any
    host: str = "localhost:8080"
    address: str = "192.0.2.1"
    origin: str | None = "http://localhost:8080"
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(
        self, path: str, method: str = "GET", form: dict[str, str] | None = None, body: bytes = b"",
        headers: dict[str, str] | None = None, content_type: str = "application/x-www-form-urlencoded",
    ) -> Answer:  # fmt: skip
        parts = urlsplit(path)
        if form is not None:
            body = urlencode(form).encode()
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": parts.path, "QUERY_STRING": parts.query, "HTTP_HOST": self.host,
            "SERVER_NAME": "localhost", "SERVER_PORT": "8080", "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": self.address, "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(), "CONTENT_LENGTH": str(len(body)), "HTTP_ACCEPT_ENCODING": "gzip",
        }  # fmt: skip
        if body:
            environ["CONTENT_TYPE"] = content_type
        if method != "GET" and self.origin is not None:
            environ["HTTP_ORIGIN"] = self.origin
        if self.cookies:
            environ["HTTP_COOKIE"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()}
        told: list[Any] = []

        def start_response(status: str, given: list[tuple[str, str]], exc_info: Any = None) -> None:
            told[:] = [status, given]

        content = self.app(environ, start_response)
        try:
            received = b"".join(content)
        finally:
            if hasattr(content, "close"):
                content.close()
        set_cookies = [value for name, value in told[1] if name.lower() == "set-cookie"]
        self._keep(set_cookies)
        found = {name.lower(): value for name, value in told[1]}
        if found.get("content-encoding") == "gzip" and received:
            received = gzip.decompress(received)
        return Answer(int(told[0].split()[0]), found, set_cookies, received)

    def _keep(self, set_cookies: list[str]) -> None:
        for text in set_cookies:
            for name, morsel in SimpleCookie(text).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value

    def log_in(self, password: str, target: str = "", token: str | None = None) -> Answer:
        page = self.ask("/tuner/login").text
        found = page.split('name="token" value="')[1].split('"')[0]
        form = {"password": password, "token": found if token is None else token, "next": target}
        return self.ask("/tuner/login", "POST", form)
