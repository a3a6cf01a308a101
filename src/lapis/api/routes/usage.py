"""/v1/organization/usage and /costs: the ledger of an organization in time buckets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query

from lapis.api.auth import OrganizationReader, ServicesOf
from lapis.api.protocol.usage import (
    COST_BUCKETS,
    MOST_SECONDS,
    UsagePage,
    UsageQuery,
    completions_result,
    costs_result,
    reading_result,
    usage_page,
)
from lapis.errors import InputError, NotFoundError
from lapis.tenants.buckets import Bucket, read_buckets
from lapis.tenants.prices import Prices

COMPLETIONS = ("project_id", "user_id", "api_key_id", "model", "batch")
READING = ("project_id", "user_id", "api_key_id", "model")
COSTS = ("project_id", "user_id", "line_item", "api_key_id")
# OpenAI's other kinds of work: none of it is ever done here, so its buckets are empty.
NEVER = (
    "audio_speeches", "audio_transcriptions", "code_interpreter_sessions", "decisions", "file_search_calls",
    "images", "vector_stores", "web_search_calls",
)  # fmt: skip

router = APIRouter(prefix="/v1/organization")
Seconds = Annotated[int, Query(ge=0, le=MOST_SECONDS)]


def _names(name: str) -> Any:
    return Query(alias=f"{name}[]", max_length=100)


def _query(
    start_time: Seconds,
    end_time: Seconds | None = None,
    bucket_width: Literal["1m", "1h", "1d"] = "1d",
    group_by: Annotated[list[str] | None, _names("group_by")] = None,
    project_ids: Annotated[list[str] | None, _names("project_ids")] = None,
    user_ids: Annotated[list[str] | None, _names("user_ids")] = None,
    api_key_ids: Annotated[list[str] | None, _names("api_key_ids")] = None,
    models: Annotated[list[str] | None, _names("models")] = None,
    line_items: Annotated[list[str] | None, _names("line_items")] = None,
    batch: bool | None = None,
    limit: Annotated[int | None, Query(ge=1, le=1440)] = None,
    page: Annotated[str | None, Query(max_length=40)] = None,
) -> UsageQuery:
    filters = {
        "project_id": project_ids or (), "user_id": user_ids or (), "api_key_id": api_key_ids or (),
        "model": models or (), "line_item": line_items or (),
    }  # fmt: skip
    return UsageQuery(
        start_time=start_time, end_time=end_time, bucket_width=bucket_width, group_by=group_by or [],
        filters=filters, batch=batch, limit=limit, page=page,
    )  # fmt: skip


Asked = Annotated[UsageQuery, Depends(_query)]


@router.get("/usage/{kind}")
def read_usage(kind: str, services: ServicesOf, caller: OrganizationReader, asked: Asked) -> UsagePage:
    """What was used, in buckets of a minute, an hour or a day, empty ones too."""
    if kind in NEVER:
        buckets, following = asked.span().buckets()
        return usage_page([Bucket(start, end, ()) for start, end in buckets], following, completions_result)
    if kind not in ("completions", "embeddings", "moderations"):
        raise NotFoundError(f"There is no usage of {kind[:40]!r}.")
    completions = kind == "completions"
    groups = asked.groups(COMPLETIONS if completions else READING)
    found = read_buckets(services.db, asked.filter(caller.organization_id, kind), asked.span(), groups)
    return usage_page(*found, completions_result if completions else reading_result(kind))


@router.get("/costs")
def read_costs(services: ServicesOf, caller: OrganizationReader, asked: Asked) -> UsagePage:
    """What it cost, in buckets of a day. An entry's cost was fixed when its work ended."""
    if asked.bucket_width != "1d":
        raise InputError("Costs come in buckets of a day: bucket_width is 1d.", param="bucket_width")
    groups = asked.groups(COSTS)
    span = asked.span(COST_BUCKETS)
    found = read_buckets(services.db, asked.filter(caller.organization_id), span, groups)
    return usage_page(*found, costs_result(Prices(services.home.prices).current().currency))
