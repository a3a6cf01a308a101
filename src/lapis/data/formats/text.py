"""Text and source files, a document a file or several if it is long."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from typing import IO

from lapis.data.document import Document
from lapis.data.formats.packed import compressed, opened
from lapis.data.formats.part import BLOCK, Found, Note, Part, border, cut, kind_for, skipped
from lapis.data.input import Input
from lapis.data.text_files import SNIFFED, looks_binary

MAX_INVALID = 0.01  # more replaced characters than this: no text in UTF-8


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """The text of a file, block by block, so that a long one needs no memory."""
    with opened(item) as file:
        begin = file.read(BLOCK)
        whole = len(begin) < BLOCK and not compressed(item)
        if whole and hashlib.sha256(begin).hexdigest() != item.digest and "://" not in item.path:
            yield skipped(item, "changed while it was read", lost=True)
            return
        if looks_binary(begin[:SNIFFED]):
            yield skipped(item, "binary")
            return
        yield from _documents(item, file, begin, limit)


def _documents(item: Input, file: IO[bytes], begin: bytes, limit: int) -> Iterator[Found]:
    kind = kind_for(item)
    count, told = 0, False
    for found in _decoded(file, begin):
        if isinstance(found, Note):
            yield found
            continue
        if found is None:
            told = True
            yield skipped(item, "invalid UTF-8")
            continue
        for piece in cut(found, limit):
            if not piece or piece.isspace():
                continue
            count += 1
            if count > 1:
                yield Note("pieces of long documents")
            path = item.name if count == 1 else f"{item.name}#{count}"
            yield Document(piece, item.source.name, path, item.licence, kind)
    if not count and not told:
        yield skipped(item, "no text")


def _decoded(file: IO[bytes], block: bytes) -> Iterator[str | Note | None]:
    """Text of a file block by block, each ending at a border; None for a block that is no UTF-8."""
    name = "utf-16" if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    decoder = codecs.getincrementaldecoder(name)(errors="replace")
    rest = ""
    while block:
        following = file.read(BLOCK)
        text = decoder.decode(block, final=not following)
        invalid = text.count("\ufffd") - block.count("\ufffd".encode())
        if invalid > MAX_INVALID * len(text) and name == "utf-8":
            yield None
            text = ""
        elif invalid > 0:
            yield Note("invalid bytes replaced")
        text = rest + text
        end = border(text, len(text) // 2, len(text)) if following else len(text)
        rest = text[end:]
        if end:
            yield text[:end]
        block = following
