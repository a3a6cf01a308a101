"""Batches, and the lines of them that are finished."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Double, Integer, Text

revision = "011"
down_revision = "010"


def upgrade() -> None:
    """Make the tables of schema 011."""
    op.create_table(
        "batches",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("endpoint", Text, nullable=False),
        Column("input_file_id", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("total", Integer, nullable=False),
        Column("completed", Integer, nullable=False),
        Column("failed", Integer, nullable=False),
        Column("prompt_tokens", BigInteger, nullable=False),
        Column("completion_tokens", BigInteger, nullable=False),
        Column("cached_tokens", BigInteger, nullable=False),
        Column("lease_token", Text),
        Column("lease_until", Double, nullable=False),
        Column("facts", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_batches_project_id_created_at", "batches", ["project_id", "created_at", "id"])
    op.create_index("ix_batches_status_created_at", "batches", ["status", "created_at"])
    op.create_table(
        "batch_lines",
        Column("batch_id", Text, nullable=False),
        Column("line", Integer, nullable=False),
        Column("succeeded", Integer, nullable=False),
        Column("result", Text, nullable=False),
        sa.PrimaryKeyConstraint("batch_id", "line", name="pk_batch_lines"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"]),
    )
