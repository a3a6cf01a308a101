"""/v1/responses: answers that can be kept, and continued by their id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from lapis.api.answer import finish, new_id, one_answer, parsed, stream
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.logprobs import chat_logprobs
from lapis.api.protocol.items import Item, chat_messages
from lapis.api.protocol.responses import (
    LOGPROBS,
    DeletedResponse,
    InputDetails,
    InputRequest,
    InputTokens,
    ItemList,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
)
from lapis.api.response_writer import ResponseWriter
from lapis.errors import InputError, LapisError, NotFoundError
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.prompt import Conversation, answer_tokens, bound, prompt_soon
from lapis.gateway.services import Services
from lapis.gateway.stored import StoredResponse
from lapis.tenants.keys import Identity
from lapis.tokenizer.tools import ToolPrompt, read_tools

router = APIRouter(prefix="/v1/responses")
Body = Annotated[ResponseRequest, Depends(json_body(ResponseRequest))]
InputBody = Annotated[InputRequest, Depends(json_body(InputRequest))]
Include = Annotated[list[str] | None, Query(alias="include[]")]


@router.post("", response_model=ResponseObject, openapi_extra=json_schema(ResponseRequest))
async def create_response(request: Request, services: ServicesOf, caller: User, body: Body) -> Response:
    """Answer an input, at once or as a stream of typed events; kept for a month unless told otherwise."""
    answer = _Answer(body, services, caller)
    start = answer.start()
    return await (
        stream(request, start, answer.events) if body.stream else one_answer(request, start, answer.whole)
    )


@router.post("/input_tokens", openapi_extra=json_schema(InputRequest))
async def count_input_tokens(services: ServicesOf, caller: User, body: InputBody) -> InputTokens:
    """How many tokens a response to this input would be computed from."""
    conversation = await _conversation(body, body.items, services, caller)
    engine = await services.router.find(body.model, caller).engine()
    asked = await prompt_soon(engine, conversation)
    return InputTokens(input_tokens=len(asked.ids))


@router.get("/{response_id}", response_model=ResponseObject)
async def retrieve_response(
    response_id: str,
    services: ServicesOf,
    caller: User,
    stream: bool = False,
    starting_after: int | None = None,
    include: Include = None,
) -> dict[str, Any]:
    """A kept response."""
    if stream or starting_after is not None:
        raise InputError(
            "A kept response has ended; it is not streamed again.",
            param="stream" if stream else "starting_after",
        )
    unknown = next((name for name in include or () if name != LOGPROBS), None)
    if unknown is not None:
        raise InputError(f"include takes {LOGPROBS!r} only, got {unknown[:80]!r}.", param="include")
    return (await _kept(services, caller, response_id)).body


@router.delete("/{response_id}")
async def delete_response(response_id: str, services: ServicesOf, caller: User) -> DeletedResponse:
    """Forget a kept response."""
    await asyncio.to_thread(services.responses.delete, caller.project_id, response_id)
    return DeletedResponse(id=response_id)


@router.post("/{response_id}/cancel", response_model=ResponseObject)
async def cancel_response(response_id: str, services: ServicesOf, caller: User) -> Response:
    """Refused: a kept response has ended. One that runs is cancelled by closing its connection."""
    await _kept(services, caller, response_id)
    raise InputError(
        "Only background responses can be cancelled, and they are not offered.",
        hint="Close the connection of a response that runs.",
        param="response_id",
    )


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    services: ServicesOf,
    caller: User,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    include: Include = None,
) -> ItemList:
    """The items that a response was given, without those of the responses before it."""
    items = list((await _kept(services, caller, response_id)).items)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise NotFoundError(f"There is no item {after!r} in this response.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=start + limit < len(items),
    )


class _Answer:
    """One request: how its answer is asked for, written down and kept."""

    def __init__(self, body: ResponseRequest, services: Services, caller: Identity) -> None:
        self._body = body
        self._services = services
        self._caller = caller
        self._items = body.items
        self._prompt: ToolPrompt | None = None

    async def start(self) -> Generation:
        """Ask the model."""
        body, services = self._body, self._services
        deployment = services.router.find(body.model, self._caller)
        conversation = await _conversation(body, self._items, services, self._caller)
        engine = await deployment.engine()
        asked = self._prompt = await prompt_soon(engine, conversation)
        limit = answer_tokens(engine, asked.ids, body.max_output_tokens, "max_output_tokens")
        prompt = Prompt(tuple(asked.ids), bound(body.sampling(limit), asked))
        ask = Ask(new_id("resp", "_"), self._caller, body.model, [prompt])
        return await Generation.start(ask, deployment, services.meter, services.counters)

    async def whole(self, generation: Generation) -> ResponseObject:
        """The response at once."""
        writer = ResponseWriter(_response(self._body, generation))
        async for _ in self._written(writer, generation):
            pass
        return writer.response

    async def events(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The response as it comes."""
        writer = ResponseWriter(_response(self._body, generation))
        yield writer.begin()
        try:
            async for events in self._written(writer, generation):
                yield events
        except LapisError as error:
            yield writer.fail(f"{error.message} {error.hint}".strip())
            return
        yield writer.last()

    async def _written(self, writer: ResponseWriter, generation: Generation) -> AsyncGenerator[str, None]:
        assert self._prompt is not None
        parser = self._prompt.parser()
        cut = False
        async for _, output in generation.pieces():
            text, calls = parsed(parser, output)
            logprobs = chat_logprobs(output.logprobs).content if output.logprobs else None
            events = writer.text(text, logprobs) if text or logprobs else ""
            for call in calls:
                events += writer.call(call)
            cut = finish(output) == "length"
            if events:
                yield events
        last = writer.end(cut=cut, usage=_usage(generation))
        if self._body.store is not False:
            await self._keep(writer.response)
        if last:
            yield last

    async def _keep(self, response: ResponseObject) -> None:
        kept = StoredResponse(
            response.id, response.previous_response_id, self._items, response.model_dump(mode="json")
        )
        await asyncio.to_thread(self._services.responses.put, self._caller.project_id, kept)


