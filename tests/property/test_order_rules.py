"""The order of samples is a permutation, every epoch another one, for any size and seed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lapis.data.order import sample_at, samples_from


@given(st.integers(1, 600), st.integers(0, 2**70), st.integers(0, 5))
def test_each_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    indices = range(epoch * samples, (epoch + 1) * samples)
    assert sorted(sample_at(index, samples, seed) for index in indices) == list(range(samples))


@given(st.integers(1, 2**60), st.integers(0, 2**63), st.integers(0, 2**60))
def test_any_index_of_any_size_has_its_sample(samples: int, seed: int, index: int) -> None:
    assert 0 <= sample_at(index, samples, seed) < samples


@given(
    st.integers(1, 2**60) | st.integers(1, 50),
    st.integers(0, 2**70),
    st.integers(0, 2**60),
    st.integers(1, 60),
)
def test_many_at_once_are_the_same_as_one_by_one(samples: int, seed: int, index: int, count: int) -> None:
    expected = [sample_at(n, samples, seed) for n in range(index, index + count)]
    assert samples_from(index, count, samples, seed).tolist() == expected


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(sample_at(e * 50 + n, 50, seed) for n in range(50)) for seed in range(4) for e in range(4)
    }
    assert len(orders) == 16


def test_the_first_samples_are_spread_over_the_whole_range() -> None:
    tenths = [0] * 10
    for index in range(10_000):
        tenths[sample_at(index, 1_000_000, 7) * 10 // 1_000_000] += 1
    assert all(850 < count < 1150 for count in tenths)  # 1000 each, give or take five standard deviations
