"""The usage ledger: tokens are reserved before work begins and settled after it. Entries are only ever added.

A reservation's entries: `reserve` (+ what it may cost), later `reverse` (- the same) and, if it was settled,
`use` (+ what it did cost). So a project's sum is what it used plus what is still open, at every moment.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import snapshot, write
from lapis.errors import ConflictError, LimitError, NotFoundError
from lapis.tables.tenants import projects
from lapis.tables.usage import open_reservations, usage_entries, usage_windows
from lapis.tenants.keys import Identity
from lapis.tenants.quota import DAY, MINUTE, Consumption, Quota, check

LIFETIME = 600.0  # seconds after which a reservation that nobody renewed belongs to a dead process
KEEP_WINDOWS = 2 * DAY  # seconds; older sums decide nothing any more


# Statements that every request runs, made once: making one costs more than running it.
_entries, _opened, _windows = usage_entries.c, open_reservations.c, usage_windows.c
_STANDING = (  # a project's limits, and what it used in the two current windows
    sa.select(projects, _windows.seconds, _windows.requests, _windows.tokens)
    .join_from(
        projects,
        usage_windows,
        (_windows.project_id == projects.c.id)
        & (
            ((_windows.seconds == MINUTE) & (_windows.start == sa.bindparam("minute")))
            | ((_windows.seconds == DAY) & (_windows.start == sa.bindparam("day")))
        ),
        isouter=True,
    )
    .where(projects.c.id == sa.bindparam("project"))
)
_ENTER = usage_entries.insert()
_OPEN = open_reservations.insert()
_REMOVE = open_reservations.delete().where(_opened.id == sa.bindparam("reservation"))
_COUNT = (
    usage_windows.update()
    .where(
        _windows.project_id == sa.bindparam("project"),
        ((_windows.seconds == MINUTE) & (_windows.start == sa.bindparam("minute")))
        | ((_windows.seconds == DAY) & (_windows.start == sa.bindparam("day"))),
    )
    .values(
        requests=_windows.requests + sa.bindparam("more_requests"),
        tokens=_windows.tokens + sa.bindparam("more_tokens"),
    )
)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request or of many; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reservation:
    """Room for one request: settle it with what was used, or release it."""

    id: str
    project_id: str
    key_id: str | None
    model: str
    tokens: int
    at: float


@dataclass(frozen=True)
class UsageSum:
    """What one group of settled requests used: `group` is a model, a project or a key."""

    group: str | None
    requests: int
    usage: Usage


@dataclass(frozen=True)
class Balance:
    """Sums of a ledger, in tokens."""

    entries: int  # of all entries, signed
    used: int  # of the `use` entries
    open: int  # of the reservations that are not closed

    @property
    def balanced(self) -> bool:
        """Whether every reserved token is still open, given back, or replaced by a used one."""
        return self.entries == self.used + self.open


class UsageLedger:
    """Who used how much. Many processes may share one ledger: limits hold exactly across them."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock

    def reserve(self, identity: Identity, model: str, tokens: int, lifetime: float = LIFETIME) -> Reservation:
        """Take `tokens` out of the project's quota before work begins; renew within `lifetime` seconds.

        Raises LimitError with retry_after when the quota does not allow it, even after the reservations of
        the project that outlived theirs have been released.
        """
        assert tokens >= 0
        now, project = self.clock(), identity.project_id
        made = Reservation(f"res_{secrets.token_hex(12)}", project, identity.key_id, model, tokens, now)
        with write(self.db, lock=f"usage:{project}") as connection:
            try:
                check(*_standing(connection, project, now), tokens, now)
            except LimitError:
                if not _expire(connection, project, now):
                    raise
                check(*_standing(connection, project, now), tokens, now)
            connection.execute(_OPEN, {**vars(made), "expires_at": now + lifetime})
            connection.execute(_ENTER, _entry(made, "reserve", now, tokens))
            if _count(connection, made, tokens, requests=1) < 2:
                _begin_windows(connection, made)
        return made

    def renew(self, reservation: Reservation, lifetime: float = LIFETIME) -> None:
        """Say that a long request still lives. Raises ConflictError if its reservation is closed."""
        update = open_reservations.update().where(open_reservations.c.id == reservation.id)
        with write(self.db) as connection:
            if not connection.execute(update.values(expires_at=self.clock() + lifetime)).rowcount:
                raise ConflictError(f"The reservation {reservation.id} is closed.")

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Replace what was reserved by what was used, once. After expiry the use still counts.

        Raises ConflictError if it was settled or released before, NotFoundError if it was never made.
        """
        with write(self.db, lock=f"usage:{reservation.project_id}") as connection:
            now = self.clock()
            used = _entry(reservation, "use", now, usage.total_tokens, usage)
            if connection.execute(_REMOVE, {"reservation": reservation.id}).rowcount:
                reversed = _entry(reservation, "reverse", now, -reservation.tokens, reason="settled")
                connection.execute(_ENTER, [reversed, used])
                _count(connection, reservation, usage.total_tokens - reservation.tokens)
                return
            ended = _how_it_ended(connection, reservation)
            if ended != "expired":
                raise ConflictError(f"The reservation {reservation.id} was {ended} already.")
            connection.execute(_ENTER, used)
            _count(connection, reservation, usage.total_tokens)

    def release(self, reservation: Reservation) -> None:
        """Give back what was reserved: nothing was used. A second release changes nothing.

        Raises ConflictError if it was settled before, NotFoundError if it was never made.
        """
        with write(self.db, lock=f"usage:{reservation.project_id}") as connection:
            if _close(connection, reservation, "released", self.clock()):
                return
            if _how_it_ended(connection, reservation) == "settled":
                raise ConflictError(f"The reservation {reservation.id} was settled already.")

    def expire(self) -> int:
        """Release the overdue reservations of all projects; how many. A server does so when it starts."""
        now = self.clock()
        overdue = sa.select(open_reservations.c.project_id).where(open_reservations.c.expires_at <= now)
        with self.db.connect() as connection:
            owners = sorted(connection.execute(overdue.distinct()).scalars())
        count = 0
        for project in owners:
            with write(self.db, lock=f"usage:{project}") as connection:
                count += _expire(connection, project, now)
        return count

    def consumption(self, project_id: str) -> Consumption:
        """What a project used or has reserved in this minute and this day (UTC)."""
        with self.db.connect() as connection:
            return _standing(connection, project_id, self.clock())[1]

    def summary(
        self,
        by: Literal["model", "project_id", "key_id"],
        *,
        project_id: str | None = None,
        since: float = 0.0,
        until: float = float("inf"),
    ) -> list[UsageSum]:
        """Settled usage in [since, until) per model, project or key, the largest first."""
        entries, group = usage_entries.c, usage_entries.c[by]
        sums = [
            sa.func.sum(column)
            for column in (entries.prompt_tokens, entries.completion_tokens, entries.cached_tokens)
        ]
        query = sa.select(group, sa.func.count(), *sums).where(entries.kind == "use", entries.at >= since)
        if until != float("inf"):
            query = query.where(entries.at < until)
        if project_id is not None:
            query = query.where(entries.project_id == project_id)
        query = query.group_by(group).order_by(sa.func.sum(entries.tokens).desc(), group)
        with self.db.connect() as connection:
            return [
                UsageSum(name, requests, Usage(int(prompt), int(completion), int(cached)))
                for name, requests, prompt, completion, cached in connection.execute(query)
            ]

    def balance(self, project_id: str | None = None) -> Balance:
        """The sums of all entries, or of one project's, at one moment."""
        entries, opened = usage_entries.c, open_reservations.c
        used = sa.func.sum(entries.tokens).filter(entries.kind == "use")
        query = sa.select(sa.func.sum(entries.tokens), used)
        still = sa.select(sa.func.sum(opened.tokens))
        if project_id is not None:
            query = query.where(entries.project_id == project_id)
            still = still.where(opened.project_id == project_id)
        with snapshot(self.db) as connection:
            total, spent = connection.execute(query).one()
            return Balance(int(total or 0), int(spent or 0), int(connection.execute(still).scalar() or 0))


