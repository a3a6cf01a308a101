"""What tests of reading share: a source's documents, skips and notes, and small files of each format."""

from __future__ import annotations

import gzip
from pathlib import Path

from lapis.data.document import Document
from lapis.data.formats.part import Found, Skip
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.sources import list_inputs


def source(path: Path | str, **settings: str) -> SourceConfig:
    """A source of files."""
    return SourceConfig.model_validate({"path": str(path), **settings})


def read(config: DataConfig) -> list[Found]:
    """Everything that the parts of a recipe's inputs give."""
    parts = plan_parts(list_inputs(config).inputs)
    return [found for part in parts for found in read_part(part, config.document_chars)]


def documents(*sources: SourceConfig, **settings: int) -> list[Document]:
    """The documents of some sources."""
    return [found for found in read(DataConfig(sources=sources, **settings)) if isinstance(found, Document)]


def skips(*sources: SourceConfig) -> list[tuple[str, str]]:
    """Reason and path of all that was skipped."""
    found = read(DataConfig(sources=sources))
    return [(one.reason, one.path) for one in found if isinstance(one, Skip)]


def warc_record(
    body: bytes, address: str = "http://example.org/a", *, kind: str = "response", http: str = "text/html"
) -> bytes:
    """One record of a WARC file, compressed by itself."""
    status = f"HTTP/1.1 200 OK\r\nContent-Type: {http}\r\n\r\n".encode() if kind == "response" else b""
    content = "application/http; msgtype=response" if kind == "response" else http
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"Content-Type: {content}\r\nContent-Length: {len(status) + len(body)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + status + body + b"\r\n\r\n")


def pdf(*pages: str) -> bytes:
    """A PDF file with a line of text on each page."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        facts = f"/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * n} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R {facts} >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    file, places = b"%PDF-1.4\n", []
    for n, one in enumerate(objects, 1):
        places.append(len(file))
        file += b"%d 0 obj\n%s\nendobj\n" % (n, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(file))
    return file + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end
