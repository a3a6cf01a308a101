"""Tool calls: how tools get into a prompt, and what an answer with calls may look like.

    tools = read_tools(body.tools)                                # InputError with param "tools"
    choice = read_choice(body.tool_choice, tools)                 # InputError with param "tool_choice"
    asked = prompt_with_tools(chat, tokenizer, messages, tools, choice, parallel=True)
    SamplingParams(structure=asked.grammar, visible_ids=asked.visible_ids, …), prompt_ids=asked.ids
    parser = asked.parser()                                       # one for each answer
    for delta in parser.push(output.text): TextDelta(text) | ToolCallDelta(index, id, name, arguments)
    parser.finish(); parser.calls > 0 → finish_reason "tool_calls"

Messages are OpenAI's (assistant messages with `tool_calls`, role "tool"); without tools and calls the prompt
is the plain one. A template that knows tools renders them itself; else the system message explains them in the
way of Hermes (<tools>, <tool_call>, <tool_response>). Choices "required" and a named function, tools
with `strict`, and `parallel=False` become a Grammar: what it rules out cannot be sampled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapis.errors import InputError
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import ChatTemplate, ChatTokens, Messages
from lapis.tokenizer.grammar import Grammar, literal, schema_text
from lapis.tokenizer.tool_parser import Dialect, ToolParser

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# The way in which models have seen calls: one line, a space behind : and , as Python's json writes it.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; `parameters` is its JSON schema as text."""

    name: str
    description: str = ""
    parameters: str = '{"type":"object"}'
    strict: bool = False

    def shown(self) -> dict[str, Any]:
        """The tool as templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": json.loads(self.parameters)}}


@dataclass(frozen=True)
class ToolChoice:
    """Whether calls may come, must come, and of which functions."""

    calls: bool = True
    required: bool = False
    name: str | None = None


@dataclass(frozen=True)
class ToolPrompt:
    """A prompt, and how its answer is bound and read. `visible_ids` are special tokens that the parser must see."""

    ids: list[int]
    grammar: Grammar | None = None
    visible_ids: frozenset[int] = frozenset()
    dialect: Dialect = Dialect.HERMES
    names: frozenset[str] = frozenset()
    limit: int | None = None

    def parser(self) -> ToolParser | None:
        """A new parser for one answer; None when the answer can hold no calls."""
        return ToolParser(self.dialect, self.names, self.limit) if self.names else None


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Tools as OpenAI's chat API (`function` nested) or responses API (flat) writes them. Raises InputError."""
    if len(tools) > MAX_TOOLS:
        raise InputError(f"At most {MAX_TOOLS} tools are taken, got {len(tools)}.", param="tools")
    read = tuple(_read_tool(tool) for tool in tools)
    names = [tool.name for tool in read]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"Two tools have the name {name!r}.", param="tools")
    return read


def read_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> ToolChoice:
    """OpenAI's `tool_choice`: "none", "auto", "required" or a named function. Raises InputError."""
    if choice is None or choice == "auto":
        return ToolChoice()
    if choice == "none":
        return ToolChoice(calls=False)
    if choice == "required":
        if not tools:
            raise InputError('tool_choice "required" needs tools.', param="tool_choice")
        return ToolChoice(required=True)
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in {tool.name for tool in tools}:
            raise InputError(f"tool_choice names {name!r}, which is none of the tools.", param="tool_choice")
        return ToolChoice(required=True, name=str(name))
    message = (
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}.'
    )
    raise InputError(message, param="tool_choice")


def prompt_with_tools(
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Sequence[Tool],
    choice: ToolChoice | None = None,
    *,
    parallel: bool = True,
) -> ToolPrompt:
    """The prompt of a conversation with tools, and the Grammar its answer must keep to, if any.

    With choice "none" the model is told of no tools. Raises InputError when the template refuses.
    """
    choice = choice or ToolChoice()
    if not choice.calls:
        tools = ()
    dialect = dialect_of(chat.template) or Dialect.HERMES
    ids = chat.prompt(*_for_template(chat, tokenizer, messages, tools))
    if not tools:
        return ToolPrompt(ids)
    visible = {tokenizer.token_id(marker) for marker in dialect.markers} & tokenizer.special_ids
    return ToolPrompt(
        ids,
        tool_grammar(dialect, tokenizer, tools, choice, parallel),
        frozenset(id for id in visible if id is not None),
        dialect,
        frozenset(tool.name for tool in tools),
        None if parallel else 1,
    )


