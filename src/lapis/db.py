"""One database per installation: SQLite (WAL) by default, PostgreSQL by URL."""

from __future__ import annotations

import importlib.resources
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text
from sqlalchemy.engine import Connection, Engine

from lapis.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    LapisError,
    StorageError,
    UnavailableError,
)

SCHEMA = "002"  # the newest revision in migrations/versions; a database at it needs no migration
BUSY_SECONDS = 30.0  # how long a writer waits for another one

# Times are seconds since 1970 as double precision, which SQLite and PostgreSQL both give back bit for bit.
metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)
Counter = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only an INTEGER key

audit_entries = sa.Table(  # append-only (a trigger refuses UPDATE and DELETE)
    "audit_entries",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("facts", Text, nullable=False),  # canonical JSON: the digest covers this text
    Column("previous", Text, nullable=False),
    Column("digest", Text, nullable=False),
)

audit_head = sa.Table(  # one row: where the chain ends, so that a dropped tail is noticed
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", Integer, nullable=False),
    Column("digest", Text, nullable=False),
)

organizations = sa.Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
)

projects = sa.Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("requests_per_minute", Integer),  # NULL = no limit, for all three
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    sa.UniqueConstraint("organization_id", "name"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False, unique=True),
    Column("salt", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # names joined by spaces
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)

usage_entries = sa.Table(  # append-only (a trigger refuses UPDATE and DELETE)
    "usage_entries",
    metadata,
    Column("id", Counter, primary_key=True, autoincrement=True),
    Column("reservation_id", Text, nullable=False),
    Column("kind", Text, nullable=False),  # reserve (+), reverse (-, ends a reserve), use (+)
    Column("at", Double, nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text),  # NULL: without a key, on loopback
    Column("model", Text, nullable=False),
    Column("tokens", Integer, nullable=False),  # signed
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    sa.UniqueConstraint("reservation_id", "kind"),
    sa.Index("ix_usage_entries_project_id_at", "project_id", "at"),
)

