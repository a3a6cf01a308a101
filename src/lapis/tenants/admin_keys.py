"""Admin keys: another kind of credential, of an organization. They administrate, and open nothing else."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from lapis.audit import AuditLog, os_user
from lapis.db import write
from lapis.errors import AuthError, InputError, NotFoundError
from lapis.tables.people import users
from lapis.tables.tenants import admin_keys
from lapis.tenants.keys import check_expiry, checked_key_name
from lapis.tenants.secret import LastUsed, Secret, matches, new_secret, prefix_of
from lapis.tenants.tenant import DEFAULT, Role

ADMIN_MARK = "lapis_admin"  # what every admin key begins with

_WITH_USER = sa.select(admin_keys, users.c.role.label("user_role")).outerjoin(
    users, users.c.id == admin_keys.c.user_id
)


@dataclass(frozen=True)
class AdminKey:
    """What is known of an admin key after its text was shown: everything but the secret."""

    id: str
    organization_id: str
    name: str
    prefix: str
    role: Role
    created_at: float
    created_by: str
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    user_id: str | None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True)
class Administrator:
    """Who administrates an organization: an owner may change it, a reader may look at everything in it."""

    organization_id: str
    role: Role
    key_id: str | None = None
    user_id: str | None = None

    @property
    def actor(self) -> str:
        """Who it is in the audit log."""
        if self.key_id is not None:
            return f"key:{self.key_id}"
        return os_user() if self.user_id is None else f"user:{self.user_id}"

    def require_owner(self) -> None:
        """Raises AuthError for a reader."""
        if self.role is not Role.OWNER:
            raise AuthError("A reader of the organization may change nothing in it; an owner may.")


LOCAL_OWNER = Administrator(DEFAULT, Role.OWNER)  # the person at the machine


class AdminKeys:
    """The admin keys of an installation. Every change is audited with it."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)
        self._used = LastUsed()

    def create(
        self,
        name: str,
        actor: str,
        *,
        organization_id: str = DEFAULT,
        role: Role = Role.OWNER,
        expires_at: float | None = None,
        user_id: str | None = None,
    ) -> tuple[AdminKey, str]:
        """Make an admin key; returned with its text, which is kept nowhere. Raises InputError."""
        if role not in (Role.OWNER, Role.READER):
            raise InputError(f"An admin key is an owner's or a reader's, not a {role}'s.", param="role")
        secret, text = new_secret(ADMIN_MARK)
        now = self.clock()
        check_expiry(expires_at, now)
        made = AdminKey(
            f"key_{secrets.token_hex(8)}", organization_id, checked_key_name(name), secret.prefix, role,
            now, actor, expires_at, None, None, user_id,
        )  # fmt: skip
        facts = {"organization_id": organization_id, "name": name, "prefix": secret.prefix, "role": role}
        with write(self.db) as connection:
            connection.execute(admin_keys.insert().values(**{**vars(made), **vars(secret)}))
            self.audit.append_in(connection, actor, "admin_key.create", made.id, facts)
        return made, text

    def list(self, organization_id: str | None = None) -> list[AdminKey]:
        """Admin keys, oldest first: all of them, or an organization's."""
        query = sa.select(admin_keys).order_by(admin_keys.c.created_at)
        if organization_id is not None:
            query = query.where(admin_keys.c.organization_id == organization_id)
        with self.db.connect() as connection:
            return [admin_key_of(row) for row in connection.execute(query)]

    def exist(self) -> bool:
        """Whether any admin key can be used now."""
        now = self.clock()
        return any(key.state(now) == "active" for key in self.list())

    def revoke(self, prefix: str, actor: str, organization_id: str = DEFAULT) -> AdminKey:
        """Revoke an organization's key by its prefix or id, from the next request on. Raises NotFoundError."""
        match = (admin_keys.c.prefix == prefix.removeprefix(f"{ADMIN_MARK}_")) | (admin_keys.c.id == prefix)
        mine = match & (admin_keys.c.organization_id == organization_id)
        with write(self.db) as connection:
            row = connection.execute(sa.select(admin_keys).where(mine).with_for_update()).one_or_none()
            if row is None or row.revoked_at is not None:
                raise NotFoundError(f"There is no key {prefix[:60]!r}.", hint="lapis keys list")
            ended = admin_keys.update().where(admin_keys.c.id == row.id).values(revoked_at=self.clock())
            connection.execute(ended)
            facts = {"prefix": row.prefix, "organization_id": organization_id}
            self.audit.append_in(connection, actor, "admin_key.revoke", row.id, facts)
            return admin_key_of(
                connection.execute(sa.select(admin_keys).where(admin_keys.c.id == row.id)).one()
            )

    def verify(self, text: str) -> Administrator:
        """Who administrates with this key. Raises AuthError; only the holder learns that it ended."""
        prefix = prefix_of(text, ADMIN_MARK)
        with self.db.connect() as connection:
            row = connection.execute(_WITH_USER.where(admin_keys.c.prefix == prefix)).one_or_none()
        if (
            not matches(text, None if row is None else Secret(row.prefix, row.salt, row.digest))
            or row is None
        ):
            raise AuthError("The admin key is not valid.", hint="lapis keys create NAME --admin")
        key, now = admin_key_of(row), self.clock()
        state = key.state(now)
        if state == "active" and key.user_id is not None and row.user_role is None:
            state = "of a user who is no longer there"
        if state != "active":
            raise AuthError(f"The admin key {key.prefix} is {state}.", hint="lapis keys create NAME --admin")
        if self._used.due(key.id, key.last_used_at, now):
            with write(self.db) as connection:
                connection.execute(
                    admin_keys.update().where(admin_keys.c.id == key.id).values(last_used_at=now)
                )
        role = Role.READER if row.user_role == Role.READER else key.role
        return Administrator(key.organization_id, role, key.id, key.user_id)


def admin_key_of(row: Row[Any]) -> AdminKey:
    """A row of `admin_keys` without its secret."""
    return AdminKey(
        row.id, row.organization_id, row.name, row.prefix, Role(row.role), row.created_at, row.created_by,
        row.expires_at, row.revoked_at, row.last_used_at, row.user_id,
    )  # fmt: skip
