"""What somebody with the database in hands can do: take the guards away, then write."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from lapis.db import write


def tamper(db: Engine, *statements: str, table: str = "audit_entries") -> None:
    """Run statements against a table that the database itself guards otherwise."""
    with write(db) as connection:
        if db.dialect.name == "postgresql":
            connection.execute(sa.text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
        else:
            for act in ("update", "delete"):
                connection.execute(sa.text(f"DROP TRIGGER IF EXISTS {table}_no_{act}"))
        for statement in statements:
            connection.execute(sa.text(statement))
