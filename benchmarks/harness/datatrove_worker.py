"""datatrove's blocks over a parquet file of texts, in datatrove's own environment; prints CPU seconds as JSON.

    python datatrove_worker.py near|chain TEXTS.parquet TOKENIZER.json|- LANGUAGE_MODEL|-

Blocks are run one after the other in this process, each over the documents that the one before let pass, so that
the seconds which its executor needs to start are not counted. Language identification needs a fastText model as
a file, since datatrove would download its own; without one it is left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger

BUCKETS = 14
FINEWEB = MinhashConfig(hash_config=HashConfig(hash_fc="sha1", precision=64), num_buckets=BUCKETS)


class Timed:
    """Runs blocks and keeps the CPU seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Iterable[Any] | None]) -> list[Document]:
        """What the block lets pass."""
        began = time.process_time()
        found = list(work() or ())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return found


def near(timed: Timed, documents: list[Document]) -> list[Document]:
    """The four stages of MinHash."""
    with tempfile.TemporaryDirectory() as place:
        signatures, buckets, removed = (f"{place}/{name}" for name in ("signatures", "buckets", "removed"))
        signature = MinhashDedupSignature(signatures, FINEWEB)
        timed.run("minhash signatures", lambda: signature.run(documents, 0, 1))
        for rank in range(BUCKETS):
            step = MinhashDedupBuckets(signatures, buckets, config=FINEWEB)
            timed.run("minhash buckets", partial(step.run, None, rank, BUCKETS))
        timed.run(
            "minhash clusters", lambda: MinhashDedupCluster(buckets, removed, config=FINEWEB).run(None, 0, 1)
        )
        return timed.run("minhash filter", lambda: MinhashDedupFilter(removed).run(documents, 0, 1))


def chain(timed: Timed, path: Path, tokenizer: str, model: str) -> list[Document]:
    """FineWeb's order, from parquet to tokens and parquet."""
    reader = ParquetReader(str(path.parent), glob_pattern=path.name)
    documents = timed.run("read", lambda: reader.run(None, 0, 1))
    blocks: dict[str, Any] = {}
    if model != "-":
        blocks["language"] = LanguageFilter(label_only=True)
        from fasttext.FastText import _FastText

        blocks["language"].model._model = _FastText(model)
    blocks["gopher repetition"] = GopherRepetitionFilter()
    blocks["gopher quality"] = GopherQualityFilter()
    blocks["c4"] = C4QualityFilter(filter_no_terminal_punct=False)
    blocks["fineweb"] = FineWebQualityFilter()
    for block in blocks.values():  # what is loaded at the first document is not counted
        list(block.run([Document(text="The splitter is loaded by this. " * 20, id="first")], 0, 1))
    for name, block in blocks.items():
        documents = timed.run(name, partial(block.run, documents, 0, 1))
    documents = near(timed, documents)
    documents = timed.run("pii", lambda: PIIFormatter().run(documents, 0, 1))
    with tempfile.TemporaryDirectory() as place:
        step = DocumentTokenizer(f"{place}/tokens", tokenizer, shuffle_documents=False)
        documents = timed.run("tokenize", lambda: step.run(documents, 0, 1))
        timed.run("write", lambda: ParquetWriter(f"{place}/kept").run(documents, 0, 1))
    return documents


def main() -> None:
    logger.remove()
    what, path, tokenizer, model = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    timed = Timed()
    documents = list(ParquetReader(str(path.parent), glob_pattern=path.name).run(None, 0, 1))
    if what == "near":
        MinhashDedupSignature(tempfile.gettempdir(), FINEWEB).get_shingles(
            "The splitter is loaded by this. " * 20
        )
        kept = near(timed, documents)
    else:
        kept = chain(timed, path, tokenizer, model)
    print(json.dumps({"documents": len(documents), "kept": len(kept), "seconds": timed.seconds}))


if __name__ == "__main__":
    main()
