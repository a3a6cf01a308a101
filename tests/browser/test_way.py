"""The whole way through the console: sign in, a key, a file, a fine-tuning, a chat with its model, the usage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lapis.db import open_database
from lapis.home import Home
from lapis.server import RunningServer, running_server
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Role
from tests.browser.conftest import DESKTOP, PATIENCE, Watch
from tests.tuned import CHATS, client_of, tiny_home

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TRAINED_WITHIN = 240_000  # milliseconds


@pytest.fixture
def owner(home: Home) -> str:
    db = open_database(tiny_home(home).database_url)
    try:
        return ApiKeys(db).create("owner", "test", scopes=Role.OWNER.scopes)[1]
    finally:
        db.dispose()


@pytest.fixture
def tuning_server(home: Home, owner: str) -> Iterator[RunningServer]:
    with running_server(home, console=True) as running:
        yield running


def test_from_signing_in_to_the_answer_of_a_model_of_ones_own(
    chromium: Browser, tuning_server: RunningServer, owner: str, tmp_path: Path
) -> None:
    context = chromium.new_context(viewport=DESKTOP, base_url=tuning_server.url.removesuffix("/v1"))
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    watch = Watch(page)
    page.goto("/console/")
    page.get_by_label("API key").fill(owner)
    page.get_by_role("button", name="Sign in").click()

    page.get_by_role("link", name="Keys and members").click()
    page.get_by_role("button", name="Create a key").click()
    page.get_by_label("Name").fill("my program")
    page.get_by_role("button", name="Create", exact=True).click()
    key = page.locator(".secret").inner_text()
    page.get_by_role("button", name="I have it").click()

    local = tmp_path / "chats.jsonl"
    local.write_text("".join(json.dumps(line) + "\n" for line in CHATS))
    page.get_by_role("link", name="Files").click()
    page.get_by_label("File", exact=True).set_input_files(local)
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("button", name=re.compile("Fine-tune file-")).click()

    page.get_by_label("Epochs").fill("5")
    page.get_by_label("Batch size").fill("2")
    page.get_by_label("Learning rate multiplier").fill("20")
    page.get_by_label("Suffix").fill("fox")
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector("text=Created fine-tuning job: ftjob-")
    page.get_by_role("link", name="Chat with it").wait_for(timeout=TRAINED_WITHIN)
    page.get_by_role("img", name=re.compile(r"Loss\. Last values: training: 0\.")).wait_for()

    page.get_by_role("link", name="Chat with it").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Your message").fill("who?")
    page.get_by_role("button", name="Send").click()
    answer = page.get_by_role("group", name=re.compile("Answer of ft:tiny-base:default:fox:"))
    answer.filter(has_text="the fox").wait_for()
    model = page.get_by_label("Model", exact=True).input_value()
    with client_of(tuning_server, key) as client:
        assert model in {known.id for known in client.models.list()}

    page.goto("/console/usage")
    page.locator("section[aria-label='By model'] tr", has_text=model).wait_for()
    page.locator("section[aria-label='By key'] tr", has_text="owner").wait_for()
    page.goto("/console/audit")
    page.locator("tr", has_text="fine_tuning.create").wait_for()
    context.close()
    assert watch.wrong == []
