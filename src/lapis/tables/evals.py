"""Evals, their runs, and one row for each item of a run that was graded."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

evals = sa.Table(
    "evals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("body", Text, nullable=False),  # JSON: data_source_config, testing_criteria, metadata
    sa.Index("ix_evals_project_id_created_at", "project_id", "created_at", "id"),
)

eval_runs = sa.Table(
    "eval_runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("eval_id", Text, ForeignKey("evals.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("status", Text, nullable=False),  # queued, in_progress, completed, canceled, failed
    Column("created_at", Double, nullable=False),
    Column("total", Integer, nullable=False),  # items
    Column("identity", Text, nullable=False),  # JSON: in whose name models are asked
    Column("body", Text, nullable=False),  # JSON: data_source, metadata, testing_criteria
    Column("counts", Text, nullable=False),  # JSON: passed, failed, errored, criteria, usage
    Column("error", Text),  # JSON: code, message
    Column("lease", Text),  # token of the server that runs it
    Column("lease_until", Double),
    sa.Index("ix_eval_runs_eval_id_created_at", "eval_id", "created_at", "id"),
    sa.Index("ix_eval_runs_status_created_at", "status", "created_at"),
)

eval_items = sa.Table(
    "eval_items",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run_id", Text, ForeignKey("eval_runs.id"), nullable=False),
    Column("number", Integer, nullable=False),  # place in the data source, from 0
    Column("status", Text, nullable=False),  # pass, fail, error
    Column("created_at", Double, nullable=False),
    Column("body", Text, nullable=False),  # JSON: datasource_item, sample, results
    sa.UniqueConstraint("run_id", "number", name="uq_eval_items_run_id_number"),
    sa.Index("ix_eval_items_run_id_number", "run_id", "number", "id"),
)
