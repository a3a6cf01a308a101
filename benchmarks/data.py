"""How fast each step of the data path is on one core: MB of text per CPU second.

    python benchmarks/data.py [--mb 20] [--path FILE_OR_FOLDER]

Without a path it takes the text that the interpreter's environment brings. Times are CPU time of one thread,
the best of three, so that neighbours on the machine disturb little. No peer runs beside it yet: datatrove needs
a spaCy model at run time; the figures in docs/data.md name those it publishes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from lapis.cli.output import print_table, say
from lapis.data.clusters import near_duplicates
from lapis.data.dedup import content_digest, normal_digest, shingle_sets, sketches
from lapis.data.document import Document
from lapis.data.filters import repair
from lapis.data.judge import judge
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, FilterConfig, SourceConfig
from lapis.data.sources import list_inputs
from lapis.data.words import split_words
from lapis.tokenizer.bpe import Tokenizer

Result = TypeVar("Result")
CHUNK = 40  # documents judged and sketched at once, as the pipeline does


def timed(work: Callable[[], Result], repeats: int = 3) -> tuple[Result, float]:
    """What the work gives, and the CPU seconds of its fastest run."""
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        result = work()
        best = min(best, time.thread_time() - began)
    return result, best


def chunks(documents: list[Document]) -> list[list[Document]]:
    """Documents in chunks."""
    return [documents[n : n + CHUNK] for n in range(0, len(documents), CHUNK)]


def main() -> None:
    """Measure every step and print a table."""
    options = argparse.ArgumentParser()
    options.add_argument("--mb", type=int, default=20)
    options.add_argument("--path", type=Path)
    options.add_argument("--text-column", default="text")
    given = options.parse_args()
    source = (
        SourceConfig(path=str(given.path), text_column=given.text_column)
        if given.path
        else SourceConfig(kind="environment")
    )
    config = DataConfig(sources=(source,), max_bytes=given.mb * 1_000_000)
    rows: list[tuple[str, float, float]] = []

    def row(step: str, size: int, seconds: float) -> None:
        rows.append((step, round(size / 1e6, 1), round(size / 1e6 / seconds, 1)))

    began = time.thread_time()
    listing = list_inputs(config)
    row("list and digest files", sum(item.size for item in listing.inputs), time.thread_time() - began)
    parts = plan_parts(listing.inputs)
    found, seconds = timed(
        lambda: [one for part in parts for one in read_part(part, config.document_chars)], 1
    )
    documents = [one for one in found if isinstance(one, Document)]
    size = sum(len(one.text.encode()) for one in documents)
    row("read", size, seconds)
    texts, seconds = timed(lambda: [repair(one.text) for one in documents])
    row("repair", size, seconds)
    rules = FilterConfig()
    verdicts, seconds = timed(lambda: [reason for part in chunks(documents) for reason in judge(part, rules)])
    row("quality rules", size, seconds)
    kept = [text for text, reason in zip(texts, verdicts, strict=True) if not reason]
    size = sum(len(text.encode()) for text in kept)
    _, seconds = timed(lambda: [(normal_digest(text), content_digest(text)) for text in kept])
    row("digests (exact duplicates)", size, seconds)
    groups = [kept[n : n + CHUNK] for n in range(0, len(kept), CHUNK)]
    words, seconds = timed(lambda: [split_words(group) for group in groups])
    row("words", size, seconds)
    pairs = list(zip(words, groups, strict=True))
    sketched, seconds = timed(lambda: np.concatenate([sketches(*pair) for pair in pairs]))
    row("minhash sketches (112)", size, seconds)
    _, seconds = timed(
        lambda: near_duplicates(
            sketched, np.arange(len(kept)), lambda rows: shingle_sets([kept[row] for row in rows]), 0.75
        )
    )
    row("near-duplicate clusters", size, seconds)
    tokenizer, seconds = timed(lambda: Tokenizer.train(kept, 8192), 1)
    row("tokenizer training (8,192)", size, seconds)
    _, seconds = timed(lambda: tokenizer.encode_batch(kept), 1)
    row("encode", size, seconds)
    print_table(("step", "MB", "MB/s per core"), rows)
    say(f"\n{len(documents):,} documents, {len(kept):,} kept by the rules")


if __name__ == "__main__":
    main()
