"""The folder of a run's checkpoints: list, verify, find the newest whole one, remove old ones. No torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lapis.checkpoint.manifest import (
    MANIFEST,
    REMOVING,
    SAVING,
    FileEntry,
    Manifest,
    parse,
    parse_name,
    superseded,
)
from lapis.errors import IntegrityError
from lapis.hashing import CHUNK, digest_bytes, digest_file
from lapis.log import logger

HINT = "The file was changed after it was written. Resuming the run goes on from the newest whole checkpoint."


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest is whole; `verify` or `load` check its other files."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def bytes(self) -> int:
        return self.manifest.bytes


def read(folder: Path) -> Checkpoint:
    """Read one checkpoint's manifest. Raises IntegrityError if it is missing or was changed."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise IntegrityError(f"{folder.name}/{MANIFEST}: {reason}.", hint=HINT) from error
    return Checkpoint(folder, parse(raw, folder.name))


def listing(folder: Path) -> tuple[list[Checkpoint], list[IntegrityError]]:
    """The checkpoints below a folder, oldest first, and what is wrong with those of no whole manifest."""
    good, bad = [], []
    for path in _committed(folder):
        try:
            good.append(read(path))
        except IntegrityError as error:
            bad.append(error)
    return good, bad


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, every byte verified. Corrupt ones are skipped with a warning in the log."""
    for path in reversed(_committed(folder)):
        try:
            checkpoint = read(path)
            verify(checkpoint)
        except IntegrityError as error:
            logger.warning("checkpoint %s is skipped: %s", path.name, error.message)
            continue
        return checkpoint
    return None


def verify(checkpoint: Checkpoint) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises IntegrityError naming the file, and the tensor if the damage lies inside one.
    """
    check_names(checkpoint)
    with ThreadPoolExecutor(max_workers=4) as pool:
        files = checkpoint.manifest.files
        found = {name: pool.submit(_digest, checkpoint, name) for name in files}
        for name, digest in found.items():
            if digest.result() != files[name].sha256:
                raise damage(checkpoint, name, (checkpoint.folder / name).read_bytes())


def check_names(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError if a file is missing, has another size, or is not in the manifest."""
    found = {path.name: path for path in checkpoint.folder.iterdir() if path.name != MANIFEST}
    for name, entry in checkpoint.manifest.files.items():
        if name not in found:
            raise IntegrityError(f"{checkpoint.folder.name}/{name} is missing.", hint=HINT)
        size = found[name].stat().st_size
        if size != entry.bytes:
            raise IntegrityError(
                f"{checkpoint.folder.name}/{name} has {size:,} bytes instead of {entry.bytes:,}.", hint=HINT
            )
    extra = sorted(found.keys() - checkpoint.manifest.files.keys())
    if extra:
        raise IntegrityError(f"{checkpoint.folder.name}/{extra[0]} is not in the manifest.", hint=HINT)


def damage(checkpoint: Checkpoint, name: str, data: bytes | memoryview) -> IntegrityError:
    """The error for a file whose bytes do not match: it names the tensors that are hit, or the header."""
    entry = checkpoint.manifest.files[name]
    hit = damaged_tensors(entry, memoryview(data))
    place = f" in tensor {', '.join(hit)}" if hit else " outside its tensors" if entry.tensors else ""
    return IntegrityError(f"{checkpoint.folder.name}/{name} does not match its digest{place}.", hint=HINT)


def damaged_tensors(entry: FileEntry, data: memoryview) -> list[str]:
    """Names of the tensors in a file's bytes whose digest is not the one in the manifest."""
    places: Mapping[str, memoryview] = {
        name: data[place.start : place.start + place.bytes] for name, place in entry.tensors.items()
    }
    return [name for name, piece in places.items() if digest_bytes(piece) != entry.tensors[name].sha256]


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves and removals left behind. Only for the process that holds the folder."""
    for path in folder.iterdir():
        if path.name.startswith((SAVING, REMOVING)):
            shutil.rmtree(path)


def retain(folder: Path, new: str, keep: int) -> None:
    """Remove what the newly committed checkpoint makes superfluous; each goes whole, by a rename first."""
    for name in superseded((path.name for path in _committed(folder)), new, keep):
        discard(folder / name)


def discard(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves either the whole one or none under its name."""
    doomed = path.with_name(f"{REMOVING}{uuid.uuid4().hex}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def digest_from_disk(path: Path) -> str:
    """SHA-256 of a flushed file as the disk returns it: cached pages are dropped first where possible."""
    hasher = hashlib.sha256()
    buffer = bytearray(4 * CHUNK)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:count])
    return hasher.hexdigest()


def _digest(checkpoint: Checkpoint, name: str) -> str:
    try:
        return digest_file(checkpoint.folder / name)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise IntegrityError(f"{checkpoint.folder.name}/{name}: {reason}.", hint=HINT) from error


def _committed(folder: Path) -> list[Path]:
    """Committed folders, oldest step first; of two with one step, the later written last."""
    if not folder.is_dir():
        return []
    paths = [(name.step, path) for path in folder.iterdir() if (name := parse_name(path.name))]
    return [path for _, path in sorted(paths, key=lambda item: (item[0], item[1].stat().st_mtime_ns))]
