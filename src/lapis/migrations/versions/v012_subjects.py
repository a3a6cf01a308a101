"""Which account of an OpenID provider is which user."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Text

revision = "012"
down_revision = "011"


def upgrade() -> None:
    """Make the tables of schema 012."""
    op.create_table(
        "subjects",
        Column("issuer", Text),
        Column("subject", Text),
        Column("user_id", Text, nullable=False),
        sa.PrimaryKeyConstraint("issuer", "subject", name="pk_subjects"),
    )
    op.create_index("ix_subjects_user_id", "subjects", ["user_id"])
