"""The usage ledger: tokens are reserved before work begins and settled after it. Entries are only ever added.

A reservation's entries: `reserve` (+ what it may cost), later `reverse` (- the same) and, if it was settled,
`use` (+ what it did cost). So a project's sum is what it used plus what is still open, at every moment.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import snapshot, take_lock, write
from lapis.errors import ConflictError, LimitError, NotFoundError
from lapis.prepared import Prepared
from lapis.tables.tenants import projects
from lapis.tables.usage import open_reservations, usage_entries
from lapis.tenants.keys import Identity
from lapis.tenants.policy import family
from lapis.tenants.prices import Prices
from lapis.tenants.quota import Asked, Consumption, LimitState, check
from lapis.tenants.windows import Change, Standing, WorkLeft, count, hold, month_sums, standing, work_left

LIFETIME = 600.0  # seconds after which a reservation that nobody renewed belongs to a dead process

Operation = Literal["completions", "embeddings", "moderations", "compute"]

_ENTERED = (
    "reservation_id", "kind", "at", "project_id", "key_id", "model", "tokens", "reason", "prompt_tokens",
    "completion_tokens", "cached_tokens", "user_id", "operation", "batch", "cost",
)  # fmt: skip
_ENTER = Prepared(usage_entries.insert().inline(), _ENTERED)
_ENTER_WORK = usage_entries.insert()
_OPEN = Prepared(open_reservations.insert().inline(), open_reservations.columns.keys())
_REMOVE = Prepared(open_reservations.delete().where(open_reservations.c.id == sa.bindparam("reservation")))


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


NOTHING = Usage(0, 0)


@dataclass(frozen=True)
class Reservation:
    """Room for one request: settle it with what was used, or release it.

    `limits` says what was left of each limit on requests and tokens once it was made.
    """

    id: str
    project_id: str
    key_id: str | None
    model: str
    tokens: int
    at: float
    user_id: str | None = None
    operation: str = "completions"
    batch: bool = False
    prompt_tokens: int = 0
    cost: int = 0  # in NANO
    limits: tuple[LimitState, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Work:
    """Processor time that an attempt of a job used; `id` names the attempt."""

    project_id: str
    id: str
    name: str
    cpu_seconds: float
    gpu_seconds: float
    key_id: str | None = None
    user_id: str | None = None


@dataclass(frozen=True)
class UsageSum:
    """What one group of settled requests used: `group` is a model, a project or a key; `cost` is in NANO."""

    group: str | None
    requests: int
    usage: Usage
    cost: int = 0


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

    def __init__(
        self, db: Engine, clock: Callable[[], float] = time.time, prices: Prices | None = None
    ) -> None:
        self.db = db
        self.clock = clock
        self.prices = prices or Prices()

    def reserve(
        self,
        identity: Identity,
        model: str,
        tokens: int,
        lifetime: float = LIFETIME,
        *,
        generated: int = 0,
        operation: Operation = "completions",
    ) -> Reservation:
        """Take `tokens`, of which `generated` may be generated, out of the limits before work begins.

        Raises LimitError with retry_after when a limit of the project, the model or the organization does not
        allow it, even after the project's reservations that outlived theirs have been released; ConflictError
        for an archived project. Renew within `lifetime` seconds.
        """
        assert tokens >= generated >= 0
        now, project = self.clock(), identity.project_id
        cost = self.prices.current().tokens(model, tokens - generated, generated)
        asked = Asked(tokens, tokens - generated, cost, identity.background)
        with write(self.db, lock=f"usage:{project}") as connection:
            try:
                limits = _allowed(connection, project, model, asked, now)
            except LimitError:
                if not _expire(connection, project, now):
                    raise
                limits = _allowed(connection, project, model, asked, now)
            made = Reservation(
                f"res_{secrets.token_hex(12)}", project, identity.key_id, model, tokens, now,
                identity.user_id or identity.service_account_id, operation, identity.background,
                asked.prompt_tokens, cost, limits,
            )  # fmt: skip
            _OPEN.run(connection, _opening(made, now + lifetime))
            _ENTER.run(connection, _entry(made, "reserve", now, tokens, cost))
            _count(connection, made, tokens, made.prompt_tokens, cost, requests=1)
        return made

    def renew(self, reservation: Reservation, lifetime: float = LIFETIME) -> None:
        """Say that a long request still lives. Raises ConflictError if its reservation is closed."""
        update = open_reservations.update().where(open_reservations.c.id == reservation.id)
        with write(self.db) as connection:
            if not connection.execute(update.values(expires_at=self.clock() + lifetime)).rowcount:
                raise ConflictError(f"The reservation {reservation.id} is closed.")

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Replace what was reserved by what was used, once. After expiry the use still counts.

        What it costs is fixed here, by the prices of now. Raises ConflictError if it was settled or released
        before, NotFoundError if it was never made.
        """
        of, total = reservation, usage.total_tokens
        cost = self.prices.current().tokens(
            of.model, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
        )
        with write(self.db, lock=f"usage:{of.project_id}") as connection:
            now = self.clock()
            used = _entry(of, "use", now, total, cost, usage)
            if _REMOVE.run(connection, {"reservation": of.id}):
                reversed = _entry(of, "reverse", now, -of.tokens, -of.cost, reason="settled")
                _ENTER.run(connection, reversed)
                _ENTER.run(connection, used)
                _count(
                    connection, of, total - of.tokens, usage.prompt_tokens - of.prompt_tokens, cost - of.cost
                )
                return
            ended = _how_it_ended(connection, of)
            if ended != "expired":
                raise ConflictError(f"The reservation {of.id} was {ended} already.")
            _ENTER.run(connection, used)
            _count(connection, of, total, usage.prompt_tokens, cost)

    def release(self, reservation: Reservation) -> None:
        """Give back what was reserved: nothing was used. A second release changes nothing.

        Raises ConflictError if it was settled before, NotFoundError if it was never made.
        """
        with write(self.db, lock=f"usage:{reservation.project_id}") as connection:
            if _close(connection, reservation, "released", self.clock()):
                return
            if _how_it_ended(connection, reservation) == "settled":
                raise ConflictError(f"The reservation {reservation.id} was settled already.")

    def book(
        self,
        project_id: str,
        work_id: str,
        name: str,
        *,
        cpu_seconds: float,
        gpu_seconds: float,
        key_id: str | None = None,
        user_id: str | None = None,
    ) -> None:
        """Enter the processor time that a job's attempt used, as it ends. The same `work_id` counts once."""
        work = Work(project_id, work_id, name, cpu_seconds, gpu_seconds, key_id, user_id)
        with write(self.db) as connection:
            self.book_in(connection, work)

    def book_in(self, connection: Connection, work: Work) -> None:
        """The same, in the transaction in which the attempt ends."""
        now, (of, cpu_ms, gpu_ms) = self.clock(), self._priced(work)
        take_lock(connection, f"usage:{work.project_id}")
        entries = usage_entries.c
        known = sa.select(entries.id).where(entries.reservation_id == work.id, entries.kind == "use")
        if connection.execute(known).first() is not None:
            return
        entry = _entry(of, "use", now, 0, of.cost)
        connection.execute(_ENTER_WORK, {**entry, "cpu_ms": cpu_ms, "gpu_ms": gpu_ms})
        count(connection, Change(work.project_id, "", now, cost=of.cost, gpu_ms=gpu_ms, minute=False))

    def hold_in(self, connection: Connection, work: Work) -> None:
        """Reserve the money that an attempt may cost, in the transaction in which it begins, until it is let go."""
        of, _, _ = self._priced(work)
        if of.cost:
            take_lock(connection, f"usage:{work.project_id}")
            _ENTER.run(connection, _entry(of, "reserve", of.at, 0, of.cost))
            hold(connection, work.project_id, of.cost)

    def let_go_in(self, connection: Connection, work_id: str) -> None:
        """Give back what an attempt has reserved, if anything, in the transaction in which it ends."""
        entries = usage_entries.c
        reserved = sa.select(usage_entries).where(
            entries.reservation_id == work_id, entries.kind == "reserve"
        )
        found = connection.execute(reserved).one_or_none()
        if found is None:
            return
        take_lock(connection, f"usage:{found.project_id}")
        again = {name: getattr(found, name) for name in _ENTERED}
        reverse = {"kind": "reverse", "at": self.clock(), "reason": "ended", "cost": -found.cost}
        _ENTER.run(connection, {**again, **reverse})
        hold(connection, found.project_id, -found.cost)

    def _priced(self, work: Work) -> tuple[Reservation, int, int]:
        """The entry's facts, with what the time costs now; milliseconds of CPUs and of GPUs."""
        cpu_ms, gpu_ms = round(work.cpu_seconds * 1000), round(work.gpu_seconds * 1000)
        cost, now = self.prices.current().work(cpu_ms, gpu_ms), self.clock()
        of = Reservation(
            work.id, work.project_id, work.key_id, work.name, 0, now, work.user_id, "compute", cost=cost
        )
        return of, cpu_ms, gpu_ms

    def work_left(self) -> dict[str, WorkLeft]:
        """What is left in this month for the jobs of each project that has a limit or whose organization has one."""
        with snapshot(self.db) as connection:
            return work_left(connection, self.clock())

    def month_cost(self, *, project_id: str | None = None, organization_id: str | None = None) -> int:
        """What was spent or is reserved in this month, in NANO: by a project, or by an organization."""
        with self.db.connect() as connection:
            return month_sums(
                connection, self.clock(), project_id=project_id, organization_id=organization_id
            )[0]

    def expire(self) -> int:
        """Release the overdue reservations of all projects; how many. A server does so every minute."""
        now = self.clock()
        overdue = sa.select(open_reservations.c.project_id).where(open_reservations.c.expires_at <= now)
        with self.db.connect() as connection:
            owners = sorted(connection.execute(overdue.distinct()).scalars())
        total = 0
        for project in owners:
            with write(self.db, lock=f"usage:{project}") as connection:
                total += _expire(connection, project, now)
        return total

    def consumption(self, project_id: str, model: str = "") -> Consumption:
        """What a project, or one model in it with its versions, used or has reserved in this minute and day (UTC)."""
        with self.db.connect() as connection:
            found = standing(connection, project_id, family(model), self.clock())
            return found.model_used if model else found.used

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
            for column in (
                entries.prompt_tokens,
                entries.completion_tokens,
                entries.cached_tokens,
                entries.cost,
            )
        ]
        query = sa.select(group, sa.func.count(), *sums).where(entries.kind == "use", entries.at >= since)
        if until != float("inf"):
            query = query.where(entries.at < until)
        if project_id is not None:
            query = query.where(entries.project_id == project_id)
        query = query.group_by(group).order_by(sa.func.sum(entries.tokens).desc(), group)
        with self.db.connect() as connection:
            return [
                UsageSum(name, requests, Usage(int(prompt), int(completion), int(cached)), int(cost))
                for name, requests, prompt, completion, cached, cost in connection.execute(query)
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


def _allowed(
    connection: Connection, project_id: str, model: str, asked: Asked, now: float
) -> tuple[LimitState, ...]:
    """What is left of every limit that the request meets. Raises LimitError."""
    model = family(model)
    found = standing(connection, project_id, model, now)
    if found.organization_quota is not None:
        found = _alone_in_organization(connection, project_id, model, now)
        assert found.organization_quota is not None
        check(found.organization_quota, found.organization_used, asked, now)
    states = check(found.quota, found.used, asked, now)
    if found.model_quota is not None:
        states += check(found.model_quota, found.model_used, asked, now, model)
    return tuple(states)


def _alone_in_organization(connection: Connection, project_id: str, model: str, now: float) -> Standing:
    """Read again with no other project of the organization writing: its limit is on their sum."""
    query = sa.select(projects.c.organization_id).where(projects.c.id == project_id)
    take_lock(connection, f"usage of organization:{connection.execute(query).scalar_one()}")
    return standing(connection, project_id, model, now)


def _entry(
    of: Reservation,
    kind: str,
    at: float,
    tokens: int,
    cost: int,
    usage: Usage | None = None,
    reason: str = "",
) -> dict[str, Any]:
    return {
        "reservation_id": of.id, "kind": kind, "at": at, "project_id": of.project_id, "key_id": of.key_id,
        "model": of.model, "tokens": tokens, "reason": reason, **vars(usage or NOTHING), "user_id": of.user_id,
        "operation": of.operation, "batch": int(of.batch), "cost": cost,
    }  # fmt: skip


def _opening(of: Reservation, expires_at: float) -> dict[str, Any]:
    return {
        "id": of.id, "project_id": of.project_id, "key_id": of.key_id, "model": of.model, "tokens": of.tokens,
        "at": of.at, "expires_at": expires_at, "user_id": of.user_id, "operation": of.operation,
        "batch": int(of.batch), "prompt_tokens": of.prompt_tokens, "cost": of.cost,
    }  # fmt: skip


def _close(connection: Connection, reservation: Reservation, reason: str, now: float) -> bool:
    """Reverse an open reservation; False if somebody else closed it before (deleting the row decides who)."""
    of = reservation
    if not _REMOVE.run(connection, {"reservation": of.id}):
        return False
    _ENTER.run(connection, _entry(of, "reverse", now, -of.tokens, -of.cost, reason=reason))
    _count(connection, of, -of.tokens, -of.prompt_tokens, -of.cost)
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
    return Reservation(
        row.id, row.project_id, row.key_id, row.model, row.tokens, row.at, row.user_id, row.operation,
        bool(row.batch), row.prompt_tokens, row.cost,
    )  # fmt: skip


def _count(
    connection: Connection, of: Reservation, tokens: int, prompt_tokens: int, cost: int, requests: int = 0
) -> None:
    """Correct the windows in which a request began, whenever it ends. Requests are never uncounted."""
    batch_tokens = prompt_tokens if of.batch else 0
    model, live = family(of.model), not of.batch
    count(connection, Change(of.project_id, model, of.at, requests, tokens, batch_tokens, cost, minute=live))
