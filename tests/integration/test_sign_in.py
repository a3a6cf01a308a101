"""The console's door over HTTP and websockets: tokens, origins, throttle, headers, sign-out, secrets in logs."""

from __future__ import annotations

import asyncio
import logging
import sys
import types
from collections.abc import Iterator

import httpx
import pytest
import websockets
from fastapi import FastAPI, WebSocket

from lapis.console.door import ATTEMPTS
from lapis.console.session import COOKIE
from lapis.db import open_database
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import RunningServer, running_server
from lapis.tenants.keys import ApiKeys
from tests.browsers import browser_at, form_token, sign_in
from tests.served import model_folder

pytest.importorskip("nicegui", reason="the console extra is not installed")
SOCKET = "/console/_nicegui_ws/socket.io/"


@pytest.fixture(scope="module", autouse=True)
def _plain_pages() -> Iterator[None]:
    """Pages of one line, which say back what their websocket hears: NiceGUI's can be built once in a process."""
    pages = types.ModuleType("lapis.console.pages")
    pages.create_pages = lambda services: _pages()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lapis.console.pages", pages)
        yield


def _pages() -> FastAPI:
    app = FastAPI()

    @app.get("/")
    def first() -> str:
        return "pages"

    @app.websocket("/_nicegui_ws/socket.io/")
    async def say_back(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("open")
        async for text in socket.iter_text():
            await socket.send_text(text)

    return app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, str]]:
    home = Home(tmp_path_factory.mktemp("door"))
    model_folder(home.models / "tiny")
    db = open_database(home.database_url)
    yield home, ApiKeys(db).create("me", "test")[1]
    db.dispose()


@pytest.fixture(scope="module")
def server(place: tuple[Home, str]) -> Iterator[RunningServer]:
    with running_server(place[0], console=True, load=lambda _, name: FakeEngine(name)) as running:
        yield running


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    with browser_at(server.url) as made:
        yield made


def test_every_answer_has_the_security_headers(browser: httpx.Client, place: tuple[Home, str]) -> None:
    asked = browser.get("/console")
    assert "default-src 'none'" in asked.headers["content-security-policy"]
    shown = sign_in(browser, place[1])
    assert shown.status_code == 200
    assert "default-src 'self'" in shown.headers["content-security-policy"]
    for answer in (asked, shown, browser.get("/console/nothing/here")):
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert answer.headers.get_list("referrer-policy") == ["same-origin"]
        assert "strict-transport-security" not in answer.headers


def test_behind_https_cookies_are_secure_and_transport_security_is_asked_for(
    browser: httpx.Client, place: tuple[Home, str]
) -> None:
    browser.headers["x-forwarded-proto"] = "https"  # from a proxy on this machine
    answer = browser.get("/console/", follow_redirects=False)
    assert "max-age" in answer.headers["strict-transport-security"]
    assert "Secure" in answer.headers["set-cookie"]


def test_a_sign_in_form_is_taken_only_from_our_own_page(
    browser: httpx.Client, place: tuple[Home, str]
) -> None:
    assert browser.post("/console/sign-in", data={"key": place[1]}).status_code == 403
    csrf = form_token(browser)
    fields = {"csrf": csrf, "key": place[1]}
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "same-site"}):
        assert browser.post("/console/sign-in", data=fields, headers=headers).status_code == 403
    assert COOKIE not in browser.cookies
    assert browser.post("/console/sign-in", data=fields).status_code == 200
    assert COOKIE in browser.cookies


def test_what_changes_something_needs_the_session_s_token(
    browser: httpx.Client, server: RunningServer, place: tuple[Home, str]
) -> None:
    sign_in(browser, place[1])
    assert browser.post("/console/sign-out", data={"csrf": "guessed"}).status_code == 403
    assert browser.post("/console/runs", headers={"x-csrf-token": "guessed"}).status_code == 403
    assert browser.get("/console/").status_code == 200
    from lapis.console.door import csrf_token

    token = csrf_token(browser.cookies[COOKIE])
    assert browser.post("/console/", headers={"x-csrf-token": token}).status_code == 405
    old = browser.cookies[COOKIE]
    assert browser.post("/console/sign-out", data={"csrf": token}).status_code == 401
    assert COOKIE not in browser.cookies
    assert browser.get("/console/", headers={"cookie": f"{COOKIE}={old}"}).status_code == 401


