"""Files of tensors. They are safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes.

They are written here and not by the safetensors package because every digest is taken while the bytes pass by.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lapis.checkpoint.folder import damage
from lapis.checkpoint.manifest import FileEntry, Piece, Region
from lapis.checkpoint.piece import Box, Shape
from lapis.errors import InputError
from lapis.hashing import CHUNK, digest_bytes
from lapis.storage import storage_errors

ALIGNMENT = 64  # the first tensor begins at a multiple of this in the file
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


class Share(NamedTuple):
    """What a rank writes of a tensor: a box of it."""

    name: str
    whole: Shape
    box: Box
    data: Tensor

    @property
    def key(self) -> str:
        """Its name in the file: that of the tensor, with the box behind it if it is not the whole."""
        return self.name if self.box == Box.whole(self.whole) else f"{self.name}{self.box}"


def code_of(name: str, tensor: Tensor) -> str:
    """The dtype of a tensor as safetensors writes it. Raises InputError for one that has no code."""
    if tensor.dtype not in CODES:
        raise InputError(f"The tensor {name} has the dtype {tensor.dtype}, which no checkpoint can hold.")
    return CODES[tensor.dtype]


def write(path: Path, shares: Sequence[Share]) -> tuple[FileEntry, list[tuple[str, Piece]]]:
    """Write a file and flush it to the disk. Returns its entry, and each tensor's name with its piece."""
    # Large elements first: so every tensor is aligned to its elements.
    order = sorted(shares, key=lambda share: (-share.data.element_size(), share.name, share.box))
    header = _header(order)
    position, pieces = len(header), []
    with path.open("wb") as file:
        file.write(header)
        for share in order:
            data = _bytes_of(share.data)
            hasher = hashlib.sha256()
            for start in range(
                0, len(data), CHUNK
            ):  # small enough that the hash reads what is still in cache
                chunk = data[start : start + CHUNK]
                file.write(chunk)
                hasher.update(chunk)
            piece = Piece(path.name, *share.box, position, len(data), hasher.hexdigest())
            pieces.append((share.name, piece))
            position += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(position, len(header), digest_bytes(header)), pieces


def read(folder: Path, region: Region) -> Tensor:
    """The bytes of a region in memory of their own, verified there. Raises IntegrityError, StorageError."""
    data = torch.empty(region.bytes, dtype=torch.uint8)
    view, position = data.numpy().data, 0
    with storage_errors(folder), (folder / region.file).open("rb", buffering=0) as file:
        file.seek(region.start)
        while position < region.bytes and (count := file.readinto(view[position:])):
            position += count
    if digest_bytes(view) != region.sha256:
        raise damage(folder, region)
    return data


def _header(order: Sequence[Share]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for share in order:
        end = offset + share.data.numel() * share.data.element_size()
        dtype = code_of(share.name, share.data)
        table[share.key] = {"dtype": dtype, "shape": list(share.box.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
