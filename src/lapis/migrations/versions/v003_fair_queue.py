"""Where a job runs and for whom it stops; what projects are due and used; which executors there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Text

revision = "003"
down_revision = "002"


def upgrade() -> None:
    """Make the columns and tables of schema 003."""
    op.add_column("jobs", Column("places", Text))
    op.add_column("jobs", Column("preempt_at", Double))
    op.add_column("jobs", Column("preempt_for", Text))
    op.create_table(
        "executors",
        Column("name", Text),
        Column("nodes", Text),
        Column("seen_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_executors"),
    )
    op.create_table(
        "project_shares",
        Column("project_id", Text),
        Column("weight", Double, nullable=False),
        Column("cpu_seconds", Double, nullable=False),
        Column("gpu_seconds", Double, nullable=False),
        Column("memory_byte_seconds", Double, nullable=False),
        Column("used_at", Double, nullable=False),
        Column("started_at", Double),
        sa.PrimaryKeyConstraint("project_id", name="pk_project_shares"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
