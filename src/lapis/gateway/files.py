"""Files of projects: bytes below the home, facts in the database. Nobody sees those of another project.

The bytes are complete and in their place before their row is written, and the row goes before the bytes: what a
killed server leaves behind is a file that no row names, which `sweep` removes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import write
from lapis.errors import InputError, LapisError, LimitError, NotFoundError
from lapis.gateway.paging import Order, page
from lapis.storage import storage_errors, sync_folder
from lapis.tables.files import files
from lapis.tables.uploads import upload_parts, uploads
from lapis.tenants.keys import Identity

BLOCK = 1 << 20  # bytes read at a time
# Nobody has written to it for so long: its writer is dead (an upload takes an hour at most).
ABANDONED_SECONDS = 7200.0
TIDY_SECONDS = 600.0  # what has expired is not seen any more; its bytes go a little later
MAX_NAME = 255  # characters of a file's name
JSON_LINES = ("batch", "fine-tune")  # purposes whose files have one JSON object a line
HEAD = 4096  # bytes that are looked at

Within = Callable[[Connection], None]
StorageLimit = Callable[[str], int | None]  # bytes that a project may store, by its id; None: no limit


@dataclass(frozen=True)
class StoredFile:
    """The facts of a file. `filename` is a label, `digest` the SHA-256 of its bytes."""

    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    digest: str
    created_at: float
    expires_at: float | None
    key_id: str | None


class Incoming:
    """Bytes on their way to a file; unless they are kept, they are removed at the end of its `with` block."""

    def __init__(self, folder: Path, id: str | None = None) -> None:
        self.id = id or f"file-{secrets.token_hex(12)}"
        self.folder = folder
        self.bytes = 0
        self._path = folder / f".{self.id}.{secrets.token_hex(4)}.part"
        self._digest = hashlib.sha256()
        with storage_errors(folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._file = self._path.open("xb")

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Add bytes. Raises StorageError."""
        with storage_errors(self._path):
            self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def place(self) -> Path:
        """Make the bytes durable and put them into their place. Raises StorageError."""
        place = self.folder / self.id
        with storage_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._path, place)
            sync_folder(place.parent)
        return place

    def head(self) -> bytes:
        """The first bytes that were written."""
        self._file.flush()
        with self._path.open("rb") as file:
            return file.read(HEAD)


