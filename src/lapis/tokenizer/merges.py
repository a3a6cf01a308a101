"""Training, compiled: the vocabulary and merges of Hugging Face `tokenizers`, several times faster."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from lapis.tokenizer.alphabet import BYTE_CHARS
from lapis.tokenizer.compiled import functions, lay_out, utf8
from lapis.tokenizer.split import Splitter

BATCH = 1 << 20  # characters that are laid out at a time


def learn(texts: Iterable[str], splitter: Splitter, vocab_size: int, specials: Sequence[str]) -> models.BPE:
    """The model that `tokenizers` learns from these texts, in any order. Raises InputError."""
    words = functions().lapis_words_new()
    if not words:
        raise MemoryError
    try:
        split = ctypes.byref(splitter.as_c())
        for batch in batches(texts):
            data, ends = lay_out(batch)
            if not functions().lapis_words_add(words, split, data, ends.ctypes.data, len(batch)):
                raise MemoryError
        return _model(_merges(words, vocab_size, specials), specials)
    finally:
        functions().lapis_words_free(words)


def batches(texts: Iterable[str]) -> Iterator[list[bytes]]:
    """UTF-8 texts in groups of about BATCH characters."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(utf8(text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_entries(specials: Sequence[str]) -> list[str]:
    """Entries before the first merge, by id: special tokens, then bytes in the order of their stand-ins."""
    return [*specials, *sorted(BYTE_CHARS)]


def _merges(words: int, vocab_size: int, specials: Sequence[str]) -> NDArray[np.uint32]:
    byte_ids = {char: len(specials) + n for n, char in enumerate(sorted(BYTE_CHARS))}
    ids = np.array([byte_ids[char] for char in BYTE_CHARS], dtype=np.uint32)
    alphabet = [bytes([BYTE_CHARS.index(char)]) for char in sorted(BYTE_CHARS)]
    data, ends = lay_out([*(name.encode() for name in specials), *alphabet])
    room = 2 * vocab_size  # a merge that makes an entry there is already takes no new one
    merges = np.empty((room, 3), dtype=np.uint32)
    count = functions().lapis_words_train(
        words,
        data,
        ends.ctypes.data,
        len(specials) + len(alphabet),
        ids.ctypes.data,
        vocab_size,
        merges.ctypes.data,
        room,
    )
    if count < 0:
        raise MemoryError
    return merges[:count]


def _model(merges: NDArray[np.uint32], specials: Sequence[str]) -> models.BPE:
    entries = _first_entries(specials)
    pairs = []
    for left, right, made in merges.tolist():
        pairs.append((entries[left], entries[right]))
        if made == len(entries):
            entries.append(entries[left] + entries[right])
    return models.BPE({entry: id for id, entry in enumerate(entries)}, pairs)
