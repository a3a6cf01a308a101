"""The console over HTTP: what its pages show, whom it lets in, and that the API does not depend on it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websockets

from lapis.console import mount
from lapis.console.door import csrf_token
from lapis.console.session import COOKIE
from lapis.db import open_database
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.jobs.job import JobSpec
from lapis.jobs.queue import JobQueue
from lapis.server import RunningServer, running_server
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import DEFAULT, Role, Tenants
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
    yield home, ApiKeys(db).create("me", "test", scopes=Role.OWNER.scopes)[1]
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
    for path in (
        "/console",
        "/console/training",
        "/console/training/runs/x",
        "/console/_nicegui_ws/socket.io/",
    ):
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
    assert run.id in browser.get("/console/training").text
    page = browser.get(f"/console/training/runs/{run.id}").text
    assert "[3,2.0]" in page.replace(" ", "")
    assert "seed = 7" in page
    assert "There is no run" in browser.get("/console/training/runs/nothing").text


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


def test_a_member_sees_nothing_of_other_projects(browser: httpx.Client, server: RunningServer) -> None:
    keys, store = ApiKeys(server.services.db), server.services.files
    Tenants(server.services.db).create_project("other", "test")
    member = keys.create("member", "test", project="other")
    sign_in(browser, member[1])
    mine = store.put(member[0].project_id, "mine.txt", "user_data", b"mine")
    foreign = store.put(DEFAULT, "unseen.txt", "user_data", b"foreign")
    job = JobQueue(server.services.db).submit(JobSpec("unseen", ("true",)), "test")
    run = Run.list(server.services.home)[0]
    assert browser.get(f"/console/files/{mine.id}/content").text == "mine"
    unknown = browser.get(f"/console/files/{mine.id}x/content")
    refused = browser.get(f"/console/files/{foreign.id}/content")
    assert refused.status_code == unknown.status_code == 404
    assert refused.text.replace(foreign.id, "") == unknown.text.replace(f"{mine.id}x", "")
    for path in (
        "/",
        "/training",
        f"/training/runs/{run.id}",
        "/jobs",
        f"/jobs/{job.id}",
        "/files",
        "/members",
    ):
        page = browser.get(f"/console{path}").text
        assert "unseen" not in page and "seed = 7" not in page
        assert not any(other.id in page for other in keys.list(DEFAULT))
    for path in ("/audit", "/models/poet:1"):
        assert "it lacks the scope" in browser.get(f"/console{path}").text


def test_an_upload_needs_the_session_s_token(
    browser: httpx.Client, server: RunningServer, key: tuple[Home, str]
) -> None:
    sign_in(browser, key[1])
    form: Any = {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", b"text")}}
    assert browser.post("/console/files/upload", **form).status_code == 403
    assert (
        browser.post("/console/files/upload", **form, headers={"x-csrf-token": "guessed"}).status_code == 403
    )
    token = {"x-csrf-token": csrf_token(browser.cookies[COOKIE])}
    sent = browser.post("/console/files/upload", **form, headers=token)
    assert server.services.files.get(DEFAULT, sent.json()["id"]).filename == "a.txt"
    wrong = browser.post("/console/files/upload", **{**form, "data": {"purpose": "fun"}}, headers=token)
    assert wrong.status_code == 400
    assert "purpose must be one of" in wrong.json()["message"]


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
        assert httpx.get(url, headers={"host": "evil.example"}, timeout=60).status_code == 403


def test_without_its_packages_the_api_goes_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.setattr(mount, "has_console", lambda: False)
    model_folder(home.models / "tiny")
    with running_server(home, console=True) as server:
        assert httpx.get(f"{server.url}/models", timeout=60).status_code == 200
        answer = httpx.get(server.url.removesuffix("/v1") + "/console", timeout=60)
        assert answer.status_code == 404
