"""The official client against a real server over HTTP: what it sends works, what it gets is typed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.usage import UsageLedger
from tests.served import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = Home(tmp_path_factory.mktemp("api"))
    with fake_server(home, "tiny", "other") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def hello(**more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **more}


def test_a_chat_is_answered_and_counted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**hello(max_tokens=6, temperature=0))
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("lapis-")


def test_an_answer_that_ends_by_itself_says_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**hello())
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_goes_on_where_ends_are_ignored(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(**hello(seed=2, max_tokens=200))
    on = client.chat.completions.create(**hello(seed=2, max_tokens=200, extra_body={"ignore_eos": True}))
    assert short.choices[0].finish_reason == "stop"
    assert on.choices[0].finish_reason == "length"
    assert on.usage is not None
    assert on.usage.completion_tokens == 200
    assert (on.choices[0].message.content or "").startswith(short.choices[0].message.content or "?")
    text = {"model": "tiny", "prompt": "x", "seed": 2, "max_tokens": 200}
    assert client.completions.create(**text).choices[0].finish_reason == "stop"  # type: ignore[call-overload]
    completed = client.completions.create(**text, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    assert completed.usage.completion_tokens == 200


def test_a_stream_gives_the_same_text_and_the_same_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**hello(seed=7))
    chunks = list(
        client.chat.completions.create(**hello(seed=7, stream=True, stream_options={"include_usage": True}))
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_only_sent_when_asked_for(server: RunningServer) -> None:
    body = hello(max_tokens=2, stream=True)
    lines = httpx.post(f"{server.url}/chat/completions", json=body).text.splitlines()
    assert "usage" not in lines[0]
    assert lines[-2] == "data: [DONE]"


def test_one_connection_carries_streams_and_requests_in_turn(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as kept:
        for stream in (True, False, True, False):
            answer = kept.post("/chat/completions", json=hello(max_tokens=3, stream=stream))
            assert answer.status_code == 200
            assert answer.headers.get("connection") != "close"


def test_n_answers_differ_and_a_seed_repeats_all_of_them(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**hello(n=3, seed=1))
    again = client.chat.completions.create(**hello(n=3, seed=1))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage is not None
    single = client.chat.completions.create(**hello(max_tokens=1)).usage
    assert single is not None
    assert first.usage.prompt_tokens == single.prompt_tokens


def test_n_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in client.chat.completions.create(**hello(n=2, seed=5, stream=True)):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
    whole = client.chat.completions.create(**hello(n=2, seed=5))
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert ends == {0: "stop", 1: "stop"}


def test_stop_strings_end_an_answer_and_are_not_part_of_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**hello(temperature=0)).choices[0].message.content or ""
    stop = whole[4:9]
    cut = client.chat.completions.create(**hello(temperature=0, stop=[stop, "never"])).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_chat_logprobs_name_every_token_and_its_alternatives(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**hello(max_tokens=5, logprobs=True, top_logprobs=3)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in choice.logprobs.content)
    said = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content).decode()
    assert said == choice.message.content


def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    wanted = hello(max_tokens=5, seed=3, logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(**wanted).choices[0].logprobs
    tokens = []
    for chunk in client.chat.completions.create(**wanted, stream=True):
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.content or []
    assert whole is not None
    assert tokens == whole.content


def test_texts_are_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Once upon", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_prompts_may_be_many_texts_or_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "bb"], n=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=2).usage.prompt_tokens == 3  # type: ignore[union-attr]
    two = client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=2)
    assert len(two.choices) == 2


def test_text_logprobs_have_offsets_into_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="x", max_tokens=6, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    for token, offset in zip(logprobs.tokens or [], logprobs.text_offset or [], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


def test_a_completion_streams(server: RunningServer, client: openai.OpenAI) -> None:
    # The client's strict type has no null for finish_reason, which OpenAI's own streams send before the end.
    with openai.OpenAI(base_url=server.url, api_key="unused") as lenient:
        chunks = list(lenient.completions.create(model="tiny", prompt="x", max_tokens=6, seed=2, stream=True))
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=6, seed=2)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_echo_has_the_prompt_and_its_logprobs(client: openai.OpenAI, server: RunningServer) -> None:
    ask = {"model": "tiny", "prompt": "the river", "echo": True, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**ask, max_tokens=4).choices[0]
    assert whole.text.startswith("the river")
    logprobs = whole.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == whole.text
    for token, offset in zip(logprobs.tokens or [], logprobs.text_offset or [], strict=True):
        assert whole.text[offset : offset + len(token)] == token
    assert all(logprob is not None for logprob in logprobs.token_logprobs or [])  # the start token is before
    read = client.completions.create(**ask, max_tokens=0).choices[0]
    assert read.text == "the river"
    assert read.finish_reason == "length"
    with openai.OpenAI(base_url=server.url, api_key="unused") as lenient:
        chunks = list(lenient.completions.create(**ask, max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    tokens = [token for chunk in chunks for token in (chunk.choices[0].logprobs.tokens or [])]  # type: ignore[union-attr]
    assert tokens == logprobs.tokens
    http = httpx.post(f"{server.url}/completions", json={**ask, "prompt": [5, 6, 7], "max_tokens": 1})
    of_ids = http.json()["choices"][0]["logprobs"]  # the first token of bare ids has no logprob
    assert [logprob is None for logprob in of_ids["token_logprobs"]] == [True, False, False, False]
    plain = client.completions.create(model="tiny", prompt="the river", echo=True, max_tokens=4, seed=3)
    assert plain.choices[0].text == whole.text


def test_the_best_of_several_answers_is_given(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "the river", "max_tokens": 5, "seed": 1}
    best = client.completions.create(**ask, best_of=4, n=2)
    assert len(best.choices) == 2
    assert best.usage is not None
    assert best.usage.completion_tokens == 20
    tried = {choice.text for choice in client.completions.create(**ask, n=4).choices}
    assert {choice.text for choice in best.choices} < tried
    with pytest.raises(openai.BadRequestError, match="streamed"):
        client.completions.create(**ask, best_of=2, stream=True)


def test_models_are_listed_and_retrieved_with_their_facts(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["other", "tiny"]
    model = client.models.retrieve("tiny")
    assert (model.object, model.owned_by) == ("model", "lapis")
    facts = model.model_extra or {}
    assert facts["licence"] == "Apache-2.0"
    assert facts["bit_exact"] is True
    assert facts["context"] == 2048
    assert len(facts["digest"]) == 64


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"temperature": 5}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"model": "tinny"}, openai.NotFoundError),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError),
    ],
)
def test_errors_become_the_clients_own_exceptions(
    client: openai.OpenAI, change: dict[str, object], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**hello(**change))
    assert caught.value.param == next(iter(change))
    assert caught.value.request_id
    assert caught.value.request_id.startswith("req_")


def test_a_wrong_model_name_is_answered_with_the_nearest(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'") as caught:
        client.completions.create(model="tinny", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing/here")


def test_what_is_not_offered_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="not offered") as caught:
        client.vector_stores.list()
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.NotFoundError, match="There is no"):
        client.get("/nonsense", cast_to=object)


def test_the_clients_own_answer_can_be_sent_back_as_history(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**hello(max_tokens=4)).choices[0].message
    messages = [{"role": "user", "content": "Hello"}, answer, {"role": "user", "content": "More"}]
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)  # type: ignore[arg-type]
    assert again.choices[0].message.content


def test_usage_lands_in_the_ledger_to_the_token(tmp_path: object, home: Home) -> None:
    with fake_server(home) as server, openai.OpenAI(base_url=server.url, api_key="unused") as client:
        total = 0
        for stream in (False, True):
            for n in (1, 3):
                answer = client.completions.create(
                    model="tiny", prompt="Count me", max_tokens=5, n=n, stream=stream,
                    **({"stream_options": {"include_usage": True}} if stream else {}),
                )  # fmt: skip
                usage = list(answer)[-1].usage if stream else answer.usage
                total += usage.total_tokens
        server.services.meter.flush()
        ledger = UsageLedger(server.services.db)
        balance = ledger.balance()
        assert balance.balanced
        assert (balance.open, balance.used) == (0, total)
        assert ledger.summary("model")[0].requests == 4


def test_metrics_count_what_was_done(server: RunningServer, client: openai.OpenAI) -> None:
    client.completions.create(model="other", prompt="x", max_tokens=3)
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    assert 'lapis_completion_tokens_total{model="other"} 3' in text
    assert 'lapis_http_requests_total{route="/v1/completions",status="200"}' in text
    assert 'lapis_engine_pages_used{model="other"} 0' in text


def test_the_api_describes_itself(server: RunningServer) -> None:
    described = httpx.get(server.url.removesuffix("/v1") + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(described["paths"])
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert set(body["required"]) == {"model", "prompt"}
    assert "suffix" not in body["properties"]


def test_health_tells_nothing_but_health(server: RunningServer) -> None:
    answer = httpx.get(server.url.removesuffix("/v1") + "/health")
    assert answer.json() == {"status": "ok"}
    assert answer.headers["x-request-id"].startswith("req_")
