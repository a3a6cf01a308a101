"""The way back from a model's text to tool calls, while the text still comes.

`ToolParser.push(text)` gives what is sure by now: TextDelta for what the user reads, ToolCallDelta for a call.
A call is given when it is complete and makes sense, all of it in one delta, so that a malformed one can still
come back as text: unknown function, arguments that are no JSON object, an end that never came.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

END = "</tool_call>"
SPECIAL = re.compile(r'["\\{}\[\]]')


class Dialect(Enum):
    """How a model writes calls down."""

    HERMES = "hermes"  # <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>, one after the other
    LLAMA = "llama"  # the whole answer is {"name": …, "parameters": {…}}; several with ; between
    MISTRAL = "mistral"  # [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
    MISTRAL_ARGS = "mistral-args"  # [TOOL_CALLS]name[ARGS]{…}, one after the other

    @property
    def start(self) -> str:
        """The text that announces a call."""
        if self is Dialect.HERMES:
            return "<tool_call>"
        return "<|python_tag|>" if self is Dialect.LLAMA else "[TOOL_CALLS]"

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts around calls, which may be special tokens of the model."""
        if self is Dialect.HERMES:
            return self.start, END
        return (self.start, "[ARGS]") if self is Dialect.MISTRAL_ARGS else (self.start,)

    @property
    def arguments(self) -> str:
        """The key under which a call has its arguments."""
        return "parameters" if self is Dialect.LLAMA else "arguments"

    def new_id(self) -> str:
        """A fresh name for a call. Mistral's templates want exactly nine letters and digits."""
        if self in (Dialect.MISTRAL, Dialect.MISTRAL_ARGS):
            return secrets.token_hex(5)[:9]
        return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A call: its place among the answer's calls, its id, the function's name, the arguments as JSON text."""

    index: int
    id: str
    name: str
    arguments: str


Delta = TextDelta | ToolCallDelta


class JsonEnd:
    """Finds where a JSON object or array ends; looks at every character once, however it arrives."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._at = 0
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """The place behind the value that `text` begins with (the same text or a longer one each time)."""
        while self._end is None and (found := SPECIAL.search(text, self._at)) is not None:
            char, self._at = found[0], found.end()
            if char == "\\":
                if self._at == len(text):  # what it escapes has not come yet
                    self._at -= 1
                    return None
                self._at += 1
            elif char == '"':
                self.in_string = not self.in_string
            elif not self.in_string:
                self.depth += 1 if char in "{[" else -1
                if self.depth <= 0:
                    self._end = self._at
        if self._end is None:
            self._at = len(text)
        return self._end