class FileStore:
    """The files of an installation. All methods block; call them in a thread."""

    def __init__(
        self,
        folder: Path,
        db: Engine,
        clock: Callable[[], float] = time.time,
        storage_limit: StorageLimit = lambda project_id: None,
    ) -> None:
        self.folder = folder
        self.db = db
        self.clock = clock
        self.storage_limit = storage_limit  # asked before and after each upload

    def create(
        self,
        identity: Identity,
        filename: str,
        purpose: str,
        source: Iterable[bytes],
        expires_at: float | None = None,
    ) -> StoredFile:
        """Store a caller's bytes. Raises as `keep`."""
        with self.receive(identity.project_id) as incoming:
            for data in source:
                incoming.write(data)
            return self.keep(incoming, identity, filename, purpose, expires_at)

    def put(
        self,
        project_id: str,
        filename: str,
        purpose: str,
        content: bytes | Path | Iterable[bytes],
        expires_at: float | None = None,
        id: str | None = None,
    ) -> StoredFile:
        """Store a result for a project, whatever its limit: the work is done and paid for."""
        if isinstance(content, bytes | Path):
            content = [content] if isinstance(content, bytes) else blocks(content)
        with Incoming(self.folder / project_id, id) as incoming:
            for data in content:
                incoming.write(data)
            made = self._facts(incoming, project_id, None, filename, purpose, expires_at)
            self._record(incoming, made)
        return made

    def receive(self, project_id: str) -> Incoming:
        """Begin a file. Raises LimitError if the project's storage is full already, StorageError."""
        with self.db.connect() as connection:
            self.check_room(connection, project_id, 1)
        return Incoming(self.folder / project_id)

    def keep(
        self,
        incoming: Incoming,
        identity: Identity,
        filename: str,
        purpose: str,
        expires_at: float | None = None,
        within: Within | None = None,
    ) -> StoredFile:
        """Make a file of what was received; `within` is done in the same transaction instead of asking for room.

        Raises InputError for its name or for what its purpose cannot use, LimitError if the project's storage is
        full, StorageError.
        """
        project_id, name = identity.project_id, checked_name(filename)
        check_form(name, purpose, incoming.head())
        made = self._facts(incoming, project_id, identity.key_id, name, purpose, expires_at)
        room = lambda connection: self.check_room(connection, project_id, made.bytes)  # noqa: E731
        self._record(incoming, made, within or room)
        return made

    def check_room(self, connection: Connection, project_id: str, more: int) -> None:
        """Raises LimitError if a project may not store so many bytes more. Holds under the lock `files:PROJECT`."""
        limit = self.storage_limit(project_id)
        if limit is not None:
            _check_room(self._used(connection, project_id), more, limit)

    def get(self, project_id: str, id: str) -> StoredFile:
        """A file's facts. Raises NotFoundError."""
        with self.db.connect() as connection:
            row = connection.execute(self._mine(project_id).where(files.c.id == id)).one_or_none()
        if row is None:
            raise _missing(id)
        return _stored(row)

    def path(self, project_id: str, id: str) -> Path:
        """Where a file's bytes lie; they never change. Raises NotFoundError."""
        return self.folder / project_id / self.get(project_id, id).id

    def open(self, project_id: str, id: str) -> IO[bytes]:
        """A file's bytes; once open they can be read, even if it is deleted meanwhile. Raises NotFoundError."""
        try:
            return self.path(project_id, id).open("rb")
        except FileNotFoundError as error:  # deleted since the row was read
            raise _missing(id) from error

    def list(
        self,
        project_id: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
    ) -> tuple[list[StoredFile], bool]:
        """A page of a project's files, and whether more follow. Raises InputError for an unknown `after`."""
        query = self._mine(project_id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self.db.connect() as connection:
            found = page(connection, query, files, after=after, limit=limit, order=order)
        return [_stored(row) for row in found.rows], found.has_more

    def delete(self, project_id: str, id: str) -> None:
        """Forget a file and remove its bytes. Raises NotFoundError."""
        with write(self.db) as connection:
            row = connection.execute(self._mine(project_id).where(files.c.id == id)).one_or_none()
            if row is None or not connection.execute(files.delete().where(files.c.id == id)).rowcount:
                raise _missing(id)
        (self.folder / project_id / id).unlink(missing_ok=True)

    def used(self, project_id: str) -> int:
        """Bytes that a project stores, and has promised to upload in parts."""
        with self.db.connect() as connection:
            return self._used(connection, project_id)

    def expire(self) -> int:
        """Delete the files whose time is over; how many."""
        overdue = sa.select(files.c.project_id, files.c.id).where(files.c.expires_at <= self.clock())
        with self.db.connect() as connection:
            rows = connection.execute(overdue).all()
        for row in rows:
            with write(self.db) as connection:
                connection.execute(files.delete().where(files.c.id == row.id))
            (self.folder / row.project_id / row.id).unlink(missing_ok=True)
        return len(rows)

    def sweep(self) -> int:
        """Remove what dead writers left: parts, and bytes that no row names; how many."""
        removed = 0
        for project in self.folder.iterdir() if self.folder.is_dir() else ():
            if not project.is_dir():
                continue
            old = [path for path in project.iterdir() if path.is_file() and self._is_abandoned(path)]
            known: set[str] = set()
            if old:
                with self.db.connect() as connection:
                    for table in (files, upload_parts):
                        ids = sa.select(table.c.id).where(table.c.project_id == project.name)
                        known |= set(connection.execute(ids).scalars())
            for path in old:
                if path.name not in known:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    async def tidy(self) -> None:
        """Delete what has expired, as long as the server runs."""
        while True:
            await asyncio.to_thread(self.expire)
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(TIDY_SECONDS)

    def _facts(
        self,
        incoming: Incoming,
        project_id: str,
        key_id: str | None,
        filename: str,
        purpose: str,
        expires_at: float | None,
    ) -> StoredFile:
        now = self.clock()
        return StoredFile(
            incoming.id, project_id, filename, purpose, incoming.bytes, incoming.digest, now, expires_at, key_id
        )  # fmt: skip

    def _record(self, incoming: Incoming, made: StoredFile, within: Within = lambda connection: None) -> None:
        """Put the bytes into their place, then write their row and what else belongs into its transaction."""
        place = incoming.place()
        try:
            with write(self.db, lock=f"files:{made.project_id}") as connection:
                within(connection)
                connection.execute(files.insert().values(**vars(made)))
        except LapisError:
            place.unlink(missing_ok=True)
            raise

    def _used(self, connection: Connection, project_id: str) -> int:
        mine = self._mine(project_id).subquery()
        promised = sa.select(sa.func.sum(uploads.c.bytes)).where(
            uploads.c.project_id == project_id,
            uploads.c.status == "pending",
            uploads.c.expires_at > self.clock(),
        )
        sums = (sa.select(sa.func.sum(mine.c.bytes)), promised)
        return sum(int(connection.execute(query).scalar() or 0) for query in sums)

    def _mine(self, project_id: str) -> sa.Select[Any]:
        lives = files.c.expires_at.is_(None) | (files.c.expires_at > self.clock())
        return sa.select(files).where(files.c.project_id == project_id, lives)

    def _is_abandoned(self, path: Path) -> bool:
        try:
            return self.clock() - path.stat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:
            return False


def checked_name(filename: str) -> str:
    """The last part of a path as a file's name. Raises InputError for one that is empty, too long, unprintable."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    if name.strip(" .") == "":
        raise InputError("The file has no name.", param="file")
    if len(name) > MAX_NAME:
        raise InputError(f"The file's name has {len(name)} characters; {MAX_NAME} are allowed.", param="file")
    if not name.isprintable() or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InputError(
            f"The file's name {ascii(name)[:80]} has characters that cannot be shown.", param="file"
        )
    return name


def check_form(name: str, purpose: str, head: bytes) -> None:
    """Whether a file can serve its purpose, by its name and its first bytes. Raises InputError."""
    if purpose not in JSON_LINES:
        return
    check_ending(name, purpose)
    if not head.strip():
        raise InputError("The file is empty.", param="file")
    if not head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"):
        raise InputError("The file's first line is not a JSON object.", param="file")


def check_ending(name: str, purpose: str) -> None:
    """Raises InputError where a file of JSON lines is wanted and the name is another one's."""
    if purpose in JSON_LINES and not name.lower().endswith(".jsonl"):
        raise InputError(
            f"A file for {purpose} has JSON lines (.jsonl); {name[:80]!r} has not.", param="file"
        )


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, some at a time."""
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            yield data


def _check_room(used: int, more: int, limit: int) -> None:
    if used + more > limit:
        raise LimitError(
            f"The project's storage is full: {used:,} of {limit:,} bytes are used, {more:,} more were sent.",
            hint="Delete files that are no longer needed, or have the project's limit raised.",
            retry_after=None,
            param="file",
        )


def _stored(row: Row[Any]) -> StoredFile:
    return StoredFile(**row._mapping)


def _missing(id: str) -> NotFoundError:
    return NotFoundError(
        f"There is no file {id[:80]!r} here.",
        hint="It was deleted, has expired, or belongs to another project.",
        param="file_id",
    )
