"""Users: people of an organization, and their places in its projects."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.tables.people import project_users, users
from lapis.tenants.tenant import DEFAULT, Role, require_open_project, require_project

EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s.][^@\s]{0,253}")


@dataclass(frozen=True)
class User:
    """A person in an organization: an owner administrates it, a reader sees it and works in projects."""

    id: str
    organization_id: str
    email: str
    name: str
    role: Role
    created_at: float


@dataclass(frozen=True)
class Member:
    """A user's place in a project."""

    user: User
    project_id: str
    role: Role
    added_at: float


class Users:
    """The users of an installation. Every change is audited with it."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def add(
        self, email: str, role: Role, actor: str, *, name: str = "", organization_id: str = DEFAULT
    ) -> User:
        """Add a person. Raises InputError for no address, ConflictError for one who is there already."""
        with write(self.db) as connection:
            return self.add_in(connection, email, role, actor, name=name, organization_id=organization_id)

    def add_in(
        self, connection: Connection, email: str, role: Role, actor: str, *, name: str, organization_id: str
    ) -> User:
        """As `add`, in the caller's `db.write` transaction."""
        address = checked_email(email)
        if self._find(connection, address, organization_id) is not None:
            raise ConflictError(f"There is a user {address!r} already.", param="email")
        made = User(
            f"user-{secrets.token_hex(12)}", organization_id, address, name.strip() or address.partition("@")[0],
            organization_role(role), self.clock(),
        )  # fmt: skip
        connection.execute(users.insert().values(**asdict(made)))
        facts = {"organization_id": organization_id, "email": address, "role": made.role}
        self.audit.append_in(connection, actor, "user.add", made.id, facts)
        return made

    def list(self, organization_id: str = DEFAULT) -> list[User]:
        """An organization's users, oldest first."""
        query = sa.select(users).where(users.c.organization_id == organization_id)
        with self.db.connect() as connection:
            return [user_of(row) for row in connection.execute(query.order_by(users.c.created_at))]

    def get(self, user_id: str, organization_id: str = DEFAULT) -> User:
        """A user by id. Raises NotFoundError."""
        with self.db.connect() as connection:
            return user_of(_require(connection, user_id, organization_id))

    def find(self, email: str, organization_id: str = DEFAULT) -> User | None:
        """A user by address."""
        with self.db.connect() as connection:
            row = self._find(connection, email.strip().lower(), organization_id)
            return None if row is None else user_of(row)

    def set_role(self, user_id: str, role: Role, actor: str, organization_id: str = DEFAULT) -> User:
        """Make a user an owner or a reader. Raises NotFoundError."""
        values = {"role": organization_role(role)}
        with write(self.db) as connection:
            _require(connection, user_id, organization_id)
            connection.execute(users.update().where(users.c.id == user_id).values(**values))
            facts = {"organization_id": organization_id, **values}
            self.audit.append_in(connection, actor, "user.update", user_id, facts)
        return self.get(user_id, organization_id)

    def remove(self, user_id: str, actor: str, organization_id: str = DEFAULT) -> None:
        """Remove a user and all places in projects: the user's keys open nothing. Raises NotFoundError."""
        with write(self.db) as connection:
            found = _require(connection, user_id, organization_id)
            connection.execute(project_users.delete().where(project_users.c.user_id == user_id))
            connection.execute(users.delete().where(users.c.id == user_id))
            facts = {"organization_id": organization_id, "email": found.email}
            self.audit.append_in(connection, actor, "user.remove", user_id, facts)

    def member(self, project_id: str, user_id: str, organization_id: str = DEFAULT) -> Member:
        """A user's place in a project. Raises NotFoundError."""
        with self.db.connect() as connection:
            require_project(connection, project_id, organization_id)
            return _member(connection, project_id, user_id, organization_id)

    def join(
        self, project_id: str, user_id: str, role: Role, actor: str, organization_id: str = DEFAULT
    ) -> Member:
        """Give a user a place in a project, or another role there. Raises NotFoundError, ConflictError."""
        with write(self.db) as connection:
            return self.join_in(connection, project_id, user_id, role, actor, organization_id)

    def join_in(
        self,
        connection: Connection,
        project_id: str,
        user_id: str,
        role: Role,
        actor: str,
        organization_id: str,
    ) -> Member:
        """As `join`, in the caller's `db.write` transaction."""
        _require(connection, user_id, organization_id)
        require_open_project(connection, project_id, organization_id)
        mine = (project_users.c.project_id == project_id) & (project_users.c.user_id == user_id)
        values = {"role": project_role(role)}
        act = "project_user.update"
        if not connection.execute(project_users.update().where(mine).values(**values)).rowcount:
            act = "project_user.add"
            row = {"project_id": project_id, "user_id": user_id, "added_at": self.clock()}
            connection.execute(project_users.insert().values(**row, **values))
        facts = {"organization_id": organization_id, "project_id": project_id, **values}
        self.audit.append_in(connection, actor, act, user_id, facts)
        return _member(connection, project_id, user_id, organization_id)

    def leave(self, project_id: str, user_id: str, actor: str, organization_id: str = DEFAULT) -> None:
        """Take a user's place in a project away; the user's keys open it no more. Raises NotFoundError."""
        with write(self.db) as connection:
            require_project(connection, project_id, organization_id)
            _member(connection, project_id, user_id, organization_id)
            mine = (project_users.c.project_id == project_id) & (project_users.c.user_id == user_id)
            connection.execute(project_users.delete().where(mine))
            facts = {"organization_id": organization_id, "project_id": project_id}
            self.audit.append_in(connection, actor, "project_user.remove", user_id, facts)

    def _find(self, connection: Connection, email: str, organization_id: str) -> Row[Any] | None:
        mine = (users.c.email == email) & (users.c.organization_id == organization_id)
        return connection.execute(sa.select(users).where(mine)).one_or_none()


