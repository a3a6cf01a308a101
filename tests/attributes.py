"""Attributes of documents for tests, in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lapis.data.annotate import Annotator, Chunk
from lapis.data.columns import Columns
from lapis.data.decide import Cost, Rule, decide
from lapis.data.document import Document
from lapis.data.verdicts import Verdicts


class Held(Columns):
    """Columns of one table in memory."""

    def __init__(self, table: pa.Table) -> None:
        self._parts, self._table = [table], table
        self.first_of_part = np.array([0, table.num_rows])


def decided(
    documents: Sequence[Document], annotator: Annotator, rules: Sequence[Rule]
) -> tuple[list[str], list[Cost]]:
    """For each document the reason of the first rule that hits it, or ""; what each rule costs."""
    batch = annotator.annotate(Chunk(documents))
    facts = pa.table({"kind": pa.array([document.kind for document in documents])})
    attributes = {"documents": Held(facts), annotator.name: Held(pa.Table.from_batches([batch]))}
    rows = np.arange(len(documents), dtype=np.int64)
    verdicts = Verdicts.of(len(documents))
    sizes = np.array([len(document.text.encode()) for document in documents], dtype=np.int64)
    _, costs = decide(rules, attributes, rows, sizes, verdicts)
    return [verdicts.reasons[code][1] for code in verdicts.code.tolist()], costs


def reasons(documents: Sequence[Document], annotator: Annotator, rules: Sequence[Rule]) -> list[str]:
    """For each document the reason of the first rule that hits it, or ""."""
    return decided(documents, annotator, rules)[0]
