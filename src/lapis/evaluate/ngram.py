"""The honest yardstick beside a language model: interpolated modified Kneser-Ney 5-grams of the same tokens.

Method: Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1999, section 3.2.
The vocabulary is closed and every context gives a proper distribution over it.

Documents do not leak into each other: a stream is `end d1 … dn end d1 …`, and a context begins at the
latest with the `end` before its document. So d1 is predicted from (end), d2 from (end, d1), and the closing
`end` from the last tokens of its document. As in KenLM and SRILM, grams that begin with `end` keep plain
counts in the lower orders, since nothing can stand before them; all others there count distinct left
neighbours.

No dictionary of grams: a k-gram is the pair (rank of its first k-1 tokens among the (k-1)-grams, last token),
which packs into one integer for any order and vocabulary: counting is sorting, looking up is binary search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis.log import Progress, silent

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

ORDER = 5
TYPICAL_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)  # where the data has too few grams to estimate them


@dataclass(frozen=True)
class _Level:
    """The k-grams of one order, sorted by (rank of context, word)."""

    keys: Integers  # per gram: rank of its context * vocabulary + word
    kept: Floats  # per gram: adjusted count minus discount
    total: Floats  # per context: sum of adjusted counts; 1 where it is zero
    backoff: Floats  # per context: the share handed to the next shorter context


class _Grams(NamedTuple):
    """The distinct k-grams of some positions."""

    keys: Integers  # sorted
    counts: Integers  # occurrences of each
    example: Integers  # a position at which each ends
    rank: Integers  # per token of the stream: which gram ends there, -1 if none


class KneserNey:
    """A smoothed n-gram model; made by `train`, asked by `score`."""

    def __init__(self, vocab_size: int, end_id: int, unigram: Floats, levels: list[_Level]) -> None:
        self.vocab_size = vocab_size
        self.end_id = end_id
        self._unigram = unigram  # probability of each word without any context
        self._levels = levels  # of orders 2, 3, …

    @staticmethod
    def train(
        tokens: NDArray[np.integer],
        vocab_size: int,
        end_id: int,
        order: int = ORDER,
        progress: Progress = silent,
    ) -> KneserNey:
        """Count a stream of token ids, or the rows of a matrix (training windows; no gram crosses rows)."""
        assert order >= 2
        stream, reach = _stream(tokens, end_id)
        # grams[0] stands for order 1: every word has itself as its rank
        words = np.arange(vocab_size)
        grams = [_Grams(words, np.zeros_like(words), words, stream)]
        for k in range(2, order + 1):
            progress(k - 2, order, f"counting {k}-grams of {len(stream):,} tokens")
            grams.append(_count(stream, reach, grams[-1].rank, k, vocab_size))
        levels = []
        for k in range(order, 0, -1):
            longer = grams[k] if k < order else None
            counts = _adjusted(grams[k - 1], longer, stream, k, end_id)
            contexts = len(grams[k - 2].keys) if k > 1 else 1
            levels.append(_level(grams[k - 1].keys, counts, contexts, vocab_size))
        *longer_levels, first = levels
        unigram = first.kept / first.total[0] + first.backoff[0] / vocab_size
        return KneserNey(vocab_size, end_id, unigram, longer_levels[::-1])

    def score(self, tokens: NDArray[np.integer]) -> Floats:
        """Natural log probability of each token of a stream after the first."""
        stream, reach = _stream(tokens, self.end_id)
        probability = self._unigram[stream]
        rank = stream
        for k, level in enumerate(self._levels, start=2):
            at = np.flatnonzero(reach >= k - 1)
            at = at[rank[at - 1] >= 0]  # an unknown context changes nothing
            context = rank[at - 1]
            key = context * self.vocab_size + stream[at]
            place = np.searchsorted(level.keys, key)
            place[place == len(level.keys)] = 0
            known = level.keys[place] == key if len(level.keys) else np.zeros(len(key), dtype=bool)
            own = np.zeros(len(key))
            own[known] = level.kept[place[known]]
            probability[at] = own / level.total[context] + level.backoff[context] * probability[at]
            rank = np.full(len(stream), -1)
            rank[at[known]] = place[known]
        return np.log(probability[1:])


def _stream(tokens: NDArray[np.integer], end_id: int) -> tuple[Integers, Integers]:
    """The tokens in one row, and how many tokens of context each one has (0: it begins a row)."""
    stream = tokens.reshape(-1).astype(np.int64)
    index = np.arange(len(stream))
    begins = index % tokens.shape[-1] == 0 if len(stream) else np.zeros(0, dtype=bool)
    anchor = np.maximum.accumulate(np.where((stream == end_id) | begins, index, 0))
    reach = index - np.concatenate([[0], anchor[:-1]]) if len(stream) else index
    return stream, np.where(begins, 0, reach)


def _count(stream: Integers, reach: Integers, shorter: Integers, k: int, vocab_size: int) -> _Grams:
    at = np.flatnonzero(reach >= k - 1)
    key = shorter[at - 1] * vocab_size + stream[at]
    order = np.argsort(key)
    key, at = key[order], at[order]
    new = np.concatenate([[True], key[1:] != key[:-1]]) if len(key) else np.zeros(0, dtype=bool)
    first = np.flatnonzero(new)
    rank = np.full(len(stream), -1)
    rank[at] = np.cumsum(new) - 1
    return _Grams(key[first], np.diff(first, append=len(key)), at[first], rank)


def _adjusted(grams: _Grams, longer: _Grams | None, stream: Integers, k: int, end_id: int) -> Integers:
    """Plain counts in the highest order and for grams that begin with `end`, else left neighbours."""
    if longer is None:
        return grams.counts
    neighbours = np.bincount(grams.rank[longer.example], minlength=len(grams.keys))
    if k == 1:
        return neighbours
    return np.where(stream[grams.example - k + 1] == end_id, grams.counts, neighbours)


def _level(keys: Integers, counts: Integers, contexts: int, vocab_size: int) -> _Level:
    discounts = np.array(_discounts(counts))
    context = keys // vocab_size
    bucket = np.minimum(counts, 3)
    counted = np.bincount(context, weights=counts, minlength=contexts).astype(np.float64)
    freed = np.bincount(context, weights=discounts[bucket], minlength=contexts)
    total: Floats = np.where(counted > 0, counted, 1.0)
    backoff: Floats = np.where(counted > 0, freed / total, 1.0)
    return _Level(keys, counts - discounts[bucket], total, backoff)


def _discounts(counts: Integers) -> tuple[float, ...]:
    """What is taken off counts of 0, 1, 2, and 3 or more (Chen & Goodman, equation 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == value)) for value in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return TYPICAL_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    in_range = all(0 < discount <= value for value, discount in enumerate(found) if value)
    return found if in_range else TYPICAL_DISCOUNTS
