"""One database per installation: SQLite (WAL) by default, PostgreSQL by URL."""

from __future__ import annotations

import importlib.resources
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lapis.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    LapisError,
    StorageError,
    UnavailableError,
)

# The newest revision in migrations/versions; a database at it needs no migration.
SCHEMA = max(path.name[1:4] for path in (Path(__file__).parent / "migrations" / "versions").glob("v*.py"))
BUSY_SECONDS = 30.0  # how long a writer waits for another one
TRIES = 8
FIRST_PAUSE = 0.05  # seconds; doubled each time, 6 s in all

# What PostgreSQL and its driver say: while the server starts or ends, when a connection is gone, when there is none.
CHANGING = (
    "system is starting up",
    "system is shutting down",
    "in recovery mode",
    "yet accepting connections",
)
ENDED = (
    "server closed the connection", "terminating connection", "ssl syscall error", "the connection is lost",
)  # fmt: skip
SILENT = (
    "connection refused", "could not translate host", "failed to resolve host", "timeout expired",
    "no route to host", "network is unreachable",
)  # fmt: skip

Result = TypeVar("Result")


class BusyError(UnavailableError):
    """Another process has been writing to the database for too long."""


def connect(url: str, *, patient: bool = True) -> Engine:
    """Open a database by URL (`sqlite:///path` or `postgresql://…`) without migrating it.

    On SQLite an impatient engine raises BusyError at once where another one would wait, and leaves it to others to
    write the log back into the file. Raises ConfigError for another kind of URL, UnavailableError where the driver
    is missing.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError(
            "The database URL cannot be read.", hint="Example: LAPIS_DATABASE_URL=sqlite:////srv/lapis.db"
        ) from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        engine = _connect_sqlite(parsed, patient)
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
def write(db: Engine, lock: str = "state") -> Iterator[Connection]:
    """A transaction that may write: committed at the end of the block, rolled back on an error.

    On SQLite its holder is the only writer. On PostgreSQL it is alone among the holders of the same `lock`: who
    names none waits for all who name none, so that what was read first still holds at the write. Name one for
    what many clients do at once.
    """
    with db.connect() as plain:
        connection = plain.execution_options(lapis_write=True)
        with connection.begin():
            take_lock(connection, lock)
            yield connection


def take_lock(connection: Connection, lock: str) -> None:
    """Wait for a named lock until the transaction ends. On SQLite a writer has all of them already."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(lock, 0))))


def driver_execute(connection: Connection, statement: str, parameters: Any = ()) -> Any:
    """Let the database's driver execute a statement, and return its cursor. Failures are told as SQLAlchemy's are."""
    driver: Any = connection.connection.driver_connection
    try:
        return driver.execute(statement, parameters)
    except connection.dialect.loaded_dbapi.Error as error:
        if connection.dialect.is_disconnect(error, driver, None):
            connection.invalidate(error)
        explained = _explain(str(error).lower())
        if explained is None:
            raise
        raise explained from error


def fold(db: Engine) -> None:
    """Write SQLite's log back into its file as far as nobody has to wait for that; others need no such thing."""
    if db.dialect.name == "sqlite":
        with db.connect() as connection:  # by the driver: SQLAlchemy would begin a transaction
            driver_execute(connection, "PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def retried(work: Callable[..., Result], *arguments: Any) -> Result:
    """Do a whole transaction again when the database undid it: two writers met, the connection was ended.

    Raises UnavailableError when it fails as often as TRIES, BusyError at once: that was waited for already.
    """
    for number in range(TRIES - 1):
        try:
            return work(*arguments)
        except BusyError:
            raise
        except UnavailableError as error:
            if error.retry_after is None:
                raise
        time.sleep(random.uniform(0.5, 1.0) * FIRST_PAUSE * 2**number)  # so that two do not meet again
    return work(*arguments)


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
                upgrade(connection)
    finally:
        engine.dispose()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the tables of the caller's `write` transaction up to a revision, by default the newest.

    Raises ConflictError if the database was written by a newer Lapis.
    """
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

    def steps(current: Any, context: Any) -> Any:
        return script._upgrade_revs(revision, current)

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


def _connect_sqlite(url: sa.URL, patient: bool) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("A SQLite database needs a file.", hint="Example: sqlite:////srv/lapis.db")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Digests of keys and who did what: for the owner's eyes. SQLite gives -wal and -shm the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(f"The database {path} cannot be opened: {error.strerror}.") from error
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS if patient else 0.0})

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing; WAL stays whole
        connection.execute("PRAGMA foreign_keys=ON")
        if not patient:
            connection.execute("PRAGMA wal_autocheckpoint=0")  # that waits for the disk

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its place at once: two readers that both turn into writers would deadlock.
        writes = connection.get_execution_options().get("lapis_write")
        driver_execute(connection, "BEGIN IMMEDIATE" if writes else "BEGIN")

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
        return BusyError(
            f"The database was busy for {BUSY_SECONDS:.0f} s.",
            retry_after=1.0,
            hint="Another Lapis process holds it; try again.",
        )
    if "disk is full" in text or "disk full" in text or "no space left" in text:
        return StorageError(
            "No space left for the database.", hint="Free some space, then run the same command again."
        )
    if "disk i/o error" in text:
        return StorageError(
            "The disk under the database failed to read or write.", hint="`lapis doctor` shows where it lies."
        )
    if "readonly database" in text or "unable to open database" in text:
        return StorageError("The database cannot be written.", hint="`lapis doctor` shows where it lies.")
    if "not a database" in text or "malformed" in text:
        return IntegrityError(
            "The database file is damaged.",
            hint="Put back a backup of it; `lapis doctor` shows where it lies.",
        )
    if "deadlock detected" in text or "could not serialize access" in text:
        return UnavailableError(
            "Two writers met in the database; nothing was changed.", retry_after=1.0, hint="Try again."
        )
    if "too many clients" in text or "remaining connection slots" in text:
        return UnavailableError(
            "The PostgreSQL server takes no more connections.",
            retry_after=1.0,
            hint="Raise its max_connections: each Lapis process takes up to 15.",
        )
    if any(words in text for words in CHANGING):
        return UnavailableError(
            "The PostgreSQL server is starting or ending.", retry_after=1.0, hint="Try again."
        )
    if any(words in text for words in ENDED):
        return UnavailableError(
            "The PostgreSQL server ended the connection.", retry_after=1.0, hint="Try again."
        )
    if any(words in text for words in SILENT):
        return UnavailableError("The PostgreSQL server does not answer.", hint="Check LAPIS_DATABASE_URL.")
    return None
