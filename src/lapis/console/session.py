"""Who looks at the console: where keys are required, a session made by showing one. Sessions end with the process."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.requests import HTTPConnection

from lapis.errors import AuthError
from lapis.gateway.admission import Admission
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

COOKIE = "lapis_console"
MOST = 1000  # sessions; the oldest is forgotten


@dataclass(frozen=True)
class Session:
    """A key that somebody showed; looked up at each use, so that a revoked key ends the session."""

    key: str | None
    admission: Admission

    def identity(self) -> Identity:
        """Whose session it is. Raises AuthError when the key is no longer valid or may not look."""
        identity = self.admission.identify(self.key)
        identity.require(Scope.MODELS_READ)
        return identity


class Sessions:
    """Sessions by the random text in their cookie."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._keys: dict[str, str] = {}

    def open(self, key: str) -> str:
        """Make a session and return its cookie's text. Raises AuthError for a key that may not look."""
        Session(key, self.admission).identity()
        token = secrets.token_urlsafe(32)
        self._keys[token] = key
        if len(self._keys) > MOST:
            del self._keys[next(iter(self._keys))]
        return token

    def of(self, connection: HTTPConnection) -> Session:
        """The session of a request. Raises AuthError when there is none and one is needed."""
        if not self.admission.keys_required:
            return Session(None, self.admission)
        key = self._keys.get(_cookie(connection))
        if key is None:
            raise AuthError("The console needs an API key.")
        session = Session(key, self.admission)
        session.identity()
        return session


def _cookie(connection: HTTPConnection) -> str:
    try:
        morsel = SimpleCookie(connection.headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""
