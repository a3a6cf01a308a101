"""Deciding from attributes: named rules over columns, and a verdict on every document.

A rule is a predicate over whole columns. The first rule that hits a document is the reason it is dropped for;
what each rule costs alone is counted too, so that thresholds can be chosen without computing anything again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.columns import Columns, Mask, Rows
from lapis.storage import atomic_file

Attributes = Mapping[str, Columns]  # "documents", and each annotator's name

VERDICTS = "verdicts.arrow"


@dataclass(frozen=True)
class Rule:
    """One reason to drop documents. `step` is the row of the report under which it counts."""

    step: str
    reason: str
    hit: Callable[[Attributes], Mask]


@dataclass(frozen=True)
class Cost:
    """What a rule costs: all documents that it hits, and those that no rule before it hits."""

    step: str
    reason: str
    documents: int
    bytes: int
    first_documents: int
    first_bytes: int


@dataclass
class Verdicts:
    """Why each document is not trained on, and which other one stands for a duplicate.

    `code` counts in `reasons`; 0 is a document that is trained on.
    """

    code: NDArray[np.int16]
    survivor: NDArray[np.int64]
    reasons: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])

    @staticmethod
    def of(documents: int) -> Verdicts:
        """No verdict on any document yet."""
        return Verdicts(np.zeros(documents, dtype=np.int16), np.full(documents, -1, dtype=np.int64))

    def drop(self, step: str, reason: str, rows: Rows, survivors: Rows | None = None) -> None:
        """Note why some documents are not trained on."""
        if (step, reason) not in self.reasons:
            self.reasons.append((step, reason))
        self.code[rows] = self.reasons.index((step, reason))
        if survivors is not None:
            self.survivor[rows] = survivors

    def write(self, folder: Path) -> None:
        """Write verdicts.arrow, a row a row of the documents stage: step, reason, survivor.

        Step and reason are empty for a document that is trained on; survivor is a row, or null.
        """
        step, reason = (pa.array([pair[n] for pair in self.reasons]) for n in (0, 1))
        code = pa.array(self.code)
        table = pa.table(
            {
                "step": pa.DictionaryArray.from_arrays(code, step),
                "reason": pa.DictionaryArray.from_arrays(code, reason),
                "survivor": pa.array(self.survivor, mask=self.survivor < 0),
            }
        )
        with atomic_file(folder / VERDICTS) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def read_verdicts(folder: Path) -> pa.Table:
    """What `Verdicts.write` wrote into a split stage: step, reason, survivor for each row of the documents."""
    return pa.ipc.open_file(pa.memory_map(str(folder / VERDICTS))).read_all()


def decide(
    rules: Sequence[Rule], attributes: Attributes, rows: Rows, sizes: NDArray[np.int64], verdicts: Verdicts
) -> tuple[Rows, list[Cost]]:
    """The rows that no rule hits, and what each rule costs. `sizes` are bytes of all documents."""
    left = np.ones(len(rows), dtype=bool)
    costs = []
    for rule in rules:
        hit = rule.hit(attributes)[rows]
        first = hit & left
        left &= ~hit
        verdicts.drop(rule.step, rule.reason, rows[first])
        counts = (
            int(hit.sum()),
            int(sizes[rows[hit]].sum()),
            int(first.sum()),
            int(sizes[rows[first]].sum()),
        )
        costs.append(Cost(rule.step, rule.reason, *counts))
    return rows[left], costs
