"""What a body may say: JSON read strictly, fields by name, type and range, before any model is asked."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.api.body import parse
from lapis.api.logprobs import TextLogprobsWriter, chat_logprobs
from lapis.api.protocol.chat import ChatChunkChoice, ChatRequest, Delta
from lapis.api.protocol.completions import CompletionRequest
from lapis.errors import InputError
from lapis.gateway.strict_json import read_json
from lapis.inference.request import TokenLogprob

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}


def chat(**change: Any) -> ChatRequest:
    return parse(json.dumps({**CHAT, **change}).encode(), ChatRequest)


def text(**change: Any) -> CompletionRequest:
    return parse(json.dumps({**TEXT, **change}).encode(), CompletionRequest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=40)
@given(JSON)
def test_all_that_json_allows_is_read(value: object) -> None:
    assert read_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_any_other_bytes_are_an_input_error(raw: bytes) -> None:
    try:
        read_json(raw)
    except InputError as error:
        assert error.message


def test_one_field_of_very_many_given_twice_is_found_at_once() -> None:
    names = [f"k{number}" for number in range(40_000)]
    raw = "{" + ",".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}"
    started = time.monotonic()
    with pytest.raises(InputError, match="twice") as caught:
        read_json(raw.encode())
    assert caught.value.param == names[-1]
    assert time.monotonic() - started < 3


def test_half_a_surrogate_pair_is_named_with_its_place() -> None:
    with pytest.raises(InputError) as caught:
        read_json(b'{"messages": [{"content": "ok"}, {"content": "\\ud83d"}]}')
    assert caught.value.param == "messages[1].content"
    assert read_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_defaults_are_those_of_openai() -> None:
    params = chat().sampling(5, None)
    assert (params.temperature, params.top_p, params.seed, params.stop) == (1.0, 1.0, None, ())
    assert chat().choices == 1
    assert chat().limit is None
    assert text().limit == 16


def test_null_means_the_default() -> None:
    names = [
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logit_bias",
        "stream",
        "max_tokens",
        "presence_penalty",
    ]
    for body in (chat(**dict.fromkeys(names)), text(**dict.fromkeys(names))):
        assert body.sampling(5, None) == chat().sampling(5, None)
        assert body.choices == 1


def test_a_zero_is_a_value() -> None:
    assert chat(temperature=0).sampling(5, None).greedy


def test_values_reach_the_engine_unchanged() -> None:
    params = chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=-7, stop="END",
        presence_penalty=1, frequency_penalty=-1, logit_bias={"5": -100, "6": 1.5},
    ).sampling(9, 3)  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (
        0.5,
        0.9,
        40,
        0.1,
        -7,
    )
    assert params.stop == ("END",)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.logit_bias == {5: -100.0, 6: 1.5}
    assert (params.max_tokens, params.logprobs) == (9, 3)


def test_prompts_are_texts_or_token_ids() -> None:
    assert text(prompt="a").prompt == ("a",)
    assert text(prompt=["a", "b"]).prompt == ("a", "b")
    assert text(prompt=[1, 2]).prompt == ((1, 2),)
    assert text(prompt=[[1, 2], [3]]).prompt == ((1, 2), (3,))
    assert text(prompt=["a", [1]]).prompt == ("a", (1,))


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts, "name": "boss"}])
    assert body.messages[0].for_template() == {"role": "system", "content": "ab", "name": "boss"}


@pytest.mark.parametrize(
    "name", ["user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "store"]
)
def test_what_cannot_change_the_answer_is_accepted(name: str) -> None:
    assert chat(**{name: "x"}) == chat()


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ["text"]},
        {"reasoning_effort": None},
    ],
)
def test_what_is_not_offered_may_be_switched_off(change: dict[str, Any]) -> None:
    assert chat(**change) == chat()


@pytest.mark.parametrize(
    "change", [{"audio": {}}, {"functions": [1]}, {"modalities": ["audio"]}, {"verbosity": "low"}]
)
def test_what_is_not_offered_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not offered") as caught:
        chat(**change)
    assert caught.value.param == next(iter(change))


def test_an_absent_field_of_a_delta_is_left_out_but_an_open_end_is_null() -> None:
    choice = json.loads(ChatChunkChoice(index=0, delta=Delta(content="x")).model_dump_json())
    assert choice == {"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}


def test_logprobs_carry_bytes_where_a_token_is_half_a_letter() -> None:
    half, rest = "é".encode()[:1], "é".encode()[1:]
    top = (TokenLogprob(1, half, -0.25), TokenLogprob(2, b"x", float("-inf")))
    token = TokenLogprob(1, half, -0.25, top)
    shown = chat_logprobs([token]).content[0]
    assert (shown.token, shown.bytes, shown.logprob) == ("\ufffd", [0xC3], -0.25)
    assert shown.top_logprobs[1].logprob == -9999.0
    writer = TextLogprobsWriter()
    assert writer.write([TokenLogprob(0, b"ab", -1.0)]).text_offset == [0]
    written = writer.write([token, TokenLogprob(3, rest, -1.0), TokenLogprob(4, b"!", -1.0)])
    assert written.text_offset == [2, 2, 3]
