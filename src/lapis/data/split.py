"""Which documents are trained on, which are held out, and which are left out: by a rule, or as duplicates.

All of it is a pure function of the documents' content and attributes: no order of inputs, no number of workers
comes in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapis.data.columns import Rows
from lapis.data.decide import Attributes, Cost, Rule, Verdicts, decide
from lapis.data.dedup import close_to, near_duplicates
from lapis.data.documents import DocumentTable
from lapis.data.recipe import DedupConfig, HeldoutConfig
from lapis.data.report import EXAMPLES, Step
from lapis.errors import InputError


@dataclass(frozen=True)
class Split:
    """Rows of the documents stage, both in the order of the documents' digests; rows of the report."""

    train: Rows
    heldout: Rows
    steps: list[Step]
    costs: list[Cost]
    verdicts: Verdicts


def split_documents(
    attributes: Attributes,
    rows: Rows,
    rules: Sequence[Rule],
    dedup: DedupConfig,
    heldout: HeldoutConfig,
    steps: Sequence[Step] = (),
) -> Split:
    """Apply the rules to some rows, remove duplicates, hold documents out; `steps` came before.

    Raises InputError if the text that is left is too little.
    """
    table = attributes["documents"]
    assert isinstance(table, DocumentTable)
    account = _Account(table, list(steps))
    left, costs = _by_rules(attributes, rows, rules, account)
    if not len(left):
        reasons = [f"{step.step}: {step.top_reasons()}" for step in account.steps if step.reasons]
        raise InputError(
            f"No document is left of {steps[0].documents_in if steps else len(rows):,} files: "
            + "; ".join(reasons)
            + ".",
            hint="`--set data.filters.enabled=false` keeps what the quality rules drop.",
        )
    sketch_DH = attributes["sketch"].fixed("sketch").view("<u4")
    best = _without_duplicates(left, account, sketch_DH, dedup)
    train, held = _held_out(best, account, sketch_DH, dedup.heldout_threshold, heldout)
    return Split(train, held, account.steps, costs, account.verdicts)


def _by_rules(
    attributes: Attributes, rows: Rows, rules: Sequence[Rule], account: _Account
) -> tuple[Rows, list[Cost]]:
    costs: list[Cost] = []
    for name in dict.fromkeys(rule.step for rule in rules):
        with account.step(name, rows) as step:
            own = [rule for rule in rules if rule.step == name]
            rows, found = decide(own, attributes, rows, account.sizes, account.verdicts)
            costs.extend(found)
            account.close(step, rows)
    return rows, costs


def _without_duplicates(
    rows: Rows, account: _Account, sketch_DH: NDArray[np.uint32], dedup: DedupConfig
) -> Rows:
    with account.step("dedup", rows) as step:
        best = np.array(sorted(rows.tolist(), key=account.survival), dtype=np.int64)
        if dedup.exact:
            best = account.drop_copies("exact duplicate", best, account.first_copies(best))
        if dedup.near:
            stands_for = best[near_duplicates(sketch_DH[best], dedup.threshold)]
            best = account.drop_copies("near-duplicate", best, stands_for)
        account.close(step, best)
    return best


def _held_out(
    rows: Rows,
    account: _Account,
    sketch_DH: NDArray[np.uint32],
    threshold: float,
    config: HeldoutConfig,
) -> tuple[Rows, Rows]:
    verdicts, sizes = account.verdicts, account.sizes
    with account.step("split", rows) as step:
        ordered = np.array(sorted(rows.tolist(), key=account.order), dtype=np.int64)
        held = choose_heldout(ordered, sizes, config)
        rest = ordered[~np.isin(ordered, held)]
        close = close_to(sketch_DH[rest], sketch_DH[held], threshold)
        verdicts.drop("split", "close to a held-out document", rest[close])
        train = rest[~close]
        _check_enough(int(sizes[train].sum()), int(sizes[held].sum()), int(sizes[rest].sum()), config)
        step.note("held out", len(held))
        step.note("bytes held out", int(sizes[held].sum()))
        account.close(step, train)
        verdicts.drop("split", "held out", held)
    return train, held


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


class _Account:
    """The verdicts and rows of the report so far, and what documents are compared by, row by row."""

    def __init__(self, table: DocumentTable, steps: list[Step]) -> None:
        self.steps = steps
        self.verdicts = Verdicts.of(len(table))
        self.sizes = table.sizes()
        self._digest, self._normal = table.strings("digest"), table.strings("normal")
        self._source, self._path = table.strings("source"), table.strings("path")
        self._priority = table.numbers("priority").tolist()

    def order(self, row: int) -> tuple[object, ...]:
        return self._digest[row], self._source[row], self._path[row]

    def survival(self, row: int) -> tuple[object, ...]:
        return self._priority[row], *self.order(row)

    def first_copies(self, best: Rows) -> Rows:
        """For each row the first one of the same normal text."""
        seen: dict[object, int] = {}
        return np.array([seen.setdefault(self._normal[row], row) for row in best.tolist()], dtype=np.int64)

    def drop_copies(self, reason: str, best: Rows, stands_for: Rows) -> Rows:
        """Drop the rows that another one stands for, here and for their own copies; returns the others."""
        gone = stands_for != best
        own = np.arange(len(self.sizes), dtype=np.int64)
        own[best] = stands_for
        known = self.verdicts.survivor >= 0
        self.verdicts.survivor[known] = own[self.verdicts.survivor[known]]
        self.verdicts.drop("dedup", reason, best[gone], stands_for[gone])
        rest: Rows = best[~gone]
        return rest

    @contextmanager
    def step(self, name: str, rows: Rows) -> Iterator[Step]:
        """A row of the report for what happens to some documents now."""
        began = time.perf_counter()
        step = Step(name, documents_in=len(rows), bytes_in=int(self.sizes[rows].sum()))
        self.steps.append(step)
        yield step
        step.seconds = time.perf_counter() - began

    def close(self, step: Step, left: Rows) -> None:
        """Fill in what is left, and what the step dropped for which reason."""
        step.documents_out, step.bytes_out = len(left), int(self.sizes[left].sum())
        for code, (name, reason) in enumerate(self.verdicts.reasons):
            if name != step.step:
                continue
            dropped = np.flatnonzero(self.verdicts.code == code)
            for row in dropped[:EXAMPLES].tolist():
                step.drop(reason, self._example(row, int(self.verdicts.survivor[row])))
            if len(dropped) > EXAMPLES:
                step.reasons[reason] += len(dropped) - EXAMPLES

    def _example(self, row: int, survivor: int) -> str:
        return self._label(row) if survivor < 0 else f"{self._label(row)} = {self._label(survivor)}"

    def _label(self, row: int) -> str:
        return f"{self._source[row]}: {self._path[row]}"


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
