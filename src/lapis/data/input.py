"""One file to read, and what the documents made from it depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lapis.data.recipe import SourceConfig

Reader = Literal["text", "jsonl", "parquet", "arrow", "html", "warc", "pdf"]


@dataclass(frozen=True, slots=True)
class Input:
    """One file to read. `name` is its path inside the source; `digest` names its bytes, `state` this copy of them."""

    source: SourceConfig
    name: str
    path: str  # local, or a URL
    size: int
    digest: str  # SHA-256 of the bytes, or of the URL and the store's own checksum
    reader: Reader
    licence: str
    state: str  # changes when the file is written again
    packages: tuple[str, ...] = ()  # versions of what takes the text out of it

    @property
    def identity(self) -> list[Any]:
        """What the documents read from this file depend on."""
        settings = self.source
        columns = [settings.text_column, settings.licence_column, settings.kind_column]
        kind = [settings.text_kind, settings.priority]
        made = [*self.packages, settings.extractor] if self.packages else []
        return [settings.name, self.name, self.digest, self.reader, self.licence, columns, kind, *made]
