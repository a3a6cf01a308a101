"""From a model's text to tool calls: the same however the text is cut, and what is no call stays text."""

from __future__ import annotations

import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lapis.tokenizer.tool_parser import Delta, Dialect, TextDelta, ToolCallDelta, ToolParser

NAMES = ("add", "get_weather")
HERMES_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}</tool_call>\\""}}\n</tool_call>'
ARGUMENTS = {"a": 1, "b": '}</tool_call>"'}


def parse(dialect: Dialect, *pieces: str, limit: int | None = None) -> list[Delta]:
    parser = ToolParser(dialect, NAMES, limit)
    return [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))


def calls_of(deltas: list[Delta]) -> list[tuple[str, object]]:
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (Dialect.HERMES, HERMES_CALL),
        (Dialect.HERMES, HERMES_CALL.replace("\n", "")),
        (Dialect.HERMES, HERMES_CALL.removesuffix("</tool_call>")),  # the model ended early
        (Dialect.HERMES, HERMES_CALL.removesuffix("ll>")),
        (Dialect.LLAMA, json.dumps({"name": "add", "parameters": ARGUMENTS})),
        (Dialect.LLAMA, " <|python_tag|>" + json.dumps({"name": "add", "parameters": ARGUMENTS})),
        (Dialect.MISTRAL, "[TOOL_CALLS] " + json.dumps([{"name": "add", "arguments": ARGUMENTS}])),
        (Dialect.MISTRAL, "[TOOL_CALLS]add" + json.dumps(ARGUMENTS)),
        (Dialect.MISTRAL_ARGS, "[TOOL_CALLS]add[ARGS]" + json.dumps(ARGUMENTS)),
        (Dialect.HERMES, HERMES_CALL.replace('"arguments": {', '"parameters": {')),
    ],
)
def test_a_call_is_read(dialect: Dialect, text: str) -> None:
    for pieces in ([text], list(text), [text[:20], text[20:]]):
        deltas = parse(dialect, *pieces)
        assert calls_of(deltas) == [("add", ARGUMENTS)]
        assert text_of(deltas) == ""


def test_ids_look_as_each_family_wants_them() -> None:
    (call,) = parse(Dialect.HERMES, HERMES_CALL)
    assert isinstance(call, ToolCallDelta) and re.fullmatch(r"call_[0-9a-f]{24}", call.id)
    (call,) = parse(Dialect.MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {}}]')
    assert isinstance(call, ToolCallDelta) and re.fullmatch(r"[0-9a-z]{9}", call.id)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (Dialect.HERMES, f"{HERMES_CALL}\n{HERMES_CALL}"),
        (Dialect.HERMES, '<tool_call>[{"name": "add", "arguments": {}}, {"name": "add"}]</tool_call>'),
        (Dialect.LLAMA, '{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}'),
        (
            Dialect.MISTRAL,
            '[TOOL_CALLS][{"name": "add"}, {"name": "get_weather", "arguments": {"city": "Ä"}}]',
        ),
        (Dialect.MISTRAL_ARGS, "[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{}"),
    ],
)
def test_several_calls(dialect: Dialect, text: str) -> None:
    assert len(calls_of(parse(dialect, *text))) == 2
    assert text_of(parse(dialect, *text)) == ""
    assert len(calls_of(parse(dialect, *text, limit=1))) == 1


def test_text_around_calls_comes_without_the_white_space_between() -> None:
    deltas = parse(Dialect.HERMES, *f"Let me see.\n\n{HERMES_CALL}\nDone.")
    assert text_of(deltas) == "Let me see.\nDone." and len(calls_of(deltas)) == 1
    assert text_of(parse(Dialect.MISTRAL, *"Hm. [TOOL_CALLS]add[ARGS]{}")) == "Hm."


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize(
    "text", ["", "plain", "  1 < 2 and [T] <tool \n", "{not json}", '{"name": "add"', "<|py"]
)
def test_text_without_calls_is_untouched(dialect: Dialect, text: str) -> None:
    assert parse(dialect, *text) == parse(dialect, text) or text_of(parse(dialect, *text)) == text
    assert text_of(parse(dialect, text)) == text
    assert calls_of(parse(dialect, text)) == []


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (Dialect.HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (Dialect.HERMES, '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>'),
        (Dialect.HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}\n</tool_call>'),
        (Dialect.HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1e999}}\n</tool_call>'),
        (Dialect.HERMES, "<tool_call>what</tool_call>"),
        (Dialect.HERMES, "<tool_call>" + "[" * 5000 + "]" * 5000),
        (Dialect.LLAMA, '{"city": "Rome"}'),
        (Dialect.LLAMA, "<|python_tag|>print(1)"),
        (Dialect.MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a"}}]'),
        (Dialect.MISTRAL_ARGS, "[TOOL_CALLS]nothing[ARGS]{}"),
        (Dialect.MISTRAL_ARGS, "[TOOL_CALLS]" + "x" * 200),
    ],
)
def test_a_malformed_call_comes_back_as_text(dialect: Dialect, text: str) -> None:
    for pieces in ([text], list(text)):
        deltas = (
            parse(dialect, "a ", *pieces, " b") if dialect is not Dialect.LLAMA else parse(dialect, *pieces)
        )
        assert calls_of(deltas) == []
        assert text_of(deltas) == (f"a {text} b" if dialect is not Dialect.LLAMA else text)


def test_a_good_call_after_a_malformed_one() -> None:
    bad = "<tool_call>{}</tool_call>"
    deltas = parse(Dialect.HERMES, *(bad + HERMES_CALL))
    assert text_of(deltas) == bad and len(calls_of(deltas)) == 1


def test_text_is_given_as_soon_as_it_is_sure() -> None:
    parser = ToolParser(Dialect.HERMES, NAMES)
    assert parser.push("Hello <") == [TextDelta("Hello")]
    assert parser.push("b>") == [TextDelta(" <b>")]
    assert parser.push("<tool_call>{") == []
    assert [type(delta) for delta in parser.push('"name": "add"}</tool_call>')] == [ToolCallDelta]


def test_half_a_surrogate_pair_in_arguments_can_be_sent() -> None:
    (call,) = parse(Dialect.HERMES, r'<tool_call>{"name": "add", "arguments": {"a": "\ud800"}}</tool_call>')
    assert isinstance(call, ToolCallDelta)
    call.arguments.encode()


PIECES = [
    *'<>{}[]"\\ \nab',
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    '{"name": "add", "arguments": {}}',
    "; ",
]


@settings(max_examples=200)
@given(st.sampled_from(Dialect), st.lists(st.sampled_from(PIECES), max_size=20), st.integers(1, 7))
def test_any_cut_gives_the_same(dialect: Dialect, pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    cut = [text[start : start + width] for start in range(0, len(text), width)]
    whole, parts = parse(dialect, text), parse(dialect, *cut)
    assert (text_of(whole), calls_of(whole)) == (text_of(parts), calls_of(parts))
    if not calls_of(whole):
        assert text_of(whole) == text
