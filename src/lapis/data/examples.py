"""What a model is fine-tuned on: chats, completions, preferences and prompts, one JSON object a line, each one checked.

{"messages": [{"role": "user", …}, {"role": "assistant", …, "weight": 0 or 1}], "tools": […]}   OpenAI, supervised
{"prompt": "…", "completion": "…"}
{"input": {"messages": […], "tools": […]}, "preferred_output": […], "non_preferred_output": […]}  OpenAI, DPO
{"prompt": "…" or […], "chosen": "…" or […], "rejected": "…" or […]}
{"messages": […], …} or {"prompt": "…" or […], …}: to be answered, with any other fields     OpenAI, reinforcement
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.errors import InputError
from lapis.hashing import digest_json
from lapis.tokenizer.tools import Tool, read_tools

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation. `trained` says of each turn of the assistant whether it is trained on."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on; only the second is trained on."""

    prompt: str
    completion: str


Text = Chat | Completion


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first."""

    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: messages, or a text to go on with. `fields` are the rest of the line, for a grader."""

    asked: tuple[Message, ...] | str
    fields: Mapping[str, Any]


Example = Chat | Completion | Preference | Prompt
Kind = Literal["texts", "preferences", "prompts"]


@dataclass(frozen=True)
class Line:
    """An example and where it stands. Equal lines have equal digests."""

    path: Path
    number: int
    example: Example
    digest: str

    @property
    def place(self) -> str:
        """File and line, as errors name them."""
        return f"{self.path}:{self.number}"


def is_chat(example: Example) -> bool:
    """Whether a chat template is needed to read an example."""
    if isinstance(example, Preference):
        return isinstance(example.chosen, Chat)
    return isinstance(example, Chat) or (isinstance(example, Prompt) and not isinstance(example.asked, str))


def read_examples(paths: Sequence[Path], kind: Kind) -> list[Line]:
    """All lines of all files, each one checked to be of that kind.

    Raises InputError naming file and line: not JSON, an unknown form or role, no assistant turn; or the file that
    is empty or cannot be read.
    """
    read = {"texts": _text, "preferences": _preference, "prompts": _prompt}[kind]
    return [line for path in paths for line in _read_file(path, read)]


def _read_file(path: Path, read: Callable[[Mapping[str, Any]], Example]) -> Iterator[Line]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"The examples {path} cannot be read: {error.strerror}.") from error
    found = 0
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        found += 1
        try:
            value = json.loads(raw)
            if not isinstance(value, dict):
                raise InputError("the line is no JSON object")
            yield Line(path, number, read(value), digest_json(value))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error.message}.", hint=error.hint) from error
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: the line is not JSON: {error}.",
                hint="A file of examples has one whole JSON object on every line.",
            ) from error
    if not found:
        raise InputError(
            f"{path} holds no examples: the file is empty.", hint="docs/finetune.md has the forms."
        )


def _text(value: Mapping[str, Any]) -> Chat | Completion:
    if "messages" in value:
        return _chat(value["messages"], value.get("tools"))
    if "prompt" in value and "completion" in value:
        return _completion(value["prompt"], value["completion"], "completion")
    raise _unknown(value, '{"messages": […]} or {"prompt": "…", "completion": "…"}')


def _preference(value: Mapping[str, Any]) -> Preference:
    if "preferred_output" in value and "non_preferred_output" in value:
        asked = value.get("input")
        if not isinstance(asked, dict) or "messages" not in asked:
            raise InputError('"input" is no object with "messages"')
        sides = [_answer(asked["messages"], value[key], asked.get("tools"), key)
                 for key in ("preferred_output", "non_preferred_output")]  # fmt: skip
        return Preference(*sides)
    if {"prompt", "chosen", "rejected"} <= value.keys():
        if isinstance(value["prompt"], str):
            texts = [_completion(value["prompt"], value[key], key) for key in ("chosen", "rejected")]
            return Preference(*texts)
        chats = [
            _answer(value["prompt"], value[key], value.get("tools"), key) for key in ("chosen", "rejected")
        ]
        return Preference(*chats)
    forms = (
        '{"input": …, "preferred_output": …, "non_preferred_output": …} or {"prompt", "chosen", "rejected"}'
    )
    raise _unknown(value, forms)


def _prompt(value: Mapping[str, Any]) -> Prompt:
    key = next((key for key in ("messages", "prompt") if key in value), None)
    if key is None:
        raise _unknown(value, '{"messages": […], …} or {"prompt": "…" or […], …}')
    if "tools" in value:
        raise InputError("prompts with tools are not taken")
    asked, fields = value[key], {name: field for name, field in value.items() if name != key}
    if key == "prompt" and isinstance(asked, str):
        if not asked:
            raise InputError('"prompt" is empty: there is nothing to go on with')
        return Prompt(asked, fields)
    messages = _chat(asked, None, answered=False).messages
    if messages[-1]["role"] == "assistant":
        raise InputError("the chat ends with the assistant's turn: there is nothing to answer")
    return Prompt(messages, fields)


def _unknown(value: Mapping[str, Any], forms: str) -> InputError:
    keys = ", ".join(map(repr, value)) or "none"
    return InputError(f"the keys of the line are {keys}; expected was {forms}")


def _completion(prompt: Any, completion: Any, key: str) -> Completion:
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InputError(f'"prompt" and "{key}" are texts')
    if not completion:
        raise InputError(f'"{key}" is empty: there is nothing to train on')
    return Completion(prompt, completion)


def _answer(asked: Any, answer: Any, tools: Any, key: str) -> Chat:
    """A prompt's messages and one of its answers: only the answer is trained on."""
    if not isinstance(asked, list) or not isinstance(answer, list):
        raise InputError(f'the messages before "{key}", or "{key}" itself, are no list of messages')
    before, said = _chat(asked, tools, answered=False), _chat(answer, None)
    trained = (False,) * len(before.trained) + said.trained
    return Chat(before.messages + said.messages, trained, before.tools)


def _chat(messages: Any, tools: Any, answered: bool = True) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise InputError('"messages" is no list of messages, or an empty one')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError('"tools" is no list of objects')
    read = [_message(message, number) for number, message in enumerate(messages)]
    kept = tuple(message for message, _ in read)
    trained = tuple(counts for message, counts in read if message["role"] == "assistant")
    if answered and not any(trained):
        without = "assistant turns of weight 0 only" if trained else "no assistant turn"
        raise InputError(f"the chat has {without}: there is nothing to train on")
    return Chat(kept, trained, read_tools(tools or ()))


def _message(message: Any, number: int) -> tuple[Message, bool]:
    """A message without its weight, and whether it is trained on."""
    where = f"message {number}"
    if not isinstance(message, dict):
        raise InputError(f"{where} is no object")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        raise InputError(f"{where} has the unknown role {role!r}; known: {', '.join(ROLES)}")
    if content is None and (role != "assistant" or not message.get("tool_calls")):
        raise InputError(f"{where} has no content")
    if content is not None and not isinstance(content, str):
        content = _parts(content, where)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise InputError(f"{where} has the weight {weight!r}; it is 0 or 1")
    kept = {key: value for key, value in message.items() if key != "weight"}
    return {**kept, "content": content or ""}, weight == 1


def _parts(content: Any, where: str) -> str:
    """Content as a list of parts: texts only, joined."""
    good = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
    if not good:
        raise InputError(f"{where} has content that is neither a text nor a list of texts")
    return "".join(part["text"] for part in content)
