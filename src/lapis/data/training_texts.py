"""The documents as they are trained on: what the recipe masks and cuts is applied when a text is read.

What was read stays as it is, so a recipe can change its mind without reading again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.columns import Columns
from lapis.data.document import Document
from lapis.data.documents import DocumentTable
from lapis.data.filters import MOSTLY_UNSPACED, QualityAnnotator
from lapis.data.masking import SCHEMA
from lapis.data.pii import Span, masked
from lapis.data.statistics_plain import cut_lines


@dataclass(frozen=True)
class TrainingTexts:
    """The documents as they are trained on: with placeholders for some kinds of personal data, and without
    the lines that are cut."""

    documents: Path
    spans: Path | None = None  # the folder of the pii stage, if something is masked
    kinds: tuple[str, ...] = ()
    quality: Path | None = None  # the folder of the quality stage, if lines are cut
    line_end: bool = False  # cut those too that end in no mark

    def document(self, row: int) -> Document:
        """One document; its id stays that of the text as it was read."""
        table, spans, quality = _tables(self.documents, self.spans, self.quality)
        document = table.document(row)
        text = document.text
        if spans is not None:
            text = masked(text, _spans(*spans.place(row)), frozenset(self.kinds))
        if quality is not None and document.kind == "prose" and _is_spaced(*quality.place(row)):
            text = cut_lines(text, self.line_end)
        return document if text is document.text else replace(document, text=text)

    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of every text as it was read."""
        return _tables(self.documents, self.spans, self.quality)[0].sizes()


@lru_cache(maxsize=2)
def _tables(
    documents: Path, spans: Path | None, quality: Path | None
) -> tuple[DocumentTable, Columns | None, Columns | None]:
    """The tables of finished stages, opened once in a process."""
    return (
        DocumentTable(documents),
        Columns(spans, SCHEMA) if spans else None,
        Columns(quality, QualityAnnotator().schema) if quality else None,
    )


def _spans(part: pa.Table, place: int) -> list[Span]:
    values = (part[name][place].as_py() for name in ("start", "end", "what"))
    return [Span(*each) for each in zip(*values, strict=True)]


def _is_spaced(part: pa.Table, place: int) -> bool:
    """Whether white space separates a text's words, which C4's rules suppose."""
    unspaced, chars = (part[name][place].as_py() for name in ("unspaced_chars", "chars"))
    return bool(unspaced < MOSTLY_UNSPACED * max(chars, 1))