def _entry(
    of: Reservation, kind: str, at: float, tokens: int, usage: Usage | None = None, reason: str = ""
) -> dict[str, Any]:
    return {
        "reservation_id": of.id, "kind": kind, "at": at, "project_id": of.project_id, "key_id": of.key_id,
        "model": of.model, "tokens": tokens, "reason": reason, **vars(usage or Usage(0, 0)),
    }  # fmt: skip


def _close(connection: Connection, reservation: Reservation, reason: str, now: float) -> bool:
    """Reverse an open reservation; False if somebody else closed it before (deleting the row decides who)."""
    if not connection.execute(_REMOVE, {"reservation": reservation.id}).rowcount:
        return False
    connection.execute(_ENTER, _entry(reservation, "reverse", now, -reservation.tokens, reason=reason))
    _count(connection, reservation, -reservation.tokens)
    return True


def _how_it_ended(connection: Connection, reservation: Reservation) -> str:
    """`settled`, `released` or `expired`."""
    entries = usage_entries.c
    query = sa.select(entries.kind, entries.reason).where(entries.reservation_id == reservation.id)
    found = {row.kind: row.reason for row in connection.execute(query)}
    if "reserve" not in found:
        raise NotFoundError(f"There is no reservation {reservation.id!r}.")
    return "settled" if "use" in found else str(found["reverse"])


