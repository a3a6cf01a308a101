"""OpenAI's usage and costs: pages of time buckets, and the questions that they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel

from lapis.errors import InputError
from lapis.tenants.buckets import Bucket, Filter, Group, Span
from lapis.tenants.quota import NANO

Names = Annotated[list[str] | None, Query(max_length=100)]
MOST_SECONDS = 10**12
WIDTHS = {
    "1m": (60, 60, 1440),
    "1h": (3600, 24, 168),
    "1d": (86_400, 7, 31),
}  # seconds, default and most buckets
COST_BUCKETS = (86_400, 7, 180)
UNGROUPED: dict[str, None] = dict.fromkeys(("project_id", "user_id", "api_key_id", "api_source"))


class UsageQuery(BaseModel):
    """What all questions have: a time, its division, groups, filters, a page."""

    start_time: Annotated[int, Query(ge=0, le=MOST_SECONDS)]
    end_time: Annotated[int, Query(ge=0, le=MOST_SECONDS)] | None
    bucket_width: Literal["1m", "1h", "1d"]
    group_by: list[str]
    filters: Mapping[str, Sequence[str]]
    batch: bool | None
    limit: Annotated[int, Query(ge=1, le=1440)] | None
    page: str | None

    def span(self, sizes: tuple[int, int, int] | None = None) -> Span:
        """The buckets asked for, up to now where no end is given. Raises InputError."""
        width, default, most = sizes or WIDTHS[self.bucket_width]
        limit = default if self.limit is None else self.limit
        if limit > most:
            raise InputError(f"limit = {limit}: at most {most} buckets of this width.", param="limit")
        end = self.end_time
        if end is None:
            end = (int(time.time()) // width + 1) * width
        elif end <= self.start_time:
            raise InputError("end_time must be later than start_time.", param="end_time")
        return Span(self.start_time, end, width, limit, self.page)

    def groups(self, known: Sequence[str]) -> list[str]:
        """What to group by. Raises InputError for what this usage cannot be grouped by."""
        wrong = next((name for name in self.group_by if name not in known), None)
        if wrong is not None:
            raise InputError(f"group_by takes {', '.join(known)}, not {wrong[:40]!r}.", param="group_by")
        return list(dict.fromkeys(self.group_by))

    def filter(self, organization_id: str, *operations: str) -> Filter:
        """Which entries of the ledger count."""
        return Filter(organization_id, operations, self.filters, self.batch)


class BucketObject(BaseModel):
    """One span of time and what was used in it; nothing where nothing was."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[dict[str, Any]]


class UsagePage(BaseModel):
    """Buckets, and where the next ones are."""

    object: Literal["page"] = "page"
    data: list[BucketObject]
    has_more: bool
    next_page: str | None


def usage_page(
    buckets: Sequence[Bucket], following: str | None, write: Callable[[Group], dict[str, Any]]
) -> UsagePage:
    """Buckets as OpenAI's page."""
    data = [
        BucketObject(
            start_time=bucket.start, end_time=bucket.end, results=[write(group) for group in bucket.groups]
        )
        for bucket in buckets
    ]
    return UsagePage(data=data, has_more=following is not None, next_page=following)


def completions_result(group: Group) -> dict[str, Any]:
    """A group of chats, completions and responses."""
    uncached = group.prompt_tokens - group.cached_tokens
    batch = group.names.get("batch")
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": group.prompt_tokens,
        "output_tokens": group.completion_tokens,
        "num_model_requests": group.requests,
        "input_cached_tokens": group.cached_tokens,
        "input_cached_text_tokens": group.cached_tokens,
        "input_uncached_tokens": uncached,
        "input_text_tokens": uncached,
        "output_text_tokens": group.completion_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "model": None,
        "service_tier": None,
        **UNGROUPED,
        **group.names,
        "batch": None if batch is None else bool(batch),
    }


def reading_result(operation: str) -> Callable[[Group], dict[str, Any]]:
    """Groups of work that reads and writes nothing: embeddings, moderations."""

    def write(group: Group) -> dict[str, Any]:
        return {
            "object": f"organization.usage.{operation}.result",
            "input_tokens": group.prompt_tokens,
            "num_model_requests": group.requests,
            "model": None,
            **UNGROUPED,
            **group.names,
        }

    return write


def costs_result(currency: str) -> Callable[[Group], dict[str, Any]]:
    """Groups of costs; a quantity where it is of one kind."""

    def write(group: Group) -> dict[str, Any]:
        item = group.names.get("line_item")
        tokens = item is not None and item != "compute"
        return {
            "object": "organization.costs.result",
            "amount": {"value": group.cost / NANO, "currency": currency},
            "line_item": None,
            "quantity": float(group.tokens) if tokens else None,
            "quantity_unit": "tokens" if tokens else None,
            **UNGROUPED,
            **group.names,
        }

    return write
