"""Where a release comes from: run, checkpoint, dataset, tokenizer, and the licences of its data, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lapis.errors import InputError, nearest

UNKNOWN = "unknown"  # the licence of what states none


@dataclass(frozen=True)
class Lineage:
    """The way back from weights to data. A part is None where the weights were not trained here."""

    source: str = ""  # "kind: reference" of the weights
    licence: str = UNKNOWN  # of the weights
    run: str | None = None
    checkpoint: str | None = None  # digest
    step: int | None = None
    average: bool = False  # the average of the run's weights, not the last ones
    dataset: str | None = None  # digest
    tokenizer: str | None = None  # digest
    licences: Mapping[str, int] = field(default_factory=dict)  # training documents per licence

    @property
    def documents(self) -> int:
        """Training documents whose licence was counted."""
        return sum(self.licences.values())

    @property
    def unlicensed(self) -> int:
        """Training documents whose source states no licence."""
        return self.licences.get(UNKNOWN, 0)


def from_facts(facts: Mapping[str, Any]) -> Lineage:
    """A Lineage of plain facts; `licences` may be a count per licence, or the licence table of a dataset.

    Raises InputError for a fact that is not known: none is lost silently.
    """
    known = [item.name for item in fields(Lineage)]
    for name in facts:
        if name not in known:
            raise InputError(f"A lineage has no {name!r}. {nearest(name, known)}".rstrip())
    licences = facts.get("licences", {})
    counts = licences.items() if isinstance(licences, Mapping) else _rows(licences)
    return Lineage(**{**facts, "licences": _sums(counts)})


def _rows(table: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, int]]:
    return ((row["licence"], row["documents"]) for row in table)


def _sums(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for licence, documents in counts:
        name = licence.strip() or UNKNOWN
        sums[name] = sums.get(name, 0) + documents
    return dict(sorted(sums.items()))
