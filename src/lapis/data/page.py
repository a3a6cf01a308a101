"""The page of a dataset: one HTML file without scripts, in which a person sees what was kept, dropped and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lapis.data.columns import Rows
from lapis.data.recipe import DataConfig
from lapis.data.remove import Removal, covered
from lapis.data.report import Step
from lapis.data.shards import Dataset
from lapis.data.training_texts import TrainingTexts
from lapis.data.verdicts import Decided
from lapis.storage import write_text

FILE = "report.html"
SAMPLES, SAMPLE_CHARS = 3, 600  # documents shown under each reason, and how much of each
CLUSTERS, MEMBERS, MEMBER_CHARS = 8, 4, 240
LENGTHS = tuple(1 << n for n in range(4, 21))  # upper borders of the histogram, in tokens
LANGUAGES = 30
NONE: Rows = np.empty(0, dtype=np.int64)
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Sample:
    """The beginning of a document, as it is shown."""

    label: str
    licence: str
    text: str


@dataclass(frozen=True)
class Reason:
    """Why documents were dropped, with some of them."""

    step: str
    reason: str
    documents: int
    samples: list[Sample]


@dataclass(frozen=True)
class Bar:
    """A row of a chart; `share` of the widest one, 0 to 1."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class Shown:
    """The documents as a page may show them."""

    texts: TrainingTexts
    removals: tuple[Removal, ...]

    def sample(self, row: int, chars: int) -> Sample | None:
        """The beginning of a document; None if it was removed."""
        document = self.texts.document(row)
        if covered(document, self.removals):
            return None
        text = document.text[:chars] + ("…" if len(document.text) > chars else "")
        return Sample(document.label, document.licence or "licence unknown", text)


def write_page(dataset: Dataset, decided: Decided, shown: Shown) -> None:
    """Write `report.html` into the folder of a dataset."""
    write_text(dataset.folder / FILE, page(dataset, decided, shown))


def shown_texts(texts: TrainingTexts, data: DataConfig) -> TrainingTexts:
    """The documents without personal data of any kind that the recipe masks or drops."""
    return replace(texts, kinds=(*data.pii.kinds("mask"), *data.pii.kinds("drop")))


def page(dataset: Dataset, decided: Decided, shown: Shown) -> str:
    """The page as HTML; text of documents is escaped."""
    manifest = dataset.manifest
    return str(
        template().render(
            digest=dataset.digest,
            manifest=manifest,
            licences=sorted(manifest["licences"], key=lambda row: -row["tokens"]),
            steps=dataset.report,
            funnel=funnel(dataset.report),
            lengths=length_bars(token_lengths(dataset)),
            languages=bars(languages(dataset.report)),
            kept=_samples(shown, decided.rows.get(("", ""), NONE)),
            reasons=dropped(decided, shown),
            clusters=[_members(shown, rows) for rows in decided.clusters[:CLUSTERS]],
            cluster_count=len(decided.clusters),
        )
    )


def funnel(steps: Sequence[Step]) -> list[tuple[Step, float]]:
    """Each step that documents pass, with the share of all text that leaves it."""
    passed = [step for step in steps if step.step not in ("list", "tokenizer")]
    most = max((step.bytes_in for step in passed), default=0) or 1
    return [(step, step.bytes_out / most) for step in passed]


def languages(steps: Sequence[Step]) -> list[tuple[str, int]]:
    """The commonest languages of what is trained on; none where they were not measured."""
    counted = next((step.notes for step in steps if step.step == "language"), {})
    return list(counted.items())[:LANGUAGES]


def dropped(decided: Decided, shown: Shown) -> list[Reason]:
    """Every reason that dropped documents, the commonest first."""
    found = [
        Reason(step, reason, len(rows), _samples(shown, rows))
        for (step, reason), rows in decided.rows.items()
        if step
    ]
    return sorted(found, key=lambda one: (-one.documents, one.step, one.reason))


def bars(counts: Sequence[tuple[str, int]]) -> list[Bar]:
    """Rows of a chart, as wide as their counts."""
    most = max((count for _, count in counts), default=0) or 1
    return [Bar(name, count, count / most) for name, count in counts]


def token_lengths(dataset: Dataset) -> np.ndarray[Any, Any]:
    """Tokens of each training document."""
    return np.diff(np.append(dataset.document_starts, dataset.tokens))


def length_bars(lengths: np.ndarray[Any, Any]) -> list[Bar]:
    """Documents by their tokens, in powers of two; empty ends are left out."""
    counts = np.bincount(np.searchsorted(LENGTHS, lengths), minlength=len(LENGTHS) + 1).tolist()
    names = [f"≤ {border:,}" for border in LENGTHS] + [f"> {LENGTHS[-1]:,}"]
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return []
    shown = slice(filled[0], filled[-1] + 1)
    return bars(list(zip(names[shown], counts[shown], strict=True)))


def _samples(shown: Shown, rows: Rows) -> list[Sample]:
    """Documents spread evenly over some rows, which lie in the order of digests: a random sample."""
    count = min(SAMPLES, len(rows))
    return _some(shown, rows[np.arange(count) * len(rows) // max(1, count)], SAMPLE_CHARS)


def _members(shown: Shown, rows: Rows) -> tuple[int, list[Sample]]:
    return len(rows), _some(shown, rows[:MEMBERS], MEMBER_CHARS)


def _some(shown: Shown, rows: Rows, chars: int) -> list[Sample]:
    return [one for row in rows.tolist() if (one := shown.sample(row, chars)) is not None]


@cache
def template() -> Any:
    """The page without a dataset, ready to be filled in."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
