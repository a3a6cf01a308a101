"""Evals, their runs and the items of a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Integer, Text

revision = "013"
down_revision = "012"


def upgrade() -> None:
    """Make the tables of schema 013."""
    op.create_table(
        "evals",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("name", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("updated_at", Double, nullable=False),
        Column("body", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evals"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_evals_project_id_created_at", "evals", ["project_id", "created_at", "id"])
    op.create_table(
        "eval_runs",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("eval_id", Text, nullable=False),
        Column("name", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("total", Integer, nullable=False),
        Column("identity", Text, nullable=False),
        Column("body", Text, nullable=False),
        Column("counts", Text, nullable=False),
        Column("error", Text),
        Column("lease", Text),
        Column("lease_until", Double),
        sa.PrimaryKeyConstraint("id", name="pk_eval_runs"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.ForeignKeyConstraint(["eval_id"], ["evals.id"]),
    )
    op.create_index("ix_eval_runs_eval_id_created_at", "eval_runs", ["eval_id", "created_at", "id"])
    op.create_index("ix_eval_runs_status_created_at", "eval_runs", ["status", "created_at"])
    op.create_table(
        "eval_items",
        Column("id", Text),
        Column("run_id", Text, nullable=False),
        Column("number", Integer, nullable=False),
        Column("status", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("body", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_eval_items"),
        sa.ForeignKeyConstraint(["run_id"], ["eval_runs.id"]),
        sa.UniqueConstraint("run_id", "number", name="uq_eval_items_run_id_number"),
    )
    op.create_index("ix_eval_items_run_id_number", "eval_items", ["run_id", "number", "id"])
