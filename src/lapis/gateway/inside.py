"""Requests that the server makes to itself, for batches and evals: the API's own handlers, without a key."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lapis.tenants.keys import Identity

BUSY = (429, 503)
LOOK_AGAIN_SECONDS = 60.0  # a long wait is looked at again after so long: limits may be raised
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds


@dataclass(frozen=True)
class Answer:
    """What the API answered; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON whenever the request did not ask for a stream."""
        return json.loads(self.body)

    @property
    def failure(self) -> str | None:
        """What an error says; None where it is an answer."""
        if self.status < 400:
            return None
        try:
            return str(self.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"The API answered with status {self.status}."

    @property
    def busy(self) -> bool:
        """Whether a limit or a busy server refused it: asking again later makes sense."""
        return self.status in BUSY and self.headers.get("x-should-retry") != "false"

    @property
    def retry_after(self) -> float | None:
        """The seconds after which it says that asking again makes sense, if it says so."""
        milliseconds, seconds = self.headers.get("retry-after-ms"), self.headers.get("retry-after")
        if milliseconds is not None:
            return float(milliseconds) / 1000
        return None if seconds is None else float(seconds)


# POST a JSON body to a path (`/v1/…`) in somebody's name. `Identity.background` makes it yield to live traffic.
# Cancelling it is what hanging up is for a client.
Post = Callable[[Identity, str, bytes], Awaitable[Answer]]


async def no_handlers(identity: Identity, path: str, body: bytes) -> Answer:
    """What `Services.post` is until an app is made over the services."""
    raise AssertionError("there is no app over these services yet")


async def post_patiently(
    post: Post, identity: Identity, path: str, body: bytes, seconds: float = math.inf
) -> Answer:
    """As `post`; while a limit or a busy server refuses it, wait as it says and ask again, for so many seconds.

    An answer that says that asking again makes no sense, such as for a spent budget, is given at once.
    """
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + seconds, FIRST_PAUSE
    while True:
        answer = await post(identity, path, body)
        if not answer.busy or loop.time() >= until:
            return answer
        await asyncio.sleep(
            min(max(pause, answer.retry_after or 0.0), LONGEST_PAUSE, max(0.0, until - loop.time()))
        )
        pause *= 2
