"""Files: uploads and results of projects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Double, Text

revision = "004"
down_revision = "003"


def upgrade() -> None:
    """Make the tables of schema 004."""
    op.create_table(
        "files",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("filename", Text, nullable=False),
        Column("purpose", Text, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("digest", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double),
        Column("key_id", Text),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_files_project_id_created_at", "files", ["project_id", "created_at", "id"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
