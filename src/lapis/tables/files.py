"""Files of projects: their bytes lie below the home, their facts here."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Text

from lapis.tables.schema import metadata

files = sa.Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("filename", Text, nullable=False),  # a label, never a path
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),  # SHA-256 of the bytes
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),  # NULL: kept until somebody deletes it
    Column("key_id", Text),  # by which key it came; NULL: on loopback, or made by the server
    sa.Index("ix_files_project_id_created_at", "project_id", "created_at", "id"),
    sa.Index("ix_files_expires_at", "expires_at"),
)
