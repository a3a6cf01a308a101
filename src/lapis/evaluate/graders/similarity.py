"""How alike two texts are, from 0 to 1. Each measure names its source; docs/evaluate.md tells what is ours.

Words are runs of letters and digits, in small letters, for rouge and cosine (any script); bleu, gleu and meteor
take punctuation for words too and keep capitals.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

from lapis.errors import InputError

Metric = Literal[
    "cosine", "fuzzy_match", "bleu", "gleu", "meteor",
    "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
]  # fmt: skip
LENGTH = 100_000  # characters of either text: some measures take the product of both lengths
ORDER = 4  # longest n-grams of bleu and gleu
_PLAIN = re.compile(r"[^\W_]+")
_MARKED = re.compile(r"\w+|[^\w\s]")


def similarity(metric: Metric, text: str, reference: str) -> float:
    """How much a text is like its reference, in [0, 1]. Raises InputError beyond LENGTH."""
    longest = max(len(text), len(reference))
    if longest > LENGTH:
        raise InputError(f"{metric} compares texts of at most {LENGTH:,} characters; one has {longest:,}.")
    if metric == "fuzzy_match":
        return fuzzy_match(text, reference)
    words, right = (
        (_PLAIN, _PLAIN) if metric == "cosine" or metric.startswith("rouge") else (_MARKED, _MARKED)
    )
    if words is _PLAIN:
        text, reference = text.lower(), reference.lower()
    return METRICS[metric](words.findall(text), right.findall(reference))


def fuzzy_match(text: str, reference: str) -> float:
    """Normalized Indel similarity: 2 LCS / (lengths), over characters. RapidFuzz's `fuzz.ratio` / 100."""
    total = len(text) + len(reference)
    return 2 * common_length(text, reference) / total if total else 1.0


def common_length(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, with one bit of an integer for each place (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for number, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << number
    full = (1 << len(left)) - 1
    row = full
    for token in right:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(left) - row.bit_count()


def rouge(size: int) -> Callable[[Sequence[str], Sequence[str]], float]:
    """ROUGE-N (Lin 2004) as F1: n-grams in common, each as often as in both."""

    def measure(words: Sequence[str], reference: Sequence[str]) -> float:
        mine, right = grams(words, size), grams(reference, size)
        return _f1((mine & right).total(), mine.total(), right.total())

    return measure


def rouge_l(words: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004) as F1: the longest common subsequence of words, the whole text as one sentence."""
    return _f1(common_length(words, reference), len(words), len(reference))


def bleu(words: Sequence[str], reference: Sequence[str]) -> float:
    """BLEU (Papineni et al. 2002) of one sentence: n-grams up to 4, or as far as the text has words.

    The k-th order without a match counts 1 / 2^k of a match (NIST's smoothing, "exp" in sacreBLEU).
    """
    if not words:
        return float(not reference)
    halves, logs = 1.0, []
    for size in range(1, min(ORDER, len(words)) + 1):
        mine = grams(words, size)
        matches = (mine & grams(reference, size)).total()
        if not matches:
            halves /= 2
            if size == 1:
                return 0.0
        logs.append(math.log((matches or halves) / mine.total()))
    brevity = min(0.0, 1 - len(reference) / len(words))
    return math.exp(brevity + sum(logs) / len(logs))


def gleu(words: Sequence[str], reference: Sequence[str]) -> float:
    """Google's BLEU (Wu et al. 2016): of all n-grams up to 4, the smaller one of precision and recall."""
    mine = sum((grams(words, size) for size in range(1, ORDER + 1)), Counter())
    right = sum((grams(reference, size) for size in range(1, ORDER + 1)), Counter())
    most = max(mine.total(), right.total())
    return (mine & right).total() / most if most else 1.0


def meteor(words: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR (Banerjee & Lavie 2005) over equal words: 0.9 / 0.1 mean of recall and precision, less 0.5 (chunks /
    matches)^3. No stems and no synonyms, which would need an English dictionary.
    """
    words, reference = [word.lower() for word in words], [word.lower() for word in reference]
    pairs = _aligned(words, reference)
    if not pairs:
        return float(not words and not reference)
    precision, recall = len(pairs) / len(words), len(pairs) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    chunks = 1 + sum(
        after != (before[0] + 1, before[1] + 1) for before, after in zip(pairs, pairs[1:], strict=False)
    )
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def cosine(words: Sequence[str], reference: Sequence[str]) -> float:
    """Cosine of the angle between two vectors of word counts (Salton's vector space model)."""
    mine, right = Counter(words), Counter(reference)
    if not mine or not right:
        return float(not mine and not right)
    product = sum(count * right[word] for word, count in mine.items())
    return min(1.0, product / math.sqrt(_square(mine.values()) * _square(right.values())))


def grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """How often each run of so many words comes."""
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _aligned(words: Sequence[str], reference: Sequence[str]) -> list[tuple[int, int]]:
    """Places of equal words: from the end of the text, each takes the last one that is free in the reference."""
    free: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        free.setdefault(word, []).append(place)
    pairs = [
        (place, free[words[place]].pop()) for place in range(len(words) - 1, -1, -1) if free.get(words[place])
    ]
    return pairs[::-1]


def _f1(matches: int, mine: int, right: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is in common."""
    return 2 * matches / (mine + right) if matches else 0.0


def _square(counts: Iterable[int]) -> int:
    return sum(count * count for count in counts)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    "cosine": cosine,
    "rouge_l": rouge_l,
    **{f"rouge_{size}": rouge(size) for size in range(1, 6)},
}