async def _conversation(
    body: InputRequest, items: list[Item], services: Services, caller: Identity
) -> Conversation:
    before: list[Item] = []
    if body.previous_response_id is not None:
        find = services.responses.conversation
        before = await asyncio.to_thread(find, caller.project_id, body.previous_response_id)
    messages = chat_messages(before + items)
    if body.instructions:  # those of the responses before are not carried over
        messages.insert(0, {"role": "system", "content": body.instructions})
    tools = read_tools(body.tools or [])
    return Conversation(messages, tools, body.choice, body.parallel_tool_calls is not False, body.form)


async def _kept(services: Services, caller: Identity, id: str) -> StoredResponse:
    return await asyncio.to_thread(services.responses.get, caller.project_id, id)


def _response(body: ResponseRequest, generation: Generation) -> ResponseObject:
    tools = [
        {"type": "function", "description": tool.description or None, "strict": tool.strict, **rest}
        for tool, rest in (
            (tool, {"name": tool.name, "parameters": tool.shown()["function"]["parameters"]})
            for tool in read_tools(body.tools or [])
        )
    ]
    form = body.text.format if body.text is not None and body.text.format else {"type": "text"}
    return ResponseObject(
        id=generation.ask.id,
        created_at=generation.created,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata,
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        store=body.store is not False,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": form},
        tool_choice=body.tool_choice or "auto",
        tools=tools,
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
    )


def _usage(generation: Generation) -> ResponseUsage:
    used = generation.usage
    return ResponseUsage(
        input_tokens=used.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=used.cached_tokens),
        output_tokens=used.completion_tokens,
        total_tokens=used.total_tokens,
    )
