"""The quality rules on whole chunks: what each document is dropped for, as an attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from lapis.data.annotate import Chunk
from lapis.data.columns import Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.document import Document
from lapis.data.filters import REASONS, fault, has_spaces, repetition_fault
from lapis.data.recipe import FilterConfig
from lapis.data.words import SPLITTER, Words, split_words


@dataclass(frozen=True)
class QualityAnnotator:
    """Writes `reason`: the first quality rule that a document breaks, or nothing."""

    rules: FilterConfig
    name: str = "quality"
    version: int = 1

    @property
    def schema(self) -> pa.Schema:
        """One column of text."""
        return pa.schema([("reason", pa.string())])

    def facts(self) -> dict[str, Any]:
        """The limits and the splitter."""
        return {"rules": self.rules.model_dump(mode="json"), "splitter": SPLITTER}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The reasons of a chunk."""
        return pa.RecordBatch.from_pydict(
            {"reason": judge(chunk.documents, self.rules, chunk.words)}, schema=self.schema
        )


def quality_rules(config: FilterConfig) -> list[Rule]:
    """A rule for each reason that the annotator can give."""
    if not config.enabled:
        return []
    return [Rule("quality", reason, partial(_has_reason, reason)) for reason in REASONS]


def _has_reason(reason: str, attributes: Attributes) -> Mask:
    return attributes["quality"].equal("reason", reason)


def judge(documents: Sequence[Document], rules: FilterConfig, words: Words | None = None) -> list[str]:
    """For each repaired document of one chunk the reason to drop it, or "". `words` are theirs."""
    reasons = [fault(document.text, document.kind, rules) for document in documents]
    again = [
        n
        for n, document in enumerate(documents)
        if not reasons[n] and document.kind == "prose" and has_spaces(document.text)
    ]
    if again and rules.enabled:
        words = words or split_words([document.text for document in documents])
        for n in again:
            reasons[n] = repetition_fault(words, n, len(documents[n].text.encode()), rules.prose)
    return reasons
