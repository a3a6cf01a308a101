"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lapis.api.answer import ChunkWriter, facts, finish, new_id, one_answer, parsed, stream, usage
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.logprobs import chat_logprobs
from lapis.api.protocol.chat import (
    AnswerMessage,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinish,
    ChatLogprobs,
    ChatRequest,
    Delta,
    ToolCall,
)
from lapis.api.streaming import DONE, TEXT
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.prompt import Conversation, answer_tokens, bound, prompt_soon
from lapis.gateway.services import Services
from lapis.inference.request import Output
from lapis.tenants.keys import Identity
from lapis.tokenizer.tool_parser import ToolCallDelta, ToolParser
from lapis.tokenizer.tools import ToolPrompt, read_choice, read_tools

router = APIRouter()
Body = Annotated[ChatRequest, Depends(json_body(ChatRequest))]


@router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=json_schema(ChatRequest))
async def create_chat_completion(
    request: Request, services: ServicesOf, caller: User, body: Body
) -> Response:
    """Answer a conversation, at once or as a stream of server-sent events."""
    chat = _Chat(body)
    start = chat.start(services, caller)
    return await (
        stream(request, start, chat.events) if body.stream else one_answer(request, start, chat.whole)
    )


class _Chat:
    """One request: how its answers are asked for and written down."""

    def __init__(self, body: ChatRequest) -> None:
        self._body = body
        tools = read_tools(body.tools or [])
        self._conversation = Conversation(
            [message.for_template() for message in body.messages],
            tools,
            read_choice(body.tool_choice, tools),
            body.parallel_tool_calls is not False,
            body.form,
        )
        self._prompt: ToolPrompt | None = None

    async def start(self, services: Services, caller: Identity) -> Generation:
        """Ask the model."""
        body = self._body
        deployment = services.router.find(body.model, caller)
        engine = await deployment.engine()
        asked = self._prompt = await prompt_soon(engine, self._conversation)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        params = body.sampling(answer_tokens(engine, asked.ids, body.limit, name), body.alternatives)
        prompt = Prompt(tuple(asked.ids), bound(params, asked))
        ask = Ask(new_id("chatcmpl"), caller, body.model, [prompt], body.choices)
        return await Generation.start(ask, deployment, services.meter, services.counters)

    async def whole(self, generation: Generation) -> ChatCompletion:
        """The answers at once."""
        outputs = await generation.whole()
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return ChatCompletion(**facts(generation), choices=choices, usage=usage(generation))

    async def events(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The answers as they come."""
        body = self._body
        head, write = facts(generation), ChunkWriter(body.with_usage)

        def event(index: int, delta: Delta, **more: Any) -> str:
            choice = ChatChunkChoice(index=index, delta=delta, **more)
            return write.event(ChatChunk(**head, choices=[choice]))

        pattern = [ChatChunkChoice(index=index, delta=Delta(content=TEXT)) for index in range(body.choices)]
        texts = [write.text_event(ChatChunk(**head, choices=[choice])) for choice in pattern]
        parsers = [self._parser() for _ in range(body.choices)]
        for index in range(body.choices):
            yield event(index, Delta(role="assistant", content=""))
        async for index, output in generation.pieces():
            text, calls = parsed(parsers[index], output)
            events = ""
            if output.logprobs:
                events = event(index, Delta(content=text), logprobs=self._logprobs(output))
            elif text:
                events = texts[index](text)
            for call in calls:
                events += event(index, Delta(tool_calls=[_call_delta(call)]))
            if output.finish_reason is not None:
                events += event(index, Delta(), finish_reason=_finish(output, parsers[index]))
            if events:
                yield events
        if body.with_usage:
            yield write.event(ChatChunk(**head, choices=[], usage=usage(generation)))
        yield DONE

    def _choice(self, index: int, output: Output) -> ChatChoice:
        parser = self._parser()
        text, calls = parsed(parser, output)
        made = [ToolCall(id=call.id, function=_function(call)) for call in calls]
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=text or (None if made else ""), tool_calls=made or None),
            logprobs=self._logprobs(output),
            finish_reason=_finish(output, parser) or "stop",
        )

    def _parser(self) -> ToolParser | None:
        assert self._prompt is not None
        return self._prompt.parser()

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        return None if self._body.alternatives is None else chat_logprobs(output.logprobs)


def _finish(output: Output, parser: ToolParser | None) -> ChatFinish | None:
    reason = finish(output)
    return "tool_calls" if reason == "stop" and parser is not None and parser.calls else reason


def _function(call: ToolCallDelta) -> CalledFunction:
    return CalledFunction(name=call.name, arguments=call.arguments)


def _call_delta(call: ToolCallDelta) -> CallDelta:
    return CallDelta(index=call.index, id=call.id, function=_function(call))
