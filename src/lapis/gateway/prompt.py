"""Prompts as token ids, and the room that a context leaves for their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lapis.errors import InputError
from lapis.inference.engine import Engine
from lapis.inference.request import SamplingParams
from lapis.tokenizer.grammar import Grammar
from lapis.tokenizer.tools import Tool, ToolChoice, ToolPrompt, prompt_with_tools

SHORT = 4096  # characters: so few are a prompt before a thread is woken for them


@dataclass(frozen=True)
class Conversation:
    """What a chat asks for: its messages, and the tools and the form that bind the answer."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    form: Grammar | None = None

    @property
    def short(self) -> bool:
        """Whether it is plain text, and little."""
        if self.tools or self.form is not None:
            return False
        values = [value for message in self.messages for value in message.values()]
        return all(isinstance(value, str) for value in values) and sum(map(len, values)) <= SHORT


async def prompt_soon(engine: Engine, conversation: Conversation) -> ToolPrompt:
    """As chat_prompt, in a thread where it could take long."""
    if conversation.short and engine.chat is not None and engine.chat.ours:
        return chat_prompt(engine, conversation)
    return await asyncio.to_thread(chat_prompt, engine, conversation)


def chat_prompt(engine: Engine, conversation: Conversation) -> ToolPrompt:
    """A conversation that waits for its answer, and how the answer is bound and read.

    Compiles the answer's grammar, so call it in a thread, or `prompt_soon`. Raises InputError for a model without a
    chat template, and for a grammar that cannot be enforced.
    """
    if engine.chat is None:
        raise InputError(
            f"{engine.name!r} has no chat template: it continues text, it does not chat.",
            hint="Use /v1/completions.",
            param="messages",
        )
    tools, choice = conversation.tools, conversation.choice
    if conversation.form is not None and tools and choice.calls:
        raise InputError(
            "An answer whose form is bound cannot call tools as well.",
            hint='Leave one of the two out, or send "tool_choice": "none".',
            param=conversation.form.param,
        )
    asked = prompt_with_tools(
        engine.chat, engine.tokenizer, conversation.messages, tools, choice, parallel=conversation.parallel
    )
    asked = asked if conversation.form is None else replace(asked, grammar=conversation.form)
    if asked.grammar is not None:
        engine.prepare(asked.grammar)
    return asked


def bound(params: SamplingParams, asked: ToolPrompt) -> SamplingParams:
    """How tokens are chosen for an answer that must keep to a grammar or may hold calls."""
    return replace(params, structure=asked.grammar, visible_ids=asked.visible_ids)


def answer_tokens(engine: Engine, prompt: Sequence[int], limit: int | None, param: str = "max_tokens") -> int:
    """How many tokens an answer may have: `limit`, or what the context leaves. Raises InputError beyond."""
    room = engine.context - len(prompt)
    if limit is None or room < 1:  # a prompt without room is refused by its own check
        return max(room, 1)
    if limit > room:
        raise InputError(
            f"{param} = {limit:,} is too large: the context is {engine.context:,} tokens, "
            f"the prompt has {len(prompt):,}, which leaves {room:,}.",
            param=param,
        )
    return limit
