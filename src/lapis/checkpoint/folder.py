"""The folder of a run's checkpoints: list, verify, find the newest whole one, remove old ones. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lapis.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    REMOVING,
    SAVING,
    TENSORS,
    Manifest,
    Region,
    TensorEntry,
    parse,
    parse_name,
)
from lapis.checkpoint.retention import Kept, Retention, superseded
from lapis.errors import InputError, IntegrityError
from lapis.hashing import CHUNK
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
        raise _unreadable(folder, MANIFEST, error) from error
    checkpoint = Checkpoint(folder, parse(raw, folder.name))
    return checkpoint if checkpoint.manifest.format == FORMAT else _with_shapes(checkpoint)


def listing(folder: Path) -> tuple[list[Checkpoint], list[IntegrityError]]:
    """The checkpoints below a folder, oldest first, and what is wrong with those of no whole manifest."""
    good, bad = [], []
    for path in _committed(folder):
        try:
            good.append(read(path))
        except IntegrityError as error:
            if path.is_dir():  # else the training removed it meanwhile
                bad.append(error)
    return good, bad


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, every byte verified. Corrupt ones are skipped with a warning in the log."""
    return newest(folder)[0]


def newest(folder: Path) -> tuple[Checkpoint | None, dict[str, IntegrityError]]:
    """The newest whole checkpoint, every byte verified, and why the newer ones (by name) are none."""
    skipped: dict[str, IntegrityError] = {}
    for path in reversed(_committed(folder)):
        try:
            checkpoint = read(path)
            verify(checkpoint)
        except IntegrityError as error:
            if not path.is_dir():  # the training removed it meanwhile, so there is a newer one
                return newest(folder)
            logger.warning("checkpoint %s is skipped: %s", path.name, error.message)
            skipped[path.name] = error
            continue
        return checkpoint, skipped
    return None, skipped


def verify(checkpoint: Checkpoint) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises IntegrityError naming the file, and the tensor (or the header) that the damage lies in.
    """
    check_names(checkpoint)
    check_regions(checkpoint, checkpoint.manifest.regions())


def check_regions(checkpoint: Checkpoint, regions: Sequence[Region], *, from_disk: bool = False) -> None:
    """Compare regions of a checkpoint's files with their digests. Raises IntegrityError for the first that differs.

    `from_disk`: as the disk returns them, cached pages are dropped first where the system can.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda region: _digest(checkpoint.folder, region, from_disk), regions)
        for region, digest in zip(regions, found, strict=True):
            if digest != region.sha256:
                raise damage(checkpoint.folder, region)


def check_names(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError if a file is missing, has another size, or is not in the manifest."""
    try:
        found = {path.name: path.stat() for path in checkpoint.folder.iterdir() if path.name != MANIFEST}
    except FileNotFoundError as error:
        raise _unreadable(checkpoint.folder, MANIFEST, error) from error
    for name, entry in checkpoint.manifest.files.items():
        if name not in found:
            raise IntegrityError(f"{checkpoint.folder.name}/{name} is missing.", hint=HINT)
        size = found[name].st_size
        if size != entry.bytes:
            raise IntegrityError(
                f"{checkpoint.folder.name}/{name} has {size:,} bytes instead of {entry.bytes:,}.", hint=HINT
            )
    extra = sorted(found.keys() - checkpoint.manifest.files.keys())
    if extra:
        raise IntegrityError(f"{checkpoint.folder.name}/{extra[0]} is not in the manifest.", hint=HINT)


def damage(folder: Path, region: Region) -> IntegrityError:
    """The error for bytes that do not match their digest."""
    place = f" in {region.what}" if region.what else ""
    return IntegrityError(f"{folder.name}/{region.file} does not match its digest{place}.", hint=HINT)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves and removals left behind. Only for the process that holds the folder."""
    for path in folder.iterdir():
        if path.name.startswith((SAVING, REMOVING)):
            shutil.rmtree(path)


def retain(folder: Path, new: Checkpoint, retention: Retention) -> None:
    """Remove what the newly committed checkpoint makes superfluous; each goes whole, by a rename first."""
    others = [_kept(path) for path in _committed(folder)]
    for name in superseded(others, Kept(new.step, new.folder.name, new.manifest.score), retention):
        discard(folder / name)


def discard(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves either the whole one or none under its name."""
    doomed = path.with_name(f"{REMOVING}{uuid.uuid4().hex}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _digest(folder: Path, region: Region, from_disk: bool) -> str:
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, region.bytes)))
    left = region.bytes
    try:
        with (folder / region.file).open("rb", buffering=0) as file:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), region.start, region.bytes, os.POSIX_FADV_DONTNEED)
            file.seek(region.start)
            while left and (count := file.readinto(buffer[:left])):
                hasher.update(buffer[:count])
                left -= count
    except OSError as error:
        raise _unreadable(folder, region.file, error) from error
    return hasher.hexdigest()


def _unreadable(folder: Path, file: str, error: OSError) -> IntegrityError:
    return IntegrityError(f"{folder.name}/{file}: {error.strerror or 'cannot be read'}.", hint=HINT)


def _with_shapes(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of format 1 with the dtypes and shapes that stand in its files' headers."""
    groups: dict[str, dict[str, TensorEntry]] = {}
    for group, tensors in checkpoint.manifest.groups.items():
        name = f"{group}{TENSORS}"
        try:
            with (checkpoint.folder / name).open("rb") as file:
                table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            places = {
                tensor: (str(table[tensor]["dtype"]), tuple(table[tensor]["shape"])) for tensor in tensors
            }
        except OSError as error:
            raise _unreadable(checkpoint.folder, name, error) from error
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise damage(checkpoint.folder, Region(name, 0, 0, "", "its header")) from error
        groups[group] = {
            tensor: TensorEntry(
                dtype, shape, (replace(tensors[tensor].pieces[0], offset=(0,) * len(shape), shape=shape),)
            )
            for tensor, (dtype, shape) in places.items()
        }
    return Checkpoint(checkpoint.folder, replace(checkpoint.manifest, groups=groups))


def _kept(path: Path) -> Kept:
    """A committed checkpoint as retention sees it; one whose manifest is damaged has no score."""
    name = parse_name(path.name)
    assert name is not None
    try:
        return Kept(name.step, path.name, read(path).manifest.score)
    except (IntegrityError, InputError):
        return Kept(name.step, path.name)


def _committed(folder: Path) -> list[Path]:
    """Committed folders, oldest step first; of two with one step, the later written last."""
    if not folder.is_dir():
        return []
    paths = [(name.step, path) for path in folder.iterdir() if (name := parse_name(path.name))]
    return [path for _, path in sorted(paths, key=lambda item: (item[0], _written(item[1])))]


def _written(path: Path) -> int:
    """When a folder was written; one that the training has removed meanwhile stands first among equals."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
