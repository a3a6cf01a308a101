"""Files that come in parts."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Text

from lapis.tables.schema import metadata

uploads = sa.Table(
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),  # of the whole file, as promised
    Column("status", Text, nullable=False),  # pending, completed or cancelled
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),  # of the upload
    Column("file_seconds", Double),  # how long the file lives; NULL: until somebody deletes it
    Column("file_id", Text),  # once it is completed
    sa.Index("ix_uploads_project_id_status", "project_id", "status"),
)

upload_parts = sa.Table(
    "upload_parts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("upload_id", Text, ForeignKey("uploads.id"), nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    sa.Index("ix_upload_parts_upload_id", "upload_id"),
)
