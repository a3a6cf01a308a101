"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lapis.api.answer import ChunkWriter, facts, finish, new_id, one_answer, stream, usage
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.logprobs import TextLogprobsWriter
from lapis.api.protocol.completions import CompletionRequest, TextChoice, TextCompletion, TextLogprobs
from lapis.api.streaming import DONE, TEXT
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.prompt import answer_tokens
from lapis.gateway.services import Services
from lapis.inference.engine import Engine, prompt_ids
from lapis.inference.request import Output
from lapis.tenants.keys import Identity

router = APIRouter()
Body = Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]


@router.post("/v1/completions", response_model=TextCompletion, openapi_extra=json_schema(CompletionRequest))
async def create_completion(request: Request, services: ServicesOf, caller: User, body: Body) -> Response:
    """Continue one text or several, at once or as a stream of server-sent events."""
    start = _start(services, caller, body)
    if not body.stream:
        return await one_answer(request, start, _whole)
    return await stream(request, start, lambda generation: _events(generation, body))


async def _start(services: Services, caller: Identity, body: CompletionRequest) -> Generation:
    deployment = services.router.find(body.model)
    prompts = await asyncio.to_thread(_prompts, await deployment.engine(), body)
    ask = Ask(new_id("cmpl"), caller, body.model, prompts, body.choices)
    return await Generation.start(ask, deployment, services.meter, services.counters)


def _prompts(engine: Engine, body: CompletionRequest) -> list[Prompt]:
    prompts = []
    for prompt in body.prompt:
        ids = tuple(prompt_ids(engine, prompt)) if isinstance(prompt, str) else prompt
        prompts.append(Prompt(ids, body.sampling(answer_tokens(engine, ids, body.limit), body.logprobs)))
    return prompts


async def _whole(generation: Generation) -> TextCompletion:
    outputs = await generation.whole()
    choices = [
        TextChoice(
            index=index,
            text=output.text,
            logprobs=_logprobs(generation, output, TextLogprobsWriter()),
            finish_reason=finish(output),
        )
        for index, output in enumerate(outputs)
    ]
    return TextCompletion(**facts(generation), choices=choices, usage=usage(generation))


async def _events(generation: Generation, body: CompletionRequest) -> AsyncGenerator[str, None]:
    head, write = facts(generation), ChunkWriter(body.with_usage)

    def choice(index: int, text: str, **more: Any) -> TextCompletion:
        return TextCompletion(**head, choices=[TextChoice(index=index, text=text, **more)])

    count = len(body.prompt) * body.choices
    texts = [write.text_event(choice(index, TEXT)) for index in range(count)]
    writers: defaultdict[int, TextLogprobsWriter] = defaultdict(TextLogprobsWriter)
    async for index, output in generation.pieces():
        if output.logprobs or output.finish_reason is not None:
            logprobs = _logprobs(generation, output, writers[index])
            yield write.event(choice(index, output.text, logprobs=logprobs, finish_reason=finish(output)))
        elif output.text:
            yield texts[index](output.text)
    if body.with_usage:
        yield write.event(TextCompletion(**head, choices=[], usage=usage(generation)))
    yield DONE


def _logprobs(generation: Generation, output: Output, writer: TextLogprobsWriter) -> TextLogprobs | None:
    wanted = generation.ask.prompts[0].params.logprobs is not None
    return writer.write(output.logprobs) if wanted else None
