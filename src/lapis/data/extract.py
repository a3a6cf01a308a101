"""HTML to text: the optional packages resiliparse and trafilatura."""

from __future__ import annotations

import codecs
import re
from typing import Literal

Extractor = Literal["resiliparse", "trafilatura"]

MAX_DEPTH = 512  # elements inside each other; finding the main content takes the cube of it
TOO_DEEP = "HTML nested too deep"
MAX_FORMATTING = 100  # kinds of formatting elements with their attributes
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}

_FORMATTING = re.compile(r"<(b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)\b[^>]*>", re.IGNORECASE)
_DEEPER = " > ".join(
    ["*"] * MAX_DEPTH
)  # exact and quick: the selector fails at the first ancestor that is missing


class Unreadable(Exception):
    """A page of which no text can be had; the text says why."""


def main_text(html: bytes, charset: str = "", extractor: Extractor = "resiliparse") -> str:
    """The main content of a page as plain text, without navigation. Raises Unreadable if it is nested too deep.

    The encoding is that of the byte-order mark, else of `charset` (from HTTP), the page's own, or a guess.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str
    from resiliparse.parse.html import HTMLTree

    text = plain_formatting(bytes_to_str(html, _encoding(html, charset)))
    tree = HTMLTree.parse(text)
    top = tree.document if text.count("<") >= MAX_DEPTH // 2 else None
    if top is not None and top.query_selector(_DEEPER) is not None:
        raise Unreadable(TOO_DEEP)
    if extractor == "trafilatura":
        return _trafilatura(text)
    return str(extract_plain_text(tree, main_content=True, alt_texts=False))


def plain_formatting(page: str) -> str:
    """The same page, its formatting elements without attributes if there are too many kinds of them.

    A parser opens every unclosed <font> again in each paragraph, and remembers each kind of it: 74 KB took 17 s.
    """
    if len({found[0] for found in _FORMATTING.finditer(page)}) <= MAX_FORMATTING:
        return page
    return _FORMATTING.sub(r"<\1>", page)


def _trafilatura(html: str) -> str:
    import trafilatura

    try:
        return trafilatura.extract(html, favor_precision=True, include_comments=False) or ""
    except RecursionError as error:
        raise Unreadable(TOO_DEEP) from error


def _encoding(html: bytes, charset: str) -> str:
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for mark, name in MARKS.items():
        if html.startswith(mark):
            return name
    named = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    return str(named or detect_encoding(html, from_html_meta=True) or "utf-8")
