"""Save and load tensors with proof. A save is written beside, flushed, read back, then renamed into place.

The files are safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes. They are written
here and not by the safetensors package because every digest is taken while the bytes pass by.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lapis.checkpoint.folder import (
    Checkpoint,
    check_names,
    clear_leftovers,
    damage,
    digest_from_disk,
    discard,
    latest,
    read,
    retain,
    verify,
)
from lapis.checkpoint.manifest import (
    GROUP,
    MANIFEST,
    SAVING,
    STATE,
    TENSORS,
    FileEntry,
    Manifest,
    TensorEntry,
    folder_name,
    render,
)
from lapis.errors import IntegrityError
from lapis.hashing import CHUNK, canonical_json, digest_bytes
from lapis.storage import lock, storage_errors, sync_folder

__all__ = ["Checkpoint", "Loaded", "latest", "load", "save"]

ALIGNMENT = (
    64  # tensors begin at a multiple of this in the file, so that they can be used where they were read
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Loaded(NamedTuple):
    """What a checkpoint holds: tensors by group and name (on the CPU), and the JSON state."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Checkpoint:
    """Commit a checkpoint of `step` below `folder` and keep the `keep` newest.

    `state` is plain JSON (no NaN). Older ones go only after the new one was read back with the right digests.
    Raises StorageError (disk full; the older ones stay), IntegrityError (the disk returned other bytes than
    were written) and ConflictError (another process saves here).
    """
    text = canonical_json(state).encode()  # before anything is written: a bad state must cost nothing
    assert all(GROUP.fullmatch(group) for group in groups), "group names are lower-case words"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"The checkpoint folder {folder}"):
        clear_leftovers(folder)
        temporary = folder / f"{SAVING}{uuid.uuid4().hex}"
        try:
            with storage_errors(folder):
                temporary.mkdir()
                manifest = _write(temporary, step, groups, text)
                _verify_written(temporary, manifest)
                target = folder / folder_name(manifest)
                _commit(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        retain(folder, target.name, keep)
        return Checkpoint(target, manifest)


def load(checkpoint: Checkpoint) -> Loaded:
    """Read a checkpoint, verifying the digest of every byte before any tensor is made of it.

    The verified buffer is the memory that the tensors use, so nothing can change in between. Raises
    IntegrityError naming the file and the tensor.
    """
    checkpoint = read(checkpoint.folder)
    check_names(checkpoint)
    files = checkpoint.manifest.files
    with ThreadPoolExecutor(max_workers=4) as pool:
        reading = {name: pool.submit(_read_verified, checkpoint, name) for name in files}
        data = {name: future.result() for name, future in reading.items()}
    state = json.loads(data.pop(STATE))
    return Loaded({name.removesuffix(TENSORS): _tensors(buffer) for name, buffer in data.items()}, state)


def _write(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: bytes) -> Manifest:
    with ThreadPoolExecutor(
        max_workers=4
    ) as pool:  # a thread per file: writing and hashing release the interpreter
        writing = {
            f"{group}{TENSORS}": pool.submit(_write_tensors, folder / f"{group}{TENSORS}", tensors)
            for group, tensors in groups.items()
        }
        files = {name: future.result() for name, future in writing.items()}
    files[STATE] = FileEntry(len(state), digest_bytes(state), {})
    manifest = Manifest(step, files)
    _write_bytes(folder / STATE, state)
    _write_bytes(folder / MANIFEST, render(manifest).encode())
    sync_folder(folder)
    return manifest


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps every tensor aligned
    header = _header(tensors, order)
    whole = hashlib.sha256(header)
    position, entries = len(header), {}
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            data = _bytes_of(tensors[name])
            own = hashlib.sha256()
            for start in range(
                0, len(data), CHUNK
            ):  # small enough that the hashes read what is still in cache
                piece = data[start : start + CHUNK]
                file.write(piece)
                whole.update(piece)
                own.update(piece)
            entries[name] = TensorEntry(position, len(data), own.hexdigest())
            position += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(position, whole.hexdigest(), entries)


def _header(tensors: Mapping[str, Tensor], order: Sequence[str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _verify_written(folder: Path, manifest: Manifest) -> None:
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(lambda name: digest_from_disk(folder / name), manifest.files)
        for (name, entry), digest in zip(manifest.files.items(), digests, strict=True):
            if digest != entry.sha256:
                raise IntegrityError(
                    f"{name} came back from the disk with other bytes than were written.",
                    hint="It was not committed; the older ones stay. Check this machine's disk and memory.",
                )
    if (folder / MANIFEST).read_bytes() != render(manifest).encode():
        raise IntegrityError(f"{MANIFEST} came back from the disk with other bytes than were written.")


def _commit(temporary: Path, target: Path) -> None:
    """Rename a verified folder into place. One of that name holds the same bytes, unless damaged since."""
    if target.exists():
        try:
            verify(read(target))
            return
        except IntegrityError:
            discard(target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def _read_verified(checkpoint: Checkpoint, name: str) -> bytearray:
    entry = checkpoint.manifest.files[name]
    data = bytearray(entry.bytes)
    view = memoryview(data)
    with storage_errors(checkpoint.folder), (checkpoint.folder / name).open("rb", buffering=0) as file:
        position = 0
        while position < entry.bytes and (count := file.readinto(view[position:])):
            position += count
    if digest_bytes(view) != entry.sha256:
        raise damage(checkpoint, name, view)
    return data


def _tensors(data: bytearray) -> dict[str, Tensor]:
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(bytes(data[8:begin]))
    table.pop("__metadata__", None)
    return {name: _tensor(data, begin, place) for name, place in table.items()}


def _tensor(data: bytearray, begin: int, place: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[place["dtype"]], place["shape"]
    start, end = place["data_offsets"]
    if start == end:
        return torch.empty(shape, dtype=dtype)
    count = (end - start) // dtype.itemsize
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start).reshape(shape)
