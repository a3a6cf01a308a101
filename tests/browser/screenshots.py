"""Takes the pictures of docs/console.md anew: python -m tests.browser.screenshots [PAGE …]."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from lapis.db import open_database
from lapis.gateway.eval_runs import EvalRuns
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import running_server
from lapis.tenants.tenant import DEFAULT
from lapis.train.run import Run
from tests.browser.conftest import CHROMIUM, DESKTOP, FLAGS, PATIENCE, PHONE, end_jobs
from tests.browser.furnished import furnish

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = Path(__file__).parents[2] / "docs" / "images" / "console"
MODES = {"light": DESKTOP, "dark": DESKTOP, "phone": PHONE}
QUALITY = 60


def main() -> None:
    """Draw every page in light and dark, and as a phone has it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    home = Home(Path(tempfile.mkdtemp()))
    key = furnish(home)
    places = {
        "overview": "/",
        "playground": "/playground?model=tiny",
        "training": "/training",
        "run": f"/training/runs/{Run.list(home)[1].id}",
        "data": "/data",
        "models": "/models",
        "release": "/models/poet:1",
        "files": "/files",
        "batches": "/batches",
        "evals": "/evals",
        "eval-run": finished_run(home),
        "jobs": "/jobs",
        "usage": "/usage",
        "members": "/members",
        "audit": "/audit",
    }
    asked = sys.argv[1:] or list(places)
    make = lambda _, name: FakeEngine(name, seconds_per_token=0.01)  # noqa: E731
    with (
        running_server(home, ("tiny", "harbour-1b"), load=make, console=True) as server,
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for mode, viewport in MODES.items():
            scheme = "dark" if mode == "dark" else "light"
            base = server.url.removesuffix("/v1")
            context = browser.new_context(viewport=viewport, base_url=base, color_scheme=scheme)  # type: ignore[arg-type]
            context.set_default_timeout(PATIENCE)
            page = context.new_page()
            page.goto("/console/")
            page.fill("#key", key)
            page.click("button")
            page.wait_for_selector("main h1")
            for name in asked:
                page.goto(f"/console{places[name]}")
                prepare(page, name)
                take(page, FOLDER / f"{name}-{mode}.webp")
            context.close()
        browser.close()
        end_jobs(server)


def finished_run(home: Home) -> str:
    """The page of the eval run that has ended."""
    db = open_database(home.database_url)
    (run, _), *_ = reversed(EvalRuns(db).recent(DEFAULT, 10))
    db.dispose()
    return f"/evals/{run.eval_id}/runs/{run.id}"


def prepare(page: Page, name: str) -> None:
    """Wait until a page shows something worth a picture."""
    page.wait_for_selector("main h1")
    if name == "playground":
        page.get_by_label("Your message").fill("What did the river see this morning?")
        page.get_by_role("button", name="Send").click()
        page.wait_for_selector("text=/\\d+ tokens, /")
        for _ in range(3):
            page.locator(".tokens").press("ArrowRight")
    page.wait_for_timeout(1500)  # charts and figures


def take(page: Page, path: Path) -> None:
    """Write what is seen as WebP."""
    session = page.context.new_cdp_session(page)
    taken = session.send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
    path.write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main()
