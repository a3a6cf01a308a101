"""JSON lines, plain or compressed, by the span: a line belongs to the span in which it starts.

A plain file is entered at any byte. A compressed one has no such doors, so a span of it is unpacked from the
beginning and what lies before is thrown away: unpacking is a hundred times as fast as what follows, and a file
is cut into few spans.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from lapis.data.formats import part as sizes
from lapis.data.formats.packed import UNPACKED, Unpacked, compressed, unpacked
from lapis.data.formats.part import Found, Part, byte_spans, record, skipped
from lapis.data.input import Input

PACKED_SPANS = 8  # most spans of a compressed file
Block = tuple[int, bytes, bool]  # offset, bytes, and whether lines that start in it belong to the span


def spans(item: Input, span: int) -> list[Part]:
    """The spans of a file; a compressed one behind a URL is not fetched several times."""
    if not compressed(item):
        return byte_spans(item, span)
    if "://" in item.path:
        return [Part((item,))]
    return byte_spans(item, max(sizes.SPAN_BYTES // 4, -(-item.size // PACKED_SPANS)))


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """A document a line."""
    with unpacked(item) as file:
        blocks = _packed(file, part) if isinstance(file, Unpacked) else _plain(file, part)
        for offset, line in _lines(blocks):
            if line is None:
                yield skipped(item, "record too long", offset)
            elif line.strip():
                yield from record(item, f"{item.name}#{offset}", _json(line), limit)


def _plain(file: IO[bytes], part: Part) -> Iterator[Block]:
    offset = part.start
    if offset:
        file.seek(offset - 1)
        yield offset - 1, file.read(1), False
    while block := file.read(UNPACKED):
        room = part.stop - offset if part.stop >= 0 else len(block)
        if 0 < room < len(block):
            yield offset, block[:room], True
            yield offset + room, block[room:], False
        else:
            yield offset, block, room > 0
        offset += len(block)


def _packed(file: Unpacked, part: Part) -> Iterator[Block]:
    """Blocks of a fixed size; each belongs to the span that holds the last compressed byte read for it."""
    buffer = bytearray(UNPACKED)
    while count := file.readinto(buffer):
        ours = file.taken > part.start and (part.stop < 0 or file.taken <= part.stop)
        if ours or file.taken > part.start:
            yield file.given - count, bytes(buffer[:count]), ours
        else:
            yield file.given - count, bytes(buffer[count - 1 : count]), False


def _lines(blocks: Iterator[Block]) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of each line that starts in a block of ours; None for one that is too long."""
    begun, entered = True, False  # whether the next byte starts a line; whether the span has begun
    start, kept = 0, False
    held: bytes | None = b""  # the line that is not ended yet
    for offset, block, ours in blocks:
        at = 0
        while at < len(block):
            if begun:
                if entered and not ours:
                    return
                entered = ours
                start, held, kept = offset + at, b"", ours
            end = block.find(b"\n", at) + 1
            piece = block[at:end] if end else block[at:]
            at += len(piece)
            begun = end > 0
            if kept and held is not None:
                held = held + piece if len(held) + len(piece) <= sizes.MAX_RECORD else None
            if begun and kept:
                yield start, held
    if not begun and kept:
        yield start, held


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
