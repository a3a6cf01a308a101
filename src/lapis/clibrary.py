"""Shared libraries that the build puts beside the Python files: found, and refused if other sources made them."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from pathlib import Path

from lapis.errors import UnavailableError

REBUILD = "pip install --force-reinstall --no-deps lapis (in a checkout: python setup.py build_ext --inplace)"


def source_digest(folder: Path, names: Sequence[str]) -> str:
    """Digest of C sources, in the order in which setup.py takes it: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def open_library(path: Path, what: str, function: str, digest: str) -> ctypes.CDLL:
    """The library at `path`; its `function` gives the digest of the sources that made it.

    Raises UnavailableError that says of `what` why it cannot be used.
    """
    if not path.exists():
        raise UnavailableError(f"{what} are not built", hint=REBUILD)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{what} do not load: {error}", hint=REBUILD) from error
    source = getattr(found, function)
    source.restype = ctypes.c_char_p
    if source().decode() != digest:
        raise UnavailableError(f"{what} were built from other sources", hint=REBUILD)
    return found
