"""What all tests share: a home of their own, hypothesis without deadlines or chance, the choice of the database."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lapis.db import open_database
from lapis.home import Home
from tests import postgres
from tests.postgres import Databases, pytest_addoption

__all__ = ["pytest_addoption"]  # pytest finds it here

settings.register_profile("lapis", deadline=None, derandomize=True, print_blob=False, max_examples=50)
settings.load_profile("lapis")
URL = "LAPIS_DATABASE_URL"


def pytest_configure(config: pytest.Config) -> None:
    """With --postgres: one server for the whole run. A test that drops connections is no leak."""
    if config.option.postgres:
        postgres.start(config)
        config.addinivalue_line("filterwarnings", "ignore:<psycopg.Connection:ResourceWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests have an hour each.

    With --postgres: only files that have to do with the database, without what is SQLite's alone.
    """
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
    if not config.option.postgres:
        return
    keep = {path: postgres.concerns(path) for path in {item.path for item in items}}
    chosen = [item for item in items if keep[item.path] and item.get_closest_marker("sqlite") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest) -> Iterator[Databases | None]:
    """The databases of this run on PostgreSQL; None on SQLite."""
    if not request.config.option.postgres:
        yield None
        return
    made = Databases(os.environ[postgres.SERVER])
    ours = Home.database_url

    def of_home(home: Home) -> str:
        named = os.environ.get(URL)
        return named if named and named not in made.made.values() else made.of(home)

    Home.database_url = property(of_home)  # type: ignore[assignment,method-assign]
    yield made
    Home.database_url = ours  # type: ignore[method-assign]
    made.close()


@pytest.fixture(scope="session", autouse=True)
def _database(databases: Databases | None) -> None:
    """Chosen before any home is made."""


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, databases: Databases | None) -> None:
    """No test touches the user's home, whatever the environment says."""
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(URL, raising=False)
    if databases is not None:  # for the processes that the test starts
        monkeypatch.setenv(URL, databases.of(Home(tmp_path / "home")))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables, made once by the migrations."""
    path = tmp_path_factory.mktemp("migrated") / "lapis.db"
    open_database(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture
def home(tmp_path: Path, migrated: Path, databases: Databases | None) -> Home:
    """A fresh home. Its SQLite file has its tables already: to migrate takes a quarter of a second."""
    made = Home(tmp_path / "home")
    made.root.mkdir()
    if databases is None:
        shutil.copy(migrated, made.root / "lapis.db")
    return made


@pytest.fixture
def database_url(home: Home) -> str:
    """The database of the fresh home, with its tables: a SQLite file, or one of PostgreSQL."""
    return home.database_url


@pytest.fixture
def empty_database_url(tmp_path: Path, databases: Databases | None) -> str:
    """A database without a table."""
    return f"sqlite:///{tmp_path / 'deep' / 'lapis.db'}" if databases is None else databases.empty()


# Small models in several processes at once: one thread each, or they wait for each other at every barrier.
# Read when torch is loaded, here and in every child process; tests about threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the Triton kernels are tried in Triton's interpreter; read when triton is loaded, by whomever.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
