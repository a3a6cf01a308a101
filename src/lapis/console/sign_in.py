"""Signing in and out: the forms, their tokens, the cookie."""

from __future__ import annotations

import asyncio
import html
import math
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from lapis.console.door import PLAIN_POLICY, STARTS, STYLE, Throttle, same
from lapis.console.session import COOKIE, FIELD, HEADER, Session, Visitors, cookie
from lapis.errors import AuthError, LapisError
from lapis.gateway.sessions import SignIns, new_start
from lapis.log import logger

if TYPE_CHECKING:
    from lapis.gateway.oidc import Provider

PATH = "/console"
CALLBACK = "/callback"  # where the provider sends people back to
FORM_COOKIE = "lapis_console_form"  # of the sign-in form, before there is a session
FORM_LIMIT = 4096  # bytes
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Lapis: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style>
<h1>Lapis</h1>{provider}<form method="post" action="{path}/sign-in"><input type="hidden" name="{field}" value="{csrf}">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button></form><p role="alert">{message}</p>
<p><code>lapis keys create NAME</code> makes a key.</p></html>"""

PROVIDER = '<p><a class="button" href="{path}/sign-in/start">Sign in with your organization</a></p>'


class SignIn:
    """Turns a shown key, or who comes back from the provider, into a session, and ends sessions."""

    def __init__(self, visitors: Visitors, provider: Provider | None, https: bool) -> None:
        self.visitors = visitors
        self.provider = provider
        self.https = https
        self.under_way = SignIns(visitors.rows.db, visitors.rows.clock)
        self.throttle = Throttle()
        self.starts = Throttle(attempts=STARTS)

    def page(self, request: Request, message: str = "", status: int = 401) -> Response:
        """The page that asks who it is."""
        csrf = cookie(request, FORM_COOKIE) or secrets.token_urlsafe(32)
        text = PAGE.format(
            style=STYLE,
            provider=PROVIDER.format(path=PATH) if self.provider is not None else "",
            path=PATH,
            field=FIELD,
            csrf=html.escape(csrf),
            message=html.escape(message),
        )
        headers = {"cache-control": "no-store", "content-security-policy": PLAIN_POLICY}
        answer = HTMLResponse(text, status, headers)
        self._set_cookie(request, answer, FORM_COOKIE, csrf)
        return answer

    async def by_key(self, request: Request) -> Response:
        """Answer the form with a key: a cookie and the first page, or the form again."""
        address = _address(request)
        wait = self.throttle.wait(address)
        if wait > 0:
            return self._later(wait)
        form = await _form(request)
        if form is None:
            return PlainTextResponse("The form is too large.", 413)
        if not same(form.get(FIELD, ""), cookie(request, FORM_COOKIE)):
            return self.page(request, "The form was too old. Try again.", 403)
        try:
            token = await asyncio.to_thread(self.visitors.open, form.get("key", "").strip())
        except AuthError as error:
            self.throttle.failed(address)
            return self.page(request, error.message)
        return await self._opened(request, token)

    async def start(self, request: Request) -> Response:
        """Send the browser to the provider."""
        wait = self.starts.wait(_address(request))
        if self.provider is None or wait > 0:
            return self._later(wait) if wait > 0 else RedirectResponse(PATH, 303)
        self.starts.failed(_address(request))
        browser = cookie(request, FORM_COOKIE) or secrets.token_urlsafe(32)
        begun = new_start()
        try:
            url = await asyncio.to_thread(self.provider.url, begun)
        except LapisError as error:
            return self.page(request, str(error), error.http_status)
        await asyncio.to_thread(self.under_way.begin, begun, browser)
        answer = RedirectResponse(url, 303, {"cache-control": "no-store"})
        self._set_cookie(request, answer, FORM_COOKIE, browser)
        return answer

    async def come_back(self, request: Request) -> Response:
        """Answer the provider's redirection: a session, or the page with the reason why not."""
        address = _address(request)
        wait = self.throttle.wait(address)
        if wait > 0:
            return self._later(wait)
        fields, browser = dict(request.query_params), cookie(request, FORM_COOKIE)
        try:
            token = await asyncio.to_thread(self._admitted, fields, browser)
        except LapisError as error:
            self.throttle.failed(address)
            return self.page(request, str(error), error.http_status)
        return await self._opened(request, token)

    async def choose(self, request: Request, session: Session) -> Response:
        """Look at the project that a form with its token names."""
        form = await _form(request) or {}
        if not session.allows(form.get(FIELD, "")):
            return refused()
        try:
            await asyncio.to_thread(session.choose, form.get("project", ""))
        except LapisError as error:
            return PlainTextResponse(error.message, error.http_status)
        return RedirectResponse(PATH, 303)

    async def sign_out(self, request: Request, session: Session) -> Response:
        """End the session that a form with its token asks to end."""
        if not await allowed(request, session):
            return refused()
        await asyncio.to_thread(session.end)
        answer = RedirectResponse(PATH, 303)
        answer.delete_cookie(COOKIE, path=PATH)
        return answer

    async def _opened(self, request: Request, token: str) -> Response:
        """A new session takes the place of the browser's old one."""
        before = self.visitors.rows.find
        old = await asyncio.to_thread(before, cookie(request, COOKIE))
        if old is not None:
            await asyncio.to_thread(self.visitors.rows.end, old)
        answer = RedirectResponse(PATH, 303)
        self._set_cookie(request, answer, COOKIE, token)
        answer.delete_cookie(FORM_COOKIE, path=PATH)
        return answer

    def _admitted(self, fields: Mapping[str, str], browser: str) -> str:
        """The cookie's text of a new session. Raises AuthError, UnavailableError."""
        if self.provider is None or not browser:
            raise AuthError("The sign-in took too long, or began elsewhere. Try again.")
        begun = self.under_way.finish(fields.get("state", ""), browser)
        settings = self.provider.settings
        if fields.get("iss", settings.issuer) != settings.issuer or "code" not in fields:
            logger.warning("The OpenID provider sent %r back", fields.get("error", "")[:100])
            raise AuthError("The provider did not let you in.")
        claims = self.provider.claims(fields["code"], begun)
        user = self.visitors.directory.admit(settings, claims)
        return self.visitors.rows.open(user_id=user.id)

    def _set_cookie(self, request: Request, answer: Response, name: str, text: str) -> None:
        # Lax, not strict: who comes from the provider, or by a link, brings the cookie along. Changes have tokens.
        https = self.https or request.url.scheme == "https"
        answer.set_cookie(name, text, path=PATH, httponly=True, samesite="lax", secure=https)

    def _later(self, wait: float) -> Response:
        seconds = math.ceil(wait)
        text = f"Too many failed sign-ins. Try again in {seconds} s."
        return PlainTextResponse(text, 429, {"retry-after": str(seconds)})


async def allowed(request: Request, session: Session) -> bool:
    """Whether a request that changes something carries its session's token, in the header or in its form."""
    token = request.headers.get(HEADER)
    if token is None:
        form = await _form(request)
        token = (form or {}).get(FIELD, "")
    return session.allows(token)


def refused() -> Response:
    """The answer to a form without its session's token."""
    return PlainTextResponse("The form does not belong to this session. Load the page again.", 403)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


async def _form(request: Request) -> dict[str, str] | None:
    """The fields of a small form, or None if it is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > FORM_LIMIT:
            return None
    return {name: texts[0] for name, texts in parse_qs(body.decode("utf-8", "replace")).items()}
