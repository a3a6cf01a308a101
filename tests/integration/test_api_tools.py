"""Tool calls and bound forms through the official client, whole and streamed, in chats and responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from lapis.home import Home
from lapis.server import RunningServer
from tests.served import fake_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
FLAT = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string"}, "warm": {"type": "boolean"}},
    "required": ["town", "warm"],
    "additionalProperties": False,
}


def call(town: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"town": "{town}"}}}}\n</tool_call>'


def reply(prompt: str, seed: int) -> str:
    """A model that calls a function when the last message asks for the weather of towns."""
    last = prompt.rsplit("user\n", 1)[-1]  # the decoded prompt has no marks of turns
    if "tool_response" in last:
        return "It is " + (re.findall(r"<tool_response>\n(.*?)\n", last) or ["unknown"])[-1] + "."
    towns = re.findall(r"weather of (\w+)", last)
    if towns and "<tools>" in prompt:
        return "Let me look. " + "\n".join(call(town) for town in towns)
    if "json" in last:
        return '{"town": "Ulm", "warm": true}'
    return "Plain words."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("tools")), reply=reply) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def test_a_call_comes_out_and_its_result_goes_in(client: openai.OpenAI) -> None:
    asked = chat("What is the weather of Ulm?", tools=[WEATHER])
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    made = choice.message.tool_calls[0]
    assert made.type == "function"
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"town": "Ulm"})
    history = [
        *asked["messages"], choice.message, {"role": "tool", "tool_call_id": made.id, "content": "sunny"}
    ]  # fmt: skip
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])  # type: ignore[arg-type,list-item]
    assert answer.choices[0].message.content == "It is sunny."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None


def test_streamed_calls_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    asked = chat("The weather of Ulm and the weather of Bonn", tools=[WEATHER])
    text, calls, ends = "", [], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        ends.append(chunk.choices[0].finish_reason)
    assert text == "Let me look."
    assert [(made.index, json.loads(made.function.arguments)["town"]) for made in calls] == [
        (0, "Ulm"),
        (1, "Bonn"),
    ]
    assert len({made.id for made in calls}) == 2
    assert ends[-1] == "tool_calls"
    assert set(ends[:-1]) == {None}
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert len(final.message.tool_calls or []) == 2


def test_whether_calls_come_is_the_callers_choice(client: openai.OpenAI) -> None:
    asked = chat("The weather of Ulm and the weather of Bonn", tools=[WEATHER])

    def towns(**more: Any) -> list[str]:
        message = client.chat.completions.create(**asked, **more).choices[0].message
        return [json.loads(made.function.arguments)["town"] for made in message.tool_calls or []]

    assert towns(tool_choice="auto") == ["Ulm", "Bonn"]
    assert towns(tool_choice="none") == []
    assert len(towns(parallel_tool_calls=False)) <= 1
    assert len(towns(tool_choice="required")) >= 1
    named = {"type": "function", "function": {"name": "weather"}}
    assert len(towns(tool_choice=named)) == 1


def test_an_answer_keeps_to_its_schema(client: openai.OpenAI) -> None:
    described = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}}
    for text in ("json please", "anything else"):
        answer = (
            client.chat.completions.create(**chat(text, response_format=described)).choices[0].message.content
        )
        assert set(json.loads(answer or "")) == {"town", "warm"}
    free = client.chat.completions.create(**chat("x", response_format={"type": "json_object"}))
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)
    plain = client.chat.completions.create(**chat("x", response_format={"type": "text"}))
    assert plain.choices[0].message.content == "Plain words."


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[0-9]{3}-[0-9]{2}"}, r"\d{3}-\d{2}"),
        ({"choice": ["river", "road"]}, r"river|road"),
        ({"grammar": 'start: "a" "b"+'}, r"ab+"),
        ({"json": SCHEMA}, r"\{.*\}"),
    ],
)
def test_other_forms_are_bound_too(client: openai.OpenAI, structure: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": structure}
    said = client.chat.completions.create(**chat("x"), extra_body=extra).choices[0].message.content
    text = (
        client.completions.create(model="tiny", prompt="x", max_tokens=64, extra_body=extra).choices[0].text
    )
    for answer in (said or "", text):
        assert re.fullmatch(pattern, answer, re.DOTALL)


class Town(BaseModel):
    town: str
    warm: bool


def test_the_clients_parsers_give_typed_answers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**chat("json please"), response_format=Town)
    assert parsed.choices[0].message.parsed == Town(town="Ulm", warm=True)
    response = client.responses.parse(model="tiny", input="json please", text_format=Town)
    assert response.output_parsed == Town(town="Ulm", warm=True)
    with client.responses.stream(model="tiny", input="json please", text_format=Town) as stream:
        assert stream.get_final_response().output_parsed == Town(town="Ulm", warm=True)
    kept = client.responses.retrieve(response.id)
    assert kept.text is not None
    assert kept.text.format is not None
    assert kept.text.format.type == "json_schema"


def test_a_response_calls_and_goes_on_by_its_id(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="What is the weather of Ulm?", tools=[FLAT])  # type: ignore[list-item]
    assert [item.type for item in first.output] == ["message", "function_call"]
    made = first.output[1]
    assert made.type == "function_call"
    assert (made.name, json.loads(made.arguments)) == ("weather", {"town": "Ulm"})
    second = client.responses.create(
        model="tiny", previous_response_id=first.id, tools=[FLAT],  # type: ignore[list-item]
        input=[{"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}],
    )  # fmt: skip
    assert second.output_text == "It is sunny."


def test_a_responses_calls_are_streamed_with_their_events(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model="tiny", input="The weather of Ulm", tools=[FLAT], stream=True)  # type: ignore[list-item]
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    with client.responses.stream(model="tiny", input="The weather of Ulm", tools=[FLAT]) as stream:  # type: ignore[list-item]
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value, **more}}


REFUSED = [
    ({"response_format": schema({"type": 5})}, "response_format"),
    ({"response_format": schema(deep(300))}, "response_format"),
    ({"response_format": schema(5)}, "response_format"),
    ({"response_format": schema({"$ref": "#/nowhere"})}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "no rule"}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(300)}}]}, "tools"),
    ({"tools": "weather"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[f"{n}-{p}" for n, (_, p) in enumerate(REFUSED)])
def test_what_makes_no_sense_is_refused_by_name_and_harms_nobody(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/chat/completions", json=chat("x", stream=stream, **change))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
    assert httpx.post(f"{server.url}/chat/completions", json=chat("x")).status_code == 200
    engine = server.services.router.find("tiny").load()
    assert engine.stats()["running"] == 0
