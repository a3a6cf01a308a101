"""What is left of the project's limits, in OpenAI's headers; the ledger told it as it let the request in."""

from __future__ import annotations

from collections.abc import Sequence

from lapis.tenants.quota import LimitState


def limit_headers(limits: Sequence[LimitState]) -> dict[str, str]:
    """`x-ratelimit-*` of the limit on requests and of that on tokens that will be reached first; none, no header."""
    headers = {}
    for kind in ("requests", "tokens"):
        found = [state for state in limits if state.name.startswith(kind)]
        if not found:
            continue
        nearest = min(found, key=lambda state: (state.remaining / max(state.limit, 1), -state.reset))
        headers[f"x-ratelimit-limit-{kind}"] = str(nearest.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(max(nearest.remaining, 0))
        headers[f"x-ratelimit-reset-{kind}"] = duration(nearest.reset)
    return headers


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `2h0m5s`."""
    if seconds < 1:
        return f"{max(round(seconds * 1000), 0)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
