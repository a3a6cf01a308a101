"""Inputs to documents: text files, JSON lines, parquet, HTML and WARC, as a stream with bounded memory."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import zstandard

from lapis.data import extract
from lapis.data.document import Document, Kind, kind_of
from lapis.data.recipe import kind_named
from lapis.data.sources import COMPRESSIONS, SNIFFED, Input, inner_ending, looks_binary
from lapis.errors import InputError, nearest

BATCH_BYTES = 4 << 20  # small files are read by the batch
BATCH_FILES = 512
SPAN_BYTES = 16 << 20  # big files are read by the span, where their format allows
BLOCK = 1 << 22  # bytes of a text file decoded at once
MAX_RECORD = 32 << 20  # bytes of one JSON line or page
MAX_INVALID = 0.01  # more replaced characters than this: no text in UTF-8

BROKEN_ARCHIVE = (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError)


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


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of reading: some whole files, or a span of one (bytes of JSON lines, rows of a row group)."""

    inputs: tuple[Input, ...]
    start: int = 0
    stop: int = -1
    row_group: int = -1


def plan_parts(inputs: Iterable[Input]) -> list[Part]:
    """Cut the work into parts of a few MB, in the order of the inputs."""
    parts: list[Part] = []
    batch: list[Input] = []
    for item in inputs:
        small = item.reader in ("text", "html") and item.size < BATCH_BYTES
        full = sum(one.size for one in batch) + item.size > BATCH_BYTES or len(batch) >= BATCH_FILES
        if batch and (full or not small):
            parts.append(Part(tuple(batch)))
            batch = []
        if small:
            batch.append(item)
        else:
            parts.extend(_spans(item))
    if batch:
        parts.append(Part(tuple(batch)))
    return parts


def read_part(part: Part, document_chars: int) -> Iterator[Document | Skip | Note]:
    """Every document of a part in order, none longer than `document_chars` characters."""
    for item in part.inputs:
        try:
            if os.stat(item.path).st_size != item.size:
                yield Skip("changed while it was read", item.source.name, item.name, lost=True)
                continue
            yield from _READ[item.reader](item, part, document_chars)
        except BROKEN_ARCHIVE:
            yield Skip("broken archive", item.source.name, item.name)
        except OSError:
            yield Skip("vanished while it was read", item.source.name, item.name, lost=True)