def test_a_new_sign_in_ends_the_browser_s_old_session(browser: httpx.Client, place: tuple[Home, str]) -> None:
    sign_in(browser, place[1])
    old = browser.cookies[COOKIE]
    sign_in(browser, place[1])
    assert browser.cookies[COOKIE] != old
    assert browser.get("/console/", headers={"cookie": f"{COOKIE}={old}"}).status_code == 401


def test_a_session_outlives_a_restart(place: tuple[Home, str]) -> None:
    cookies = httpx.Cookies()
    for _ in range(2):
        with (
            running_server(place[0], console=True, load=lambda _, name: FakeEngine(name)) as server,
            browser_at(server.url) as browser,
        ):
            if not cookies:
                sign_in(browser, place[1])
                cookies = browser.cookies
            answer = browser.get("/console/", headers={"cookie": f"{COOKIE}={cookies[COOKIE]}"})
            assert answer.status_code == 200


def test_failed_sign_ins_are_slowed_down(place: tuple[Home, str]) -> None:
    with (
        running_server(place[0], console=True, load=lambda _, name: FakeEngine(name)) as server,
        browser_at(server.url) as browser,
    ):
        for _ in range(ATTEMPTS):
            assert sign_in(browser, "lapis_x_y").status_code == 401
        answer = sign_in(browser, place[1])
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 60


def test_websockets_are_opened_only_by_our_own_pages(
    browser: httpx.Client, server: RunningServer, place: tuple[Home, str]
) -> None:
    sign_in(browser, place[1])
    base = str(browser.base_url).rstrip("/")
    signed = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}"}
    own = {"Origin": base}
    evil = {"Origin": "https://evil.example"}

    async def opens(headers: dict[str, str]) -> bool:
        try:
            async with websockets.connect(f"ws{base[4:]}{SOCKET}", additional_headers=headers) as socket:
                return await socket.recv() == "open"
        except websockets.InvalidStatus as error:
            assert error.response.status_code == 403
            return False

    for headers, expected in (
        ({**signed, **own}, True),
        ({**signed, **evil}, False),
        (signed, False),
        (own, False),
    ):
        assert asyncio.run(opens(headers)) is expected


def test_a_revoked_key_closes_the_websocket_before_the_next_act(
    browser: httpx.Client, server: RunningServer
) -> None:
    keys = ApiKeys(server.services.db)
    made, text = keys.create("short", "test")
    sign_in(browser, text)
    base = str(browser.base_url).rstrip("/")
    headers = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}", "Origin": base}
    click = '42["event",{"client_id":"x","id":1,"listener_id":"y","args":[]}]'

    async def act() -> int | None:
        async with websockets.connect(f"ws{base[4:]}{SOCKET}", additional_headers=headers) as socket:
            await socket.recv()
            await socket.send(click)
            assert await socket.recv() == click
            await asyncio.to_thread(keys.revoke, made.prefix, "test")
            await socket.send(click)
            with pytest.raises(websockets.ConnectionClosed):
                await socket.recv()
            return socket.close_code

    assert asyncio.run(act()) == 1008


def test_no_secret_is_logged_at_debug_level(
    browser: httpx.Client,
    server: RunningServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        _, text = ApiKeys(server.services.db).create("logged", "test")
        assert sign_in(browser, text).status_code == 200
        headers = {"authorization": f"Bearer {text}"}
        assert httpx.get(f"{server.url}/models", headers=headers).status_code == 200
        assert (
            httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {text}x"}).status_code == 401
        )
    said = capfd.readouterr()
    log = caplog.text + said.out + said.err
    # The browser here logs its own headers; what the server logs is not the client's doing.
    log = "\n".join(line for line in log.splitlines() if "httpcore" not in line and "httpx" not in line)
    secrets = (text, text.split("_")[2], browser.cookies[COOKIE])
    assert not [secret for secret in secrets if secret in log]
