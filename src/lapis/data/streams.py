"""One stream a source: its documents one after the other, as if no other source lay between them.

A mixture's windows are cut from these, so each belongs to one source; the shards stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.shards import Dataset

BLOCK = 1 << 24  # bytes of the table that are parsed at once; a line is shorter


class Piece(NamedTuple):
    """Adjacent tokens of the dataset's training stream."""

    start: int
    tokens: int


class SourceStream:
    """One source's documents: number n from `edges[n]` to `edges[n + 1]`, in the dataset from `starts[n]` on."""

    def __init__(self, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        self.starts = starts
        self.edges: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes)])

    def pieces(self, start: int, count: int) -> Iterator[Piece]:
        """Where `count` tokens of this stream from `start` on lie in the dataset, document by document."""
        n = int(np.searchsorted(self.edges, start, side="right")) - 1
        end = start + count
        while start < end:
            stop = min(end, int(self.edges[n + 1]))
            yield Piece(int(self.starts[n]) + start - int(self.edges[n]), stop - start)
            start, n = stop, n + 1

    def place_of(self, token: int) -> int:
        """Where a token of the dataset that belongs to this source stands in this stream."""
        n = int(np.searchsorted(self.starts, token, side="right")) - 1
        return int(self.edges[n]) + token - int(self.starts[n])


def source_tokens(dataset: Dataset) -> dict[str, int]:
    """How many training tokens each source has, by its name."""
    tokens: dict[str, int] = {}
    for row in dataset.manifest["licences"]:
        tokens[row["source"]] = tokens.get(row["source"], 0) + row["tokens"]
    return dict(sorted(tokens.items()))


def source_streams(dataset: Dataset) -> Mapping[str, SourceStream]:
    """The stream of each source, by its name."""
    starts = dataset.document_starts
    sizes = np.diff(np.append(starts, dataset.tokens))
    names = sources_of_documents(dataset)
    codes = names.indices.to_numpy(zero_copy_only=False)
    return {
        str(name): SourceStream(starts[codes == code], sizes[codes == code])
        for code, name in enumerate(names.dictionary.to_pylist())
    }


def sources_of_documents(dataset: Dataset) -> pa.DictionaryArray:
    """The source of each training document, in their order."""
    import pyarrow.json as lines

    schema = pa.schema([("source", pa.string())])
    tables = [
        lines.read_json(
            dataset.folder / f"{shard['name']}.documents.jsonl",
            lines.ReadOptions(block_size=BLOCK),
            lines.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )["source"]
        for shard in dataset.manifest["shards"]
        if shard["documents"]
    ]
    chunks = [chunk for table in tables for chunk in table.chunks]
    whole: pa.DictionaryArray = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks()
    return whole
