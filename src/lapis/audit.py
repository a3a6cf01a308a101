"""The audit log: append-only, hash-chained entries of who did what. Each digest covers the one before it."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import snapshot, write
from lapis.errors import IntegrityError
from lapis.hashing import canonical_json, digest_json
from lapis.tables.audit import audit_entries, audit_head

GENESIS = "0" * 64  # what the first entry follows
EXPORTED = ("sequence", "at", "actor", "action", "target", "facts", "previous", "digest")


@dataclass(frozen=True)
class AuditEntry:
    """One act: who (`actor`) did what (`action`, as noun.verb) to what (`target`), when, with which facts."""

    sequence: int
    at: float
    actor: str
    action: str
    target: str
    facts: Mapping[str, Any]
    digest: str


@dataclass(frozen=True)
class AuditSummary:
    """A verified log: how many entries, and the digest of the last one, which pins them all."""

    entries: int
    head: str


class AuditLog:
    """Who did what in this installation. Appends from many processes at once leave one unbroken chain."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock

    def append(
        self, actor: str, action: str, target: str, facts: Mapping[str, Any] | None = None
    ) -> AuditEntry:
        """Add one entry in a transaction of its own."""
        with write(self.db) as connection:
            return self.append_in(connection, actor, action, target, facts)

    def append_in(
        self,
        connection: Connection,
        actor: str,
        action: str,
        target: str,
        facts: Mapping[str, Any] | None = None,
    ) -> AuditEntry:
        """Add one entry in the caller's `db.write` transaction: act and entry stand or fall together.

        `project_id` and `organization_id` among the facts say whose entry it is.
        """
        # On PostgreSQL the other writers wait here for the end of the chain.
        heads = connection.execute(sa.select(audit_head).with_for_update()).all()
        head = _end(heads, hint="Nothing was changed. Look at it with: lapis audit verify")
        sequence, at, known = head.sequence + 1, self.clock(), dict(facts or {})
        text = canonical_json(known)
        digest = _digest(sequence, at, actor, action, target, text, head.digest)
        connection.execute(
            audit_entries.insert().values(
                sequence=sequence, at=at, actor=actor, action=action, target=target,
                facts=text, previous=head.digest, digest=digest, **_owners(known),
            )
        )  # fmt: skip
        connection.execute(audit_head.update().values(sequence=sequence, digest=digest))
        return AuditEntry(sequence, at, actor, action, target, json.loads(text), digest)

    def entries(self, after: int = 0, limit: int = 1000) -> list[AuditEntry]:
        """Entries in order, those after sequence number `after`."""
        query = sa.select(audit_entries).where(audit_entries.c.sequence > after)
        with self.db.connect() as connection:
            rows = connection.execute(query.order_by(audit_entries.c.sequence).limit(limit)).all()
        return [_entry(row) for row in rows]

    def newest(self, limit: int, actor: str = "", action: str = "", target: str = "") -> list[AuditEntry]:
        """The last entries, the newest first, whose actor, action and target contain these texts."""
        columns = audit_entries.c
        asked = ((columns.actor, actor), (columns.action, action), (columns.target, target))
        query = sa.select(audit_entries).order_by(columns.sequence.desc()).limit(limit)
        for column, text in asked:
            if text:
                query = query.where(column.contains(text, autoescape=True))
        with self.db.connect() as connection:
            return [_entry(row) for row in connection.execute(query)]

    def export(self) -> Iterator[dict[str, Any]]:
        """All entries of one moment in order, with the digests that chain them, as plain values."""
        with snapshot(self.db) as connection:
            for row in connection.execute(sa.select(audit_entries).order_by(audit_entries.c.sequence)):
                yield {**{name: row._mapping[name] for name in EXPORTED}, "facts": json.loads(row.facts)}

    def verify(self, head: str | None = None) -> AuditSummary:
        """Walk the whole chain. Raises IntegrityError naming the first entry edited, dropped or moved.

        `head` is a digest that was kept elsewhere: an entry must still have it, or the log was rebuilt or cut.
        """
        expected, previous = 1, GENESIS
        missing = head not in (None, GENESIS)
        with snapshot(self.db) as connection:
            ends = connection.execute(sa.select(audit_head)).all()
            try:
                for row in connection.execute(sa.select(audit_entries).order_by(audit_entries.c.sequence)):
                    _check(row, expected, previous)
                    expected, previous = row.sequence + 1, row.digest
                    missing = missing and row.digest != head
            except sa.exc.OperationalError as error:
                if "decode" not in str(error):
                    raise
                # SQLite gives out no text that is not UTF-8, and none that we wrote is not.
                raise IntegrityError(f"The audit log is broken: entry {expected} was changed.") from error
        end = _end(ends)
        if not isinstance(end.sequence, int):
            raise IntegrityError("The audit log is broken: the record of where it ends was changed.")
        if end.sequence >= expected:
            raise IntegrityError(f"The audit log is broken: entry {expected} is missing.")
        if (end.sequence, end.digest) != (expected - 1, previous):
            raise IntegrityError(
                f"The audit log is broken: it was recorded to end at entry {end.sequence}, "
                f"and entry {end.sequence + 1} follows."
            )
        if missing:
            raise IntegrityError(
                f"The audit log is not the one whose head was {head}: it was rebuilt, or its end was cut off."
            )
        return AuditSummary(expected - 1, previous)


def os_user() -> str:
    """The actor of a command line: the operating system's user."""
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        import os

        return f"os:uid-{os.getuid()}"


def _digest(sequence: int, at: float, actor: str, action: str, target: str, facts: str, previous: str) -> str:
    return digest_json([sequence, at, actor, action, target, facts, previous])


def _end(rows: Sequence[Row[Any]], hint: str = "") -> Row[Any]:
    """The one row that says where the chain ends. Raises IntegrityError if it is missing, or not the only one."""
    if len(rows) == 1:
        return rows[0]
    found = f"there {len(rows)} times" if rows else "missing"
    raise IntegrityError(f"The audit log is broken: the record of where it ends is {found}.", hint=hint)


def _owners(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that an entry is found by: they repeat its facts."""
    return {name: facts.get(name) for name in ("organization_id", "project_id")}


def _entry(row: Row[Any]) -> AuditEntry:
    facts = json.loads(row.facts)
    return AuditEntry(row.sequence, row.at, row.actor, row.action, row.target, facts, row.digest)


def _check(row: Row[Any], expected: int, previous: str) -> None:
    if row.sequence != expected:
        raise IntegrityError(f"The audit log is broken: entry {expected} is missing.")
    digest = None
    with suppress(TypeError, ValueError):  # values that no entry can have, such as bytes or an infinite time
        digest = _digest(row.sequence, row.at, row.actor, row.action, row.target, row.facts, row.previous)
    found = {"organization_id": row.organization_id, "project_id": row.project_id}
    if row.previous != previous or row.digest != digest or found != _owners(json.loads(row.facts)):
        raise IntegrityError(
            f"The audit log is broken: entry {row.sequence} ({row.action} of {row.target} by {row.actor}) "
            "was changed."
        )