def checked_email(email: str) -> str:
    """An address in small letters. Raises InputError for what is none."""
    address = email.strip().lower()
    if not EMAIL.fullmatch(address) or not address.isprintable():
        raise InputError(f"{email[:60]!r} is no e-mail address.", param="email")
    return address


def organization_role(role: str) -> Role:
    """Owner or reader. Raises InputError for another."""
    if role not in (Role.OWNER, Role.READER):
        raise InputError(f"A user of an organization is owner or reader, not {role!r}.", param="role")
    return Role(role)


def project_role(role: str) -> Role:
    """Owner or member. Raises InputError for another."""
    if role not in (Role.OWNER, Role.MEMBER):
        raise InputError(f"A user of a project is owner or member, not {role!r}.", param="role")
    return Role(role)


def user_of(row: Row[Any]) -> User:
    """A row of `users`."""
    return User(row.id, row.organization_id, row.email, row.name, Role(row.role), row.created_at)


def members_query(project_id: str) -> sa.Select[Any]:
    """The users of a project: columns of `users`, and `project_role` and `added_at`."""
    joined = project_users.join(users, users.c.id == project_users.c.user_id)
    columns = (users, project_users.c.role.label("project_role"), project_users.c.added_at)
    return sa.select(*columns).select_from(joined).where(project_users.c.project_id == project_id)


def member_of(row: Row[Any], project_id: str) -> Member:
    """A row of `members_query`."""
    return Member(user_of(row), project_id, Role(row.project_role), row.added_at)


def _member(connection: Connection, project_id: str, user_id: str, organization_id: str) -> Member:
    mine = (users.c.id == user_id) & (users.c.organization_id == organization_id)
    row = connection.execute(members_query(project_id).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no user {user_id[:60]!r} in this project.")
    return member_of(row, project_id)


def _require(connection: Connection, user_id: str, organization_id: str) -> Row[Any]:
    mine = (users.c.id == user_id) & (users.c.organization_id == organization_id)
    row = connection.execute(sa.select(users).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no user {user_id[:60]!r}.")
    return row
