"""Which steps are bad: not finite, or far above the last ones; and what a replay tells."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lapis.train.bad_step import ENOUGH, Numbers, complaint, fault

PAST = [Numbers(3.0 + 0.01 * (n % 7), 1.0 + 0.05 * (n % 5)) for n in range(100)]
BAD = (math.nan, math.inf, -math.inf)


@given(st.sampled_from(BAD), st.floats(0, 10), st.booleans())
def test_what_is_not_finite_is_bad_with_or_without_a_past(bad: float, good: float, first: bool) -> None:
    numbers = Numbers(bad, good) if first else Numbers(good, bad)
    assert complaint(numbers, [], None) == complaint(numbers, PAST, 20.0) == "not finite"


@given(st.floats(3, 50), st.floats(0.0, 3.2), st.floats(0.0, 1.3))
def test_less_than_usual_is_never_bad(outlier: float, loss: float, norm: float) -> None:
    assert complaint(Numbers(min(loss, 3.06), min(norm, 1.2)), PAST, outlier) is None


def test_a_leap_of_loss_or_gradient_is_bad_once_there_is_enough_to_compare_with() -> None:
    leap, shove = Numbers(6.0, 1.0), Numbers(3.0, 300.0)
    assert complaint(leap, PAST, 20.0) == "loss far above the last ones"
    assert complaint(shove, PAST, 20.0) == "gradient far above the last ones"
    assert complaint(leap, PAST, None) is complaint(leap, PAST[: ENOUGH - 1], 20.0) is None
    assert complaint(Numbers(3.3, 4.0), PAST, 20.0) is None  # a step may be harder than others


@given(st.floats(0.001, 10), st.integers(ENOUGH, 100))
def test_steps_that_were_all_alike_do_not_make_the_next_one_an_outlier(loss: float, count: int) -> None:
    assert complaint(Numbers(loss * 1.05, 1.1), [Numbers(loss, 1.0)] * count, 20.0) is None


def test_a_replay_with_the_same_bits_blames_the_data() -> None:
    assert fault(Numbers(math.nan, math.nan), Numbers(math.nan, math.nan)) == "data"
    assert fault(Numbers(9.0, 1.0), Numbers(9.0, 1.0)) == "data"
    assert fault(Numbers(9.0, 1.0), Numbers(math.nextafter(9.0, 1.0), 1.0)) == "hardware"
