"""FakeEngine is a product: users test against it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from lapis.inference.engine import Engine
from lapis.inference.fake import FakeEngine
from lapis.inference.request import Output, Request, SamplingParams


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with closing(FakeEngine()) as engine:
        yield engine


def answer(engine: Engine, text: str, **params: Any) -> Output:
    request = Request("r", engine.tokenizer.encode(text), SamplingParams(max_tokens=200, **params))
    return engine.submit(request).result()


def test_the_answer_depends_on_prompt_and_seed_only(engine: FakeEngine) -> None:
    first = answer(engine, "Hello", temperature=0)
    assert first.finish_reason == "stop"
    assert first.text.endswith(".")
    assert answer(engine, "Hello", temperature=0, seed=5).text == first.text
    assert answer(engine, "Other", temperature=0).text != first.text
    assert answer(engine, "Hello", seed=1).text == answer(engine, "Hello", seed=1).text
    assert answer(engine, "Hello", seed=1).text != answer(engine, "Hello", seed=2).text


def test_a_reply_of_ones_own() -> None:
    with closing(FakeEngine(reply=lambda prompt, seed: prompt.upper())) as engine:
        assert answer(engine, "loud please").text == "LOUD PLEASE"


def test_logprobs_have_the_asked_shape(engine: FakeEngine) -> None:
    output = answer(engine, "Hello", logprobs=3)
    assert [logprob.token_id for logprob in output.logprobs] == list(output.token_ids)
    assert all(len(logprob.top) == 3 and logprob.logprob < 0 for logprob in output.logprobs)
    assert b"".join(logprob.token for logprob in output.logprobs[:-1]).decode() == output.text
    assert answer(engine, "Hello").logprobs == ()


def test_it_chats(engine: FakeEngine) -> None:
    ids = engine.chat.prompt([{"role": "user", "content": "Hi"}], engine.tokenizer)
    request = Request("r", ids, SamplingParams(max_tokens=5))
    assert engine.submit(request).result().completion_tokens == 5


def test_it_needs_no_torch() -> None:
    code = "import sys, lapis.inference.fake, lapis.inference.engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
