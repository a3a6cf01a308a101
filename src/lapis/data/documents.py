"""One part of the input to documents: read, repair, name. Runs in worker processes.

Each part becomes an Arrow file of all its documents, with what later stages ask about them, and a JSON file of
what happened. Nothing is judged here: what is expensive to know about a document is written beside it
(annotate.py), and which documents stay is decided from that (split.py).
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
import xxhash
from numpy.typing import NDArray

from lapis.data.columns import Columns, Rows, part_facts, part_file, part_writer
from lapis.data.dedup import content_digest, normal_digest
from lapis.data.document import KINDS, Document
from lapis.data.formats.part import Note, Part, Skip
from lapis.data.readers import read_part
from lapis.data.repair import repair
from lapis.data.report import Step
from lapis.storage import write_text

CHUNK_CHARS = 200_000  # of documents made into rows at once

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
    ]
)


@dataclass(frozen=True)
class Sample:
    """A part of the input: which parts of it are read, and which of their documents are kept, as fractions.

    Both are chosen by digests of names, so the choice depends on no order, and a smaller sample lies within a
    larger one.
    """

    parts: float = 1.0
    rows: float = 1.0

    def takes_part(self, part: Part) -> bool:
        """Whether a part is read."""
        first = part.inputs[0]
        return _share(first.source.name, first.name, part.start, part.row_group) < self.parts

    def takes(self, document: Document) -> bool:
        """Whether a document of a part that is read is kept."""
        return _share(document.source, document.path) < self.rows


def _share(*names: object) -> float:
    """A number from 0 to 1 that a name stands at."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, names)).encode()) / 2**64


@dataclass(frozen=True)
class ReadTask:
    """Part `number` of the documents stage, and where its files go."""

    number: int
    part: Part
    folder: Path
    document_chars: int
    sample: Sample | None = None


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
        write_text(
            path,
            json.dumps({"steps": steps, "raw_bytes": self.raw_bytes, "lost": self.lost}),
            name_later=True,
        )


class _Row(NamedTuple):
    document: Document
    priority: int
    raw_end: int


def read_documents(task: ReadTask) -> PartFacts:
    """Do one part, unless it is done already."""
    path = part_facts(task.folder, task.number)
    if path.exists():
        return PartFacts.read(path)
    reading = _Reading(task)
    with part_writer(part_file(task.folder, task.number), SCHEMA) as writer:
        for batch in reading.batches():
            writer.write(batch)
    facts = reading.facts()
    facts.write(path)
    return facts


class _Reading:
    """The state of one part while it is read: the counts of its two steps."""

    def __init__(self, task: ReadTask) -> None:
        self.task = task
        self.read, self.repair = Step("read"), Step("repair")
        self.raw_bytes = 0
        self.lost: list[Lost] = []
        self.priorities = {item.source.name: item.source.priority for item in task.part.inputs}
        self.began = time.thread_time()

    def facts(self) -> PartFacts:
        self.read.seconds = time.thread_time() - self.began - self.repair.seconds
        return PartFacts([self.read, self.repair], self.raw_bytes, self.lost)

    def batches(self) -> Iterator[pa.RecordBatch]:
        rows: list[_Row] = []
        chars = 0
        for row in self._rows():
            rows.append(row)
            chars += len(row.document.text)
            if chars >= CHUNK_CHARS:
                yield self._batch(rows)
                rows, chars = [], 0
        if rows:
            yield self._batch(rows)

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
                if self.task.sample is not None and not self.task.sample.takes(found):
                    continue
                self.repair.documents_in += 1
                self.repair.bytes_in += size
                yield _Row(found, self.priorities[found.source], self.raw_bytes)

    def _batch(self, rows: list[_Row]) -> pa.RecordBatch:
        began = time.thread_time()
        kept: list[_Row] = []
        for row in rows:
            document = replace(row.document, text=repair(row.document.text))
            if document.text.strip():
                kept.append(row._replace(document=document))
                self.repair.keep(len(document.text.encode()))
            else:
                self.repair.drop("empty", document.label)
        batch = _batch(kept)
        self.repair.seconds += time.thread_time() - began
        return batch


def _batch(rows: list[_Row]) -> pa.RecordBatch:
    texts = [row.document.text for row in rows]
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
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


class DocumentTable(Columns):
    """The documents of a finished documents stage: columns as arrays, texts one at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SCHEMA)

    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of every text."""
        import pyarrow.compute as compute

        return np.asarray(compute.binary_length(self.column("text")).to_numpy(), dtype=np.int64)

    def digest_halves(self) -> NDArray[np.uint64]:
        """Each document's digest as two numbers (D, 2), in the order of which digests are ordered."""
        return self.fixed("digest").view(">u8").astype(np.uint64)

    def by_digest(self) -> Rows:
        """All rows in the order of their digests."""
        half_D2 = self.digest_halves()
        ordered: Rows = np.lexsort((half_D2[:, 1], half_D2[:, 0]))
        return ordered

    def texts(self, rows: Rows) -> list[str]:
        """The texts of some rows."""
        found = []
        for row in rows.tolist():
            part, place = self.place(row)
            found.append(part["text"][place].as_py())
        return found

    def origin(self, row: int) -> tuple[str, str]:
        """Source and path of a document."""
        part, place = self.place(row)
        return part["source"][place].as_py(), part["path"][place].as_py()

    def document(self, row: int) -> Document:
        """One document, with its id."""
        return next(documents_of(*self.place(row), 1))


def documents_of(
    table: pa.Table | pa.RecordBatch, start: int = 0, count: int | None = None
) -> Iterator[Document]:
    """Documents of some rows, with their ids."""
    names = ("text", "source", "path", "licence", "kind", "digest")
    columns = [table[name].slice(start, count).to_pylist() for name in names]
    for text, source, path, licence, kind, digest in zip(*columns, strict=True):
        assert kind in KINDS
        yield Document(text, source, path, licence, kind, digest.hex())