def cut(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, cut after a paragraph, line or word if it can be."""
    start = 0
    while len(text) - start > limit:
        end = _border(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _border(text: str, low: int, high: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


def _spans(item: Input) -> list[Part]:
    if item.reader == "parquet":
        return _parquet_spans(item)
    if item.reader == "jsonl" and not _compressed(item) and item.size > SPAN_BYTES:
        starts = range(0, item.size, SPAN_BYTES)
        return [Part((item,), start, min(start + SPAN_BYTES, item.size)) for start in starts]
    return [Part((item,))]


def _read_text(item: Input, part: Part, limit: int) -> Iterator[Document | Skip | Note]:
    with _opened(item) as file:
        begin = file.read(BLOCK)
        whole = len(begin) < BLOCK
        if whole and not _compressed(item) and hashlib.sha256(begin).hexdigest() != item.digest:
            yield Skip("changed while it was read", item.source.name, item.name, lost=True)
            return
        if _compressed(item) and looks_binary(begin[:SNIFFED]):
            yield Skip("binary", item.source.name, item.name)
            return
        kind = _kind(item)
        count = 0
        for found in _decoded(file, begin):
            if isinstance(found, Note):
                yield found
                continue
            if found is None:
                yield Skip("invalid UTF-8", item.source.name, item.name)
                continue
            for piece in cut(found, limit):
                count += 1
                if count > 1:
                    yield Note("pieces of long documents")
                yield _document(item, item.name if count == 1 else f"{item.name}#{count}", piece, kind)


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
        border = _border(text, len(text) // 2, len(text)) if following else len(text)
        rest = text[border:]
        if border:
            yield text[:border]
        block = following


def _read_jsonl(item: Input, part: Part, limit: int) -> Iterator[Document | Skip | Note]:
    with _opened(item) as file:
        if part.start:
            file.seek(part.start - 1)
            _skip_line(file)  # a line belongs to the span in which it starts
        while part.stop < 0 or file.tell() < part.stop:
            place = file.tell()
            line = file.readline(MAX_RECORD)
            if not line:
                return
            name = f"{item.name}#{place}"
            if len(line) == MAX_RECORD and not line.endswith(b"\n"):
                _skip_line(file)
                yield Skip("record too long", item.source.name, name)
            elif line.strip():
                yield from _record(item, name, _json(line), limit)


def _skip_line(file: IO[bytes]) -> None:
    while True:
        line = file.readline(MAX_RECORD)
        if not line or line.endswith(b"\n"):
            return


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _record(item: Input, name: str, record: Any, limit: int) -> Iterator[Document | Skip | Note]:
    if not isinstance(record, dict):
        yield Skip("broken record", item.source.name, name)
        return
    source = item.source
    text = record.get(source.text_column)
    if not isinstance(text, str):
        yield Skip(f"no text in {source.text_column!r}", source.name, name)
        return
    licence = record.get(source.licence_column) if source.licence_column else None
    kind = kind_named(record.get(source.kind_column)) if source.kind_column else _kind(item)
    yield from _pieces(item, name, _whole(text), str(licence or item.licence), kind, limit)


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair; such a half becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet_spans(item: Input) -> list[Part]:
    with _parquet(item) as table:
        known = table.schema_arrow.names
        for column in _columns(item):
            if column not in known:
                raise InputError(f"{item.path} has no column {column!r}.", hint=nearest(column, known))
        parts = []
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            pieces = max(1, facts.total_byte_size // SPAN_BYTES)
            step = -(-facts.num_rows // pieces) or 1
            for start in range(0, facts.num_rows, step):
                parts.append(Part((item,), start, min(start + step, facts.num_rows), group))
    return parts


def _columns(item: Input) -> list[str]:
    source = item.source
    return [name for name in (source.text_column, source.licence_column, source.kind_column) if name]


def _parquet(item: Input) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(item.path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{item.path} is no readable parquet file: {error}.") from error


def _read_parquet(item: Input, part: Part, limit: int) -> Iterator[Document | Skip | Note]:
    with _parquet(item) as table:
        first = sum(table.metadata.row_group(n).num_rows for n in range(part.row_group))
        at = 0
        batches = table.iter_batches(batch_size=1024, row_groups=[part.row_group], columns=_columns(item))
        for batch in batches:
            low, high = max(part.start - at, 0), min(part.stop - at, batch.num_rows)
            if low < high:
                for n, record in enumerate(batch.slice(low, high - low).to_pylist()):
                    yield from _record(item, f"{item.name}#{first + at + low + n}", record, limit)
            at += batch.num_rows
            if at >= part.stop:
                return


def _read_html(item: Input, part: Part, limit: int) -> Iterator[Document | Skip | Note]:
    if item.source.format == "auto" and not extract.available():
        yield Skip("HTML needs pip install 'lapis[html]'", item.source.name, item.name)
        return
    with _opened(item) as file:
        html = file.read(MAX_RECORD + 1)
    if len(html) > MAX_RECORD:
        yield Skip("record too long", item.source.name, item.name)
        return
    yield from _pieces(item, item.name, extract.main_text(html), item.licence, _kind(item, "prose"), limit)


def _read_warc(item: Input, part: Part, limit: int) -> Iterator[Document | Skip | Note]:
    if item.source.format == "auto" and not extract.available():
        yield Skip("HTML needs pip install 'lapis[html]'", item.source.name, item.name)
        return
    with open(item.path, "rb") as file:
        for page in extract.pages(file, MAX_RECORD):
            name = f"{item.name}#{page.address}"
            if not page.html:
                yield Skip("record too long", item.source.name, name)
                continue
            text = extract.main_text(page.html)
            yield from _pieces(item, name, text, item.licence, _kind(item, "prose"), limit)


def _pieces(
    item: Input, name: str, text: str, licence: str, kind: Kind, limit: int
) -> Iterator[Document | Skip | Note]:
    for n, piece in enumerate(cut(text, limit)):
        if n:
            yield Note("pieces of long documents")
        yield Document(piece, item.source.name, f"{name}.{n + 1}" if n else name, licence, kind)


def _document(item: Input, path: str, text: str, kind: Kind) -> Document:
    return Document(text, item.source.name, path, item.licence, kind)


def _kind(item: Input, otherwise: Kind | None = None) -> Kind:
    if item.source.text_kind != "auto":
        return item.source.text_kind
    if item.reader == "text":
        return kind_of(item.name if not _compressed(item) else f"x{inner_ending(item.name)}")
    return otherwise or "prose"


def _compressed(item: Input) -> bool:
    return os.path.splitext(item.name)[1].lower() in COMPRESSIONS


def _opened(item: Input) -> IO[bytes]:
    ending = os.path.splitext(item.name)[1].lower()
    if ending == ".gz":
        return gzip.open(item.path, "rb")  # type: ignore[return-value]
    file = open(item.path, "rb")  # noqa: SIM115 (the caller closes it)
    if ending == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return file


_READ = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "html": _read_html,
    "warc": _read_warc,
}
