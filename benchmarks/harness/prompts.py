"""Prompts of an exact number of tokens, cut from real English text: the descriptions of installed packages.

No stretch of the text is used twice, so that no cache of prefixes can help any engine.
"""

from __future__ import annotations

import importlib.metadata

from lapis.tokenizer.bpe import Tokenizer


def descriptions() -> str:
    """The long descriptions of all installed packages, in the order of their names."""
    texts: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        body = package.metadata.json.get("description", "")
        texts[package.name.lower()] = body if isinstance(body, str) else ""
    return "\n\n".join(text for _, text in sorted(texts.items()) if text)


class Prompts:
    """Cuts prompts from one long text. When it is used up it starts again, with the cuts at other places."""

    def __init__(self, tokenizer: Tokenizer, text: str | None = None) -> None:
        self._ids = tokenizer.encode(descriptions() if text is None else text)
        self._place = 0
        self._rounds = 0

    def take(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` token ids each."""
        return [self._cut(length) for _ in range(count)]

    def _cut(self, length: int) -> list[int]:
        if self._place + length > len(self._ids):
            self._rounds += 1
            self._place = 37 * self._rounds
        start = self._place
        self._place += length
        return self._ids[start : start + length]
