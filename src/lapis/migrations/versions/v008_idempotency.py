"""Requests with an Idempotency-Key, and what they were answered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Integer, Text

revision = "008"
down_revision = "007"


def upgrade() -> None:
    """Make the tables of schema 008."""
    op.create_table(
        "idempotent_requests",
        Column("project_id", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("token", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("fingerprint", Text),
        Column("status", Integer),
        Column("answer", Text),
        Column("lease_until", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "key", name="pk_idempotent_requests"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_idempotent_requests_expires_at", "idempotent_requests", ["expires_at"])
