"""The Responses API through the official client: typed streams, kept responses, conversations by id."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from lapis.db import write
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tables.tenants import projects
from lapis.tenants.keys import ApiKeys
from tests.served import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    # The answer is the prompt's last words, so that tests see what the model was given.
    with fake_server(
        Home(tmp_path_factory.mktemp("responses")), reply=lambda prompt, seed: f"You said: {prompt}"
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def test_a_text_is_answered_and_counted(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="the river", metadata={"a": "b"}, temperature=0.5)
    assert "the river" in answer.output_text
    assert answer.status == "completed"
    assert (answer.error, answer.incomplete_details, answer.temperature) == (None, None, 0.5)
    assert answer.metadata == {"a": "b"}
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens_details.cached_tokens == 0
    again = client.responses.create(model="tiny", input="the river " * 40)
    cached = client.responses.create(model="tiny", input="the river " * 40)
    assert again.usage is not None
    assert cached.usage is not None
    assert cached.usage.input_tokens_details.cached_tokens > 0


def test_a_limit_makes_it_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="the river", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3


def test_a_stream_has_every_event_in_order_and_the_same_text(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="quiet engines", stream=True, temperature=0))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text
    whole = client.responses.create(model="tiny", input="quiet engines", temperature=0)
    assert whole.output_text == text
    assert client.responses.retrieve(last.response.id) == last.response


def test_the_clients_own_stream_helper_reads_it(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="small stones") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert final.status == "completed"


def test_logprobs_come_when_they_are_included(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny", "input": "x", "max_output_tokens": 4, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    whole = client.responses.create(**ask)
    part = whole.output[0].content[0]  # type: ignore[union-attr]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 4
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
    streamed = [
        token.token
        for event in client.responses.create(**ask, stream=True)
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    assert streamed == [token.token for token in part.logprobs]


def test_a_conversation_goes_on_by_its_last_id(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="lantern", instructions="Be brief.")
    second = client.responses.create(model="tiny", input="bridge", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    for said in ("lantern", "bridge", "You said:"):
        assert said in second.output_text
    assert second.output_text.count("Be brief.") == 1  # only inside what was answered before
    items = client.responses.input_items.list(second.id)
    assert [item.type for item in items.data] == ["message"]
    by_hand = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "lantern"},
            *first.output,  # type: ignore[list-item]
            {"role": "user", "content": [{"type": "input_text", "text": "bridge"}]},
        ],
    )
    assert by_hand.output_text == second.output_text


def test_a_response_is_retrieved_listed_and_deleted(client: openai.OpenAI) -> None:
    texts = [f"item {number}" for number in range(5)]
    made = client.responses.create(
        model="tiny", input=[{"role": "user", "content": text} for text in texts], max_output_tokens=2
    )
    assert client.responses.retrieve(made.id) == made
    pages = client.responses.input_items.list(made.id, limit=2, order="asc")
    assert [item.content[0].text for item in pages] == texts  # type: ignore[union-attr]
    assert pages.data[0].id == client.responses.input_items.list(made.id).data[-1].id
    client.responses.delete(made.id)
    for act in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="There is no response"):
            act(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="tiny", input="x", previous_response_id=made.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_what_must_not_be_kept_is_not(client: openai.OpenAI) -> None:
    for stream in (False, True):
        made = client.responses.create(model="tiny", input="x", store=False, stream=stream)
        id = list(made)[-1].response.id if stream else made.id  # type: ignore[union-attr]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(id)


def test_a_kept_response_cannot_be_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="x", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)


def test_input_tokens_are_those_that_are_counted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="the road", instructions="Be brief.")
    told = client.responses.input_tokens.count(model="tiny", input="the road", instructions="Be brief.")
    assert made.usage is not None
    assert told.input_tokens == made.usage.input_tokens


def test_another_project_sees_nothing(home: Home) -> None:
    with fake_server(home) as server:
        db = server.services.db
        with write(db) as connection:
            row = {"id": "p2", "organization_id": "default", "name": "p2", "created_at": 0.0}
            connection.execute(projects.insert().values(**row))
        mine, theirs = (
            ApiKeys(db).create(project, "test", project=project)[1] for project in ("default", "p2")
        )
        with (
            openai.OpenAI(base_url=server.url, api_key=mine) as me,
            openai.OpenAI(base_url=server.url, api_key=theirs, max_retries=0) as they,
        ):
            made = me.responses.create(model="tiny", input="secret")
            assert me.responses.retrieve(made.id).id == made.id
            for act in (they.responses.retrieve, they.responses.delete, they.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    act(made.id)
            with pytest.raises(openai.NotFoundError):
                they.responses.create(model="tiny", input="x", previous_response_id=made.id)


def test_an_engine_that_ends_in_mid_stream_makes_the_response_fail(home: Home) -> None:
    endless = "word " * 500
    with (
        fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.02) as server,
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        stream = client.responses.create(model="tiny", input="x", stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        server.services.router.find("tiny").load().close()
        last = list(stream)[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert "closed" in last.response.error.message


REFUSED = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0].mood"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"stop": ["x"]}, "stop"),
    ({"model": "nope"}, "model"),
    ({"previous_response_id": "resp_nope"}, "previous_response_id"),
    ({"input": "word " * 18_001}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[f"{n}-{p}" for n, (_, p) in enumerate(REFUSED)])
def test_what_makes_no_sense_is_refused_by_name(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "input": "Hello", "stream": stream, **change}
        answer = httpx.post(f"{server.url}/responses", content=json.dumps(body),
                            headers={"content-type": "application/json"})  # fmt: skip
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("query", ["stream=true", "include[]=x", "starting_after=3"])
def test_of_a_kept_response_nothing_else_can_be_had(client: openai.OpenAI, query: str) -> None:
    made = client.responses.create(model="tiny", input="x", max_output_tokens=2)
    answer = httpx.get(f"{client.base_url}responses/{made.id}?{query}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == query.partition("=")[0].removesuffix("[]")
