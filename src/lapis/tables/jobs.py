"""The queue of jobs."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

jobs = sa.Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("spec", Text, nullable=False),  # JSON of the JobSpec
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),  # attempts that began and whose process vanished
    Column("executor", Text),  # which one it was started by, and on which host
    Column("exit_code", Integer),
    Column("lease_token", Text),
    Column("lease_until", Double),
    Column("cancel_at", Double),  # when somebody asked to cancel it
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    sa.Index("ix_jobs_state_created_at", "state", "created_at"),
)
