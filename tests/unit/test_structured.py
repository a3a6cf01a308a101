"""Grammars: what is refused when a request is made, what the masks allow, and structured answers end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.inference.fake import FakeEngine
from lapis.inference.request import Output, Request, SamplingParams
from lapis.inference.sampler import allowed_ids
from lapis.inference.structured import Compiler, Matcher, has
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.grammar import MAX_SIZE, Grammar
from tests.small_models import tokenizer as small_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer, frozenset({tokenizer.end_id}))


def accepts(compiler: Compiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    try:
        return has(compiler.matcher(grammar).allowed(tokenizer.encode(text)), tokenizer.end_id)
    except RuntimeError:
        return False


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (
            Grammar.json_schema(PERSON),
            ['{"name":"Al","age":3}', '{\n  "name": "Al",\n  "age": 3\n}'],
            ["{}", "7"],
        ),
        (
            Grammar.json_schema(PERSON),
            [],
            ['{"name": "Albert", "age": 3}', '{"name":"Al","age":3}' + " " * 40],
        ),
        (Grammar.json_object(), ["{}", '{"a": [1, null]}'], ["[]", "{", "a"]),
        (Grammar.regex("[0-9]{3}-[a-z]+"), ["123-ab"], ["12-ab", "123-", "123-ab!"]),
        (Grammar.choice(["yes", 'no "q"\n', "yes!"]), ["yes", "yes!", 'no "q"\n'], ["no", "", "yesyes!"]),
        (Grammar.lark('start: "(" start ")" | "x"'), ["x", "((x))"], ["((x)", ""]),
        (Grammar.json_schema({"type": "string", "format": "nonsense"}, strict=False), ['"a"'], ["1"]),
        (Grammar.json_schema({}), ["1", '"a"', "[]"], ["a"]),
    ],
)
def test_masks_allow_the_language_and_its_end(
    grammar: Grammar, yes: list[str], no: list[str], compiler: Compiler, tokenizer: Tokenizer
) -> None:
    for text in yes:
        assert accepts(compiler, tokenizer, grammar, text), text
    for text in no:
        assert not accepts(compiler, tokenizer, grammar, text), text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar.json_schema({"type": "banana"}), "banana"),
        (lambda: Grammar.json_schema({"type": "string", "format": "nonsense"}, strict=True), "nonsense"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (lambda: Grammar.json_schema(deep(300)), "64 levels"),
        (lambda: Grammar.json_schema(deep(100_000)), "64 levels"),
        (lambda: Grammar.json_schema([]), "object"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"const": float("nan")}), "JSON"),
        (lambda: Grammar.json_schema({"const": "\ud800"}), "surrogate"),
        (lambda: Grammar.json_schema({"enum": ["x" * MAX_SIZE]}), "at most"),
        (lambda: Grammar.regex("(a|b"), "unclosed"),
        (lambda: Grammar.regex("(?=x)y"), "look-ahead"),
        (lambda: Grammar.regex(""), "empty"),
        (lambda: Grammar.regex("(" * 5000 + "a" + ")" * 5000), "regular expression"),
        (lambda: Grammar.lark("start: nowhere"), "nowhere"),
        (lambda: Grammar.lark("start: a\na: b\nb: a"), "no text"),
        (lambda: Grammar.lark("start: " + "(" * 20000 + '"a"' + ")" * 20000), "nested"),
        (lambda: Grammar.choice([]), "1 to"),
        (lambda: Grammar.choice("abc"), "1 to"),
        (lambda: Grammar.choice(["a", ""]), "empty"),
        (
            lambda: Grammar.json_schema({"allOf": [{"anyOf": [{"minLength": n}] * 9} for n in range(9)]}),
            "JSON",
        ),
    ],
)
def test_what_makes_no_sense_is_an_error_of_the_request(make: Any, reason: str, compiler: Compiler) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        compiler.matcher(make())
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 500


def test_properties_keep_their_order(compiler: Compiler, tokenizer: Tokenizer) -> None:
    assert not accepts(compiler, tokenizer, Grammar.json_schema(PERSON), '{"age": 3, "name": "Al"}')


def test_a_matcher_follows_goes_back_and_follows_again(compiler: Compiler, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode('{"name": "Al", "age": 3}')
    matcher = compiler.matcher(Grammar.json_schema(PERSON))
    masks = [matcher.allowed(ids[:end]).copy() for end in range(len(ids) + 1)]
    for end in (len(ids), 3, 3, 0, 7, len(ids)):
        assert np.array_equal(matcher.allowed(ids[:end]), masks[end])
    other = compiler.matcher(Grammar.json_schema(PERSON))
    assert np.array_equal(other.allowed(()), masks[0])  # its own place
    for mask_W, token in zip(masks, ids, strict=False):
        assert has(mask_W, token)


def test_a_vocabulary_of_the_sentencepiece_kind_with_bytes_and_holes() -> None:
    specials = ("<unk>", "<s>", "</s>")
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁yes", "y", "e", "s", "ye", "yes"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)} | {"hole": len(pieces) + 5}
    inner = HFTokenizer(
        models.BPE(vocabulary, [("y", "e"), ("ye", "s"), ("▁", "yes")], byte_fallback=True, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer = Tokenizer(inner)
    matcher = Compiler(tokenizer, tokenizer.stop_ids).matcher(Grammar.regex("yes| yes|ß"))

    def allowed(*names: str) -> set[bytes]:
        mask_W = matcher.allowed([vocabulary[name] for name in names])
        return {tokenizer.token_bytes(id) for id in allowed_ids(mask_W, tokenizer.vocab_size).tolist()}

    assert allowed() == {b" ", b" yes", b"y", b"ye", b"yes", b"\xc3"}
    assert allowed("<0xC3>") == {b"\x9f"}
    assert allowed("<0xC3>", "<0x9F>") == {b"</s>"}


def test_a_requests_own_end_tokens_end_its_text(compiler: Compiler, tokenizer: Tokenizer) -> None:
    own = tokenizer.encode("q")[0]
    matcher = compiler.matcher(Grammar.choice(["no"]), frozenset({own}))
    assert not has(matcher.allowed(()), own)
    mask_W = matcher.allowed(tokenizer.encode("no"))
    assert allowed_ids(mask_W, tokenizer.vocab_size).tolist() == [own]


# ---- through an engine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with closing(FakeEngine(reply=lambda prompt, seed: prompt)) as engine:
        yield engine


def answer(engine: FakeEngine, structure: Grammar, prompt: str = "Hello", **params: Any) -> Output:
    ids = tuple(engine.tokenizer.encode(prompt))
    params = {"max_tokens": 60, **params}
    return engine.submit(Request("r", ids, SamplingParams(structure=structure, **params))).result()


def test_the_fake_answers_with_its_reply_or_with_what_is_short(engine: FakeEngine) -> None:
    reply = '{"name": "bob", "age": 31}'
    assert answer(engine, Grammar.json_schema(PERSON), reply).text == reply
    output = answer(engine, Grammar.json_schema(PERSON))
    assert (output.text, output.finish_reason) == ('{"name":"","age":0}', "stop")
    assert answer(engine, Grammar.json_object()).text == "{}"
    assert re.fullmatch("[a-z]{4}[0-9]", answer(engine, Grammar.regex("[a-z]{4}[0-9]")).text)
    assert answer(engine, Grammar.choice(["maybe", "yes"]), "yes").text == "yes"


@pytest.mark.parametrize("stop_ids", [None, frozenset(), frozenset({70})])
def test_a_text_ends_where_its_grammar_ends(engine: FakeEngine, stop_ids: frozenset[int] | None) -> None:
    output = answer(engine, Grammar.choice(["yes"]), stop_ids=stop_ids, min_tokens=30)
    assert (output.text, output.finish_reason) == ("yes", "stop")


def test_a_text_that_is_cut_says_so(engine: FakeEngine) -> None:
    output = answer(engine, Grammar.regex("a{100}"), max_tokens=5)
    assert output.finish_reason == "length" and set(output.text) == {"a"}


def test_a_bad_grammar_fails_alone_and_before_the_queue(engine: FakeEngine) -> None:
    with pytest.raises(InputError):
        answer(engine, Grammar.regex("("))
    with pytest.raises(InputError):
        engine.prepare(Grammar.regex("("))
    engine.prepare(Grammar.regex("x"))
    assert answer(engine, Grammar.regex("x")).text == "x"
    assert engine.stats()["running"] == engine.stats()["pages_used"] == 0


def test_a_grammar_that_fails_on_the_way_ends_its_request_only(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Matcher.allowed

    def fails(matcher: Matcher, completion: Any) -> Any:
        if len(completion) == 3:
            raise RuntimeError("the grammar cannot be followed any further")
        return honest(matcher, completion)

    monkeypatch.setattr(Matcher, "allowed", fails)
    params = [SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, structure=Grammar.regex("a{50}"))]
    ids = tuple(engine.tokenizer.encode("a bridge carries the river under the light"))
    streams = [engine.submit(Request(str(n), ids, params[n % 2])) for n in range(4)]
    outputs = [stream.result() for stream in streams]
    assert [output.finish_reason for output in outputs] == ["length", "error"] * 2
    assert "grammar" in str(outputs[1].error)
    assert outputs[0].text == outputs[2].text
    assert engine.stats()["pages_used"] == 0


def test_no_end_token_comes_before_min_tokens(engine: FakeEngine) -> None:
    ids = tuple(engine.tokenizer.encode("light"))
    for least in (0, 20):
        output = engine.submit(Request("r", ids, SamplingParams(60, min_tokens=least))).result()
        assert (output.finish_reason, output.completion_tokens > 20) == ("stop", least == 20)
    with pytest.raises(InputError) as caught:
        SamplingParams(max_tokens=3, min_tokens=4)
    assert caught.value.param == "min_tokens"


def test_equal_grammars_are_one_key() -> None:
    schemas: list[Mapping[str, Any]] = [PERSON, json.loads(json.dumps(PERSON))]
    first, second = (Grammar.json_schema(schema) for schema in schemas)
    assert first == second and hash(first) == hash(second)
    assert first != Grammar.json_schema(PERSON, strict=True)
