"""The database: opened, migrated once however many begin at once, and honest about what is wrong with it."""

from __future__ import annotations

import importlib
import pkgutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from lapis import db as database
from lapis import tables
from lapis.errors import ConfigError, ConflictError, IntegrityError, StorageError, UnavailableError
from lapis.tables.schema import metadata
from lapis.tables.tenants import organizations, projects


@pytest.fixture
def url(empty_database_url: str) -> str:
    return empty_database_url


def test_migrations_make_exactly_the_tables_that_the_code_uses(url: str) -> None:
    for module in pkgutil.iter_modules(tables.__path__, f"{tables.__name__}."):
        importlib.import_module(module.name)
    engine = database.open_database(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(url: str) -> None:
    database.migrate(url)
    engine = database.open_database(url)
    with engine.connect() as connection:
        assert connection.execute(sa.select(projects.c.id)).scalars().all() == ["default"]
        assert (
            connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == database.SCHEMA
        )
    engine.dispose()


def test_processes_that_start_at_once_migrate_once(url: str) -> None:
    code = f"from lapis.db import open_database; open_database({url!r}).dispose()"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    engine = database.connect(url)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(projects)).scalar() == 1
        if engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    engine.dispose()


@pytest.mark.sqlite
def test_sqlite_is_opened_for_many_processes_and_for_its_owner_only(url: str) -> None:
    engine = database.open_database(url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == database.BUSY_SECONDS * 1000
    path = Path(url.removeprefix("sqlite:///"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    engine.dispose()


def test_a_write_that_fails_leaves_nothing(url: str) -> None:
    engine = database.open_database(url)
    row = {"id": "o", "name": "half", "created_at": 0.0}

    def act() -> None:
        with database.write(engine) as connection:
            connection.execute(organizations.insert().values(**row))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        act()
    with engine.connect() as connection:
        assert connection.execute(sa.select(organizations.c.name)).scalars().all() == ["default"]
    engine.dispose()


def test_the_database_itself_refuses_to_change_what_is_append_only(url: str) -> None:
    from lapis.audit import AuditLog

    engine = database.open_database(url)
    AuditLog(engine).append("os:me", "key.create", "key_1")
    for statement in ("UPDATE audit_entries SET actor = 'nobody'", "DELETE FROM audit_entries"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write(engine) as connection:
            connection.execute(sa.text(statement))
    engine.dispose()


def test_a_database_of_a_newer_lapis_is_left_alone(url: str) -> None:
    engine = database.open_database(url)
    with database.write(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '999'"))
    with pytest.raises(ConflictError, match="999") as caught:
        database.open_database(url)
    assert "upgrade" in caught.value.hint
    engine.dispose()


@pytest.mark.sqlite
def test_a_file_that_is_no_database_is_named_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "lapis.db").write_bytes(b"this is a text, and no database at all" * 40)
    with pytest.raises(IntegrityError, match="damaged"):
        database.open_database(f"sqlite:///{tmp_path / 'lapis.db'}")


@pytest.mark.sqlite
def test_a_place_that_cannot_hold_a_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be opened"):
        database.connect(f"sqlite:///{tmp_path / 'file' / 'lapis.db'}")


@pytest.mark.parametrize("url", ["mysql://root@host/lapis", "sqlite://", "no url at all"])
def test_what_is_not_offered_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        database.connect(url)


def test_without_its_driver_postgresql_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UnavailableError) as caught:
        database.connect("postgresql://lapis@localhost/lapis")
    assert caught.value.hint == "pip install 'lapis[postgres]'"


@pytest.mark.parametrize(
    ("text", "kind", "again"),
    [
        ("FATAL:  the database system is starting up", UnavailableError, True),
        ("FATAL:  the database system is shutting down", UnavailableError, True),
        ("FATAL:  the database system is not yet accepting connections", UnavailableError, True),
        ("consuming input failed: SSL SYSCALL error: EOF detected", UnavailableError, True),
        ("the connection is lost", UnavailableError, True),
        ("server closed the connection unexpectedly", UnavailableError, True),
        ("connection timeout expired", UnavailableError, False),
        ("could not connect: No route to host", UnavailableError, False),
        ("disk I/O error", StorageError, False),
    ],
)
def test_what_passes_is_told_from_a_defect(text: str, kind: type[Exception], again: bool) -> None:
    explained = database._explain(text.lower())
    assert isinstance(explained, kind)
    assert (getattr(explained, "retry_after", None) is not None) == again
