"""Decontamination: which documents hold items of evaluation sets, by word n-grams.

Words are those of `words.SPLITTER`, after all punctuation and symbols beyond ASCII and lone underscores have become
spaces, so that line breaks, case and punctuation make no difference. A passage is a whole item, or one of its columns
that is long enough; a passage shorter than an n-gram is one n-gram of its own length, and has to be there whole.

Letters: W words of a chunk, E entries (n-grams at their places in passages), H different hashes, P passages, C words of
all passages, D documents, M matches of an n-gram of the chunk, X pairs of a match and an entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.annotate import Chunk
from lapis.data.columns import Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.evaluation_sets import EvaluationItem, read_items, set_facts
from lapis.data.recipe import DecontaminationConfig
from lapis.data.words import SPLITTER, Words, ngrams, split_words

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]

COMMON = 100  # an n-gram of more passages than that (a template, a disclaimer) says nothing about any of them
SCHEMA = pa.schema([("item", pa.int32()), ("item_share", pa.float32()), ("document_share", pa.float32())])

_MARKS = re.compile(
    "[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u060c\u061b\u061f\u066a-\u066d\u06d4\u0964\u0965"
    "\u2000-\u2bff\u3000-\u3004\u3008-\u3020\u3030\u303d\ufe10-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]+"
    r"|_(?<![^\W_]_)_*(?![^\W_])"
)


def plain_words(texts: Sequence[str], words: Words | None = None) -> Words:
    """The words that are compared. `words` are those of the texts as they are, if they are known."""
    if words is not None and not any(map(_MARKS.search, texts)):
        return words
    return split_words([_MARKS.sub(" ", text) for text in texts])


class Index(NamedTuple):
    """All n-grams of the passages: sorted hashes, and where each of them stands."""

    ngram: int
    short: int
    sizes: tuple[int, ...]
    began_S: Hashes  # the first `short` words of each passage that is shorter than an n-gram
    hash_H: Hashes
    first_H1: Numbers  # hash h has the entries first[h] to first[h + 1]
    place_E: Numbers  # the word of all passages at which the n-gram of the entry begins
    passage_C: Numbers  # the passage of each word
    covered_P: Numbers  # how many words of a passage are in any of its n-grams
    item_P: Numbers
    maybe: NDArray[
        np.bool_
    ]  # whether there is a hash with these first bits: most words need no more than that
    shift: np.uint64
    unfindable: int  # items too short to be looked for


def build_index(items: Sequence[EvaluationItem], ngram: int, short: int) -> Index:
    """The index of some items, for n-grams of `ngram` words; items of fewer than `short` words are left out."""
    passages, item_P, unfindable = _passages(items, ngram, short)
    hashes: list[Hashes] = [np.empty(0, dtype=np.uint64)]
    places: list[Numbers] = [np.empty(0, dtype=np.int64)]
    sizes: list[Numbers] = [np.empty(0, dtype=np.int64)]
    begin = 0
    for hash_W in passages:
        size = min(ngram, len(hash_W))
        grams = ngrams(hash_W, size)
        hashes.append(grams)
        places.append(np.arange(begin, begin + len(grams), dtype=np.int64))
        sizes.append(np.full(len(grams), size, dtype=np.int64))
        begin += len(hash_W)
    hash_E, place_E, size_E = np.concatenate(hashes), np.concatenate(places), np.concatenate(sizes)
    order_E = np.argsort(hash_E, kind="stable")
    hash_E, place_E, size_E = hash_E[order_E], place_E[order_E], size_E[order_E]
    first_E = np.r_[True, hash_E[1:] != hash_E[:-1]] if len(hash_E) else np.empty(0, dtype=bool)
    counts = np.diff(np.r_[np.flatnonzero(first_E), len(hash_E)])
    rare_E = np.repeat(counts <= COMMON, counts)
    hash_E, place_E, size_E, first_E = hash_E[rare_E], place_E[rare_E], size_E[rare_E], first_E[rare_E]
    passage_C = np.repeat(np.arange(len(passages), dtype=np.int64), [len(one) for one in passages])
    cells = np.unique(np.repeat(place_E, size_E) + _counting(size_E))
    hash_H = hash_E[first_E]
    bits = max(10, (16 * len(hash_H)).bit_length())
    shift = np.uint64(64 - bits)
    maybe = np.zeros(1 << bits, dtype=bool)
    began = [ngrams(hash_W[:short], short)[0] for hash_W in passages if len(hash_W) < ngram]
    began_S = np.unique(np.array(began, dtype=np.uint64))
    maybe[(np.r_[hash_H, began_S] >> shift).astype(np.int64)] = True
    return Index(
        ngram,
        short,
        tuple(np.unique(size_E).tolist()),
        began_S,
        hash_H,
        np.r_[np.flatnonzero(first_E), len(hash_E)].astype(np.int64),
        place_E,
        passage_C,
        np.bincount(passage_C[cells], minlength=len(passages)).astype(np.int64),
        np.array(item_P, dtype=np.int64),
        maybe,
        shift,
        unfindable,
    )


def _passages(items: Sequence[EvaluationItem], ngram: int, short: int) -> tuple[list[Hashes], list[int], int]:
    """Words of each passage: the whole item, columns of at least an n-gram, and a shorter question."""
    found: list[Hashes] = []
    item_P: list[int] = []
    unfindable = 0
    for number, item in enumerate(items):
        words = plain_words(item.columns)
        columns = [
            words.hash_W[low:high] for low, high in zip(words.first_D1, words.first_D1[1:], strict=False)
        ]
        chosen = [words.hash_W] if len(words.hash_W) >= short else []
        if len(columns) > 1:
            chosen += [
                hash_W
                for place, hash_W in enumerate(columns)
                if len(hash_W) >= ngram or (place == 0 and len(hash_W) >= short)
            ]
        unfindable += not chosen
        found += chosen
        item_P += [number] * len(chosen)
    return found, item_P, unfindable


def _counting(size_E: Numbers) -> Numbers:
    """0, 1, … size - 1 for each size, one after the other."""
    ends = np.cumsum(size_E)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - np.repeat(ends - size_E, size_E)


class Overlap(NamedTuple):
    """For each document the item of which it holds most (-1: none), that part of it, and the document's part."""

    item_D: NDArray[np.int32]
    item_share_D: NDArray[np.float32]
    document_share_D: NDArray[np.float32]


