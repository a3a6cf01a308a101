"""Files that come in parts, in any order, within an hour; completed in the order that is named then."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lapis.db import write
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.gateway.files import (
    TIDY_SECONDS,
    FileStore,
    Incoming,
    StoredFile,
    Within,
    blocks,
    check_ending,
    checked_name,
)
from lapis.tables.uploads import upload_parts, uploads
from lapis.tenants.keys import Identity

LIFETIME = 3600.0  # seconds from its creation
REMEMBERED = 86_400.0  # seconds for which an upload that ended is told from one that never was
MOST_PARTS = 10_000


@dataclass(frozen=True)
class Upload:
    """A file on its way. `status` is pending, completed, cancelled or expired; `bytes` is what was promised."""

    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    status: str
    created_at: float
    expires_at: float
    file_seconds: float | None
    file_id: str | None


@dataclass(frozen=True)
class UploadPart:
    """Some of the bytes of an upload."""

    id: str
    upload_id: str
    project_id: str
    bytes: int
    created_at: float


class UploadStore:
    """The uploads of an installation over its files. All methods block; call them in a thread."""

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self._db = files.db

    def create(
        self, project_id: str, filename: str, purpose: str, bytes: int, file_seconds: float | None
    ) -> Upload:
        """Begin an upload; its bytes count as stored from now on.

        Raises InputError for the name, LimitError if the project has no room for it.
        """
        name = checked_name(filename)
        check_ending(name, purpose)
        now, id = self._files.clock(), f"upload_{secrets.token_hex(12)}"
        made = Upload(
            id, project_id, name, purpose, bytes, "pending", now, now + LIFETIME, file_seconds, file_id=None
        )
        with write(self._db, lock=f"files:{project_id}") as connection:
            self._files.check_room(connection, project_id, bytes)
            connection.execute(uploads.insert().values(**vars(made)))
        return made

    def get(self, project_id: str, id: str) -> Upload:
        """An upload. Raises NotFoundError."""
        with self._db.connect() as connection:
            return self._read(connection, project_id, id)

    def receive(self, project_id: str, id: str) -> Incoming:
        """Begin a part. Raises NotFoundError, ConflictError for an upload that has ended."""
        _check_pending(self.get(project_id, id))
        return Incoming(self._files.folder / project_id, f"part_{secrets.token_hex(12)}")

    def add(self, project_id: str, id: str, incoming: Incoming) -> UploadPart:
        """Keep what was received as a part. Raises as `receive`, InputError for more bytes than promised."""
        part = UploadPart(incoming.id, id, project_id, incoming.bytes, self._files.clock())
        place = incoming.place()
        try:
            with write(self._db, lock=f"files:{project_id}") as connection:
                upload = self._read(connection, project_id, id)
                _check_pending(upload)
                count, size = connection.execute(
                    sa.select(sa.func.count(), sa.func.sum(upload_parts.c.bytes)).where(
                        upload_parts.c.upload_id == id
                    )
                ).one()
                # A part that was sent again stands twice.
                if part.bytes > upload.bytes or int(size or 0) + part.bytes > 2 * upload.bytes:
                    raise InputError(
                        f"The parts have more than the upload's {upload.bytes:,} bytes.", param="data"
                    )
                if count >= MOST_PARTS:
                    raise InputError(f"An upload has at most {MOST_PARTS:,} parts.", param="data")
                connection.execute(upload_parts.insert().values(**vars(part)))
        except (InputError, NotFoundError, ConflictError):
            place.unlink(missing_ok=True)
            raise
        return part

    def complete(
        self, identity: Identity, id: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[Upload, StoredFile]:
        """Make a file of the parts, in this order.

        Raises NotFoundError, ConflictError for an upload that has ended, InputError for parts that are not its
        own, named twice, or not the bytes that were promised.
        """
        upload = self.get(identity.project_id, id)
        _check_pending(upload)
        try:
            return self._joined(identity, upload, part_ids, md5)
        except (InputError, FileNotFoundError):
            _check_pending(self.get(identity.project_id, id))  # who ended it meanwhile took its parts away
            raise

    def _joined(
        self, identity: Identity, upload: Upload, part_ids: Sequence[str], md5: str | None
    ) -> tuple[Upload, StoredFile]:
        project_id = identity.project_id
        paths = self._paths(upload, part_ids)
        expires_at = None if upload.file_seconds is None else self._files.clock() + upload.file_seconds
        with Incoming(self._files.folder / project_id) as incoming:
            found = hashlib.md5(usedforsecurity=False)
            for data in _joined(paths):
                incoming.write(data)
                found.update(data)
            if md5 is not None and md5.lower() != found.hexdigest():
                raise InputError(f"The file's MD5 is {found.hexdigest()}, not {md5[:40]!r}.", param="md5")
            done = replace(upload, status="completed", file_id=incoming.id)
            file = self._files.keep(
                incoming, identity, upload.filename, upload.purpose, expires_at, self._ending(done)
            )
        self._drop_parts(upload.id)
        return done, file

    def cancel(self, project_id: str, id: str) -> Upload:
        """Give an upload up. Raises NotFoundError, ConflictError for one that has ended."""
        done = replace(self.get(project_id, id), status="cancelled")
        with write(self._db, lock=f"files:{project_id}") as connection:
            self._ending(done)(connection)
        self._drop_parts(id)
        return done

    def expire(self) -> int:
        """Remove the parts of uploads that have ended, and those that are remembered no more; how many."""
        now = self._files.clock()
        over = (uploads.c.expires_at <= now) | (uploads.c.status != "pending")
        left = sa.select(upload_parts.c.upload_id).join(uploads).where(over).distinct()
        with self._db.connect() as connection:
            ended = connection.execute(left).scalars().all()
        for id in ended:
            self._drop_parts(id)
        old = uploads.delete().where(uploads.c.expires_at <= now - REMEMBERED)
        with write(self._db) as connection:
            connection.execute(old)
        return len(ended)

    async def tidy(self) -> None:
        """Remove what has expired, as long as the server runs."""
        while True:
            await asyncio.to_thread(self.expire)
            await asyncio.sleep(TIDY_SECONDS)

    def _read(self, connection: Connection, project_id: str, id: str) -> Upload:
        query = sa.select(uploads).where(uploads.c.id == id, uploads.c.project_id == project_id)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise _missing(id)
        found = Upload(**row._mapping)
        over = found.status == "pending" and found.expires_at <= self._files.clock()
        return replace(found, status="expired") if over else found

    def _ending(self, done: Upload) -> Within:
        def end(connection: Connection) -> None:
            _check_pending(self._read(connection, done.project_id, done.id))
            row = {"status": done.status, "file_id": done.file_id}
            connection.execute(uploads.update().where(uploads.c.id == done.id).values(**row))

        return end

    def _paths(self, upload: Upload, part_ids: Sequence[str]) -> list[Path]:
        query = sa.select(upload_parts).where(upload_parts.c.upload_id == upload.id)
        with self._db.connect() as connection:
            parts: dict[str, Row[Any]] = {row.id: row for row in connection.execute(query)}
        unknown = next((id for id in part_ids if id not in parts), None)
        if unknown is not None:
            raise InputError(f"There is no part {unknown[:80]!r} in this upload.", param="part_ids")
        if len(set(part_ids)) < len(part_ids):
            raise InputError("A part is named twice.", param="part_ids")
        size = sum(parts[id].bytes for id in part_ids)
        if size != upload.bytes:
            raise InputError(
                f"The parts have {size:,} bytes; the upload was created for {upload.bytes:,}.",
                param="part_ids",
            )
        return [self._files.folder / upload.project_id / id for id in part_ids]

    def _drop_parts(self, upload_id: str) -> None:
        """Rows first: what is killed between leaves bytes that no row names, which are swept."""
        mine = upload_parts.c.upload_id == upload_id
        with write(self._db) as connection:
            rows = connection.execute(sa.select(upload_parts).where(mine)).all()
            connection.execute(upload_parts.delete().where(mine))
        for row in rows:
            (self._files.folder / row.project_id / row.id).unlink(missing_ok=True)


def _joined(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        try:
            yield from blocks(path)
        except FileNotFoundError as error:  # somebody completed or cancelled it meanwhile
            raise ConflictError("The upload has just been ended by another request.") from error


def _check_pending(upload: Upload) -> None:
    if upload.status != "pending":
        raise ConflictError(f"The upload {upload.id} is {upload.status}.", param="upload_id")


def _missing(id: str) -> NotFoundError:
    return NotFoundError(
        f"There is no upload {id[:80]!r} here.", hint="Or it belongs to another project.", param="upload_id"
    )
