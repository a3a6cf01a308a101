"""The compiled part of the data path, if it was built: one library, plain C, the same results on every machine."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lapis.clibrary import open_library, source_digest
from lapis.errors import UnavailableError

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "text-portable.so"
UNITS = ("statistics.c", "ngrams.c", "parts.c", "language.c", "words.c", "sketch.c")
SOURCES = (*UNITS, "text.h", "statistics.h")  # as in setup.py: all text that goes into the library


@functools.cache
def native() -> ctypes.CDLL | None:
    """The library, or None where it cannot be used (`opened` says why) or LAPIS_NO_KERNELS is set.

    Without it the slow forms of the same functions do the work, with the same results.
    """
    if os.environ.get("LAPIS_NO_KERNELS"):
        return None
    try:
        return opened()
    except UnavailableError:
        return None


def opened() -> ctypes.CDLL:
    """The library. Raises UnavailableError."""
    digest = source_digest(FOLDER, SOURCES)
    return open_library(LIBRARY, "the data path's compiled functions", "lapis_data_source", digest)


def address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    """Where an array's numbers lie; the array must stay alive while C uses them."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
