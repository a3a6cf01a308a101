"""What each step of the data path took in, let through and dropped, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lapis.storage import write_text

EXAMPLES = 5  # how many dropped documents are named for each reason


@dataclass
class Step:
    """One row of the report. Seconds are summed over workers; bytes are of text, or of files for `list`."""

    step: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    """Why documents were dropped, and how many."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first documents dropped for each reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to documents that stayed, and to how many."""

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Count dropped documents under a reason."""
        self.reasons[reason] = self.reasons.get(reason, 0) + count
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(example)

    def note(self, what: str, count: int = 1) -> None:
        """Count documents that something was done to."""
        self.notes[what] = self.notes.get(what, 0) + count

    def keep(self, size: int) -> None:
        """Count a document that goes on."""
        self.documents_out += 1
        self.bytes_out += size

    def add(self, other: Step) -> None:
        """Add the counts of another part of the same step."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.seconds += other.seconds
        for what, count in other.notes.items():
            self.note(what, count)
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
            named = self.examples.setdefault(reason, [])
            named.extend(other.examples.get(reason, [])[: EXAMPLES - len(named)])

    def top_reasons(self, count: int = 3) -> str:
        """The commonest reasons as one short text."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{reason} {number:,}" for reason, number in ordered[:count]]
        rest = len(ordered) - count
        return ", ".join([*shown, f"{rest} more"] if rest > 0 else shown)

    def plain(self) -> dict[str, Any]:
        """The row as JSON-ready values."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}

    @staticmethod
    def of(values: dict[str, Any]) -> Step:
        """The row that `plain` wrote."""
        return Step(**values)


def merged(steps: Iterable[Step]) -> list[Step]:
    """Rows of one step added together, in the order in which steps first appear."""
    result: dict[str, Step] = {}
    for step in steps:
        result.setdefault(step.step, Step(step.step)).add(step)
    return list(result.values())


def write_report(folder: Path, steps: Sequence[Step]) -> None:
    """Write the rows of a stage's report, and of those before it, into its folder."""
    rows = [step.plain() for step in steps]
    write_text(folder / "report.json", json.dumps(rows, indent=1, ensure_ascii=False))


def read_report(folder: Path) -> list[Step]:
    """The rows that `write_report` wrote."""
    return [Step.of(row) for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))]
