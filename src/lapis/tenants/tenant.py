"""Who shares this installation: organizations, their projects, and what a role may do."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, InputError, NotFoundError, nearest
from lapis.tables.tenants import organizations, projects
from lapis.tenants.quota import Quota
from lapis.tenants.windows import quota_of

DEFAULT = "default"  # the organization and the project that always exist


class Scope(StrEnum):
    """One thing a key may be allowed to do."""

    MODELS_READ = "models.read"  # list and look up models
    MODELS_USE = "models.use"  # have them answer
    WORK_READ = "work.read"  # see the project's files, batches, fine-tuning jobs and evals
    WORK_WRITE = "work.write"  # make and end them
    ADMIN = "admin"  # keys, projects, releases, everybody's usage


class Role(StrEnum):
    """A named set of scopes."""

    READER = "reader"
    MEMBER = "member"
    OWNER = "owner"

    @property
    def scopes(self) -> frozenset[Scope]:
        """What the role may do."""
        return _SCOPES[self]


_SCOPES = {
    Role.READER: frozenset({Scope.MODELS_READ, Scope.WORK_READ}),
    Role.MEMBER: frozenset(Scope) - {Scope.ADMIN},
    Role.OWNER: frozenset(Scope),
}


@dataclass(frozen=True)
class Organization:
    """A tenant: the widest border that nothing crosses."""

    id: str
    name: str
    created_at: float


@dataclass(frozen=True)
class Project:
    """A part of an organization: keys, quota and usage belong to one."""

    id: str
    organization_id: str
    name: str
    created_at: float
    quota: Quota
    archived_at: float | None = None


class Tenants:
    """The organizations and projects of an installation. Every change is audited with it."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def organizations(self) -> list[Organization]:
        """All organizations, oldest first."""
        with self.db.connect() as connection:
            rows = connection.execute(sa.select(organizations).order_by(organizations.c.created_at)).all()
        return [Organization(row.id, row.name, row.created_at) for row in rows]

    def projects(self, organization_id: str = DEFAULT) -> list[Project]:
        """An organization's projects, oldest first."""
        query = sa.select(projects).where(projects.c.organization_id == organization_id)
        with self.db.connect() as connection:
            return [project_of(row) for row in connection.execute(query.order_by(projects.c.created_at))]

    def project(self, name: str, organization_id: str = DEFAULT) -> Project:
        """A project by its id or its name, archived ones too. Raises NotFoundError naming the nearest one."""
        known = self.projects(organization_id)
        for project in known:
            if name in (project.id, project.name):
                return project
        raise NotFoundError(
            f"There is no project {name!r}. {nearest(name, (p.name for p in known))}".rstrip()
        )

    def create_organization(self, name: str, actor: str) -> Organization:
        """Add an organization. Raises ConflictError if the name is taken, InputError if it is empty."""
        made = Organization(f"org-{secrets.token_hex(8)}", _checked(name, "organization"), self.clock())
        try:
            with write(self.db) as connection:
                connection.execute(organizations.insert().values(**asdict(made)))
                facts = {"name": name, "organization_id": made.id}
                self.audit.append_in(connection, actor, "organization.create", made.id, facts)
        except sa.exc.IntegrityError as error:
            raise ConflictError(f"There is an organization {name!r} already.") from error
        return made

    def create_project(self, name: str, actor: str, organization_id: str = DEFAULT) -> Project:
        """Add a project without limits. Raises ConflictError if the name is taken, InputError if empty."""
        project_id = f"proj_{secrets.token_hex(8)}"
        made = Project(project_id, organization_id, _checked(name, "project"), self.clock(), Quota())
        row = {"id": made.id, "organization_id": organization_id, "name": name, "created_at": made.created_at}
        if all(organization.id != organization_id for organization in self.organizations()):
            raise NotFoundError(f"There is no organization {organization_id!r}.")
        try:
            with write(self.db) as connection:
                connection.execute(projects.insert().values(**row))
                self._note(connection, actor, "create", made.id, organization_id, {"name": name})
        except sa.exc.IntegrityError as error:
            raise ConflictError(f"There is a project {name!r} already.") from error
        return made

    def set_quota(self, project: str, quota: Quota, actor: str, organization_id: str = DEFAULT) -> Project:
        """Replace a project's limits; they hold from the next request on. Raises ConfigError, NotFoundError."""
        quota.check_counts()
        found = self.project(project, organization_id)
        with write(self.db) as connection:
            connection.execute(projects.update().where(projects.c.id == found.id).values(**asdict(quota)))
            self._note(connection, actor, "set_quota", found.id, organization_id, asdict(quota))
        return self.project(found.id, organization_id)

    def rename(self, project: str, name: str, actor: str, organization_id: str = DEFAULT) -> Project:
        """Give a project another name. Raises NotFoundError, ConflictError if the name is taken, InputError."""
        found = self.project(project, organization_id)
        values = {"name": _checked(name, "project")}
        try:
            with write(self.db) as connection:
                connection.execute(projects.update().where(projects.c.id == found.id).values(**values))
                self._note(connection, actor, "update", found.id, organization_id, values)
        except sa.exc.IntegrityError as error:
            raise ConflictError(f"There is a project {name!r} already.") from error
        return self.project(found.id, organization_id)

    def archive(self, project: str, actor: str, organization_id: str = DEFAULT) -> Project:
        """Close a project for good: its keys open nothing from the next request on, its records stay.

        Raises NotFoundError, ConflictError for the default project. Again, it changes nothing.
        """
        found = self.project(project, organization_id)
        if found.id == DEFAULT:
            raise ConflictError(
                "The default project cannot be archived: whoever is at the machine works in it."
            )
        with write(self.db) as connection:
            mine = (projects.c.id == found.id) & projects.c.archived_at.is_(None)
            if connection.execute(projects.update().where(mine).values(archived_at=self.clock())).rowcount:
                self._note(connection, actor, "archive", found.id, organization_id, {"name": found.name})
        return self.project(found.id, organization_id)

    def _note(
        self,
        connection: Connection,
        actor: str,
        act: str,
        project_id: str,
        organization_id: str,
        facts: dict[str, Any],
    ) -> None:
        where = {"project_id": project_id, "organization_id": organization_id}
        self.audit.append_in(connection, actor, f"project.{act}", project_id, {**facts, **where})


def require_project(connection: Connection, project_id: str, organization_id: str) -> Row[Any]:
    """The row of an organization's project. Raises NotFoundError for one that is not its own."""
    mine = (projects.c.id == project_id) & (projects.c.organization_id == organization_id)
    row = connection.execute(sa.select(projects).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no project {project_id[:60]!r}.")
    return row


def require_open_project(connection: Connection, project_id: str, organization_id: str) -> Row[Any]:
    """As `require_project`; raises ConflictError for one that is archived, in which nothing is begun."""
    row = require_project(connection, project_id, organization_id)
    if row.archived_at is not None:
        raise ConflictError(f"The project {project_id} is archived.")
    return row


def archived_in(connection: Connection, *project_ids: str) -> frozenset[str]:
    """The archived projects: all of them, or those of the named ones."""
    query = sa.select(projects.c.id).where(projects.c.archived_at.is_not(None))
    if project_ids:
        query = query.where(projects.c.id.in_(project_ids))
    return frozenset(connection.execute(query).scalars())


def project_of(row: Row[Any]) -> Project:
    """A row of `projects`."""
    return Project(row.id, row.organization_id, row.name, row.created_at, quota_of(row), row.archived_at)


def _checked(name: str, what: str) -> str:
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise InputError(f"The {what}'s name {name[:40]!r} cannot be used: 1 to 200 printable characters.")
    return name
