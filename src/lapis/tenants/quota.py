"""How much a project may use: a pure decision over what it used in this minute and this day (UTC)."""

from __future__ import annotations

from dataclasses import dataclass

from lapis.errors import ConfigError, LimitError

MINUTE = 60
DAY = 86_400


@dataclass(frozen=True)
class Quota:
    """The limits of a project, per whole UTC minute or day; None means no limit. Raises ConfigError."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise ConfigError(f"{name} = {value}: a limit cannot be negative.", param=name)


@dataclass(frozen=True)
class Consumption:
    """What a project used or has reserved in the windows that `now` lies in."""

    requests_minute: int = 0
    tokens_minute: int = 0
    tokens_day: int = 0


def check(quota: Quota, used: Consumption, tokens: int, now: float) -> None:
    """Return if one more request of `tokens` tokens is within the quota.

    Raises LimitError with the seconds until the full window ends. A request larger than a whole limit can
    never pass; its error says so.
    """
    # The day first: waiting for the minute would not help when the day is spent.
    limits = (
        ("tokens_per_day", quota.tokens_per_day, used.tokens_day, tokens, DAY),
        ("tokens_per_minute", quota.tokens_per_minute, used.tokens_minute, tokens, MINUTE),
        ("requests_per_minute", quota.requests_per_minute, used.requests_minute, 1, MINUTE),
    )
    for param, limit, spent, asked, window in limits:
        if limit is None or spent + asked <= limit:
            continue
        if asked > limit:
            hint = "Ask for fewer tokens (max_tokens), or have the project's limit raised."
        else:
            hint = "Wait until the window ends, or have the project's limit raised."
        raise LimitError(
            f"The project's limit of {limit:,} {param.replace('_', ' ')} is reached: "
            f"{spent:,} used, {asked:,} asked for.",
            retry_after=seconds_left(now, window),
            hint=hint,
            param=param,
        )


def seconds_left(now: float, window: int) -> float:
    """Seconds until the window of `window` seconds around `now` ends."""
    return window - now % window
