"""What every format gives: documents, what was skipped, what was done; and how long texts are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lapis.data.document import Document, Kind, kind_of
from lapis.data.input import Input
from lapis.data.recipe import kind_named
from lapis.data.text_files import COMPRESSIONS, ending, inner_ending

SPAN_BYTES, LEAST_SPAN = 16 << 20, 4 << 20  # big files are read by the span, where their format allows
SPANS = 64  # so many are wanted: the fewer they are, the longer one worker is waited for at the end
BLOCK = 1 << 22  # bytes of a text file decoded at once
MAX_RECORD = 32 << 20  # bytes of one JSON line, row or page


@dataclass(frozen=True, slots=True)
class Skip:
    """A document that could not be read. `lost`: it was there when files were listed."""

    reason: str
    source: str
    path: str
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was done to the document that follows."""

    what: str


Found = Document | Skip | Note


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of reading: some whole files, or a span of one (its bytes, or rows of a row group)."""

    inputs: tuple[Input, ...]
    start: int = 0
    stop: int = -1
    row_group: int = -1

    def place(self, item: Input) -> str:
        """The name of what this part reads of a file."""
        return (
            item.name if self.stop < 0 else f"{item.name}#{max(self.row_group, 0)}.{self.start}-{self.stop}"
        )


def span_bytes(total: int) -> int:
    """How large the spans are in which so many bytes of files are read."""
    return min(max(total // SPANS, LEAST_SPAN), SPAN_BYTES)


def byte_spans(item: Input, size: int) -> list[Part]:
    """A file in spans of so many bytes."""
    if item.size <= size:
        return [Part((item,))]
    return [Part((item,), start, min(start + size, item.size)) for start in range(0, item.size, size)]


def skipped(item: Input, reason: str, place: int | str = "", *, lost: bool = False) -> Skip:
    """A record of a file that could not be read; `place` is where it starts."""
    name = item.name if place == "" else f"{item.name}#{place}"
    return Skip(reason, item.source.name, name, lost)


def pieces(
    item: Input, name: str, text: str, limit: int, *, licence: str = "", kind: Kind
) -> Iterator[Found]:
    """A text as documents of at most `limit` characters, or as a skip if it has nothing to read."""
    if not text or text.isspace():
        yield Skip("no text", item.source.name, name)
        return
    for n, piece in enumerate(cut(text, limit)):
        if n:
            yield Note("pieces of long documents")
        path = f"{name}.{n + 1}" if n else name
        yield Document(piece, item.source.name, path, licence or item.licence, kind)


def record(item: Input, name: str, value: object, limit: int) -> Iterator[Found]:
    """A row or JSON object as documents."""
    source = item.source
    if not isinstance(value, dict):
        yield Skip("broken record", source.name, name)
        return
    text = value.get(source.text_column)
    if not isinstance(text, str):
        yield Skip(f"no text in {source.text_column!r}", source.name, name)
        return
    licence = value.get(source.licence_column) if source.licence_column else None
    kind = kind_named(value.get(source.kind_column)) if source.kind_column else kind_for(item)
    yield from pieces(item, name, _whole(text), limit, licence=str(licence or ""), kind=kind)


def kind_for(item: Input) -> Kind:
    """The kind of a file's documents: what the source says, or by the ending of a text file."""
    if item.source.text_kind != "auto":
        return item.source.text_kind
    if item.reader != "text":
        return "prose"
    return kind_of(f"x{inner_ending(item.name)}" if ending(item.name) in COMPRESSIONS else item.name)


def cut(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, cut after a paragraph, line or word if it can be."""
    start = 0
    while len(text) - start > limit:
        end = border(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def border(text: str, low: int, high: int) -> int:
    """Where a text is best cut between two places."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair; such a half becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
