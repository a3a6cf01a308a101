"""Fine-tuning jobs, what they told, their checkpoints, the models they made, and who else may use those."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

fine_tuning_jobs = sa.Table(
    "fine_tuning_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("queue_job_id", Text, ForeignKey("jobs.id")),  # what works on it now; NULL: nothing
    Column("left_job_id", Text, ForeignKey("jobs.id")),  # what worked on it before, and may still be ending
    Column("paused_at", Double),
    Column("finished_at", Double),
    Column("metadata", Text),  # canonical JSON, NULL if none was given
    Column("request", Text, nullable=False),  # JSON of what was asked for
    Column("progress", Text, nullable=False),  # JSON of what became of it
    sa.Index("ix_fine_tuning_jobs_project_id_created_at", "project_id", "created_at", "id"),
    sa.Index("ix_fine_tuning_jobs_status", "status"),
)

fine_tuning_events = sa.Table(
    "fine_tuning_events",
    metadata,
    Column("id", Text, primary_key=True),  # of job and cause, so that nothing is told twice
    Column("job_id", Text, ForeignKey("fine_tuning_jobs.id"), nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text, nullable=False),  # JSON
    sa.UniqueConstraint("job_id", "sequence"),
)

fine_tuning_checkpoints = sa.Table(
    "fine_tuning_checkpoints",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Text, ForeignKey("fine_tuning_jobs.id"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("model", Text, nullable=False),
    Column("metrics", Text, nullable=False),  # JSON
    sa.UniqueConstraint("job_id", "step"),
)

fine_tuned_models = sa.Table(
    "fine_tuned_models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("job_id", Text, ForeignKey("fine_tuning_jobs.id"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("folder", Text, nullable=False),  # below the home
    Column("digest", Text, nullable=False),  # of the adapter
    Column("base", Text, nullable=False),
    Column("base_digest", Text, nullable=False),
    Column("licence", Text, nullable=False),
)

checkpoint_permissions = sa.Table(
    "checkpoint_permissions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("model", Text, ForeignKey("fine_tuned_models.name"), nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    sa.UniqueConstraint("model", "project_id"),
)
