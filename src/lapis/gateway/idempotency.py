"""Requests that are done once, however often they are sent: by a key of the caller's, for a day, per project.

Whoever claims a key first does the work and holds it by a lease. A request that failed gives its key back. One whose
process died while its body was read has done nothing, so the key is free again; one that died later may have done
its work, and its key answers nothing any more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import write
from lapis.tables.idempotency import idempotent_requests

KEPT_SECONDS = 86_400.0
LEASE_SECONDS = 60.0
TIDY_SECONDS = 3600.0
_columns = idempotent_requests.c


@dataclass(frozen=True)
class Claim:
    """The right to do the work of a key."""

    project_id: str
    key: str
    token: str


@dataclass(frozen=True)
class Earlier:
    """A request that came before with the same key; `answer` is None if it held a secret."""

    state: str  # reading, working, done, or lost
    fingerprint: str | None
    status: int | None
    answer: str | None


class IdempotencyKeys:
    """The keys of an installation. All methods block; call them in a thread."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock

    def claim(self, project_id: str, key: str) -> Claim | Earlier:
        """Take a key, or learn of the request that has it."""
        now = self._clock()
        made = Claim(project_id, key, secrets.token_hex(12))
        with write(self._db, lock=f"idempotency:{project_id}") as connection:
            found = self._read(connection, project_id, key, now)
            if found is not None:
                return found
            connection.execute(idempotent_requests.delete().where(*_is(project_id, key)))
            connection.execute(
                idempotent_requests.insert().values(
                    **vars(made),
                    state="reading",
                    lease_until=now + LEASE_SECONDS,
                    expires_at=now + KEPT_SECONDS,
                )
            )
        return made

    def look(self, project_id: str, key: str) -> Earlier | None:
        """The request that has a key; None: the key is free again."""
        with self._db.connect() as connection:
            return self._read(connection, project_id, key, self._clock())

    def renew(self, claim: Claim) -> None:
        """Say that the request still lives."""
        self._update(claim, lease_until=self._clock() + LEASE_SECONDS)

    def work(self, claim: Claim, fingerprint: str) -> None:
        """From now on it may have done something."""
        self._update(
            claim, state="working", fingerprint=fingerprint, lease_until=self._clock() + LEASE_SECONDS
        )

    def done(self, claim: Claim, status: int, answer: str | None) -> None:
        """Keep the answer for those who ask again."""
        self._update(claim, state="done", status=status, answer=answer)

    def release(self, claim: Claim) -> None:
        """Give the key back: nothing was done."""
        with write(self._db) as connection:
            mine = _is(claim.project_id, claim.key)
            connection.execute(idempotent_requests.delete().where(*mine, _columns.token == claim.token))

    async def tidy(self) -> None:
        """Forget what is older than a day, as long as the server runs."""
        while True:
            await asyncio.to_thread(self.expire)
            await asyncio.sleep(TIDY_SECONDS)

    def expire(self) -> int:
        """Forget what is older than a day; how many."""
        old = idempotent_requests.delete().where(_columns.expires_at <= self._clock())
        with write(self._db) as connection:
            return connection.execute(old).rowcount

    def _read(self, connection: Connection, project_id: str, key: str, now: float) -> Earlier | None:
        query = sa.select(idempotent_requests).where(*_is(project_id, key), _columns.expires_at > now)
        row: Row[Any] | None = connection.execute(query).one_or_none()
        if row is None:
            return None
        state = row.state
        if state != "done" and row.lease_until <= now:
            if state == "reading":
                return None
            state = "lost"
        return Earlier(state, row.fingerprint, row.status, row.answer)

    def _update(self, claim: Claim, **values: Any) -> None:
        mine = _is(claim.project_id, claim.key)
        with write(self._db) as connection:
            changed = idempotent_requests.update().where(*mine, _columns.token == claim.token)
            connection.execute(changed.values(**values))


def _is(project_id: str, key: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return _columns.project_id == project_id, _columns.key == key
