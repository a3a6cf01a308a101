"""Texts to vectors: like a generation, but every text is only read, and however many there are the queue holds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lapis.errors import LapisError
from lapis.gateway.admission import priority_of
from lapis.gateway.counters import Counters
from lapis.gateway.deployment import Deployment
from lapis.gateway.metering import Meter
from lapis.inference.request import Output, Pooling, Request, SamplingParams, check_request
from lapis.inference.stream import Stream
from lapis.tenants.keys import Identity
from lapis.tenants.quota import LimitState
from lapis.tenants.usage import Usage

WAVE_TOKENS = 4096  # of one request in the engine's queue at a time; others get their turns in between
WAVE_TEXTS = 64


class Embedded(NamedTuple):
    """Vectors, the tokens that were read for them, and what was left of the limits when they were asked for."""

    vectors: list[tuple[float, ...]]
    usage: Usage
    limits: tuple[LimitState, ...]


async def embed(
    id: str,
    identity: Identity,
    model: str,
    texts: Sequence[tuple[int, ...]],
    pooling: Pooling,
    deployment: Deployment,
    meter: Meter,
    counters: Counters,
) -> Embedded:
    """One vector of length 1 for each text of token ids. Cancelling it stops the engine.

    Raises InputError for what the model cannot read, LimitError for a quota or a full queue.
    """
    engine, adapter = await deployment.engine_for(model)
    params, priority = SamplingParams(max_tokens=0), priority_of(identity)
    requests = [
        Request(f"{id}-{number}", text, params, identity.project_id, priority, adapter, pooling)
        for number, text in enumerate(texts)
    ]
    for request in requests:
        check_request(request, engine.context, engine.tokenizer.vocab_size)
    deployment.active += 1
    try:
        meterage = await meter.reserve(identity, model, sum(map(len, texts)), operation="embeddings")
    except BaseException:
        deployment.active -= 1
        raise
    outputs: list[Output] = []
    streams: list[Stream] = []
    try:
        for wave in _waves(requests):
            streams = [engine.submit(request) for request in wave]
            outputs += await asyncio.gather(*[stream.whole() for stream in streams])
            failed = next((output for output in outputs if output.finish_reason == "error"), None)
            if failed is not None:
                raise LapisError(f"The engine ended the request: {failed.error or 'no reason given'}.")
    finally:
        for stream in streams:
            stream.cancel()
        deployment.active -= 1
        read = sum(output.prompt_tokens for output in outputs)
        usage = Usage(read, 0, sum(output.cached_tokens for output in outputs))
        meterage.settle(usage)
        counters.generation(deployment.public_name(model), usage, finished=len(outputs) == len(requests))
    return Embedded([output.embedding for output in outputs], usage, meterage.limits)


def _waves(requests: Sequence[Request]) -> Iterator[list[Request]]:
    wave: list[Request] = []
    tokens = 0
    for request in requests:
        size = len(request.prompt_ids)
        if wave and (tokens + size > WAVE_TOKENS or len(wave) == WAVE_TEXTS):
            yield wave
            wave, tokens = [], 0
        wave.append(request)
        tokens += size
    if wave:
        yield wave
