"""Structured answers of a real, random model: they always parse and validate, alone and in any company."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from random import Random
from typing import Any

import jsonschema_rs
import pytest
import torch

from lapis.inference.engine import LocalEngine
from lapis.inference.kv_cache import PAGE
from lapis.inference.request import Output, Request, SamplingParams
from lapis.inference.structured import Compiler
from lapis.kernels.stock import StockOps
from lapis.model.config import NAMED
from lapis.model.families import Llama
from lapis.model.manifest import Source
from lapis.model.weights import LoadedModel, read_model, write_model
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.grammar import Grammar
from lapis.tokenizer.tool_parser import Dialect, ToolCallDelta, ToolParser
from lapis.tokenizer.tools import read_choice, read_tools, tool_grammar
from tests.schemas import random_schema
from tests.texts import prose

TINY = replace(NAMED["tiny"], context=512, tied=False)
PAGE_BYTES = PAGE * TINY.kv_bytes_per_token
TEMPERATURES = (0.0, 0.5, 1.0, 2.0)
Judge = Callable[[str], object]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model with random weights and a vocabulary that knows JSON's favourite pairs of characters."""
    model = Llama(TINY, StockOps())
    model.init_weights(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("layers") and weight.ndim == 2:
                weight.mul_(12)
    texts = [prose(n) for n in range(3)] + ['{"name": "x", "n1": [{"a": -12.5}, true], "größe": null}\n'] * 30
    place = tmp_path_factory.mktemp("structured") / "tiny"
    write_model(place, TINY, model.state_dict(), Tokenizer.train(texts, 500), source=Source("run", "test"))
    return read_model(place)


def requests(count: int, seed: int) -> list[tuple[Request, Judge | None]]:
    """Requests of all kinds, and what a finished answer must satisfy."""
    random = Random(seed)
    made: list[tuple[Request, Judge | None]] = []
    for number in range(count):
        structure, judge = _task(random)
        params = SamplingParams(
            max_tokens=400 if structure else 40,
            temperature=random.choice(TEMPERATURES),
            top_p=random.choice([1.0, 0.9]),
            top_k=random.choice([0, 40]),
            min_p=random.choice([0.0, 0.02]),
            repetition_penalty=random.choice([1.0, 1.2]),
            min_tokens=random.choice([0, 5]),
            logprobs=random.choice([None, 1]),
            seed=number,
            structure=structure,
        )
        prompt = [random.randrange(3, 400) for _ in range(random.randrange(1, 50))]
        made.append((Request(str(number), prompt, params), judge))
    return made


def _task(random: Random) -> tuple[Grammar | None, Judge | None]:
    kind = random.randrange(8)
    if kind == 0:
        return None, None
    if kind == 1:
        pattern = random.choice(["[0-9]{3}-[a-z]{1,9}", "(ab|c){2,5}", "ä+!|[^x]{3}"])
        return Grammar.regex(pattern), lambda text: re.fullmatch(pattern, text, re.DOTALL) or 1 / 0
    if kind == 2:
        texts = ["yes", "no", "yesterday", "größer"]
        return Grammar.choice(texts), texts.index
    schema = random_schema(random)
    return Grammar.json_schema(schema), lambda text: jsonschema_rs.validate(schema, json.loads(text))


def answers(engine: LocalEngine, asked: Sequence[Request]) -> list[Output]:
    streams = [engine.submit(request) for request in asked]
    return [stream.result() for stream in streams]


def test_what_ends_is_valid_and_what_is_cut_is_a_beginning(loaded: LoadedModel) -> None:
    check(loaded, 60, seed=1)


@pytest.mark.long
def test_a_thousand_of_them(loaded: LoadedModel) -> None:
    for seed in range(2, 22):
        check(loaded, 50, seed)


def check(loaded: LoadedModel, count: int, seed: int) -> None:
    made = requests(count, seed)
    with closing(LocalEngine(loaded, "tiny")) as engine:
        outputs = answers(engine, [request for request, _ in made])
        assert engine.stats()["pages_used"] == 0
    compiler = Compiler(loaded.tokenizer, loaded.stop_ids)
    finished = 0
    for (request, judge), output in zip(made, outputs, strict=True):
        assert output.error is None
        if judge is None:
            continue
        if output.finish_reason == "stop":
            judge(output.text)
            finished += 1
        else:  # raises if it is no beginning
            assert request.params.structure is not None
            compiler.matcher(request.params.structure).allowed(output.token_ids)
    assert finished > count / 2


def test_a_seed_gives_the_same_structured_text_in_any_company(loaded: LoadedModel) -> None:
    if not loaded.model.ops.bit_exact:
        pytest.skip("only compiled kernels promise bits")
    long = SamplingParams(max_tokens=200, structure=Grammar.regex("([a-z]{3}-){40}"))  # for lack of pages
    asked = [Request(f"long {n}", [n + 5], replace(long, seed=n)) for n in range(8)]
    asked += [request for request, _ in requests(24, seed=3)]
    with closing(LocalEngine(loaded, "tiny")) as engine:
        single = [answers(engine, [request])[0] for request in asked]
    options: list[dict[str, Any]] = [
        {},
        {"cache_bytes": 16 * PAGE_BYTES},
        {"step_tokens": 16, "running": 5},
        {"drafts": 4, "cache_bytes": 16 * PAGE_BYTES},
    ]
    for option in options:
        with closing(LocalEngine(loaded, "tiny", **option)) as engine:
            outputs = answers(engine, asked)
            stats = engine.stats()
        assert [output.token_ids for output in outputs] == [output.token_ids for output in single]
        assert [output.text for output in outputs] == [output.text for output in single]
        if "cache_bytes" in option:
            assert stats["preemptions"] > 0


def test_what_a_grammar_forces_is_guessed_right(loaded: LoadedModel) -> None:
    text = "the same words in every answer"
    params = SamplingParams(max_tokens=60, temperature=0, structure=Grammar.choice([text + ": yes", text]))
    outputs = []
    for drafts in (0, 8):
        with closing(LocalEngine(loaded, "tiny", drafts=drafts)) as engine:
            outputs += answers(engine, [Request("r", [9, 9, 9], params)])
            stats = engine.stats()
    assert outputs[0].token_ids == outputs[1].token_ids
    assert stats["steps"] < outputs[0].completion_tokens
    assert stats["drafted_tokens"] >= stats["accepted_tokens"] > 3


@pytest.mark.parametrize("dialect", Dialect)
def test_required_calls_are_calls(loaded: LoadedModel, dialect: Dialect) -> None:
    functions = {f"f{n}": random_schema(Random(n), 2) for n in range(4)}
    schemas = {
        name: {
            "type": "object",
            "properties": {"x": schema},
            "required": ["x"],
            "additionalProperties": False,
        }
        for name, schema in functions.items()
    }
    tools = read_tools(
        [{"type": "function", "name": name, "parameters": schema} for name, schema in schemas.items()]
    )
    grammar = tool_grammar(dialect, loaded.tokenizer, tools, read_choice("required", tools), parallel=True)
    asked = [
        Request(str(seed), [5, 6, 7], SamplingParams(max_tokens=400, seed=seed, structure=grammar))
        for seed in range(12)
    ]
    with closing(LocalEngine(loaded, "tiny")) as engine:
        outputs = [output for output in answers(engine, asked) if output.finish_reason == "stop"]
    assert len(outputs) > 6
    for output in outputs:
        parser = ToolParser(dialect, schemas)
        deltas = parser.push(output.text) + parser.finish()
        assert deltas
        for delta in deltas:
            assert isinstance(delta, ToolCallDelta)
            jsonschema_rs.validate(schemas[delta.name], json.loads(delta.arguments))
