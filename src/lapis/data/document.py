"""The record that flows through the data path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

Kind = Literal["prose", "code"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_ENDINGS = """
.bash .c .cc .cfg .clj .cmake .cpp .cs .css .csv .cu .cuh .cxx .dart .el .erl .ex .exs .f .f90 .go .gradle .h
.hpp .hrl .hs .ini .java .jl .js .json .jsx .kt .lock .lua .m .ml .mm .php .pl .pm .proto .ps1 .py .pyi .pyx
.r .rb .rs .scala .sh .sql .swift .tcl .toml .ts .tsv .tsx .vb .vim .xml .yaml .yml .zig .zsh
"""
CODE_ENDINGS = frozenset(_ENDINGS.split())


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from. `id` is the digest of the text: empty until it is repaired."""

    text: str
    source: str
    path: str  # inside the source; `#n` names a row of a table or a piece of a long file
    licence: str = ""
    kind: Kind = "prose"
    id: str = ""

    @property
    def label(self) -> str:
        """How reports name it."""
        return f"{self.source}: {self.path}"


def kind_of(path: str) -> Kind:
    """Whether a file holds code or prose, by its ending."""
    return "code" if PurePosixPath(path).suffix.lower() in CODE_ENDINGS else "prose"
