"""`Idempotency-Key` on requests that make things: the same request is done once and answered as often as it is sent.

Around the routes, which know nothing of it. Models' answers are not kept: the header is ignored there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lapis.api.auth import administrate, identify
from lapis.api.errors import CODES, error_body
from lapis.api.form import FORM_SECONDS, IDLE_SECONDS
from lapis.errors import AuthError
from lapis.gateway.idempotency import LEASE_SECONDS, Claim, Earlier, IdempotencyKeys
from lapis.gateway.services import Services
from lapis.tenants.tenant import DEFAULT

MODELS = {
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "moderations", "responses")
}
SECRETS = (
    "service_accounts",
    "api_keys",
    "admin_api_keys",
    "invites",
)  # last parts of paths that answer with one
MAX_KEY = 255  # characters
MAX_ANSWER = 1 << 20  # bytes that are kept
WAIT_SECONDS = 60.0  # for a request that is under way with the same key
LOOK_SECONDS = 0.05

TWICE = (
    "This Idempotency-Key was used for another request, or by somebody who may do something else; use a new one for "
    "each thing that you make."
)
LOST = (
    "The server ended while it answered the first request with this Idempotency-Key: look whether it was done, then "
    "use a new key."
)
SHOWN = "This was done already, and its answer, which holds a secret, is shown only once."
LONG = f"This was done already; answers above {MAX_ANSWER:,} bytes are not kept: look at what was made."
SLOW = "The body came too slowly."
BUSY = "A request with this Idempotency-Key is still under way, or has just failed: send it again."


class Idempotency:
    """ASGI middleware. Costs nothing where the header is not sent."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do a request, or repeat the answer of the one that was done with its key."""
        sent = _key(scope)
        if sent is None:
            await self._app(scope, receive, send)
            return
        if not 0 < len(sent) <= MAX_KEY or not sent.isascii() or not sent.isprintable():
            return await _refuse(send, 400, f"An Idempotency-Key has 1 to {MAX_KEY} printable characters.")
        try:
            project_id, key, may = await _scoped(scope, sent)
        except (AuthError, HTTPException):  # the route says so
            await self._app(scope, receive, send)
            return
        keys = self._services.idempotency
        claim = await asyncio.to_thread(keys.claim, project_id, key)
        if isinstance(claim, Claim):
            await _Once(keys, claim, scope, may).run(self._app, receive, send)
        else:
            await self._repeat(project_id, key, claim, _fingerprint(scope, may), scope, receive, send)

    async def _repeat(
        self,
        project_id: str,
        key: str,
        earlier: Earlier,
        body: _Raw,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        try:
            fingerprint = await _read_all(body, receive)
        except TimeoutError:
            return await _refuse_slow(send)
        found: Earlier | None = earlier
        end = asyncio.get_running_loop().time() + WAIT_SECONDS
        while found is not None and found.state in ("reading", "working"):
            if found.fingerprint not in (None, fingerprint) or asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(LOOK_SECONDS)
            found = await asyncio.to_thread(self._services.idempotency.look, project_id, key)
        if found is not None and found.fingerprint is not None and found.fingerprint != fingerprint:
            await _refuse(send, 400, TWICE, code="idempotency_key_reused")
        elif found is None or found.state in ("reading", "working"):
            await _refuse(send, 409, BUSY, code="conflict", retry=True)
        elif found.state == "lost":
            await _refuse(send, 409, LOST, code="conflict")
        elif found.answer is None:
            await _refuse(send, 409, SHOWN if _holds_secret(scope) else LONG, code="conflict")
        else:
            assert found.status is not None
            repeated = [(b"idempotency-replayed", b"true")]
            await _send(send, found.status, found.answer.encode(), repeated)


class _Once:
    """The request that does the work: its body is digested as the route reads it, its answer is kept."""

    def __init__(self, keys: IdempotencyKeys, claim: Claim, scope: Scope, may: str) -> None:
        self._keys = keys
        self._claim = claim
        self._scope = scope
        self._body = _fingerprint(scope, may)
        self._status = 0
        self._answer = bytearray()

    async def run(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        try:
            first = await _part(receive)  # a route that reads no body has one all the same
        except TimeoutError:
            await asyncio.to_thread(self._keys.release, self._claim)
            return await _refuse_slow(send)
        waiting = [await self._note(first)]

        async def noted() -> Message:
            return waiting.pop() if waiting else await self._note(await receive())

        async def kept(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            elif len(self._answer) <= MAX_ANSWER:
                self._answer += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self._end()  # before the client sees the last byte: who asks again finds the answer
            await send(message)

        work = asyncio.ensure_future(app(self._scope, noted, kept))
        try:
            while not (await asyncio.wait({work}, timeout=LEASE_SECONDS / 3))[0]:
                await asyncio.to_thread(self._keys.renew, self._claim)
            work.result()
        except Exception:
            await asyncio.to_thread(self._keys.release, self._claim)
            raise
        finally:
            work.cancel()

    async def _note(self, message: Message) -> Message:
        if message["type"] == "http.request":
            self._body.update(message.get("body", b""))
            if not message.get("more_body", False):
                await asyncio.to_thread(self._keys.work, self._claim, self._body.digest())
        return message

    async def _end(self) -> None:
        if not 200 <= self._status < 300:
            await asyncio.to_thread(self._keys.release, self._claim)
            return
        kept = None if _holds_secret(self._scope) or len(self._answer) > MAX_ANSWER else self._answer.decode()
        await asyncio.to_thread(self._keys.done, self._claim, self._status, kept)


class _Raw:
    """What was asked for, and by whom: what the caller may do, method, path and the body's bytes."""

    def __init__(self, scope: Scope, may: str) -> None:
        self._hash = hashlib.sha256(f"{may} {scope['method']} {scope['path']}\n".encode())

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


class _OfForm(_Raw):
    """Of a form the parts, without the boundary between them, which is another one each time."""

    def __init__(self, scope: Scope, may: str, boundary: bytes) -> None:
        super().__init__(scope, may)
        mark: Callable[[bytes], Callable[[], None]] = lambda name: lambda: self._hash.update(b"\0" + name)  # noqa: E731
        data = lambda data, start, end: self._hash.update(data[start:end])  # noqa: E731
        self._broken = False
        callbacks: Any = {
            "on_part_begin": mark(b"part"), "on_header_begin": mark(b"header"), "on_header_field": data,
            "on_header_value": data, "on_headers_finished": mark(b"body"), "on_part_data": data,
            "on_end": mark(b"end"),
        }  # fmt: skip
        self._parser = MultipartParser(boundary, callbacks)

    def update(self, data: bytes) -> None:
        if not self._broken:
            try:
                self._parser.write(data)
            except FormParserError:  # the route says so
                self._broken = True


def _fingerprint(scope: Scope, may: str) -> _Raw:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    media, options = parse_options_header(kind.decode("latin-1"))
    boundary = options.get(b"boundary")
    if media == b"multipart/form-data" and boundary and len(boundary) <= 256:
        return _OfForm(scope, may, boundary)
    return _Raw(scope, may)


async def _scoped(scope: Scope, key: str) -> tuple[str, str, str]:
    """The project that a key belongs to, the key there, and what the caller may do: an answer is repeated to none who
    may do something else. Raises AuthError, HTTPException for an unknown caller.

    An administrator's keys are their organization's: kept with the first project, marked by what no key has in it.
    """
    request = Request(scope)
    if scope["path"].startswith("/v1/organization/"):
        administrator = await asyncio.to_thread(administrate, request)
        return DEFAULT, f"§{administrator.organization_id}§{key}", administrator.role
    identity = await identify(request)
    return identity.project_id, key, ",".join(sorted(identity.scopes))


def _holds_secret(scope: Scope) -> bool:
    return scope["path"].rstrip("/").rpartition("/")[2] in SECRETS


def _key(scope: Scope) -> str | None:
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    if scope["path"] in MODELS or not scope["path"].startswith("/v1/"):
        return None
    for name, value in scope["headers"]:
        if name == b"idempotency-key":
            return str(value.decode("latin-1"))
    return None


async def _read_all(body: _Raw, receive: Receive) -> str:
    async with asyncio.timeout(FORM_SECONDS):
        while True:
            message = await _part(receive)
            body.update(message.get("body", b""))
            if not message.get("more_body", False):
                return body.digest()


async def _part(receive: Receive) -> Message:
    """The next part of a body. Raises TimeoutError if it does not come."""
    async with asyncio.timeout(IDLE_SECONDS):
        return await receive()


async def _refuse_slow(send: Send) -> None:
    body = json.dumps(error_body(SLOW, 408, code=CODES[408])).encode()
    await _send(send, 408, body, [(b"connection", b"close")])


async def _refuse(
    send: Send, status: int, message: str, code: str = "bad_input", *, retry: bool = False
) -> None:
    body = json.dumps(error_body(message, status, param="Idempotency-Key", code=code)).encode()
    await _send(send, status, body, [(b"x-should-retry", b"true" if retry else b"false")])


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *headers]})
    await send({"type": "http.response.body", "body": body})
