"""From sources to token shards: list → read → annotate → decide and split → tokenizer → encode.

Every stage is a folder named by the digest of what it is made from. A stage that is there is not made again;
one that was killed goes on where it was. The bytes that come out do not depend on the number of workers, on
the order of the inputs, or on interruptions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lapis.data.annotate import annotation_seconds
from lapis.data.annotators import rules
from lapis.data.attributes import Annotated, Reading, annotate, within
from lapis.data.columns import Rows
from lapis.data.croissant import FILE as CARD
from lapis.data.croissant import write_card
from lapis.data.documents import DocumentTable
from lapis.data.language import language_counts
from lapis.data.page import Shown, shown_texts, template, write_page
from lapis.data.policy import note_overlap, policy_of
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.remove import RemovalList
from lapis.data.report import Step, read_report, write_report
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.data.sources import Listing, list_inputs
from lapis.data.split import Means, Split, split_documents
from lapis.data.stage import Stage
from lapis.data.training_texts import TrainingTexts
from lapis.data.verdicts import Decided
from lapis.data.workers import Room, kept_workers, run_tasks, tasks_elsewhere, worker_count
from lapis.errors import NotFoundError
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import atomic_folder, is_url, storage_errors, write_text
from lapis.tokenizer.bpe import Tokenizer

# One number a stage: raise it when the stage's code gives other bytes for the same input.
SPLIT_VERSION, TOKENIZER_VERSION, TOKENS_VERSION = 4, 1, 2

SHARD_BYTES = (1 << 20, 256 << 20)  # least and most text of a shard
SHARDS = 16


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    home: Home,
    *,
    workers: int = 0,
    on: Literal["processes", "ray"] = "processes",
    progress: Progress = silent,
) -> Dataset:
    """Make the dataset of a recipe, or find it if it is there. `workers=0` uses every CPU.

    Raises InputError if there is no text, or too little; StorageError if the disk is full; with `on="ray"`
    UnavailableError if there is no cluster, or its machines do not all see the files.
    """
    with storage_errors(home.data):
        home.data.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    listing = list_inputs(data, progress)
    listing.step.seconds = time.perf_counter() - began
    room = Room.within(data.memory_bytes, worker_count(workers))
    reading = Reading(data, listing, home.data)
    if on == "processes":
        return prepare_listed(reading, tokenizer, room, progress)
    with _on_ray(listing, home.data) as cores:
        return prepare_listed(reading, tokenizer, replace(room, workers=cores), progress)


@contextmanager
def _on_ray(listing: Listing, root: Path) -> Iterator[int]:
    """Run tasks on a Ray cluster; gives the number of its cores."""
    from lapis.data.cluster import connected  # Ray is never loaded on the way of one machine

    first = {item.source.name: Path(item.path) for item in reversed(listing.inputs) if not is_url(item.path)}
    with connected(root, list(first.values())) as cluster, tasks_elsewhere(cluster.run):
        yield cluster.cpus


def prepare_listed(
    reading: Reading, tokenizer: TokenizerConfig, room: Room, progress: Progress = silent
) -> Dataset:
    """Make the dataset of some listed files, or of a sample of their documents."""
    data, root = reading.data, reading.root
    removed = RemovalList(root)
    with kept_workers(room.workers), ThreadPoolExecutor(1) as aside:
        given = aside.submit(_given, tokenizer)
        made = annotate(reading, room.workers, progress)
        split = _split(data, made, root, room, progress)
        texts = made.training_texts(data)
        vocabulary = _tokenizer(tokenizer, given.result(), texts, split, root, progress)
        standing = removed.stands_for(_tokens_stage(split, vocabulary, root).folder.name)
        if standing is not None:
            return standing
        tokens = _encode(texts, split, vocabulary, root, room.workers, progress)
    shown = Shown(shown_texts(texts, data), removed.removals())
    return _described(removed.apply(Dataset.open(tokens.folder)), split, shown)


def _described(dataset: Dataset, split: Stage, shown: Shown) -> Dataset:
    """A dataset with its page and card beside the shards."""
    if not (dataset.folder / CARD).exists():
        with storage_errors(dataset.folder):
            write_page(dataset, Decided(split.folder), shown)
            write_card(dataset)
    return dataset


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe, made or not."""

    annotated: Annotated
    split: Stage
    tokenizer: Stage
    tokens: Stage

    @staticmethod
    def of(data: DataConfig, tokenizer: TokenizerConfig, listing: Listing, root: Path) -> Stages:
        """The stages of a recipe over some listed files."""
        annotated = Annotated.of(Reading(data, listing, root))
        split = _split_stage(data, annotated, root)
        vocabulary = _tokenizer_stage(tokenizer, _given(tokenizer), split, root)
        return Stages(annotated, split, vocabulary, _tokens_stage(split, vocabulary, root))


def find(data: DataConfig, tokenizer: TokenizerConfig, home: Home, file: str = "RECIPE.toml") -> Dataset:
    """The dataset of a recipe, that of `file`, if it is there. Raises NotFoundError if it was not prepared yet."""
    tokens = Stages.of(data, tokenizer, list_inputs(data), home.data).tokens
    removed = RemovalList(home.data)
    standing = removed.stands_for(tokens.folder.name)
    if standing is not None:
        return standing
    if not tokens.done:
        raise NotFoundError("The dataset of this recipe is not prepared.", hint=f"lapis data prepare {file}")
    return removed.apply(Dataset.open(tokens.folder))


