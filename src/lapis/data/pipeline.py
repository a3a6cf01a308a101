"""From sources to token shards: list → read and clean → dedup and split → tokenizer → encode.

Every stage is a folder named by the digest of what it is made from. A stage that is there is not made again;
one that was killed goes on where it was. The bytes that come out do not depend on the number of workers, on
the order of the inputs, or on interruptions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lapis.data.clean import CleanTable, CleanTask, Lost, PartFacts, clean_part
from lapis.data.readers import plan_parts
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.report import Step, merged
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.data.sources import Listing, list_inputs
from lapis.data.split import Rows, split_documents
from lapis.data.stage import Stage
from lapis.data.words import SPLITTER
from lapis.data.workers import run_tasks, worker_count
from lapis.errors import InputError, NotFoundError
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import atomic_folder, storage_errors, write_text
from lapis.tokenizer.bpe import Tokenizer

# One number a stage: raise it when the stage's code gives other bytes for the same input.
CLEAN_VERSION, SPLIT_VERSION, TOKENIZER_VERSION, TOKENS_VERSION = 1, 1, 1, 1

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
    count = worker_count(workers)
    clean = _clean(data, listing, home.data, count, progress)
    split = _split(data, clean, home.data, progress)
    vocabulary = _tokenizer(tokenizer, clean, split, home.data, progress)
    tokens = _encode(clean, split, vocabulary, home.data, count, progress)
    return Dataset.open(tokens.folder)


def find(data: DataConfig, tokenizer: TokenizerConfig, home: Home) -> Dataset:
    """The dataset of a recipe if it is there. Raises NotFoundError if it was not prepared yet."""
    clean = _clean_stage(data, list_inputs(data), home.data, [])
    split = _split_stage(data, clean, home.data)
    vocabulary = _tokenizer_stage(tokenizer, _given(tokenizer), split, home.data)
    tokens = _tokens_stage(split, vocabulary, home.data)
    if not tokens.done:
        raise NotFoundError(
            "The dataset of this recipe is not prepared.", hint="lapis data prepare RECIPE.toml"
        )
    return Dataset.open(tokens.folder)


def _clean(data: DataConfig, listing: Listing, root: Path, workers: int, progress: Progress) -> Stage:
    stage = _clean_stage(data, listing, root, [])
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        parts = plan_parts(listing.inputs)
        tasks = [
            CleanTask(n, part, stage.work, data.filters, data.document_chars) for n, part in enumerate(parts)
        ]
        total = sum(item.size for item in listing.inputs)
        done, facts = 0, []
        for task, found in zip(tasks, run_tasks(clean_part, tasks, workers), strict=True):
            facts.append(found)
            done += found.raw_bytes
            progress(done, total, f"read and cleaned {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
            assert task.facts.exists()
        steps = [listing.step, *merged(step for part in facts for step in part.steps)]
        _write_report(stage.work, steps)
        # What could not be read as it was listed is not in there, so the folder's name must say so.
        lost = sorted(item for part in facts for item in part.lost)
        final = _clean_stage(data, listing, root, lost) if lost else stage
        final.commit(stage.work)
        return final


def _clean_stage(data: DataConfig, listing: Listing, root: Path, lost: list[Lost]) -> Stage:
    gone = {(item.source, item.name) for item in lost}
    inputs = [item.identity for item in listing.inputs if (item.source.name, item.name) not in gone]
    facts = {
        "inputs": inputs,
        "lost": lost,
        "skipped": listing.step.reasons,
        "filters": data.filters.model_dump(mode="json"),
        "document_chars": data.document_chars,
        "splitter": SPLITTER,
    }
    return Stage.of(root, "clean", CLEAN_VERSION, facts)


def _split(data: DataConfig, clean: Stage, root: Path, progress: Progress) -> Stage:
    stage = _split_stage(data, clean, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        progress(0, None, "removing duplicates, holding documents out")
        table = CleanTable(clean.folder)
        steps = _read_report(clean.folder)
        rows = _within(data.max_bytes, clean.folder, table)
        if len(rows) < len(table):
            beyond = len(table) - len(rows)
            steps[-1].note("clean documents beyond max_bytes", beyond)
        if not len(rows):
            raise InputError(
                f"No document is left of {steps[0].documents_in:,} files: "
                + "; ".join(f"{step.step}: {step.top_reasons()}" for step in steps if step.reasons)
                + ".",
                hint="`--set data.filters.enabled=false` keeps what the quality rules drop.",
            )
        found = split_documents(table, rows, data.dedup, data.heldout)
        np.save(folder / "train.npy", found.train)
        np.save(folder / "heldout.npy", found.heldout)
        _write_report(folder, [*steps, *found.steps])
    return stage


def _split_stage(data: DataConfig, clean: Stage, root: Path) -> Stage:
    facts = {
        "clean": clean.digest,
        "max_bytes": data.max_bytes,
        "dedup": data.dedup.model_dump(mode="json"),
        "heldout": data.heldout.model_dump(mode="json"),
    }
    return Stage.of(root, "split", SPLIT_VERSION, facts)


def _within(max_bytes: int, folder: Path, table: CleanTable) -> Rows:
    """The rows whose raw text ends within the first `max_bytes` bytes; all of them if that is 0."""
    rows = np.arange(len(table), dtype=np.int64)
    if not max_bytes:
        return rows
    raw = [PartFacts.read(path).raw_bytes for path in sorted(folder.glob("part-*.json"))]
    before = np.repeat(np.cumsum([0, *raw[:-1]]), np.diff(table.first_of_part))
    return rows[before + table.numbers("raw_end") <= max_bytes]


def _tokenizer(config: TokenizerConfig, clean: Stage, split: Stage, root: Path, progress: Progress) -> Stage:
    given = _given(config)
    stage = _tokenizer_stage(config, given, split, root)
    if stage.done:
        return stage
    with stage.making(progress), atomic_folder(stage.folder) as folder:
        began = time.perf_counter()
        step = Step("tokenizer")
        if given is None:
            progress(0, None, f"training a tokenizer of {config.vocab_size:,} entries")
            given = Tokenizer.train(_sample(clean, split, config.sample_bytes, step), config.vocab_size)
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


def _sample(clean: Stage, split: Stage, limit: int, step: Step) -> Iterator[str]:
    """Training documents in the order of their digests, up to `limit` bytes: a reproducible sample."""
    table = CleanTable(clean.folder)
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
    clean: Path
    tokenizer: Path
    rows: tuple[int, ...]
    folder: Path

    @property
    def facts(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.json"


def _encode(
    clean: Stage, split: Stage, vocabulary: Stage, root: Path, workers: int, progress: Progress
) -> Stage:
    stage = _tokens_stage(split, vocabulary, root)
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        step, shards = _encode_shards(clean, split, vocabulary, stage.work, workers, progress)
        table = CleanTable(clean.folder)
        held = [table.document(row) for row in np.load(split.folder / "heldout.npy").tolist()]
        tokenizer = Tokenizer.load(vocabulary.folder / "tokenizer.json")
        write_manifest(stage.work, tokenizer, shards, write_heldout(stage.work, held))
        _write_report(stage.work, [*_read_report(split.folder), *_read_report(vocabulary.folder), step])
        for facts in stage.work.glob("shard-*.json"):
            facts.unlink()
        stage.commit(stage.work)
    return stage


def _encode_shards(
    clean: Stage, split: Stage, vocabulary: Stage, folder: Path, workers: int, progress: Progress
) -> tuple[Step, list[dict[str, Any]]]:
    train: Rows = np.load(split.folder / "train.npy")
    sizes = CleanTable(clean.folder).sizes()[train]
    path = vocabulary.folder / "tokenizer.json"
    tasks = [
        _EncodeTask(n, clean.folder, path, tuple(train[low:high].tolist()), folder)
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
    table = CleanTable(task.clean)
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
