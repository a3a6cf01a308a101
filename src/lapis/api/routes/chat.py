"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lapis.api.answer import ChunkWriter, facts, finish, new_id, one_answer, stream, usage
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.logprobs import chat_logprobs
from lapis.api.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
)
from lapis.api.streaming import DONE, TEXT
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.prompt import answer_tokens, chat_prompt
from lapis.gateway.services import Services
from lapis.inference.request import Output
from lapis.tenants.keys import Identity

router = APIRouter()
Body = Annotated[ChatRequest, Depends(json_body(ChatRequest))]


@router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=json_schema(ChatRequest))
async def create_chat_completion(
    request: Request, services: ServicesOf, caller: User, body: Body
) -> Response:
    """Answer a conversation, at once or as a stream of server-sent events."""
    start = _start(services, caller, body)
    if not body.stream:
        return await one_answer(request, start, _whole)
    return await stream(request, start, lambda generation: _events(generation, body))


async def _start(services: Services, caller: Identity, body: ChatRequest) -> Generation:
    deployment = services.router.find(body.model)
    engine = await deployment.engine()
    messages = [message.for_template() for message in body.messages]
    ids = await asyncio.to_thread(chat_prompt, engine, messages)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    params = body.sampling(answer_tokens(engine, ids, body.limit, name), body.alternatives)
    ask = Ask(new_id("chatcmpl"), caller, body.model, [Prompt(ids, params)], body.choices)
    return await Generation.start(ask, deployment, services.meter, services.counters)


async def _whole(generation: Generation) -> ChatCompletion:
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=output.text),
            logprobs=_logprobs(generation, output),
            finish_reason=finish(output) or "stop",
        )
        for index, output in enumerate(await generation.whole())
    ]
    return ChatCompletion(**facts(generation), choices=choices, usage=usage(generation))


async def _events(generation: Generation, body: ChatRequest) -> AsyncGenerator[str, None]:
    head, write = facts(generation), ChunkWriter(body.with_usage)

    def choice(index: int, delta: Delta, **more: Any) -> ChatChunk:
        return ChatChunk(**head, choices=[ChatChunkChoice(index=index, delta=delta, **more)])

    texts = [write.text_event(choice(index, Delta(content=TEXT))) for index in range(body.choices)]
    for index in range(body.choices):
        yield write.event(choice(index, Delta(role="assistant", content="")))
    async for index, output in generation.pieces():
        events = ""
        if output.logprobs:
            logprobs = _logprobs(generation, output)
            events = write.event(choice(index, Delta(content=output.text), logprobs=logprobs))
        elif output.text:
            events = texts[index](output.text)
        if output.finish_reason is not None:
            events += write.event(choice(index, Delta(), finish_reason=finish(output)))
        if events:
            yield events
    if body.with_usage:
        yield write.event(ChatChunk(**head, choices=[], usage=usage(generation)))
    yield DONE


def _logprobs(generation: Generation, output: Output) -> ChatLogprobs | None:
    wanted = generation.ask.prompts[0].params.logprobs is not None
    return chat_logprobs(output.logprobs) if wanted else None
