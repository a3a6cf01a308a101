"""Sessions of the console: rows that end by sign-out, after a time without use, and at last after a day."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import AuthError, NotFoundError
from lapis.tables.people import users
from lapis.tables.sessions import sessions, sign_ins
from lapis.tables.tenants import api_keys

IDLE_SECONDS = 2 * 3600.0  # without use
LONGEST_SECONDS = 24 * 3600.0
SIGN_IN_SECONDS = 600.0  # for the way to the provider and back
TOUCH_SECONDS = 60.0  # how exactly the last use is known: not every click is a write


@dataclass(frozen=True)
class SessionRow:
    """A session as the database has it: made by a key or by a user, looking at one project."""

    id: str
    key_id: str | None
    user_id: str | None
    project_id: str | None
    created_at: float
    used_at: float
    expires_at: float

    @property
    def actor(self) -> str:
        """Who acts, for the audit log."""
        return f"user:{self.user_id}" if self.user_id is not None else f"key:{self.key_id}"


@dataclass(frozen=True)
class Start:
    """What one sign-in is begun with; the provider gives `state` and `nonce` back, `verifier` stays here."""

    state: str
    nonce: str
    verifier: str


def new_start() -> Start:
    """Three texts that nobody can guess."""
    return Start(*(secrets.token_urlsafe(32) for _ in range(3)))


class Sessions:
    """The open sessions of an installation: shared by its servers, kept over a restart."""

    def __init__(
        self,
        db: Engine,
        clock: Callable[[], float] = time.time,
        *,
        idle: float = IDLE_SECONDS,
        longest: float = LONGEST_SECONDS,
    ) -> None:
        self.db = db
        self.clock = clock
        self.idle = idle
        self.longest = longest
        self.audit = AuditLog(db, clock)

    def open(self, *, key_id: str | None = None, user_id: str | None = None) -> str:
        """Make a session of a key or of a user; returned is the cookie's text, which is kept nowhere."""
        assert (key_id is None) != (user_id is None)
        token, now = secrets.token_urlsafe(32), self.clock()
        made = SessionRow(_digest(token), key_id, user_id, None, now, now, now + self.longest)
        over = (sessions.c.expires_at <= now) | (sessions.c.used_at <= now - self.idle)
        with write(self.db) as connection:
            connection.execute(sessions.delete().where(over))
            connection.execute(sessions.insert().values(**asdict(made)))
            self.audit.append_in(
                connection, made.actor, "session.open", made.id[:12], _owners(connection, made)
            )
        return token

    def find(self, token: str) -> SessionRow | None:
        """The session of a cookie, or None when there is none or it is over."""
        if not token:
            return None
        with self.db.connect() as connection:
            row = connection.execute(sa.select(sessions).where(sessions.c.id == _digest(token))).one_or_none()
        found = None if row is None else SessionRow(**row._mapping)
        now = self.clock()
        if found is None or found.expires_at <= now or found.used_at <= now - self.idle:
            return None
        return found

    def touch(self, session: SessionRow) -> None:
        """Note that a session was used now, at most once a minute."""
        now = self.clock()
        if session.used_at > now - TOUCH_SECONDS:
            return
        with write(self.db) as connection:
            connection.execute(sessions.update().where(sessions.c.id == session.id).values(used_at=now))

    def choose_project(self, session: SessionRow, project_id: str) -> None:
        """Look at another project from now on. Raises NotFoundError when the session is over."""
        update = sessions.update().where(sessions.c.id == session.id)
        with write(self.db) as connection:
            if not connection.execute(update.values(project_id=project_id)).rowcount:
                raise NotFoundError("The session is over.", hint="Sign in again.")

    def end(self, session: SessionRow) -> None:
        """Sign out: the session is over, on every server."""
        with write(self.db) as connection:
            if connection.execute(sessions.delete().where(sessions.c.id == session.id)).rowcount:
                facts = _owners(connection, session)
                self.audit.append_in(connection, session.actor, "session.end", session.id[:12], facts)


def _owners(connection: Connection, session: SessionRow) -> dict[str, str]:
    """Whose entry in the audit log a session's is: of the key's project, or of the user's organization."""
    if session.key_id is not None:
        query = sa.select(api_keys.c.project_id).where(api_keys.c.id == session.key_id)
        return dict(connection.execute(query).mappings().first() or {})
    query = sa.select(users.c.organization_id).where(users.c.id == session.user_id)
    return dict(connection.execute(query).mappings().first() or {})


class SignIns:
    """Sign-ins that were sent to the provider: each comes back once, within a while, to the same browser."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock

    def begin(self, start: Start, browser: str) -> None:
        """Note a sign-in that begins in the browser with this cookie."""
        now = self.clock()
        row = {"state": _digest(start.state), "browser": _digest(browser)}
        with write(self.db) as connection:
            connection.execute(sign_ins.delete().where(sign_ins.c.expires_at <= now))
            connection.execute(
                sign_ins.insert().values(
                    **row, nonce=start.nonce, verifier=start.verifier, expires_at=now + SIGN_IN_SECONDS
                )
            )

    def finish(self, state: str, browser: str) -> Start:
        """What a sign-in that comes back was begun with, once. Raises AuthError for one that was not begun so."""
        mine = (sign_ins.c.state == _digest(state)) & (sign_ins.c.expires_at > self.clock())
        mine &= sign_ins.c.browser == _digest(browser)
        with write(self.db) as connection:
            row = connection.execute(sa.select(sign_ins).where(mine)).one_or_none()
            ended = connection.execute(sign_ins.delete().where(mine)).rowcount
        if row is None or ended != 1:
            raise AuthError("The sign-in took too long, or began elsewhere. Try again.")
        return Start(state, row.nonce, row.verifier)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
