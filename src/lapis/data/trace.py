"""From tokens to the documents they come from, their sources and licences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lapis.data.shards import Dataset, DocumentEntry
from lapis.data.streams import Piece
from lapis.errors import InputError

RANGE = re.compile(r"(\d[\d_]*)(?::(\d[\d_]*))?")


class Traced(NamedTuple):
    """A document, and how many of its tokens were asked for."""

    document: DocumentEntry
    tokens: int


class LicenceRow(NamedTuple):
    """What all traced documents of one source and licence add up to."""

    source: str
    licence: str
    documents: int
    tokens: int


def parse_range(text: str) -> Piece:
    """Tokens of the training stream: "1000:2000" is from 1000 to before 2000, "1000" that one. Raises InputError."""
    match = RANGE.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text!r} is no range of tokens.", hint="Write FROM:TO, such as 1000:2000, or one number."
        )
    start = int(match[1])
    end = start + 1 if match[2] is None else int(match[2])
    if end <= start:
        raise InputError(
            f"The range {text} holds no token.", hint="The end is one past the last token: 1000:2000"
        )
    return Piece(start, end - start)


def trace(dataset: Dataset, pieces: Iterable[Piece]) -> list[Traced]:
    """The documents that stretches of the training stream come from, in the order of the stream.

    A token that is asked for twice counts twice. Raises InputError for tokens that are not there.
    """
    starts = dataset.document_starts
    counts: dict[int, int] = {}
    for start, tokens in pieces:
        if not 0 <= start < start + tokens <= dataset.tokens:
            raise InputError(
                f"Tokens {start:,} to {start + tokens:,} are not within the {dataset.tokens:,} there are."
            )
        number, end = int(np.searchsorted(starts, start, side="right")) - 1, start + tokens
        while start < end:
            stop = min(end, int(starts[number + 1]) if number + 1 < len(starts) else end)
            counts[number] = counts.get(number, 0) + stop - start
            start, number = stop, number + 1
    found = _entries(dataset, sorted(counts))
    return [Traced(entry, counts[number]) for number, entry in zip(sorted(counts), found, strict=True)]


def licence_table(traced: Iterable[Traced]) -> list[LicenceRow]:
    """Documents and tokens by source and licence, the most tokens first."""
    table: dict[tuple[str, str], tuple[int, int]] = {}
    for document, tokens in traced:
        key = document.source, document.licence
        documents, total = table.get(key, (0, 0))
        table[key] = documents + 1, total + tokens
    rows = [LicenceRow(*key, *counts) for key, counts in table.items()]
    return sorted(rows, key=lambda row: (-row.tokens, row.source, row.licence))


def _entries(dataset: Dataset, numbers: Sequence[int]) -> list[DocumentEntry]:
    """Documents by their numbers in the stream, ascending; each shard that has some is read once."""
    found: list[DocumentEntry] = []
    first, wanted = 0, set(numbers)
    for n, shard in enumerate(dataset.manifest["shards"]):
        inside = range(first, first + shard["documents"])
        if wanted.intersection(inside):
            found += [
                entry
                for number, entry in zip(inside, dataset.documents_of(n), strict=True)
                if number in wanted
            ]
        first = inside.stop
    return found
