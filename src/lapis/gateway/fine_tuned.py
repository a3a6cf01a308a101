"""Fine-tuned models: adapters that belong to a project, and whom else they are lent to."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row
from sqlalchemy.engine import Engine as Database

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import NotFoundError
from lapis.gateway.paging import Order, Page, page
from lapis.home import Home
from lapis.release.registry import Servable
from lapis.tables.fine_tuning import checkpoint_permissions, fine_tuned_models
from lapis.tables.tenants import projects


class FineTunedModels:
    """The fine-tuned models of an installation. All methods block; call them in a thread."""

    def __init__(self, home: Home, db: Database, clock: Callable[[], float] = time.time) -> None:
        self.home = home
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def servables(self, bases: Sequence[Servable]) -> list[Servable]:
        """All of them whose base is among these, with the very weights that they were trained on."""
        known = {base.name: base.digest for base in bases}
        models, lent = fine_tuned_models, checkpoint_permissions
        with self.db.connect() as connection:
            query = sa.select(models, projects.c.organization_id).join(
                projects, projects.c.id == models.c.project_id
            )
            rows = connection.execute(query).all()
            users: dict[str, set[str]] = {}
            for name, project in (
                connection.execute(sa.select(lent.c.model, lent.c.project_id)) if rows else ()
            ):
                users.setdefault(name, set()).add(project)
        return [
            Servable(
                row.name,
                self.home.root / row.folder,
                row.digest,
                "fine_tuned",
                row.licence,
                base=row.base,
                owner=row.organization_id,
                projects=frozenset({row.project_id, *users.get(row.name, ())}),
                created_at=row.created_at,
            )
            for row in rows
            if known.get(row.base) == row.base_digest
        ]

    def delete(self, project_id: str, name: str, actor: str) -> None:
        """Serve a model of a project no more, and remove its bytes. Raises NotFoundError."""
        models = fine_tuned_models
        with write(self.db, lock=f"model:{name}") as connection:
            row = _of(connection, project_id, name)
            lent = checkpoint_permissions
            connection.execute(lent.delete().where(lent.c.model == name))
            connection.execute(models.delete().where(models.c.name == name))
            facts = {"digest": row.digest, "project_id": project_id}
            self.audit.append_in(connection, actor, "model.delete", name, facts)
            same = sa.select(sa.func.count()).where(models.c.folder == row.folder)
            shared = connection.execute(same).scalar()
        if not shared:
            remove(self.home.root / row.folder)

    def permit(self, project_id: str, name: str, to: Sequence[str], actor: str) -> list[Row[Any]]:
        """Lend a model of a project to others of its organization; the permissions, those it had before too.

        Raises NotFoundError for the model or a project, with the same words for what is another organization's.
        """
        with write(self.db, lock=f"model:{name}") as connection:
            _of(connection, project_id, name)
            organization = sa.select(projects.c.organization_id).where(projects.c.id == project_id)
            mine = sa.select(projects.c.id).where(
                projects.c.organization_id == organization.scalar_subquery()
            )
            known = set(connection.execute(mine).scalars())
            unknown = next((other for other in to if other not in known), None)
            if unknown is not None:
                raise NotFoundError(f"There is no project {unknown[:80]!r} here.", param="project_ids")
            return [self._permit(connection, name, other, actor) for other in dict.fromkeys(to)]

    def permissions(
        self,
        project_id: str,
        name: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        of: str | None = None,
    ) -> Page:
        """A page of whom a project's model is lent to; `of` one project only. Raises NotFoundError, InputError."""
        lent = checkpoint_permissions
        query = sa.select(lent).where(lent.c.model == name)
        if of is not None:
            query = query.where(lent.c.project_id == of)
        with self.db.connect() as connection:
            _of(connection, project_id, name)
            return page(connection, query, lent, after=after, limit=limit, order=order)

    def withdraw(self, project_id: str, name: str, permission_id: str, actor: str) -> None:
        """Lend a model no more to a project. Raises NotFoundError."""
        lent = checkpoint_permissions
        with write(self.db, lock=f"model:{name}") as connection:
            _of(connection, project_id, name)
            which = (lent.c.id == permission_id) & (lent.c.model == name)
            row = connection.execute(sa.select(lent).where(which)).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"There is no permission {permission_id[:80]!r} here.", param="permission_id"
                )
            connection.execute(lent.delete().where(which))
            facts = {"model": name, "project_id": row.project_id}
            self.audit.append_in(connection, actor, "checkpoint_permission.delete", permission_id, facts)

    def _permit(self, connection: Connection, name: str, to: str, actor: str) -> Row[Any]:
        lent = checkpoint_permissions
        which = sa.select(lent).where(lent.c.model == name, lent.c.project_id == to)
        there = connection.execute(which).one_or_none()
        if there is not None:
            return there
        made = {
            "id": f"cp_{secrets.token_hex(12)}",
            "model": name,
            "project_id": to,
            "created_at": self.clock(),
            "created_by": actor,
        }
        connection.execute(lent.insert().values(**made))
        facts = {"model": name, "project_id": to}
        self.audit.append_in(connection, actor, "checkpoint_permission.create", made["id"], facts)  # type: ignore[arg-type]
        return connection.execute(which).one()


def remove(folder: Path) -> None:
    """Remove a model's folder: it leaves its place at once, then its bytes go."""
    leaving = folder.with_name(f".{folder.name}.{secrets.token_hex(16)}.part")
    try:
        folder.rename(leaving)
    except FileNotFoundError:
        return
    shutil.rmtree(leaving)


def _of(connection: Connection, project_id: str, name: str) -> Row[Any]:
    models = fine_tuned_models
    mine = (models.c.name == name) & (models.c.project_id == project_id)
    row = connection.execute(sa.select(models).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no model {name[:200]!r} here.", param="model")
    return row
