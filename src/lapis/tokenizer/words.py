"""Encoding by remembered words, compiled: the ids of Hugging Face `tokenizers`, an order of magnitude faster."""

from __future__ import annotations

import ctypes
import json
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HFTokenizer

from lapis.tokenizer.alphabet import BYTE_CHARS, from_byte_level
from lapis.tokenizer.compiled import functions, lay_out, utf8
from lapis.tokenizer.split import Splitter, compiled_split

Ids = NDArray[np.uint32]
Ends = NDArray[np.int64]


class WordEncoder:
    """The ids of texts, special-token text taken as text. Several threads may use it; they take turns."""

    def __init__(self, inner: HFTokenizer, facts: Mapping[str, Any], splitter: Splitter) -> None:
        self._inner = inner
        self._composes = facts["normalizer"] is not None
        self._added = [token["content"] for token in facts["added_tokens"] if not token["special"]]
        self._lock = threading.Lock()
        self._handle = _new(facts["model"], splitter)
        weakref.finalize(self, functions().lapis_bpe_free, self._handle)

    @staticmethod
    def of(inner: HFTokenizer) -> WordEncoder | None:
        """The encoder of a tokenizer; None where it does anything that is not known to be compiled equally."""
        facts = json.loads(inner.to_str())
        model, normalizer = facts["model"], facts["normalizer"]
        byte_level = (
            model["type"] == "BPE"
            and model["dropout"] is None
            and not model["continuing_subword_prefix"]
            and not model["end_of_word_suffix"]
            and all(char in model["vocab"] for char in BYTE_CHARS)
        )
        if not byte_level or normalizer not in (None, {"type": "NFC"}):
            return None
        splitter = compiled_split(facts["pre_tokenizer"])
        return None if splitter is None else WordEncoder(inner, facts, splitter)

    def encode(self, texts: Sequence[str], prefix: int | None = None) -> tuple[Ids, Ends]:
        """Ids of all texts, with `prefix` before each, and where each text's ids end. Raises InputError."""
        parts = [
            judged(self._inner, part, prefix) if added else self._compiled(part, prefix)
            for added, part in self._parts(texts)
        ]
        if len(parts) == 1:
            return parts[0]
        firsts = np.cumsum([0, *(len(ids) for ids, _ in parts)])
        ends = [ends + first for (_, ends), first in zip(parts, firsts.tolist(), strict=False)]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate(ends)

    def _parts(self, texts: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
        """Runs of texts, and whether `tokenizers` has to encode them: an added token cuts through words."""
        if not self._added:
            yield False, list(texts)
            return
        for judged, run in groupby(texts, self._has_added):
            yield judged, list(run)

    def _has_added(self, text: str) -> bool:
        found = any(token in text for token in self._added)
        return found or (self._composes and any(token in self._composed(text) for token in self._added))

    def _composed(self, text: str) -> str:
        return text if text.isascii() else str(self._inner.normalizer.normalize_str(text))

    def _compiled(self, texts: Sequence[str], prefix: int | None) -> tuple[Ids, Ends]:
        encoded: Iterator[bytes] = map(utf8, texts)
        if self._composes:
            encoded = (utf8(self._composed(bytes_.decode())) for bytes_ in encoded)
        data, ends = lay_out(list(encoded))
        out = np.empty(len(data) + len(texts), dtype=np.uint32)
        out_ends = np.empty(len(texts), dtype=np.int64)
        with self._lock:
            count = functions().lapis_bpe_encode(
                self._handle,
                data,
                ends.ctypes.data,
                len(texts),
                -1 if prefix is None else prefix,
                out.ctypes.data,
                out_ends.ctypes.data,
            )
        if count < 0:
            raise MemoryError
        return out[:count], out_ends


def judged(inner: HFTokenizer, texts: Sequence[str], prefix: int | None) -> tuple[Ids, Ends]:
    """What WordEncoder gives, by `tokenizers` itself. Raises InputError."""
    for text in texts:
        utf8(text)
    before = [] if prefix is None else [prefix]
    found = [
        np.array(before + encoding.ids, dtype=np.uint32)
        for encoding in inner.encode_batch_fast(list(texts), add_special_tokens=False)
    ]
    ends = np.cumsum([len(ids) for ids in found], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype=np.uint32), *found]), ends


def _new(model: Mapping[str, Any], splitter: Splitter) -> ctypes.c_void_p:
    vocabulary: dict[str, int] = model["vocab"]
    merges = np.array(
        [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in model["merges"]],
        dtype=np.uint32,
    )
    byte_ids = np.array([vocabulary[char] for char in BYTE_CHARS], dtype=np.uint32)
    words = _whole_words(vocabulary) if model["ignore_merges"] else {}
    data, ends = lay_out(list(words))
    ids = np.fromiter(words.values(), dtype=np.uint32, count=len(words))
    handle = functions().lapis_bpe_new(
        ctypes.byref(splitter.as_c()),
        byte_ids.ctypes.data,
        merges.ctypes.data,
        len(merges),
        data,
        ends.ctypes.data,
        ids.ctypes.data,
        len(words),
    )
    if not handle:
        raise MemoryError
    return ctypes.c_void_p(handle)


def _whole_words(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """The entries that words can be: those spelt in stand-ins of bytes."""
    known = frozenset(BYTE_CHARS)
    return {
        from_byte_level(piece): id for piece, id in vocabulary.items() if piece and known.issuperset(piece)
    }
