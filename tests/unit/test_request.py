"""Values that make no sense are refused with the name of the field, before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lapis.errors import InputError
from lapis.inference.request import (
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
    check_request,
    check_scored,
    join_outputs,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 2.5),
        ("top_p", 0.0),
        ("top_p", 5.0),
        ("top_k", -1),
        ("top_k", 2.0),
        ("min_p", 1.5),
        ("seed", 2**64),
        ("seed", "7"),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop", ("x" * 300,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("presence_penalty", 3.0),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(2000), 1.0)),
        ("logprobs", -1),
        ("logprobs", 1000),
        ("prompt_logprobs", 21),
    ],
)
def test_a_bad_value_is_refused_by_its_name(field: str, value: Any) -> None:
    values: dict[str, Any] = {"max_tokens": 1, field: value}
    with pytest.raises(InputError) as caught:
        SamplingParams(**values)
    assert caught.value.param == field
    assert field in caught.value.message


def test_edges_are_allowed() -> None:
    SamplingParams(1, temperature=0, top_p=1, top_k=0, min_p=1.0, seed=-(2**63), logprobs=0)
    SamplingParams(1, temperature=2, top_p=1e-9, seed=2**64 - 1, stop=("x" * 256,), logit_bias={0: -100})


@pytest.mark.parametrize(
    ("ids", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1] * 16, {}, "prompt"),
        ([1, 999999], {}, "prompt"),
        ([-5], {}, "prompt"),
        ([1], {"logit_bias": {50: 1.0}}, "logit_bias"),
        ([1], {"stop_ids": frozenset({50})}, "stop_ids"),
    ],
)
def test_what_the_model_cannot_run_is_refused(ids: list[int], params: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        check_request(Request("r", ids, SamplingParams(max_tokens=1, **params)), context=16, vocab_size=50)
    assert caught.value.param == param


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    check_request(Request("r", [1] * 15, SamplingParams(max_tokens=100)), context=16, vocab_size=50)


@pytest.mark.parametrize("ids", [[], [1], [1] * 17, [1, 50]])
def test_texts_that_cannot_be_scored(ids: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        check_scored(ids, context=16, vocab_size=50)
    assert caught.value.param == "prompt"


def test_joined_deltas_are_the_whole() -> None:
    logprob = TokenLogprob(5, b"a", -1.0)
    first = Output("a", (5,), (logprob,), None, None, 3, 1, 0)
    second = Output("b", (6,), (), "stop", None, 3, 2, 0)
    assert join_outputs([first, second]) == Output("ab", (5, 6), (logprob,), "stop", None, 3, 2, 0)
    assert join_outputs([second]) == second
    assert join_outputs([]) == Output()


@pytest.mark.parametrize(
    ("params", "pooling", "wrong"),
    [
        ({"max_tokens": 0}, None, "max_tokens"),
        ({"max_tokens": 1}, "mean", "max_tokens"),
        ({"max_tokens": 0}, "last", None),
        ({"max_tokens": 0, "prompt_logprobs": 0}, None, None),
    ],
)
def test_only_reading_needs_something_to_read(
    params: dict[str, Any], pooling: Any, wrong: str | None
) -> None:
    request = Request("r", [5] * 16, SamplingParams(**params), pooling=pooling)
    if wrong is None:
        check_request(request, context=16, vocab_size=50)
        return
    with pytest.raises(InputError) as caught:
        check_request(request, context=100, vocab_size=50)
    assert caught.value.param == wrong
