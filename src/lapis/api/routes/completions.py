"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
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
from lapis.gateway.prompt import answer_tokens, bound
from lapis.gateway.services import Services
from lapis.inference.engine import Engine, prompt_ids
from lapis.inference.request import Output, join_outputs
from lapis.tenants.keys import Identity
from lapis.tokenizer.tools import ToolPrompt

router = APIRouter()
Body = Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]


@router.post("/v1/completions", response_model=TextCompletion, openapi_extra=json_schema(CompletionRequest))
async def create_completion(request: Request, services: ServicesOf, caller: User, body: Body) -> Response:
    """Continue one text or several, at once or as a stream of server-sent events."""
    texts = _Completion(body)
    start = texts.start(services, caller)
    return await (
        stream(request, start, texts.events) if body.stream else one_answer(request, start, texts.whole)
    )


class _Completion:
    """One request: how its answers are asked for and written down."""

    def __init__(self, body: CompletionRequest) -> None:
        self._body = body
        self._echoes: list[_Echo] = []  # one for each prompt

    async def start(self, services: Services, caller: Identity) -> Generation:
        """Ask the model."""
        body = self._body
        deployment = services.router.find(body.model, caller)
        prompts = await asyncio.to_thread(self._prompts, await deployment.engine())
        ask = Ask(new_id("cmpl"), caller, body.model, prompts, body.tried)
        return await Generation.start(ask, deployment, services.meter, services.counters)

    async def whole(self, generation: Generation) -> TextCompletion:
        """The answers at once."""
        body = self._body
        outputs = await generation.whole()
        choices: list[TextChoice] = []
        for number, echo in enumerate(self._echoes):
            tried = outputs[number * body.tried : (number + 1) * body.tried]
            for output in _best(tried, body.choices):
                writer = TextLogprobsWriter()
                logprobs = None if body.logprobs is None else writer.write(output.logprobs, echo.head(output))
                choices.append(
                    TextChoice(
                        index=len(choices),
                        text=echo.text + output.text,
                        logprobs=logprobs,
                        finish_reason=finish(output),
                    )
                )
        return TextCompletion(**facts(generation), choices=choices, usage=usage(generation))

    async def events(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The answers as they come."""
        body = self._body
        head, write = facts(generation), ChunkWriter(body.with_usage)

        def chunk(index: int, text: str, **more: Any) -> TextCompletion:
            return TextCompletion(**head, choices=[TextChoice(index=index, text=text, **more)])

        count = len(self._echoes) * body.choices
        texts = [write.text_event(chunk(index, TEXT)) for index in range(count)]
        writers = [TextLogprobsWriter() for _ in range(count)]
        before = [Output()] * count  # of the prompt's logprobs, which are sent with the first token
        begun = [not body.echo] * count
        async for index, output in generation.pieces():
            text = output.text
            entries = None
            if not begun[index]:
                output = join_outputs([before[index], output])
                if not output.token_ids and output.finish_reason is None:
                    before[index] = output
                    continue
                begun[index] = True
                echo = self._echoes[index // body.choices]
                text, entries = echo.text + text, echo.head(output)
            if body.logprobs is not None or output.finish_reason is not None:
                logprobs = self._logprobs(writers[index], output, entries)
                yield write.event(chunk(index, text, logprobs=logprobs, finish_reason=finish(output)))
            elif text:
                yield texts[index](text)
        if body.with_usage:
            yield write.event(TextCompletion(**head, choices=[], usage=usage(generation)))
        yield DONE

    def _prompts(self, engine: Engine) -> list[Prompt]:
        body = self._body
        asked = ToolPrompt([], body.form)
        if asked.grammar is not None:
            engine.prepare(asked.grammar)
        prompts = []
        for prompt in body.prompt:
            ids = tuple(prompt_ids(engine, prompt)) if isinstance(prompt, str) else prompt
            room = 0 if body.limit == 0 else answer_tokens(engine, ids, body.limit)
            params = body.sampling(room, body.chosen_logprobs)
            prompts.append(Prompt(ids, bound(params, asked)))
            self._echoes.append(_Echo(engine, prompt, ids) if body.echo else NO_ECHO)
        return prompts

    def _logprobs(
        self, writer: TextLogprobsWriter, output: Output, entries: Sequence[Any] | None
    ) -> TextLogprobs | None:
        return None if self._body.logprobs is None else writer.write(output.logprobs, entries or ())


class _Echo:
    """A prompt in front of its answer: its text, and its tokens' logprobs."""

    def __init__(self, engine: Engine | None, prompt: str | tuple[int, ...], ids: tuple[int, ...]) -> None:
        self.text = ""
        self._first: bytes | None = None  # of a first token, which has no logprob
        if engine is not None:
            self.text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(ids)
            started = isinstance(prompt, str) and engine.add_bos  # then every token of the text has one
            self._first = None if started else engine.tokenizer.token_bytes(ids[0])

    def head(self, output: Output) -> Sequence[Any]:
        """The logprobs before the answer's: bytes where there is none."""
        return [*([self._first] if self._first is not None else []), *output.prompt_logprobs]


NO_ECHO = _Echo(None, (), ())


def _best(outputs: list[Output], count: int) -> list[Output]:
    """The answers with the highest mean log probability of a token, best first; all of them as they are."""
    if len(outputs) == count:
        return outputs

    def mean(output: Output) -> float:
        return sum(token.logprob for token in output.logprobs) / max(len(output.logprobs), 1)

    return sorted(outputs, key=mean, reverse=True)[:count]
