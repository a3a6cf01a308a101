"""Rules of the n-gram yardstick that hold for every stream of tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.evaluate.ngram import KneserNey

VOCAB = 6
END = 0

streams = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(training=streams, context=st.lists(st.integers(0, VOCAB - 1), max_size=8), order=st.integers(2, 5))
def test_every_context_has_a_proper_distribution(training: list[int], context: list[int], order: int) -> None:
    model = KneserNey.train(np.array([END, *training], dtype=np.uint16), VOCAB, END, order)
    scores = np.array([model.score(np.array([END, *context, word]))[-1] for word in range(VOCAB)])
    assert (scores < 0).all()
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(np.exp(scores).sum(), 1.0, rtol=1e-12)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(training=streams, first=streams, second=streams)
def test_documents_score_alone_as_together(training: list[int], first: list[int], second: list[int]) -> None:
    model = KneserNey.train(np.array([END, *training, END]), VOCAB, END)
    together = model.score(np.array([END, *first, END, *second, END]))
    apart = [model.score(np.array([END, *part, END])) for part in (first, second)]
    np.testing.assert_array_equal(together, np.concatenate(apart))
