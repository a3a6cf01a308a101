"""Lines that many documents of one source share (navigation, licence notes, cookie notices) are taken out.

A line counts once a document, under a digest of its source and of its text up to white space and case. Each part
of the documents becomes a sorted run of digests and counts on disk; the runs are merged range by range, so that
memory depends on the length of a range alone, and what reaches the limit is a sorted table that all workers map.

Letters: L lines, R entries of a run.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import xxhash
from numpy.typing import NDArray

from lapis.data.columns import part_facts, part_file, part_writer
from lapis.data.dedup import content_digest, normal_digest
from lapis.data.document import Document
from lapis.data.documents import SCHEMA, PartFacts, documents_of
from lapis.data.input import Input
from lapis.data.recipe import BoilerplateConfig
from lapis.data.report import Step
from lapis.data.workers import run_tasks
from lapis.storage import atomic_file

VERSION = 1  # raise it when other bytes come out
STEP = "boilerplate"
RUN = np.dtype([("digest", "<u8"), ("documents", "<u4")])
TABLE = "boilerplate.npy"
RANGE_BYTES = 16 << 20  # of run entries merged at once

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class _Part:
    """Part `number` of the documents in `documents`, whose lines are counted or taken out into `work`."""

    number: int
    documents: Path
    work: Path
    sources: frozenset[str]
    config: BoilerplateConfig

    @property
    def run(self) -> Path:
        return self.work / f"part-{self.number:06d}.lines.npy"


@dataclass(frozen=True)
class _Range:
    """The digests from `low` to `high` (not included) of all runs."""

    runs: tuple[Path, ...]
    low: int
    high: int
    min_documents: int


def boilerplate_sources(config: BoilerplateConfig, inputs: Sequence[Input]) -> list[str]:
    """The names of the sources whose repeated lines are taken out."""
    if config.sources == "none":
        return []
    return sorted(
        {item.source.name for item in inputs if config.sources == "all" or item.reader in ("html", "warc")}
    )


def remove_boilerplate(
    documents: Path, work: Path, sources: Sequence[str], config: BoilerplateConfig, workers: int
) -> list[Step]:
    """Write all parts of `documents` into `work` without the repeated lines of some sources.

    Parts that are there already are kept. Returns the rows of the report, one a part.
    """
    count = len(list(documents.glob("part-*.arrow")))
    parts = [_Part(n, documents, work, frozenset(sources), config) for n in range(count)]
    if not (work / TABLE).exists():
        for _ in run_tasks(_count, parts, workers):
            pass
        _write(work / TABLE, _merged([part.run for part in parts], config.min_documents, workers))
    steps = [step for facts in run_tasks(_take_out, parts, workers) for step in facts.steps]
    for path in [work / TABLE, *(part.run for part in parts)]:
        path.unlink(missing_ok=True)
    return steps


def _count(part: _Part) -> None:
    if part.run.exists():
        return
    digests = [np.empty(0, dtype=np.uint64)]
    for batch in _batches(part):
        for document in documents_of(batch):
            if _concerned(document, part):
                digests.append(np.unique(_line_digests(document, part.config.min_chars)))
    digest_R, documents_R = np.unique(np.concatenate(digests), return_counts=True)
    run_R = np.empty(len(digest_R) - bool(len(digest_R) and digest_R[0] == 0), dtype=RUN)
    run_R["digest"] = digest_R[len(digest_R) - len(run_R) :]  # 0 is a line that is too short
    run_R["documents"] = documents_R[len(digest_R) - len(run_R) :]
    _write(part.run, run_R)


def _merged(runs: Sequence[Path], min_documents: int, workers: int) -> Digests:
    """The digests that enough documents have, sorted."""
    ranges = max(1, math.ceil(sum(path.stat().st_size for path in runs) / RANGE_BYTES))
    borders = [n * (1 << 64) // ranges for n in range(ranges + 1)]
    tasks = [
        _Range(tuple(runs), low, high, min_documents)
        for low, high in zip(borders[:-1], borders[1:], strict=True)
    ]
    return np.concatenate([np.empty(0, dtype=np.uint64), *run_tasks(_merge_range, tasks, workers)])


def _merge_range(task: _Range) -> Digests:
    slices = [np.empty(0, dtype=RUN)]
    for path in task.runs:
        run_R = np.load(path, mmap_mode="r")
        low = int(np.searchsorted(run_R["digest"], np.uint64(task.low)))
        high = len(run_R)
        if task.high < 1 << 64:
            high = int(np.searchsorted(run_R["digest"], np.uint64(task.high)))
        slices.append(run_R[low:high].copy())
    all_R = np.concatenate(slices)
    digest_R, place_R = np.unique(all_R["digest"], return_inverse=True)
    documents_R = np.bincount(place_R, weights=all_R["documents"], minlength=len(digest_R))
    found: Digests = digest_R[documents_R >= task.min_documents]
    return found


def _take_out(part: _Part) -> PartFacts:
    facts = part_facts(part.work, part.number)
    if facts.exists():
        return PartFacts.read(facts)
    began = time.thread_time()
    step = Step(STEP)
    table = _table(part.work / TABLE)
    if _known(np.load(part.run)["digest"], table).any():
        with part_writer(part_file(part.work, part.number), SCHEMA) as writer:
            for batch in _batches(part):
                texts = [_without(document, part, table, step) for document in documents_of(batch)]
                writer.write(_with_texts(batch, texts))
    else:
        _link(part_file(part.documents, part.number), part_file(part.work, part.number))
        for batch in _batches(part):
            size = int(compute.sum(compute.binary_length(batch["text"])).as_py() or 0)
            step.add(Step(STEP, batch.num_rows, batch.num_rows, size, size))
    step.seconds = time.thread_time() - began
    read = PartFacts.read(part_facts(part.documents, part.number))
    result = PartFacts([step], read.raw_bytes, [])
    result.write(facts)
    return result


def _without(document: Document, part: _Part, table: Digests, step: Step) -> str:
    """A text without the lines in the table, counted in the step."""
    size = len(document.text.encode())
    step.documents_in += 1
    step.bytes_in += size
    if not _concerned(document, part):
        step.keep(size)
        return document.text
    known_L = _known(_line_digests(document, part.config.min_chars), table)
    lines = document.text.split("\n")
    text = "\n".join(line for line, known in zip(lines, known_L.tolist(), strict=True) if not known)
    if not text.strip():
        step.drop("nothing but boilerplate", document.label)
        return ""
    left = len(text.encode())
    step.keep(left)
    if left < size:
        step.note("documents with lines taken out")
        step.note("lines taken out", int(known_L.sum()))
        step.note("bytes taken out", size - left)
    return text


def _with_texts(batch: pa.RecordBatch, texts: list[str]) -> pa.RecordBatch:
    """The same documents with other texts; those without text are left out."""
    columns = {name: batch.column(name) for name in SCHEMA.names}
    columns["text"] = pa.array(texts, type=SCHEMA.field("text").type)
    columns["normal"] = pa.array([normal_digest(text) for text in texts], type=SCHEMA.field("normal").type)
    columns["digest"] = pa.array([content_digest(text) for text in texts], type=SCHEMA.field("digest").type)
    whole = pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
    return whole.filter(pa.array([bool(text) for text in texts], type=pa.bool_()))


def _batches(part: _Part) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(part_file(part.documents, part.number))) as file, pa.ipc.open_file(file) as reader:
        for n in range(reader.num_record_batches):
            yield reader.get_batch(n)


def _concerned(document: Document, part: _Part) -> bool:
    return document.source in part.sources and document.kind == "prose"


def _line_digests(document: Document, min_chars: int) -> Digests:
    """A number for each line; 0 for one that is too short to be told from text."""
    seed = xxhash.xxh3_64_intdigest(document.source.encode())
    digests = []
    for line in document.text.split("\n"):
        words = " ".join(line.lower().split())
        digests.append(xxhash.xxh3_64_intdigest(words.encode(), seed) or 1 if len(words) >= min_chars else 0)
    return np.array(digests, dtype=np.uint64)


def _known(digest_L: Digests, table: Digests) -> NDArray[np.bool_]:
    if not len(table):
        return np.zeros(len(digest_L), dtype=bool)
    place_L = np.minimum(np.searchsorted(table, digest_L), len(table) - 1)
    known: NDArray[np.bool_] = table[place_L] == digest_L
    return known


@lru_cache(maxsize=1)
def _table(path: Path) -> Digests:
    mapped: Digests = np.load(path, mmap_mode="r") if path.stat().st_size > 1 << 20 else np.load(path)
    return mapped


def _write(path: Path, values: NDArray[np.generic]) -> None:
    with atomic_file(path) as file:
        np.save(file, values)


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name, or copied where the file system knows no links."""
    beside = target.with_suffix(".link")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    beside.replace(target)
