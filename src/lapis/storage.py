"""Files that are there whole or not at all, on a local path or behind any fsspec URL."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lapis.errors import ConflictError, InputError, StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file beside its place, flush it to disk, then rename it into place. Raises StorageError if full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with storage_errors(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place, then rename it into place; if `path` exists already, the new one is dropped.

    The first writer wins: content-addressed folders of one name hold the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with storage_errors(path):
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a file lock that ends with the process, or raise ConflictError naming `what` is in use and by whom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(path), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConflictError(
                f"{what} is in use by process {holder}.",
                hint="Wait until it ends, or use another home: LAPIS_HOME=/some/folder",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk below `path` into StorageError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"No space left while writing {path}: {error.strerror}.",
                hint="What was complete is kept. Free some space (`lapis doctor` shows where things lie), then run "
                "the same command again.",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"{path} cannot be written: {error.strerror}.") from error
        raise


def open_url(url: str, mode: str = "rb") -> IO[Any]:
    """Open a local path or an fsspec URL (`s3://`, `az://`, …). Raises InputError if its driver is missing."""
    if "://" not in url:
        return open(url, mode)
    import fsspec

    try:
        return fsspec.open(url, mode).open()  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {error}.") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
