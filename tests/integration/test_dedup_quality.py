"""Near-duplicates in real text, beside brute force: pairs of pages from two versions of the same packages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lapis.data.clusters import near_duplicates
from lapis.data.dedup import content_digest, normal_digest, shingle_sets, sketches
from lapis.data.words import split_words

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus.parquet"
VERSIONS = ["linux-doc-6.1", "linux-doc-6.12", "libstdc++-doc-11", "libstdc++-doc-12"]
VERSIONS += ["libboost-doc-1.74", "libboost-doc-1.81", "libboost-dev-1.74", "libboost-dev-1.81"]

pytestmark = pytest.mark.skipif(not CORPUS.exists(), reason=f"needs {CORPUS.name} beside the checkout")


def natural_documents(count: int) -> list[str]:
    """Different documents of two versions, those that both have first, in the order of survival."""
    import pyarrow as pa
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    table = parquet.read_table(CORPUS, columns=["text", "source", "path"])
    table = table.filter(compute.is_in(table["source"], pa.array(VERSIONS)))
    groups: dict[str, dict[bytes, str]] = {}
    for text, path in zip(table["text"].to_pylist(), table["path"].to_pylist(), strict=True):
        place = re.sub(r"\d+(\.\d+)+|gcc-\d+", "#", path)
        groups.setdefault(place, {}).setdefault(normal_digest(text), text)
    different: dict[bytes, str] = {}
    for group in sorted(groups.values(), key=len, reverse=True):  # stable: the corpus's own order
        different |= group
    return sorted(list(different.values())[:count], key=content_digest)


@dataclass(frozen=True)
class Judged:
    """Documents, their clusters, and the pairs whose true similarity is at least 0.7."""

    texts: list[str]

    @cached_property
    def truth(self) -> dict[tuple[int, int], float]:
        """Every pair compared, on shingles that share no code with the sketches'."""
        sets = []
        for text in self.texts:
            words = re.findall(r"\w+", text.lower())
            sets.append({tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))})
        sizes = [len(one) for one in sets]
        found = {}
        for a, b in combinations(range(len(sets)), 2):
            if min(sizes[a], sizes[b]) >= 0.7 * max(sizes[a], sizes[b]):  # else it cannot reach 0.7
                both = len(sets[a] & sets[b])
                found[a, b] = both / (sizes[a] + sizes[b] - both)
        return {pair: value for pair, value in found.items() if value >= 0.7}

    @cached_property
    def stands_for(self) -> list[int]:
        """What the product says."""
        sketched = np.concatenate([sketches(split_words([text]), [text]) for text in self.texts])
        rows = np.arange(len(self.texts))
        found = near_duplicates(sketched, rows, self, 0.75)
        return [int(root) for root in found]

    def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
        return shingle_sets([self.texts[row] for row in rows.tolist()])

    def recall(self) -> float:
        """Of the pairs at 0.8 or more: how many are in one cluster, so that at most one of them stays."""
        wanted = [pair for pair, value in self.truth.items() if value >= 0.8]
        assert len(wanted) >= 20
        return sum(self.stands_for[a] == self.stands_for[b] for a, b in wanted) / len(wanted)

    def precision(self) -> float:
        """Of the removed documents: how many have a neighbour at 0.7 or more in their cluster."""
        removed = {n for n, root in enumerate(self.stands_for) if root != n}
        right = {
            n for pair in self.truth for n in pair if self.stands_for[pair[0]] == self.stands_for[pair[1]]
        }
        return len(removed & right) / len(removed)


def test_near_duplicates_of_real_text_are_found_and_others_left() -> None:
    judged = Judged(natural_documents(300))
    assert judged.recall() >= 0.99
    assert judged.precision() >= 0.98


@pytest.mark.long
def test_near_duplicates_of_2400_natural_documents() -> None:
    judged = Judged(natural_documents(2400))
    assert len(judged.texts) == 2400
    assert judged.recall() >= 0.99
    assert judged.precision() >= 0.98
    print(f"recall {judged.recall():.4f}, precision {judged.precision():.4f}")
