"""The console over HTTP: what its pages show, whom it lets in, and that the API does not depend on it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import httpx
import pytest
import websockets

from lapis.console import mount
from lapis.console.session import COOKIE
from lapis.db import open_database
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import RunningServer, running_server
from lapis.tenants.keys import ApiKeys
from lapis.train.run import Run
from tests.browsers import browser_at, sign_in
from tests.served import model_folder

pytest.importorskip("nicegui", reason="the console extra is not installed")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, str]]:
    home = Home(tmp_path_factory.mktemp("console"))
    model_folder(home.models / "tiny")
    run = Run.create(home, "poems", "seed = 7\n", "abcdef")
    for step in range(1, 4):
        run.events.write(
            "step", step=step, loss=5.0 - step, lr=0.1, tokens=step, tokens_per_s=9.0, seconds=1.0
        )
    db = open_database(home.database_url)
    yield home, ApiKeys(db).create("me", "test")[1]
    db.dispose()


@pytest.fixture(scope="module")
def server(key: tuple[Home, str]) -> Iterator[RunningServer]:
    with running_server(key[0], console=True, load=lambda _, name: FakeEngine(name)) as running:
        yield running


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    with browser_at(server.url) as made:
        yield made


def test_without_a_session_it_asks_for_a_key(browser: httpx.Client) -> None:
    for path in ("/console", "/console/runs", "/console/runs/x", "/console/_nicegui_ws/socket.io/"):
        answer = browser.get(path)
        assert answer.status_code == 401
        assert "API key" in answer.text
        assert "poems" not in answer.text
    wrong = sign_in(browser, "lapis_x_<b>")
    assert wrong.status_code == 401
    assert "not valid" in wrong.text
    assert browser.post("/console/sign-in", content=b"x" * 10_000).status_code == 413


def test_a_key_opens_the_pages(browser: httpx.Client, key: tuple[Home, str]) -> None:
    opened = sign_in(browser, key[1])
    assert opened.status_code == 200
    cookie = opened.history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert key[1] not in cookie
    assert "loads at first use" in opened.text
    assert "Apache-2.0" in opened.text
    run = Run.list(key[0])[0]
    assert run.id in browser.get("/console/runs").text
    page = browser.get(f"/console/runs/{run.id}").text
    assert "[3,2.0]" in page.replace(" ", "")
    assert "seed = 7" in page
    assert "There is no run" in browser.get("/console/runs/nothing").text


def test_the_pages_socket_opens_for_a_session_of_this_site(
    browser: httpx.Client, key: tuple[Home, str]
) -> None:
    sign_in(browser, key[1])
    base = str(browser.base_url).rstrip("/")
    headers = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}", "Origin": base}
    path = "/console/_nicegui_ws/socket.io/?EIO=4&transport=websocket"

    async def first() -> str:
        async with websockets.connect(f"ws{base[4:]}{path}", additional_headers=headers) as socket:
            return str(await socket.recv())

    assert asyncio.run(first()).startswith("0{")


def test_a_revoked_key_closes_them_again(browser: httpx.Client, server: RunningServer) -> None:
    keys = ApiKeys(server.services.db)
    text = keys.create("other", "test")[1]
    assert sign_in(browser, text).status_code == 200
    keys.revoke(text.split("_")[1], "test")
    assert browser.get("/console/").status_code == 401


def test_other_sites_are_refused(browser: httpx.Client, key: tuple[Home, str]) -> None:
    sign_in(browser, key[1])
    assert browser.get("/console/", headers={"origin": "https://evil.example"}).status_code == 403


def test_without_keys_only_this_machine_looks(home: Home) -> None:
    model_folder(home.models / "tiny")
    with running_server(home, console=True) as server:
        url = server.url.removesuffix("/v1") + "/console/"
        assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403


def test_without_its_packages_the_api_goes_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.setattr(mount, "has_console", lambda: False)
    model_folder(home.models / "tiny")
    with running_server(home, console=True) as server:
        assert httpx.get(f"{server.url}/models").status_code == 200
        answer = httpx.get(server.url.removesuffix("/v1") + "/console")
        assert answer.status_code == 404
