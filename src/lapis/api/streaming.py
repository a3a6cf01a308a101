"""Answers that last: server-sent events, and the watch for a client that hangs up while we work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lapis.api.errors import lapis_error_body
from lapis.errors import LapisError

Result = TypeVar("Result")
DONE = "data: [DONE]\n\n"
TEXT = "\0"  # stands in a model of an event for the text that changes
QUOTED_TEXT = quoted(TEXT)

ErrorEvent = Callable[[LapisError], str]


def event(data: str) -> str:
    """One server-sent event with a line of JSON."""
    return f"data: {data}\n\n"


def error_event(error: LapisError) -> str:
    """An error after the first byte, as the official client raises it."""
    return event(json.dumps(lapis_error_body(error)))


class TextEvent:
    """Events that differ in one text only: the JSON around it is written once, not for every token.

    `pattern` is an event's JSON with TEXT in the text's place. The text is written in ASCII: readers that
    split lines at every line break of Unicode see none inside an event.
    """

    def __init__(self, pattern: str) -> None:
        self._before, self._after = pattern.split(QUOTED_TEXT)

    def __call__(self, text: str) -> str:
        """The event for a text."""
        return self._before + quoted(text) + self._after


def model_json(model: BaseModel, left_out: set[str] | None = None) -> str:
    """A model as JSON in ASCII, see TextEvent."""
    return model.model_dump_json(exclude=left_out, ensure_ascii=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; when the client hangs up, it is cancelled and ClientDisconnect raised."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events. Its body ends properly, so the connection stays usable.

    An error after the first byte can have no status any more: it is sent as an event with an `error` object,
    which the official client raises, and nothing follows.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        close: Callable[[], None],
        headers: Mapping[str, str],
        on_error: ErrorEvent = error_event,
    ) -> None:
        self.events = events
        self.close = close
        self.on_error = on_error
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; `close` is called at the end, after an error, and when the client hangs up."""
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            return  # nobody listens any more
        finally:
            self.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = ""
        async with aclosing(self.events) as events:
            try:
                async for text in events:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            except LapisError as error:
                last = self.on_error(error)
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})
