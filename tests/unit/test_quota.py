"""The quota: a pure decision, with the time after which another try makes sense."""

from __future__ import annotations

import pytest

from lapis.errors import LimitError
from lapis.tenants.quota import Asked, Consumption, Quota, check

NOON = 12 * 3600.0  # seconds of the first day


def test_without_limits_everything_passes() -> None:
    check(Quota(), Consumption(10**9, 10**12, 10**15), Asked(10**9), NOON)


def test_the_last_token_is_allowed_and_the_next_is_not() -> None:
    quota, used = Quota(tokens_per_minute=100), Consumption(tokens_minute=60)
    check(quota, used, Asked(40), NOON)
    with pytest.raises(LimitError) as caught:
        check(quota, used, Asked(41), NOON + 12.5)
    assert caught.value.retry_after == 47.5
    assert caught.value.param == "tokens_per_minute"
    assert "60 used, 41 asked for" in caught.value.message


def test_requests_are_counted_without_their_tokens() -> None:
    quota = Quota(requests_per_minute=2)
    check(quota, Consumption(requests_minute=1), Asked(10**6), NOON)
    with pytest.raises(LimitError, match="2 requests per minute"):
        check(quota, Consumption(requests_minute=2), Asked(0), NOON)


def test_a_spent_day_is_told_before_a_spent_minute() -> None:
    quota = Quota(tokens_per_minute=10, tokens_per_day=10)
    with pytest.raises(LimitError) as caught:
        check(quota, Consumption(tokens_minute=10, tokens_day=10), Asked(1), NOON)
    assert caught.value.retry_after == 12 * 3600


def test_what_can_never_pass_says_so() -> None:
    with pytest.raises(LimitError) as caught:
        check(Quota(tokens_per_minute=100), Consumption(), Asked(101), NOON)
    assert "fewer tokens" in caught.value.hint
