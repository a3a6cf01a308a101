"""Organizations, their projects, and keys: those of projects, and those of who administrates an organization."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata


def limits() -> list[Column[Any]]:
    """What may be used in a minute or a day, and at once. NULL = no limit."""
    return [
        Column("requests_per_minute", Integer),
        Column("tokens_per_minute", BigInteger),
        Column("tokens_per_day", BigInteger),
        Column("requests_per_day", BigInteger),
        Column("concurrent_requests", Integer),
        Column("batch_tokens_per_day", BigInteger),
    ]


organizations = sa.Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
    Column("spend_per_month", BigInteger),  # cents; NULL = no limit
)

projects = sa.Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("archived_at", Double),  # from then on its keys open nothing
    *limits(),
    Column("spend_per_month", BigInteger),  # cents
    Column("gpu_seconds_per_month", BigInteger),
    Column("storage_bytes", BigInteger),
    Column("models_mode", Text),  # allow_list or deny_list; NULL: every model may be used
    Column("models", Text),  # JSON: the names in that list
    sa.UniqueConstraint("organization_id", "name"),
)

model_limits = sa.Table(  # of one model in a project, beside the project's own
    "model_limits",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    *limits(),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False, unique=True),
    Column("salt", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # names joined by spaces
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),  # to a minute
    # Whose it is, if anybody's. Plain ids: the key's history outlives its owner.
    Column("user_id", Text),
    Column("service_account_id", Text),
    sa.Index("ix_api_keys_project_id", "project_id"),
)

admin_keys = sa.Table(
    "admin_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False, unique=True),
    Column("salt", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("role", Text, nullable=False),  # owner or reader; never more than its user's
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),
    Column("user_id", Text),  # NULL: made at the machine
    sa.Index("ix_admin_keys_organization_id", "organization_id"),
)
