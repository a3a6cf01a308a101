"""Uploads: files that come in parts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Double, Text

revision = "007"
down_revision = "006"


def upgrade() -> None:
    """Make the tables of schema 007."""
    op.create_table(
        "uploads",
        Column("id", Text),
        Column("project_id", Text, nullable=False),
        Column("filename", Text, nullable=False),
        Column("purpose", Text, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("status", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("file_seconds", Double),
        Column("file_id", Text),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_uploads_project_id_status", "uploads", ["project_id", "status"])
    op.create_table(
        "upload_parts",
        Column("id", Text),
        Column("upload_id", Text, nullable=False),
        Column("project_id", Text, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("created_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_upload_parts"),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"]),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])
