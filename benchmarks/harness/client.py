"""A load client for streaming /v1/completions that takes hardly any CPU: it shares the cores with the server.

It notes when bytes arrive and looks into them only after the last request has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from harness.burst import Burst

TIME_LIMIT = 300.0


class RequestFailed(Exception):
    """The server did not answer with a stream of tokens; the text has its answer."""


class _Answer(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.arrivals: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def burst(port: int, bodies: Sequence[Mapping[str, Any]]) -> Burst:
    """Send all requests at once to this machine's `port`. Raises RequestFailed, OSError or TimeoutError."""
    return asyncio.run(asyncio.wait_for(_burst(port, bodies), TIME_LIMIT))


async def _burst(port: int, bodies: Sequence[Mapping[str, Any]]) -> Burst:
    loop = asyncio.get_running_loop()
    requests = [_request(port, body) for body in bodies]
    start = time.perf_counter()
    connections = [
        loop.create_connection(partial(_Answer, request), "127.0.0.1", port) for request in requests
    ]
    answers = [protocol for _, protocol in await asyncio.gather(*connections)]
    await asyncio.gather(*(answer.ended for answer in answers))
    times, tokens = [], 0
    for answer in answers:
        arrived, count = read_events(answer.arrivals)
        times.append([moment - start for moment in arrived])
        tokens += count
    return Burst(max(moments[-1] for moments in times), tokens, times)


def _request(port: int, body: Mapping[str, Any]) -> bytes:
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def read_events(arrivals: Sequence[tuple[float, bytes]]) -> tuple[list[float], int]:
    """The arrival of each event that carries a choice, and the completion tokens that the usage states.

    An event arrives with the bytes that complete it. Raises RequestFailed for any other answer.
    """
    buffer, body, moments, tokens = b"", b"", [], 0
    for moment, data in arrivals:
        buffer += data
        if not body:
            head, separator, buffer_rest = buffer.partition(b"\r\n\r\n")
            if not separator:
                continue
            if b" 200 " not in head.splitlines()[0]:
                raise RequestFailed(b"".join(data for _, data in arrivals).decode(errors="replace")[-500:])
            body, buffer = head, buffer_rest
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestFailed(str(event["error"]))
            if event.get("choices"):
                moments.append(moment)
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if not moments or not tokens:
        raise RequestFailed("The server sent no tokens or no usage.")
    return moments, tokens
