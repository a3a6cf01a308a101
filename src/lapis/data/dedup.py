"""Duplicates: which documents are copies, or near-copies, of one that stays.

Near-duplicates: MinHash (Broder 1997) over word 5-grams, 112 hashes in 14 bands of 8 for candidates; every
candidate pair is verified on the sketches before it joins a cluster, since unverified bands chain unrelated
texts together. What survives is a pure function of the documents' content, whatever order they come in.

Letters: D documents, H = 112 hashes, G n-grams of a chunk, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from lapis.data.words import Words, mixed, ngrams

HASHES, BANDS, NGRAM = 112, 14, 5
ROWS = HASHES // BANDS
ALL_PAIRS = 64  # up to this many documents in a bucket every pair is compared; beyond, with the first ones
FIRST = 8

_GENERATOR = np.random.Generator(np.random.PCG64(20_250_601))
_FACTOR_H = _GENERATOR.integers(0, 1 << 31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_OFFSET_H = _GENERATOR.integers(0, 1 << 32, HASHES, dtype=np.uint32)


def content_digest(text: str) -> bytes:
    """The 16 bytes that name a text: xxh3-128 of its UTF-8."""
    return xxhash.xxh3_128_digest(text.encode())


def normal_digest(text: str) -> bytes:
    """The 16 bytes that two texts share when they differ in white space only."""
    return xxhash.xxh3_128_digest(" ".join(text.split()).encode())


def sketches(words: Words, texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash sketches (D, H) of some documents, given with their words.

    A text of fewer than five words is one shingle, so that short texts do not all look alike.
    """
    grams_G, first_D = _shingles(words, texts)
    result_DH = np.empty((len(texts), HASHES), dtype=np.uint32)
    buffer_G = np.empty_like(grams_G)
    for h in range(HASHES):
        np.multiply(grams_G, _FACTOR_H[h], out=buffer_G)
        buffer_G += _OFFSET_H[h]
        result_DH[:, h] = np.minimum.reduceat(buffer_G, first_D)
    return result_DH


def near_duplicates(sketches_DH: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """For each document the one that stands for its cluster: itself, or an earlier one.

    Documents come in the order of who survives: best first.
    """
    parent_D = np.arange(len(sketches_DH), dtype=np.int64)
    for band in range(BANDS):
        rows_DR = sketches_DH[:, band * ROWS : (band + 1) * ROWS]
        pairs_P2 = _candidates(_bucket_keys(rows_DR))
        pairs_P2 = pairs_P2[_verified(sketches_DH, pairs_P2, threshold)]
        for a, b in pairs_P2.tolist():
            _join(parent_D, a, b)
    return np.array([_root(parent_D, d) for d in range(len(parent_D))], dtype=np.int64)


def close_to(
    sketches_DH: NDArray[np.uint32], others_DH: NDArray[np.uint32], threshold: float
) -> NDArray[np.bool_]:
    """Which documents reach a similarity to any of the others: every pair is compared."""
    needed = _needed(threshold)
    hashes_HD = np.ascontiguousarray(sketches_DH.T)
    close_D = np.zeros(len(sketches_DH), dtype=bool)
    for other_H in others_DH:
        equal_D = np.zeros(len(sketches_DH), dtype=np.uint8)
        for h in range(HASHES):
            equal_D += hashes_HD[h] == other_H[h]
        close_D |= equal_D >= needed
    return close_D


def _bucket_keys(rows_DR: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One number for each row of small numbers: D bucket keys."""
    key_D = np.zeros(len(rows_DR), dtype=np.uint64)
    for r in range(rows_DR.shape[1]):
        key_D = mixed(key_D + rows_DR[:, r] + np.uint64(r + 1))
    return key_D


def _shingles(words: Words, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    words_D = np.diff(words.first_D1)
    grams_D = np.maximum(words_D - (NGRAM - 1), 1)
    first_D = np.cumsum(grams_D) - grams_D
    padded = np.concatenate([words.hash_W, np.zeros(NGRAM, dtype=np.uint64)])
    place_G = np.arange(grams_D.sum()) + np.repeat(words.first_D1[:-1] - first_D, grams_D)
    grams_G = (ngrams(padded, NGRAM)[place_G] >> np.uint64(32)).astype(np.uint32)
    for d in np.flatnonzero(words_D < NGRAM).tolist():
        own = words.hash_W[words.first_D1[d] : words.first_D1[d + 1]]
        whole = own.tobytes() or texts[d].encode()
        grams_G[first_D[d]] = xxhash.xxh3_64_intdigest(whole) >> 32
    return grams_G, first_D


def _candidates(key_D: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pairs (smaller, larger) of documents in one bucket: all of them in small buckets."""
    order_D = np.argsort(key_D, kind="stable")
    sorted_D = key_D[order_D]
    borders = np.flatnonzero(np.diff(sorted_D)) + 1
    starts, ends = np.r_[0, borders], np.r_[borders, len(key_D)]
    pairs: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        members = order_D[start:end]  # ascending, since the sort is stable
        heads = members if len(members) <= ALL_PAIRS else members[:FIRST]
        for n, head in enumerate(heads):
            rest = members[n + 1 :]
            pairs.append(np.stack([np.full(len(rest), head), rest], axis=1))
        if len(members) > ALL_PAIRS:
            pairs.append(np.stack([members[:-1], members[1:]], axis=1))
    return np.concatenate(pairs)


def _verified(
    sketches_DH: NDArray[np.uint32], pairs_P2: NDArray[np.int64], threshold: float, block: int = 65_536
) -> NDArray[np.bool_]:
    result = np.empty(len(pairs_P2), dtype=bool)
    for at in range(0, len(pairs_P2), block):
        a, b = pairs_P2[at : at + block].T
        result[at : at + block] = np.sum(sketches_DH[a] == sketches_DH[b], axis=1) >= _needed(threshold)
    return result


def _needed(threshold: float) -> int:
    return math.ceil(threshold * HASHES)


def _root(parent_D: NDArray[np.int64], d: int) -> int:
    while parent_D[d] != d:
        parent_D[d] = parent_D[parent_D[d]]
        d = int(parent_D[d])
    return d


def _join(parent_D: NDArray[np.int64], a: int, b: int) -> None:
    a, b = _root(parent_D, a), _root(parent_D, b)
    if a != b:
        parent_D[max(a, b)] = min(a, b)  # the better one stands for both
