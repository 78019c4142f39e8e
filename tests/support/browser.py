"""Real Chromium for the tests, and their visits with it."""

import os
import shutil
import time
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.support.programs import missing

#: The path on Debian, Ubuntu and others; CHROMIUM sets another.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    # A container has no user namespace for the browser's sandbox.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
#: Time-out of a page on a busy machine; an idle one needs a tenth of a second. The page's client
#: repeats a lost read after 15 s (`TIMEOUT_MS` in reservation.js): a test includes one repeat.
PATIENCE_MS = 40_000
#: Time-out of reading the text of the page of a failed test.
ACCOUNT_MS = 2_000
#: Requests shown under a failed test.
LINES_SHOWN = 60
PHONE = {"width": 390, "height": 844}

#: The browser's message for each refusal of the service.
EXPECTED = "Failed to load resource"


class Visit:
    """One visitor: a browser with a fresh profile, its requests, and its errors."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.context = context
        self.origin = origin
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._began = time.monotonic()
        self._events: list[str] = []
        context.set_default_timeout(PATIENCE_MS)
        context.on("request", self._on_request)
        context.on("response", lambda response: self._note(f"{response.status}", response.url))
        context.on("requestfinished", lambda request: self._note("finished", request.url))
        context.on("requestfailed", lambda request: self._note(f"{request.failure}", request.url))
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.page: Page = context.new_page()

    def _on_request(self, request: Request) -> None:
        self.requests.append(request.url)
        self._note(request.method, request.url)

    def _note(self, event: str, url: str) -> None:
        self._events.append(f"{time.monotonic() - self._began:7.2f} {event} {url}")

    def account(self) -> str:
        """The last requests with their seconds since the visit began, and the page's text."""
        try:
            text = self.page.locator("body").inner_text(timeout=ACCOUNT_MS)
        except Error as error:
            text = f"not readable: {error.message}"
        return "\n".join([*self._events[-LINES_SHOWN:], *self.complaints, self.page.url, text])

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not message.text.startswith(EXPECTED):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, path: str) -> Page:
        """One of the service's pages, in the visitor's own tab."""
        self.page.goto(f"{self.origin}{path}")
        return self.page

    def asked(self, part: str) -> list[str]:
        """The requests whose address has this part."""
        return [url for url in self.requests if part in url]

    def hosts(self) -> set[str]:
        """Every host that was requested."""
        return {urlsplit(url).netloc for url in self.requests if url.startswith("http")}


def chromium() -> str:
    """The path of a Chromium; without one the test is skipped, and under CI it fails."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *PROGRAMS))), None)
    if found is None:
        missing(f"no Chromium here: none of {', '.join(PROGRAMS)}, and CHROMIUM names none")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a module: while it runs, no other event loop can run in this thread."""
    program = chromium()
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


class Visitors:
    """Makes the visitors of one test, each with a fresh profile."""

    def __init__(self, browser: Browser, origin: str) -> None:
        self.browser = browser
        self.origin = origin
        self.visits: list[Visit] = []

    def __call__(self, **settings: Any) -> Visit:
        wishes = {"viewport": PHONE, "locale": "en-US", **settings}
        self.visits.append(Visit(self.browser.new_context(**wishes), self.origin))
        return self.visits[-1]


@pytest.fixture
def visit(browser: Browser, served: Any) -> Iterator[Visitors]:
    """Makes visitors. None of them may have an error in the end."""
    visitors = Visitors(browser, served.url)
    yield visitors
    for made in visitors.visits:
        made.context.close()
    assert [complaint for made in visitors.visits for complaint in made.complaints] == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the requests and the text of each visitor's page under a test that failed."""
    report = yield
    visitors = item.funcargs.get("visit") if isinstance(item, pytest.Function) else None
    if report.failed and call.when == "call" and isinstance(visitors, Visitors):
        for number, made in enumerate(visitors.visits, start=1):
            report.sections.append((f"visitor {number}", made.account()))
    return report


def serious(page: Page) -> list[str]:
    """Serious accessibility violations that axe finds, in light and in dark."""
    violations: list[dict[str, Any]] = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        violations += Axe().run(page).response["violations"]
    return [
        f"{found['id']}: {node['html']}"
        for found in violations
        if found["impact"] in {"serious", "critical"}
        for node in found["nodes"]
    ]
