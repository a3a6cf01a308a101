"""`lapis chat`: talk with a model in this process, streaming, in the terminal or in a script."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, say
from lapis.errors import ConfigError, InputError, LapisError
from lapis.home import Home

if TYPE_CHECKING:
    from lapis.inference.engine import Engine
    from lapis.inference.request import Output

LEAST_ROOM = 16  # tokens that an answer must have at least; older messages make room for it
HISTORY_LINES = 1000


@click.command("chat")
@click.argument("model")
@click.option("--once", metavar="PROMPT", help="Answer this one prompt and end.")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option(
    "--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 2), help="0 = greedy."
)
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answers.")
@json_option
def command(
    model: str,
    once: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Talk with a model. A model without a chat template continues each text that it is given.

    Ctrl-C stops an answer; twice, or Ctrl-D, ends. What is piped in is one prompt: lapis chat MODEL < FILE
    """
    if once is None and not _is_typed():
        once = sys.stdin.read()
    if as_json and once is None:
        raise ConfigError(
            "--json answers one prompt, not a conversation.", hint="Give it with --once PROMPT."
        )
    if once is not None and not once.strip():
        raise InputError("The prompt is empty.")
    home = Home.default()
    with loaded_engine(home, model) as engine:
        conversation = Conversation(engine, Settings(max_tokens, temperature, seed), system)
        if once is None:
            _converse(conversation, home)
        elif as_json:
            print_json(_facts(conversation, once))
        else:
            conversation.ask(once, _show)
            say()


@contextmanager
def loaded_engine(home: Home, name: str) -> Iterator[Engine]:
    """The engine of a servable model. Raises NotFoundError, ConflictError, IntegrityError."""
    from lapis.db import open_database
    from lapis.inference.engine import LocalEngine
    from lapis.release.registry import Registry

    db = open_database(home.database_url)
    try:
        servable = Registry(home, db).resolve(name)
    finally:
        db.dispose()
    engine = LocalEngine.load(servable.folder, name)
    try:
        yield engine
    finally:
        engine.close()


@dataclass(frozen=True)
class Settings:
    """How answers are made."""

    max_tokens: int
    temperature: float
    seed: int | None


@dataclass
class Conversation:
    """Messages so far, and an engine that answers the next one."""

    engine: Engine
    settings: Settings
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0  # messages that no longer fit into the context

    def ask(self, text: str, show: Callable[[str], None]) -> Output:
        """The model's answer, shown as it comes. Ctrl-C raises KeyboardInterrupt and drops the question."""
        self.messages.append({"role": "user", "content": text})
        try:
            output = asyncio.run(self._answer(self._prompt(text), show))
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": output.text})
        return output

    async def _answer(self, ids: list[int], show: Callable[[str], None]) -> Output:
        from lapis.inference.request import Request, SamplingParams, join_outputs

        settings, room = self.settings, self.engine.context - len(ids)
        params = SamplingParams(
            max_tokens=max(1, min(settings.max_tokens, room)),
            temperature=settings.temperature,
            seed=settings.seed,
        )
        outputs = []
        async for output in self.engine.submit(Request("chat", ids, params)):
            show(output.text)
            outputs.append(output)
        whole = join_outputs(outputs)
        if whole.finish_reason == "error":
            raise LapisError(f"The engine ended the answer: {whole.error}.")
        return whole

    def _prompt(self, text: str) -> list[int]:
        from lapis.inference.engine import prompt_ids

        if self.engine.chat is None:
            return prompt_ids(self.engine, f"{self.system}\n\n{text}" if self.system else text)
        system = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            ids = self.engine.chat.prompt([*system, *self.messages], self.engine.tokenizer)
            if len(ids) + LEAST_ROOM <= self.engine.context or len(self.messages) == 1:
                return ids
            self.forgotten += 2
            del self.messages[:2]


def _converse(conversation: Conversation, home: Home) -> None:
    kind = "chats" if conversation.engine.chat else "continues text (it has no chat template)"
    say(f"{conversation.engine.name} {kind}. Ctrl-C stops an answer, Ctrl-D ends.")
    with _history(home):
        while True:
            text = _read()
            if text is None:
                return
            forgotten = conversation.forgotten
            try:
                conversation.ask(text, _show)
            except KeyboardInterrupt:
                say(" [stopped]")
                continue
            except InputError as error:  # this text cannot be answered, the next one may
                say(f"error: {error}")
                continue
            say()
            if conversation.forgotten > forgotten:
                say(f"[the context is full: {conversation.forgotten} old messages were left out]")


def _read() -> str | None:
    """The next text that is not empty; None at the end. Raises KeyboardInterrupt at the second Ctrl-C."""
    interrupted = False
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            say()
            return None
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            say("\n[Ctrl-C again ends]")
            continue
        if text:
            return text


@contextmanager
def _history(home: Home) -> Iterator[None]:
    """Arrow keys find the texts of earlier conversations again, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = home.root / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        readline.write_history_file(path)


def _facts(conversation: Conversation, prompt: str) -> dict[str, Any]:
    started = time.monotonic()
    output = conversation.ask(prompt, lambda text: None)
    seconds = time.monotonic() - started
    return {
        "model": conversation.engine.name,
        "prompt": prompt,
        "answer": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "seconds": round(seconds, 3),
    }


def _is_typed() -> bool:
    """Whether a person types at a terminal, rather than a file or a pipe speaking."""
    return sys.stdin.isatty()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
