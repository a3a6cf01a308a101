"""PDF files: the text of their pages, as the optional package pypdfium2 finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lapis.data.formats import part as sizes
from lapis.data.formats.packed import opened
from lapis.data.formats.part import Found, Part, kind_for, pieces, skipped
from lapis.data.input import Input

MAX_FILE = 256 << 20
HYPHENS = ("\x02\n", "\ufffe\n")  # how PDFium marks a word that goes on in the next line


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """The text of all pages; scanned ones have none."""
    import pypdfium2

    with opened(item) as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        yield skipped(item, "record too long")
        return
    try:
        with pypdfium2.PdfDocument(content) as document:
            text = _text(document)
    except pypdfium2.PdfiumError as error:
        yield skipped(item, "encrypted PDF" if "password" in str(error).lower() else "broken PDF")
        return
    if text is None:
        yield skipped(item, "record too long")
    else:
        yield from pieces(item, item.name, text, limit, kind=kind_for(item))


def _text(document: Any) -> str | None:
    """All pages, a blank line between them; None if that is more than MAX_RECORD characters."""
    pages, size = [], 0
    for n in range(len(document)):
        page = document[n]
        text = page.get_textpage()
        pages.append(str(text.get_text_bounded()).replace("\r\n", "\n"))
        text.close()
        page.close()
        size += len(pages[-1])
        if size > sizes.MAX_RECORD:
            return None
    whole = "\n\n".join(pages)
    for mark in HYPHENS:
        whole = whole.replace(mark, "")
    return whole
