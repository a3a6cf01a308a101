"""The usage ledger, what is reserved, and the sums that quotas are decided by."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text

from lapis.tables.schema import Counter, metadata

usage_entries = sa.Table(  # append-only (a trigger refuses UPDATE and DELETE)
    "usage_entries",
    metadata,
    Column("id", Counter, primary_key=True, autoincrement=True),
    Column("reservation_id", Text, nullable=False),
    Column("kind", Text, nullable=False),  # reserve (+), reverse (-, ends a reserve), use (+)
    Column("at", Double, nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text),  # NULL: without a key, on loopback
    Column("model", Text, nullable=False),  # of compute: the job's name
    Column("tokens", Integer, nullable=False),  # signed
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("user_id", Text),  # of a user or a service account
    Column(
        "operation", Text, nullable=False, server_default="completions"
    ),  # embeddings, moderations, compute
    Column("batch", Integer, nullable=False, server_default="0"),  # 1: of a batch
    Column(
        "cost", BigInteger, nullable=False, server_default="0"
    ),  # signed, in billionths of the currency's unit
    Column("cpu_ms", BigInteger, nullable=False, server_default="0"),
    Column("gpu_ms", BigInteger, nullable=False, server_default="0"),
    sa.UniqueConstraint("reservation_id", "kind"),
    sa.Index("ix_usage_entries_project_id_at", "project_id", "at"),
)

open_reservations = sa.Table(  # what usage_entries reserved and nobody has closed yet
    "open_reservations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text),
    Column("model", Text, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("user_id", Text),
    Column("operation", Text, nullable=False, server_default="completions"),
    Column("batch", Integer, nullable=False, server_default="0"),
    Column("prompt_tokens", Integer, nullable=False, server_default="0"),
    Column("cost", BigInteger, nullable=False, server_default="0"),
    sa.Index("ix_open_reservations_project_id_expires_at", "project_id", "expires_at"),
)

usage_windows = sa.Table(  # sums of usage_entries per UTC minute and day: a limit is decided in a few lookups
    "usage_windows",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("model", Text, primary_key=True),  # empty: all models together, and compute
    Column("seconds", Integer, primary_key=True, autoincrement=False),  # length of the window
    Column("start", Integer, primary_key=True, autoincrement=False),
    Column("requests", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("batch_tokens", BigInteger, nullable=False),  # prompt tokens of batches
    Column("cost", BigInteger, nullable=False),
    Column("gpu_ms", BigInteger, nullable=False),
)
