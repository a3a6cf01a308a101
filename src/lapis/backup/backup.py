"""Makes a backup while everything runs: one moment of the database, and the files that it refers to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from lapis.audit import AuditLog, os_user
from lapis.backup import dump
from lapis.backup.archive import HOME, TABLES, Manifest, Writer, begins_as_backup
from lapis.db import SCHEMA, open_database, snapshot
from lapis.errors import ConflictError
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import atomic_file, lock, make_folder, storage_errors

REMAKEABLE = ("data", "runs", "models")  # large, and can be prepared, trained or fetched again
STAGE = ".backup"  # hard links below the home while a backup is made
OURS = (STAGE, ".restore")


def make_backup(
    home: Home,
    path: Path,
    left_out: tuple[str, ...] = (),
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> Manifest:
    """Write the whole state of an installation into one file; servers may go on meanwhile.

    Killed at any moment it leaves the file as it was before. Raises ConflictError while another backup is
    made, or if `path` is there and no backup; StorageError.
    """
    path = path.absolute()
    # an older backup may be replaced, and an empty file
    if path.exists() and not (path.is_file() and (not path.stat().st_size or begins_as_backup(path))):
        raise ConflictError(
            f"{path} is there and no backup.", hint="Choose another name, or remove it first."
        )
    make_folder(home.root)
    stage = home.root / STAGE
    with lock(home.root / "backup.lock", f"A backup of {home.root}"):
        db = open_database(home.database_url)
        try:
            for stale in path.parent.glob(f".{path.name}.*.part"):  # of one that was killed
                stale.unlink()
            shutil.rmtree(stage, ignore_errors=True)
            with atomic_file(path) as file, storage_errors(stage):
                manifest = _write(home, db, Writer(file), stage, path, left_out, clock(), progress)
            facts = {"bytes": manifest.bytes, "left_out": list(left_out)}
            AuditLog(db, clock).append(os_user(), "state.backup", name_of(path), facts)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            db.dispose()
    return manifest


def _write(
    home: Home,
    db: Engine,
    writer: Writer,
    stage: Path,
    path: Path,
    left_out: tuple[str, ...],
    now: float,
    progress: Progress,
) -> Manifest:
    # A file is there before its row and gone after it. So what is linked before and after the moment of the
    # database includes all that the database of that moment refers to.
    _link(home, stage, path, left_out)
    rows: dict[str, int] = {}
    with snapshot(db) as connection:
        connection.execute(sa.text("SELECT version_num FROM alembic_version"))  # the moment begins
        _link(home, stage, path, left_out)
        for table in dump.tables(connection):
            lines = dump.dump(connection, table)
            rows[table.name] = writer.add_lines(f"{TABLES}/{table.name}.jsonl", lines) - 1
    files = sorted(found for found in stage.rglob("*") if found.is_file())
    for number, file in enumerate(files, 1):
        writer.add_file(f"{HOME}/{file.relative_to(stage).as_posix()}", file)
        progress(number, len(files))
    return writer.finish(SCHEMA, now, left_out, rows)


def _link(home: Home, stage: Path, path: Path, left_out: tuple[str, ...]) -> None:
    """Give every file of the home a second name, under which it stays as it is when the first one goes."""
    for file in _files(home, path, left_out):
        twin = stage / file.relative_to(home.root)
        twin.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, twin, follow_symlinks=True)
        except FileExistsError:
            continue  # linked before
        except FileNotFoundError:
            continue  # removed in this moment, with its row or before it
        except OSError:  # another disk, or one without hard links
            with suppress(FileNotFoundError):  # as above
                shutil.copyfile(file, twin)


def name_of(path: Path) -> str:
    """A file's name as text, also where its bytes are none."""
    return os.fsencode(path.name).decode(errors="replace")


def database_files(home: Home) -> tuple[Path, ...]:
    """Where the home's SQLite database lies, and where one lies by default."""
    url = sa.make_url(home.database_url)
    named = url.database if url.get_backend_name() == "sqlite" else None
    return (home.root / "lapis.db", *([Path(named)] if named else []))


def is_database(path: Path, databases: tuple[Path, ...]) -> bool:
    """Whether a file is a database, lies beside one as its log, or is one that a restore is making."""
    for database in databases:
        name = database.name
        ours = path.name in {name, *(name + ending for ending in ("-wal", "-shm", "-journal"))}
        ours = ours or path.name.startswith(f".{name}.restored")
        if ours and path.parent.resolve() == database.parent.resolve():
            return True
    return False


def _files(home: Home, path: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    """What belongs to the state: not the database's own files, locks, and what is only being written."""
    skipped, databases = {*OURS, *left_out}, database_files(home)
    for folder, folders, names in os.walk(home.root, followlinks=True):
        here = Path(folder)
        top = here == home.root
        folders[:] = sorted(
            name for name in folders if not _unfinished(name) and not (top and name in skipped)
        )
        for name in sorted(names):
            file = here / name
            passing = name.endswith(".lock") or _unfinished(name) or file == path
            if not passing and not is_database(file, databases):
                yield file


def _unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")
