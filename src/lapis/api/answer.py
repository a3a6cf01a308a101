"""What chat and text completions share: one answer or a stream, cancelled when the client hangs up."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Literal, TypedDict

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from lapis.api.protocol.generation import CompletionDetails, PromptDetails, Usage
from lapis.api.rate_limits import limit_headers
from lapis.api.streaming import EventStream, TextEvent, event, model_json, while_connected
from lapis.gateway.generation import Generation
from lapis.inference.request import Output
from lapis.tokenizer.tool_parser import TextDelta, ToolCallDelta, ToolParser

Whole = Callable[[Generation], Awaitable[BaseModel]]
Events = Callable[[Generation], AsyncGenerator[str, None]]


class Facts(TypedDict):
    """The fields that every answer and chunk of one request repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def new_id(kind: str, separator: str = "-") -> str:
    """An id for an answer."""
    return f"{kind}{separator}{uuid.uuid4().hex}"


def facts(generation: Generation) -> Facts:
    """Id, time, model and the weights' fingerprint."""
    return Facts(
        id=generation.ask.id,
        created=generation.created,
        model=generation.ask.model,
        system_fingerprint=f"lapis-{generation.digest[:12]}",
    )


def usage(generation: Generation) -> Usage:
    """The tokens of a request so far."""
    used = generation.usage
    return Usage(
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        total_tokens=used.total_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=used.cached_tokens),
        completion_tokens_details=CompletionDetails(),
    )


def finish(output: Output) -> Literal["stop", "length"] | None:
    """Why an answer ended, if it did; errors were raised before."""
    assert output.finish_reason != "error"
    return output.finish_reason


def parsed(parser: ToolParser | None, output: Output) -> tuple[str, list[ToolCallDelta]]:
    """What is new to read, and the calls that are complete now."""
    if parser is None:
        return output.text, []
    deltas = parser.push(output.text)
    if output.finish_reason is not None:
        deltas += parser.finish()
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    return text, [delta for delta in deltas if isinstance(delta, ToolCallDelta)]


async def one_answer(request: Request, start: Coroutine[Any, Any, Generation], write: Whole) -> Response:
    """The whole answer as JSON. A client that hangs up cancels it."""

    async def work() -> Response:
        generation = await start
        try:
            answer = await write(generation)
        finally:
            generation.close()
        headers = limit_headers(generation.limits)
        return Response(answer.model_dump_json(), headers=headers, media_type="application/json")

    return await while_connected(request.receive, work())


async def stream(request: Request, start: Coroutine[Any, Any, Generation], write: Events) -> Response:
    """The answer as server-sent events. What is wrong with the request is still told by the status."""
    generation = await while_connected(request.receive, start)
    return EventStream(write(generation), generation.close, limit_headers(generation.limits))


class ChunkWriter:
    """Chunks of a stream as events; `usage` is a field of theirs only where it was asked for."""

    def __init__(self, with_usage: bool) -> None:
        self._left_out = None if with_usage else {"usage"}

    def event(self, chunk: BaseModel) -> str:
        """The event of one chunk."""
        return event(model_json(chunk, self._left_out))

    def text_event(self, chunk: BaseModel) -> TextEvent:
        """Events like the one of a chunk that has TEXT as its text."""
        return TextEvent(self.event(chunk))
