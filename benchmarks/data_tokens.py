"""Tokens: encoding beside tiktoken and `tokenizers`, training beside `tokenizers`, and the loader beside a plain copy.

    python benchmarks/data_tokens.py [--mb 48] [--rounds 3] [--path FILE.parquet] [--vocabulary 32768]

Every run is a process of its own on one core, with nothing remembered, and subjects take turns; times are CPU time,
so that neighbours on the machine disturb little. Without a path it takes ../shared/data/corpus.parquet if it is there,
else the text that the interpreter's environment brings. `make bench-peers PEERS=tiktoken` installs the peer.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from harness.installed import PEERS, stamp

from lapis.cli.output import print_table, say
from lapis.data.document import Document
from lapis.data.loader import TokenLoader
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.data.sources import list_inputs
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.split import SPLIT

WORKER = Path(__file__).parent / "harness" / "tokens_worker.py"
CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus.parquet"
SUBJECTS = ("lapis arrays", "lapis lists", "tiktoken", "tokenizers")
SHAPES = ((8, 1024), (16, 256))
STEPS = 2_000


def main() -> None:
    """Measure and print the tables."""
    options = argparse.ArgumentParser()
    options.add_argument("--mb", type=float, default=48)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--path", type=Path)
    options.add_argument("--vocabulary", type=int, default=32_768)
    options.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    given = options.parse_args()
    os.sched_setaffinity(0, {given.core})
    documents = read_documents(given.path, int(given.mb * 1e6))
    megabytes = sum(len(one.text.encode()) for one in documents) / 1e6
    say(
        f"{len(documents):,} documents, {megabytes:.1f} MB, a vocabulary of {given.vocabulary:,}, core {given.core}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = Tokenizer.train((one.text for one in documents), given.vocabulary)
        lay_out(folder, documents, tokenizer)
        found = rounds(("train lapis", "train tokenizers"), folder, given.vocabulary, given.rounds)
        show("training", found, megabytes, "train tokenizers")
        found = rounds(
            [name for name in SUBJECTS if not missing(name)], folder, given.vocabulary, given.rounds
        )
        show("encoding", found, megabytes, "tiktoken" if "tiktoken" in found else "tokenizers")
        measure_shards(folder, documents, tokenizer, megabytes)
        measure_loader(folder / "dataset")


def read_documents(path: Path | None, limit: int) -> list[Document]:
    """Documents up to so many bytes of text."""
    path = path or (CORPUS if CORPUS.exists() else None)
    source = SourceConfig(path=str(path)) if path else SourceConfig(kind="environment")
    config = DataConfig(sources=(source,))
    documents: list[Document] = []
    size = 0
    for part in plan_parts(list_inputs(config).inputs):
        for one in read_part(part, config.document_chars):
            if isinstance(one, Document):
                documents.append(one)
                size += len(one.text.encode())
            if size >= limit:
                return documents
    return documents


def lay_out(folder: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    """What the workers read: texts, tokenizer.json, and the same vocabulary as tiktoken takes it."""
    (folder / "texts.json").write_text(json.dumps([one.text for one in documents]), encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    pieces = {id: tokenizer.token_bytes(id) for id in sorted(tokenizer.ids - tokenizer.special_ids)}
    ranks = {base64.b64encode(piece).decode(): id for id, piece in pieces.items()}
    facts = {"split": SPLIT, "ranks": ranks, "specials": tokenizer.special_tokens}
    (folder / "ranks.json").write_text(json.dumps(facts))


def missing(subject: str) -> bool:
    """Whether a subject is a peer that has not been installed."""
    return subject == "tiktoken" and not stamp("tiktoken").exists()


def rounds(subjects: Iterable[str], folder: Path, size: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """Every subject so many times, in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    for _ in range(count):
        for name, runs in found.items():
            python = PEERS / "tiktoken" / "bin" / "python" if name == "tiktoken" else Path(sys.executable)
            command = [str(python), str(WORKER), name, str(folder / "texts.json"), str(folder), str(size)]
            runs.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
    return found


def show(what: str, found: dict[str, list[dict[str, Any]]], megabytes: float, peer: str) -> None:
    """A table of medians, and whether all made the same."""
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    rows = [
        (
            name,
            round(seconds, 2),
            round(megabytes / seconds, 1),
            f"{medians[peer] / seconds:.1f}x",
            max(run["resident"] for run in found[name]),
        )
        for name, seconds in medians.items()
    ]
    print_table((what, "s", "MB/s", f"to {peer}", "MiB"), rows)
    made = {run["digest"] for runs in found.values() for run in runs}
    say("All made the same.\n" if len(made) == 1 else f"DIFFERENT results: {len(made)}\n")


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread, the best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def measure_shards(folder: Path, documents: list[Document], tokenizer: Tokenizer, megabytes: float) -> None:
    """Write the dataset, and say how fast."""
    target = folder / "dataset"
    target.mkdir()
    fresh = Tokenizer.load(folder / "tokenizer.json")
    began = time.thread_time()
    shard = write_shard(target, 0, documents, fresh)
    seconds = time.thread_time() - began
    write_manifest(target, tokenizer, [shard], write_heldout(target, []))
    say(f"encode and write shards, digests included: {megabytes / seconds:.1f} MB/s\n")


def measure_loader(folder: Path) -> None:
    """Tokens a second of batches from the page cache, beside copying as many bytes in memory."""
    rows = []
    for batch, sequence in SHAPES:
        loader = TokenLoader(Dataset.open(folder), sequence=sequence, batch=batch, seed=1)
        steps = min(STEPS, loader.samples // batch)
        tokens = batch * sequence * steps

        def load() -> None:
            for step in range(steps):  # noqa: B023 - called at once
                loader.at(step)  # noqa: B023

        ours = cpu_seconds(load)
        pages = np.zeros((2, tokens), dtype=np.int64)
        beside = np.empty((2, batch * sequence), dtype=np.int64)

        def copy() -> None:
            for n in range(0, tokens, batch * sequence):  # noqa: B023
                np.copyto(beside, pages[:, n : n + batch * sequence])  # noqa: B023

        limit = cpu_seconds(copy)
        rows.append(
            (
                f"{batch} x {sequence:,}",
                round(ours / steps * 1e6, 1),
                round(tokens / ours / 1e6, 1),
                round(tokens / limit / 1e6, 1),
                f"{limit / ours:.0%}",
            )
        )
    print_table(("loader", "us a step", "M tokens/s", "plain copy of the batch", "share"), rows)


if __name__ == "__main__":
    main()
