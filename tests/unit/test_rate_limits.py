"""Limits in headers: the one that is reached first, in OpenAI's words."""

from __future__ import annotations

import pytest

from lapis.api.rate_limits import duration, limit_headers
from lapis.tenants.quota import LimitState


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0123, "12ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9994, "59.999s"),
        (360, "6m0s"),
        (7205, "2h0m5s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_limit_that_is_reached_first_is_told() -> None:
    states = [
        LimitState("requests_per_minute", "", 10, 9, 30.0),
        LimitState("requests_per_minute", "tiny", 4, 1, 30.0),
        LimitState("tokens_per_day", "", 1000, 1, 3600.0),
        LimitState("tokens_per_minute", "", 500, 400, 30.0),
    ]
    assert limit_headers(states) == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1",
        "x-ratelimit-reset-tokens": "1h0m0s",
    }
    assert limit_headers([]) == {}
