"""HTML to text: the optional packages resiliparse and trafilatura."""

from __future__ import annotations

import codecs
from typing import Any, Literal

import numpy as np

Extractor = Literal["resiliparse", "trafilatura"]

MAX_DEPTH = 512  # elements inside each other; finding the main content takes the cube of it
HOPELESS = 20_000  # tags that look open at once: not even worth a parse
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}

_LESS, _SLASH = 0x3C, 0x2F
_NAMES = b"""area base br col embed hr img input link meta param source track wbr
p li td tr th dt dd option thead tbody tfoot colgroup"""
# Elements that hold nothing, or end where the next of their kind begins: none of them is nested by itself.
_FLAT = np.array(sorted({int.from_bytes(name[:3].ljust(3, b"\0")) for name in _NAMES.split()}))


def main_text(html: bytes, charset: str = "", extractor: Extractor = "resiliparse") -> str | None:
    """The main content of a page as plain text, without navigation; None if it is nested too deep to be read.

    The encoding is that of the byte-order mark, else of `charset` (from HTTP), the page's own, or a guess.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str
    from resiliparse.parse.html import HTMLTree

    open_tags = open_at_once(html)
    if open_tags > HOPELESS:
        return None
    encoding = _encoding(html, charset)
    suspicious = open_tags > MAX_DEPTH
    if extractor == "trafilatura":
        text = bytes_to_str(html, encoding)
        return None if suspicious and too_deep(HTMLTree.parse(text)) else _trafilatura(text)
    tree = HTMLTree.parse_from_bytes(html, encoding)
    if suspicious and too_deep(tree):
        return None
    return str(extract_plain_text(tree, main_content=True))


def open_at_once(html: bytes) -> int:
    """About how many elements are open at once at most, by counting tags: quick, and rather too many than too few.

    Comparisons in scripts and elements that nobody closed count too; what nests no deeper by itself does not.
    """
    page = np.frombuffer(html + b"\0\0\0\0\0", dtype=np.uint8)
    at_T = np.flatnonzero(page[:-5] == _LESS)
    closes_T = page[at_T + 1] == _SLASH
    first_T = at_T + 1 + closes_T
    key_T = np.zeros(len(at_T), dtype=np.int64)
    word_T = np.ones(len(at_T), dtype=np.bool_)  # whether the name goes on
    for n in range(3):
        letter_T = page[first_T + n] | 0x20
        word_T &= (letter_T >= ord("a")) & (letter_T <= ord("z"))
        key_T = key_T * 256 + np.where(word_T, letter_T, 0)
    counts_T = (key_T != 0) & ~np.isin(key_T, _FLAT)
    steps_T = np.where(closes_T, -1, 1) * counts_T
    return int(np.cumsum(steps_T).max(initial=0))


def too_deep(tree: Any) -> bool:
    """Whether a parsed page has elements more than MAX_DEPTH inside each other."""
    node, depth = tree.body or tree.head, 0
    top = node
    while node is not None:
        below = node.first_element_child
        if below is not None:
            node, depth = below, depth + 1
            if depth > MAX_DEPTH:
                return True
            continue
        while node is not None and depth and node.next_element_sibling is None:
            node, depth = node.parent_element, depth - 1
        node = node.next_element_sibling if node is not None and node != top and depth else None
    return False


def _trafilatura(html: str) -> str | None:
    import trafilatura

    try:
        return trafilatura.extract(html, favor_precision=True, include_comments=False) or ""
    except RecursionError:
        return None


def _encoding(html: bytes, charset: str) -> str:
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for mark, name in MARKS.items():
        if html.startswith(mark):
            return name
    named = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    return str(named or detect_encoding(html, from_html_meta=True) or "utf-8")
