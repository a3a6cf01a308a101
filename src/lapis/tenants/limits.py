"""Limits of single models within a project, which models it may use at all, and what may be spent in a month."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import InputError
from lapis.hashing import canonical_json
from lapis.tables.tenants import model_limits, organizations, projects
from lapis.tenants.policy import EVERY_MODEL, ModelPolicy, family, policy_of
from lapis.tenants.quota import PROJECT_ONLY, Quota
from lapis.tenants.tenant import DEFAULT, require_project
from lapis.tenants.windows import PER_MODEL

MOST_MODELS = 1000  # in a list


class Limits:
    """What projects and their models may be used for. Every change is audited, and holds from the next request."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def models(self, project_id: str, organization_id: str = DEFAULT) -> dict[str, Quota]:
        """The limits of single models in a project, by their names. Raises NotFoundError."""
        with self.db.connect() as connection:
            require_project(connection, project_id, organization_id)
            mine = model_limits.c.project_id == project_id
            rows = connection.execute(sa.select(model_limits).where(mine)).all()
        return {row.model: Quota(**{name: getattr(row, name) for name in PER_MODEL}) for row in rows}

    def set_model(
        self, project_id: str, model: str, quota: Quota, actor: str, organization_id: str = DEFAULT
    ) -> None:
        """Replace the limits of one model in a project; a Quota without limits removes them.

        They hold for its versions and checkpoints together. Raises NotFoundError, ConfigError, InputError for a limit
        that only whole projects have, and for a version or checkpoint.
        """
        quota.check_counts()
        wrong = next((name for name in PROJECT_ONLY if getattr(quota, name) is not None), None)
        if wrong is not None:
            raise InputError(f"{wrong} is a limit of a project, not of a model.", param=wrong)
        if quota.limited and model != family(model):
            raise InputError(
                f"The limits of {family(model)!r} hold for all its versions and checkpoints together; "
                f"{model!r} has none of its own.",
                hint=f"Limit {family(model)!r} instead.",
                param="model",
            )
        values = {name: value for name, value in asdict(quota).items() if name in PER_MODEL}
        mine = (model_limits.c.project_id == project_id) & (model_limits.c.model == model)
        with write(self.db, lock=f"usage:{project_id}") as connection:
            require_project(connection, project_id, organization_id)
            connection.execute(model_limits.delete().where(mine))
            if quota.limited:
                row = {"project_id": project_id, "model": model, **values}
                connection.execute(model_limits.insert().values(**row))
            facts = {"model": model, **values}
            self._note(connection, actor, "rate_limit.update", project_id, organization_id, facts)

    def policy(self, project_id: str, organization_id: str = DEFAULT) -> ModelPolicy:
        """Which models a project may use. Raises NotFoundError."""
        with self.db.connect() as connection:
            row = require_project(connection, project_id, organization_id)
        return policy_of(row.models_mode, row.models)

    def set_policy(
        self, project_id: str, policy: ModelPolicy, actor: str, organization_id: str = DEFAULT
    ) -> None:
        """Replace it. Raises NotFoundError, InputError for too long a list."""
        if len(policy.models) > MOST_MODELS:
            raise InputError(f"A list holds at most {MOST_MODELS:,} models.", param="model_ids")
        names = sorted(policy.models)
        values: dict[str, Any] = {"models_mode": policy.mode, "models": canonical_json(names)}
        if policy == EVERY_MODEL:
            values = {"models_mode": None, "models": None}
        with write(self.db) as connection:
            require_project(connection, project_id, organization_id)
            connection.execute(projects.update().where(projects.c.id == project_id).values(**values))
            facts = {"mode": values["models_mode"], "models": names}
            self._note(connection, actor, "model_permissions.update", project_id, organization_id, facts)

    def spend(self, organization_id: str = DEFAULT) -> int | None:
        """What an organization may spend in a month, in cents; None without a limit."""
        query = sa.select(organizations.c.spend_per_month).where(organizations.c.id == organization_id)
        with self.db.connect() as connection:
            found: int | None = connection.execute(query).scalar_one()
            return found

    def set_spend(self, organization_id: str, cents: int | None, actor: str) -> None:
        """Replace what an organization may spend in a month. Raises ConfigError for a negative sum."""
        Quota(spend_per_month=cents)
        mine = organizations.c.id == organization_id
        with write(self.db) as connection:
            connection.execute(organizations.update().where(mine).values(spend_per_month=cents))
            facts = {"organization_id": organization_id, "spend_per_month": cents}
            self.audit.append_in(connection, actor, "organization.update", organization_id, facts)

    def storage(self, project_id: str) -> int | None:
        """How many bytes of files a project may keep; None without a limit, or without such a project."""
        query = sa.select(projects.c.storage_bytes).where(projects.c.id == project_id)
        with self.db.connect() as connection:
            found: int | None = connection.execute(query).scalar()
            return found

    def _note(
        self,
        connection: Connection,
        actor: str,
        action: str,
        project_id: str,
        organization_id: str,
        facts: dict[str, Any],
    ) -> None:
        where = {"project_id": project_id, "organization_id": organization_id}
        self.audit.append_in(connection, actor, action, project_id, {**facts, **where})
