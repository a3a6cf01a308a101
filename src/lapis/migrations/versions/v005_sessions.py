"""Sessions of the console, and sign-ins on their way."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, Text

revision = "005"
down_revision = "004"


def upgrade() -> None:
    """Make the tables of schema 005."""
    op.create_table(
        "sessions",
        Column("id", Text),
        Column("key_id", Text),
        Column("user_id", Text),
        Column("project_id", Text),
        Column("created_at", Double, nullable=False),
        Column("used_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"]),
    )
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"])
    op.create_table(
        "sign_ins",
        Column("state", Text),
        Column("browser", Text, nullable=False),
        Column("nonce", Text, nullable=False),
        Column("verifier", Text, nullable=False),
        Column("expires_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("state", name="pk_sign_ins"),
    )
    op.create_index("ix_sign_ins_expires_at", "sign_ins", ["expires_at"])
