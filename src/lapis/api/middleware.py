"""Around every request: its id, its count in the metrics, security headers, the last net for our own bugs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lapis.api.errors import error_body
from lapis.gateway.services import Services
from lapis.log import logger

CLIENT_GONE = 499  # as it stands in the metrics; nothing is sent
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
Headers = Sequence[tuple[bytes, bytes]]
ENDING: Headers = ((b"connection", b"close"), (b"retry-after", b"1"))


class Envelope:
    """ASGI middleware: `x-request-id` on every answer, a 500 in OpenAI's shape where our code has a bug."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services
        self.counters = services.counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id in the scope's state."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def enveloped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                spent = f"{(time.perf_counter() - started) * 1000:.0f}"
                headers = [(b"x-request-id", request_id.encode()), (b"openai-processing-ms", spent.encode())]
                own = {name for name, _ in message["headers"]}
                safe = [header for header in HEADERS if header[0] not in own]
                message = {**message, "headers": [*message["headers"], *headers, *safe]}
            await send(message)

        if self.services.draining:
            await _send(enveloped, 503, error_body("The server is ending.", 503, code="unavailable"), ENDING)
            self.counters.request("draining", 503, time.perf_counter() - started)
            return
        if not _names_a_host(scope):
            text = "The Host header is no host's name or address."
            await _send(enveloped, 400, error_body(text, 400, code="bad_input"))
            self.counters.request("other", 400, time.perf_counter() - started)
            return
        self.counters.active += 1
        try:
            await self.app(scope, receive, enveloped)
        except ClientDisconnect:  # nobody is left to be answered
            status = status or CLIENT_GONE
        except Exception:  # our bug ends one request, not the server; the trace is in the log
            logger.exception("%s %s (%s) failed", scope["method"], scope["path"], request_id)
            if status:
                raise
            await _send_bug(enveloped, request_id)
        finally:
            self.counters.active -= 1
            self.counters.request(_route(scope), status, time.perf_counter() - started)


async def _send_bug(send: Send, request_id: str) -> None:
    text = f"The server failed; its log has the cause under {request_id}."
    await _send(send, 500, error_body(text, 500, code="internal_error"))


async def _send(send: Send, status: int, error: dict[str, Any], headers: Headers = ()) -> None:
    body = json.dumps(error).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *headers]})
    await send({"type": "http.response.body", "body": body})


def _names_a_host(scope: Scope) -> bool:
    """Whether a request's URL, which has the Host header in it, can be read."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    try:
        urlsplit(f"//{host.decode('latin-1')}")
    except ValueError:
        return False
    return True


def _route(scope: Scope) -> str:
    route: Any = scope.get("route")
    return str(getattr(route, "path", "other"))
