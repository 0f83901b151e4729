"""The dashboard in a real browser: headless Chromium, a real server process, a study that goes on meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from storage.database import Database
from storage.runs import MeasurementRow, Store
from tests.searches import METRIC, VIOLATION, make_database, make_spec, make_study, new_worker, suggest_all
from tuner.optuna_dashboard import DashboardStorage
from tuner.study import Claim, Study

ROOT = Path(__file__).resolve().parent.parent.parent
PASSWORD = "correct horse battery"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
WAIT_MS = 60_000  # a loaded machine takes its time; nothing waits longer than it has to


@dataclass
class Served:
    """A dashboard process and the study that it shows."""

    address: str
    study: Study
    problems: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/tuner/studies/{self.study.name}"

    @property
    def dashboard_path(self) -> str:
        return f"/dashboard/studies/{DashboardStorage(self.study.database).ids()[self.study.name]}"

    def begin(self) -> Claim:
        claim = self.study.claim(new_worker(self.study))
        assert claim is not None
        self.study.store.set_config(self.study.id, claim.number, claim.attempt, suggest_all(self.study, claim))
        return claim

    def measure(self, claim: Claim, step: int, value: float) -> None:
        metrics = {
            METRIC: value, f"{METRIC}_se": 0.01, VIOLATION: -0.1, "valid/toy/threshold": 0.0,
            "valid/toy/recall": 0.4, "valid/toy/precision": 0.7, "valid/toy/precision_bound": 0.6,
            "valid/toy/loss": 1 / (step + 1), "train/toy/loss": 1 / (step + 2), "train/other/loss": 0.5,
            "train/cosine/toy/other": 0.1 * step - 0.2, "train/toy/loss_share": 0.6, "train/other/loss_share": 0.4,
            "train/toy/gradient_share": 0.3, "train/other/gradient_share": 0.7,
        }  # fmt: skip
        curves = {
            "step": step,
            "pr": {"recall": [0.1, 0.4, 1.0], "precision": [0.9, 0.7, 0.1], "bound": [0.6, 0.6, 0.08],
                   "threshold": [1.5, 0.0, -2.0]},
            "calibration": {"predicted": [0.1, 0.5], "observed": [0.12, 0.45], "count": [80, 20]},
        }  # fmt: skip
        row = MeasurementRow(step, metrics, 10.0 * (step + 1))
        self.study.store.record(self.study.id, claim.number, claim.attempt, [row], curves)
        self.study.search.report(claim.trial, step, value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Database]]:
    """A dashboard process with a password: its address, and the database that it shows."""
    folder = tmp_path_factory.mktemp("served")
    database = make_database(f"sqlite:///{folder}/tuner.db")
    environment = {**os.environ, "TUNER_DASHBOARD_PASSWORD": PASSWORD, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-m", "tuner", "dashboard", "--port", "0", "--storage", str(database.url)]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[^/]+", process.stdout.readline())
            assert found is not None
            yield found[0], database
        finally:
            process.terminate()
            assert process.wait(timeout=30) == 0
            database.close()


@pytest.fixture
def served(server: tuple[str, Database]) -> Iterator[Served]:
    """A new study with a complete trial of each arm."""
    address, database = server
    name = f"toy-{len(Store(database).studies())}"
    study = make_study(database, make_spec(n_trials=20, description="A toy that only rises"), name)
    study.store.start_study(study.id, 20, 0)
    served = Served(address, study)
    for value in (0.4, 0.6):
        claim = served.begin()
        served.measure(claim, 0, value / 2)
        served.measure(claim, 1, value)
        study.end(claim, "complete")
    yield served
    for worker in study.store.workers(study.id):
        study.store.end_worker(worker.id)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "expected Chromium on the PATH, got none; install the package chromium"
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, served: Served) -> Iterator[BrowserContext]:
    """A window whose scripts must not fail and whose pages must load nothing from elsewhere."""
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(WAIT_MS)
    context.on("request", lambda r: _check(served, r.url.startswith((served.address, "data:", "blob:")), r.url))
    context.on("weberror", lambda error: served.problems.append(str(error.error)))
    context.on("console", lambda message: _check(served, not _is_fault(message), message.text))
    yield context
    context.close()
    assert served.problems == []


def _check(served: Served, fine: bool, what: str) -> None:
    if not fine:
        served.problems.append(what)


def _is_fault(message: Any) -> bool:
    # A refused log-in and an ended session are told by their status, which the browser counts as an error.
    return message.type == "error" and not re.search(r"status of 40[13]", message.text)


def log_in(page: Page, served: Served, path: str = "/tuner/") -> None:
    page.goto(served.address + path)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(served.address + path)


def test_log_in_and_out(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    page.goto(f"{served.address}/dashboard")
    assert "/tuner/login" in page.url
    page.get_by_label("Password").fill("guess")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_have_text("Wrong password.")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{served.address}/dashboard")  # where one wanted to go
    (session,) = [c for c in context.cookies() if c["name"] == "tuner_session"]
    assert (session["httpOnly"], session["sameSite"]) == (True, "Strict")
    page.goto(f"{served.address}/tuner/")
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{served.address}/tuner/login")
    assert page.request.get(f"{served.address}/api/studies").status == 401


def test_a_running_trial_appears_without_reload(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    log_in(page, served)
    expect(page.locator("#workers")).to_contain_text("2 alive on 1 device, 0 of them at a trial")
    page.get_by_role("link", name=served.study.name).click()
    rows = page.locator("#trials tbody tr")
    expect(rows).to_have_count(2)
    expect(page.locator("#arms tbody tr")).to_have_count(2)
    expect(page.locator("#curves .main-svg").first).to_be_visible()
    page.evaluate("window.sameDocument = true")

    claim = served.begin()
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("running")
    served.measure(claim, 0, 0.1234)
    expect(rows.first).to_contain_text("0.1234")
    page.get_by_label("State").select_option("running")
    expect(rows).to_have_count(1)
    served.study.end(claim, "complete")
    expect(rows).to_have_count(0)
    assert page.evaluate("window.sameDocument")


def test_the_plots_of_a_run(context: BrowserContext, served: Served) -> None:
    claim = served.begin()
    served.measure(claim, 0, 0.3)
    page = context.new_page()
    log_in(page, served, served.path)
    page.get_by_role("link", name=str(claim.number), exact=True).click()
    for name in ("learning", "losses", "pr", "calibration", "cosines", "shares", "gradients"):
        expect(page.locator(f"#{name} .main-svg").first).to_be_visible()
    expect(page.locator("#pr .legend")).to_contain_text("lower bound at confidence 0.9")
    expect(page.locator("#pr .legend")).to_contain_text("threshold 0")
    expect(page.locator("#pr")).to_contain_text("step 0; search threshold, not certified")
    points = page.locator("#learning .scatterlayer .trace").first.locator(".point")
    expect(points).to_have_count(1)
    served.measure(claim, 1, 0.5)
    expect(points).to_have_count(2)
    expect(page.locator("#pr")).to_contain_text("step 1;")
    expect(page.locator("#trial")).to_contain_text("running")
    served.study.end(claim, "complete")
    expect(page.locator("#trial .chip").first).to_have_text("complete")


def test_links_lead_both_ways(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    log_in(page, served, served.path)
    dashboard = page.get_by_role("link", name="Optuna Dashboard")
    expect(dashboard).to_have_attribute("href", served.dashboard_path)
    dashboard.click()
    expect(page.get_by_text(re.compile(rf"{served.study.name} \(id=\d+\)"))).to_be_visible()
    expect(page.locator(".main-svg").first).to_be_visible()  # optuna-dashboard's own plots, under our headers
    page.get_by_role("link", name="Arms and curves").click()
    page.wait_for_url(served.address + served.path)
    page.goto(f"{served.address}{served.dashboard_path}/trials?numbers=1")
    page.get_by_role("link", name="Curves of trial 1").click()
    page.wait_for_url(f"{served.address}{served.path}/trials/1")


def test_an_ended_session_asks_for_the_password_again(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    log_in(page, served)
    context.clear_cookies()
    page.wait_for_url(re.compile(r"/tuner/login\?next="))


def test_the_server_is_away_for_a_while(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    log_in(page, served)
    page.route("**/tuner/api/service", lambda route: route.fulfill(status=503, json={"reason": "storage: away"}))
    expect(page.get_by_role("alert")).to_have_text("Not up to date: storage: away. Trying again.")
    expect(page.locator("#studies")).to_contain_text(served.study.name)  # what was known is still there
    page.unroute("**/tuner/api/service")
    expect(page.get_by_role("alert")).to_be_hidden()
    served.problems.clear()  # the browser tells every 503


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_phone_width_nothing_sticks_out(browser: Browser, served: Served, scheme: Any) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(f"{served.address}/tuner/login")
    pages = [_width(page)]
    log_in(page, served)
    for path, ready in (
        ("/tuner/", "#studies table"),
        (served.path, "#curves .main-svg"),
        (f"{served.path}/trials/1", "#gradients .main-svg"),
    ):
        page.goto(served.address + path)
        expect(page.locator(ready).first).to_be_visible()
        pages.append(_width(page))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    context.close()
    assert max(pages) <= PHONE["width"]
    assert background == ("rgb(18, 18, 18)" if scheme == "dark" else "rgb(255, 255, 255)")


def _width(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))