def overlap(words: Words, index: Index) -> Overlap:
    """What some documents, given by their plain words, hold of the passages."""
    documents = len(words.first_D1) - 1
    result = Overlap(
        np.full(documents, -1, dtype=np.int32),
        np.zeros(documents, dtype=np.float32),
        np.zeros(documents, dtype=np.float32),
    )
    found = _matches(words, index)
    if not any(len(place_M) for place_M, _ in found):
        return result
    place_M = np.concatenate([place for place, _ in found])
    hash_M = np.concatenate([which for _, which in found])
    size_M = np.repeat(np.array(index.sizes, dtype=np.int64), [len(place) for place, _ in found])
    document_M = np.searchsorted(words.first_D1, place_M, side="right") - 1
    edges = np.zeros(len(words.hash_W) + 1, dtype=np.int64)
    np.add.at(edges, place_M, 1)
    np.add.at(edges, place_M + size_M, -1)
    covered = np.r_[0, np.cumsum(np.cumsum(edges)[:-1] > 0)]
    in_document = covered[words.first_D1[1:]] - covered[words.first_D1[:-1]]
    result.document_share_D[:] = in_document / np.maximum(1, np.diff(words.first_D1))
    _fill_items(result, index, document_M, hash_M, size_M)
    return result


def _matches(words: Words, index: Index) -> list[tuple[Numbers, Numbers]]:
    """For each size where n-grams of the index stand within documents, and which they are.

    Shorter n-grams than the longest are looked for only where their first words are the first of one of them.
    """
    found = []
    began = None
    for size in index.sizes:
        if size == index.ngram:
            grams = ngrams(words.hash_W, size)
            place_M = _perhaps(grams, index)
            gram_M = grams[place_M]
        else:
            if began is None:
                starts = ngrams(words.hash_W, index.short)
                began = _perhaps(starts, index)
                began = began[np.isin(starts[began], index.began_S)]
            place_M = began[began + size <= len(words.hash_W)]
            window_M = words.hash_W[place_M[:, None] + np.arange(size)]
            gram_M = ngrams(window_M.ravel(), size)[::size]
        hash_M = np.minimum(np.searchsorted(index.hash_H, gram_M), len(index.hash_H) - 1)
        same = index.hash_H[hash_M] == gram_M
        place_M, hash_M = place_M[same], hash_M[same]
        document_M = np.searchsorted(words.first_D1, place_M, side="right") - 1
        inside = place_M + size <= words.first_D1[document_M + 1]
        found.append((place_M[inside], hash_M[inside]))
    return found


