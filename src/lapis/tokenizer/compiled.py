"""The C functions of the tokenizer, with their types. Every call releases the GIL."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapis import clibrary
from lapis.clibrary import open_library
from lapis.errors import InputError, UnavailableError

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "bpe-portable.so"
SOURCES = (
    "bpe_split.c",
    "bpe_merge.c",
    "bpe_encode.c",
    "bpe_train.c",
    "bpe.h",
    "bpe_merge.h",
)  # as in setup.py
PADDING = 16  # readable bytes behind every text, as in bpe.h


class CSplitter(Structure):
    """`splitter` of bpe.h."""

    _fields_ = (
        ("classes", c_void_p),
        ("family", c_int32),
        ("number", c_int32),
        ("digits", c_int32),
    )


_P, _I = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "bpe_split": (_I, [POINTER(CSplitter), _P, _I, _P]),
    "bpe_new": (_P, [POINTER(CSplitter), _P, _P, _I, _P, _P, _P, _I]),
    "bpe_encode": (_I, [_P, _P, _P, _I, _I, _P, _P]),
    "bpe_free": (None, [_P]),
    "words_new": (_P, []),
    "words_add": (c_int32, [_P, POINTER(CSplitter), _P, _P, _I]),
    "words_train": (_I, [_P, _P, _P, _I, _P, _I, _P, _I]),
    "words_free": (None, [_P]),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be used; `opened` says why."""
    try:
        return opened()
    except UnavailableError:
        return None


def opened() -> ctypes.CDLL:
    """The compiled functions. Raises UnavailableError."""
    if sys.byteorder != "little":
        raise UnavailableError("the tokenizer's compiled functions are for little-endian machines")
    found = open_library(LIBRARY, "the tokenizer's compiled functions", "lapis_bpe_source", source_digest())
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, f"lapis_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def functions() -> ctypes.CDLL:
    """The compiled functions, where `library` has said that they are there."""
    found = library()
    assert found is not None
    return found


@cache
def source_digest() -> str:
    """Digest of the C sources, compiled into the library so that a stale build is noticed."""
    return clibrary.source_digest(FOLDER, SOURCES)


def lay_out(texts: Sequence[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """Texts one after the other with padding behind, and where each ends."""
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)), dtype=np.int64)
    return b"".join([*texts, bytes(PADDING)]), ends


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises InputError for half of a surrogate pair, which has no UTF-8 form."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError("The text holds half of a surrogate pair, which is no Unicode character.") from error
