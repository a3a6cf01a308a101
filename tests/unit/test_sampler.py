"""How tokens are chosen: against the formulas written out, and by counting what comes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lapis.inference import sampler
from lapis.inference.request import SamplingParams
from lapis.inference.sampler import Row, sample, top_tokens, uniform

LOGITS = [math.log(probability) for probability in (0.5, 0.25, 0.15, 0.1)]


def row(seed: int = 1, ids: list[int] | None = None, prompt: int = 1, **params: Any) -> Row:
    return Row(SamplingParams(max_tokens=1, **params), seed, ids or [0], prompt)


def draws(logits: list[float], count: int = 400, **params: Any) -> Counter[int | None]:
    """What many positions of one seed give."""
    logits_RV = np.array([logits] * count, np.float32)
    rows = [row(ids=[0] * (position + 1), **params) for position in range(count)]
    return Counter(sample(logits_RV, rows))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0]], np.float32)
    assert sample(logits, [row(temperature=0)]) == [1]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    counts = draws(LOGITS, count=4000)
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)


def test_temperature_sharpens() -> None:
    logits = [1.0, 0.0]
    assert draws(logits, temperature=0.1)[1] < draws(logits, temperature=2.0)[1]
    assert set(draws(logits, temperature=1e-6)) == {0}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # 0.5 + 0.25 of 0.9 is 0.83
        ({"top_k": 3, "min_p": 0.4}, {0, 1}),
        ({"top_k": 1000}, {0, 1, 2, 3}),
    ],
)
def test_filters_leave_what_they_should(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(LOGITS, **params)) == allowed


def test_tokens_that_tie_with_the_last_allowed_one_stay() -> None:
    logits = [0.0] * 100 + [-1.0] * 100
    assert len(draws(logits, count=1000, top_k=5)) == 100
    assert len(draws(logits, count=1000, top_p=0.5)) == 100


def test_bias_and_penalties() -> None:
    logits = np.zeros((1, 4), np.float32)
    assert sample(logits, [row(temperature=0, logit_bias={2: 1.0})]) == [2]
    assert sample(logits, [row(temperature=0, logit_bias={0: -100.0})]) == [1]
    seen = {"ids": [3, 0, 0, 1], "prompt": 1, "temperature": 0}
    logits = np.array([[1.0, 0.8, 0.0, 0.1]], np.float32)
    assert sample(logits, [row(**seen)]) == [0]
    assert sample(logits, [row(**seen, presence_penalty=0.5)]) == [0]
    assert sample(logits, [row(**seen, frequency_penalty=0.3)]) == [1]
    assert sample(logits, [row(**seen, presence_penalty=1.0)]) == [3]  # the prompt's 3 is not punished
    assert np.array_equal(logits, np.array([[1.0, 0.8, 0.0, 0.1]], np.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_fails_alone(bad: float) -> None:
    logits = np.zeros((3, 100), np.float32)
    logits[1, 50] = bad
    logits[:, 7] = 2.0
    assert sample(logits, [row(temperature=0)] * 3) == [7, None, 7]
    others = sample(logits, [row(top_p=0.9)] * 3)
    assert others[1] is None
    assert others[0] == others[2] is not None


def test_a_row_without_any_possible_token_fails() -> None:
    assert sample(np.full((1, 4), -np.inf, np.float32), [row(temperature=0)]) == [None]


def test_tokens_without_weight_never_come() -> None:
    logits = np.full((1, 200), -np.inf, np.float32)
    logits[0, 63] = 0.0
    for position in range(50):
        assert sample(logits, [row(ids=[0] * (position + 1))]) == [63]


def test_the_largest_number_gives_a_token_with_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: 1.0)
    for size in (3, 64, 130, 1000):
        logits = np.full((1, 2 * size), -np.inf, np.float32)
        logits[0, :size] = np.linspace(-1, 0, size)
        (token,) = sample(logits, [row()])
        assert token is not None and token < size


def test_numbers_depend_on_seed_and_position_only() -> None:
    numbers = [uniform(seed, position) for seed in range(20) for position in range(200)]
    assert len(set(numbers)) == 4000
    assert all(0 < number < 1 for number in numbers)
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)
    assert uniform(3, 4) == uniform(3, 4)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_the_repetition_penalty_counts_the_prompt() -> None:
    logits = np.array([[2.0, 1.9, -1.0, -1.2]], np.float32)
    assert sample(logits, [row(ids=[0], temperature=0, repetition_penalty=1.1)]) == [1]
    only = np.array([[-9.0, -9.0, -1.0, -1.2]], np.float32)
    assert sample(only, [row(ids=[2], temperature=0, repetition_penalty=1.1)]) == [2]
    assert sample(only, [row(ids=[2], temperature=0, repetition_penalty=1.5)]) == [3]


def test_min_p_is_measured_before_top_p() -> None:
    """As in vLLM: 0.5 and 0.25 are left by min-p, so the first has two thirds of what is left."""
    assert set(draws(LOGITS, min_p=0.4, top_p=0.6)) == {0}
    assert set(draws(LOGITS, top_p=0.6)) == {0, 1}


def masked(allowed: list[int], barred: frozenset[int] = frozenset(), **params: Any) -> Row:
    mask_W = np.zeros(7, np.uint32)
    for token in allowed:
        mask_W[token >> 5] |= np.uint32(1 << (token & 31))
    return Row(SamplingParams(max_tokens=1, **params), 1, [0], 1, None, mask_W, barred)


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 5, "min_p": 0.01}])
def test_only_what_the_mask_allows_comes(params: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (1, 200)).astype(np.float32)
    allowed = [3, 63, 64, 150, 199]
    (token,) = sample(logits, [masked(allowed, **params)])
    assert token in allowed
    if params.get("temperature") == 0:
        assert token == max(allowed, key=lambda id: logits[0, id])
    assert sample(logits, [masked([77], **params)]) == [77]
    assert sample(logits, [masked([], **params)]) == [None]
    assert sample(logits, [masked([201, 5], **params)]) == [5]  # padding beyond the logits does not count


def test_end_tokens_wait_unless_nothing_else_is_allowed() -> None:
    logits = np.zeros((1, 200), np.float32)
    logits[0, 7] = 50.0
    for params in ({"temperature": 0}, {}):
        assert sample(logits, [masked([7, 8], frozenset({7}), **params)]) == [8]
        assert sample(logits, [masked([7, 9], frozenset({7, 9}), **params)]) == [7]
        (token,) = sample(logits, [Row(SamplingParams(1, **params), 1, [0], 1, barred=frozenset({7}))])
        assert token not in (7, None)


def test_top_tokens() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    assert [top_tokens(logits, count) for count in (0, 1, 3, 9)] == [[], [1], [1, 3, 2], [1, 3, 2, 0]]
