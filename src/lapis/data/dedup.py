"""What documents are compared by to find duplicates: digests, shingles, and MinHash sketches of these.

A shingle is five words in a row (as 32 bits), a sketch is 112 hashes (Broder 1997): the part of them that two
sketches share estimates the Jaccard similarity of the two sets of shingles. `clusters.py` finds the clusters.

Letters: D documents, H = 112 hashes, G n-grams of a chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from lapis.data.native import address, native
from lapis.data.words import Words, ngrams, split_words

HASHES, NGRAM = 112, 5

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
    grams_G, first_D1 = _shingles(words, texts)
    found = _compiled_sketches(grams_G, first_D1)
    return _plain_sketches(grams_G, first_D1) if found is None else found


def _compiled_sketches(grams_G: NDArray[np.uint32], first_D1: NDArray[np.int64]) -> NDArray[np.uint32] | None:
    library = native()
    if library is None:
        return None
    result_DH = np.empty((len(first_D1) - 1, HASHES), dtype=np.uint32)
    numbers = [address(array) for array in (grams_G, first_D1, _FACTOR_H, _OFFSET_H, result_DH)]
    library.lapis_sketches(*numbers[:2], ctypes.c_int64(len(result_DH)), *numbers[2:])
    return result_DH


def _plain_sketches(grams_G: NDArray[np.uint32], first_D1: NDArray[np.int64]) -> NDArray[np.uint32]:
    result_DH = np.empty((len(first_D1) - 1, HASHES), dtype=np.uint32)
    buffer_G = np.empty_like(grams_G)
    for h in range(HASHES if len(result_DH) else 0):
        np.multiply(grams_G, _FACTOR_H[h], out=buffer_G)
        buffer_G += _OFFSET_H[h]
        result_DH[:, h] = np.minimum.reduceat(buffer_G, first_D1[:-1])
    return result_DH


def shingle_sets(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    """The different shingles of each text, sorted: what the sketches estimate the similarity of."""
    grams_G, first_D1 = _shingles(split_words(texts), texts)
    return [np.unique(part) for part in np.split(grams_G, first_D1[1:-1])] if texts else []


def exact_duplicates(digests_D16: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each digest the first document that has the same one: itself, or an earlier one."""
    high_D, low_D = np.ascontiguousarray(digests_D16).view("<u8").T
    order_D = np.lexsort((low_D, high_D))  # stable: the first comes first
    high_D, low_D = high_D[order_D], low_D[order_D]
    new_D = np.ones(len(order_D), dtype=bool)
    new_D[1:] = (high_D[1:] != high_D[:-1]) | (low_D[1:] != low_D[:-1])
    stands_for_D = np.empty(len(order_D), dtype=np.int64)
    stands_for_D[order_D] = order_D[new_D][np.cumsum(new_D) - 1]
    return stands_for_D


def _shingles(words: Words, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The shingles of all documents, and where those of each begin and the last ones end."""
    words_D = np.diff(words.first_D1)
    first_D1 = np.zeros(len(words_D) + 1, dtype=np.int64)
    np.cumsum(np.maximum(words_D - (NGRAM - 1), 1), out=first_D1[1:])
    grams_G = _compiled_grams(words, first_D1)
    if grams_G is None:
        grams_G = _plain_grams(words, first_D1)
    for d in np.flatnonzero(words_D < NGRAM).tolist():
        own = words.hash_W[words.first_D1[d] : words.first_D1[d + 1]]
        whole = own.tobytes() or texts[d].encode()
        grams_G[first_D1[d]] = xxhash.xxh3_64_intdigest(whole) >> 32
    return grams_G, first_D1


def _compiled_grams(words: Words, first_D1: NDArray[np.int64]) -> NDArray[np.uint32] | None:
    library = native()
    if library is None:
        return None
    grams_G = np.zeros(first_D1[-1], dtype=np.uint32)
    numbers = [address(array) for array in (words.hash_W, words.first_D1, first_D1)]
    library.lapis_shingles(*numbers, ctypes.c_int64(len(first_D1) - 1), address(grams_G))
    return grams_G


def _plain_grams(words: Words, first_D1: NDArray[np.int64]) -> NDArray[np.uint32]:
    padded = np.concatenate([words.hash_W, np.zeros(NGRAM, dtype=np.uint64)])
    place_G = np.arange(first_D1[-1]) + np.repeat(words.first_D1[:-1] - first_D1[:-1], np.diff(first_D1))
    grams_G: NDArray[np.uint32] = (ngrams(padded, NGRAM)[place_G] >> np.uint64(32)).astype(np.uint32)
    return grams_G
