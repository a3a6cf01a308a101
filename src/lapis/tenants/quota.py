"""How much a project may use: a pure decision over what it used in this minute, day and month (UTC)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from lapis.errors import ConfigError, LimitError

MINUTE = 60
DAY = 86_400
NANO = 10**9  # money is counted in billionths of the currency's unit, so that sums are exact
CENT = NANO // 100
SOON = 1.0  # seconds after which a place for a concurrent request may be free


@dataclass(frozen=True)
class Quota:
    """The limits of a project, or of one model in it, per whole UTC minute, day or month; None means no limit.

    Requests of batches count for the day and the month, not for the minute. Raises ConfigError.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    requests_per_day: int | None = None
    concurrent_requests: int | None = None
    batch_tokens_per_day: int | None = None  # prompt tokens of batches
    # Of a project only, not of a model:
    spend_per_month: int | None = None  # cents
    gpu_seconds_per_month: int | None = None
    storage_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < 2**53:
                raise ConfigError(f"{name} = {value}: a limit is a number from 0 to 2^53.", param=name)

    def check_counts(self) -> None:
        """Before it is set: raises ConfigError for a count that PostgreSQL's column does not hold."""
        for name in ("requests_per_minute", "concurrent_requests"):
            value = getattr(self, name)
            if value is not None and value >= 2**31:
                raise ConfigError(f"{name} = {value}: this limit is a number from 0 to 2^31.", param=name)

    @property
    def limited(self) -> bool:
        """Whether any limit is set."""
        return any(value is not None for value in vars(self).values())


PROJECT_ONLY = ("spend_per_month", "gpu_seconds_per_month", "storage_bytes")


@dataclass(frozen=True)
class Consumption:
    """What a project used or has reserved in the windows that `now` lies in, and what runs now."""

    requests_minute: int = 0
    tokens_minute: int = 0
    tokens_day: int = 0
    requests_day: int = 0
    batch_tokens_day: int = 0
    running: int = 0
    spend_month: int = 0  # in NANO
    gpu_ms_month: int = 0


@dataclass(frozen=True)
class Asked:
    """What one more request would add at most."""

    tokens: int
    prompt_tokens: int = 0
    spend: int = 0  # in NANO
    batch: bool = False


@dataclass(frozen=True)
class LimitState:
    """A limit with the request in it: what is left, and when its window ends. `model` is empty for all."""

    name: str  # of the Quota's field
    model: str
    limit: int
    remaining: int
    reset: float  # seconds


class QuotaError(LimitError):
    """A limit that a request would pass. `limits` are those on requests and tokens, without the request."""

    limits: Sequence[LimitState] = ()


def check(quota: Quota, used: Consumption, asked: Asked, now: float, model: str = "") -> list[LimitState]:
    """What is left of each limit on requests and tokens with one more request in it.

    Raises QuotaError with the seconds until the full window ends. A request larger than a whole limit can
    never pass; its error says so.
    """
    states, refusal = [], None
    for name, limit, spent, more, unit, left in _limits(quota, used, asked, now):
        if refusal is None and spent + more > limit:
            refusal = _refusal(name, limit, spent, more, unit, left, model)
        if not name.startswith(("spend", "concurrent", "batch")):
            states.append(LimitState(name, model, limit, limit - spent - more, left))
    if refusal is not None:
        mine = {"requests": 1, "tokens": asked.tokens}
        refusal.limits = [
            replace(state, remaining=state.remaining + mine[state.name.split("_")[0]]) for state in states
        ]
        raise refusal
    return states


def month_start(now: float) -> int:
    """When the UTC month around `now` began."""
    day = datetime.fromtimestamp(now, UTC)
    return int(datetime(day.year, day.month, 1, tzinfo=UTC).timestamp())


def seconds_left(now: float, window: int) -> float:
    """Seconds until the window of `window` seconds around `now` ends."""
    return window - now % window


def month_left(now: float) -> float:
    """Seconds until the UTC month around `now` ends."""
    return month_start(month_start(now) + 31.5 * DAY) - now


def _limits(
    quota: Quota, used: Consumption, asked: Asked, now: float
) -> Iterator[tuple[str, int, int, int, int, float]]:
    """Name, limit, spent, asked, the unit it is shown in, seconds left; the longest window first.

    Waiting for the minute would not help when the day is spent.
    """
    day, minute = seconds_left(now, DAY), seconds_left(now, MINUTE)
    if quota.spend_per_month is not None:
        limit = quota.spend_per_month * CENT
        yield "spend_per_month", limit, used.spend_month, asked.spend, CENT, month_left(now)
    if quota.tokens_per_day is not None:
        yield "tokens_per_day", quota.tokens_per_day, used.tokens_day, asked.tokens, 1, day
    if quota.requests_per_day is not None:
        yield "requests_per_day", quota.requests_per_day, used.requests_day, 1, 1, day
    if asked.batch:
        if quota.batch_tokens_per_day is not None:
            limit, spent = quota.batch_tokens_per_day, used.batch_tokens_day
            yield "batch_tokens_per_day", limit, spent, asked.prompt_tokens, 1, day
    else:
        if quota.tokens_per_minute is not None:
            yield "tokens_per_minute", quota.tokens_per_minute, used.tokens_minute, asked.tokens, 1, minute
        if quota.requests_per_minute is not None:
            yield "requests_per_minute", quota.requests_per_minute, used.requests_minute, 1, 1, minute
    if quota.concurrent_requests is not None:
        yield "concurrent_requests", quota.concurrent_requests, used.running, 1, 1, SOON


def _refusal(name: str, limit: int, spent: int, asked: int, unit: int, left: float, model: str) -> QuotaError:
    if asked > limit:
        hint = "Ask for fewer tokens (max_tokens), or have the project's limit raised."
    else:
        hint = "Wait until the window ends, or have the project's limit raised."
    what = name.replace("_", " ") if unit == 1 else "cents spent per month"
    shown = [
        f"{value // unit:,}" if value % unit == 0 else f"{value / unit:,.4f}"
        for value in (limit, spent, asked)
    ]
    of = f" for the model {model!r}" if model else ""
    return QuotaError(
        f"The project's limit of {shown[0]} {what}{of} is reached: {shown[1]} used, {shown[2]} asked for.",
        retry_after=left,
        hint=hint,
        param=name,
    )
