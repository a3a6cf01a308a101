"""HTML to text, and the pages of WARC files: the optional packages resiliparse and fastwarc."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from lapis.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Page:
    """One web page of a WARC file: its address and its bytes."""

    address: str
    html: bytes


def available() -> bool:
    """Whether the packages that read HTML are installed."""
    try:
        import fastwarc  # noqa: F401
        import resiliparse  # noqa: F401
    except ImportError:
        return False
    return True


def main_text(html: bytes) -> str:
    """The main content of a page as plain text, without navigation and other furniture."""
    _require()
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse_from_bytes(html, detect_encoding(html) or "utf-8")
    return str(extract_plain_text(tree, main_content=True))


def pages(stream: IO[bytes], largest: int) -> Iterator[Page]:
    """The HTML responses of a WARC stream; a page above `largest` bytes comes with empty html."""
    _require()
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    for record in ArchiveIterator(stream, record_types=WarcRecordType.response, parse_http=True):
        kind = (record.http_content_type or "").lower() if record.is_http else ""
        if "html" not in kind:
            continue
        address = record.headers.get("WARC-Target-URI") or ""
        body = record.reader.read(largest + 1)
        yield Page(address, body if len(body) <= largest else b"")


def _require() -> None:
    if not available():
        raise UnavailableError(
            "HTML and WARC files need the packages resiliparse and fastwarc, which are not installed.",
            hint="pip install 'lapis[html]'",
        )
