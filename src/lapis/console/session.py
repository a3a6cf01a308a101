"""Who looks at the console: the session of a key or a user, or the person at the machine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.requests import HTTPConnection

from lapis.audit import os_user
from lapis.console.door import csrf_token, same
from lapis.errors import AuthError, NotFoundError
from lapis.gateway.admission import Admission
from lapis.gateway.directory import Directory, Place
from lapis.gateway.sessions import SessionRow, Sessions
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope
from lapis.tenants.users import User

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
    directory: Directory

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

    def user(self) -> User | None:
        """Who it is, where a person has signed in through the provider. Raises AuthError once it is over."""
        user_id = None if self.local else self._row().user_id
        return None if user_id is None else self.directory.user(user_id)

    def places(self) -> list[Place]:
        """The projects that a person may choose from; none for a key. Raises AuthError once it is over."""
        user_id = None if self.local else self._row().user_id
        return [] if user_id is None else self.directory.places(user_id)

    def choose(self, project_id: str) -> None:
        """Look at another of `places` from now on. Raises NotFoundError, AuthError once it is over."""
        if project_id not in {place.project_id for place in self.places()}:
            raise NotFoundError(f"There is no project {project_id[:60]!r}.")
        self.rows.choose_project(self._row(), project_id)

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
        if row.user_id is not None:
            return self.directory.identity(row.user_id, row.project_id)
        assert row.key_id is not None
        return self.admission.keys.identity(row.key_id)


class Visitors:
    """Finds the session of a request, and opens one for who shows a key.

    `open_door`: whoever is at this machine needs no sign-in.
    """

    def __init__(self, rows: Sessions, admission: Admission, open_door: bool) -> None:
        self.rows = rows
        self.admission = admission
        self.directory = Directory(rows.db, rows.clock)
        self.open_door = open_door
        self._local = csrf_token(secrets.token_urlsafe(32))

    def of(self, connection: HTTPConnection) -> Session | None:
        """The session of a request, or None when there is none and one is needed."""
        if self.open_door:
            return Session("", self._local, self.rows, self.admission, self.directory)
        token = cookie(connection, COOKIE)
        session = Session(token, csrf_token(token), self.rows, self.admission, self.directory)
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
        if identity.key_id is None:
            raise AuthError("The API key is not valid.", hint="lapis keys create NAME")
        identity.require(Scope.MODELS_READ)
        return self.rows.open(key_id=identity.key_id)


def cookie(connection: HTTPConnection, name: str) -> str:
    """A cookie's text, or an empty one."""
    try:
        morsel = SimpleCookie(connection.headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""