def _split(data: DataConfig, made: Annotated, root: Path, room: Room, progress: Progress) -> Stage:
    stage = _split_stage(data, made, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        progress(0, None, "applying rules, removing duplicates, holding documents out")
        policy = policy_of(data, DocumentTable(made.documents.folder), [one for one, _ in made.attributes])
        found = decided(data, made, Means(room, folder))
        np.save(folder / "train.npy", found.train)
        np.save(folder / "heldout.npy", found.heldout)
        found.verdicts.write(folder, [one.folder.name for one in made.stages])
        write_text(folder / "policy.json", json.dumps(policy))
        note_overlap(data, found.steps, made.columns, policy)
        write_report(folder, found.steps)
    return stage


def decided(data: DataConfig, made: Annotated, means: Means) -> Split:
    """What a recipe decides from the attributes that are there."""
    attributes = made.columns
    table = DocumentTable(made.documents.folder)
    steps = read_report(made.documents.folder)
    rows = within(data.max_bytes, made.documents.folder, table)
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
        if step.step == "language":
            step.notes.update(language_counts(attributes, found.train))
    return found


def _split_stage(data: DataConfig, made: Annotated, root: Path) -> Stage:
    facts = {
        "stages": [stage.digest for stage in made.stages],
        "data": data.model_dump(
            mode="json", exclude={"sources", "document_chars", "boilerplate", "memory_bytes", "mixture"}
        ),
    }
    return Stage.of(root, "split", SPLIT_VERSION, facts)


def _tokenizer(
    config: TokenizerConfig,
    given: Tokenizer | None,
    texts: TrainingTexts,
    split: Stage,
    root: Path,
    progress: Progress,
) -> Stage:
    stage = _tokenizer_stage(config, given, split, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        began = time.perf_counter()
        step = Step("tokenizer")
        if given is None:
            progress(0, None, f"training a tokenizer of {config.vocab_size:,} entries")
            given = Tokenizer.train(_sample(texts, split, config.sample_bytes, step), config.vocab_size)
        given.save(folder / "tokenizer.json")
        step.note("entries", given.vocab_size)
        step.documents_out, step.bytes_out = step.documents_in, step.bytes_in
        step.seconds = time.perf_counter() - began
        write_report(folder, [step])
    return stage


def _given(config: TokenizerConfig) -> Tokenizer | None:
    return Tokenizer.load(Path(config.path).expanduser()) if config.path else None


def _tokenizer_stage(config: TokenizerConfig, given: Tokenizer | None, split: Stage, root: Path) -> Stage:
    facts: dict[str, Any] = {"given": given.digest} if given is not None else {}
    if given is None:
        facts = {"split": split.digest, "vocab_size": config.vocab_size, "sample_bytes": config.sample_bytes}
    return Stage.of(root, "tokenizer", TOKENIZER_VERSION, facts)


def _sample(texts: TrainingTexts, split: Stage, limit: int, step: Step) -> Iterator[str]:
    """Training documents in the order of their digests, up to `limit` bytes: a reproducible sample."""
    for row in np.load(split.folder / "train.npy").tolist():
        if step.bytes_in >= limit:
            return
        text = texts.document(row).text
        step.documents_in += 1
        step.bytes_in += len(text.encode())
        yield text


@dataclass(frozen=True)
class _EncodeTask:
    number: int
    texts: TrainingTexts
    tokenizer: Path
    rows: tuple[int, ...]
    folder: Path

    @property
    def facts(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.json"


def _encode(
    texts: TrainingTexts, split: Stage, vocabulary: Stage, root: Path, workers: int, progress: Progress
) -> Stage:
    stage = _tokens_stage(split, vocabulary, root)
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        # Read by this thread: in Python 3.11 two threads that parse an array's header can fail (SystemError of ast).
        rows = np.load(split.folder / "heldout.npy").tolist()
        with ThreadPoolExecutor(1) as aside:  # this process has nothing else to do while workers encode
            held = aside.submit(write_heldout, stage.work, map(texts.document, rows))
            tokenizer = aside.submit(Tokenizer.load, vocabulary.folder / "tokenizer.json")
            aside.submit(template)
            step, shards = _encode_shards(texts, split, vocabulary, stage.work, workers, progress)
        policy = json.loads((split.folder / "policy.json").read_text())
        write_manifest(stage.work, tokenizer.result(), shards, held.result(), policy)
        write_report(stage.work, [*read_report(split.folder), *read_report(vocabulary.folder), step])
        for facts in stage.work.glob("shard-*.json"):
            facts.unlink()
        stage.commit(stage.work)
    return stage


def _encode_shards(
    texts: TrainingTexts, split: Stage, vocabulary: Stage, folder: Path, workers: int, progress: Progress
) -> tuple[Step, list[dict[str, Any]]]:
    train: Rows = np.load(split.folder / "train.npy")
    sizes = texts.sizes()[train]
    path = vocabulary.folder / "tokenizer.json"
    tasks = [
        _EncodeTask(n, texts, path, tuple(train[low:high].tolist()), folder)
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
    documents = map(task.texts.document, task.rows)
    shard = write_shard(task.folder, task.number, documents, _loaded(task.tokenizer))
    shard["seconds"] = time.thread_time() - began
    write_text(task.facts, json.dumps(shard), name_later=True)
    return shard


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    """The tokenizer of a worker, with the words it remembers from one shard to the next."""
    return Tokenizer.load(path)
