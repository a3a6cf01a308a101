"""Who looks at the console: the session of a key or a user, or the person at the machine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.requests import HTTPConnection

from lapis.audit import os_user
from lapis.console.door import csrf_token, same
from lapis.errors import AuthError
from lapis.gateway.admission import Admission
from lapis.gateway.sessions import SessionRow, Sessions
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

COOKIE = "lapis_console"
FIELD = "csrf"  # of a form; a script sends the header instead
HEADER = "x-csrf-token"


@dataclass(frozen=True)
class Session:
    """One signed-in person. Looked up anew at each use: a revoked key or user ends it at once.

    `csrf` goes into every form as the field `csrf`, or into the header `x-csrf-token`.
    """

    token: str  # of the cookie; empty for the person at the machine
    csrf: str
    rows: Sessions
    admission: Admission

    def identity(self) -> Identity:
        """Whose session it is. It reads the database: call it in a thread. Raises AuthError once it is over."""
        if not self.token:
            return self.admission.identify(None)
        identity = self._identity(self._row())
        identity.require(Scope.MODELS_READ)
        return identity

    @property
    def local(self) -> bool:
        """Whether it is the person at the machine, who needs no sign-in and cannot sign out."""
        return not self.token

    def actor(self) -> str:
        """Who acts, for the audit log: `key:…`, `user:…` or `os:…`. Raises AuthError once it is over."""
        return os_user() if self.local else self._row().actor

    def touch(self) -> None:
        """Note that the person did something: what is not used for a while ends."""
        row = self.rows.find(self.token)
        if row is not None:
            self.rows.touch(row)

    def end(self) -> None:
        """Sign out, on every server."""
        row = self.rows.find(self.token)
        if row is not None:
            self.rows.end(row)

    def allows(self, csrf: str) -> bool:
        """Whether a form's token is this session's."""
        return same(csrf, self.csrf)

    def _row(self) -> SessionRow:
        row = self.rows.find(self.token)
        if row is None:
            raise AuthError("The session is over.", hint="Sign in again.")
        return row

    def _identity(self, row: SessionRow) -> Identity:
        assert row.key_id is not None
        return self.admission.keys.identity(row.key_id)


class Visitors:
    """Finds the session of a request, and opens one for who shows a key."""

    def __init__(self, rows: Sessions, admission: Admission) -> None:
        self.rows = rows
        self.admission = admission
        self._local = csrf_token(secrets.token_urlsafe(32))

    def of(self, connection: HTTPConnection) -> Session | None:
        """The session of a request, or None when there is none and one is needed."""
        if not self.admission.keys_required:
            return Session("", self._local, self.rows, self.admission)
        token = cookie(connection, COOKIE)
        session = Session(token, csrf_token(token), self.rows, self.admission)
        try:
            if token:
                session.identity()
                return session
        except AuthError:
            session.end()
        return None

    def open(self, key: str) -> str:
        """Make a session of a key and return its cookie's text. Raises AuthError for a key that may not look."""
        identity = self.admission.identify(key)
        identity.require(Scope.MODELS_READ)
        return self.rows.open(key_id=identity.key_id)


def cookie(connection: HTTPConnection, name: str) -> str:
    """A cookie's text, or an empty one."""
    try:
        morsel = SimpleCookie(connection.headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""
