"""What is known about documents, written beside them: annotators, and one pass of theirs over a part.

An annotator measures; it never drops. Each has a stage of its own, named by its parameters and by the documents,
whose part N has a row for each row of the documents' part N. One pass makes all that is missing of a part: the
text is read once and split into words once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from lapis.data.columns import part_facts, part_file, part_writer
from lapis.data.document import Document
from lapis.data.documents import PartFacts, ReadTask, documents_of, read_documents
from lapis.data.words import Words, split_words
from lapis.storage import write_text

CHUNK_CHARS = 200_000  # what is split into words at once: small enough for the CPU's cache


@dataclass(frozen=True)
class Chunk:
    """Some repaired documents of one part, in order."""

    documents: Sequence[Document]

    @cached_property
    def texts(self) -> list[str]:
        """Their texts."""
        return [document.text for document in self.documents]

    @cached_property
    def words(self) -> Words:
        """Their words, split once for all annotators."""
        return split_words(self.texts)


class Annotator(Protocol):
    """Measures documents. It is pickled into workers, so it is small; models are opened when first used.

    What it says of a document depends on nothing but that document: not on its neighbours in the chunk.
    """

    @property
    def name(self) -> str:
        """The name of its stage."""

    @property
    def version(self) -> int:
        """A number to raise when its code gives other bytes."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""

    def facts(self) -> dict[str, Any]:
        """All that its result depends on: parameters, splitters, digests of models."""

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """One row for each document, in their order."""


@dataclass(frozen=True)
class AnnotateTask:
    """Part `number`: read it unless that is done (`read`), then make what is missing of each annotator's."""

    number: int
    documents: Path
    read: ReadTask | None
    annotators: tuple[tuple[Annotator, Path], ...]  # and the folder of each one's stage


def annotate_part(task: AnnotateTask) -> PartFacts:
    """Do what is missing of one part; returns what came of reading it."""
    if task.read is not None:
        facts = read_documents(task.read)
    else:
        facts = PartFacts.read(part_facts(task.documents, task.number))
    missing = [(one, at) for one, at in task.annotators if not part_facts(at, task.number).exists()]
    if missing:
        _annotate(part_file(task.documents, task.number), task.number, missing)
    return facts


def _annotate(path: Path, number: int, wanted: list[tuple[Annotator, Path]]) -> None:
    seconds = [0.0] * len(wanted)
    with ExitStack() as files:
        writers = [files.enter_context(part_writer(part_file(at, number), one.schema)) for one, at in wanted]
        for chunk in chunks(path):
            for n, (annotator, _) in enumerate(wanted):
                began = time.thread_time()
                batch = annotator.annotate(chunk)
                assert batch.num_rows == len(chunk.documents), f"{annotator.name}: a row a document"
                writers[n].write(batch)
                seconds[n] += time.thread_time() - began
    for (_, at), spent in zip(wanted, seconds, strict=True):
        write_text(part_facts(at, number), json.dumps({"seconds": round(spent, 3)}), name_later=True)


def annotation_seconds(folder: Path) -> float:
    """The time that all parts of an annotator's stage took."""
    return sum(float(json.loads(path.read_text())["seconds"]) for path in folder.glob("part-*.json"))


def chunks(path: Path) -> Iterator[Chunk]:
    """The documents of one part's file in chunks; a few MB are in memory at once."""
    waiting: list[Document] = []
    chars = 0
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        for n in range(reader.num_record_batches):
            for document in documents_of(reader.get_batch(n)):
                waiting.append(document)
                chars += len(document.text)
                if chars >= CHUNK_CHARS:
                    yield Chunk(waiting)
                    waiting, chars = [], 0
    if waiting:
        yield Chunk(waiting)
