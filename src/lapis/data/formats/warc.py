"""WARC and WET files: the main text of HTML responses, the text of conversions; every other record is counted.

A file of which each record is compressed by itself (as they are published) is entered at any byte: the next
record begins with the next compressed member that starts with a WARC header. That is also how reading goes on
after a damaged record.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, Any

from lapis.data.extract import Unreadable
from lapis.data.extract_apart import page_text
from lapis.data.formats import part as sizes
from lapis.data.formats.part import Found, Note, Part, byte_spans, kind_for, pieces, skipped
from lapis.data.input import Input
from lapis.data.text_files import ending
from lapis.storage import open_url

MEMBER = b"\x1f\x8b\x08"  # how a gzip member begins
WINDOW = 1 << 20
PEEK = 512
SPANS = 4  # a span of compressed pages is worth more work than one of text
SKIPPED_AT_MOST = 64  # records longer than so many MAX_RECORD are not even unpacked


def spans(item: Input, span: int) -> list[Part]:
    """Spans of bytes if the file is compressed by the record; else the whole file."""
    return byte_spans(item, span // SPANS) if ending(item.name) == ".gz" else [Part((item,))]


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """Every page whose record starts in the part."""
    stop = part.stop if part.stop >= 0 else item.size
    packed = ending(item.name) == ".gz"
    with open_url(item.path) as file:
        at = next_record(file, part.start, stop) if part.start else 0
        while at is not None and at < stop:
            reading = _Reading(item, file, at, stop, limit, packed)
            yield from reading.records()
            at = reading.damage
            if at is None or at >= item.size:
                return
            known_to_next = at >= stop and next_record(file, at, at + 1) == at
            if not reading.passed and not known_to_next:
                yield skipped(item, "broken WARC record", at)
            at = next_record(file, at + 1, stop) if packed else None


def next_record(file: IO[bytes], start: int, stop: int) -> int | None:
    """Where the first compressed record at or after `start` and before `stop` begins."""
    while start < stop:
        file.seek(start)
        window = file.read(WINDOW + PEEK)
        found = window.find(MEMBER)
        while 0 <= found < WINDOW and start + found < stop:
            if _begins_record(window[found : found + PEEK]):
                return start + found
            found = window.find(MEMBER, found + 1)
        start += WINDOW
    return None


def _begins_record(block: bytes) -> bool:
    try:
        return zlib.decompressobj(31).decompress(block, 5) == b"WARC/"
    except zlib.error:
        return False


def member_end(file: IO[bytes], start: int) -> int | None:
    """Where the compressed member that begins at `start` ends; None if it does not."""
    file.seek(start)
    unpacking, taken = zlib.decompressobj(31), start
    while block := file.read(WINDOW):
        taken += len(block)
        while block and not unpacking.eof:
            try:
                unpacking.decompress(block, WINDOW)
            except zlib.error:
                return None
            block = unpacking.unconsumed_tail
        if unpacking.eof:
            return taken - len(unpacking.unused_data)
    return None


class _Reading:
    """One pass over consecutive records. `damage` is where it had to stop; `passed`: only to pass a huge record."""

    def __init__(self, item: Input, file: IO[bytes], start: int, stop: int, limit: int, packed: bool) -> None:
        self._item, self._file, self._start, self._stop = item, file, start, stop
        self._limit, self._packed = limit, packed
        self.damage: int | None = None
        self.passed = False

    def records(self) -> Iterator[Found]:
        """What the records hold, until the end of the part, of the file, or of what can be read."""
        from fastwarc.warc import ArchiveIterator

        self._file.seek(self._start)
        records = iter(ArchiveIterator(self._file, parse_http=True, auto_decode="all"))
        last: int | None = None
        while True:
            begun: int | None = None
            try:
                entry = next(records, None)
                if entry is None:
                    self.damage = self._after(last) if self._packed else None
                    return
                begun = entry.stream_pos
                if begun >= self._stop:
                    return
                found = self._page(entry)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                self.damage = self._after(last) if begun is None else begun
                return
            last = begun
            yield from found
            if entry.content_length > SKIPPED_AT_MOST * sizes.MAX_RECORD:
                self.damage, self.passed = begun, True
                return

    def _after(self, last: int | None) -> int | None:
        """Where what follows the last good record begins."""
        if last is None:
            return self._start
        return member_end(self._file, last) if self._packed else last

    def _page(self, entry: Any) -> Iterator[Found]:
        from fastwarc.warc import WarcRecordType

        address = entry.headers.get("WARC-Target-URI") or ""
        place = f"{entry.stream_pos}:{address}"
        kind = str(entry.http_content_type or entry.headers.get("Content-Type") or "").lower()
        text = entry.record_type == WarcRecordType.conversion
        if not text and entry.record_type not in (WarcRecordType.response, WarcRecordType.resource):
            return iter((Note("WARC records without a page"),))
        if not text and "html" not in kind:
            return iter((skipped(self._item, "not HTML", place),))
        if entry.is_http and entry.http_headers.status_code not in (200, None):
            return iter((skipped(self._item, "HTTP status that is no success", place),))
        length = entry.content_length
        body = entry.reader.read(sizes.MAX_RECORD + 1)
        if len(body) > sizes.MAX_RECORD:
            return iter((skipped(self._item, "record too long", place),))
        if len(body) < length and not _encoded(entry):
            return iter((skipped(self._item, "broken WARC record", place),))
        return self._documents(body, str(entry.http_charset or ""), text, place)

    def _documents(self, body: bytes, charset: str, text: bool, place: str) -> Iterator[Found]:
        extractor = self._item.source.extractor
        try:
            found = body.decode("utf-8", errors="replace") if text else page_text(body, charset, extractor)
        except Unreadable as error:
            yield skipped(self._item, str(error), place)
            return
        name = f"{self._item.name}#{place}"
        yield from pieces(self._item, name, found, self._limit, kind=kind_for(self._item))


def _encoded(entry: Any) -> bool:
    """Whether a body has another length than its record says, since HTTP packed it."""
    headers = entry.http_headers if entry.is_http else {}
    return bool(headers.get("Content-Encoding") or headers.get("Transfer-Encoding"))
