"""Which documents are trained on, which are held out, and which are left out: by a rule, or as duplicates.

All of it is a pure function of the documents' content and attributes: no order of inputs, no number of workers
comes in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lapis.data.clusters import Sketches, close_to, near_duplicates, opened
from lapis.data.columns import Columns, Rows
from lapis.data.decide import Attributes, Cost, Rule, decide
from lapis.data.dedup import HASHES, exact_duplicates, shingle_sets
from lapis.data.documents import DocumentTable
from lapis.data.recipe import DedupConfig, HeldoutConfig
from lapis.data.report import EXAMPLES, Step
from lapis.data.verdicts import Verdicts
from lapis.data.workers import Room
from lapis.errors import InputError

ALONE = Room(1)


@dataclass(frozen=True)
class Means:
    """What deciding may use: processes, memory, and a folder for what is too large for it."""

    room: Room = ALONE
    folder: Path | None = None


@dataclass(frozen=True)
class Split:
    """Rows of the documents stage, both in the order of the documents' digests; rows of the report."""

    train: Rows
    heldout: Rows
    steps: list[Step]
    costs: list[Cost]
    verdicts: Verdicts
    sizes: NDArray[np.int64]  # bytes of all documents


def split_documents(
    attributes: Attributes,
    rows: Rows,
    rules: Sequence[Rule],
    dedup: DedupConfig,
    heldout: HeldoutConfig,
    steps: Sequence[Step] = (),
    means: Means = Means(),
) -> Split:
    """Apply the rules to some rows, remove duplicates, hold documents out; `steps` came before.

    Raises InputError if the text that is left is too little.
    """
    table = attributes["documents"]
    assert isinstance(table, DocumentTable)
    account = _Account(table, list(steps))
    if len(rows) < len(table):
        others = np.setdiff1d(np.arange(len(table)), rows)
        account.verdicts.drop("read", "beyond max_bytes", others)
    left, costs = _by_rules(attributes, rows, rules, account)
    if not len(left):
        reasons = [f"{step.step}: {step.top_reasons()}" for step in account.steps if step.reasons]
        raise InputError(
            f"No document is left of {steps[0].documents_in if steps else len(rows):,} files: "
            + "; ".join(reasons)
            + ".",
            hint="`--set data.filters.enabled=false` keeps what the quality rules drop.",
        )
    best, sketched = _without_duplicates(left, account, attributes["sketch"], dedup, means)
    train, held = _held_out(best, account, sketched, dedup.heldout_threshold, heldout)
    sketched.remove()
    return Split(train, held, account.steps, costs, account.verdicts, account.sizes)


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
    rows: Rows, account: _Account, sketches: Columns, dedup: DedupConfig, means: Means
) -> tuple[Rows, _Sketched]:
    with account.step("dedup", rows) as step:
        best = account.ordered(rows, survival=True)
        if dedup.exact:
            copies = exact_duplicates(account.table.fixed("normal")[best])
            best = account.drop_copies("exact duplicate", best, best[copies])
        sketched = _Sketched.of(best, sketches, means.folder)
        if dedup.near:
            shingles = _Shingles(account.table.folder)
            stands_for = near_duplicates(
                sketched.sketches,
                best,
                shingles,
                dedup.threshold,
                workers=means.room.workers,
                memory=means.room.tables,
            )
            best = account.drop_copies("near-duplicate", best, best[stands_for])
        account.close(step, best)
    return best, sketched


def duplicates(attributes: Attributes, rows: Rows, dedup: DedupConfig) -> Rows:
    """For each of some rows the one that stands for it among them: itself if it is no duplicate."""
    table = attributes["documents"]
    assert isinstance(table, DocumentTable)
    account = _Account(table, [])
    _without_duplicates(rows, account, attributes["sketch"], dedup, Means())
    survivor = account.verdicts.survivor[rows]
    return np.where(survivor < 0, rows, survivor)


@dataclass(frozen=True)
class _Sketched:
    """The sketches of some rows, in their order."""

    rows: Rows
    sketches: Sketches

    @staticmethod
    def of(rows: Rows, column: Columns, folder: Path | None) -> _Sketched:
        """Gathered in memory, or in a file of the folder."""
        shape = (len(rows), HASHES)
        if folder is None:
            found = np.empty(shape, dtype="<u4")
            column.gather("sketch", rows, found.view(np.uint8))
            return _Sketched(rows, found)
        path = folder / "sketches.npy"
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype="<u4", shape=shape)
        column.gather("sketch", rows, mapped.view(np.uint8))
        mapped.flush()
        return _Sketched(rows, path)

    def close_to(self, others: Rows, threshold: float) -> Rows:
        """Which of the rows are close to one of some others, which are among the rows."""
        among = np.flatnonzero(np.isin(self.rows, others))
        close = close_to(self.sketches, np.array(opened(self.sketches)[among]), threshold)
        found: Rows = self.rows[close]
        return found

    def remove(self) -> None:
        """Remove the file."""
        if isinstance(self.sketches, Path):
            self.sketches.unlink()


@dataclass(frozen=True)
class _Shingles:
    """Makes the shingles of rows again, from their texts on disk."""

    folder: Path

    def __call__(self, rows: Rows) -> list[NDArray[np.uint32]]:
        return shingle_sets(_table(self.folder).texts(rows))


@lru_cache(maxsize=1)
def _table(folder: Path) -> DocumentTable:
    return DocumentTable(folder)


def _held_out(
    rows: Rows, account: _Account, sketched: _Sketched, threshold: float, config: HeldoutConfig
) -> tuple[Rows, Rows]:
    verdicts, sizes = account.verdicts, account.sizes
    with account.step("split", rows) as step:
        ordered = account.ordered(rows)
        held = choose_heldout(ordered, sizes, config)
        rest = ordered[~np.isin(ordered, held)]
        close = np.isin(rest, sketched.close_to(held, threshold))
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
    for row in ordered:
        if held >= wanted:
            break
        if held + sizes[row] <= 2 * wanted:
            taken.append(int(row))
            held += int(sizes[row])
    return np.array(taken, dtype=np.int64)


class _Account:
    """The verdicts and rows of the report so far, and what documents are compared by, row by row."""

    def __init__(self, table: DocumentTable, steps: list[Step]) -> None:
        self.table, self.steps = table, steps
        self.verdicts = Verdicts.of(len(table))
        self.sizes = table.sizes()

    def ordered(self, rows: Rows, survival: bool = False) -> Rows:
        """Some rows in the order of their digests; for survival the priorities of their sources come first.

        Documents of one digest have one text; they come in the order of their sources and paths.
        """
        digests_R2 = self.table.digest_halves()[rows]
        priority_R = self.table.numbers("priority")[rows] if survival else np.zeros(len(rows), dtype=np.int32)
        order_R = np.lexsort((digests_R2[:, 1], digests_R2[:, 0], priority_R))
        rows, digests_R2, priority_R = rows[order_R], digests_R2[order_R], priority_R[order_R]
        same = np.all(digests_R2[1:] == digests_R2[:-1], axis=1) & (priority_R[1:] == priority_R[:-1])
        starts = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0) == 1)
        ends = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0) == -1) + 1
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            rows[start:end] = sorted(rows[start:end].tolist(), key=self.table.origin)
        return rows

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
        label = ": ".join(self.table.origin(row))
        return label if survivor < 0 else f"{label} = {': '.join(self.table.origin(survivor))}"


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
