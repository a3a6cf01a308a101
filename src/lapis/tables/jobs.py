"""The queue of jobs, and where they may run."""

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
    Column("places", Text),  # JSON: node, ranks, numbers of GPUs; NULL while it does not run
    Column("preempt_at", Double),  # when it was asked to stop for another job
    Column("preempt_for", Text),  # the id of that job
    sa.Index("ix_jobs_state_created_at", "state", "created_at"),
)

executors = sa.Table(  # what the controllers say of their executors, so that anyone can tell why a job waits
    "executors",
    metadata,
    Column("name", Text, primary_key=True),
    Column("nodes", Text),  # JSON; NULL: it has a queue of its own
    Column("seen_at", Double, nullable=False),
)

project_shares = sa.Table(  # what a project is due, and what it used, decayed
    "project_shares",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("weight", Double, nullable=False),
    Column("cpu_seconds", Double, nullable=False),  # all three decayed until used_at
    Column("gpu_seconds", Double, nullable=False),
    Column("memory_byte_seconds", Double, nullable=False),
    Column("used_at", Double, nullable=False),
    Column("started_at", Double),  # when the first of its jobs in their order was started last
)
