"""Requests that make no sense: each answers 4xx in OpenAI's shape and names the field; the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.api.body import BODY_LIMIT
from lapis.home import Home
from lapis.server import RunningServer
from tests.served import fake_server

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("malformed")), context=2048) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def text(**change: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 4, **change}


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **change}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def refused(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """Check the shape of an error and return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    if param is not None:
        assert error["param"] == param
    message: str = error["message"]
    return message


def still_answers(http: httpx.Client) -> None:
    assert http.post("/completions", json=text()).status_code == 200


RAW = {
    "broken JSON": (b'{"model": "tiny", "prompt": ', 400),
    "empty body": (b"", 400),
    "not an object": (b"[1, 2]", 400),
    "NaN": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
    "infinity": (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', 400),
    "number beyond floats": (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400),
    "integer of 5,000 digits": (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
    "lone surrogate": (b'{"model": "tiny", "prompt": "a\\ud800b"}', 400),
    "lone surrogate in a name": (b'{"model": "tiny", "prompt": "x", "\\udc00": 1}', 400),
    "not UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    "a field twice": (b'{"model": "tiny", "prompt": "x", "prompt": "y"}', 400),
    "100,000 brackets": (b"[" * 100_000, 400),
    "750 levels": (b'{"a": ' * 750 + b"1" + b"}" * 750, 400),
    "750 levels and a lone surrogate": (b'{"a": ' * 750 + b'"\\ud800"' + b"}" * 750, 400),
}


PATHS = [
    "/completions",
    "/chat/completions",
    "/responses",
    "/responses/input_tokens",
    "/embeddings",
    "/../tokenize",
]


@pytest.mark.parametrize("name", RAW)
def test_broken_bytes(http: httpx.Client, name: str) -> None:
    body, status = RAW[name]
    for path in PATHS:
        refused(http.post(path, content=body, headers=JSON), status)
    still_answers(http)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_names_the_field(http: httpx.Client, path: str) -> None:
    if path == "/completions":
        good = text()
    elif path == "/chat/completions":
        good = chat()
    else:
        good = {"model": "tiny", "prompt" if path.endswith("tokenize") else "input": "Hello"}
    first = next(name for name in good if name != "model")
    assert http.post(path, json=good).status_code == 200
    refused(http.post(path, json={**good, "model": "nope"}), 404, "model")
    refused(http.post(path, json={**good, "model": None}), 400, "model")
    refused(http.post(path, json={**good, "nonsense": 1}), 400, "nonsense")
    refused(http.post(path, json={name: good[name] for name in good if name != first}), 400, first)
    refused(http.post(path, json={**good, first: 5}), 400, first)
    refused(http.put(path), 405)
    refused(http.post(path, content=json.dumps(good)), 415)
    still_answers(http)


FIELDS = [
    (text(max_tokens=-1), "max_tokens"),
    (text(max_tokens=0), "max_tokens"),
    (text(max_tokens=10**30), "max_tokens"),
    (text(max_tokens=100_000), "max_tokens"),
    (text(max_tokens=True), "max_tokens"),
    (text(max_tokens=1.5), "max_tokens"),
    (text(temperature="hot"), "temperature"),
    (text(temperature=-1), "temperature"),
    (text(temperature=2.1), "temperature"),
    (text(n=100_000), "n"),
    (text(n=0), "n"),
    (text(top_p=5), "top_p"),
    (text(top_p=0), "top_p"),
    (text(top_k=-1), "top_k"),
    (text(min_p=1.1), "min_p"),
    (text(seed="lucky"), "seed"),
    (text(presence_penalty=-3), "presence_penalty"),
    (text(logprobs=1000), "logprobs"),
    (text(logprobs=True), "logprobs"),
    (text(stop=["x"] * 10_000), "stop"),
    (text(stop=[""]), "stop"),
    (text(stop={"a": 1}), "stop"),
    (text(stop="x" * 10_000), "stop"),
    (text(prompt=None), "prompt"),
    (text(prompt=""), "prompt"),
    (text(prompt=[]), "prompt"),
    (text(prompt=[[]]), "prompt"),
    (text(prompt=["a", 1]), "prompt"),
    (text(prompt=["a"] * 129), "prompt"),
    (text(prompt=["a"] * 100, n=2), "n"),
    (text(prompt=[999_999]), "prompt"),
    (text(prompt=[-5]), "prompt"),
    (text(prompt=[10**30]), "prompt"),
    (text(prompt=[1] * 18_001), "prompt"),
    (text(prompt="word " * 18_001), "prompt"),
    (text(logit_bias={"999999": 1}), "logit_bias"),
    (text(logit_bias={"five": 1}), "logit_bias"),
    (text(logit_bias={"5": 101}), "logit_bias"),
    (text(logit_bias=[5]), "logit_bias"),
    (text(nonsense=1), "nonsense"),
    (text(model=""), "model"),
    (text(model=7), "model"),
    (text(stream="yes"), "stream"),
    (text(stream_options={"include_usage": True}), "stream_options"),
    (text(suffix="end"), "suffix"),
    (text(echo=1), "echo"),
    (text(best_of=2, n=3), "best_of"),
    (text(best_of=21), "best_of"),
    (text(prompt=["a"] * 60, n=3), "n"),
    (chat(messages=None), "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages=[{"role": "user"}]), "messages[0]"),
    (chat(messages=[{"role": "user", "content": None}]), "messages[0]"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0]"),
    (chat(messages=[{"role": "user", "content": "x", "tool_call_id": "c"}]), "messages[0]"),
    (chat(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content"),
    (
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        "messages[0].tool_calls[0].id",
    ),
    (chat(messages=[{"role": "user", "content": "x", "mood": "good"}]), "messages[0].mood"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(max_completion_tokens=5), "max_tokens"),
    (chat(max_tokens=None, max_completion_tokens=100_000), "max_completion_tokens"),
    (chat(tools=[{"type": "function"}]), "tools"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(response_format={"type": "xml"}), "response_format"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": 5}}}),
        "response_format",
    ),
    (chat(response_format={"type": "json_schema", "json_schema": {"schema": deep(300)}}), "response_format"),
    (chat(modalities=["text", "audio"]), "modalities"),
    (chat(messages=[{"role": "user", "content": "word " * 18_001}]), "prompt"),
]


@pytest.mark.parametrize(
    ("body", "param"), FIELDS, ids=[f"{n}-{param}" for n, (_, param) in enumerate(FIELDS)]
)
def test_senseless_values_are_refused_by_the_name_of_their_field(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    path = "/chat/completions" if "messages" in body else "/completions"
    refused(http.post(path, json=body), 400, param)
    if param not in ("stream", "stream_options"):
        refused(http.post(path, json={**body, "stream": True}), 400, param)
    still_answers(http)


def test_an_unknown_field_is_answered_with_the_nearest(http: httpx.Client) -> None:
    assert "Did you mean 'temperature'?" in refused(http.post("/completions", json=text(temprature=1)), 400)


def test_a_wrong_value_is_shown_with_what_is_allowed(http: httpx.Client) -> None:
    message = refused(http.post("/completions", json=text(temperature=9)), 400, "temperature")
    assert "temperature = 9" in message
    assert "less than or equal to 2" in message


def test_a_limit_beyond_the_context_names_the_room_that_is_left(http: httpx.Client) -> None:
    message = refused(
        http.post("/completions", json=text(prompt=[5] * 48, max_tokens=2001)), 400, "max_tokens"
    )
    assert "2,048" in message
    assert "2,000" in message


def test_unknown_models_are_404(http: httpx.Client) -> None:
    refused(http.post("/completions", json=text(model="nope")), 404, "model")
    refused(http.post("/chat/completions", json=chat(model="../../etc/passwd")), 404, "model")
    refused(http.get("/models/nope"), 404, "model")


def test_only_json_is_read(http: httpx.Client) -> None:
    body = json.dumps(text())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        refused(http.post("/completions", content=body, headers={"content-type": kind}), 415)
    refused(http.post("/completions", content=body), 415)
    kind = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/completions", content=body, headers=kind).status_code == 200


def test_wrong_methods_and_paths(http: httpx.Client) -> None:
    refused(http.get("/completions"), 405)
    refused(http.delete("/chat/completions"), 405)
    refused(http.get("/nothing/here"), 404)
    refused(http.post("/images/generations", json={}), 501)
    refused(http.get("/vector_stores"), 501)
    still_answers(http)


@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_is_not_read_to_its_end(http: httpx.Client, declared: bool) -> None:
    body = b'{"prompt": "' + b"x" * BODY_LIMIT + b'"}'
    content = body if declared else iter([body[: BODY_LIMIT // 2], body[BODY_LIMIT // 2 :]])
    refused(http.post("/completions", content=content, headers=JSON), 413)
    still_answers(http)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*text(), *chat(), "n", "stop", "logit_bias", "logprobs", "stream", "stream_options", "seed"]
)


@settings(max_examples=150)
@given(change=st.dictionaries(NAMES, VALUES, max_size=3), is_chat=st.booleans())
def test_no_body_makes_the_server_fail(
    http: httpx.Client, server: RunningServer, change: dict[str, Any], is_chat: bool
) -> None:
    body = {**(chat() if is_chat else text()), **change}
    answer = http.post(f"/{'chat/' if is_chat else ''}completions", content=json.dumps(body), headers=JSON)
    assert answer.status_code < 500, (body, answer.text)


def test_afterwards_no_page_is_held_and_every_token_is_settled(
    http: httpx.Client, server: RunningServer
) -> None:
    still_answers(http)
    server.services.meter.flush()
    engine = server.services.router.find("tiny").load()
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0
    assert engine.stats()["pages_used"] == 0
