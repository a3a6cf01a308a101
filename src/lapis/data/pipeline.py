"""From sources to token shards: list → read → annotate → decide and split → tokenizer → encode.

Every stage is a folder named by the digest of what it is made from. A stage that is there is not made again;
one that was killed goes on where it was. The bytes that come out do not depend on the number of workers, on
the order of the inputs, or on interruptions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lapis.data.annotate import AnnotateTask, Annotator, annotate_part, annotation_seconds
from lapis.data.annotators import annotators, rules
from lapis.data.boilerplate import VERSION as BOILERPLATE_VERSION
from lapis.data.boilerplate import boilerplate_sources, remove_boilerplate
from lapis.data.columns import Columns, Rows
from lapis.data.documents import DocumentTable, Lost, PartFacts, ReadTask
from lapis.data.readers import plan_parts
from lapis.data.recipe import BoilerplateConfig, DataConfig, TokenizerConfig
from lapis.data.report import Step, merged
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.data.sources import Listing, list_inputs
from lapis.data.split import Means, Split, split_documents
from lapis.data.stage import Stage
from lapis.data.workers import Room, run_tasks, worker_count
from lapis.errors import NotFoundError
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import atomic_folder, storage_errors, write_text
from lapis.tokenizer.bpe import Tokenizer

# One number a stage: raise it when the stage's code gives other bytes for the same input.
DOCUMENTS_VERSION, SPLIT_VERSION, TOKENIZER_VERSION, TOKENS_VERSION = 1, 3, 1, 1

SHARD_BYTES = (1 << 20, 256 << 20)  # least and most text of a shard
SHARDS = 16


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, home: Home, *, workers: int = 0, progress: Progress = silent
) -> Dataset:
    """Make the dataset of a recipe, or find it if it is there. `workers=0` uses every CPU.

    Raises InputError if there is no text, or too little; StorageError if the disk is full.
    """
    with storage_errors(home.data):
        home.data.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    listing = list_inputs(data, progress)
    listing.step.seconds = time.perf_counter() - began
    room = Room.within(data.memory_bytes, worker_count(workers))
    count = room.workers
    made = _annotated(data, listing, home.data, count, progress)
    split = _split(data, made, home.data, room, progress)
    vocabulary = _tokenizer(tokenizer, made.documents, split, home.data, progress)
    tokens = _encode(made.documents, split, vocabulary, home.data, count, progress)
    return Dataset.open(tokens.folder)


def find(data: DataConfig, tokenizer: TokenizerConfig, home: Home) -> Dataset:
    """The dataset of a recipe if it is there. Raises NotFoundError if it was not prepared yet."""
    made = Annotated.of(data, list_inputs(data), home.data)
    split = _split_stage(data, made, home.data)
    vocabulary = _tokenizer_stage(tokenizer, _given(tokenizer), split, home.data)
    tokens = _tokens_stage(split, vocabulary, home.data)
    if not tokens.done:
        raise NotFoundError(
            "The dataset of this recipe is not prepared.", hint="lapis data prepare RECIPE.toml"
        )
    return Dataset.open(tokens.folder)


@dataclass(frozen=True)
class Annotated:
    """The documents of a recipe, and the stage of each of its annotators."""

    documents: Stage
    attributes: tuple[tuple[Annotator, Stage], ...]

    @staticmethod
    def of(data: DataConfig, listing: Listing, root: Path, lost: Sequence[Lost] = ()) -> Annotated:
        """The stages of a recipe, of whose files some could not be read as they were listed."""
        documents = _documents_stage(data, listing, root, list(lost))
        if sources := boilerplate_sources(data.boilerplate, listing.inputs):
            documents = _bare_stage(documents, data.boilerplate, sources)
        return Annotated.on(documents, annotators(data))

    @staticmethod
    def on(documents: Stage, wanted: Sequence[Annotator]) -> Annotated:
        """The stages of some annotators on the documents of one stage."""
        return Annotated(documents, tuple((one, _attributes_stage(one, documents)) for one in wanted))

    @property
    def stages(self) -> list[Stage]:
        """All of them, in the one order in which everybody takes them."""
        return [self.documents, *sorted((stage for _, stage in self.attributes), key=lambda one: one.name)]

    def columns(self) -> dict[str, Columns]:
        """What is known about every document: a table for "documents" and for each annotator's name."""
        found: dict[str, Columns] = {"documents": DocumentTable(self.documents.folder)}
        for annotator, stage in self.attributes:
            found[annotator.name] = Columns(stage.folder, annotator.schema)
        return found


