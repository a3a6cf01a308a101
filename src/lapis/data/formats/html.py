"""HTML files: the main text of each."""

from __future__ import annotations

from collections.abc import Iterator

from lapis.data.extract import Unreadable
from lapis.data.extract_apart import page_text
from lapis.data.formats import part as sizes
from lapis.data.formats.packed import opened
from lapis.data.formats.part import Found, Part, kind_for, pieces, skipped
from lapis.data.input import Input


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """The main text of a page."""
    with opened(item) as file:
        html = file.read(sizes.MAX_RECORD + 1)
    if len(html) > sizes.MAX_RECORD:
        yield skipped(item, "record too long")
        return
    try:
        text = page_text(html, extractor=item.source.extractor)
    except Unreadable as error:
        yield skipped(item, str(error))
        return
    yield from pieces(item, item.name, text, limit, kind=kind_for(item))
