"""Lapis in process: lapis_worker.py FOLDER [OPTIONS of LocalEngine as JSON]."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import json
import sys
import time
from pathlib import Path

from conversation import Times, converse

from lapis.inference.engine import LocalEngine
from lapis.inference.request import Request, SamplingParams
from lapis.inference.stream import Stream
from lapis.model.weights import read_model


def main() -> None:
    """Load the model and answer."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.setswitchinterval(0.0005)  # as the server: the engine's thread must not wait for readers
    loaded = read_model(folder)
    if "weights" in options:
        loaded.model.quantize(options["weights"])
    loaded.model.seal()  # as the server does
    engine = LocalEngine(loaded, folder.name, **options)
    numbers = itertools.count()

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, int, Times]:
        params = SamplingParams(max_tokens=tokens, temperature=0, stop_ids=frozenset())
        requests = [Request(str(next(numbers)), prompt, params) for prompt in prompts]
        start = time.perf_counter()
        times = asyncio.run(_read([engine.submit(request) for request in requests]))
        seconds = time.perf_counter() - start
        return seconds, sum(map(len, times)), [[at - start for at in one] for one in times]

    converse(f"{importlib.metadata.version('lapis')}, {engine.kernels}", generate)
    engine.close()


async def _read(streams: list[Stream]) -> Times:
    async def moments(stream: Stream) -> list[float]:
        at: list[float] = []
        async for output in stream:
            if output.error:
                raise RuntimeError(output.error)
            at += [time.perf_counter()] * len(output.token_ids)
        return at

    return await asyncio.gather(*(moments(stream) for stream in streams))


if __name__ == "__main__":
    main()
