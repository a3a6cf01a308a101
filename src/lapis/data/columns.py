"""Tables of a stage on disk: an Arrow file a part, written whole or not at all, read as columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.storage import atomic_file

ROW_GROUP_BYTES = 8 << 20

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


def part_file(folder: Path, number: int) -> Path:
    """The Arrow file of one part."""
    return folder / f"part-{number:06d}.arrow"


def part_facts(folder: Path, number: int) -> Path:
    """The JSON file of what happened to one part; there only when the part is done."""
    return folder / f"part-{number:06d}.json"


class PartWriter:
    """Writes one part's rows in groups of some MB."""

    def __init__(self, writer: pa.ipc.RecordBatchFileWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.RecordBatch] = []
        self._bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Add some rows."""
        self._waiting.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
        self._waiting, self._bytes = [], 0


@contextmanager
def part_writer(path: Path, schema: pa.Schema) -> Iterator[PartWriter]:
    """Write a part's file; it appears under its name when all rows are in it."""
    with atomic_file(path, name_later=True) as file, pa.ipc.new_file(file, schema) as writer:
        part = PartWriter(writer)
        yield part
        part.flush()


class Columns:
    """The rows of all parts of a finished stage, mapped into memory: columns as arrays."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        paths = sorted(folder.glob("part-*.arrow"))
        self._parts = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        self.first_of_part = np.cumsum([0, *(table.num_rows for table in self._parts)])
        self._table = pa.concat_tables(self._parts) if self._parts else schema.empty_table()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column as it is in Arrow."""
        return self._table[name]

    def strings(self, name: str) -> list[str]:
        """A whole column of text or bytes."""
        values: list[str] = self._table[name].to_pylist()
        return values

    def numbers(self, name: str) -> NDArray[Any]:
        """A whole column of numbers or truth values, in the type it is stored in."""
        values: NDArray[Any] = self._table[name].to_numpy()
        return values

    def fixed(self, name: str) -> NDArray[np.uint8]:
        """A column of fixed-size bytes as a matrix, a row a document."""
        width = self._table.schema.field(name).type.byte_width
        parts = [_bytes(chunk, width) for chunk in self._table[name].chunks]
        return np.concatenate([np.empty(0, dtype=np.uint8), *parts]).reshape(-1, width)

    def gather(self, name: str, rows: Rows, into: NDArray[np.uint8]) -> None:
        """Copy a column of fixed-size bytes, row n of `into` from `rows[n]`; only `into` takes memory."""
        place_D = np.full(len(self), -1, dtype=np.int64)
        place_D[rows] = np.arange(len(rows))
        width = into.shape[1]
        first = 0
        for chunk in self._table[name].chunks:
            place_C = place_D[first : first + len(chunk)]
            wanted = np.flatnonzero(place_C >= 0)
            into[place_C[wanted]] = _bytes(chunk, width).reshape(-1, width)[wanted]
            first += len(chunk)

    def equal(self, name: str, value: str) -> Mask:
        """Where a column of text holds one value."""
        import pyarrow.compute as compute

        found: Mask = compute.equal(self._table[name], value).to_numpy()
        return found

    def place(self, row: int) -> tuple[pa.Table, int]:
        """The part in which a row lies, and its place there."""
        part = int(np.searchsorted(self.first_of_part, row, side="right")) - 1
        return self._parts[part], row - int(self.first_of_part[part])


def _bytes(chunk: pa.Array, width: int) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    return values[chunk.offset * width : (chunk.offset + len(chunk)) * width]
