"""Fine-tuning jobs, their events and checkpoints, the models they make and whom those are lent to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Integer, Text

revision = "009"
down_revision = "008"


def upgrade() -> None:
    """Make the tables of schema 009."""
    op.create_table(
        "fine_tuning_jobs",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("queue_job_id", Text),
        Column("left_job_id", Text),
        Column("paused_at", Double),
        Column("finished_at", Double),
        Column("metadata", Text),
        Column("request", Text, nullable=False),
        Column("progress", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fine_tuning_jobs"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.ForeignKeyConstraint(["queue_job_id"], ["jobs.id"]),
        sa.ForeignKeyConstraint(["left_job_id"], ["jobs.id"]),
    )
    op.create_index(
        "ix_fine_tuning_jobs_project_id_created_at", "fine_tuning_jobs", ["project_id", "created_at", "id"]
    )
    op.create_index("ix_fine_tuning_jobs_status", "fine_tuning_jobs", ["status"])
    op.create_table(
        "fine_tuning_events",
        Column("id", Text),
        Column("job_id", Text, nullable=False),
        Column("sequence", Integer, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("level", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("message", Text, nullable=False),
        Column("data", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fine_tuning_events"),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"]),
        sa.UniqueConstraint("job_id", "sequence", name="uq_fine_tuning_events_job_id_sequence"),
    )
    op.create_table(
        "fine_tuning_checkpoints",
        Column("id", Text),
        Column("job_id", Text, nullable=False),
        Column("step", Integer, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("model", Text, nullable=False),
        Column("metrics", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fine_tuning_checkpoints"),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"]),
        sa.UniqueConstraint("job_id", "step", name="uq_fine_tuning_checkpoints_job_id_step"),
    )
    op.create_table(
        "fine_tuned_models",
        Column("name", Text),
        Column("project_id", Text, nullable=False),
        Column("job_id", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("folder", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("base", Text, nullable=False),
        Column("base_digest", Text, nullable=False),
        Column("licence", Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_fine_tuned_models"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"]),
    )
    op.create_table(
        "checkpoint_permissions",
        Column("id", Text),
        Column("model", Text, nullable=False),
        Column("project_id", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint_permissions"),
        sa.ForeignKeyConstraint(["model"], ["fine_tuned_models.name"]),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.UniqueConstraint("model", "project_id", name="uq_checkpoint_permissions_model_project_id"),
    )
