"""Words as numbers: splits a chunk of documents and hashes every word, by the compiled part or in numpy.

The splitter is part of the definition of every rule and sketch built on it, so its name is in their digests:
text is lower-cased; a word is a run of ASCII letters, digits, `_` and non-ASCII characters; each character of
a script that writes no spaces (Chinese, Japanese, Korean, Thai, Lao) and of planes above U+FFFF is a word.

Letters: N bytes of the chunk, W words, D documents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lapis.data.native import address, native

SPLITTER = "words-1"

_WORD_BYTE = np.zeros(256, dtype=bool)
_WORD_BYTE[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), ord("_"), *range(0x80, 256)]] = (
    True
)

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_MIX = np.uint64(0xD6E8FEB86659FD93)
_STEP = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True)
class Words:
    """The words of some documents: hashes, byte places in the chunk, where each document's words begin."""

    hash_W: NDArray[np.uint64]
    start_W: NDArray[np.int64]
    end_W: NDArray[np.int64]
    first_D1: NDArray[np.int64]  # D + 1 numbers: document d has the words first[d] to first[d + 1]


def split_words(texts: Sequence[str]) -> Words:
    """Words of some documents. Works best on a few hundred KB at once, which stay in the CPU's cache."""
    encoded = [text.lower().encode() for text in texts]
    chunk_N = np.frombuffer(b"\n".join([*encoded, b""]), dtype=np.uint8)
    begin_D1 = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(part) + 1 for part in encoded], out=begin_D1[1:])
    library = native()
    hash_W, start_W, end_W = numpy_words(chunk_N) if library is None else compiled_words(library, chunk_N)
    return Words(hash_W, start_W, end_W, np.searchsorted(start_W, begin_D1).astype(np.int64))


Spans = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]  # hashes, starts, ends


def compiled_words(library: ctypes.CDLL, chunk_N: NDArray[np.uint8]) -> Spans:
    """The words of some lower-cased text that ends with a byte outside of words."""
    hash_N = np.empty(len(chunk_N), dtype=np.uint64)
    start_N, end_N = np.empty((2, len(chunk_N)), dtype=np.int64)
    library.lapis_words.restype = ctypes.c_int64
    places = (address(array) for array in (hash_N, start_N, end_N))
    count = library.lapis_words(address(chunk_N), ctypes.c_int64(len(chunk_N)), *places)
    return hash_N[:count].copy(), start_N[:count].copy(), end_N[:count].copy()


def numpy_words(chunk_N: NDArray[np.uint8]) -> Spans:
    """The same by numpy."""
    start_W, end_W = _spans(chunk_N)
    return _hash_spans(chunk_N, start_W, end_W), start_W, end_W


def ngrams(hash_W: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash of the n words from each position on; W - n + 1 numbers, none if there are fewer words."""
    count = len(hash_W) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    result = hash_W[:count].copy()
    for offset in range(1, n):
        result *= _STEP
        result += hash_W[offset : offset + count]
    return mixed(result)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each number's information over all its bits, in place."""
    values ^= values >> np.uint64(32)
    values *= _MIX
    values ^= values >> np.uint64(29)
    return values


def _spans(chunk_N: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    word_N = _WORD_BYTE[chunk_N]
    begins_N = word_N.copy()
    begins_N[1:] &= ~word_N[:-1]
    if chunk_N.size and chunk_N.max() >= 0xE0:
        begins_N |= _single_characters(chunk_N) & word_N
    ends_N = word_N.copy()
    ends_N[:-1] &= ~word_N[1:] | begins_N[1:]
    return np.flatnonzero(begins_N), np.flatnonzero(ends_N) + 1


def _single_characters(chunk_N: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True at the first byte of each character that is a word of its own, and right after it."""
    three_N = (chunk_N >= 0xE3) & (chunk_N <= 0xED)
    thai_N = chunk_N[:-1] == 0xE0
    thai_N &= (chunk_N[1:] >= 0xB8) & (chunk_N[1:] <= 0xBB)
    three_N[:-1] |= thai_N
    four_N = chunk_N >= 0xF0
    marks_N = three_N | four_N
    marks_N[3:] |= three_N[:-3]
    marks_N[4:] |= four_N[:-4]
    return marks_N


def _hash_spans(
    chunk_N: NDArray[np.uint8], start_W: NDArray[np.int64], end_W: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Polynomial hash of each word from prefix sums: (P[end] - P[start]) / base**start, modulo 2**64."""
    power_N, inverse_N = _powers(1 << (len(chunk_N) + 1).bit_length())
    prefix_N = np.zeros(len(chunk_N) + 1, dtype=np.uint64)
    np.cumsum(chunk_N * power_N[: len(chunk_N)], out=prefix_N[1:])
    return mixed((prefix_N[end_W] - prefix_N[start_W]) * inverse_N[start_W])


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    def table(base: int) -> NDArray[np.uint64]:
        values = np.full(count, base, dtype=np.uint64)
        values[0] = 1
        return np.multiply.accumulate(values)

    return table(_BASE), table(pow(_BASE, -1, 1 << 64))
