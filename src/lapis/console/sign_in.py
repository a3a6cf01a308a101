"""Signing in and out: the forms, their tokens, the cookie."""

from __future__ import annotations

import asyncio
import html
import math
import secrets
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from lapis.console.door import PLAIN_POLICY, STYLE, Throttle, same
from lapis.console.session import COOKIE, FIELD, HEADER, Session, Visitors, cookie
from lapis.errors import AuthError

PATH = "/console"
FORM_COOKIE = "lapis_console_form"  # of the sign-in form, before there is a session
FORM_LIMIT = 4096  # bytes
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Lapis: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style>
<h1>Lapis</h1><form method="post" action="{path}/sign-in"><input type="hidden" name="{field}" value="{csrf}">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button></form><p role="alert">{message}</p>
<p><code>lapis keys create NAME</code> makes a key.</p></html>"""


class SignIn:
    """Turns a shown key into a session, and ends sessions."""

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors
        self.throttle = Throttle()

    def page(self, request: Request, message: str = "", status: int = 401) -> Response:
        """The page that asks who it is."""
        csrf = cookie(request, FORM_COOKIE) or secrets.token_urlsafe(32)
        text = PAGE.format(
            style=STYLE, path=PATH, field=FIELD, csrf=html.escape(csrf), message=html.escape(message)
        )
        headers = {"cache-control": "no-store", "content-security-policy": PLAIN_POLICY}
        answer = HTMLResponse(text, status, headers)
        _set_cookie(request, answer, FORM_COOKIE, csrf)
        return answer

    async def by_key(self, request: Request) -> Response:
        """Answer the form with a key: a cookie and the first page, or the form again."""
        address = request.client.host if request.client else ""
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
        _set_cookie(request, answer, COOKIE, token)
        answer.delete_cookie(FORM_COOKIE, path=PATH)
        return answer

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


def _set_cookie(request: Request, answer: Response, name: str, text: str) -> None:
    # Lax, not strict: who comes from the sign-in provider, or by a link, brings the cookie along. Changes have tokens.
    https = request.url.scheme == "https"
    answer.set_cookie(name, text, path=PATH, httponly=True, samesite="lax", secure=https)


async def _form(request: Request) -> dict[str, str] | None:
    """The fields of a small form, or None if it is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > FORM_LIMIT:
            return None
    return {name: texts[0] for name, texts in parse_qs(body.decode("utf-8", "replace")).items()}
