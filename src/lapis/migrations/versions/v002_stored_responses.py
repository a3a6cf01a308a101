"""Responses that are kept, so that a conversation can go on by its last response's id."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Integer, Text

revision = "002"
down_revision = "001"


def upgrade() -> None:
    """Make the tables of schema 002."""
    op.create_table(
        "stored_responses",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("previous_id", Text),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("size", Integer, nullable=False),
        Column("input", Text, nullable=False),
        Column("body", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_stored_responses"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index(
        "ix_stored_responses_project_id_expires_at",
        "stored_responses",
        ["project_id", "expires_at", "size"],
    )
