"""Text repair and the quality rules: what is wrong with a document, as one short reason, or nothing.

Each rule is a line that compares one measure with one limit of the recipe; the first that is broken gives the
reason under which the document is counted. Words of the prose rules are what white space separates; repeated
n-grams are counted over `words.SPLITTER`.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis.data.document import Kind
from lapis.data.recipe import CodeRules, FilterConfig, ProseRules
from lapis.data.words import Words, ngrams

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "‣", "●", "- ", "* ")
GENERATED = re.compile(
    r"@generated|auto(?:matically|-|\s)?\s?generated|machine.generated|do not (?:edit|modify)"
    r"|\b(?:file|code|module|codec)\b.{0,20}\bgenerated (?:by|from|with)\b",
    re.IGNORECASE,
)

REASONS = (  # all that `fault` and `repetition_fault` say, in the order in which they look
    "too short",
    "a line too long",
    "lines too long",
    "generated",
    "too few letters",
    "mostly numbers",
    "too few words",
    "mean word length",
    "a word too long",
    "too many hash signs",
    "too many ellipses",
    "too few words with letters",
    "too few stop words",
    "too many bullets",
    "too many lines end in an ellipsis",
    "repeated lines",
    "repeated paragraphs",
    "one phrase again and again",
    "repeated phrases",
)

_NEWLINES = re.compile(r"\r\n?|[\u0085\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPHS = re.compile(r"\n{2,}")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff]")


def repair(text: str) -> str:
    """The same text with `\\n` line ends, without byte-order mark and control characters, in Unicode NFC."""
    text = text.removeprefix("\ufeff")
    if not text.isascii() or "\r" in text:
        text = _NEWLINES.sub("\n", text)
    text = _CONTROL.sub("", text.replace("\f", "\n"))
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


def fault(text: str, kind: Kind, rules: FilterConfig) -> str:
    """The reason to drop a repaired text by its own measures, or "" to keep it."""
    if not text.strip():
        return "empty"
    if not rules.enabled:
        return ""
    return _code_fault(text, rules.code) if kind == "code" else _prose_fault(text, rules.prose)


def repetition_fault(words: Words, document: int, size: int, rules: ProseRules) -> str:
    """The reason to drop one document of a chunk for repeated n-grams, or "". `size` is its bytes.

    Not for scripts without spaces: their words here are characters, five of which recur in any text.
    """
    part = slice(words.first_D1[document], words.first_D1[document + 1])
    hash_W, start_W, end_W = words.hash_W[part], words.start_W[part], words.end_W[part]
    if rules.max_top_ngram and _top_ngram(hash_W, start_W, end_W, size, rules.max_top_ngram):
        return "one phrase again and again"
    if rules.max_duplicate_ngram and _duplicate_ngrams(
        hash_W, start_W, end_W, size, rules.max_duplicate_ngram
    ):
        return "repeated phrases"
    return ""


class _WordCounts(NamedTuple):
    words: int
    chars: int
    longest: int
    lettered: int  # words with at least one letter


def _prose_fault(text: str, rules: ProseRules) -> str:
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    return (
        (_word_fault(text, rules) if has_spaces(text) else "")
        or _line_fault(lines, rules)
        or _duplicate_fault(text, lines, rules)
    )


def _word_fault(text: str, rules: ProseRules) -> str:
    counts = _ascii_word_counts(text) if text.isascii() else _word_counts(text)
    if counts.words < rules.min_words:
        return "too few words"
    if not rules.mean_word[0] <= counts.chars / counts.words <= rules.mean_word[1]:
        return "mean word length"
    if counts.longest > rules.max_word:
        return "a word too long"
    if text.count("#") / counts.words > rules.max_symbols:
        return "too many hash signs"
    if (text.count("...") + text.count("…")) / counts.words > rules.max_symbols:
        return "too many ellipses"
    if counts.lettered / counts.words < rules.min_alphabetic:
        return "too few words with letters"
    if rules.min_stop_words and len(STOP_WORDS.intersection(text.split())) < rules.min_stop_words:
        return "too few stop words"
    return ""


def _word_counts(text: str) -> _WordCounts:
    words = text.split()
    lettered = sum(1 for word in words if word.isalpha() or _LETTER.search(word))
    return _WordCounts(len(words), sum(map(len, words)), max(map(len, words)), lettered)


def _ascii_word_counts(text: str) -> _WordCounts:
    """The same, several times faster, for ASCII text."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    edges = np.flatnonzero(np.diff(np.r_[True, data <= 0x20, True]))
    starts, ends = edges[::2], edges[1::2]
    letter = ((data | 0x20) >= 0x61) & ((data | 0x20) <= 0x7A)
    lettered = np.add.reduceat(letter, starts, dtype=np.int32)
    lengths = ends - starts
    return _WordCounts(len(starts), int(lengths.sum()), int(lengths.max()), int(np.count_nonzero(lettered)))


def _line_fault(lines: list[str], rules: ProseRules) -> str:
    if sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines) > rules.max_bullets:
        return "too many bullets"
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if ellipses / len(lines) > rules.max_ellipses:
        return "too many lines end in an ellipsis"
    return ""


