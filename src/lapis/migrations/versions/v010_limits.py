"""Limits per model, on spend, on compute and storage; usage by user and operation, with its cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, Text

revision = "010"
down_revision = "009"


def upgrade() -> None:
    """Make the tables of schema 010."""
    op.add_column("organizations", Column("spend_per_month", BigInteger))
    for column in (
        Column("requests_per_day", BigInteger),
        Column("concurrent_requests", Integer),
        Column("batch_tokens_per_day", BigInteger),
        Column("spend_per_month", BigInteger),
        Column("gpu_seconds_per_month", BigInteger),
        Column("storage_bytes", BigInteger),
        Column("models_mode", Text),
        Column("models", Text),
    ):
        op.add_column("projects", column)
    op.create_table(
        "model_limits",
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("model", Text, nullable=False),
        Column("requests_per_minute", Integer),
        Column("tokens_per_minute", BigInteger),
        Column("tokens_per_day", BigInteger),
        Column("requests_per_day", BigInteger),
        Column("concurrent_requests", Integer),
        Column("batch_tokens_per_day", BigInteger),
        sa.PrimaryKeyConstraint("project_id", "model", name="pk_model_limits"),
    )
    for table in ("usage_entries", "open_reservations"):
        op.add_column(table, Column("user_id", Text))
        op.add_column(table, Column("operation", Text, nullable=False, server_default="completions"))
        op.add_column(table, Column("batch", Integer, nullable=False, server_default="0"))
        op.add_column(table, Column("cost", BigInteger, nullable=False, server_default="0"))
    op.add_column("open_reservations", Column("prompt_tokens", Integer, nullable=False, server_default="0"))
    for name in ("cpu_ms", "gpu_ms"):
        op.add_column("usage_entries", Column(name, BigInteger, nullable=False, server_default="0"))
    _windows()


def _windows() -> None:
    """The sums are kept per model too. What was summed so far is of all models together."""
    connection = op.get_bind()
    before = [dict(row._mapping) for row in connection.execute(sa.text("SELECT * FROM usage_windows"))]
    op.drop_table("usage_windows")
    windows = op.create_table(
        "usage_windows",
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("model", Text, nullable=False),
        Column("seconds", Integer, autoincrement=False, nullable=False),
        Column("start", Integer, autoincrement=False, nullable=False),
        Column("requests", Integer, nullable=False),
        Column("tokens", BigInteger, nullable=False),
        Column("batch_tokens", BigInteger, nullable=False),
        Column("cost", BigInteger, nullable=False),
        Column("gpu_ms", BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "model", "seconds", "start", name="pk_usage_windows"),
    )
    more = {"model": "", "batch_tokens": 0, "cost": 0, "gpu_ms": 0}
    op.bulk_insert(windows, [{**row, **more} for row in before])
