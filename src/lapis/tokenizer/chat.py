"""Chat templates: messages to text, and to token ids with the mask of what an assistant said."""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from lapis.errors import InputError
from lapis.tokenizer.bpe import Tokenizer

Messages = Sequence[Mapping[str, Any]]

WALL_SECONDS = 30.0  # backstop: the sandbox ends itself after a second of CPU time

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTokens(NamedTuple):
    """Token ids of a conversation; `mask` is True where an assistant's words (and their end) stand."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class ChatTemplate:
    """A Hugging Face chat template (jinja2), rendered in a separate, limited process unless it is the built-in one."""

    template: str
    bos: str = ""
    eos: str = ""
    _sandbox: Sandbox = field(default_factory=lambda: Sandbox(), repr=False, compare=False)

    @property
    def ours(self) -> bool:
        """Whether it is the built-in template, which is no stranger's program."""
        return self.template == CHATML

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Raises InputError if the template refuses, fails or takes too much."""
        return self._render(messages, add_generation_prompt)

    def prompt(self, messages: Messages, tokenizer: Tokenizer, tools: Messages = ()) -> list[int]:
        """Token ids of a conversation that waits for its answer; `tools` for a template that renders them.

        Special-token text inside a message or tool stays text: only the template can open or close a turn.
        """
        marker = _free_marker([*messages, *tools])
        marked = [_mark(message, marker, tokenizer) for message in messages]
        text = self._render(marked, True, [_mark(tool, marker, tokenizer) for tool in tools])
        return _encode(text, marker, tokenizer)

    def encode(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        tools: Messages = (),
        trained: Sequence[bool] | None = None,
    ) -> ChatTokens:
        """Token ids for training, and which of them an assistant said.

        Each assistant text is encoded by itself after its prompt, as a served model produces it. `trained` says
        of each assistant turn whether it counts; by default all do. Raises InputError if the template rewrites
        earlier turns, so that no turn has a place of its own.
        """
        marker = _free_marker([*messages, *tools])
        marked = [_mark(message, marker, tokenizer) for message in messages]
        shown = [_mark(tool, marker, tokenizer) for tool in tools]
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        turns = [n for n, message in enumerate(marked) if message["role"] == "assistant"]
        for n, counts in zip(turns, trained or (True,) * len(turns), strict=True):
            prompt = self._render(marked[:n], add_generation_prompt=True, tools=shown)
            whole = self._render(marked[: n + 1], add_generation_prompt=False, tools=shown)
            before = _encode(_rest(done, prompt), marker, tokenizer)
            answer = _encode(_rest(prompt, whole), marker, tokenizer)
            said = _said(answer, tokenizer) if counts else 0
            ids += before + answer
            mask += [False] * len(before) + [True] * said + [False] * (len(answer) - said)
            done = whole
        rest = _encode(_rest(done, self._render(marked, False, shown)), marker, tokenizer)
        return ChatTokens(ids + rest, mask + [False] * len(rest))

    def close(self) -> None:
        """End the process that renders; it starts again when it is needed."""
        self._sandbox.close()

    def _render(self, messages: Messages, add_generation_prompt: bool, tools: Messages = ()) -> str:
        if self.ours:
            return _chatml(messages, add_generation_prompt)
        variables = {
            "messages": [dict(message) for message in messages],
            "bos_token": self.bos,
            "eos_token": self.eos,
            "add_generation_prompt": add_generation_prompt,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
        }
        return self._sandbox.render(self.template, variables)


def _chatml(messages: Messages, add_generation_prompt: bool) -> str:
    """What CHATML renders."""
    turns = [f"<|im_start|>{m.get('role', '')}\n{m.get('content', '')}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


class Sandbox:
    """The process that renders; started at the first use, again after a template has killed it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ending: weakref.finalize[Any, Any] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """Text of a template. Raises InputError."""
        with self._lock:
            try:
                line = self._ask(json.dumps({"template": template, "variables": variables}))
            except TypeError as error:
                raise InputError(
                    f"The messages cannot be written as JSON: {error}.", param="messages"
                ) from error
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            reason = answer["error"].rstrip(".")
            raise InputError(f"The chat template cannot render these messages: {reason}.", param="messages")
        return answer["text"]

    def close(self) -> None:
        """End the process."""
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None

    def _ask(self, request: str) -> str:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = _read_line(process.stdout)
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            return line
        self.close()
        raise InputError(
            "The chat template was stopped: it took more than a second of CPU time.",
            hint="Use another template, or the built-in one (ChatML).",
        )

    def _start(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        command = [sys.executable, "-I", "-m", "lapis.tokenizer.sandbox"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", close_fds=True)
        self._ending = weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it died with our request unread
    process.wait()


def _read_line(stream: IO[str]) -> str:
    with (
        selectors.DefaultSelector() as selector
    ):  # select() takes no descriptor from 1,024 on: a busy server has more
        selector.register(stream, selectors.EVENT_READ)
        ready = selector.select(WALL_SECONDS)
    return stream.readline() if ready else ""


def _said(answer: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer a model must produce: up to the one that ends the turn, if any."""
    ends = [n for n, id in enumerate(answer) if id in tokenizer.stop_ids]
    return ends[-1] + 1 if ends else len(answer)


def _rest(start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise InputError(
            "This chat template rewrites earlier turns, so what an assistant said cannot be told apart.",
            hint="Train with a template that only appends, such as the built-in one (ChatML).",
        )
    return whole[len(start) :]


def _free_marker(messages: Messages) -> str:
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False, default=str)
    return next(mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in text)


def _mark(value: Any, marker: str, tokenizer: Tokenizer) -> Any:
    """Break the text of special tokens inside a message with a character that Unicode keeps for such uses."""
    if isinstance(value, str):
        for name in tokenizer.special_tokens:
            value = value.replace(name, name[0] + marker + name[1:])
        return value
    if isinstance(value, Mapping):
        return {_mark(key, marker, tokenizer): _mark(item, marker, tokenizer) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mark(item, marker, tokenizer) for item in value]
    return value


def _encode(text: str, marker: str, tokenizer: Tokenizer) -> list[int]:
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
        special = tokenizer.special_tokens.get(part)
        if special is not None:
            ids.append(special)
        elif part:
            ids.extend(tokenizer.encode(part.replace(marker, "")))
    return ids
