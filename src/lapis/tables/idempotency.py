"""Requests with an Idempotency-Key, and what they were answered."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import metadata

idempotent_requests = sa.Table(
    "idempotent_requests",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("token", Text, nullable=False),  # of the request that does the work
    Column("state", Text, nullable=False),  # reading (nothing was done yet), working or done
    Column("fingerprint", Text),  # digest of path and body, once the body was read
    Column("status", Integer),
    Column("answer", Text),  # JSON; NULL: it held a secret and was not kept
    Column("lease_until", Double, nullable=False),  # of the request that does the work
    Column("expires_at", Double, nullable=False),
    sa.Index("ix_idempotent_requests_expires_at", "expires_at"),
)