def _annotated(data: DataConfig, listing: Listing, root: Path, workers: int, progress: Progress) -> Annotated:
    """Read what is not read, annotate what is not annotated: one pass over the parts does both.

    Repeated lines are known only when all is read: where they are taken out, annotating is a pass of its own.
    """
    planned = Annotated.of(data, listing, root)
    sources = boilerplate_sources(data.boilerplate, listing.inputs)
    if not sources or all(stage.done for stage in planned.stages):
        return _pass_over(data, listing, planned, workers, progress)
    read = Annotated.on(_documents_stage(data, listing, root, []), ())
    documents = _pass_over(data, listing, read, workers, progress).documents
    bare = _bare(documents, data.boilerplate, sources, workers, progress)
    return _pass_over(data, listing, Annotated.on(bare, annotators(data)), workers, progress)


def _bare(
    documents: Stage, config: BoilerplateConfig, sources: list[str], workers: int, progress: Progress
) -> Stage:
    """The documents without the lines that they share."""
    stage = _bare_stage(documents, config, sources)
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        progress(0, None, "taking out lines that many documents share")
        steps = remove_boilerplate(documents.folder, stage.work, sources, config, workers)
        _write_report(stage.work, [*_read_report(documents.folder), *merged(steps)])
        stage.commit(stage.work)
    return stage


def _bare_stage(documents: Stage, config: BoilerplateConfig, sources: list[str]) -> Stage:
    facts = {"documents": documents.digest, "config": config.model_dump(mode="json"), "sources": sources}
    return Stage.of(documents.root, "documents", BOILERPLATE_VERSION, facts)


def _pass_over(
    data: DataConfig, listing: Listing, planned: Annotated, workers: int, progress: Progress
) -> Annotated:
    root = planned.documents.root
    if all(stage.done for stage in planned.stages):
        return planned
    with ExitStack() as held:
        for stage in planned.stages:
            held.enter_context(stage.making(progress))
        missing = [stage for stage in planned.stages if not stage.done]
        with storage_errors(root):
            for stage in missing:
                stage.work.mkdir(exist_ok=True)
        facts = _passed(data, listing, planned, workers, progress)
        # What could not be read as it was listed is not in there, so the folders' names must say so.
        lost = sorted(item for part in facts for item in part.lost)
        final = planned
        if lost and planned.documents in missing:
            wanted = [annotator for annotator, _ in planned.attributes]
            final = Annotated.on(_documents_stage(data, listing, root, lost), wanted)
        for stage, made in zip(planned.stages, final.stages, strict=True):
            if stage not in missing:
                continue
            if stage.name == "documents":
                steps = [listing.step, *merged(step for part in facts for step in part.steps)]
                _write_report(stage.work, steps)
            made.commit(stage.work)
        return final


