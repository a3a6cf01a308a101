"""Users of an organization, their places in projects, service accounts, and invitations."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Text

from lapis.tables.schema import metadata

users = sa.Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("email", Text, nullable=False),  # in small letters
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),  # owner or reader
    Column("created_at", Double, nullable=False),
    sa.UniqueConstraint("organization_id", "email"),
)

project_users = sa.Table(
    "project_users",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("role", Text, nullable=False),  # owner or member
    Column("added_at", Double, nullable=False),
    sa.Index("ix_project_users_user_id", "user_id"),
)

service_accounts = sa.Table(
    "service_accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),  # owner, member, or none: its keys open nothing
    Column("created_at", Double, nullable=False),
    sa.Index("ix_service_accounts_project_id", "project_id"),
)

invites = sa.Table(
    "invites",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("email", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("projects", Text, nullable=False),  # JSON: the role in each project, by its id
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("accepted_at", Double),
    sa.Index("ix_invites_organization_id_email", "organization_id", "email"),
)
