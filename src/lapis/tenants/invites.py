"""Invitations: an address that may become a user of an organization, and a member of projects, within a week."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, NotFoundError
from lapis.hashing import canonical_json
from lapis.tables.people import invites, users
from lapis.tables.tenants import projects
from lapis.tenants.tenant import DEFAULT, Role, require_open_project
from lapis.tenants.users import User, Users, checked_email, organization_role, project_role, user_of

LIFETIME = 7 * 86_400.0  # seconds


@dataclass(frozen=True)
class Invite:
    """An invitation; `projects` are the roles in projects that come with it, by their ids."""

    id: str
    organization_id: str
    email: str
    role: Role
    projects: Mapping[str, Role]
    created_at: float
    expires_at: float
    accepted_at: float | None = None

    def status(self, now: float) -> Literal["accepted", "expired", "pending"]:
        """How far it has come."""
        if self.accepted_at is not None:
            return "accepted"
        return "expired" if self.expires_at <= now else "pending"


class Invites:
    """The invitations of an installation. No mail is sent: whoever signs in with the address accepts."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)
        self.users = Users(db, clock)

    def create(
        self,
        email: str,
        role: Role,
        actor: str,
        *,
        organization_id: str = DEFAULT,
        places: Mapping[str, str] | None = None,
    ) -> Invite:
        """Invite an address. Raises InputError, NotFoundError for a project, ConflictError for a user of it."""
        now = self.clock()
        roles = {project: project_role(role) for project, role in (places or {}).items()}
        made = Invite(
            f"invite-{secrets.token_hex(12)}", organization_id, checked_email(email), organization_role(role),
            roles, now, now + LIFETIME,
        )  # fmt: skip
        with write(self.db) as connection:
            for project in roles:
                require_open_project(connection, project, organization_id)
            there = (users.c.email == made.email) & (users.c.organization_id == organization_id)
            if connection.execute(sa.select(users.c.id).where(there)).first() is not None:
                raise ConflictError(f"There is a user {made.email!r} already.", param="email")
            row = {**vars(made), "projects": canonical_json(roles)}
            connection.execute(invites.insert().values(**row))
            facts = {"organization_id": organization_id, "email": made.email, "role": made.role}
            self.audit.append_in(connection, actor, "invite.create", made.id, {**facts, "projects": roles})
        return made

    def get(self, invite_id: str, organization_id: str = DEFAULT) -> Invite:
        """An invitation by its id. Raises NotFoundError."""
        mine = (invites.c.id == invite_id) & (invites.c.organization_id == organization_id)
        with self.db.connect() as connection:
            row = connection.execute(sa.select(invites).where(mine)).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no invite {invite_id[:60]!r}.")
        return invite_of(row)

    def delete(self, invite_id: str, actor: str, organization_id: str = DEFAULT) -> None:
        """Take an invitation back. Raises NotFoundError, ConflictError for one that was accepted."""
        found = self.get(invite_id, organization_id)
        with write(self.db) as connection:
            mine = (invites.c.id == invite_id) & invites.c.accepted_at.is_(None)
            if not connection.execute(invites.delete().where(mine)).rowcount:
                raise ConflictError(f"The invite {invite_id} was accepted; remove the user instead.")
            facts = {"organization_id": organization_id, "email": found.email}
            self.audit.append_in(connection, actor, "invite.delete", invite_id, facts)

    def accept(self, email: str, name: str = "", organization_id: str = DEFAULT) -> User | None:
        """Who has shown to own an address becomes a user by the newest open invitation; None without one.

        One who is a user already stays as before.
        """
        address, now = checked_email(email), self.clock()
        with write(self.db) as connection:
            there = (users.c.email == address) & (users.c.organization_id == organization_id)
            known = connection.execute(sa.select(users).where(there)).one_or_none()
            if known is not None:
                return user_of(known)
            open_ = (
                (invites.c.email == address)
                & (invites.c.organization_id == organization_id)
                & invites.c.accepted_at.is_(None)
                & (invites.c.expires_at > now)
            )
            newest = sa.select(invites).where(open_).order_by(invites.c.created_at.desc(), invites.c.id)
            row = connection.execute(newest.limit(1)).one_or_none()
            if row is None:
                return None
            invite = invite_of(row)
            connection.execute(invites.update().where(invites.c.id == invite.id).values(accepted_at=now))
            facts = {"organization_id": organization_id, "email": address}
            actor = f"email:{address}"
            self.audit.append_in(connection, actor, "invite.accept", invite.id, facts)
            user = self.users.add_in(
                connection, address, invite.role, actor, name=name, organization_id=organization_id
            )
            is_open = sa.select(projects.c.id).where(projects.c.archived_at.is_(None))
            still = set(connection.execute(is_open).scalars())
            for project, role in invite.projects.items():
                if project in still:
                    self.users.join_in(connection, project, user.id, role, actor, organization_id)
            return user


def invite_of(row: Row[Any]) -> Invite:
    """A row of `invites`."""
    places = {project: Role(role) for project, role in json.loads(row.projects).items()}
    return Invite(
        row.id, row.organization_id, row.email, Role(row.role), places,
        row.created_at, row.expires_at, row.accepted_at,
    )  # fmt: skip