open_reservations = sa.Table(  # what usage_entries reserved and nobody has closed yet
    "open_reservations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text),
    Column("model", Text, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    sa.Index("ix_open_reservations_project_id_expires_at", "project_id", "expires_at"),
)

usage_windows = sa.Table(  # sums of usage_entries per UTC minute and day: a quota is decided in two lookups
    "usage_windows",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("seconds", Integer, primary_key=True, autoincrement=False),  # length of the window
    Column("start", Integer, primary_key=True, autoincrement=False),
    Column("requests", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

releases = sa.Table(
    "releases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("digest", Text, nullable=False),  # of the weights
    Column("manifest_digest", Text, nullable=False),  # SHA-256 of the folder's lapis.json
    Column("run_id", Text),
    Column("report", Text),  # JSON of the evaluation, NULL while there is none
    Column("lineage", Text, nullable=False),  # JSON
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("approved_by", Text),
    Column("reason", Text, nullable=False),  # why gates were overridden
)

jobs = sa.Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("spec", Text, nullable=False),  # JSON of the JobSpec
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),  # attempts that began and whose process vanished
    Column("executor", Text),  # which one it was started by, and on which host
    Column("exit_code", Integer),
    Column("lease_token", Text),
    Column("lease_until", Double),
    Column("cancel_at", Double),  # when somebody asked to cancel it
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    sa.Index("ix_jobs_state_created_at", "state", "created_at"),
)

stored_responses = sa.Table(
    "stored_responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("previous_id", Text),  # the response that this one continues; it may be gone
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("size", Integer, nullable=False),  # characters of items and body
    Column("input", Text, nullable=False),  # JSON list of what it was given beyond the previous one
    Column("body", Text, nullable=False),  # JSON of the response object
    sa.Index("ix_stored_responses_project_id_expires_at", "project_id", "expires_at", "size"),
)


def connect(url: str) -> Engine:
    """Open a database by URL (`sqlite:///path` or `postgresql://…`) without migrating it.

    Raises ConfigError for another kind of URL, UnavailableError where the driver is missing.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError(
            "The database URL cannot be read.", hint="Example: LAPIS_DATABASE_URL=sqlite:////srv/lapis.db"
        ) from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        engine = _connect_sqlite(parsed)
    elif kind in ("postgresql", "postgres"):
        engine = _connect_postgresql(parsed)
    else:
        raise ConfigError(
            f"{kind} databases are not offered.", hint="Use sqlite:///path or postgresql://user@host/name"
        )
    sa.event.listen(engine, "handle_error", _translate)
    return engine


def open_database(url: str) -> Engine:
    """Open a database and bring its tables up to date: what every command and server begins with."""
    migrate(url)
    return connect(url)


@contextmanager
def write(db: Engine, lock: str = "") -> Iterator[Connection]:
    """A transaction that may write: committed at the end of the block, rolled back on an error.

    On SQLite its holder is the only writer. On PostgreSQL it is alone among the holders of the same `lock`.
    """
    with db.connect() as plain:
        connection = plain.execution_options(lapis_write=True)
        with connection.begin():
            if lock and db.dialect.name == "postgresql":
                connection.execute(
                    sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(lock, 0)))
                )
            yield connection


@contextmanager
def snapshot(db: Engine) -> Iterator[Connection]:
    """A transaction whose reads all see the same moment, whatever is written meanwhile."""
    with db.connect() as connection:
        if db.dialect.name == "postgresql":  # SQLite's transactions are so by themselves
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


def migrate(url: str) -> None:
    """Bring the tables up to SCHEMA. Does nothing when they are, and waits for another process that is at it.

    Raises ConflictError if the database was written by a newer Lapis.
    """
    engine = connect(url)
    try:
        if _revision(engine) != SCHEMA:
            with write(engine, lock="migrate") as connection:
                _upgrade(connection)
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    folder = importlib.resources.files("lapis.migrations")
    script = ScriptDirectory(str(folder))
    current = _current(connection)
    if current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
        raise ConflictError(
            f"The database has schema {current}; this Lapis knows up to {SCHEMA}.",
            hint="It was written by a newer Lapis: upgrade with `pip install --upgrade lapis`.",
        )

    def steps(revision: Any, context: Any) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        # The caller's transaction holds everything, so a killed migration leaves the old schema whole.
        environment.configure(connection=connection, transactional_ddl=True)
        environment.run_migrations()


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return _current(connection)


def _current(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _connect_sqlite(url: sa.URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("A SQLite database needs a file.", hint="Example: sqlite:////srv/lapis.db")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Digests of keys and who did what: for the owner's eyes. SQLite gives -wal and -shm the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(f"The database {path} cannot be opened: {error.strerror}.") from error
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing; WAL stays whole
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its place at once: two readers that both turn into writers would deadlock.
        writes = connection.get_execution_options().get("lapis_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: Any) -> None:
    """Switch the file to WAL. The busy timeout does not cover this, so two first openers take turns."""
    import sqlite3

    give_up = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _connect_postgresql(url: sa.URL) -> Engine:
    try:
        return sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except ImportError as error:
        raise UnavailableError(
            "PostgreSQL needs the psycopg driver, which is not installed.",
            hint="pip install 'lapis[postgres]'",
        ) from error


def _translate(context: sa.engine.ExceptionContext) -> None:
    """Turn what a user can mend into a LapisError; everything else stays as it is."""
    translated = _explain(str(context.original_exception).lower())
    if translated is not None:
        raise translated from context.original_exception


def _explain(text: str) -> LapisError | None:
    if "database is locked" in text:
        return ConflictError(
            f"The database was busy for {BUSY_SECONDS:.0f} s.",
            hint="Another Lapis process holds it; try again.",
        )
    if "disk is full" in text or "disk full" in text or "no space left" in text:
        return StorageError(
            "No space left for the database.", hint="Free some space, then run the same command again."
        )
    if "readonly database" in text or "unable to open database" in text:
        return StorageError("The database cannot be written.", hint="`lapis doctor` shows where it lies.")
    if "not a database" in text or "malformed" in text:
        return IntegrityError(
            "The database file is damaged.",
            hint="Put back a backup of it; `lapis doctor` shows where it lies.",
        )
    if "connection refused" in text or "could not translate host" in text or "failed to resolve host" in text:
        return UnavailableError("The PostgreSQL server does not answer.", hint="Check LAPIS_DATABASE_URL.")
    return None
