"""Releases."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, Integer, Text

from lapis.tables.schema import metadata

releases = sa.Table(
    "releases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("digest", Text, nullable=False),  # of the weights
    Column("manifest_digest", Text, nullable=False),  # SHA-256 of the folder's lapis.json
    Column("run_id", Text),
    Column("report", Text),  # JSON of the evaluation, NULL while there is none
    Column("lineage", Text, nullable=False),  # JSON
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("approved_by", Text),
    Column("reason", Text, nullable=False),  # why gates were overridden
)
