"""A load client for short and streamed chat answers over kept connections; it takes little of the cores it shares."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Door:
    """A server of this machine, and the key to show there."""

    port: int
    key: str


class WrongAnswer(Exception):
    """A server answered something else than 200; the text has its answer."""


def post(door: Door, body: Mapping[str, Any]) -> bytes:
    """The bytes of a chat request."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{door.port}\r\nAuthorization: Bearer {door.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def answer_seconds(door: Door, body: Mapping[str, Any], count: int, at_once: int) -> list[float]:
    """Seconds of each of `count` answers, asked for by `at_once` connections, each one after another.

    Raises WrongAnswer.
    """
    request = post(door, body)
    seconds: list[float] = []

    async def client(asked: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        for _ in range(asked):
            began = time.perf_counter()
            writer.write(request)
            await _read_answer(reader)
            seconds.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client(count // at_once) for _ in range(at_once)))
    return seconds


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    size = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
    body = await reader.readexactly(size)
    if " 200 " not in lines[0]:
        raise WrongAnswer(f"{lines[0]}: {body[:300]!r}")
    return body


async def read_streams(door: Door, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Read streamed answers all at once, each to its end; what went wrong with those that did not end well."""
    wrong: list[str] = []

    async def read(body: Mapping[str, Any]) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
            writer.write(post(door, body))
            head = await reader.readuntil(b"\r\n\r\n")
            last = b""
            while not last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and (piece := await reader.read(65536)):
                last = (last + piece)[-64:]
            if b" 200 " not in head.split(b"\r\n")[0] or b"[DONE]" not in last:
                wrong.append(f"{head[:60]!r} … {last!r}")
            writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            wrong.append(repr(error))

    await asyncio.gather(*map(read, bodies))
    return wrong


def resident(pid: int) -> int:
    """Bytes of memory that a process holds and shares with nobody, its share of what it shares added."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0
