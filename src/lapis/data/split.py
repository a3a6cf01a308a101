"""Which documents are trained on, which are held out, and which are left out as duplicates.

All of it is a pure function of the documents' content: no order of inputs, no number of workers comes in.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapis.data.clean import CleanTable
from lapis.data.dedup import close_to, near_duplicates
from lapis.data.recipe import DedupConfig, HeldoutConfig
from lapis.data.report import Step
from lapis.errors import InputError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Rows of the clean table, both in the order of the documents' digests, and two rows of the report."""

    train: Rows
    heldout: Rows
    steps: tuple[Step, Step]


def split_documents(table: CleanTable, rows: Rows, dedup: DedupConfig, heldout: HeldoutConfig) -> Split:
    """Remove duplicates among some rows, hold documents out. Raises InputError if the text is too little."""
    began = time.perf_counter()
    sizes = table.sizes()
    facts = _Facts(table)
    first = Step("dedup", documents_in=len(rows), bytes_in=int(sizes[rows].sum()))
    best = np.array(sorted(rows.tolist(), key=facts.survival), dtype=np.int64)
    best = _without_exact(best, facts, first) if dedup.exact else best
    sketch_DH = table.fixed("sketch").view("<u4")
    best = _without_near(best, facts, sketch_DH, dedup.threshold, first) if dedup.near else best
    first.documents_out, first.bytes_out = len(best), int(sizes[best].sum())
    first.seconds = time.perf_counter() - began

    began = time.perf_counter()
    second = Step("split", documents_in=len(best), bytes_in=first.bytes_out)
    ordered = np.array(sorted(best.tolist(), key=facts.order), dtype=np.int64)
    held = choose_heldout(ordered, sizes, heldout)
    rest = ordered[~np.isin(ordered, held)]
    close = close_to(sketch_DH[rest], sketch_DH[held], dedup.heldout_threshold)
    for row in rest[close].tolist():
        second.drop("close to a held-out document", facts.label(row))
    train = rest[~close]
    _check_enough(int(sizes[train].sum()), int(sizes[held].sum()), int(sizes[rest].sum()), heldout)
    second.note("held out", len(held))
    second.note("bytes held out", int(sizes[held].sum()))
    second.documents_out, second.bytes_out = len(train), int(sizes[train].sum())
    second.seconds = time.perf_counter() - began
    return Split(train, held, (first, second))


def choose_heldout(ordered: Rows, sizes: NDArray[np.int64], config: HeldoutConfig) -> Rows:
    """The first documents in the order of digests, until there are enough bytes of them.

    A document that alone would more than double the wanted size is passed over.
    """
    total = int(sizes[ordered].sum())
    wanted = min(max(int(config.fraction * total), config.min_bytes), config.max_bytes)
    taken: list[int] = []
    held = 0
    for row in ordered.tolist():
        if held >= wanted:
            break
        if held + sizes[row] <= 2 * wanted:
            taken.append(row)
            held += int(sizes[row])
    return np.array(taken, dtype=np.int64)


class _Facts:
    """What documents are compared by, row by row."""

    def __init__(self, table: CleanTable) -> None:
        self._digest, self._normal = table.strings("digest"), table.strings("normal")
        self._source, self._path = table.strings("source"), table.strings("path")
        self._priority = table.numbers("priority").tolist()

    def order(self, row: int) -> tuple[object, ...]:
        return self._digest[row], self._source[row], self._path[row]

    def survival(self, row: int) -> tuple[object, ...]:
        return self._priority[row], *self.order(row)

    def normal(self, row: int) -> object:
        return self._normal[row]

    def label(self, row: int) -> str:
        return f"{self._source[row]}: {self._path[row]}"


def _without_exact(best: Rows, facts: _Facts, step: Step) -> Rows:
    seen: dict[object, int] = {}
    for row in best.tolist():
        kept = seen.setdefault(facts.normal(row), row)
        if kept != row:
            step.drop("exact duplicate", f"{facts.label(row)} = {facts.label(kept)}")
    return np.array(list(seen.values()), dtype=np.int64)


def _without_near(
    best: Rows, facts: _Facts, sketch_DH: NDArray[np.uint32], threshold: float, step: Step
) -> Rows:
    stands_for = near_duplicates(sketch_DH[best], threshold)
    alone: NDArray[np.bool_] = stands_for == np.arange(len(best))
    for row, kept in zip(best[~alone].tolist(), best[stands_for[~alone]].tolist(), strict=True):
        step.drop("near-duplicate", f"{facts.label(row)} ~ {facts.label(kept)}")
    survivors: Rows = best[alone]
    return survivors


def _check_enough(train: int, held: int, rest: int, config: HeldoutConfig) -> None:
    if held >= config.min_bytes and train >= config.min_bytes:
        return
    close = f", and {rest - train:,} too close to them" if rest > train else ""
    raise InputError(
        f"There is too little text: {held + rest:,} bytes are left after cleaning, {held:,} of them held out"
        f"{close}; at least {config.min_bytes:,} bytes are needed to hold out and as many to train on, "
        f"in documents of their own.",
        hint="Add text, or lower data.heldout.min_bytes.",
    )
