"""One file that holds a whole installation: a tar with a manifest as its last member, then a digest of all before it.

Any tar program can list and unpack it. The last line makes every flipped bit visible before anything is believed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lapis.errors import ConflictError, InputError, IntegrityError
from lapis.log import logger

FORMAT = 1
MANIFEST = "manifest.json"
TABLES, HOME = "database", "home"  # folders in the archive
SEAL = b"lapis backup, sha256 "
SEAL_LENGTH = len(SEAL) + 64 + 1
CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in the archive: its name there, bytes and digest."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an archive holds."""

    schema: str  # revision of the database
    made_at: float
    left_out: tuple[str, ...]
    rows: dict[str, int]  # by table
    members: tuple[Member, ...] = field(repr=False)
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Of all files and tables."""
        return sum(member.size for member in self.members)


class Writer:
    """Puts files and tables into an archive, one after the other."""

    def __init__(self, file: IO[bytes]) -> None:
        self._out = _Hashing(file)
        out: Any = self._out  # reads and writes, which is all that tarfile asks of it
        self._tar = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._file = file
        self.members: list[Member] = []

    def add_file(self, name: str, path: Path) -> None:
        """A file of the home: as many bytes as it has now, whoever appends to it meanwhile.

        Where somebody cuts it meanwhile, zeros stand for what is gone.
        """
        with path.open("rb") as source:
            info = self._tar.gettarinfo(arcname=name, fileobj=source)
            info.type, info.linkname = tarfile.REGTYPE, ""  # a hard link on disk is a file here
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            whole = _Whole(source, info.size)
            self._add(info, whole)
            if whole.missing:
                logger.warning(
                    "%s was cut while it was read: %d zeros stand for the rest.", name, whole.missing
                )

    def add_lines(self, name: str, lines: Iterable[bytes]) -> int:
        """A table, line by line; how many lines."""
        count = 0
        with tempfile.SpooledTemporaryFile(max_size=64 << 20) as spool:
            for line in lines:
                spool.write(line)
                count += 1
            info = tarfile.TarInfo(name)
            info.size, info.mode = spool.tell(), 0o600
            spool.seek(0)
            self._add(info, spool)
        return count

    def finish(
        self, schema: str, made_at: float, left_out: tuple[str, ...], rows: dict[str, int]
    ) -> Manifest:
        """Write the manifest and the seal."""
        manifest = Manifest(schema, made_at, left_out, rows, tuple(self.members))
        text = json.dumps(asdict(manifest)).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(text), 0o600
        self._tar.addfile(info, io.BytesIO(text))
        self._tar.close()
        self._file.write(SEAL + self._out.digest.hexdigest().encode() + b"\n")
        return manifest

    def _add(self, info: tarfile.TarInfo, source: Any) -> None:
        reader = _Hashing(source)
        self._tar.addfile(info, reader)
        self.members.append(Member(info.name, info.size, reader.digest.hexdigest()))


class _Hashing:
    """A file whose bytes are digested as they pass."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self.digest.update(data)
        return data

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        written: int = self._file.write(data)
        return written


class _Whole:
    """A file that has as many bytes as it had at first: zeros for those that are gone."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size
        self.missing = 0

    def read(self, size: int) -> bytes:
        wanted = min(size, self._left)
        data = self._file.read(wanted)
        self._left -= wanted
        self.missing += wanted - len(data)
        return data.ljust(wanted, b"\0")


def begins_as_backup(path: Path) -> bool:
    """Whether a file begins as an archive does, whole or damaged."""
    with path.open("rb") as file:
        begin = file.read(tarfile.BLOCKSIZE)
    return begin.startswith(f"{TABLES}/".encode()) and begin[257:262] == b"ustar"


def verify(path: Path) -> Manifest:
    """Read a whole archive and check its seal and contents. Raises InputError, IntegrityError, ConflictError."""
    try:
        with path.open("rb") as file:
            _check_seal(path, file)
    except OSError as error:
        raise InputError(f"The backup {path} cannot be read: {error.strerror}.") from error
    with _opened(path) as tar:
        found = {info.name: info for info in tar}
        last = found.pop(MANIFEST, None)
        reader = None if last is None else tar.extractfile(last)
        if reader is None:
            raise _damaged(path)
        values = json.loads(reader.read())
    if values.get("format") != FORMAT:
        raise ConflictError(
            f"The backup {path} has format {values.get('format')}; this Lapis knows {FORMAT}.",
            hint="It was written by a newer Lapis: upgrade with `pip install --upgrade lapis`.",
        )
    members = tuple(Member(**member) for member in values.pop("members"))
    manifest = Manifest(**{**values, "left_out": tuple(values["left_out"])}, members=members)
    if {member.name: member.size for member in members} != {name: info.size for name, info in found.items()}:
        raise _damaged(path)
    for member in members:
        _check_name(member.name)
    return manifest


@contextmanager
def contents(path: Path, manifest: Manifest) -> Iterator[Iterator[tuple[Member, tarfile.TarInfo, IO[bytes]]]]:
    """The members of a verified archive in order, each open for reading."""
    known = {member.name: member for member in manifest.members}

    def each(tar: tarfile.TarFile) -> Iterator[tuple[Member, tarfile.TarInfo, IO[bytes]]]:
        for info in tar:
            reader = tar.extractfile(info)
            if info.name in known and reader is not None:
                yield known[info.name], info, reader

    with _opened(path) as tar:
        yield each(tar)


def copy_checked(member: Member, source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a member's bytes. Raises IntegrityError if they are not those of the manifest any more."""
    reader = _Hashing(source)
    while data := reader.read(CHUNK):
        target.write(data)
    check(member, reader.digest.hexdigest())


def check(member: Member, digest: str) -> None:
    """Raises IntegrityError if a digest is not the member's."""
    if digest != member.sha256:
        raise IntegrityError(f"The backup changed while it was read: {member.name} is another file now.")


def _check_seal(path: Path, file: IO[bytes]) -> None:
    left = file.seek(0, io.SEEK_END) - SEAL_LENGTH
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (data := file.read(min(left, CHUNK))):
        digest.update(data)
        left -= len(data)
    if left != 0 or file.read() != SEAL + digest.hexdigest().encode() + b"\n":
        raise _damaged(path)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, ValueError) as error:
        raise _damaged(path) from error


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if parts[0] not in (TABLES, HOME) or len(parts) < 2 or name.startswith("/") or ".." in parts:
        raise IntegrityError(f"The backup names a place outside of itself: {name!r}.")


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged, cut off, or no backup. Nothing was changed.", hint="Use another backup."
    )
