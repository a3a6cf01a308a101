"""A row's token is its own business: the same alone and in any batch, and always one that the filters allow."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from lapis.inference.request import SamplingParams
from lapis.inference.sampler import Row, sample

params = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 200]),
    min_p=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {0: 5.0, 3: -100.0}]),
)
rows = st.builds(
    Row, params, st.integers(0, 9), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.just(1)
)


@settings(max_examples=100)
@given(
    rows=st.lists(rows, min_size=1, max_size=8),
    vocabulary=st.sampled_from([61, 64, 1000]),
    seed=st.integers(0, 99),
)
def test_alone_and_in_a_batch(rows: list[Row], vocabulary: int, seed: int) -> None:
    logits_RV = np.random.default_rng(seed).normal(0, 3, (len(rows), vocabulary)).astype(np.float32)
    together = sample(logits_RV, rows)
    assert together == [sample(logits_RV[n : n + 1], [row])[0] for n, row in enumerate(rows)]
    assert together == sample(logits_RV[::-1], rows[::-1])[::-1]


@settings(max_examples=100)
@given(row=rows, seed=st.integers(0, 99), size=st.sampled_from([5, 300]))
def test_against_the_filters_written_out(row: Row, seed: int, size: int) -> None:
    logits_V = np.random.default_rng(seed).normal(0, 2, max(size, 61)).astype(np.float32)
    token = sample(logits_V[None], [row])[0]
    assert token is not None
    p = row.params
    adjusted_V = logits_V.astype(np.float64)
    for biased, bias in p.logit_bias.items():
        adjusted_V[biased] += bias
    for token_seen in set(row.ids):
        adjusted_V[token_seen] *= p.repetition_penalty ** -np.sign(adjusted_V[token_seen])
    completion = row.ids[row.prompt_tokens :]
    for seen in set(completion):
        adjusted_V[seen] -= p.presence_penalty + p.frequency_penalty * completion.count(seen)
    if p.greedy:
        assert adjusted_V[token] > adjusted_V.max() - 1e-5
        return
    weight_V = np.exp((adjusted_V - adjusted_V.max()) / p.temperature)
    order = [token for token in np.argsort(-weight_V).tolist() if weight_V[token] >= p.min_p - 1e-6]
    order = order[: p.top_k or None]
    rank = order.index(token)
    before = sum(float(weight_V[other]) for other in order[:rank])
    assert rank == 0 or before < p.top_p * sum(float(weight_V[other]) for other in order) * (1 + 1e-5)
