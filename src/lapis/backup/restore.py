"""Puts a backup back: checked as a whole first, then unpacked aside, then moved into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import sqlalchemy as sa

from lapis.audit import AuditLog, os_user
from lapis.backup import archive, dump
from lapis.backup.archive import HOME, TABLES, Manifest
from lapis.backup.backup import OURS, database_files, is_database, name_of
from lapis.db import SCHEMA, connect, migrate, upgrade, write
from lapis.errors import ConflictError, InputError
from lapis.hashing import digest_bytes
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import lock, make_folder, storage_errors, sync_folder, sync_tree

STAGE = ".restore"
MARK = ".restore/unfinished"  # while files are moved: the home is neither the old one nor the new one


def restore_backup(home: Home, path: Path, force: bool = False, progress: Progress = silent) -> Manifest:
    """Make a home and its database those of a backup, of SQLite or PostgreSQL alike. End the servers first.

    A home or database that holds anything is left alone unless `force` is given; then the old state is gone.
    Killed while it runs, the same command finishes it. Raises IntegrityError, InputError, ConflictError.
    """
    if path.resolve().is_relative_to(home.root.resolve()):
        raise InputError(
            f"The backup {path} lies in the home that it would replace.", hint="Move it elsewhere."
        )
    manifest = archive.verify(path)
    if manifest.schema > SCHEMA:
        raise ConflictError(
            f"The backup has schema {manifest.schema}; this Lapis knows up to {SCHEMA}.",
            hint="It was written by a newer Lapis: upgrade with `pip install --upgrade lapis`.",
        )
    make_folder(home.root)
    with lock(home.root / "restore.lock", f"A restore into {home.root}"), storage_errors(home.root):
        begun = digest_bytes(repr(manifest.members).encode())
        mark = home.root / MARK
        unfinished = mark.exists() and mark.read_text() == begun
        if not force and not unfinished:
            _require_empty(home)
        stage = home.root / STAGE
        if not unfinished:
            shutil.rmtree(stage, ignore_errors=True)
            _unpack(home, path, manifest, stage, progress)
            sync_tree(stage)
            mark.write_text(begun)
            sync_folder(stage)
        _load(home, path, manifest)
        _move(home, stage / HOME, manifest)
        shutil.rmtree(stage)
    db = connect(home.database_url)
    AuditLog(db).append(os_user(), "state.restore", name_of(path), {"made_at": manifest.made_at})
    db.dispose()
    return manifest


def _require_empty(home: Home) -> None:
    there = [entry.name for entry in _entries(home.root, database_files(home))]
    if there:
        raise ConflictError(
            f"{home.root} is not empty: it has {', '.join(sorted(there)[:5])}.",
            hint="Restore into an empty home (LAPIS_HOME=/some/folder), or replace this one with --force.",
        )
    url = sa.make_url(home.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return
    db = connect(home.database_url)
    try:
        with db.connect() as connection:
            fresh = dump.is_fresh(connection)
    finally:
        db.dispose()
    if not fresh:
        raise ConflictError(
            "The database is not empty.",
            hint="Restore into a new database, or replace this one with --force.",
        )


def _entries(folder: Path, databases: tuple[Path, ...]) -> Iterator[Path]:
    """What stands in a folder, but for the database, locks, and what backup and restore themselves leave."""
    for entry in folder.iterdir():
        if entry.name in OURS or entry.name.endswith(".lock") or is_database(entry, databases):
            continue
        yield entry


def _unpack(home: Home, path: Path, manifest: Manifest, stage: Path, progress: Progress) -> None:
    """Write the files of the home below the stage, checking each again."""
    databases = database_files(home)
    (stage / HOME).mkdir(parents=True)
    with archive.contents(path, manifest) as members:
        for number, (member, info, source) in enumerate(members, 1):
            if not member.name.startswith(f"{HOME}/"):
                continue
            if is_database(home.root / member.name.removeprefix(f"{HOME}/"), databases):
                continue  # a copy of a database's file, which would take the place of the rows
            target = stage / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                archive.copy_checked(member, source, file)
            target.chmod(info.mode & 0o777)
            os.utime(target, (info.mtime, info.mtime))
            progress(number, len(manifest.members))


def _load(home: Home, path: Path, manifest: Manifest) -> None:
    """Make the database the backup's, in one step: by a transaction, or by a new file in the old one's place."""
    url = sa.make_url(home.database_url)
    if url.get_backend_name() != "sqlite":
        _fill(home.database_url, path, manifest)
        migrate(home.database_url)
        return
    place = Path(url.database or "")
    place.parent.mkdir(parents=True, exist_ok=True)
    made = place.with_name(f".{place.name}.restored")
    for stale in place.parent.glob(f"{made.name}*"):
        stale.unlink()
    new = url.set(database=str(made)).render_as_string(hide_password=False)
    _fill(new, path, manifest)
    migrate(new)
    for ending in ("-wal", "-shm"):  # the old file's; with the new one they would be another's pages
        place.with_name(place.name + ending).unlink(missing_ok=True)
    os.replace(made, place)
    sync_folder(place.parent)


def _fill(url: str, path: Path, manifest: Manifest) -> None:
    """Tables as the backup's Lapis had them, with the backup's rows, in one transaction."""
    db = connect(url)
    try:
        with write(db, lock="migrate") as connection:
            dump.clear(connection)
            upgrade(connection, manifest.schema)
            found = {table.name: table for table in dump.tables(connection)}
            for name in [name for name in reversed(found) if name in manifest.rows]:
                if connection.execute(sa.select(sa.func.count()).select_from(found[name])).scalar():
                    connection.execute(found[name].delete())
            with archive.contents(path, manifest) as members:
                for member, _, source in members:
                    if member.name.startswith(f"{TABLES}/"):
                        name = member.name.removeprefix(f"{TABLES}/").removesuffix(".jsonl")
                        dump.load(connection, found[name], source)
    finally:
        db.dispose()


def _move(home: Home, unpacked: Path, manifest: Manifest) -> None:
    """Put the unpacked files into the places of the old ones. Every step may be done again.

    What was left out of the backup stays as it is.
    """
    kept = set(manifest.left_out)
    for member in manifest.members:
        path = PurePosixPath(member.name)
        if path.is_relative_to(HOME):
            kept |= {str(part.relative_to(HOME)) for part in (path, *path.parents[:-2])}
    _replace(home, home.root, unpacked, kept)


def _replace(home: Home, folder: Path, unpacked: Path, kept: set[str]) -> None:
    """Put what was unpacked into the place of what stands in a folder, around a database that lies below it."""
    databases = database_files(home)
    for entry in list(_entries(folder, databases)):
        if entry.relative_to(home.root).as_posix() in kept:
            continue
        if _holds_database(home, entry, databases):
            _replace(home, entry, unpacked / entry.name, kept)
        else:
            _remove(entry)
    for entry in list(unpacked.iterdir()) if unpacked.is_dir() else []:
        place = folder / entry.name
        if place.exists() and _holds_database(home, place, databases):
            _replace(home, place, entry, kept)
        else:
            _remove(place)
            os.rename(entry, place)
    sync_folder(folder)


def _holds_database(home: Home, folder: Path, databases: tuple[Path, ...]) -> bool:
    """Whether a database lies somewhere below a folder of the home."""
    place = home.root.resolve() / folder.relative_to(home.root)
    return any(
        database.exists()
        and (database.absolute().is_relative_to(folder) or database.resolve().is_relative_to(place))
        for database in databases
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