def _perhaps(grams: Hashes, index: Index) -> Numbers:
    """The places of the few hashes that can be in the index."""
    return np.flatnonzero(index.maybe[(grams >> index.shift).astype(np.int64)])


def _fill_items(result: Overlap, index: Index, document_M: Numbers, hash_M: Numbers, size_M: Numbers) -> None:
    entries_M = index.first_H1[hash_M + 1] - index.first_H1[hash_M]
    entry_X = np.repeat(index.first_H1[hash_M], entries_M) + _counting(entries_M)
    document_X, size_X = np.repeat(document_M, entries_M), np.repeat(size_M, entries_M)
    words = len(index.passage_C)
    cells = np.repeat(document_X * words + index.place_E[entry_X], size_X) + _counting(size_X)
    cells = np.unique(cells)
    passages = len(index.covered_P)
    pairs, counts = np.unique(cells // words * passages + index.passage_C[cells % words], return_counts=True)
    document, passage = pairs // passages, pairs % passages
    share = (counts / index.covered_P[passage]).astype(np.float32)
    order = np.lexsort(
        (-index.item_P[passage], share)
    )  # the largest share last; of equal ones the first item
    result.item_D[document[order]] = index.item_P[passage[order]]
    result.item_share_D[document[order]] = share[order]


@dataclass(frozen=True)
class OverlapAnnotator:
    """Writes which evaluation item a document holds most of, how much of it, and how much of the document that is."""

    config: DecontaminationConfig
    name: str = "overlap"
    version: int = 1
    schema: pa.Schema = SCHEMA

    def facts(self) -> dict[str, Any]:
        """The evaluation sets' digests, the n-grams' length and the splitter."""
        return {
            "sets": [set_facts(one) for one in self.config.sets],
            "ngram": self.config.ngram,
            "short": self.config.short,
            "splitter": SPLITTER,
        }

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The overlap of a chunk's documents."""
        found = overlap(plain_words(chunk.texts, chunk.words), index_of(self.config))
        return pa.RecordBatch.from_arrays([pa.array(column) for column in found], schema=self.schema)


@lru_cache(maxsize=1)
def index_of(config: DecontaminationConfig) -> Index:
    """The index of a recipe's sets: built once in each process."""
    return build_index(items_of(config), config.ngram, config.short)


def items_of(config: DecontaminationConfig) -> list[EvaluationItem]:
    """All items of a recipe's sets."""
    return [item for one in config.sets for item in read_items(one)]


def overlap_rules(config: DecontaminationConfig) -> list[Rule]:
    """Documents with enough of an item, and those that are evaluation text for the most part."""
    if not config.sets:
        return []
    return [
        Rule("overlap", "holds an evaluation item", partial(_reaches, "item_share", config.item_share)),
        Rule(
            "overlap", "part of evaluation text", partial(_reaches, "document_share", config.document_share)
        ),
    ]


def _reaches(column: str, limit: float, attributes: Attributes) -> Mask:
    found: Mask = attributes["overlap"].numbers(column) >= np.float32(limit)
    return found
