"""Overload, hang-ups and keys: a full queue says so, who left holds no page, without a key nobody gets in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from lapis import db
from lapis.db import open_database
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger
from tests.served import fake_server

ACTOR = "test"


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that must come true; time only bounds the failure."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def engine_is_free(server: RunningServer) -> bool:
    stats = server.services.router.find("tiny").load().stats()
    return bool(stats["running"] == stats["waiting"] == stats["pages_used"] == 0)


@pytest.fixture
def slow(home: Home) -> Iterator[RunningServer]:
    """A server whose model takes 20 ms a token, endlessly, with a short queue."""
    endless = "word " * 5000
    with fake_server(
        home, reply=lambda prompt, seed: endless, seconds_per_token=0.02, queued_tokens=24, running=1
    ) as server:
        yield server


def ask(server: RunningServer, **more: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "Go on", "max_tokens": 1000, **more}


def test_a_full_queue_answers_429_with_retry_after(slow: RunningServer) -> None:
    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=60) as client:
            asked = [client.post("/completions", json=ask(slow, max_tokens=3)) for _ in range(20)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(burst())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(refused) < 20
    assert all(answer.status_code in (200, 429) for answer in answers)
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    until(lambda: engine_is_free(slow))
    slow.services.meter.flush()
    balance = UsageLedger(slow.services.db).balance()
    assert balance.open == 0
    assert balance.balanced


def test_the_clients_retries_get_through_a_full_queue(slow: RunningServer) -> None:
    async def burst() -> list[object]:
        async with openai.AsyncOpenAI(base_url=slow.url, api_key="x", max_retries=5) as client:
            asked = [client.completions.create(model="tiny", prompt="Go", max_tokens=2) for _ in range(8)]
            return list(await asyncio.gather(*asked))

    assert len(asyncio.run(burst())) == 8


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting for the whole"])
def test_a_client_that_hangs_up_frees_its_pages(slow: RunningServer, stream: bool) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            for number in range(3):
                if stream:
                    async with client.stream("POST", "/completions", json=ask(slow, stream=True)) as answer:
                        await anext(answer.aiter_lines())
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        await client.post("/completions", json=ask(slow), timeout=0.2 + number / 10)

    asyncio.run(leave())
    until(lambda: engine_is_free(slow))
    slow.services.meter.flush()
    summary = UsageLedger(slow.services.db).summary("model")
    assert summary[0].usage.completion_tokens < 3000
    assert UsageLedger(slow.services.db).balance().open == 0
    assert slow.services.router.find("tiny").active == 0


def test_a_client_that_hangs_up_in_the_queue_frees_its_place(
    slow: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            first = asyncio.create_task(client.post("/completions", json=ask(slow), timeout=1.0))
            await asyncio.sleep(0.3)
            waiting = [
                asyncio.create_task(client.post("/completions", json=ask(slow, stream=stream), timeout=0.3))
                for stream in (True, False)
            ]
            await asyncio.gather(first, *waiting, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: engine_is_free(slow))
    until(lambda: slow.services.counters.active == 0)
    assert not caplog.text  # a client that left is no fault of ours


def test_an_engine_that_ends_in_mid_stream_is_an_error_the_client_raises(slow: RunningServer) -> None:
    with openai.OpenAI(base_url=slow.url, api_key="x", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="Go", max_tokens=1000, stream=True)
        next(stream)
        slow.services.router.find("tiny").load().close()
        with pytest.raises(openai.APIError, match="closed"):
            list(stream)


@pytest.fixture
def key(home: Home) -> str:
    db = open_database(home.database_url)
    text = ApiKeys(db).create("laptop", ACTOR)[1]
    db.dispose()
    return text


def test_once_there_is_a_key_nobody_gets_in_without_one(home: Home, key: str) -> None:
    with fake_server(home) as server:
        other = key[:-1] + ("y" if key.endswith("x") else "x")
        for wrong in (None, "Bearer nonsense", f"Bearer {other}", f"Basic {key}", f"Bearer  {key} {key}"):
            headers = {} if wrong is None else {"authorization": wrong}
            for method, path in (("POST", "/completions"), ("GET", "/models"), ("GET", "/models/tiny")):
                answer = httpx.request(method, server.url + path, headers=headers, json=ask(server))
                assert answer.status_code == 401, (wrong, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert httpx.get(server.url.removesuffix("/v1") + "/metrics").status_code == 401
        assert httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 200
        with openai.OpenAI(base_url=server.url, api_key=key) as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text


def test_a_revoked_key_is_refused_at_once(home: Home, key: str) -> None:
    with (
        fake_server(home) as server,
        openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) as client,
    ):
        assert client.models.list().data
        ApiKeys(server.services.db).revoke(key.split("_")[1], ACTOR)
        with pytest.raises(openai.AuthenticationError, match="revoked") as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_key_may_only_do_what_its_scopes_say(home: Home) -> None:
    with fake_server(home) as server:
        reader = ApiKeys(server.services.db).create("reader", ACTOR, scopes=["models.read"])[1]
        with openai.OpenAI(base_url=server.url, api_key=reader, max_retries=0) as client:
            assert client.models.list().data
            with pytest.raises(openai.PermissionDeniedError, match=r"models\.use"):
                client.completions.create(model="tiny", prompt="x")


def test_a_projects_quota_holds_and_says_when_to_come_back(home: Home) -> None:
    with fake_server(home) as server:
        Tenants(server.services.db).set_quota("default", Quota(tokens_per_minute=30), ACTOR)
        with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client:
            client.completions.create(model="tiny", prompt=[5] * 10, max_tokens=10)
            with pytest.raises(openai.RateLimitError, match="tokens per minute") as caught:
                client.completions.create(model="tiny", prompt=[5] * 10, max_tokens=10)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


@pytest.mark.sqlite
def test_while_another_process_writes_for_too_long_requests_are_told_to_come_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "BUSY_SECONDS", 0.1)
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    with fake_server(home) as server:
        with db.write(server.services.db):
            answer = httpx.post(f"{server.url}/completions", json=ask)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "unavailable"
        assert httpx.post(f"{server.url}/completions", json=ask).status_code == 200


def test_without_keys_only_this_machine_by_its_own_name_is_answered(home: Home) -> None:
    with fake_server(home) as server:
        for host, status in (
            ("localhost", 200),
            ("127.0.0.1:1", 200),
            ("evil.example", 403),
            ("10.0.0.1", 403),
            ("[::1]:1", 200),
            ("[::1", 400),
        ):
            answer = httpx.get(f"{server.url}/models", headers={"host": host})
            assert answer.status_code == status, host


def test_answers_say_what_is_left_of_the_limits(home: Home) -> None:
    with fake_server(home) as server:
        Tenants(server.services.db).set_quota(
            "default", Quota(requests_per_day=10, tokens_per_day=9000), ACTOR
        )
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 4}
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        for number, (path, body) in enumerate(
            [
                ("completions", asked),
                ("completions", {**asked, "stream": True}),
                ("chat/completions", chat),
                ("responses", {"model": "tiny", "input": "x", "max_output_tokens": 4}),
                ("embeddings", {"model": "tiny", "input": "x"}),
                ("moderations", {"input": "x"}),
            ]
        ):
            answer = httpx.post(f"{server.url}/{path}", json=body)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "10"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(9 - number)
            assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 9000
            assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
        left = answer.headers["x-ratelimit-remaining-tokens"]
        refused = httpx.post(f"{server.url}/completions", json={**asked, "max_tokens": 1500, "n": 8})
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-requests"] == "4"  # nothing was taken
        assert refused.headers["x-ratelimit-remaining-tokens"] == left
        Tenants(server.services.db).set_quota("default", Quota(), ACTOR)
        free = httpx.post(f"{server.url}/completions", json=asked)
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]
