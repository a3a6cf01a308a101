"""The learning rate's rise, flat stretch and fall, for runs by steps and by minutes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.train.schedule import Schedule, by_minutes, by_steps, close, decay_is_due


@given(st.integers(1, 2000), st.integers(1, 50), st.floats(0, 1))
def test_the_rate_rises_stays_and_falls_to_zero(steps: int, warmup: int, decay: float) -> None:
    plan = by_steps(steps, warmup, decay)
    scales = [plan.scale(step) for step in range(steps + 1)]
    assert all(0 <= scale <= 1 for scale in scales)
    after = scales[warmup:]
    assert all(later <= earlier for earlier, later in zip(after, after[1:], strict=False))
    assert scales[steps] == 0 or steps < warmup or decay == 0
    assert not plan.done(steps - 1)
    assert plan.done(steps)


@given(st.floats(0.05, 10), st.floats(0.01, 2), st.floats(0.1, 0.9))
def test_a_run_by_minutes_ends_about_then_at_a_steady_speed(
    minutes: float, step_s: float, decay: float
) -> None:
    plan, step, trained_s = by_minutes(5), 0, 0.0
    while not plan.done(step):
        step, trained_s = step + 1, trained_s + step_s
        if decay_is_due(plan, trained_s, minutes, decay):
            plan = close(plan, step, trained_s, minutes)
    assert abs(trained_s - minutes * 60) <= 2.5 * step_s + 0.01


def test_the_end_is_fixed_once() -> None:
    plan = close(by_minutes(5), step=40, trained_s=30.0, minutes=1.0)
    assert (plan.decay_from, plan.steps) == (40, 80)
    assert not decay_is_due(plan, trained_s=50.0, minutes=1.0, decay=0.5)


@given(
    st.integers(60, 2000),
    st.integers(1, 50),
    st.sampled_from(["wsd", "linear", "cosine"]),
    st.floats(0, 0.5),
)
def test_every_schedule_falls_from_the_peak_to_its_final_rate(
    steps: int, warmup: int, schedule: Schedule, final: float
) -> None:
    plan = by_steps(steps, warmup, 0.2, schedule, final)
    scales = [plan.scale(step) for step in range(steps + 1)]
    assert max(scales) == 1.0
    assert scales[steps] == pytest.approx(final)
    assert all(
        later <= earlier for earlier, later in zip(scales[warmup:], scales[warmup + 1 :], strict=False)
    )
    middle = (plan.decay_from or 0) + (steps - (plan.decay_from or 0)) // 2
    assert plan.scale(middle) == pytest.approx((1 + final) / 2, abs=0.06)  # a half of the way, in each shape


def test_cosine_is_nearly_flat_at_both_ends_where_linear_is_not() -> None:
    cosine, linear = (by_steps(1000, 10, 0.0, kind) for kind in ("cosine", "linear"))  # type: ignore[arg-type]
    assert 1 - cosine.scale(60) < 0.01 < 1 - linear.scale(60)
    assert cosine.scale(950) < 0.01 < linear.scale(950)
    assert cosine.scale(505) == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)
