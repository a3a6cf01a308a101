"""A real Chromium in front of a real server. `make test-browser` installs what these tests need."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lapis.errors import ConflictError
from lapis.home import Home
from lapis.inference.fake import FakeEngine, babble
from lapis.jobs.job import ACTIVE, State
from lapis.jobs.queue import JobQueue
from lapis.server import RunningServer, running_server
from tests.browser.furnished import furnish

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 60_000  # milliseconds; a busy machine is no failure

Visit = Callable[..., "Page"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They take long, and `make test` needs no browser."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, with an empty profile of its own."""
    pytest.importorskip("nicegui", reason="the console extra is not installed")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: make test-browser"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: make test-browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, str]:
    """A home with something on every page, and an administrator's key."""
    home = Home(tmp_path_factory.mktemp("furnished"))
    return home, furnish(home)


@pytest.fixture(scope="module")
def server(furnished: tuple[Home, str]) -> Iterator[RunningServer]:
    """A server over the furnished home; its models are made up, and slow enough to be stopped."""
    engine = lambda _, name: FakeEngine(name, reply=tell, seconds_per_token=0.01)  # noqa: E731
    with running_server(furnished[0], ("tiny", "harbour-1b"), load=engine, console=True) as running:
        yield running
        end_jobs(running)


def tell(prompt: str, seed: int) -> str:
    """A short answer, but a story that takes until somebody stops it."""
    return " ".join([babble(prompt, seed)] * (100 if "long story" in prompt else 1))


def end_jobs(server: RunningServer) -> None:
    """Have what the server started end before it does."""
    queue = JobQueue(server.services.db)
    for job in queue.list(*ACTIVE, State.QUEUED):
        with suppress(ConflictError):
            queue.cancel(job.id, "test")
    give_up = time.monotonic() + 60
    while queue.list(*ACTIVE):
        assert time.monotonic() < give_up
        time.sleep(0.1)


class Watch:
    """What a browser must never do: report an error, or ask another machine for anything."""

    def __init__(self, page: Page) -> None:
        self.wrong: list[str] = []
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("request", lambda request: self._check(request.url))

    def _note(self, kind: str, text: str) -> None:
        if (
            kind == "error" and "401 (Unauthorized)" not in text
        ):  # which a session that ended is answered with
            self.wrong.append(f"console: {text}")

    def _check(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.wrong.append(f"request: {url}")


@pytest.fixture(scope="module")
def sign_in(chromium: Browser, server: RunningServer) -> Callable[[str], Any]:
    """What a browser keeps after signing in with a key; each key signs in once."""

    @cache
    def signed_in(key: str) -> Any:
        context = chromium.new_context(base_url=server.url.removesuffix("/v1"))
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto("/console/")
        page.fill("#key", key)
        page.click("button")
        page.wait_for_selector("main h1")
        state = context.storage_state()
        context.close()
        return state

    return signed_in


@pytest.fixture
def visit(
    chromium: Browser, server: RunningServer, furnished: tuple[Home, str], sign_in: Callable[[str], Any]
) -> Iterator[Visit]:
    """Open a page as who has a key (the administrator's); at the end nothing may have gone wrong."""
    contexts, watches = [], []

    def opened(path: str = "/", *, key: str = furnished[1], viewport: Any = DESKTOP, **more: Any) -> Page:
        base = server.url.removesuffix("/v1")
        state = sign_in(key)
        made = chromium.new_context(viewport=viewport, base_url=base, storage_state=state, **more)
        made.set_default_timeout(PATIENCE)
        contexts.append(made)
        page = made.new_page()
        watches.append(Watch(page))
        page.goto(f"/console{path}")
        page.wait_for_selector("main h1")
        return page

    yield opened
    for made in contexts:
        made.close()
    assert not [wrong for watch in watches for wrong in watch.wrong]


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which `make test-browser` puts beside the packages."""
    path = Path(__file__).parents[2] / ".venv" / "axe.min.js"
    if not path.exists():
        pytest.skip("axe-core is not there: make test-browser")
    return path.read_text()