def _expire(connection: Connection, project_id: str, now: float) -> int:
    opened = open_reservations.c
    overdue = sa.select(open_reservations).where(opened.project_id == project_id, opened.expires_at <= now)
    rows = connection.execute(overdue).all()
    return sum(_close(connection, _reservation(row), "expired", now) for row in rows)


def _reservation(row: Row[Any]) -> Reservation:
    return Reservation(row.id, row.project_id, row.key_id, row.model, row.tokens, row.at)


def _standing(connection: Connection, project_id: str, now: float) -> tuple[Quota, Consumption]:
    """A project's limits, and what it used in this minute and this day."""
    windows = {"project": project_id, "minute": _start(now, MINUTE), "day": _start(now, DAY)}
    rows = connection.execute(_STANDING, windows).all()
    if not rows:
        raise NotFoundError(f"There is no project {project_id!r}.")
    quota = Quota(rows[0].requests_per_minute, rows[0].tokens_per_minute, rows[0].tokens_per_day)
    found = {row.seconds: row for row in rows}
    return quota, Consumption(
        requests_minute=found[MINUTE].requests if MINUTE in found else 0,
        tokens_minute=found[MINUTE].tokens if MINUTE in found else 0,
        tokens_day=found[DAY].tokens if DAY in found else 0,
    )


def _count(connection: Connection, reservation: Reservation, tokens: int, requests: int = 0) -> int:
    """Correct the windows in which a request began, whenever it ends; how many of the two there are.

    Requests are never uncounted.
    """
    at = reservation.at
    more = {"more_requests": requests, "more_tokens": tokens}
    where = {"project": reservation.project_id, "minute": _start(at, MINUTE), "day": _start(at, DAY)}
    return connection.execute(_COUNT, {**where, **more}).rowcount


def _begin_windows(connection: Connection, reservation: Reservation) -> None:
    """Make the windows that a request is the first of, with the request in them; forget those long past."""
    for seconds in (MINUTE, DAY):
        start = _start(reservation.at, seconds)
        mine = (_windows.project_id == reservation.project_id) & (_windows.seconds == seconds)
        there = sa.select(_windows.start).where(mine, _windows.start == start)
        if connection.execute(there).first() is not None:
            continue
        row = {"project_id": reservation.project_id, "seconds": seconds, "start": start}
        connection.execute(usage_windows.insert().values(**row, requests=1, tokens=reservation.tokens))
        connection.execute(usage_windows.delete().where(mine, _windows.start < start - KEEP_WINDOWS))


def _start(now: float, seconds: int) -> int:
    return int(now // seconds) * seconds
