"""The MinHash sketch of every document, by which near-duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lapis.data.annotate import Chunk
from lapis.data.dedup import HASHES, NGRAM, sketches
from lapis.data.words import SPLITTER


@dataclass(frozen=True)
class SketchAnnotator:
    """Writes `sketch`: 112 numbers of 32 bits a document, little-endian."""

    name: str = "sketch"
    version: int = 1

    @property
    def schema(self) -> pa.Schema:
        """One column of fixed-size bytes."""
        return pa.schema([("sketch", pa.binary(4 * HASHES))])

    def facts(self) -> dict[str, Any]:
        """The hashes, the n-gram and the splitter."""
        return {"hashes": HASHES, "ngram": NGRAM, "splitter": SPLITTER}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The sketches of a chunk."""
        sketch_DH = sketches(chunk.words, chunk.texts).astype("<u4")
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(4 * HASHES), len(sketch_DH), [None, pa.py_buffer(sketch_DH.tobytes())]
        )
        return pa.RecordBatch.from_arrays([column], schema=self.schema)
