"""Duplicates: near ones are found, merely similar ones are not, and what survives depends on content alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lapis.data import clusters
from lapis.data.clusters import close_to, near_duplicates
from lapis.data.dedup import content_digest, exact_duplicates, normal_digest, shingle_sets, sketches
from lapis.data.words import split_words
from tests.texts import changed, prose

BASES = [prose(n, 400) for n in range(30)]


def sketched(texts: list[str]) -> np.ndarray:
    return sketches(split_words(texts), texts)


@dataclass(frozen=True)
class Shingled:
    texts: list[str]

    def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
        return shingle_sets([self.texts[row] for row in rows.tolist()])


def stand_for(texts: list[str], threshold: float = 0.75) -> np.ndarray:
    return near_duplicates(sketched(texts), np.arange(len(texts)), Shingled(texts), threshold)


def stand_for_sketches(sketch: np.ndarray) -> np.ndarray:
    return near_duplicates(sketch, np.arange(len(sketch)), Shingled([]), 0.75)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", " ").split()
    return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def test_the_sketch_estimates_the_jaccard_similarity() -> None:
    pairs = [(base, changed(base, n, part)) for n, base in enumerate(BASES) for part in (0.05, 0.2, 0.4)]
    a, b = sketched([pair[0] for pair in pairs]), sketched([pair[1] for pair in pairs])
    errors = np.mean(a == b, axis=1) - np.array([jaccard(*pair) for pair in pairs])
    assert abs(errors.mean()) < 0.02  # unbiased
    assert errors.std() < 0.06  # 112 hashes: sqrt(0.25 / 112) = 0.047


def test_near_duplicates_are_found_and_loosely_similar_texts_are_not() -> None:
    near = [changed(base, n, 0.05) for n, base in enumerate(BASES)]
    loose = [changed(base, n, 0.3) for n, base in enumerate(BASES)]
    assert min(jaccard(*pair) for pair in zip(BASES, near, strict=True)) > 0.8
    assert max(jaccard(*pair) for pair in zip(BASES, loose, strict=True)) < 0.65
    stands_for = stand_for([*BASES, *near, *loose])
    assert stands_for[30:60].tolist() == list(range(30))
    assert stands_for[60:].tolist() == list(range(60, 90))


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    chain = [BASES[0]]
    for n in range(4):
        chain.append(changed(chain[-1], n, 0.06))
    assert stand_for([BASES[1], *chain]).tolist() == [0, 1, 1, 1, 1, 1]


def test_a_bucket_of_many_copies_is_one_cluster() -> None:
    copies = [BASES[0]] * 300
    assert stand_for([*copies, BASES[1]]).tolist() == [0] * 300 + [300]


def test_short_texts_are_alike_only_when_they_are_equal() -> None:
    texts = ["one two", "one two three", "one two", "!!!", "???", "", "东京", "东京都"]
    stands_for = stand_for(texts)
    assert stands_for.tolist() == [0, 1, 0, 3, 4, 5, 6, 7]


def test_a_sketch_does_not_depend_on_the_texts_around_it() -> None:
    alone = np.concatenate([sketched([text]) for text in BASES])
    assert np.array_equal(alone, sketched(BASES))
    assert np.array_equal(alone, sketched(BASES[::-1])[::-1])


def test_texts_close_to_held_out_ones_are_found_at_the_looser_threshold() -> None:
    held = sketched(BASES[:5])
    others = [changed(BASES[n], n, 0.15) for n in range(5)] + BASES[5:]
    assert close_to(sketched(others), held, 0.5).tolist() == [True] * 5 + [False] * 25


def test_words_of_scripts_without_spaces_are_characters() -> None:
    words = split_words(["Hello, wörld_1!", "東京タワー", "ไทย ok", "😀😀a"])
    assert np.diff(words.first_D1).tolist() == [2, 5, 4, 3]


def test_a_word_has_one_hash_wherever_it_stands() -> None:
    words = split_words(["alpha beta", "x" * 1000 + " beta ALPHA"])
    a, b = words.hash_W[:2], words.hash_W[2:]
    assert a[0] == b[2]
    assert a[1] == b[1]
    assert len(set(words.hash_W.tolist())) == 3


def test_exact_copies_differ_in_white_space_only() -> None:
    assert normal_digest("a  b\n\nc ") == normal_digest("a b c")
    assert normal_digest("a b c") != normal_digest("a b C")
    assert content_digest("a b") != content_digest("a  b")


@pytest.mark.parametrize("threshold", [0.5, 0.75, 1.0])
def test_no_documents_give_no_clusters(threshold: float) -> None:
    assert stand_for([], threshold).tolist() == []


def test_between_sure_and_impossible_the_shingles_themselves_decide() -> None:
    pairs = [(base, changed(base, n, 0.12 + n / 1000)) for n, base in enumerate(BASES)]
    truth = [jaccard(*pair) >= 0.75 for pair in pairs]
    assert 5 < sum(truth) < 25  # on both sides, where the sketches alone go wrong
    flat = [text for pair in pairs for text in pair]
    joined = stand_for(flat)[1::2] == np.arange(0, len(flat), 2)
    assert joined.tolist() == truth
    sketch = sketched(flat)
    assert (np.mean(sketch[::2] == sketch[1::2], axis=1) >= 0.75).tolist() != truth


def test_clusters_do_not_depend_on_workers_memory_or_where_the_sketches_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*BASES, *(changed(base, n, 0.02 * (n % 10)) for n, base in enumerate(BASES))]
    sketch, rows = sketched(texts), np.arange(len(texts))
    np.save(tmp_path / "sketches.npy", sketch)
    first = near_duplicates(sketch, rows, Shingled(texts), 0.75)
    little = near_duplicates(sketch, rows, Shingled(texts), 0.75, memory=200)
    monkeypatch.setattr(clusters, "WORTH_WORKERS", 0)
    shared = near_duplicates(tmp_path / "sketches.npy", rows, Shingled(texts), 0.75, workers=2)
    assert first.tolist() == little.tolist() == shared.tolist()
    assert len(set(first.tolist())) < len(texts)


def test_a_large_bucket_of_several_clusters_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "WHOLE_BUCKET", 4)
    sketch = np.random.default_rng(0).integers(0, 1 << 32, (3, 112), dtype=np.uint32)
    sketch[:, : clusters.ROWS] = 7  # one bucket for all
    many = np.repeat(sketch, 20, axis=0)
    assert stand_for_sketches(many).tolist() == [0] * 20 + [20] * 20 + [40] * 20


def test_the_first_of_equal_digests_stands_for_all() -> None:
    digests = np.frombuffer(b"".join(content_digest(text) for text in "abcabxa"), dtype=np.uint8)
    assert exact_duplicates(digests.reshape(-1, 16)).tolist() == [0, 1, 2, 0, 1, 5, 0]
