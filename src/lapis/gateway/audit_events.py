"""The audit log of one organization, as OpenAI's events: our actions under their types, filtered, in pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.errors import InputError
from lapis.tables.audit import audit_entries
from lapis.tables.people import users
from lapis.tables.tenants import admin_keys, api_keys, projects
from lapis.tenants.tenant import DEFAULT

ID = "audit_log-"
TYPES = {  # OpenAI's event for our action
    "key.create": "api_key.created",
    "key.update": "api_key.updated",
    "key.revoke": "api_key.deleted",
    "admin_key.create": "api_key.created",
    "admin_key.revoke": "api_key.deleted",
    "project.create": "project.created",
    "project.update": "project.updated",
    "project.set_quota": "project.updated",
    "model_permissions.update": "project.updated",
    "project.archive": "project.archived",
    "rate_limit.update": "rate_limit.updated",
    "user.add": "user.added",
    "user.update": "user.updated",
    "user.remove": "user.deleted",
    "project_user.add": "role.assignment.created",
    "project_user.update": "role.assignment.created",
    "project_user.remove": "role.assignment.deleted",
    "service_account.create": "service_account.created",
    "service_account.update": "service_account.updated",
    "service_account.delete": "service_account.deleted",
    "invite.create": "invite.sent",
    "invite.accept": "invite.accepted",
    "invite.delete": "invite.deleted",
    "organization.create": "organization.updated",
    "organization.update": "organization.updated",
    "session.open": "login.succeeded",
    "session.end": "logout.succeeded",
    "checkpoint_permission.create": "checkpoint.permission.created",
    "checkpoint_permission.delete": "checkpoint.permission.deleted",
}
_entries = audit_entries.c


@dataclass(frozen=True)
class Wanted:
    """Which events: of these types, actors, projects and targets (empty: all), in a span of time.

    `everything` asks for acts too that OpenAI has no event for, such as a model's load.
    """

    types: Sequence[str] = ()
    actor_ids: Sequence[str] = ()
    actor_emails: Sequence[str] = ()
    project_ids: Sequence[str] = ()
    resource_ids: Sequence[str] = ()
    times: Mapping[str, int] = field(default_factory=dict)  # gt, gte, lt, lte
    everything: bool = False


@dataclass(frozen=True)
class Actor:
    """Who acted: a person or process by name, or a key, and whose it is."""

    id: str
    key: bool
    user_id: str | None = None
    email: str | None = None
    service_account_id: str | None = None


@dataclass(frozen=True)
class Event:
    """One act."""

    id: str
    type: str
    at: float
    actor: Actor
    target: str
    facts: Mapping[str, Any]
    project_id: str | None
    project_name: str | None


def read_events(
    db: Engine,
    organization_id: str,
    wanted: Wanted,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = 20,
) -> tuple[list[Event], bool]:
    """Events, the newest first, and whether more follow in the direction asked for. Raises InputError."""
    with db.connect() as connection:
        clause = _clause(connection, organization_id, wanted)
        order = _entries.sequence.desc()
        if after is not None:
            clause &= _entries.sequence < _place(after, "after")
        if before is not None:
            clause &= _entries.sequence > _place(before, "before")
            order = _entries.sequence.asc()
        query = (
            sa.select(audit_entries, projects.c.name.label("project_name"))
            .outerjoin(projects, projects.c.id == _entries.project_id)
            .where(clause)
            .order_by(order)
            .limit(limit + 1)
        )
        rows = list(connection.execute(query))
        page = rows[:limit] if before is None else rows[:limit][::-1]
        actors = _actors(connection, {row.actor for row in page})
    return [_event(row, actors[row.actor]) for row in page], len(rows) > limit


def _clause(connection: Connection, organization_id: str, wanted: Wanted) -> sa.ColumnElement[bool]:
    mine = sa.select(projects.c.id).where(projects.c.organization_id == organization_id)
    clause = (_entries.organization_id == organization_id) | _entries.project_id.in_(mine)
    if organization_id == DEFAULT:  # acts of the installation, such as a release: whoever runs it sees them
        clause |= _entries.organization_id.is_(None) & _entries.project_id.is_(None)
    if wanted.types:
        clause &= _entries.action.in_(
            [action for action, kind in TYPES.items() if kind in wanted.types]
            + [kind for kind in wanted.types if wanted.everything]
        )
    elif not wanted.everything:
        clause &= _entries.action.in_(list(TYPES))
    if wanted.project_ids:
        clause &= _entries.project_id.in_(wanted.project_ids)
    if wanted.resource_ids:
        clause &= _entries.target.in_(wanted.resource_ids)
    if wanted.actor_ids or wanted.actor_emails:
        clause &= _entries.actor.in_(_names_of(connection, organization_id, wanted))
    for name, moment in wanted.times.items():
        clause &= _within(name, moment)
    return clause


def _within(name: str, moment: int) -> sa.ColumnElement[bool]:
    """A bound on `effective_at`, which is shown in whole seconds, and is compared as it is shown."""
    begins = moment + 1 if name in ("gt", "lte") else moment
    return _entries.at >= begins if name in ("gt", "gte") else _entries.at < begins


def _names_of(connection: Connection, organization_id: str, wanted: Wanted) -> list[str]:
    """The actors' names in the log for ids and addresses: a user and an account act through their keys too."""
    ids = set(wanted.actor_ids)
    if wanted.actor_emails:
        emails = [email.strip().lower() for email in wanted.actor_emails]
        there = users.c.email.in_(emails) & (users.c.organization_id == organization_id)
        ids |= set(connection.execute(sa.select(users.c.id).where(there)).scalars())
    owned = api_keys.c.user_id.in_(ids) | api_keys.c.service_account_id.in_(ids)
    keys = set(connection.execute(sa.select(api_keys.c.id).where(owned)).scalars())
    keys |= set(connection.execute(sa.select(admin_keys.c.id).where(admin_keys.c.user_id.in_(ids))).scalars())
    return [*ids, *(f"user:{id}" for id in ids), *(f"key:{id}" for id in ids | keys)]


