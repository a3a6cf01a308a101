"""Inputs to documents: every format that is read, and the cutting of the work into parts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lapis.data.formats import arrow, html, jsonl, parquet, pdf, text, warc
from lapis.data.formats.packed import Broken
from lapis.data.formats.part import Found, Part, skipped, span_bytes
from lapis.data.input import Input, Reader
from lapis.data.recipe import SourceConfig
from lapis.errors import InputError, UnavailableError
from lapis.storage import failures, is_url, state_of

BATCH_BYTES = 4 << 20  # small files are read by the batch
BATCH_FILES = 512


@dataclass(frozen=True)
class FileFormat:
    """How files of one format are read: their endings, the function that reads a part, how large ones are cut
    into spans of about so many bytes."""

    endings: tuple[str, ...]
    read: Callable[[Input, Part, int], Iterator[Found]]
    spans: Callable[[Input, int], list[Part]] | None = None
    packages: tuple[str, ...] = ()
    """Optional packages that it needs."""
    extra: str = ""
    """The extra of lapis that brings them."""


FORMATS: dict[Reader, FileFormat] = {
    "text": FileFormat((), text.read),
    "jsonl": FileFormat((".jsonl", ".ndjson"), jsonl.read, jsonl.spans),
    "parquet": FileFormat((".parquet",), parquet.read, parquet.spans),
    "arrow": FileFormat((".arrow",), arrow.read, arrow.spans),
    "html": FileFormat((".html", ".htm", ".xhtml"), html.read, None, ("resiliparse",), "html"),
    "warc": FileFormat((".warc", ".wet"), warc.read, warc.spans, ("resiliparse", "fastwarc"), "html"),
    "pdf": FileFormat((".pdf",), pdf.read, None, ("pypdfium2",), "pdf"),
}
READERS: dict[str, Reader] = {ending: name for name, one in FORMATS.items() for ending in one.endings}


def packages_of(reader: Reader, source: SourceConfig) -> tuple[str, ...]:
    """The optional packages that take the text out of such a file, each with its version or "missing"."""
    names = list(FORMATS[reader].packages)
    if reader in ("html", "warc") and source.extractor != "resiliparse":
        names.append(source.extractor)
    return tuple(f"{name} {_version(name)}" for name in names)


def plan_parts(inputs: Iterable[Input]) -> list[Part]:
    """Cut the work into parts of a few MB, in the order of the inputs. Raises InputError for a wrong column."""
    inputs = list(inputs)
    parquet.check_columns([item for item in inputs if item.reader == "parquet"])
    span = span_bytes(sum(item.size for item in inputs))
    parts: list[Part] = []
    batch: list[Input] = []
    for item in inputs:
        spans = FORMATS[item.reader].spans
        small = spans is None and item.size < BATCH_BYTES
        full = sum(one.size for one in batch) + item.size > BATCH_BYTES or len(batch) >= BATCH_FILES
        if batch and (full or not small):
            parts.append(Part(tuple(batch)))
            batch = []
        if small:
            batch.append(item)
        else:
            parts.extend(spans(item, span) if spans else [Part((item,))])
    if batch:
        parts.append(Part(tuple(batch)))
    return parts


def read_part(part: Part, document_chars: int) -> Iterator[Found]:
    """Every document of a part in order, none longer than `document_chars` characters.

    Raises InputError if a file changes after documents of it were given, UnavailableError if a package that the
    recipe asks for is missing.
    """
    for item in part.inputs:
        lacking = [package for package in item.packages if package.endswith(" missing")]
        if lacking:
            yield _lacking(item, lacking[0].split()[0])
            continue
        try:
            if state_of(item.path) != item.state:
                yield _lost(item, part, "changed while it was read")
                continue
            yield from _read(item, part, document_chars)
        except FileNotFoundError:
            yield _lost(item, part, "vanished while it was read")
        except failures() as error:
            if is_url(item.path):
                raise UnavailableError(
                    f"{item.path} could not be read: {error}.",
                    hint="Run the same command again: finished parts are kept.",
                ) from error
            yield _lost(item, part, "unreadable")


def _read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    try:
        yield from FORMATS[item.reader].read(item, part, limit)
    except Broken as error:
        yield skipped(item, error.reason, error.offset)
    if state_of(item.path) != item.state:
        raise InputError(
            f"{item.path} changed while it was read, so what was read of it belongs to neither version.",
            hint="Let it be finished or copy it aside, then run the same command again: finished parts are kept.",
        )


def _lost(item: Input, part: Part, reason: str) -> Found:
    return skipped(item, reason, part.place(item).removeprefix(item.name).lstrip("#"), lost=True)


def _lacking(item: Input, package: str) -> Found:
    extra = FORMATS[item.reader].extra if package in FORMATS[item.reader].packages else package
    install = f"pip install 'lapis[{extra}]'"
    if item.source.format == "auto" and extra != package:
        return skipped(item, f"{item.reader.upper()} needs {install}")
    raise UnavailableError(
        f"{item.path} is read with the package {package}, which is not installed.", hint=install
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
