"""Requests that the server makes to itself, for batches and evals: the API's own handlers, without a key."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lapis.tenants.keys import Identity


@dataclass(frozen=True)
class Answer:
    """What the API answered; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON whenever the request did not ask for a stream."""
        return json.loads(self.body)


# POST a JSON body to a path (`/v1/…`) in somebody's name. `Identity.background` makes it yield to live traffic.
# Cancelling it is what hanging up is for a client.
Post = Callable[[Identity, str, bytes], Awaitable[Answer]]


async def no_handlers(identity: Identity, path: str, body: bytes) -> Answer:
    """What `Services.post` is until an app is made over the services."""
    raise AssertionError("there is no app over these services yet")
