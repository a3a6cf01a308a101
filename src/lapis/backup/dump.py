"""Tables as lines of JSON that any of our databases can read: SQLite's into PostgreSQL, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

BATCH = 1000  # rows
REVISION = "alembic_version"  # migrations write it themselves
ENDED = ("sessions", "sign_ins")  # end with a backup: who was signed in then is not let in again by it
GIVEN = ("organizations", "projects")  # have a row from the beginning


def tables(connection: Connection) -> list[sa.Table]:
    """All tables of a database as they are there, those that others refer to first."""
    found = sa.MetaData()
    found.reflect(connection)
    return [table for table in found.sorted_tables if table.name != REVISION]


def dump(connection: Connection, table: sa.Table) -> Iterator[bytes]:
    """The columns' names, then a line for each row, in the order of the primary key; no sessions."""
    yield _line([column.name for column in table.columns])
    if table.name in ENDED:
        return
    query = sa.select(table).order_by(*table.primary_key.columns)
    for row in connection.execution_options(yield_per=BATCH).execute(query):
        yield _line(list(row))


def load(connection: Connection, table: sa.Table, lines: Iterable[bytes]) -> None:
    """Put a dump's rows into an empty table."""
    each = iter(lines)
    names: list[str] = json.loads(next(each))
    while batch := list(islice(each, BATCH)):
        connection.execute(
            table.insert(), [dict(zip(names, json.loads(line), strict=True)) for line in batch]
        )
    if connection.dialect.name == "postgresql":
        _go_on_counting(connection, table)


def is_fresh(connection: Connection) -> bool:
    """Whether a database holds nothing but what every new one does."""
    for table in tables(connection):
        rows = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() or 0
        if table.name != "audit_head" and rows > (1 if table.name in GIVEN else 0):
            return False
    return True


def clear(connection: Connection) -> None:
    """Remove all tables, and on PostgreSQL the functions that guard them."""
    found = sa.MetaData()
    found.reflect(connection)
    found.drop_all(connection)
    if connection.dialect.name == "postgresql":
        guards = sa.text(
            "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname = current_schema() AND p.proname LIKE '%\\_refuse'"
        )
        for name in connection.execute(guards).scalars().all():
            connection.exec_driver_sql(f"DROP FUNCTION {name}")


def _go_on_counting(connection: Connection, table: sa.Table) -> None:
    """Let a counting key go on after the rows that were put in with theirs."""
    for column in table.primary_key.columns:
        if not isinstance(column.type, sa.Integer):
            continue
        asked = sa.func.pg_get_serial_sequence(table.name, column.name)
        sequence = connection.execute(sa.select(asked)).scalar()
        if sequence is not None:
            last = sa.select(sa.func.max(column)).scalar_subquery()
            connection.execute(sa.select(sa.func.setval(sequence, last)).where(last.is_not(None)))


def _line(values: list[Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