class ToolParser:
    """Splits an answer into text and calls of the functions `names`; at most `limit` calls, if given."""

    def __init__(self, dialect: Dialect, names: Collection[str], limit: int | None = None) -> None:
        self.calls = 0
        self._dialect = dialect
        self._names = frozenset(names)
        self._limit = limit
        self._held = ""  # not decided yet
        self._call: JsonEnd | None = None  # `_held` begins with a call's start
        self._begun = False  # some text that is no white space has been seen
        self._space = ""  # white space that is dropped if a call follows

    def push(self, text: str) -> list[Delta]:
        """What is certain after this piece of the answer."""
        self._held += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return _joined(deltas)

    def finish(self) -> list[Delta]:
        """The rest, once no more text can come: a call that is complete but for its closing mark, else text."""
        deltas: list[Delta] = []
        if self._call is not None:
            self._end_call(deltas)
        held, self._held = self._held, ""
        self._text(held, deltas)
        if not self.calls and self._space:
            deltas.append(TextDelta(self._space))
        self._space = ""
        return _joined(deltas)

    def _step(self, deltas: list[Delta]) -> bool:
        """Decide about the beginning of what is held; False if that takes more text."""
        if self._call is not None:
            return self._continue_call(deltas)
        if self._dialect is Dialect.LLAMA:
            return self._llama_start(deltas)
        start = self._dialect.start
        place = self._held.find(start)
        if place < 0:
            place = len(self._held) - _overlap(self._held, start)
            self._take_text(place, deltas)
            return False
        self._take_text(place, deltas)
        self._call = JsonEnd()
        return True

    def _llama_start(self, deltas: list[Delta]) -> bool:
        if self._begun:  # an answer that begins with text stays text
            self._take_text(len(self._held), deltas)
            return False
        seen = self._held.lstrip(" \n\t;" if self.calls else " \n\t")
        start = self._dialect.start
        if not seen or (len(seen) < len(start) and start.startswith(seen)):
            return False
        if seen.startswith((start, "{")):
            self._held = seen
            self._call = JsonEnd()
        else:
            self._begun = True
        return True

    def _continue_call(self, deltas: list[Delta]) -> bool:
        """Whether the call at the beginning of what is held has been decided."""
        assert self._call is not None
        start, body = self._parts()
        if not body:
            return False
        if self._dialect is Dialect.MISTRAL_ARGS or (
            self._dialect is Dialect.MISTRAL and body[0] not in "[{"
        ):
            return self._continue_named(start, deltas)
        if body[0] not in "[{":
            return self._give_up(start, deltas)
        end = self._call.find(body)
        if end is None:
            closing = body.rfind(END) if self._dialect is Dialect.HERMES else -1
            if closing > body.rfind('"') and not self._call.in_string:
                return self._give_up(start + closing, deltas)
            return False
        return self._finish_value(body[:end], start + end, deltas)

    def _continue_named(self, start: int, deltas: list[Delta]) -> bool:
        """The form of newer Mistral models: a name, [ARGS], an object."""
        assert self._call is not None
        body = self._held[start:]
        brace = body.find("{")
        if brace < 0:
            return len(body) > 100 and self._give_up(start, deltas)
        end = self._call.find(body[brace:])
        if end is None:
            return False
        name = body[:brace].removesuffix("[ARGS]").strip()
        arguments = body[brace : brace + end]
        value = {"name": name, "arguments": _loads(arguments)}
        return self._finish_value(value, start + brace + end, deltas)

    def _finish_value(self, value: Any, end: int, deltas: list[Delta]) -> bool:
        """A call's JSON has ended at `end` of what is held: give the calls, or the text that it was."""
        found = self._read(_loads(value) if isinstance(value, str) else value)
        if found is None:
            return self._give_up(end, deltas)
        rest = self._held[end:]
        if self._dialect is Dialect.HERMES:
            rest = rest.lstrip()
            if len(rest) < len(END) and END.startswith(rest):
                return False  # the closing mark may still come
            rest = rest.removeprefix(END)
        self._held = rest
        self._give_calls(found, deltas)
        return True

    def _give_calls(self, found: list[tuple[str, str]], deltas: list[Delta]) -> None:
        self._call = None
        self._space = ""
        for name, arguments in found:
            if self._limit is None or self.calls < self._limit:
                deltas.append(ToolCallDelta(self.calls, self._dialect.new_id(), name, arguments))
                self.calls += 1

    def _end_call(self, deltas: list[Delta]) -> None:
        """No more text comes: a call without its closing mark counts if its JSON is whole."""
        _, body = self._parts()
        end = JsonEnd().find(body) if body[:1] in ("[", "{") else None
        found = None if end is None else self._read(_loads(body[:end]))
        if found is not None:
            self._held = ""  # the beginning of the mark
            self._give_calls(found, deltas)
        self._call = None

    def _parts(self) -> tuple[int, str]:
        """Where the call's body begins in what is held, and the body."""
        held = self._held
        start = len(self._dialect.start) if held.startswith(self._dialect.start) else 0
        start += len(held[start:]) - len(held[start:].lstrip())
        return start, held[start:]

    def _read(self, value: Any) -> list[tuple[str, str]] | None:
        """Names and arguments of the calls in a JSON value; None if it is no call of a known function."""
        calls = value if isinstance(value, list) else [value]
        found = []
        for call in calls:
            if not isinstance(call, dict) or call.get("name") not in self._names:
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):  # some models write the arguments as a string of JSON
                arguments = _loads(arguments)
            if not isinstance(arguments, dict):
                return None
            if (text := _dumps(arguments)) is None:
                return None
            found.append((call["name"], text))
        return found or None

    def _give_up(self, end: int, deltas: list[Delta]) -> bool:
        """What is held is no call up to `end`: it is text."""
        text, self._held = self._held[:end], self._held[end:]
        self._call = None
        self._begun = True
        self._text(text, deltas)
        return True

    def _take_text(self, end: int, deltas: list[Delta]) -> None:
        text, self._held = self._held[:end], self._held[end:]
        self._text(text, deltas)

    def _text(self, text: str, deltas: list[Delta]) -> None:
        """Give text, but keep white space at its end back: between text and calls it means nothing."""
        whole = self._space + text
        kept = whole.rstrip()
        self._space = whole[len(kept) :]
        if kept:
            deltas.append(TextDelta(kept))


def _loads(text: str) -> Any:
    """The JSON value of a text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dumps(value: Any) -> str | None:
    """A JSON value as text that can be sent; None if it has a number that JSON has not."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(value)
    except ValueError:
        return None
    return text


def _overlap(text: str, start: str) -> int:
    """The length of the longest end of `text` that is a beginning of `start`."""
    for length in range(min(len(start) - 1, len(text)), 0, -1):
        if text.endswith(start[:length]):
            return length
    return 0


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring texts as one."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and isinstance(delta, TextDelta) and isinstance(joined[-1], TextDelta):
            joined[-1] = TextDelta(joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined
