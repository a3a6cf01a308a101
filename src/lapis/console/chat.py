"""Questions of the playground, asked of the gateway as the API asks them: same models, limits and metering."""

from __future__ import annotations

import asyncio
import codecs
import math
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pprint import pformat
from typing import Any

from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.prompt import Conversation, answer_tokens, bound, chat_prompt
from lapis.gateway.services import Services
from lapis.inference.engine import Engine, prompt_ids
from lapis.inference.request import Output, SamplingParams, TokenLogprob
from lapis.tenants.keys import Identity
from lapis.tokenizer.tools import ToolPrompt

OTHERS = 5  # likely tokens told beside the chosen one

Messages = Sequence[Mapping[str, str]]
Token = dict[str, Any]  # for the browser: text t, probability p, the others as [text, probability]


@dataclass(frozen=True)
class Settings:
    """How an answer is chosen. It has `max_tokens` at most, and what the context has room for."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    odds: bool = True  # whether to tell each token's probability


async def ask(
    services: Services, identity: Identity, model: str, messages: Messages, settings: Settings
) -> Generation:
    """Hand a conversation to a model. One without a chat template continues the last message's text.

    Raises NotFoundError, InputError, LimitError, UnavailableError. The caller closes the generation.
    """
    deployment = services.router.find(model, identity)
    engine = await deployment.engine()
    asked = await asyncio.to_thread(_prompt, engine, messages)
    room = answer_tokens(engine, asked.ids, None)
    params = SamplingParams(
        max_tokens=min(room, settings.max_tokens or room),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        logprobs=OTHERS if settings.odds else None,
    )
    question = Ask(
        f"play-{uuid.uuid4().hex}", identity, model, [Prompt(tuple(asked.ids), bound(params, asked))]
    )
    return await Generation.start(question, deployment, services.meter, services.counters)


async def tokens(generation: Generation) -> AsyncIterator[list[Token]]:
    """What is new to show, as it comes. Raises LapisError if the engine failed."""
    writer = _Writer()
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            if shown := writer.write(piece.output):
                yield shown


def python_code(base_url: str, model: str, messages: Messages, settings: Settings) -> str:
    """A program that asks the same of the API, through the official client."""
    options = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_completion_tokens": settings.max_tokens,
        "seed": settings.seed,
    }
    given = [f"    {name}={value!r}," for name, value in options.items() if value is not None]
    said = pformat([dict(message) for message in messages], width=100, sort_dicts=False).replace(
        "\n", "\n    "
    )
    return "\n".join(
        [
            "from openai import OpenAI",
            "",
            f"client = OpenAI(base_url={base_url!r})  # the key comes from OPENAI_API_KEY",
            "stream = client.chat.completions.create(",
            f"    model={model!r},",
            f"    messages={said},",
            *given,
            "    stream=True,",
            ")",
            "for chunk in stream:",
            "    if chunk.choices:",
            '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
            "",
        ]
    )


def _prompt(engine: Engine, messages: Messages) -> ToolPrompt:
    if engine.chat is None:
        return ToolPrompt(prompt_ids(engine, messages[-1]["content"]))
    return chat_prompt(engine, Conversation(messages))


class _Writer:
    """Tokens with their text: bytes of an unfinished character wait for the rest of it."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def write(self, output: Output) -> list[Token]:
        if not output.logprobs:
            return [{"t": output.text, "p": 1.0, "top": []}] if output.text else []
        shown = [self._token(token) for token in output.logprobs]
        if output.finish_reason == "stop" and not output.text:
            shown.pop()  # the end token is no text
        return shown

    def _token(self, token: TokenLogprob) -> Token:
        others = [
            [_text(other), math.exp(other.logprob)] for other in token.top if other.token_id != token.token_id
        ]
        return {"t": self._decode(token.token), "p": math.exp(token.logprob), "top": others}


def _text(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", "replace")
