"""The verdict on documents: all quality rules together, over a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lapis.data.document import Document
from lapis.data.filters import fault, has_spaces, repetition_fault
from lapis.data.recipe import FilterConfig
from lapis.data.words import split_words


def judge(documents: Sequence[Document], rules: FilterConfig) -> list[str]:
    """For each repaired document of one chunk the reason to drop it, or ""."""
    reasons = [fault(document.text, document.kind, rules) for document in documents]
    again = [
        n
        for n, document in enumerate(documents)
        if not reasons[n] and document.kind == "prose" and has_spaces(document.text)
    ]
    if again and rules.enabled:
        words = split_words([documents[n].text for n in again])
        for place, n in enumerate(again):
            reasons[n] = repetition_fault(words, place, len(documents[n].text.encode()), rules.prose)
    return reasons
