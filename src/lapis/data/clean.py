"""One part of the input to clean documents: read, repair, judge, name, sketch. Runs in worker processes.

Each part becomes an Arrow file of the documents that stay, with all that later stages ask about them, and a
JSON file of what happened. Both are written whole or not at all, so a killed stage goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.dedup import HASHES, content_digest, normal_digest, sketches
from lapis.data.document import KINDS, Document
from lapis.data.filters import repair
from lapis.data.judge import judge
from lapis.data.readers import Note, Part, Skip, read_part
from lapis.data.recipe import FilterConfig
from lapis.data.report import Step
from lapis.data.words import split_words
from lapis.storage import atomic_file, write_text

CHUNK_CHARS = 200_000  # what is split into words at once: small enough for the CPU's cache
ROW_GROUP_BYTES = 8 << 20

SCHEMA = pa.schema(
    [
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("licence", pa.string()),
        ("kind", pa.string()),
        ("priority", pa.int32()),
        ("raw_end", pa.int64()),  # raw bytes of this part up to the end of this document
        ("normal", pa.binary(16)),
        ("digest", pa.binary(16)),
        ("sketch", pa.binary(4 * HASHES)),
    ]
)


@dataclass(frozen=True)
class CleanTask:
    """Part `number` of the clean stage: where its files go, and the rules."""

    number: int
    part: Part
    folder: Path
    rules: FilterConfig
    document_chars: int

    @property
    def table(self) -> Path:
        """The Arrow file of the documents."""
        return self.folder / f"part-{self.number:06d}.arrow"

    @property
    def facts(self) -> Path:
        """The JSON file of what happened; there only when the part is done."""
        return self.folder / f"part-{self.number:06d}.json"


class Lost(NamedTuple):
    """A file that was listed and could not be read as it was listed."""

    source: str
    name: str
    reason: str


@dataclass
class PartFacts:
    """What came of one part."""

    steps: list[Step]
    raw_bytes: int
    lost: list[Lost]

    @staticmethod
    def read(path: Path) -> PartFacts:
        """Facts from a part's JSON file."""
        values = json.loads(path.read_text())
        steps = [Step.of(row) for row in values["steps"]]
        return PartFacts(steps, values["raw_bytes"], [Lost(*item) for item in values["lost"]])

    def write(self, path: Path) -> None:
        """Write the JSON file atomically."""
        steps = [step.plain() for step in self.steps]
        write_text(path, json.dumps({"steps": steps, "raw_bytes": self.raw_bytes, "lost": self.lost}))


class _Row(NamedTuple):
    document: Document
    priority: int
    raw_end: int
    size: int


def clean_part(task: CleanTask) -> PartFacts:
    """Do one part, unless it is done already."""
    if task.facts.exists():
        return PartFacts.read(task.facts)
    worker = _Cleaner(task)
    with atomic_file(task.table) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        batches: list[pa.RecordBatch] = []
        held = 0
        for batch in worker.batches():
            batches.append(batch)
            held += batch.nbytes
            if held >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(batches).combine_chunks())
                batches, held = [], 0
        if batches:
            writer.write_table(pa.Table.from_batches(batches).combine_chunks())
    facts = worker.facts()
    facts.write(task.facts)
    return facts


