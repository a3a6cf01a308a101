"""Text for tests: made up, reproducible, and good enough to pass the quality rules."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

SYLLABLES = [first + last for first in "bcdfghjklmnprstvz" for last in "aeiou"]


def words(seed: int, count: int = 4000) -> list[str]:
    """A vocabulary of made-up words, some common, most rare."""
    chance = random.Random(seed)
    return sorted({"".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(count)})


VOCABULARY = words(1)


def prose(seed: int, count: int = 200) -> str:
    """A text of `count` words in sentences and paragraphs; other seeds share no five words in a row."""
    chance = random.Random(seed)
    sentences = []
    while count > 0:
        length = min(chance.randint(6, 14), count)
        sentences.append(" ".join(chance.choices(VOCABULARY, k=length)).capitalize() + ".")
        count -= length
    paragraphs = [" ".join(sentences[n : n + 5]) for n in range(0, len(sentences), 5)]
    return "\n\n".join(paragraphs) + "\n"


def changed(text: str, seed: int, part: float) -> str:
    """The same text with a part of its words replaced in one place: a near-duplicate for a small part."""
    pieces = text.split(" ")
    length = int(len(pieces) * part)
    start = random.Random(seed).randrange(len(pieces) - length)
    pieces[start : start + length] = prose(10_000 + seed, length).split()
    return " ".join(pieces)


def write_corpus(folder: Path, documents: int = 60, count: int = 200, first: int = 0) -> Path:
    """A folder of text files, one document each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(first, first + documents):
        (folder / f"{n:04d}.txt").write_text(prose(n, count), encoding="utf-8")
    return folder


def real_texts(count: int | None = None) -> list[str]:
    """Documents of the corpus beside the checkout, about `count` of them if given; without it the test is skipped."""
    path = Path(__file__).parents[2] / "shared" / "data" / "corpus.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    column = parquet.read_table(path, columns=["text"]).column("text")
    step = 1 if count is None else len(column) // count
    return column.take(list(range(0, len(column), step))).to_pylist() if step > 1 else column.to_pylist()
