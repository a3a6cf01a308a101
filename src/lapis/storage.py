"""Files that are there whole or not at all, on a local path or behind any fsspec URL."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lapis.errors import ConflictError, InputError, StorageError, UnavailableError, nearest

# Set for the ranks of a supervisor that starts them on several nodes, and never two groups at once: there the locks
# that a rank would hold are left out, for those of a lost node would stay held.
HELD = "LAPIS_RUN_HELD"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
# Where a file is made, these too say that its place is no good. Later they may be of what its writer reads.
NO_PLACE = REFUSED | {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are missing. Raises StorageError where it cannot be."""
    with storage_errors(path, NO_PLACE):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_file(path: Path, *, name_later: bool = False) -> Iterator[IO[bytes]]:
    """Write a file beside its place, flush it to disk, then rename it into place.

    Raises StorageError if the disk is full or the place cannot be written. `name_later` leaves it to a later
    `sync_folder` to make its name durable; names become so in their order.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with storage_errors(path, NO_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = temporary.open("wb")
    try:
        with storage_errors(path), opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with storage_errors(path, NO_PLACE):
            os.replace(temporary, path)
        if not name_later:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, name_later: bool = False) -> None:
    """Replace a file's text atomically, as `atomic_file` does."""
    with atomic_file(path, name_later=name_later) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place, then rename it into place; if `path` exists already, the new one is dropped.

    The first writer wins: content-addressed folders of one name hold the same bytes.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with storage_errors(path, NO_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with storage_errors(path):
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
    with storage_errors(path, NO_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("ab+", buffering=0)
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise ConflictError(
                f"{what} is in use by process {holder}.",
                hint="Wait until it ends, or use another home: LAPIS_HOME=/some/folder",
            ) from error
        with storage_errors(path):  # not around what the caller does: its errors are of other files
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


@contextmanager
def storage_errors(path: Path, refused: Collection[int] = REFUSED) -> Iterator[None]:
    """Turn a full or read-only disk below `path` into StorageError, and the error numbers `refused`; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"No space left while writing {path}: {error.strerror}.",
                hint="What was complete is kept. Free some space (`lapis doctor` shows where things lie), then run "
                "the same command again.",
            ) from error
        if error.errno in refused:
            cause = "Not a directory" if error.errno == errno.EEXIST else error.strerror
            raise StorageError(f"{path} cannot be written: {cause}.") from error
        raise


DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "sftp": "paramiko", "oss": "ossfs",
}  # fmt: skip
CHECKSUMS = ("md5Hash", "content_md5", "ETag", "etag")
BLOCK = 8 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file behind a URL. `name` is its path below what was listed; `checksum` the store's own, if it keeps one."""

    url: str
    name: str
    size: int
    checksum: str


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def list_url(url: str) -> list[StoredFile]:
    """The files that a URL means: one, all below a folder, or those that a pattern with `*` matches.

    Raises InputError if there are none, UnavailableError if its driver is missing or the store does not answer.
    """
    files, place = _filesystem(url)
    root = place[: place.index("*")].rpartition("/")[0] if "*" in place else place.rstrip("/")
    found: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError), _remote_errors(url):
        found = _found(files, place, as_folder=url.endswith("/"))
    if not found:
        raise InputError(
            f"There is nothing at {url}.", hint="A folder's URL ends in /; `*` stands for any name."
        )
    return [_stored(files, path, facts, root) for path, facts in sorted(found.items())]


def state_of(path: str) -> str:
    """What changes when a file is written again: time and size, or the checksum that a store keeps of it."""
    if not is_url(path):
        facts = os.stat(path)
        return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    files, place = _filesystem(path)
    with _remote_errors(path):
        facts = files.info(place)
    return (
        f"{facts.get('size')} {_checksum(facts) or facts.get('Last-Modified') or facts.get('created') or ''}"
    )


def open_url(url: str) -> IO[bytes]:
    """Open a local path or an fsspec URL (`s3://`, `az://`, …) for reading, at any place.

    Raises UnavailableError if its driver is missing or the store does not answer.
    """
    if not is_url(url):
        return open(url, "rb")
    files, place = _filesystem(url)
    with _remote_errors(url):
        file = files.open(place, "rb", block_size=BLOCK)
        if file.seekable() and _answers_ranges(file):
            return file  # type: ignore[no-any-return]
    return _copied(files, place, url)


def _copied(files: Any, place: str, url: str) -> IO[bytes]:
    """A nameless local copy of what can only be read from the beginning."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    room = storage_errors(Path(tempfile.gettempdir()))
    with _remote_errors(url), files.open(place, "rb", block_size=0) as file, room:
        shutil.copyfileobj(file, copy, BLOCK)
    copy.seek(0)
    return copy


def _answers_ranges(file: Any) -> bool:
    """Whether a store gives the middle of a file: some HTTP servers only give the whole."""
    if not (file.size or 0) > 1 or "http" not in type(file).__module__:
        return True
    try:
        file.seek(file.size - 1)
        file.read(1)
        file.seek(0)
    except ValueError:
        file.close()
        return False
    return True


def _filesystem(url: str) -> tuple[Any, str]:
    """The driver of a URL, and the place as the driver calls it."""
    import fsspec.core

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        package = DRIVERS.get(scheme, "")
        hint = f"pip install {package}" if package else str(error)
        raise UnavailableError(f"{url} needs a driver that is not installed.", hint=hint) from error
    except ValueError as error:
        raise InputError(f"{url} cannot be opened: {error}.", hint=nearest(scheme, DRIVERS)) from error


def _found(files: Any, place: str, *, as_folder: bool) -> dict[str, dict[str, Any]]:
    if "*" in place:
        return {
            path: facts for path, facts in files.glob(place, detail=True).items() if facts["type"] == "file"
        }
    if not as_folder:
        facts = files.info(place)
        if facts["type"] == "file":
            return {place: facts}
    return dict(files.find(place, detail=True))


def _stored(files: Any, path: str, facts: dict[str, Any], root: str) -> StoredFile:
    url = files.unstrip_protocol(path)
    if facts.get("size") is None:
        with _remote_errors(url):
            facts = files.info(path)
    name = path.partition("?")[0]
    name = (
        name[len(root) :].lstrip("/") if name != root and name.startswith(root) else name.rpartition("/")[2]
    )
    return StoredFile(url, name, int(facts.get("size") or 0), _checksum(facts))


def _checksum(facts: dict[str, Any]) -> str:
    """A store's own checksum or strong version mark; a weak one says nothing of the bytes."""
    found = (str(facts[key]) for key in CHECKSUMS if facts.get(key))
    return next((mark for mark in found if not mark.startswith("W/")), "")


def failures() -> tuple[type[Exception], ...]:
    """What reading a file raises, local or behind a URL, when it or its store fails."""
    from asyncio import TimeoutError as Timeout

    client = sys.modules.get("aiohttp")  # its errors are no OSError
    return (OSError, Timeout, client.ClientError) if client else (OSError, Timeout)


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Turn a store that does not answer into UnavailableError; a missing file stays FileNotFoundError."""
    try:
        yield
    except failures() as error:
        cause: BaseException = error
        while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__  # fsspec calls a server missing that does not answer
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
            raise
        raise UnavailableError(f"{url} could not be read: {cause}.", hint="Try again later.") from error


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