def _actors(connection: Connection, names: set[str]) -> dict[str, Actor]:
    """Who stands behind the names in the log."""
    keys = [name.removeprefix("key:") for name in names if name.startswith("key:")]
    people = {name.removeprefix("user:") for name in names if name.startswith("user:")}
    owners: dict[str, tuple[str | None, str | None]] = {}
    query = sa.select(api_keys.c.id, api_keys.c.user_id, api_keys.c.service_account_id)
    for row in connection.execute(query.where(api_keys.c.id.in_(keys))):
        owners[row.id] = (row.user_id, row.service_account_id)
    admin = sa.select(admin_keys.c.id, admin_keys.c.user_id).where(admin_keys.c.id.in_(keys))
    owners |= {id: (user_id, None) for id, user_id in connection.execute(admin)}
    people |= {user for user, _ in owners.values() if user is not None}
    found = connection.execute(sa.select(users.c.id, users.c.email).where(users.c.id.in_(people)))
    emails = {row.id: row.email for row in found}
    actors = {}
    for name in names:
        kind, _, id = name.partition(":")
        if kind == "key":
            user, account = owners.get(id, (None, None))
            actors[name] = Actor(id, True, user, emails.get(user or ""), account)
        elif kind == "user":
            actors[name] = Actor(id, False, id, emails.get(id))
        else:
            actors[name] = Actor(name, False, email=id if kind == "email" else None)
    return actors


def _event(row: Row[Any], actor: Actor) -> Event:
    return Event(
        f"{ID}{row.sequence}", TYPES.get(row.action, row.action), row.at, actor, row.target,
        json.loads(row.facts), row.project_id, row.project_name,
    )  # fmt: skip


def _place(id: str, param: str) -> int:
    text = id.removeprefix(ID)
    if text == id or not text.isascii() or not text.isdigit() or len(text) > 15:
        raise InputError(f"There is no {id[:60]!r} in this list to go on {param}.", param=param)
    return int(text)
