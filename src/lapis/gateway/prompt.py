"""Prompts as token ids, and the room that a context leaves for their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lapis.errors import InputError
from lapis.inference.engine import Engine


def chat_prompt(engine: Engine, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """A conversation that waits for its answer. Raises InputError for a model without a chat template."""
    if engine.chat is None:
        raise InputError(
            f"{engine.name!r} has no chat template: it continues text, it does not chat.",
            hint="Use /v1/completions.",
            param="messages",
        )
    return tuple(engine.chat.prompt(messages, engine.tokenizer))


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
