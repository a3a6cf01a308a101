"""The lists of one organization, in pages: its projects, people, invitations and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from lapis.errors import NotFoundError
from lapis.gateway.paging import Order, page
from lapis.tables.people import invites, project_users, service_accounts, users
from lapis.tables.tenants import admin_keys, api_keys, projects
from lapis.tenants.admin_keys import AdminKey, admin_key_of
from lapis.tenants.invites import Invite, invite_of
from lapis.tenants.keys import ApiKey, has_access, key_of, owned_keys
from lapis.tenants.service_accounts import ServiceAccount, service_account_of
from lapis.tenants.tenant import Project, Role, project_of, require_project
from lapis.tenants.users import Member, User, member_of, members_query, user_of

Access = Literal["active", "inactive", "any"]

# The rule of `has_access`, in SQL.
_HAS_ACCESS = sa.case(
    (api_keys.c.service_account_id.is_not(None), service_accounts.c.role.in_([Role.OWNER, Role.MEMBER])),
    else_=api_keys.c.user_id.is_(None) | (users.c.role == Role.OWNER) | project_users.c.role.is_not(None),
)
_OWNED_KEYS = owned_keys().add_columns(
    users.c.email.label("user_email"),
    users.c.name.label("user_name"),
    users.c.created_at.label("user_created_at"),
    service_accounts.c.name.label("account_name"),
    service_accounts.c.created_at.label("account_created_at"),
)


@dataclass(frozen=True)
class KeyOwner:
    """A user or a service account that a key belongs to; `email` is empty for an account."""

    id: str
    name: str
    email: str
    role: str  # in the project; of an owner of the organization, `owner`
    created_at: float


@dataclass(frozen=True)
class OwnedKey:
    """A key of a project, with whom it belongs to, if they are still there, and whether it opens the project."""

    key: ApiKey
    user: KeyOwner | None
    service_account: KeyOwner | None
    has_access: bool


class Directory:
    """Reads what belongs to one organization."""

    def __init__(self, db: Engine, organization_id: str) -> None:
        self.db = db
        self.organization_id = organization_id

    def project(self, project_id: str) -> Project:
        """A project by its id. Raises NotFoundError."""
        with self.db.connect() as connection:
            return project_of(require_project(connection, project_id, self.organization_id))

    def projects(self, archived: bool, after: str | None, limit: int) -> tuple[list[Project], bool]:
        """Projects, the newest first; archived ones only if asked for."""
        query = sa.select(projects).where(projects.c.organization_id == self.organization_id)
        if not archived:
            query = query.where(projects.c.archived_at.is_(None))
        rows, more = self._page(query, projects, after, limit)
        return [project_of(row) for row in rows], more

    def users(self, emails: Sequence[str], after: str | None, limit: int) -> tuple[list[User], bool]:
        """Users, the newest first; of these addresses, if any are given."""
        query = sa.select(users).where(users.c.organization_id == self.organization_id)
        if emails:
            query = query.where(users.c.email.in_([email.strip().lower() for email in emails]))
        rows, more = self._page(query, users, after, limit)
        return [user_of(row) for row in rows], more

    def invites(self, after: str | None, limit: int) -> tuple[list[Invite], bool]:
        """Invitations, the newest first."""
        query = sa.select(invites).where(invites.c.organization_id == self.organization_id)
        rows, more = self._page(query, invites, after, limit)
        return [invite_of(row) for row in rows], more

    def members(self, project_id: str, after: str | None, limit: int) -> tuple[list[Member], bool]:
        """The users of a project. Raises NotFoundError."""
        self.project(project_id)
        rows, more = self._page(members_query(project_id), users, after, limit)
        return [member_of(row, project_id) for row in rows], more

    def service_accounts(
        self, project_id: str, after: str | None, limit: int
    ) -> tuple[list[ServiceAccount], bool]:
        """The service accounts of a project, the newest first. Raises NotFoundError."""
        self.project(project_id)
        query = sa.select(service_accounts).where(service_accounts.c.project_id == project_id)
        rows, more = self._page(query, service_accounts, after, limit)
        return [service_account_of(row) for row in rows], more

    def keys(
        self, project_id: str, access: Access, after: str | None, limit: int
    ) -> tuple[list[OwnedKey], bool]:
        """The keys of a project that are not revoked, the newest first. Raises NotFoundError."""
        self.project(project_id)
        query = _OWNED_KEYS.where(api_keys.c.project_id == project_id, api_keys.c.revoked_at.is_(None))
        if access != "any":
            query = query.where(_HAS_ACCESS if access == "active" else sa.not_(_HAS_ACCESS))
        rows, more = self._page(query, api_keys, after, limit)
        return [_owned(row) for row in rows], more

    def key(self, project_id: str, key_id: str) -> OwnedKey:
        """A key of a project that is not revoked. Raises NotFoundError."""
        self.project(project_id)
        mine = (api_keys.c.project_id == project_id) & (api_keys.c.id == key_id)
        with self.db.connect() as connection:
            row = connection.execute(_OWNED_KEYS.where(mine, api_keys.c.revoked_at.is_(None))).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no key {key_id[:60]!r}.")
        return _owned(row)

    def admin_keys(self, after: str | None, limit: int, order: Order) -> tuple[list[AdminKey], bool]:
        """Admin keys that are not revoked."""
        mine = admin_keys.c.organization_id == self.organization_id
        query = sa.select(admin_keys).where(mine, admin_keys.c.revoked_at.is_(None))
        rows, more = self._page(query, admin_keys, after, limit, order)
        return [admin_key_of(row) for row in rows], more

    def admin_key(self, key_id: str) -> AdminKey:
        """An admin key that is not revoked. Raises NotFoundError."""
        mine = (admin_keys.c.organization_id == self.organization_id) & (admin_keys.c.id == key_id)
        query = sa.select(admin_keys).where(mine, admin_keys.c.revoked_at.is_(None))
        with self.db.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no key {key_id[:60]!r}.")
        return admin_key_of(row)

    def last_uses(self, user_ids: Sequence[str]) -> dict[str, float]:
        """When keys of these users were last used, by user; without those whose keys never were."""
        last = sa.func.max(api_keys.c.last_used_at)
        query = sa.select(api_keys.c.user_id, last).where(api_keys.c.user_id.in_(user_ids))
        with self.db.connect() as connection:
            rows = connection.execute(query.group_by(api_keys.c.user_id).having(last.is_not(None))).all()
        return {row[0]: row[1] for row in rows}

    def user_names(self, user_ids: Sequence[str]) -> dict[str, User]:
        """Users by their ids, as far as they are still there."""
        mine = users.c.organization_id == self.organization_id
        query = sa.select(users).where(mine, users.c.id.in_(user_ids))
        with self.db.connect() as connection:
            return {row.id: user_of(row) for row in connection.execute(query)}

    def _page(
        self,
        query: sa.Select[Any],
        table: sa.Table,
        after: str | None,
        limit: int,
        order: Order = "desc",
    ) -> tuple[Sequence[Row[Any]], bool]:
        with self.db.connect() as connection:
            found = page(connection, query, table, after=after, limit=limit, order=order)
        return found.rows, found.has_more


def _owned(row: Row[Any]) -> OwnedKey:
    user = account = None
    if row.user_id is not None and row.user_role is not None:
        role = row.project_role or (Role.OWNER if row.user_role == Role.OWNER else "none")
        user = KeyOwner(row.user_id, row.user_name, row.user_email, role, row.user_created_at)
    if row.service_account_id is not None and row.account_role is not None:
        account = KeyOwner(
            row.service_account_id, row.account_name, "", row.account_role, row.account_created_at
        )
    return OwnedKey(key_of(row), user, account, has_access(row))
