"""Trees of source code: which files nobody wrote there, and under which licence the others are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

VENDORED = frozenset(
    {
        "vendor",
        "vendored",
        "third_party",
        "third-party",
        "thirdparty",
        "bower_components",
        "site-packages",
        "Godeps",
    }
)
GENERATED = re.compile(
    r"(package-lock\.json|npm-shrinkwrap\.json|yarn\.lock|pnpm-lock\.yaml|bun\.lock|Cargo\.lock|poetry\.lock|uv\.lock"
    r"|Pipfile\.lock|pdm\.lock|composer\.lock|Gemfile\.lock|go\.sum|flake\.lock|.*_pb2(_grpc)?\.pyi?|.*\.pb\.(go|cc|h)"
    r"|.*\.g\.dart|.*\.designer\.cs|.*\.generated\.\w+)",
    re.IGNORECASE,
)
MINIFIED = re.compile(r".*[.-]min\.(js|mjs|css)|.*\.(js|mjs|css)\.map|.*\.bundle\.js", re.IGNORECASE)
PACKED_ENDINGS = frozenset({".js", ".mjs", ".cjs", ".css", ".html", ".svg", ".json"})
PACKED_LINE = 1000  # mean length of lines in code that a program has packed
LICENCE_FILE = re.compile(r"(UN)?LICEN[CS]E.*|COPYING.*", re.IGNORECASE)
SPDX = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]+)")
LICENCE_BYTES = 1 << 16

# A licence by sentences that only its text has, all of them; the first that fits counts, so narrower ones come first.
_TEXTS = (
    ("Apache-2.0", ("apache license", "version 2.0, january 2004")),
    ("MPL-2.0", ("mozilla public license version 2.0",)),
    ("AGPL-3.0-only", ("gnu affero general public license", "version 3, 19 november 2007")),
    ("LGPL-3.0-only", ("gnu lesser general public license", "version 3, 29 june 2007")),
    ("LGPL-2.1-only", ("gnu lesser general public license", "version 2.1, february 1999")),
    ("GPL-3.0-only", ("gnu general public license", "version 3, 29 june 2007")),
    ("GPL-2.0-only", ("gnu general public license", "version 2, june 1991")),
    ("BSL-1.0", ("boost software license - version 1.0",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose",)),
    ("MIT", ("permission is hereby granted, free of charge", 'the software is provided "as is"')),
    ("Zlib", ("altered source versions must be plainly marked as such",)),
)


def left_out(name: str, begin: bytes) -> str:
    """Why a file of a source tree is not read: vendored, generated or minified; empty if it is."""
    path = PurePosixPath(name)
    if VENDORED.intersection(path.parts[:-1]):
        return "vendored"
    if GENERATED.fullmatch(path.name):
        return "generated"
    packed = path.suffix.lower() in PACKED_ENDINGS and len(begin) > PACKED_LINE * (begin.count(b"\n") + 1)
    return "minified" if packed or MINIFIED.fullmatch(path.name) else ""


def is_licence_file(name: str) -> bool:
    """Whether a file holds the licence of its folder."""
    return bool(LICENCE_FILE.fullmatch(PurePosixPath(name).name))


def licence_of_text(text: str) -> str:
    """The SPDX identifier of a licence's text, empty if it is none of the common ones."""
    plain = " ".join(text.lower().split())
    return next((name for name, marks in _TEXTS if all(mark in plain for mark in marks)), "")


def licence_of_file(name: str, begin: bytes, folders: Mapping[str, set[str]]) -> str:
    """The licence of a file: its own SPDX line, else that of the nearest folder above with a licence file.

    Several licence files in one folder all apply, as far as anybody can tell; an unknown one makes it unclear.
    """
    if found := SPDX.search(begin):
        return found[1].decode("ascii").strip().removesuffix("--").strip()
    for folder in PurePosixPath(name).parents:
        if licences := folders.get(str(folder)):
            return "" if "" in licences else " AND ".join(sorted(licences))
    return ""