def _duplicate_fault(text: str, lines: list[str], rules: ProseRules) -> str:
    repeated = _repeated(lines)
    if len(repeated) / len(lines) > rules.max_duplicate_lines:
        return "repeated lines"
    if sum(map(len, repeated)) / len(text) > rules.max_duplicate_line_chars:
        return "repeated lines"
    if not repeated:
        return ""  # without a repeated line there is no repeated paragraph
    paragraphs = [part for part in _PARAGRAPHS.split(text) if part.strip()]
    again = _repeated(paragraphs)
    if len(again) / len(paragraphs) > rules.max_duplicate_lines:
        return "repeated paragraphs"
    if sum(map(len, again)) / len(text) > rules.max_duplicate_line_chars:
        return "repeated paragraphs"
    return ""


def _repeated(parts: list[str]) -> list[str]:
    """The parts that an earlier one equals; the first copy does not count."""
    if len(set(parts)) == len(parts):
        return []
    ordered = sorted(parts)
    return [part for before, part in pairwise(ordered) if part == before]


def _code_fault(text: str, rules: CodeRules) -> str:
    if len(text) < rules.min_chars:
        return "too short"
    lines = text.split("\n")
    if max(map(len, lines)) > rules.max_line:
        return "a line too long"
    if len(text) / len(lines) > rules.max_mean_line:
        return "lines too long"
    if not rules.generated and GENERATED.search("\n".join(lines[:10])):
        return "generated"
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    digits = int(np.count_nonzero((data >= 0x30) & (data <= 0x39)))
    letters = int(np.count_nonzero(((data | 0x20) >= 0x61) & ((data | 0x20) <= 0x7A) | (data >= 0xC0)))
    blanks = int(np.count_nonzero(data <= 0x20))
    if (letters + digits) / len(text) < rules.min_alphanumeric:
        return "too few letters"
    if digits / max(1, len(data) - blanks) > rules.max_digits:
        return "mostly numbers"
    return ""


def has_spaces(text: str) -> bool:
    """Whether the text's scripts separate words by spaces, so that rules on words mean something."""
    if text.isascii():
        return True
    return len(_NO_SPACES.findall(text)) < 0.2 * len(text)


def _top_ngram(
    hash_W: NDArray[np.uint64],
    start_W: NDArray[np.int64],
    end_W: NDArray[np.int64],
    size: int,
    limits: tuple[float, ...],
) -> bool:
    """Whether the commonest 2-gram (3-gram, …), its length times its count, takes more than its limit."""
    widest = len(limits) + 1
    most = 0
    for n, limit in enumerate(limits, start=2):
        if len(hash_W) < n:
            return False
        if n > 2 and most * _longest(start_W, end_W, widest) <= min(limits) * size:
            return False  # a longer n-gram is never commoner than the 2-gram inside it
        grams = ngrams(hash_W, n)
        sorted_ = np.sort(grams)
        borders = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1], True])
        counts = np.diff(borders)
        most = int(counts.max())
        if most == 1:
            return False  # what occurs once is no repetition, however short the text
        # Of equally common n-grams the longest counts, so that the answer has no hash in it.
        common = np.isin(grams, sorted_[borders[:-1][counts == most]])
        length = int((end_W[n - 1 :] - start_W[: len(grams)])[common].max())
        if most * length > limit * size:
            return True
    return False


def _longest(start_W: NDArray[np.int64], end_W: NDArray[np.int64], n: int) -> int:
    n = min(n, len(start_W))
    return int((end_W[n - 1 :] - start_W[: len(start_W) - n + 1]).max())


def _duplicate_ngrams(
    hash_W: NDArray[np.uint64],
    start_W: NDArray[np.int64],
    end_W: NDArray[np.int64],
    size: int,
    limits: tuple[float, ...],
) -> bool:
    """Whether words inside 5-grams (6-grams, …) seen before take more than their limit of the text."""
    length_W = end_W - start_W
    for n, limit in enumerate(limits, start=5):
        again = _seen_before(ngrams(hash_W, n))
        if not again.size:
            return False  # no repeated 5-gram, so no repeated 6-gram either
        covered_W = np.zeros(len(hash_W) + 1, dtype=np.int32)
        np.add.at(covered_W, again, 1)
        np.add.at(covered_W, again + n, -1)
        inside = int(length_W[np.cumsum(covered_W[:-1]) > 0].sum())
        if inside > limit * size:
            return True
        if inside <= min(limits) * size:
            return False  # longer n-grams cover less
    return False


def _seen_before(grams: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Places of the n-grams that an earlier one equals."""
    if grams.size < 2:
        return np.empty(0, dtype=np.int64)
    order = np.argsort(grams)
    sorted_ = grams[order]
    begins = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]])
    if begins.size == grams.size:
        return np.empty(0, dtype=np.int64)
    first = np.minimum.reduceat(order, begins)
    is_first = np.zeros(grams.size, dtype=bool)
    is_first[first] = True
    return np.flatnonzero(~is_first)
