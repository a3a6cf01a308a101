"""The compiled part of the data path, if it was built: one library, plain C, the same results on every machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "text-portable.so"
UNITS = ("statistics.c", "ngrams.c", "parts.c", "language.c", "words.c", "sketch.c")
SOURCES = (*UNITS, "text.h", "statistics.h")  # as in setup.py: all text that goes into the library

REBUILD = "pip install --force-reinstall --no-deps lapis (in a checkout: python setup.py build_ext --inplace)"


@functools.cache
def native() -> ctypes.CDLL | None:
    """The library, or None where it was not built from these sources or LAPIS_NO_KERNELS is set.

    Without it the slow forms of the same functions do the work, with the same results.
    """
    if os.environ.get("LAPIS_NO_KERNELS") or not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    digest = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    library.lapis_data_source.restype = ctypes.c_char_p
    return library if library.lapis_data_source() == digest.encode() else None


def address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    """Where an array's numbers lie; the array must stay alive while C uses them."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
