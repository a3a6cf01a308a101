"""Organizations, their projects, and keys: those of projects, and those of who administrates an organization."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

organizations = sa.Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
)

projects = sa.Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("archived_at", Double),  # from then on its keys open nothing
    Column("requests_per_minute", Integer),  # NULL = no limit, for all three
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    sa.UniqueConstraint("organization_id", "name"),
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
