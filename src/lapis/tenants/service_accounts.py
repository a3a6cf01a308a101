"""Service accounts: members of a project that are no people. Their keys are born with them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import InputError, NotFoundError
from lapis.tables.people import service_accounts
from lapis.tables.tenants import api_keys
from lapis.tenants.keys import ApiKey, ApiKeys, checked_key_name
from lapis.tenants.tenant import DEFAULT, Role, require_open_project, require_project

NO_ROLE = "none"  # its keys open nothing until it has another


@dataclass(frozen=True)
class ServiceAccount:
    """A member of a project that is no person; `role` is owner, member or none."""

    id: str
    project_id: str
    name: str
    role: str
    created_at: float


class ServiceAccounts:
    """The service accounts of an installation. Every change is audited with it."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)
        self.keys = ApiKeys(db, clock)

    def create(
        self,
        name: str,
        project_id: str,
        actor: str,
        *,
        organization_id: str = DEFAULT,
        with_key: bool = True,
        expires_at: float | None = None,
    ) -> tuple[ServiceAccount, tuple[ApiKey, str] | None]:
        """Make a member with a key, whose text is shown this once; or, without key, one of role `none`.

        Raises InputError, NotFoundError, ConflictError for an archived project.
        """
        if not with_key and expires_at is not None:
            raise InputError("Without a key there is nothing that expires.", param="expires_in_seconds")
        made = ServiceAccount(
            f"svc_acct_{secrets.token_hex(12)}", project_id, checked_key_name(name),
            Role.MEMBER.value if with_key else NO_ROLE, self.clock(),
        )  # fmt: skip
        with write(self.db) as connection:
            require_open_project(connection, project_id, organization_id)
            connection.execute(service_accounts.insert().values(**asdict(made)))
            self._note(connection, actor, "create", made, organization_id, {"name": name, "role": made.role})
            if not with_key:
                return made, None
            return made, self.keys.create_in(
                connection, "Secret Key", actor, project_id, expires_at=expires_at, service_account_id=made.id
            )

    def create_key(
        self,
        service_account_id: str,
        project_id: str,
        actor: str,
        *,
        organization_id: str = DEFAULT,
        name: str = "Secret Key",
        scopes: Iterable[str] = Role.MEMBER.scopes,
        expires_at: float | None = None,
    ) -> tuple[ApiKey, str]:
        """Another key of a service account. Raises NotFoundError, InputError, ConflictError."""
        with write(self.db) as connection:
            require_open_project(connection, project_id, organization_id)
            _require(connection, service_account_id, project_id)
            return self.keys.create_in(
                connection, name, actor, project_id,
                scopes=scopes, expires_at=expires_at, service_account_id=service_account_id,
            )  # fmt: skip

    def get(self, service_account_id: str, project_id: str, organization_id: str = DEFAULT) -> ServiceAccount:
        """A service account by its id. Raises NotFoundError."""
        with self.db.connect() as connection:
            require_project(connection, project_id, organization_id)
            return service_account_of(_require(connection, service_account_id, project_id))

    def update(
        self,
        service_account_id: str,
        project_id: str,
        actor: str,
        *,
        organization_id: str = DEFAULT,
        name: str | None = None,
        role: str | None = None,
    ) -> ServiceAccount:
        """Another name or role (owner, member). Raises NotFoundError, InputError."""
        changes: dict[str, Any] = {} if name is None else {"name": checked_key_name(name)}
        if role is not None:
            if role not in (Role.OWNER, Role.MEMBER):
                raise InputError(f"A service account is owner or member, not {role!r}.", param="role")
            changes["role"] = role
        with write(self.db) as connection:
            require_project(connection, project_id, organization_id)
            found = service_account_of(_require(connection, service_account_id, project_id))
            if changes:
                mine = service_accounts.c.id == service_account_id
                connection.execute(service_accounts.update().where(mine).values(**changes))
                self._note(connection, actor, "update", found, organization_id, changes)
            return service_account_of(_require(connection, service_account_id, project_id))

    def delete(
        self, service_account_id: str, project_id: str, actor: str, organization_id: str = DEFAULT
    ) -> None:
        """Remove a service account; its keys are revoked with it. Raises NotFoundError."""
        with write(self.db) as connection:
            require_project(connection, project_id, organization_id)
            found = service_account_of(_require(connection, service_account_id, project_id))
            query = sa.select(api_keys).where(api_keys.c.service_account_id == service_account_id)
            self.keys.revoke_in(connection, connection.execute(query).all(), actor)
            connection.execute(service_accounts.delete().where(service_accounts.c.id == service_account_id))
            self._note(connection, actor, "delete", found, organization_id, {"name": found.name})

    def _note(
        self,
        connection: Connection,
        actor: str,
        act: str,
        account: ServiceAccount,
        organization_id: str,
        facts: dict[str, Any],
    ) -> None:
        where = {"project_id": account.project_id, "organization_id": organization_id}
        self.audit.append_in(connection, actor, f"service_account.{act}", account.id, {**facts, **where})


def service_account_of(row: Row[Any]) -> ServiceAccount:
    """A row of `service_accounts`."""
    return ServiceAccount(row.id, row.project_id, row.name, row.role, row.created_at)


def _require(connection: Connection, service_account_id: str, project_id: str) -> Row[Any]:
    mine = (service_accounts.c.id == service_account_id) & (service_accounts.c.project_id == project_id)
    row = connection.execute(sa.select(service_accounts).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no service account {service_account_id[:60]!r}.")
    return row
