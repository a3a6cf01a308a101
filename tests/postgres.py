"""PostgreSQL for the tests: a server of their own for the time of a run, and a database of its own for every home.

`python -m tests.postgres` tells whether the programs of a server are here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from lapis import db as database
from lapis.home import Home

SERVER = "LAPIS_TEST_POSTGRES"  # URL of a server whose user may create databases
MARK = "lapis-postgres-"  # in the path of our own server's socket
# A server for tests may lose everything when the machine dies.
SETTINGS = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "max_connections=400")
MENTIONS = (
    "lapis.db", "lapis.audit", "lapis.backup",
    "lapis.tenants", "lapis.jobs", "lapis.gateway", "lapis.api", "lapis.server",
    "lapis.console", "lapis.tables", "lapis.release", "tests.served", "Registry",
)  # fmt: skip


def programs() -> Path | None:
    """The folder of initdb and postgres: Debian's, one on the PATH, or the wheel's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found and (on_path := shutil.which("initdb")):
        found = [Path(on_path).resolve()]
    if not found and (wheel := importlib.util.find_spec("pgserver")) and wheel.origin:
        found = sorted(Path(wheel.origin).parent.glob("pginstall/bin/initdb"))
    return found[-1].parent if found else None


class Cluster:
    """A private server behind a socket in a folder of its own; it runs as a user without rights."""

    def __init__(self, bin: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=MARK))
        self.user: str | None = None
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(self.folder, self.user)
        data = self.folder / "data"
        # The owner's name is fixed, so that the URL is the same whoever runs it.
        initdb = [bin / "initdb", "-D", data, "-U", "lapis", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        self._run(initdb)
        settings = [part for setting in SETTINGS for part in ("-c", setting)]
        where = ["-k", str(self.folder), "-c", "listen_addresses="]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [bin / "postgres", "-D", data, *where, *settings],
                stdout=log, stderr=log, user=self.user, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        ready = [bin / "pg_isready", "-q", "-h", self.folder, "-t", "60"]
        while subprocess.run(ready, check=False).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
        self.url = f"postgresql://lapis@/postgres?host={self.folder}"

    def stop(self) -> None:
        """End the server and remove all that it had."""
        self.process.send_signal(signal.SIGINT)  # ends the connections too
        self.process.wait(60)
        shutil.rmtree(self.folder)

    def _run(self, command: list[object]) -> None:
        done = subprocess.run(
            [str(part) for part in command], user=self.user, cwd=self.folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


class Databases:
    """Gives every home a fresh database, already migrated, and removes them all at the end."""

    def __init__(self, server: str) -> None:
        self.server = sa.make_url(server)
        self.run = f"lapis_{os.getpid()}"
        self.admin: Engine = database.connect(server).execution_options(isolation_level="AUTOCOMMIT")
        self.made: dict[str, str] = {}
        self.opened: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # connections, also those of engines left behind
        sa.event.listen(sa.Pool, "connect", self._note)
        self._create(self.run)
        database.migrate(self._url(self.run))

    def of(self, home: Home) -> str:
        """The URL of a home's database."""
        name = f"{self.run}_{hashlib.sha256(str(home.root).encode()).hexdigest()[:16]}"
        if name not in self.made:
            self._create(name, self.run)
            self.made[name] = self._url(name)
        return self.made[name]

    def empty(self) -> str:
        """The URL of a new database without any table."""
        name = f"{self.run}_empty_{len(self.made)}"
        self._create(name)
        self.made[name] = self._url(name)
        return self.made[name]

    def close(self) -> None:
        """Remove all databases; those of a server for this run alone end with it."""
        if MARK not in self.server.render_as_string():
            with self.admin.connect() as connection:
                for name in [*self.made, self.run]:
                    connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
        self.admin.dispose()
        sa.event.remove(sa.Pool, "connect", self._note)
        for connection in list(self.opened):
            connection.close()

    def _note(self, connection: Any, _record: Any) -> None:
        if type(connection).__module__.startswith("psycopg"):
            self.opened.add(connection)

    def _create(self, name: str, template: str = "template0") -> None:
        with self.admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')

    def _url(self, name: str) -> str:
        return self.server.set(database=name).render_as_string(hide_password=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that the whole suite is run with on PostgreSQL."""
    parser.addoption(
        "--postgres", action="store_true", help="run the tests of what the database holds on PostgreSQL"
    )


def start(config: pytest.Config) -> None:
    """Start a server for this run and its workers, unless the environment names one."""
    if os.environ.get(SERVER):
        return
    bin = programs()
    if bin is None:
        raise pytest.UsageError(f"No PostgreSQL here: apt-get install postgresql, or set {SERVER}=url.")
    cluster = Cluster(bin)
    os.environ[SERVER] = cluster.url
    config.add_cleanup(cluster.stop)


def concerns(path: Path) -> bool:
    """Whether a test file has to do with what the database holds."""
    text = path.read_text()
    return any(name in text for name in MENTIONS)


if __name__ == "__main__":
    sys.exit(0 if os.environ.get(SERVER) or programs() else 1)
