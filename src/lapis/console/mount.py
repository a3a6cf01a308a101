"""Puts the console below /console. Its packages are imported at the first page view, not at the start."""

from __future__ import annotations

import asyncio
import html
import importlib
import importlib.util
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from lapis.api.auth import is_local
from lapis.console.session import COOKIE, Sessions
from lapis.errors import AuthError
from lapis.gateway.services import Services

PATH = "/console"
FORM_LIMIT = 4096  # bytes
SIGN_IN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Lapis: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{{color-scheme:light dark}}body{{font:16px system-ui;max-width:22rem;margin:18vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;padding:.6rem;margin-top:.6rem;box-sizing:border-box}}</style>
<h1>Lapis</h1><form method="post" action="{path}/sign-in"><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button></form><p role="alert">{message}</p>
<p><code>lapis keys create NAME</code> makes a key.</p></html>"""


def has_console() -> bool:
    """Whether the packages of the `console` extra are installed."""
    return importlib.util.find_spec("nicegui") is not None


def mount(app: FastAPI, services: Services) -> None:
    """Add the console to the API's app; without its packages nothing is added and /console answers 404."""
    if not has_console():
        return
    console = Console(services)
    app.mount(PATH, console)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(outer: FastAPI) -> AsyncIterator[None]:
        async with inner(outer):
            yield
        await console.close()

    app.router.lifespan_context = lifespan


class Console:
    """The door of the pages: lets in who may look, and builds the pages when the first one comes."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.sessions = Sessions(services.admission)
        self._pages: ASGIApp | None = None
        self._running = AsyncExitStack()
        self._building = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""
        connection = HTTPConnection(scope)
        refusal = await asyncio.to_thread(self._refusal, connection)
        if refusal is None and scope["path"].endswith("/sign-in") and scope.get("method") == "POST":
            refusal = await self._sign_in(Request(scope, receive))
        if refusal is None:
            await (await self._built())(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(1008)(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    async def close(self) -> None:
        """End the pages, if any were shown."""
        await self._running.aclose()

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        """Why a request is not let in, as the answer to it."""
        if not self.services.admission.keys_required and not is_local(connection):
            return PlainTextResponse("Without API keys this server answers only to localhost.", 403)
        origin = connection.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
            return PlainTextResponse("Requests from other sites are refused.", 403)
        if connection.scope["path"].endswith("/sign-in"):
            return None if connection.scope["method"] == "POST" else RedirectResponse(PATH, 303)
        try:
            connection.scope["lapis.session"] = self.sessions.of(connection)
        except AuthError as error:
            return _sign_in_page(error.message)
        return None

    async def _sign_in(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > FORM_LIMIT:
                return PlainTextResponse("The form is too large.", 413)
        key = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
        try:
            token = await asyncio.to_thread(self.sessions.open, key)
        except AuthError as error:
            return _sign_in_page(error.message)
        answer = RedirectResponse(PATH, 303)
        answer.set_cookie(COOKIE, token, path=PATH, httponly=True, samesite="strict")
        return answer

    async def _built(self) -> ASGIApp:
        async with self._building:
            if self._pages is None:
                pages = await asyncio.to_thread(importlib.import_module, "lapis.console.pages")
                app = pages.create_pages(self.services)
                with warnings.catch_warnings():
                    # NiceGUI looks at every object of the process here; some of torch's warn when looked at.
                    warnings.simplefilter("ignore", FutureWarning)
                    await self._running.enter_async_context(app.router.lifespan_context(app))
                self._pages = app
            return self._pages


def _sign_in_page(message: str) -> Response:
    return HTMLResponse(
        SIGN_IN.format(path=PATH, message=html.escape(message)), 401, {"cache-control": "no-store"}
    )