class _Cleaner:
    """The state of one part while it is cleaned: the counts of its two steps."""

    def __init__(self, task: CleanTask) -> None:
        self.task = task
        self.read, self.clean = Step("read"), Step("clean")
        self.raw_bytes = 0
        self.lost: list[Lost] = []
        self.priorities = {item.source.name: item.source.priority for item in task.part.inputs}
        self.began = time.thread_time()

    def facts(self) -> PartFacts:
        self.read.seconds = time.thread_time() - self.began - self.clean.seconds
        return PartFacts([self.read, self.clean], self.raw_bytes, self.lost)

    def batches(self) -> Iterator[pa.RecordBatch]:
        rows: list[_Row] = []
        chars = 0
        for row in self._rows():
            rows.append(row)
            chars += len(row.document.text)
            if chars >= CHUNK_CHARS:
                yield self._chunk(rows)
                rows, chars = [], 0
        if rows:
            yield self._chunk(rows)

    def _rows(self) -> Iterator[_Row]:
        self.read.documents_in = len(self.task.part.inputs)
        for found in read_part(self.task.part, self.task.document_chars):
            if isinstance(found, Note):
                self.read.note(found.what)
            elif isinstance(found, Skip):
                self.read.drop(found.reason, f"{found.source}: {found.path}")
                if found.lost:
                    self.lost.append(Lost(found.source, found.path, found.reason))
            else:
                size = len(found.text.encode())
                self.raw_bytes += size
                self.read.keep(size)
                yield _Row(found, self.priorities[found.source], self.raw_bytes, size)

    def _chunk(self, rows: list[_Row]) -> pa.RecordBatch:
        began = time.thread_time()
        rows = [row._replace(document=replace(row.document, text=repair(row.document.text))) for row in rows]
        reasons = judge([row.document for row in rows], self.task.rules)
        kept: list[_Row] = []
        for row, reason in zip(rows, reasons, strict=True):
            self.clean.documents_in += 1
            self.clean.bytes_in += row.size
            if reason:
                self.clean.drop(reason, f"{row.document.source}: {row.document.path}")
            else:
                kept.append(row)
                self.clean.keep(len(row.document.text.encode()))
        batch = _batch(kept)
        self.clean.seconds += time.thread_time() - began
        return batch


def _batch(rows: list[_Row]) -> pa.RecordBatch:
    texts = [row.document.text for row in rows]
    sketch_DH = sketches(split_words(texts), texts) if texts else np.empty((0, HASHES), dtype=np.uint32)
    columns: dict[str, list[Any]] = {
        "text": texts,
        "source": [row.document.source for row in rows],
        "path": [row.document.path for row in rows],
        "licence": [row.document.licence for row in rows],
        "kind": [row.document.kind for row in rows],
        "priority": [row.priority for row in rows],
        "raw_end": [row.raw_end for row in rows],
        "normal": [normal_digest(text) for text in texts],
        "digest": [content_digest(text) for text in texts],
        "sketch": [sketch.tobytes() for sketch in sketch_DH.astype("<u4")],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


class CleanTable:
    """The documents of a finished clean stage, mapped into memory: columns as arrays, texts one at a time."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("part-*.arrow"))
        self._tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        self.first_of_part = np.cumsum([0, *(table.num_rows for table in self._tables)])
        self._table = pa.concat_tables(self._tables) if self._tables else SCHEMA.empty_table()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def strings(self, column: str) -> list[str]:
        """A whole column of text or bytes."""
        values: list[str] = self._table[column].to_pylist()
        return values

    def numbers(self, column: str) -> NDArray[np.int64]:
        """A whole column of numbers."""
        return np.asarray(self._table[column].to_numpy(), dtype=np.int64)

    def fixed(self, column: str) -> NDArray[np.uint8]:
        """A column of fixed-size bytes as a matrix, a row a document."""
        width = SCHEMA.field(column).type.byte_width
        parts = [
            np.frombuffer(b"".join(chunk.to_pylist()), dtype=np.uint8) for chunk in self._table[column].chunks
        ]
        return np.concatenate([np.empty(0, dtype=np.uint8), *parts]).reshape(-1, width)

    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of every text."""
        import pyarrow.compute as compute

        return np.asarray(compute.binary_length(self._table["text"]).to_numpy(), dtype=np.int64)

    def document(self, row: int) -> Document:
        """One document, with its id."""
        part = int(np.searchsorted(self.first_of_part, row, side="right")) - 1
        table, place = self._tables[part], row - int(self.first_of_part[part])
        text, source, path, licence, kind, digest = (
            table[name][place].as_py() for name in ("text", "source", "path", "licence", "kind", "digest")
        )
        assert kind in KINDS
        return Document(text, source, path, licence, kind, digest.hex())
