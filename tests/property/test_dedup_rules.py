"""Duplicates: who survives does not depend on the order in which documents come."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.data.clusters import near_duplicates
from lapis.data.dedup import content_digest, shingle_sets, sketches
from lapis.data.native import native
from lapis.data.words import split_words
from tests.texts import changed, prose


def clusters_of(texts: list[str]) -> np.ndarray:
    def shingled(rows: np.ndarray) -> list[np.ndarray]:
        return shingle_sets([texts[row] for row in rows.tolist()])

    sketched = sketches(split_words(texts), texts)
    return near_duplicates(sketched, np.arange(len(texts)), shingled, 0.75)


def survivors(texts: list[str], seed: int) -> set[str]:
    texts = random.Random(seed).sample(texts, len(texts))  # arrives in any order
    texts.sort(key=content_digest)  # and is put into the order of survival
    stands_for = clusters_of(texts)
    return {text for n, text in enumerate(texts) if stands_for[n] == n}


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_survivors_are_a_function_of_content(seed: int, count: int) -> None:
    bases = [prose(seed + n, 120) for n in range(count)]
    texts = bases + [changed(base, n, 0.04 * (n % 4)) for n, base in enumerate(bases)]
    first = survivors(list(dict.fromkeys(texts)), 1)
    assert first == survivors(list(dict.fromkeys(texts)), 2)
    assert len(first) >= count  # nothing unrelated is merged


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=30))
def test_clusters_are_the_components_of_the_pairs_that_reach_the_threshold(
    made: list[tuple[int, int]],
) -> None:
    bases = [prose(n, 60) for n in range(5)]
    texts = [changed(bases[base], part, part / 100) for base, part in made]
    sets = [set(found.tolist()) for found in shingle_sets(texts)]
    stands_for = list(range(len(texts)))
    for a in range(len(texts)):
        for b in range(a):
            if len(sets[a] & sets[b]) >= 0.75 * len(sets[a] | sets[b]):
                best, worse = sorted((stands_for[a], stands_for[b]))
                stands_for = [best if root == worse else root for root in stands_for]
    found = clusters_of(texts).tolist()
    wrong = sum(mine != true for mine, true in zip(found, stands_for, strict=True))
    assert wrong <= len(texts) // 20  # a pair just above the threshold shares no band once in 300


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
MIXED = st.text(st.sampled_from("aZ9_ .\n\té東京ไทยລາວ한글😀"), max_size=60)


@settings(max_examples=200)
@given(st.lists(TEXT | MIXED, min_size=1, max_size=6))
def test_compiled_sketches_are_those_of_numpy(texts: list[str]) -> None:
    if native() is None:
        pytest.skip("the compiled part is not built")
    compiled = sketches(split_words(texts), texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lapis.data.dedup.native", lambda: None)
        assert np.array_equal(sketches(split_words(texts), texts), compiled)
