"""Text repair: what every document goes through before anything is measured."""

from __future__ import annotations

import re
import unicodedata

_NEWLINES = re.compile(r"\r\n?|[\u0085\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


def repair(text: str) -> str:
    """The same text with `\\n` line ends, without byte-order mark and control characters, in Unicode NFC."""
    text = text.removeprefix("\ufeff")
    if not text.isascii() or "\r" in text:
        text = _NEWLINES.sub("\n", text)
    text = _CONTROL.sub("", text.replace("\f", "\n"))
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)
