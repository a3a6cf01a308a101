"""Batches, and the lines of them that are finished."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

batches = sa.Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("status", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),  # when what is not finished is given up
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("lease_token", Text),  # of the server that runs it
    Column("lease_until", Double, nullable=False),
    Column("facts", Text, nullable=False),  # JSON: who made it, times, errors, metadata, files
    sa.Index("ix_batches_project_id_created_at", "project_id", "created_at", "id"),
    sa.Index("ix_batches_status_created_at", "status", "created_at"),
)

batch_lines = sa.Table(  # until they are written into the batch's files
    "batch_lines",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("succeeded", Integer, nullable=False),  # 0 or 1
    Column("result", Text, nullable=False),  # JSON, as it stands in the file
)
