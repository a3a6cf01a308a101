"""How tokens are chosen: against the formulas written out, and by counting what comes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lapis.inference.request import SamplingParams
from lapis.inference.sampler import Row, sample, top_tokens, uniform


def row(seed: int = 1, ids: list[int] | None = None, prompt: int = 1, **params: Any) -> Row:
    return Row(SamplingParams(max_tokens=1, **params), seed, ids or [0], prompt)


def draws(logits: list[float], count: int = 400, **params: Any) -> Counter[int | None]:
    """What many positions of one seed give."""
    logits_RV = torch.tensor([logits] * count)
    rows = [row(ids=[0] * (position + 1), **params) for position in range(count)]
    return Counter(sample(logits_RV, rows))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [row(temperature=0)]) == [1]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    counts = draws(probabilities.log().tolist(), count=4000)
    shares = torch.tensor([counts[token] / 4000 for token in range(4)])
    assert torch.allclose(shares, probabilities, atol=0.03)


def test_temperature_sharpens() -> None:
    logits = [1.0, 0.0]
    assert draws(logits, temperature=0.1)[1] < draws(logits, temperature=2.0)[1]
    assert set(draws(logits, temperature=1e-6)) == {0}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
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
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    assert set(draws(logits, **params)) == allowed


def test_top_p_over_more_tokens_than_are_sorted_at_first() -> None:
    logits = [0.0] * 1000 + [-50.0] * 1000
    counts = draws(logits, count=600, top_p=0.5)
    assert max(token for token in counts if token is not None) < 1000
    assert len(counts) > 250
    assert len(draws(logits, count=600, top_k=300)) <= 300


def test_bias_and_penalties() -> None:
    logits = torch.zeros(1, 4)
    assert sample(logits, [row(temperature=0, logit_bias={2: 1.0})]) == [2]
    assert sample(logits, [row(temperature=0, logit_bias={0: -100.0})]) == [1]
    seen = {"ids": [3, 0, 0, 1], "prompt": 1, "temperature": 0}
    logits = torch.tensor([[1.0, 0.8, 0.0, 0.1]])
    assert sample(logits, [row(**seen)]) == [0]
    assert sample(logits, [row(**seen, presence_penalty=0.5)]) == [0]
    assert sample(logits, [row(**seen, frequency_penalty=0.3)]) == [1]
    assert sample(logits, [row(**seen, presence_penalty=1.0)]) == [3]  # the prompt's 3 is not punished
    assert torch.equal(logits, torch.tensor([[1.0, 0.8, 0.0, 0.1]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_fails_alone(bad: float) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 50] = bad
    logits[:, 7] = 2.0
    assert sample(logits, [row(temperature=0)] * 3) == [7, None, 7]
    others = sample(logits, [row(top_p=0.9)] * 3)
    assert others[1] is None
    assert others[0] == others[2] is not None


def test_a_row_without_any_possible_token_fails() -> None:
    assert sample(torch.full((1, 4), -torch.inf), [row(temperature=0)]) == [None]


def test_tokens_without_weight_never_come() -> None:
    logits = torch.full((1, 200), -torch.inf)
    logits[0, 63] = 0.0
    for position in range(50):
        assert sample(logits, [row(ids=[0] * (position + 1))]) == [63]


def test_numbers_depend_on_seed_and_position_only() -> None:
    numbers = [uniform(seed, position) for seed in range(20) for position in range(200)]
    assert len(set(numbers)) == 4000
    assert all(0 < number < 1 for number in numbers)
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)
    assert uniform(3, 4) == uniform(3, 4)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_top_tokens() -> None:
    assert top_tokens(torch.tensor([0.0, 2.0, 1.0]), 2) == [1, 2]
    assert top_tokens(torch.tensor([0.0, 2.0, 1.0]), 0) == []
