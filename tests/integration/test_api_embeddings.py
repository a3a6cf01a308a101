"""Embeddings through the official client: every form of input, both encodings, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.usage import UsageLedger
from tests.served import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("embeddings"))) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    # Not the strict one: that checks the type before it decodes the base64 that it asked for itself.
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as made:
        yield made


def test_both_encodings_are_the_same_vector_of_length_1(client: openai.OpenAI) -> None:
    plain = client.embeddings.create(model="tiny", input="the river")  # the client asks for base64 by itself
    numbers = client.embeddings.create(model="tiny", input="the river", encoding_format="float")
    assert math.isclose(math.hypot(*plain.data[0].embedding), 1, rel_tol=1e-5)
    assert numbers.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0


def test_every_form_of_input_is_read(client: openai.OpenAI) -> None:
    def vectors(given: Any) -> list[list[float]]:
        answer = client.embeddings.create(model="tiny", input=given)
        assert [item.index for item in answer.data] == list(range(len(answer.data)))
        return [item.embedding for item in answer.data]

    one, two = vectors("stones")[0], vectors("lantern")[0]
    assert one != two
    assert vectors(["stones", "lantern"]) == [one, two]
    assert vectors([5, 6]) == vectors([[5, 6]])
    assert len(vectors([[5, 6], [7]])) == 2
    assert client.embeddings.create(model="tiny", input=[5, 6]).usage.prompt_tokens == 2


def test_more_texts_than_the_queue_holds_are_read(client: openai.OpenAI) -> None:
    texts = [f"small stones {number}" * 8 for number in range(700)]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert len(answer.data) == 700
    assert answer.usage.prompt_tokens > 32768
    assert (
        answer.data[3].embedding == client.embeddings.create(model="tiny", input=texts[3]).data[0].embedding
    )


def test_dimensions_are_the_models(client: openai.OpenAI, server: RunningServer) -> None:
    size = len(client.embeddings.create(model="tiny", input="x").data[0].embedding)
    assert len(client.embeddings.create(model="tiny", input="x", dimensions=size).data[0].embedding) == size
    ledger = UsageLedger(server.services.db)
    server.services.meter.flush()
    before = ledger.balance().used
    with pytest.raises(openai.BadRequestError, match=str(size)) as caught:
        client.embeddings.create(model="tiny", input="x", dimensions=size + 1)
    assert caught.value.param == "dimensions"
    server.services.meter.flush()
    assert ledger.balance().used == before  # what is refused is not paid for


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [999_999]}, "prompt"),
        ({"input": [-5]}, "prompt"),
        ({"input": "word " * 18_001}, "prompt"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"stream": True}, "stream"),
        ({"model": "nope"}, "model"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    answer = httpx.post(
        f"{server.url}/embeddings", json={"model": "tiny", "input": "x", "user": "u", **change}
    )
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_usage_is_settled_even_if_the_client_hangs_up(home: Home) -> None:
    with fake_server(home, seconds_per_token=0.2) as server:

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=0.3) as http:
                body = {"model": "tiny", "input": ["small stones " * 50] * 200}
                with pytest.raises(httpx.ReadTimeout):
                    await http.post("/embeddings", json=body)

        asyncio.run(leave())
        engine = server.services.router.find("tiny").load()
        for _ in range(500):
            if engine.stats()["running"] == engine.stats()["waiting"] == 0:
                break
            httpx.get(f"{server.url}/models")
        assert engine.stats()["pages_used"] == 0
        while server.services.router.find("tiny").active:
            httpx.get(f"{server.url}/models")
        server.services.meter.flush()
        balance = UsageLedger(server.services.db).balance()
        assert balance.balanced
        assert balance.open == 0
