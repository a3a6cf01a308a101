"""The n-gram yardstick against a slow dictionary form that follows the paper word by word."""

from __future__ import annotations

import inspect
import json.decoder
import json.encoder
import math
import random
from collections import Counter, defaultdict
from types import ModuleType

import numpy as np
import pytest

from lapis.evaluate.ngram import KneserNey

END = 0


class Judge:
    """Interpolated modified Kneser-Ney over dictionaries (Chen & Goodman 1999), one gram at a time."""

    def __init__(self, documents: list[list[int]], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        plain: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            tokens = [END, *document, END]
            for last in range(1, len(tokens)):
                for k in range(1, min(order, last + 1) + 1):
                    plain[k][tuple(tokens[last - k + 1 : last + 1])] += 1
        self.counts: list[Counter[tuple[int, ...]]] = [Counter()]
        for k in range(1, order + 1):
            neighbours = Counter(gram[1:] for gram in plain[k + 1]) if k < order else plain[k]
            begins = {gram: count for gram, count in plain[k].items() if k > 1 and gram[0] == END}
            self.counts.append(Counter({**neighbours, **begins}))
        self.discounts = [self._discounts(k) for k in range(order + 1)]
        self.following: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for counts in self.counts:
            for gram, count in counts.items():
                self.following[gram[:-1]][gram[-1]] = count

    def _discounts(self, k: int) -> list[float]:
        n = Counter(self.counts[k].values())
        if not (n[1] and n[2] and n[3]):
            return [0.0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0.0] + [j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3)]
        return found if all(0 < found[j] <= j for j in (1, 2, 3)) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[int, ...], word: int) -> float:
        shorter = 1 / self.vocab_size if not context else self.probability(context[1:], word)
        following = self.following.get(context, {})
        total = sum(following.values())
        if not total:
            return shorter
        discount = self.discounts[len(context) + 1]
        freed = sum(discount[min(count, 3)] for count in following.values())
        count = following.get(word, 0)
        return (count - discount[min(count, 3)] + freed * shorter) / total

    def score(self, stream: list[int]) -> list[float]:
        scores, document = [], [END]
        for token in stream[1:]:
            context = tuple(document[-(self.order - 1) :])
            scores.append(math.log(self.probability(context, token)))
            document = [END] if token == END else [*document, token]
        return scores


def stream_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([END] + [token for document in documents for token in [*document, END]])


def random_documents(seed: int, vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Repetitive text: words follow a skewed chain, so that grams of every order occur again."""
    generator = np.random.default_rng(seed)
    chain = generator.dirichlet(np.full(vocab_size - 1, 0.15), size=vocab_size)
    documents = []
    for _ in range(count):
        word, document = 0, []
        for _ in range(int(generator.integers(0, length))):
            word = 1 + int(generator.choice(vocab_size - 1, p=chain[word]))
            document.append(word)
        documents.append(document)
    return documents


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize(("vocab_size", "count"), [(12, 3), (30, 60)])
def test_probabilities_are_those_of_the_slow_form(order: int, vocab_size: int, count: int) -> None:
    training = random_documents(1, vocab_size, count, 40)
    held_out = random_documents(2, vocab_size, 12, 40) + training[:1]
    model = KneserNey.train(stream_of(training), vocab_size, END, order)
    judge = Judge(training, vocab_size, order)
    np.testing.assert_allclose(
        model.score(stream_of(held_out)), judge.score(list(stream_of(held_out))), rtol=1e-9
    )


def test_it_sums_to_one_for_seen_and_unseen_contexts() -> None:
    vocab_size = 40
    training = random_documents(3, vocab_size, 50, 60)
    model = KneserNey.train(stream_of(training), vocab_size, END)
    longest = max(training, key=len)
    contexts = [
        [],
        [1],
        longest[:2],
        longest[:4],
        longest[:9],
        [39, 38, 39, 38, 39],
        [5, 39],
        [*longest[:3], 39],
    ]
    for context in contexts:
        scores = [model.score(np.array([END, *context, word]))[-1] for word in range(vocab_size)]
        assert math.isclose(float(np.exp(scores).sum()), 1.0, rel_tol=1e-12), context


def test_nothing_leaks_from_one_document_into_the_next() -> None:
    """The document before a text changes neither what is counted from it nor how it is scored."""
    a, b, c = [3, 4, 5, 6], [7, 8, 9, 3], [4, 5, 9, 9, 2]
    model = KneserNey.train(stream_of([a, b, c, a, b]), 12, END)
    other = KneserNey.train(stream_of([b, a, b, c, a]), 12, END)
    text = stream_of([c, a])
    np.testing.assert_array_equal(model.score(text), other.score(text))
    alone = np.concatenate([model.score(stream_of([c])), model.score(stream_of([a]))])
    np.testing.assert_array_equal(model.score(text), alone)


def test_rows_are_counted_apart() -> None:
    """Training windows as rows of a matrix: no gram crosses from one row into the next."""
    rows = np.array([[0, 1, 2, 3], [4, 5, 0, 1], [2, 2, 3, 4]])
    swapped = rows[[2, 0, 1]]
    text = np.array([0, 1, 2, 3, 4, 5, 0, 3, 4])
    np.testing.assert_array_equal(
        KneserNey.train(rows, 6, END).score(text), KneserNey.train(swapped, 6, END).score(text)
    )


def test_without_training_tokens_every_word_is_equally_likely() -> None:
    for tokens in (np.array([], dtype=np.uint16), np.array([END], dtype=np.uint16)):
        scores = KneserNey.train(tokens, 8, END).score(np.array([END, 3, 4, END]))
        np.testing.assert_allclose(np.exp(scores), 1 / 8)


def test_ids_of_a_large_vocabulary_do_not_collide() -> None:
    """128 k words to the fifth power do not fit 64 bits; ranks do."""
    vocab_size = 131072
    high = [[131071, 131070, 131069, 131068, 131067, 5]] * 4 + [[131071, 131070, 131069, 131068, 7, 6]]
    model = KneserNey.train(stream_of(high).astype(np.uint32), vocab_size, END)
    text = stream_of([high[0], high[4]])
    np.testing.assert_allclose(model.score(text), Judge(high, vocab_size, 5).score(list(text)), rtol=1e-9)


def test_more_context_predicts_real_text_better() -> None:
    """Bytes of one module of the standard library, predicted by what was counted in others."""

    def tokens(*modules: ModuleType) -> np.ndarray:
        return stream_of([[1 + byte for byte in inspect.getsource(module).encode()] for module in modules])

    training, held_out = tokens(inspect, json.encoder, random), tokens(json.decoder)
    bits = [
        -KneserNey.train(training, 257, END, order).score(held_out).mean() / math.log(2)
        for order in (2, 3, 5)
    ]
    assert bits[2] < bits[1] < bits[0] < 8