def encode_with_tools(
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Sequence[Tool],
    trained: Sequence[bool] | None = None,
) -> ChatTokens:
    """A conversation for training, prompts as `prompt_with_tools` gives them; `trained` as in ChatTemplate.encode."""
    return chat.encode(*_for_template(chat, tokenizer, messages, tools), trained)


def _for_template(
    chat: ChatTemplate, tokenizer: Tokenizer, messages: Messages, tools: Sequence[Tool]
) -> tuple[Messages, Tokenizer, Messages]:
    """Messages and tools as the template takes them: one that knows no tools has them explained in the messages."""
    known = dialect_of(chat.template)
    prepared = [_prepared(message, known or Dialect.HERMES) for message in messages]
    if known is None:
        return _explained(prepared, tools), tokenizer, ()
    return prepared, tokenizer, [tool.shown() for tool in tools]


def dialect_of(template: str) -> Dialect | None:
    """How a template's model writes calls; None if the template knows no tools or writes them in another way."""
    if not re.search(r"\btools\b", template):
        return None
    if "[TOOL_CALLS]" in template:
        return Dialect.MISTRAL_ARGS if "[ARGS]" in template else Dialect.MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return Dialect.HERMES
    if "ipython" in template and "parameters" in template:
        return Dialect.LLAMA
    return None


def tool_grammar(
    dialect: Dialect, tokenizer: Tokenizer, tools: Sequence[Tool], choice: ToolChoice, parallel: bool
) -> Grammar | None:
    """What an answer may be: calls only if they are required; None if nothing needs to be enforced."""
    if choice.name is not None:
        tools = [tool for tool in tools if tool.name == choice.name]
        parallel = False  # a named function is called once
    if not (choice.required or not parallel or any(tool.strict for tool in tools)):
        return None
    lines = [f"call: {' | '.join(f'f{n}' for n in range(len(tools)))}"]
    for n, tool in enumerate(tools):
        before, after = _around(dialect, tokenizer, tool.name)
        lines.append(f"f{n}: {before} a{n} {after}")
        switches = {**ONE_LINE, "lenient": not tool.strict}
        schema = {**json.loads(tool.parameters), "x-guidance": switches}
        lines.append(f"a{n}: %json {json.dumps(schema, ensure_ascii=False)}")
    lines += _answers(dialect, tokenizer, choice.required, parallel)
    return Grammar.lark("\n".join(lines) + "\n", param="tools")


def _around(dialect: Dialect, tokenizer: Tokenizer, name: str) -> tuple[str, str]:
    """What stands before and after the arguments of a call, in Lark's notation."""
    if dialect is Dialect.MISTRAL_ARGS:
        return f"{literal(name)} {_marker(tokenizer, '[ARGS]')}", ""
    return literal(f'{{"name": "{name}", "{dialect.arguments}": '), literal("}")


