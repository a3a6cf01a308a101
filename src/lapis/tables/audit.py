"""The audit log: a chain of entries, and where it ends."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, Integer, Text

from lapis.tables.schema import metadata

audit_entries = sa.Table(  # append-only (a trigger refuses UPDATE and DELETE)
    "audit_entries",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("facts", Text, nullable=False),  # canonical JSON: the digest covers this text
    Column("previous", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("organization_id", Text),  # as in the facts, to find them by
    Column("project_id", Text),
    sa.Index("ix_audit_entries_organization_id", "organization_id", "sequence"),
    sa.Index("ix_audit_entries_project_id", "project_id", "sequence"),
)

audit_head = sa.Table(  # one row: where the chain ends, so that a dropped tail is noticed
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", Integer, nullable=False),
    Column("digest", Text, nullable=False),
)
