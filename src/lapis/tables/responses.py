"""Responses that are kept."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

stored_responses = sa.Table(
    "stored_responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("previous_id", Text),  # the response that this one continues; it may be gone
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("size", Integer, nullable=False),  # characters of items and body
    Column("input", Text, nullable=False),  # JSON list of what it was given beyond the previous one
    Column("body", Text, nullable=False),  # JSON of the response object
    sa.Index("ix_stored_responses_project_id_expires_at", "project_id", "expires_at", "size"),
)
