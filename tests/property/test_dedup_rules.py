"""Duplicates: who survives does not depend on the order in which documents come."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.data.dedup import content_digest, near_duplicates, sketches
from lapis.data.words import split_words
from tests.texts import changed, prose


def survivors(texts: list[str], seed: int) -> set[str]:
    texts = random.Random(seed).sample(texts, len(texts))  # arrives in any order
    texts.sort(key=content_digest)  # and is put into the order of survival
    stands_for = near_duplicates(sketches(split_words(texts), texts), 0.75)
    return {text for n, text in enumerate(texts) if stands_for[n] == n}


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_survivors_are_a_function_of_content(seed: int, count: int) -> None:
    bases = [prose(seed + n, 120) for n in range(count)]
    texts = bases + [changed(base, n, 0.04 * (n % 4)) for n, base in enumerate(bases)]
    first = survivors(list(dict.fromkeys(texts)), 1)
    assert first == survivors(list(dict.fromkeys(texts)), 2)
    assert len(first) >= count  # nothing unrelated is merged
