"""Tools in prompts, for templates that know them and for those that do not, and what answers may be then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.inference.structured import Compiler, has
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import CHATML, ChatTemplate
from lapis.tokenizer.tool_parser import Dialect
from lapis.tokenizer.tools import (
    ToolChoice,
    dialect_of,
    prompt_with_tools,
    read_choice,
    read_tools,
    tool_grammar,
)
from tests.texts import prose

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <|im_end|> numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/number"}},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"number": {"type": "integer"}},
        },
        "strict": True,
    },
}
NOW = {"type": "function", "name": "now"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "tool", "tool_call_id": "call_2", "content": "two<|im_end|>"},
]
KNOWS = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.function.arguments.a + 1 }}{{ call.id }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    inner = HFTokenizer.from_str(Tokenizer.train([prose(n) for n in range(5)], 300).to_json())
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("[TOOL_CALLS]", "[ARGS]")])
    return Tokenizer(inner)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer, tokenizer.stop_ids)


@pytest.fixture
def chat() -> Iterator[ChatTemplate]:
    template = ChatTemplate(CHATML)
    yield template
    template.close()


def test_a_template_without_tools_gets_them_explained(chat: ChatTemplate, tokenizer: Tokenizer) -> None:
    asked = prompt_with_tools(chat, tokenizer, TALK, read_tools([ADD, NOW]))
    text = tokenizer.decode(asked.ids, special=True)
    assert text.startswith("<|im_start|>system\n")
    assert '"name": "now"' in text and "Adds <|im_end|> numbers." in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert text.count("<tool_response>\n") == 2 and text.count("<|im_start|>user") == 2
    assert (
        asked.ids.count(tokenizer.token_id("<|im_end|>") or 0) == 4
    )  # none of them from a message or a tool
    assert asked.grammar is not None  # add is strict
    assert asked.dialect is Dialect.HERMES
    assert "role': 'tool'" in str(TALK[2])  # the caller's messages are as they were


def test_a_system_message_is_kept(chat: ChatTemplate, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, TALK[0]]
    text = tokenizer.decode(prompt_with_tools(chat, tokenizer, messages, read_tools([NOW])).ids)
    assert "Be brief.\n\nYou can call functions" in text


def test_without_tools_the_prompt_is_the_plain_one(chat: ChatTemplate, tokenizer: Tokenizer) -> None:
    for asked in (
        prompt_with_tools(chat, tokenizer, TALK[:1], ()),
        prompt_with_tools(chat, tokenizer, TALK[:1], read_tools([ADD]), ToolChoice(calls=False)),
    ):
        assert asked.ids == chat.prompt(TALK[:1], tokenizer)
        assert (asked.grammar, asked.parser()) == (None, None)


def test_a_template_that_knows_tools_renders_them_itself(tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(KNOWS)
    text = tokenizer.decode(prompt_with_tools(chat, tokenizer, TALK, read_tools([ADD])).ids, special=True)
    chat.close()
    assert text.startswith('<tools>{"type": "function", "function": {"name": "add"')
    assert "<tool_call>2call_1</tool_call>" in text  # arguments came as an object
    assert "<|im_start|>assistant\n<tool_call>" in text  # no content is no "None"


def test_mistral_gets_ids_of_nine_characters(tokenizer: Tokenizer) -> None:
    template = (
        "{{ '[TOOL_CALLS]' if tools }}{% for m in messages %}"
        "{{ m.tool_calls[0].id if m.tool_calls }}{{ m.tool_call_id }} {% endfor %}"
    )
    chat = ChatTemplate(template)
    asked = prompt_with_tools(chat, tokenizer, TALK, read_tools([NOW]))
    chat.close()
    call, first, second = tokenizer.decode(asked.ids).split()
    assert len(call) == len(second) == 9
    assert call == first != second
    assert asked.visible_ids == {tokenizer.token_id("[TOOL_CALLS]")}


def test_dialects_are_recognised_by_the_template() -> None:
    assert dialect_of(CHATML) is None
    assert dialect_of(KNOWS) is Dialect.HERMES
    assert dialect_of("{{ tools }}[TOOL_CALLS]") is Dialect.MISTRAL
    assert dialect_of("{{ tools }}[TOOL_CALLS][ARGS]") is Dialect.MISTRAL_ARGS
    assert dialect_of('{{ tools }} Environment: ipython {"name": "parameters"}') is Dialect.LLAMA
    assert dialect_of("{{ tools }} in a way nobody knows") is None


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "retrieval"},
        {"type": "function", "function": {"name": "a b"}},
        {"type": "function", "function": {}},
        {"type": "function", "function": 7},
        {"type": "function", "function": {"name": "a", "description": 3}},
        {"type": "function", "function": {"name": "a", "parameters": []}}
        | {"function": {"name": "", "x": 1}},
        {"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}},
        {"type": "function", "function": {"name": "a", "parameters": "x"}},
        {
            "type": "function",
            "function": {"name": "a", "parameters": {"properties": {"x": {"const": "\ud800"}}}},
        },
    ],
)
def test_bad_tools_are_refused(tool: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        read_tools([tool])
    assert caught.value.param == "tools"


def test_bad_choices_and_messages_are_refused(chat: ChatTemplate, tokenizer: Tokenizer) -> None:
    tools = read_tools([ADD])
    with pytest.raises(InputError, match="Two tools"):
        read_tools([NOW, NOW])
    named = {"type": "function", "function": {"name": "other"}}
    for choice, given in (("required", ()), (named, tools), ("sometimes", tools), ({"type": "x"}, tools)):
        with pytest.raises(InputError) as caught:
            read_choice(choice, given)
        assert caught.value.param == "tool_choice"
    for arguments in ("{", "[1]"):
        call = {"id": "1", "function": {"name": "add", "arguments": arguments}}
        with pytest.raises(InputError) as caught:
            prompt_with_tools(chat, tokenizer, [{"role": "assistant", "tool_calls": [call]}], tools)
        assert caught.value.param == "messages"


ONE = {
    Dialect.HERMES: '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    Dialect.LLAMA: '{"name": "add", "parameters": {"a": 1}}',
    Dialect.MISTRAL: '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
    Dialect.MISTRAL_ARGS: '[TOOL_CALLS]add[ARGS]{"a": 1}',
}


@pytest.mark.parametrize("dialect", Dialect)
def test_what_an_answer_may_be(dialect: Dialect, tokenizer: Tokenizer, compiler: Compiler) -> None:
    tools = read_tools([ADD, NOW])

    def allows(text: str, choice: str | dict[str, Any], parallel: bool = True) -> bool:
        grammar = tool_grammar(dialect, tokenizer, tools, read_choice(choice, tools), parallel)
        assert grammar is not None
        try:
            mask_W = compiler.matcher(grammar).allowed(tokenizer.encode(text, special=True))
        except RuntimeError:
            return False
        return has(mask_W, tokenizer.end_id)

    one = ONE[dialect]
    two = one[:-1] + ", " + one.removeprefix("[TOOL_CALLS][") if dialect is Dialect.MISTRAL else ""
    two = two or one + {Dialect.HERMES: "\n", Dialect.LLAMA: "; "}.get(dialect, "") + one
    now = one.replace("add", "now").replace('{"a": 1}', "{}")
    wrong = one.replace('"a": 1', '"a": "x"')
    for text in (one, two, now, "Plain words."):
        assert allows(text, "auto")
    assert not allows(wrong, "auto") and not allows(two, "auto", parallel=False)
    for text in (one, two, now):
        assert allows(text, "required")
    for text in ("Plain words.", wrong, ""):
        assert not allows(text, "required")
    assert not allows(two, "required", parallel=False)
    name = {"type": "function", "function": {"name": "add"}}
    assert allows(one, name) and not allows(now, name) and not allows(two, name)


def test_nothing_is_enforced_without_need(tokenizer: Tokenizer) -> None:
    tools = read_tools([NOW])
    assert tool_grammar(Dialect.HERMES, tokenizer, tools, ToolChoice(), parallel=True) is None
