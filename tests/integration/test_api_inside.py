"""What the server asks itself: the same handlers in a known caller's name, behind live traffic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from lapis.db import write
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tables.tenants import projects
from lapis.tenants.keys import LOCAL, ApiKeys
from tests.integration.test_api_limits import engine_is_free, until
from tests.served import fake_server

OTHER = replace(LOCAL, project_id="proj_2", background=True)


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    endless = "word " * 3000
    with fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.005, running=1) as running:
        with write(running.services.db) as connection:
            row = {"id": "proj_2", "organization_id": "default", "name": "second", "created_at": 0.0}
            connection.execute(projects.insert().values(**row))
        yield running


def body(**more: object) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 3, **more}).encode()


def test_an_answer_is_billed_to_the_caller_and_needs_no_key(server: RunningServer) -> None:
    services = server.services
    services.admission.keys_required = True
    ApiKeys(services.db).create("k", "test")
    assert httpx.post(f"{server.url}/completions", json={"model": "tiny", "prompt": "x"}).status_code == 401
    answer = asyncio.run(services.post(OTHER, "/v1/completions", body()))
    assert answer.status == 200
    assert answer.headers["x-request-id"].startswith("req_")
    used = answer.json()["usage"]["total_tokens"]
    services.meter.flush()
    meter = services.meter._ledger
    assert meter.balance("proj_2").used == used
    assert meter.balance("default").used == 0
    wrong = asyncio.run(services.post(OTHER, "/v1/completions", b"{"))
    assert (wrong.status, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    lesser = replace(OTHER, scopes=frozenset())
    assert asyncio.run(services.post(lesser, "/v1/completions", body())).status == 403


def test_live_traffic_goes_before_it_and_cancelling_frees_the_engine(server: RunningServer) -> None:
    async def race() -> None:
        post = server.services.post
        slow = asyncio.create_task(post(OTHER, "/v1/completions", body(max_tokens=1500)))
        engine = server.services.router.find("tiny").load()
        while not engine.stats()["running"]:
            await asyncio.sleep(0.01)
        live = await post(replace(OTHER, background=False), "/v1/completions", body())
        assert live.status == 200
        assert not slow.done()  # it had the only place, and gave it up
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)

    asyncio.run(race())
    until(lambda: engine_is_free(server))
