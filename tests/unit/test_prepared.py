"""Prepared statements: the same as SQLAlchemy's own way, in the same transaction, with the same errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from lapis.db import open_database, write
from lapis.errors import StorageError
from lapis.prepared import Prepared
from lapis.tables.usage import usage_entries, usage_windows

ENTRY = {
    "reservation_id": "res_1", "kind": "use", "at": 1.5, "project_id": "default", "key_id": None,
    "model": "100 % 'of' :a model", "tokens": -(2**31), "prompt_tokens": 1, "completion_tokens": 2,
    "cached_tokens": 0, "reason": "", "cost": 2**60,
}  # fmt: skip
ENTER = Prepared(usage_entries.insert().inline(), tuple(ENTRY))


def test_rows_come_back_as_sqlalchemy_reads_them(database_url: str) -> None:
    db = open_database(database_url)
    entries = usage_entries.c
    query = sa.select(usage_entries, entries.tokens.label("again")).where(
        entries.reservation_id == sa.bindparam("which"), entries.kind == "use"
    )
    prepared = Prepared(query)
    with write(db) as connection:
        assert ENTER.run(connection, ENTRY) == 1
        (row,) = prepared.rows(connection, {"which": "res_1"})
        assert row._asdict() == connection.execute(query, {"which": "res_1"}).one()._asdict()
        assert {name: getattr(row, name) for name in ENTRY} == ENTRY and row.again == ENTRY["tokens"]
        assert prepared.rows(connection, {"which": "res_2"}) == []
    db.dispose()


def test_what_it_writes_belongs_to_the_transaction(database_url: str) -> None:
    db = open_database(database_url)

    def fail() -> None:
        with write(db) as connection:
            ENTER.run(connection, ENTRY)
            raise RuntimeError("after it")

    with pytest.raises(RuntimeError, match="after it"):
        fail()
    with db.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(usage_entries)).scalar() == 0
    db.dispose()


def test_how_many_rows_were_written_is_told(database_url: str) -> None:
    db = open_database(database_url)
    windows = usage_windows.c
    more = sa.bindparam("more")
    count = Prepared(usage_windows.update().where(windows.seconds == 60).values(tokens=windows.tokens + more))
    zeros = dict.fromkeys(("requests", "tokens", "batch_tokens", "cost", "gpu_ms"), 0)
    with write(db) as connection:
        for start in (0, 60):
            key = {"project_id": "default", "model": "", "seconds": 60, "start": start}
            connection.execute(usage_windows.insert().values(**key, **zeros))
        assert count.run(connection, {"more": 7}) == 2
        assert set(connection.execute(sa.select(windows.tokens)).scalars()) == {7}
    db.dispose()


def test_a_value_that_is_missing_is_named(database_url: str) -> None:
    db = open_database(database_url)
    statement = Prepared(usage_entries.delete().where(usage_entries.c.id == sa.bindparam("which")))
    with db.connect() as connection, pytest.raises(KeyError, match="which"):
        statement.run(connection, {})
    db.dispose()


def test_a_full_disk_is_told_as_everywhere(tmp_path: Path) -> None:
    db = open_database(f"sqlite:///{tmp_path / 'lapis.db'}")

    def fill() -> None:
        with write(db) as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            for number in range(1000):
                ENTER.run(connection, {**ENTRY, "reservation_id": f"res_{number}", "model": "x" * 4000})

    with pytest.raises(StorageError, match="No space left"):
        fill()
    db.dispose()
