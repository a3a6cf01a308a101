"""Puts the console below /console. Its packages are imported at the first page view, not at the start."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from lapis.api.auth import is_local
from lapis.console.door import PAGES_POLICY, SAFE, foreign, security_headers
from lapis.console.guard import Guard
from lapis.console.session import Session, Visitors
from lapis.console.sign_in import CALLBACK, PATH, SignIn, allowed, refused
from lapis.errors import UnavailableError
from lapis.gateway.services import Services
from lapis.gateway.sessions import Sessions
from lapis.gateway.settings import ServerSettings, server_settings, sign_in_secret

if TYPE_CHECKING:
    from lapis.gateway.oidc import Provider

ASSETS = "/_nicegui"  # NiceGUI's own: files, and messages that carry the random id of the page they belong to


def has_console() -> bool:
    """Whether the packages of the `console` extra are installed."""
    return importlib.util.find_spec("nicegui") is not None


def mount(app: FastAPI, services: Services) -> None:
    """Add the console to the API's app; without its packages nothing is added and /console answers 404."""
    if not has_console():
        return
    console = Console(services)
    app.mount(PATH, console)
    app.state.pages = PATH
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
        self.settings = server_settings(services.home)
        told = self.settings.console
        rows = Sessions(services.db, idle=told.idle_minutes * 60, longest=told.longest_hours * 3600)
        open_door = not services.admission.keys_required and self.settings.sign_in is None
        self.visitors = Visitors(rows, services.admission, open_door)
        self.https = told.public_url.startswith("https://")
        self.sign_in = SignIn(self.visitors, _provider(self.settings), self.https)
        self._pages: ASGIApp | None = None
        self._running = AsyncExitStack()
        self._building = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        request = Request(scope, receive)
        send = _with_headers(send, self.https or request.url.scheme == "https")
        answer = self._refusal(request) or await self._door(request)
        if answer is None:
            await (await self._built())(scope, receive, send)
        else:
            await answer(scope, receive, send)

    async def close(self) -> None:
        """End the pages, if any were shown."""
        await self._running.aclose()

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        """Why a request is not let in, whoever it is, as the answer to it."""
        if self.visitors.open_door and not is_local(connection):
            return PlainTextResponse("Without API keys this server answers only to localhost.", 403)
        changes = connection.scope.get("method", "WEBSOCKET") not in SAFE
        reason = foreign(connection.headers, changes, self.settings.console.public_url)
        return PlainTextResponse(reason, 403) if reason else None

    async def _door(self, request: Request) -> Response | None:
        """Sign-in, sign-out, or the session put into the scope; None when the pages may answer."""
        path, get = _path(request.scope), request.method in SAFE
        if path == "/sign-in":
            return RedirectResponse(PATH, 303) if get else await self.sign_in.by_key(request)
        if path == "/sign-in/start" and get:
            return await self.sign_in.start(request)
        if path == CALLBACK and get:
            return await self.sign_in.come_back(request)
        session = await asyncio.to_thread(self._session, request, not path.startswith(ASSETS))
        if session is None:
            return self.sign_in.page(request)
        if path == "/sign-out" and not get:
            return await self.sign_in.sign_out(request, session)
        if path == "/project" and not get:
            return await self.sign_in.choose(request, session)
        if not get and not path.startswith(ASSETS) and not await allowed(request, session):
            return refused()
        request.scope["lapis.session"] = session
        return None

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        session = None
        if self._refusal(connection) is None:
            session = await asyncio.to_thread(self._session, connection, False)
        if session is None:
            await WebSocketClose(1008)(scope, receive, send)
            return
        scope["lapis.session"] = session
        guard = Guard(session, receive, send)
        await (await self._built())(scope, guard.receive, guard.send)

    def _session(self, connection: HTTPConnection, act: bool) -> Session | None:
        session = self.visitors.of(connection)
        if session is not None and act:
            session.touch()
        return session

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


def _provider(settings: ServerSettings) -> Provider | None:
    """The OpenID provider that the settings name. Raises UnavailableError without the packages for it."""
    if settings.sign_in is None:
        return None
    if importlib.util.find_spec("jwt") is None:
        raise UnavailableError(
            "Signing in through a provider needs PyJWT, which is not installed.",
            hint="pip install 'lapis[console]'",
        )
    from lapis.gateway.oidc import Provider

    redirect_uri = f"{settings.console.public_url.rstrip('/')}{PATH}{CALLBACK}"
    return Provider(settings.sign_in, sign_in_secret(), redirect_uri)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _with_headers(send: Send, https: bool) -> Send:
    """A `send` that adds the security headers; an answer that sets one itself keeps its own."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, text in security_headers(PAGES_POLICY, https).items():
                headers.setdefault(name, text)
        await send(message)

    return sending