def _passed(
    data: DataConfig, listing: Listing, planned: Annotated, workers: int, progress: Progress
) -> list[PartFacts]:
    documents = planned.documents
    wanted = tuple((one, stage.work) for one, stage in planned.attributes if not stage.done)
    if documents.done:
        count = len(list(documents.folder.glob("part-*.arrow")))
        tasks = [AnnotateTask(n, documents.folder, None, wanted) for n in range(count)]
    else:
        tasks = [
            AnnotateTask(n, documents.work, ReadTask(n, part, documents.work, data.document_chars), wanted)
            for n, part in enumerate(plan_parts(listing.inputs))
        ]
    total = sum(item.size for item in listing.inputs)
    done, facts = 0, []
    for found in run_tasks(annotate_part, tasks, workers):
        facts.append(found)
        done += found.raw_bytes
        progress(done, total, f"read and annotated {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    return facts


def _documents_stage(data: DataConfig, listing: Listing, root: Path, lost: list[Lost]) -> Stage:
    gone = {(item.source, item.name) for item in lost}
    inputs = [item.identity for item in listing.inputs if (item.source.name, item.name) not in gone]
    facts = {
        "inputs": inputs,
        "lost": lost,
        "skipped": listing.step.reasons,
        "document_chars": data.document_chars,
    }
    return Stage.of(root, "documents", DOCUMENTS_VERSION, facts)


def _attributes_stage(annotator: Annotator, documents: Stage) -> Stage:
    facts = {"documents": documents.digest, "facts": annotator.facts()}
    return Stage.of(documents.root, annotator.name, annotator.version, facts)


def _split(data: DataConfig, made: Annotated, root: Path, room: Room, progress: Progress) -> Stage:
    stage = _split_stage(data, made, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        progress(0, None, "applying rules, removing duplicates, holding documents out")
        found = _decided(data, made, Means(room, folder))
        np.save(folder / "train.npy", found.train)
        np.save(folder / "heldout.npy", found.heldout)
        found.verdicts.write(folder)
        write_text(folder / "stages.json", json.dumps([one.folder.name for one in made.stages]))
        _write_report(folder, found.steps)
    return stage


def _decided(data: DataConfig, made: Annotated, means: Means) -> Split:
    attributes = made.columns()
    table = DocumentTable(made.documents.folder)
    steps = _read_report(made.documents.folder)
    rows = _within(data.max_bytes, made.documents.folder, table)
    beyond = len(table) - len(rows)
    if beyond:
        steps[-1].note("documents beyond max_bytes", beyond)
    seconds = {one.name: annotation_seconds(stage.folder) for one, stage in made.attributes}
    every = rules(data)
    sizes = int(table.sizes()[rows].sum())
    for name in sorted(seconds.keys() - {rule.step for rule in every}):
        steps.append(Step(name, len(rows), len(rows), sizes, sizes))
    found = split_documents(attributes, rows, every, data.dedup, data.heldout, steps, means)
    for step in found.steps:
        step.seconds += seconds.get(step.step, 0.0)
    return found


def _split_stage(data: DataConfig, made: Annotated, root: Path) -> Stage:
    facts = {
        "stages": [stage.digest for stage in made.stages],
        "data": data.model_dump(
            mode="json", exclude={"sources", "document_chars", "boilerplate", "memory_bytes"}
        ),
    }
    return Stage.of(root, "split", SPLIT_VERSION, facts)


def _within(max_bytes: int, folder: Path, table: Columns) -> Rows:
    """The rows whose raw text ends within the first `max_bytes` bytes; all of them if that is 0."""
    rows = np.arange(len(table), dtype=np.int64)
    if not max_bytes:
        return rows
    raw = [PartFacts.read(path).raw_bytes for path in sorted(folder.glob("part-*.json"))]
    before = np.repeat(np.cumsum([0, *raw[:-1]]), np.diff(table.first_of_part))
    kept: Rows = rows[before + table.numbers("raw_end") <= max_bytes]
    return kept


def _tokenizer(
    config: TokenizerConfig, documents: Stage, split: Stage, root: Path, progress: Progress
) -> Stage:
    given = _given(config)
    stage = _tokenizer_stage(config, given, split, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        began = time.perf_counter()
        step = Step("tokenizer")
        if given is None:
            progress(0, None, f"training a tokenizer of {config.vocab_size:,} entries")
            given = Tokenizer.train(_sample(documents, split, config.sample_bytes, step), config.vocab_size)
        given.save(folder / "tokenizer.json")
        step.note("entries", given.vocab_size)
        step.documents_out, step.bytes_out = step.documents_in, step.bytes_in
        step.seconds = time.perf_counter() - began
        _write_report(folder, [step])
    return stage


def _given(config: TokenizerConfig) -> Tokenizer | None:
    return Tokenizer.load(Path(config.path).expanduser()) if config.path else None


def _tokenizer_stage(config: TokenizerConfig, given: Tokenizer | None, split: Stage, root: Path) -> Stage:
    facts: dict[str, Any] = {"given": given.digest} if given is not None else {}
    if given is None:
        facts = {"split": split.digest, "vocab_size": config.vocab_size, "sample_bytes": config.sample_bytes}
    return Stage.of(root, "tokenizer", TOKENIZER_VERSION, facts)


def _sample(documents: Stage, split: Stage, limit: int, step: Step) -> Iterator[str]:
    """Training documents in the order of their digests, up to `limit` bytes: a reproducible sample."""
    table = DocumentTable(documents.folder)
    for row in np.load(split.folder / "train.npy").tolist():
        if step.bytes_in >= limit:
            return
        text = table.document(row).text
        step.documents_in += 1
        step.bytes_in += len(text.encode())
        yield text


@dataclass(frozen=True)
class _EncodeTask:
    number: int
    documents: Path
    tokenizer: Path
    rows: tuple[int, ...]
    folder: Path

    @property
    def facts(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.json"


def _encode(
    documents: Stage, split: Stage, vocabulary: Stage, root: Path, workers: int, progress: Progress
) -> Stage:
    stage = _tokens_stage(split, vocabulary, root)
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        step, shards = _encode_shards(documents, split, vocabulary, stage.work, workers, progress)
        table = DocumentTable(documents.folder)
        held = [table.document(row) for row in np.load(split.folder / "heldout.npy").tolist()]
        tokenizer = Tokenizer.load(vocabulary.folder / "tokenizer.json")
        write_manifest(stage.work, tokenizer, shards, write_heldout(stage.work, held))
        _write_report(stage.work, [*_read_report(split.folder), *_read_report(vocabulary.folder), step])
        for facts in stage.work.glob("shard-*.json"):
            facts.unlink()
        stage.commit(stage.work)
    return stage


def _encode_shards(
    documents: Stage, split: Stage, vocabulary: Stage, folder: Path, workers: int, progress: Progress
) -> tuple[Step, list[dict[str, Any]]]:
    train: Rows = np.load(split.folder / "train.npy")
    sizes = DocumentTable(documents.folder).sizes()[train]
    path = vocabulary.folder / "tokenizer.json"
    tasks = [
        _EncodeTask(n, documents.folder, path, tuple(train[low:high].tolist()), folder)
        for n, (low, high) in enumerate(shard_cuts(sizes))
    ]
    total = int(sizes.sum())
    step = Step("encode", documents_in=len(train), bytes_in=total)
    shards = []
    for shard in run_tasks(_encode_shard, tasks, workers):
        step.seconds += shard.pop("seconds")
        step.documents_out += shard["documents"]
        step.bytes_out += shard["bytes"]
        shards.append(shard)
        progress(step.bytes_out, total, f"encoded {step.bytes_out / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    step.note("tokens", sum(shard["tokens"] for shard in shards))
    return step, shards


def _tokens_stage(split: Stage, vocabulary: Stage, root: Path) -> Stage:
    return Stage.of(root, "tokens", TOKENS_VERSION, {"split": split.digest, "tokenizer": vocabulary.digest})


def shard_cuts(sizes: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Ranges of documents that make the shards: about 16 of them, each 1 to 256 MB of text."""
    least, most = SHARD_BYTES
    wanted = min(max(int(sizes.sum()) // SHARDS, least), most)
    place = (np.cumsum(sizes) - sizes) // wanted  # the shard in which each document starts
    borders = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(sizes)]
    return list(pairwise(borders))


def _encode_shard(task: _EncodeTask) -> dict[str, Any]:
    if task.facts.exists():
        return dict(json.loads(task.facts.read_text()))
    began = time.thread_time()
    table = DocumentTable(task.documents)
    documents = map(table.document, task.rows)
    shard = write_shard(task.folder, task.number, documents, _loaded(task.tokenizer))
    shard["seconds"] = time.thread_time() - began
    write_text(task.facts, json.dumps(shard))
    return shard


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    """The tokenizer of a worker, with the words it remembers from one shard to the next."""
    return Tokenizer.load(path)


def _write_report(folder: Path, steps: list[Step]) -> None:
    write_text(
        folder / "report.json", json.dumps([step.plain() for step in steps], indent=1, ensure_ascii=False)
    )


def _read_report(folder: Path) -> list[Step]:
    return [Step.of(row) for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))]
