"""The answers to one request: n streams for each of its prompts, metered and cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lapis.errors import LapisError
from lapis.gateway.admission import priority_of
from lapis.gateway.counters import Counters
from lapis.gateway.deployment import Deployment
from lapis.gateway.metering import Meter, Meterage
from lapis.inference.engine import Engine
from lapis.inference.request import Output, Request, SamplingParams, check_request, join_outputs
from lapis.inference.stream import Stream
from lapis.tenants.keys import Identity
from lapis.tenants.quota import LimitState
from lapis.tenants.usage import Usage

WHOLE = 64  # tokens that come together to who waits for an answer's end
SEEDS = 2**63  # seeds of further answers wrap below this


class Prompt(NamedTuple):
    """Token ids to continue, and how."""

    ids: tuple[int, ...]
    params: SamplingParams


class Piece(NamedTuple):
    """What is new in one of the answers."""

    answer: int
    output: Output


@dataclass(frozen=True)
class Ask:
    """Who wants what: `choices` answers for each prompt."""

    id: str
    identity: Identity
    model: str
    prompts: Sequence[Prompt]
    choices: int = 1
    at: float = field(default_factory=time.monotonic)


class Generation:
    """A running request: take its pieces or the whole; always `close`, which cancels what still runs.

    `usage` counts each prompt once it was read by the model, and every token that was given out.
    """

    def __init__(self, ask: Ask, deployment: Deployment, counters: Counters) -> None:
        self.ask = ask
        self.created = int(time.time())
        self.digest = deployment.adapters.get(ask.model, deployment.servable).digest
        self.finished = False
        self._deployment = deployment
        self._meterage: Meterage | None = None
        self._counters = counters
        self._streams: list[Stream] = []
        self._name = deployment.public_name(ask.model)
        self._first_token = counters.first_token[self._name]
        self._next_token = counters.next_token[self._name]
        self._last: dict[int, Output] = {}
        self._asked = ask.at
        self._times: dict[int, float] = {}  # when the last output of each answer came
        self._closed = False
        self._whole = False
        deployment.active += 1

    @staticmethod
    async def start(ask: Ask, deployment: Deployment, meter: Meter, counters: Counters) -> Generation:
        """Check, reserve, and hand everything to the engine.

        Raises InputError for what the model cannot run, LimitError for a quota or a full queue.
        """
        engine, adapter = await deployment.engine_for(ask.model)
        for prompt in ask.prompts:
            check_request(
                Request(ask.id, prompt.ids, prompt.params), engine.context, engine.tokenizer.vocab_size
            )
        generated = sum(ask.choices * prompt.params.max_tokens for prompt in ask.prompts)
        tokens = sum(len(prompt.ids) for prompt in ask.prompts) + generated
        generation = Generation(ask, deployment, counters)
        try:
            # The engine begins while the ledger is written; nothing is given out before that is done.
            if ahead := meter.trusts(ask.identity):
                generation._submit(engine, adapter)
            generation._meterage = await meter.reserve(ask.identity, ask.model, tokens, generated=generated)
            if not ahead:
                generation._submit(engine, adapter)
        except BaseException:
            generation.close()
            raise
        return generation

    @property
    def limits(self) -> tuple[LimitState, ...]:
        """What was left of each limit on requests and tokens when the request began."""
        return () if self._meterage is None else self._meterage.limits

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        firsts = [
            self._last.get(number, Output()) for number in range(0, len(self._streams), self.ask.choices)
        ]
        return Usage(
            prompt_tokens=sum(output.prompt_tokens for output in firsts),
            completion_tokens=sum(output.completion_tokens for output in self._last.values()),
            cached_tokens=sum(output.cached_tokens for output in firsts),
        )

    async def pieces(self, at_once: int = 0) -> AsyncGenerator[Piece, None]:
        """What the engine gives, as it comes, or some tokens `at_once` for who does not show them one by one.

        Raises LapisError if the engine failed this request.
        """
        if len(self._streams) == 1:  # the usual case, short: it is gone through for every token
            stream, tokens = self._streams[0], at_once
            while (output := await stream.take(tokens)) is not None:
                tokens = output.completion_tokens + at_once
                self._note(0, output)
                yield Piece(0, output)
        else:
            async for index, output in self._merged():
                self._note(index, output)
                yield Piece(index, output)
        self.finished = True

    async def whole(self) -> list[Output]:
        """The finished answers, in the order of prompts, then choices. Raises LapisError."""
        self._whole = True
        outputs: list[list[Output]] = [[] for _ in self._streams]
        async for index, output in self.pieces(at_once=WHOLE):
            outputs[index].append(output)
        return [join_outputs(parts) for parts in outputs]

    def close(self) -> None:
        """Cancel what still runs and settle the usage. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        for index, stream in enumerate(self._streams):
            stream.cancel()
            if self._whole and (rest := stream.take_now()) is not None:
                self._last[index] = rest  # its client left, but it was computed
        if self._meterage is not None:  # else it never came to be
            usage = self.usage
            self._meterage.settle(usage)
            self._counters.generation(self._name, usage, finished=self.finished)
        self._deployment.used_at = time.monotonic()
        self._deployment.active -= 1

    def _submit(self, engine: Engine, adapter: str | None) -> None:
        tenant = self.ask.identity.project_id
        priority = priority_of(self.ask.identity)
        for number, prompt in enumerate(self.ask.prompts):
            for choice in range(self.ask.choices):
                params = _seeded(prompt.params, choice)
                name = f"{self.ask.id}-{number}-{choice}"
                request = Request(name, prompt.ids, params, tenant, priority, adapter)
                self._streams.append(engine.submit(request))

    def _note(self, index: int, output: Output) -> None:
        now = time.monotonic()
        before = self._last.get(index)
        self._last[index] = output
        if before is None:
            first = self._streams[index].first_at
            self._first_token.observe(first - self._asked)
            if (more := output.completion_tokens - 1) > 0:  # they came together
                self._next_token.observe((now - first) / more, more)
        elif new := output.completion_tokens - before.completion_tokens:
            self._next_token.observe((now - self._times[index]) / new, new)
        self._times[index] = now
        assert self._meterage is not None
        self._meterage.tick(now)
        if output.finish_reason == "error":
            raise LapisError(f"The engine ended the request: {output.error or 'no reason given'}.")

    async def _merged(self) -> AsyncIterator[Piece]:
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        pumps = [
            asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(self._streams)
        ]
        try:
            for _ in pumps:
                while (piece := await queue.get()) is not None:
                    yield piece
            for pump in pumps:
                pump.result()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(index: int, stream: Stream, queue: asyncio.Queue[Piece | None]) -> None:
    try:
        async for output in stream:
            queue.put_nowait(Piece(index, output))
    finally:
        queue.put_nowait(None)


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """Further answers to a seeded prompt differ, but always in the same way."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % SEEDS)