def _answers(dialect: Dialect, tokenizer: Tokenizer, required: bool, parallel: bool) -> list[str]:
    """The rules from `start` down to `call`."""
    start = _marker(tokenizer, dialect.start)
    if dialect is Dialect.LLAMA:
        calls = 'call ("; " call)*' if parallel else "call"
        return [f"start: {calls}" if required else f"start: {calls} | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
    if dialect is Dialect.HERMES:
        rest, between = f'"\\n" call "\\n" {_marker(tokenizer, dialect.markers[1])}', '"\\n" '
    elif dialect is Dialect.MISTRAL:
        rest, between = ('"[" call (", " call)* "]"' if parallel else '"[" call "]"'), None
    else:
        rest, between = "call", ""
    more = f" ({between}{start} {rest})*" if parallel and between is not None else ""
    if required:
        return [f"start: {start} {rest}{more}"]
    # A lazy rule ends at the first mark: behind it, only a call can follow.
    many = "*" if parallel and between is not None else "?"
    first = "begun[lazy]: TEXT " + start if start.startswith('"') else "begun: TEXT " + start
    return [
        f"start: (begun {rest}){many} TEXT" if many == "*" else f"start: TEXT | begun {rest}",
        first,
        TEXT,
    ]


TEXT = r"TEXT: /(.|\n)*/"


def _marker(tokenizer: Tokenizer, text: str) -> str:
    """A mark in Lark's notation: the special token of that name if there is one, else its characters."""
    id = tokenizer.token_id(text)
    return f"<[{id}]>" if id is not None and id in tokenizer.special_ids else literal(text)


def _read_tool(tool: Mapping[str, Any]) -> Tool:
    if tool.get("type") != "function":
        raise InputError(f'A tool must be of type "function", got {tool.get("type")!r}.', param="tools")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise InputError("A tool's function must be an object.", param="tools")
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        message = f"A tool's name must be 1 to 64 letters, digits, _ or -, got {name!r}."
        raise InputError(message, param="tools")
    if not isinstance(description, str):
        raise InputError(f"The description of the tool {name!r} must be a string.", param="tools")
    parameters = function.get("parameters") or {}
    if isinstance(parameters, Mapping):
        parameters = {"type": "object", **parameters}
        if parameters["type"] != "object":
            raise InputError(f"The parameters of the tool {name!r} must be an object.", param="tools")
    return Tool(name, description, schema_text(parameters, "tools"), bool(function.get("strict")))


def _prepared(message: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """A message as templates expect it: arguments as objects, content as a string."""
    prepared = {key: value for key, value in message.items() if value is not None or key == "content"}
    if prepared.get("content") is None:
        prepared["content"] = ""
    short = dialect in (Dialect.MISTRAL, Dialect.MISTRAL_ARGS)
    if "tool_calls" in prepared:
        if prepared["tool_calls"]:
            prepared["tool_calls"] = [_prepared_call(call, short) for call in prepared["tool_calls"]]
        else:
            del prepared["tool_calls"]
    if short and "tool_call_id" in prepared:
        prepared["tool_call_id"] = _short(prepared["tool_call_id"])
    return prepared


def _prepared_call(call: Mapping[str, Any], short: bool) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("A tool call in the messages needs a function with a name.", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            message = f"The arguments of a call of {function['name']!r} in the messages are no JSON."
            raise InputError(message, param="messages") from error
    if not isinstance(arguments, Mapping):
        message = f"The arguments of a call of {function['name']!r} in the messages must be a JSON object."
        raise InputError(message, param="messages")
    id = str(call.get("id", ""))
    function = {"name": function["name"], "arguments": arguments}
    return {"id": _short(id) if short else id, "type": "function", "function": function}


def _short(id: object) -> str:
    """A call's id as Mistral's templates want it; the same for the call and its result."""
    text = str(id)
    return text if re.fullmatch(r"[a-zA-Z0-9]{9}", text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _explained(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: they are explained, calls and results are text."""
    explained: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if explained and explained[-1].get("results"):  # results of one round share a turn
                explained[-1]["content"] += "\n" + text
            else:
                explained.append({"role": "user", "content": text, "results": True})
        elif "tool_calls" in message:
            calls = [_written(call) for call in message["tool_calls"]]
            parts = [message["content"], *calls] if message["content"] else calls
            explained.append({"role": message["role"], "content": "\n".join(parts)})
        else:
            explained.append(dict(message))
    for message in explained:
        message.pop("results", None)
    if not tools:
        return explained
    section = _section(tools)
    if explained and explained[0]["role"] == "system":
        explained[0]["content"] = f"{explained[0]['content']}\n\n{section}".lstrip()
        return explained
    return [{"role": "system", "content": section}, *explained]


def _written(call: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"


def _section(tools: Sequence[Tool]) -> str:
    shown = "\n".join(json.dumps(tool.shown(), ensure_ascii=False) for tool in tools)
    return (
        "You can call functions to answer the user. Between <tools> and </tools> stands one function per line, "
        "with the JSON schema of its arguments:\n"
        f"<tools>\n{shown}\n</tools>\n"
        "When a function helps, answer with a call in exactly this form, a JSON object between two marks, "
        "and nothing after it; several calls follow one another:\n"
        '<tool_call>\n{"name": "the function\'s name", "arguments": {"argument": "value"}}\n</tool_call>\n'
        "The result then comes between <tool_response> and </tool_response>. "
        "When no function helps, answer in plain words."
    )
