"""HTML files: the main text of each."""

from __future__ import annotations

from collections.abc import Iterator

from lapis.data.extract import main_text
from lapis.data.formats import part as sizes
from lapis.data.formats.packed import opened
from lapis.data.formats.part import Found, Part, kind_for, pieces, skipped
from lapis.data.input import Input

TOO_DEEP = "HTML nested too deep"


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """The main text of a page."""
    with opened(item) as file:
        html = file.read(sizes.MAX_RECORD + 1)
    if len(html) > sizes.MAX_RECORD:
        yield skipped(item, "record too long")
        return
    text = main_text(html, extractor=item.source.extractor)
    if text is None:
        yield skipped(item, TOO_DEEP)
    else:
        yield from pieces(item, item.name, text, limit, kind=kind_for(item))
