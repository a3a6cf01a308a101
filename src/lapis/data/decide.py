"""Deciding from attributes: named rules over columns.

A rule is a predicate over whole columns. The first rule that hits a document is the reason it is dropped for;
what each rule costs alone is counted too, so that thresholds can be chosen without computing anything again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapis.data.columns import Columns, Mask, Rows
from lapis.data.verdicts import Verdicts

Attributes = Mapping[str, Columns]  # "documents", and each annotator's name


@dataclass(frozen=True)
class Rule:
    """One reason to drop documents. `step` is the row of the report under which it counts."""

    step: str
    reason: str
    hit: Callable[[Attributes], Mask]


@dataclass(frozen=True)
class Cost:
    """What a reason costs: documents that it is the first to hit, and all that its rule hits alone.

    Duplicates and documents close to held-out ones have no count alone: they depend on what was dropped before.
    """

    step: str
    reason: str
    documents: int
    bytes: int
    alone_documents: int | None = None
    alone_bytes: int | None = None


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
            int(first.sum()),
            int(sizes[rows[first]].sum()),
            int(hit.sum()),
            int(sizes[rows[hit]].sum()),
        )
        costs.append(Cost(rule.step, rule.reason, *counts))
    return rows[left], costs
