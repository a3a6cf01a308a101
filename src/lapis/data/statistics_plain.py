"""The statistics of one text in plain Python: the meaning of each column, judge of the compiled code, its stand-in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from lapis.data.characters import CLOSER, LETTER, PLAIN, TERMINAL, UNSPACED, classes

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
SHORT_LINE, LONG_WORD, FEW_WORDS = 30, 1000, 3  # characters, characters, words

_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_C4_MARKS = (".", "?", "!", '"', "'")
_CITATIONS = re.compile(r"(?:\[[0-9]*]|\[edit]|\[citation needed])+\Z")
_UPPER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def statistics_of(text: str) -> list[int]:
    """The numbers in the order of `statistics.COLUMNS`."""
    words = text.split()
    lines = text.removesuffix("\n").split("\n") if text else []
    return [
        len(text),
        text.count("\n"),
        *_of_words(text, words),
        *_of_lines(lines),
        *_of_duplicates(text, lines),
        *_of_ngrams(words),
        *_of_c4(lines),
    ]


def _of_words(text: str, words: list[str]) -> list[int]:
    plain = [word for word in words if _has(word, PLAIN)]
    joined = "".join(words)
    return [
        len(words),
        len(plain),
        sum(map(len, plain)),
        max(map(len, words), default=0),
        sum(_has(word, LETTER) for word in words),
        len(STOP_WORDS.intersection(words)),
        text.count("#"),
        text.count("...") + text.count("…"),
        len(joined),
        _count(joined, LETTER),
        sum("0" <= character <= "9" for character in joined),
        _count(joined, UNSPACED),
    ]


def _of_lines(lines: list[str]) -> list[int]:
    filled = [line for line in lines if line.strip()]
    return [
        len(lines),
        sum(line.lstrip().startswith(BULLETS) for line in lines),
        sum(line.rstrip().endswith(ELLIPSES) for line in lines),
        len(filled),
        sum(_has(line[-1], TERMINAL) for line in filled),
        sum(len(line) <= SHORT_LINE for line in filled),
        max(map(len, lines), default=0),
    ]


def _of_duplicates(text: str, lines: list[str]) -> list[int]:
    pieces = re.split(r"\n+", text)
    again = _repeated(pieces)
    filled = _repeated([line for line in lines if line.strip()])
    paragraphs = re.split(r"\n{2,}", text.strip())
    paragraphs_again = _repeated(paragraphs)
    return [
        len(pieces),
        len(again),
        sum(map(len, again)),
        sum(map(len, filled)),
        len(paragraphs),
        len(paragraphs_again),
        sum(map(len, paragraphs_again)),
    ]


def _repeated(parts: list[str]) -> list[str]:
    """The parts that an earlier one equals; the first copy does not count."""
    met: set[str] = set()
    return [part for part in parts if part in met or met.add(part)]  # type: ignore[func-returns-value]


def _of_ngrams(words: list[str]) -> list[int]:
    return [*(_top(words, n) for n in range(2, 5)), *(_again(words, n) for n in range(5, 11))]


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def _top(words: list[str], n: int) -> int:
    """Characters of the commonest n-gram, its words joined by spaces, times its count; 0 if nothing occurs twice."""
    common = Counter(_ngrams(words, n)).most_common(1)
    if not common or common[0][1] == 1:
        return 0
    return len(" ".join(common[0][0])) * common[0][1]


def _again(words: list[str], n: int) -> int:
    """Characters of the words in n-grams that occurred before; behind such a one the search goes on."""
    end = list(accumulate(map(len, words), initial=0))
    met: set[tuple[str, ...]] = set()
    chars = at = 0
    grams = _ngrams(words, n)
    while at < len(grams):
        if grams[at] in met:
            chars += end[at + n] - end[at]
            at += n
        else:
            met.add(grams[at])
            at += 1
    return chars


def _of_c4(lines: list[str]) -> list[int]:
    strict, any_end = Counter[str](), Counter[str]()
    for line in map(str.strip, lines):
        for counts, must_end in ((strict, True), (any_end, False)):
            verdict = _c4_verdict(line, must_end)
            counts[verdict] += 1
            if verdict == "kept":
                counts["chars"] += len(line)
                counts["sentences"] += _sentences(line)
    kept = ("lorem ipsum", "curly", "kept", "chars", "sentences")
    dropped = ("long word", "unended", "few words", "javascript", "policy")
    return [strict[name] for name in (*dropped, *kept)] + [any_end[name] for name in kept]


def _c4_verdict(line: str, must_end: bool) -> str:
    words = line.split()
    lowered = line.translate(_UPPER)
    end = _CITATIONS.sub("", line)
    if any(len(word) > LONG_WORD for word in words):
        return "long word"
    if must_end and (not end.endswith(_C4_MARKS) or end.endswith("...")):
        return "unended"
    if len(words) < FEW_WORDS:
        return "few words"
    if "lorem ipsum" in lowered:
        return "lorem ipsum"
    if "javascript" in lowered:
        return "javascript"
    if "{" in line:
        return "curly"
    return "policy" if any(policy in lowered for policy in _POLICIES) else "kept"


def cut_lines(text: str, must_end: bool) -> str:
    """The lines of a text that C4's line rules keep; `must_end`: in a mark that ends sentences."""
    return "\n".join(line for line in text.split("\n") if _c4_verdict(line.strip(), must_end) == "kept")


def _sentences(line: str) -> int:
    """Sentences end behind a word's last mark, and behind a mark beyond ASCII inside a word: 。 needs no space."""
    words = line.split()
    inside = 0
    for word in words:
        ended = False
        for character in word:
            if _has(character, TERMINAL):
                ended = ended or character >= "\x80"
            elif not _has(character, CLOSER):
                inside += ended
                ended = False
    return 1 + inside + sum(_ends_sentence(word) for word in words[:-1])


def _ends_sentence(word: str) -> bool:
    at = len(word)
    while at and _has(word[at - 1], CLOSER):
        at -= 1
    return at > 0 and _has(word[at - 1], TERMINAL)


def _count(text: str, bits: int) -> int:
    table = classes()
    return sum(bool(table[ord(character)] & bits) for character in text)


def _has(characters: Sequence[str], bits: int) -> bool:
    table = classes()
    return any(table[ord(character)] & bits for character in characters)
