"""The app called in process, in the name of a known caller."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message

from lapis.gateway.inside import Answer
from lapis.tenants.keys import Identity

JSON = [(b"content-type", b"application/json"), (b"host", b"localhost")]


class InsideApp:
    """A `Post` over an app. The identity stands in the scope's state, which no client can write into."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, identity: Identity, path: str, body: bytes) -> Answer:
        """Run one request to its end."""
        messages: list[Message] = []
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in asked:
                return message
            await asyncio.Event().wait()  # this client never hangs up; it is cancelled
            raise AssertionError

        async def send(message: Message) -> None:
            messages.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
            "method": "POST", "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": JSON, "client": None, "server": None, "state": {"identity": identity},
        }  # fmt: skip
        await self._app(scope, receive, send)
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in messages[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in messages[1:])
        return Answer(messages[0]["status"], headers, content)
